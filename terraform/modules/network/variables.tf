variable "name" {
  type        = string
  description = "Name of the VPC, and the first part of the names of what is in it."
}

variable "cidr" {
  type        = string
  description = "Addresses of the VPC, at least a /16: each zone takes a sixteenth for nodes and pods."
}

variable "zone_count" {
  type        = number
  description = "How many availability zones to span, from 2 (which EKS asks for) to 6."
}

variable "nat_per_zone" {
  type        = bool
  description = "A NAT gateway in each zone instead of one for all: no traffic between zones, and no zone hangs on another."
}

variable "log_bucket_arn" {
  type        = string
  description = "ARN of the bucket that takes the flow logs of rejected traffic."
}
