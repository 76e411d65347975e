variable "name" {
  type        = string
  description = "First part of the buckets' names; the account's number, which makes them unique, is the last."
}

variable "undelete_days" {
  type        = number
  description = "For how many days what was deleted or overwritten can be got back (and is paid for)."
}

variable "log_days" {
  type        = number
  description = "For how many days logs are kept."
}

variable "delete_on_destroy" {
  type        = bool
  description = "Let `terraform destroy` delete buckets that are not empty, with all images and runs in them."
}
