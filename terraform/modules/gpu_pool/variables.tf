variable "name" {
  type        = string
  description = "Name of this kind of node, as in `launch --gpu NAME`."
}

variable "instance_type" {
  type        = string
  description = "EC2 type with NVIDIA GPUs."
}

variable "max_nodes" {
  type        = number
  description = "The most nodes of this kind that a run may have."
}

variable "on_demand" {
  type        = object({ price_per_hour = optional(number) })
  description = "Offer on-demand nodes, at this price; null does not."
}

variable "spot" {
  type        = object({ price_per_hour = optional(number) })
  description = "Offer spot nodes, at this price; null does not."
}

variable "cache_gib" {
  type        = number
  description = "Space that a node keeps for downloaded images, on its NVMe disks or else on its root volume."
}

variable "cluster_name" {
  type        = string
  description = "Name of the cluster, once it is ready for nodes."
}

variable "node_role_arn" {
  type        = string
  description = "ARN of the role of the nodes."
}

variable "subnet_ids" {
  type        = map(string)
  description = "Private subnet of each zone, by zone."
}

variable "tags" {
  type        = map(string)
  description = "Tags for instances, volumes and network interfaces."
}
