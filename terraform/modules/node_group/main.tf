# One managed node group: what every node of the cluster has in common (metadata service, disk, tags) is said here once.

# What nodes bring along (instances, volumes, network interfaces) gets no tags from the provider.
data "aws_default_tags" "current" {}

locals {
  # The instance's own disks as one array under kubelet and containerd, so that images and caches lie on them.
  local_disks = <<-EOT
    MIME-Version: 1.0
    Content-Type: multipart/mixed; boundary="//"

    --//
    Content-Type: application/node.eks.aws

    apiVersion: node.eks.aws/v1alpha1
    kind: NodeConfig
    spec:
      instance:
        localStorage:
          strategy: RAID0

    --//--
  EOT

  labels = merge(var.labels, { "raylaunch.dev/capacity" = var.spot ? "spot" : "on-demand" })

  # What the cluster autoscaler cannot see of a group that has no node yet; without it a pod that asks for a GPU, or
  # that selects these labels, waits for ever.
  template = "k8s.io/cluster-autoscaler/node-template"
  hints = var.min_nodes > 0 ? {} : merge(
    { for key, value in local.labels : "${local.template}/label/${key}" => value },
    { for key, value in var.taints : "${local.template}/taint/${key}" => "${value}:NoSchedule" },
    { for key, value in var.resources : "${local.template}/resources/${key}" => value },
  )
}

resource "aws_launch_template" "this" {
  name_prefix            = "${var.cluster.name}-${var.name}-"
  update_default_version = true
  user_data              = var.use_local_disks ? base64encode(local.local_disks) : null

  # With one hop a pod cannot reach the metadata service, and so never has the node's own role.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_type           = "gp3"
      volume_size           = var.disk.gib
      iops                  = var.disk.iops
      throughput            = var.disk.mib_per_second
      encrypted             = true
      delete_on_termination = true
    }
  }

  dynamic "tag_specifications" {
    for_each = toset(["instance", "volume", "network-interface"])
    content {
      resource_type = tag_specifications.value
      tags          = merge(data.aws_default_tags.current.tags, { Name = "${var.cluster.name}-${var.name}" })
    }
  }
}

resource "aws_eks_node_group" "this" {
  cluster_name    = var.cluster.name
  version         = var.cluster.version
  node_group_name = var.name
  node_role_arn   = var.cluster.node_role_arn
  subnet_ids      = var.subnet_ids
  ami_type        = var.ami_type
  capacity_type   = var.spot ? "SPOT" : "ON_DEMAND"
  instance_types  = [var.instance_type]
  labels          = local.labels

  dynamic "taint" {
    for_each = var.taints
    content {
      key    = taint.key
      value  = taint.value
      effect = "NO_SCHEDULE"
    }
  }

  launch_template {
    id      = aws_launch_template.this.id
    version = aws_launch_template.this.latest_version
  }

  scaling_config {
    min_size     = var.min_nodes
    max_size     = var.max_nodes
    desired_size = var.min_nodes
  }

  update_config {
    max_unavailable = 1
  }

  # From then on the autoscaler says how many.
  lifecycle {
    ignore_changes = [scaling_config[0].desired_size]
  }
}

resource "aws_autoscaling_group_tag" "hint" {
  for_each = local.hints

  autoscaling_group_name = aws_eks_node_group.this.resources[0].autoscaling_groups[0].name
  tag {
    key                 = each.key
    value               = each.value
    propagate_at_launch = false
  }
}
