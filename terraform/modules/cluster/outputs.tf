output "name" {
  description = "Name of the cluster."
  value       = aws_eks_cluster.this.name
}

output "for_nodes" {
  description = "The cluster as node groups take it, once nodes can become ready in it."
  value       = local.for_nodes
}

output "endpoint" {
  description = "Address of the API server."
  value       = aws_eks_cluster.this.endpoint
}

output "head_node_selector" {
  description = "Labels that lead a pod to the nodes for heads."
  value       = { "raylaunch.dev/nodes" = module.head_nodes.labels["raylaunch.dev/nodes"] }
}

output "head_tolerations" {
  description = "What a pod has to tolerate there, as Kubernetes writes it."
  value       = [{ key = "raylaunch.dev/head", operator = "Exists", effect = "NoSchedule" }]
}
