output "node_role_arn" {
  description = "ARN of the role of the nodes, once it may do what they need."
  value       = aws_iam_role.node.arn
  depends_on  = [aws_iam_role_policy_attachment.node]
}

output "launcher_role_arn" {
  description = "ARN of the role that those who launch take."
  value       = aws_iam_role.launcher.arn
}
