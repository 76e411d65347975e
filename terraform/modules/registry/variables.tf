variable "name" {
  type        = string
  description = "Name of the repository."
}

variable "host" {
  type        = string
  description = "Address of the account's registry in the region."
}

variable "delete_on_destroy" {
  type        = bool
  description = "Let `terraform destroy` delete the repository although there are images in it."
}
