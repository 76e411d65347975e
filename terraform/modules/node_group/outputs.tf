output "labels" {
  description = "All labels of the nodes that this configuration sets."
  value       = local.labels
}
