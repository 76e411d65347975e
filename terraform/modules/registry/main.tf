# Where the image of the pods lies.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

resource "aws_ecr_repository" "this" {
  #checkov:skip=CKV_AWS_136:ECR's own key encrypts as well; one of KMS adds a price and a way to lose every image
  name = var.name
  # A tag that cannot move makes `raylaunch:0.1.0` as good a pin as a digest.
  image_tag_mutability = "IMMUTABLE"
  force_delete         = var.delete_on_destroy

  image_scanning_configuration {
    scan_on_push = true
  }
  encryption_configuration {
    encryption_type = "AES256"
  }
}

# Nothing with a tag goes: runs that are resumed, or wait in a queue, still ask for the image they were made with.
resource "aws_ecr_lifecycle_policy" "this" {
  repository = aws_ecr_repository.this.name
  policy = jsonencode({
    rules = [{
      rulePriority = 1
      description  = "layers and images that no tag leads to"
      selection = {
        tagStatus   = "untagged"
        countType   = "sinceImagePushed"
        countUnit   = "days"
        countNumber = 14
      }
      action = { type = "expire" }
    }]
  })
}
