# What comes next takes these as they are; nothing has to be copied by hand.

locals {
  pool = merge({
    image           = "${module.registry.url}:${var.image_tag}"
    ray_version     = "2.60.0" # that of the image, as constraints.txt pins it
    storage         = "s3://${module.storage.buckets.runs}/${local.runs_prefix}"
    service_account = local.trainer.service_account
    node_types      = [for kind in var.gpu_types : module.gpu_pool[kind.name].node_type]
    head = {
      cpus           = "2"
      memory         = "8Gi"
      price_per_hour = var.head_nodes.price_per_hour
      node_selector  = module.cluster.head_node_selector
      tolerations    = module.cluster.head_tolerations
    }
    limits        = { for name, limit in var.run_limits : name => limit if limit != null }
    confirm_above = var.confirm_above
    currency      = "USD"
    cache_size    = "${var.cache_gib}Gi"
    env           = { AWS_REGION = var.region }
  }, var.queue == null ? {} : { queue = var.queue })

  # Of all kinds of nodes together; the quota of the namespace and of the queue.
  max_gpus = sum([for kind in local.pool.node_types : kind.gpus * kind.max_nodes])

  site = {
    POOL_NAME       = var.name
    CLUSTER_NAME    = module.cluster.name
    AWS_REGION      = var.region
    NAMESPACE       = local.namespace
    SERVICE_ACCOUNT = local.trainer.service_account
    LAUNCHER_GROUP  = local.launcher_group
    QUEUE           = var.queue == null ? "" : var.queue
    IMAGE           = local.pool.image
    MAX_GPUS        = tostring(local.max_gpus)
    MAX_HEADS       = tostring(var.head_nodes.max_nodes)
  }
}

output "pool_config" {
  description = "The description of the pool, as `pool.yaml` in its ConfigMap has it (docs/cluster.md)."
  value       = yamlencode(local.pool)
}

output "overlay" {
  description = "All that k8s/overlays/eks needs, in one file: the pool's ConfigMap, and one of values that kustomize fills in."
  value = join("---\n", [for document in [
    {
      metadata = { name = var.name, namespace = local.namespace, labels = { "raylaunch.dev/pool" = var.name } }
      data     = { "pool.yaml" = yamlencode(local.pool) }
    },
    {
      # kustomize reads it and does not send it to the cluster.
      metadata = { name = "site", annotations = { "config.kubernetes.io/local-config" = "true" } }
      data     = local.site
    },
  ] : yamlencode(merge({ apiVersion = "v1", kind = "ConfigMap" }, document))])
}

output "site" {
  description = "The values that k8s/overlays/eks fills in, by name."
  value       = local.site
}

output "image_repository" {
  description = "Where to push the image: `docker push` this, a colon and the version."
  value       = module.registry.url
}

output "buckets" {
  description = "Buckets for images (data), run directories (runs) and network logs (logs)."
  value       = module.storage.buckets
}

output "cluster_endpoint" {
  description = "Address of the API server."
  value       = module.cluster.endpoint
}

output "aws_profile" {
  description = "A profile for ~/.aws/config with which to launch: it reaches data, runs and the cluster, and nothing else."
  value       = <<-EOT
    [profile ${var.name}]
    role_arn       = ${module.identity.launcher_role_arn}
    source_profile = default
    region         = ${var.region}
  EOT
}

output "kubeconfig_command" {
  description = "Makes a context in ~/.kube/config that leads to the pool's namespace, for whoever AWS_PROFILE says."
  value = join(" && ", [
    "aws eks update-kubeconfig --region ${var.region} --name ${module.cluster.name} --alias ${var.name}",
    "kubectl config set-context ${var.name} --namespace ${local.namespace}",
  ])
}
