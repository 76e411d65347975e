variable "name" {
  type        = string
  description = "Name of the repository."
}

variable "delete_on_destroy" {
  type        = bool
  description = "Let `terraform destroy` delete the repository although there are images in it."
}
