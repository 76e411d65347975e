output "url" {
  description = "Address of the repository, known before it is there: an image is this, a colon and a tag."
  value       = "${var.host}/${var.name}"
  depends_on  = [aws_ecr_repository.this]
}
