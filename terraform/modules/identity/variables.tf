variable "name" {
  type        = string
  description = "Name of the cluster, and the first part of the names of roles. Known before the cluster is there."
}

variable "cluster_name" {
  type        = string
  description = "Name of the cluster, once it is there."
}

variable "read" {
  type        = list(object({ bucket = string, prefix = string }))
  description = "Where data sets lie: a bucket and a prefix without slashes around it, or an empty one for all of the bucket."
}

variable "runs" {
  type        = object({ bucket = string, prefix = string })
  description = "Where run directories lie."
}

variable "trainer" {
  type        = object({ namespace = string, service_account = string })
  description = "The service account of the pods of runs."
}

variable "autoscaler" {
  type        = object({ namespace = string, service_account = string })
  description = "The service account of the cluster autoscaler."
}

variable "launcher_principal_arns" {
  type        = list(string)
  description = "IAM roles and users that may take the role for launching."
}

variable "launcher_group" {
  type        = string
  description = "The Kubernetes group that those who launch are in."
}
