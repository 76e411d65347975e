variable "name" {
  type        = string
  description = "Name of the group, unique in its cluster."
}

variable "cluster" {
  type        = object({ name = string, version = string, node_role_arn = string })
  description = "The cluster, once nodes can become ready in it: its name and version, and the ARN of its nodes' role."
}

variable "subnet_ids" {
  type        = list(string)
  description = "Subnets in which the nodes may stand."
}

variable "instance_type" {
  type        = string
  description = "EC2 type of every node: with several the autoscaler would plan with the first and get another."
}

variable "ami_type" {
  type        = string
  description = "Kind of the EKS image of the nodes."
  default     = "AL2023_x86_64_STANDARD"
}

variable "spot" {
  type        = bool
  description = "Spot nodes, which AWS may take back with two minutes' notice, instead of on-demand ones."
  default     = false
}

variable "min_nodes" {
  type        = number
  description = "The fewest nodes, and how many there are at first."
  default     = 0
}

variable "max_nodes" {
  type        = number
  description = "The most nodes."
}

variable "labels" {
  type        = map(string)
  description = "Labels of the nodes; raylaunch.dev/capacity (spot, on-demand) is added."
}

variable "taints" {
  type        = map(string)
  description = "Taints of the nodes, from key to value; all keep pods off (NoSchedule)."
  default     = {}
}

variable "resources" {
  type        = map(string)
  description = "What a node offers beside cores and memory, for the autoscaler while there is no node."
  default     = {}
}

variable "disk" {
  type = object({
    gib            = number
    iops           = optional(number, 3000)
    mib_per_second = optional(number, 125)
  })
  description = "Size and speed of the encrypted root volume; the speeds are those that cost nothing."
}

variable "use_local_disks" {
  type        = bool
  description = "Keep images and pods' files on the instance's own NVMe disks instead of the root volume."
  default     = false
}
