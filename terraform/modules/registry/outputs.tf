output "url" {
  description = "Address of the repository, known before it is there: an image is this, a colon and a tag."
  value = join("", [
    "${data.aws_caller_identity.current.account_id}.dkr.ecr.${data.aws_region.current.name}",
    ".${data.aws_partition.current.dns_suffix}/${var.name}",
  ])
  depends_on = [aws_ecr_repository.this]
}
