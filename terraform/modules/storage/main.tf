# Three private buckets: images to train on, run directories, and the network's logs.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

locals {
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition

  buckets    = { for purpose in ["data", "runs", "logs"] : purpose => "${var.name}-${purpose}-${local.account_id}" }
  arns       = { for purpose, bucket in local.buckets : purpose => "arn:${local.partition}:s3:::${bucket}" }
  log_source = "arn:${local.partition}:logs:${data.aws_region.current.name}:${local.account_id}:*"
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_145:S3's own keys encrypt as well; with KMS each read of an image would be a paid request more
  #checkov:skip=CKV_AWS_144:data sets have their origin elsewhere, and a run can be repeated: a copy in another region doubles the price
  #checkov:skip=CKV_AWS_18:access logs of millions of reads an epoch cost more than the images; CloudTrail has data events for who needs them
  #checkov:skip=CKV2_AWS_62:nothing here listens for events
  for_each = local.buckets

  bucket        = each.value
  force_destroy = var.delete_on_destroy
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = local.buckets

  bucket = aws_s3_bucket.this[each.key].id
  versioning_configuration {
    status = "Enabled"
  }
}

# S3's own keys: with KMS each read of an image is also a paid KMS request, and a policy more that can lock everyone out.
resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = local.buckets

  bucket = aws_s3_bucket.this[each.key].id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each = local.buckets

  bucket                  = aws_s3_bucket.this[each.key].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  for_each = local.buckets

  bucket = aws_s3_bucket.this[each.key].id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_policy" "this" {
  for_each = local.buckets

  bucket = aws_s3_bucket.this[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([{
      Sid       = "OnlyTls"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [local.arns[each.key], "${local.arns[each.key]}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }], each.key == "logs" ? local.log_delivery : [])
  })
  depends_on = [aws_s3_bucket_public_access_block.this]
}

locals {
  # Written here although AWS would add it by itself: it would then differ from this configuration for ever.
  log_delivery = [for sid, grant in {
    WriteFlowLogs = { action = "s3:PutObject", resource = "${local.arns.logs}/AWSLogs/${local.account_id}/*" }
    CheckBucket   = { action = "s3:GetBucketAcl", resource = local.arns.logs }
    } : {
    Sid       = sid
    Effect    = "Allow"
    Principal = { Service = "delivery.logs.amazonaws.com" }
    Action    = grant.action
    Resource  = grant.resource
    Condition = {
      StringEquals = { "aws:SourceAccount" = local.account_id }
      ArnLike      = { "aws:SourceArn" = local.log_source }
    }
  }]
}

# A run is resumed from its checkpoints, also after months. No rule here ends an object that is there: only what a run
# or a person has deleted or overwritten goes, some days later. Logs alone have an age.
resource "aws_s3_bucket_lifecycle_configuration" "this" {
  for_each = local.buckets

  bucket = aws_s3_bucket.this[each.key].id

  rule {
    id     = "forget-what-was-deleted"
    status = "Enabled"
    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.undelete_days
    }
    expiration {
      expired_object_delete_marker = true
    }
  }

  rule {
    id     = "drop-broken-uploads"
    status = "Enabled"
    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  dynamic "rule" {
    for_each = each.key == "logs" ? ["logs"] : []
    content {
      id     = "expire-logs"
      status = "Enabled"
      filter {}

      expiration {
        days = var.log_days
      }
    }
  }

  depends_on = [aws_s3_bucket_versioning.this]
}
