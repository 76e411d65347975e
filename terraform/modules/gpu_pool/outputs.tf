output "node_type" {
  description = "This kind of node as an entry of `node_types` in the description of a pool (docs/cluster.md)."
  value = merge({
    name     = var.name
    gpus     = local.gpu.count
    gpu_name = "NVIDIA ${local.gpu.name}"
    # Computed in bfloat16 since Ampere; what is older in EC2 is in this list.
    bf16 = !contains(["K80", "M60", "V100", "T4", "T4g"], local.gpu.name)
    # A core is for the system. Of the memory 7.5 % are not there to begin with (hypervisor, kernel), and 1.5 GiB are the
    # kubelet's and those of what runs on every node.
    cpus          = local.machine.default_vcpus - 1
    memory        = "${floor(local.machine.memory_size * 0.925 / 1024 - 1.5)}Gi"
    max_nodes     = var.max_nodes
    node_selector = { "raylaunch.dev/nodes" = var.name }
    tolerations   = [{ key = "nvidia.com/gpu", operator = "Exists", effect = "NoSchedule" }]
    }, {
    for kind, offer in local.offers : replace(kind, "-", "_") => merge(
      { node_selector = { "raylaunch.dev/capacity" = kind } },
      offer.price_per_hour == null ? {} : { price_per_hour = offer.price_per_hour },
    )
  })

  # Not asked of the offerings themselves: they would then be read only when the network is there, too late for a plan.
  precondition {
    condition     = length(local.zones) > 0
    error_message = "${var.instance_type} is sold in none of ${join(", ", keys(var.cluster.subnet_ids))}."
  }
}
