# One kind of GPU node, on demand, on spot, or both, from zero; and what the launcher has to know of it.
#
# A group stands in one zone: the autoscaler meets what a run waits for from one group, so that the traffic between its
# nodes is fast and free, and if the zone has no such machine left it tries the group of the next.

data "aws_ec2_instance_type" "this" {
  instance_type = var.instance_type

  lifecycle {
    postcondition {
      condition     = contains(self.supported_architectures, "x86_64")
      error_message = "${var.instance_type} is not an x86_64 machine; the image of the nodes is."
    }
    postcondition {
      condition     = anytrue([for gpu in self.gpus : gpu.manufacturer == "NVIDIA"])
      error_message = "${var.instance_type} has no NVIDIA GPU."
    }
    postcondition {
      condition     = !self.instance_storage_supported || try(self.total_instance_storage >= var.cache_gib + 60, true)
      error_message = "The own disks of ${var.instance_type} do not hold a cache of ${var.cache_gib} GiB beside 60 GiB of images."
    }
  }
}

data "aws_ec2_instance_type_offerings" "zones" {
  location_type = "availability-zone"
  filter {
    name   = "instance-type"
    values = [var.instance_type]
  }
}

locals {
  machine = data.aws_ec2_instance_type.this
  gpu     = tolist(local.machine.gpus)[0]
  nvme    = local.machine.instance_storage_supported
  zones   = setintersection(data.aws_ec2_instance_type_offerings.zones.locations, keys(var.cluster.subnet_ids))
  offers  = { for kind, offer in { on-demand = var.on_demand, spot = var.spot } : kind => offer if offer != null }
  groups = {
    for pair in setproduct(keys(local.offers), local.zones) :
    "${var.name}-${pair[0]}-${pair[1]}" => { spot = pair[0] == "spot", zone = pair[1] }
  }

  labels = {
    "raylaunch.dev/nodes"    = var.name
    "nvidia.com/gpu.present" = "true" # where the device plugin runs
    # The autoscaler waits for the plugin on a new node with this label, instead of starting a second node.
    "k8s.amazonaws.com/accelerator" = var.name
  }
  disk_gib = local.nvme ? 40 : var.cache_gib + 60
}

module "nodes" {
  source   = "../node_group"
  for_each = local.groups

  name            = each.key
  cluster         = var.cluster
  subnet_ids      = [var.cluster.subnet_ids[each.value.zone]]
  instance_type   = var.instance_type
  ami_type        = "AL2023_x86_64_NVIDIA"
  spot            = each.value.spot
  max_nodes       = var.max_nodes
  labels          = local.labels
  taints          = { "nvidia.com/gpu" = "present" }
  use_local_disks = local.nvme
  resources = {
    "nvidia.com/gpu"    = tostring(local.gpu.count)
    "ephemeral-storage" = "${var.cache_gib + 30}Gi"
  }
  # Without NVMe the cache is on the root volume, for which the free speed is too slow.
  disk = {
    gib            = local.disk_gib
    iops           = local.nvme ? 3000 : 6000
    mib_per_second = local.nvme ? 125 : 500
  }
}
