terraform {
  required_version = ">= 1.11.0, < 2.0.0" # 1.11 locks the state on S3 without a table in DynamoDB
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.100.0, < 6.0.0"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = local.tags
  }
}
