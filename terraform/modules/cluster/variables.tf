variable "name" {
  type        = string
  description = "Name of the cluster."
}

variable "kubernetes_version" {
  type        = string
  description = "Kubernetes version of control plane and nodes."
}

variable "subnet_ids" {
  type        = map(string)
  description = "Private subnet of each zone, by zone."
}

variable "endpoint_cidrs" {
  type        = list(string)
  description = "Addresses that may reach the API server from outside the VPC; with none it is private."
}

variable "admin_principal_arns" {
  type        = set(string)
  description = "IAM roles and users that administer the cluster."
}

variable "node_role_arn" {
  type        = string
  description = "ARN of the role of the nodes."
}

variable "system_nodes" {
  type        = object({ instance_type = string, count = number })
  description = "The nodes for operators, always there."
}

variable "head_nodes" {
  type        = object({ instance_type = string, max_nodes = number })
  description = "The nodes for heads of runs, from zero."
}

variable "log_days" {
  type        = number
  description = "For how many days the control plane's logs are kept."
}
