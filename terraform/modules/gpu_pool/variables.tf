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

variable "cluster" {
  type        = object({ name = string, version = string, node_role_arn = string, subnet_ids = map(string) })
  description = "The cluster, once nodes can become ready in it: as a node group takes it, and its private subnet in each zone."
}
