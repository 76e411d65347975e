# Names and ARNs are known before the buckets are there, so that a plan shows the policies that follow from them.

output "buckets" {
  description = "Name of each bucket (data, runs, logs), once what protects it is there."
  value       = local.buckets
  depends_on  = [aws_s3_bucket_policy.this, aws_s3_bucket_public_access_block.this]
}

output "log_bucket_arn" {
  description = "ARN of the bucket for logs, once they may be delivered to it."
  value       = local.arns.logs
  depends_on  = [aws_s3_bucket_policy.this]
}
