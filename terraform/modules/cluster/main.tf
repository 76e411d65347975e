# An EKS cluster, who may administer it, and the nodes that are not for training: a few always there for operators, and
# some from zero for the heads of runs.

data "aws_partition" "current" {}

resource "aws_kms_key" "secrets" {
  #checkov:skip=CKV2_AWS_64:the default policy leaves the key to the account's IAM; another is one more way to lock everyone out
  description             = "Encrypts the Kubernetes secrets of ${var.name}"
  enable_key_rotation     = true
  deletion_window_in_days = 7
}

resource "aws_kms_alias" "secrets" {
  name          = "alias/${var.name}-secrets"
  target_key_id = aws_kms_key.secrets.key_id
}

# Made before the cluster, which would make it without an end to what it keeps, and leave it behind.
resource "aws_cloudwatch_log_group" "control_plane" {
  #checkov:skip=CKV_AWS_158:CloudWatch's own key encrypts as well, and audit logs have only the names of secrets
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = var.log_days
}

resource "aws_iam_role" "control_plane" {
  name = "${var.name}-control-plane"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "eks.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "control_plane" {
  role       = aws_iam_role.control_plane.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_eks_cluster" "this" {
  name                          = var.name
  version                       = var.kubernetes_version
  role_arn                      = aws_iam_role.control_plane.arn
  enabled_cluster_log_types     = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
  bootstrap_self_managed_addons = false

  # Whoever happened to run Terraform is nobody special: only the entries below let anyone in.
  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = false
  }

  encryption_config {
    resources = ["secrets"]
    provider {
      key_arn = aws_kms_key.secrets.arn
    }
  }

  # When support of the version ends EKS upgrades it, instead of asking six times the price for it.
  upgrade_policy {
    support_type = "STANDARD"
  }

  vpc_config {
    subnet_ids              = values(var.subnet_ids)
    endpoint_private_access = true
    endpoint_public_access  = length(var.endpoint_cidrs) > 0
    public_access_cidrs     = length(var.endpoint_cidrs) > 0 ? var.endpoint_cidrs : null
  }

  depends_on = [aws_iam_role_policy_attachment.control_plane, aws_cloudwatch_log_group.control_plane]
}

resource "aws_eks_access_entry" "admin" {
  for_each = var.admin_principal_arns

  cluster_name  = aws_eks_cluster.this.name
  principal_arn = each.value
}

resource "aws_eks_access_policy_association" "admin" {
  for_each = var.admin_principal_arns

  cluster_name  = aws_eks_cluster.this.name
  principal_arn = aws_eks_access_entry.admin[each.key].principal_arn
  policy_arn    = "arn:${data.aws_partition.current.partition}:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
  access_scope {
    type = "cluster"
  }
}

# A node without these is never ready.
resource "aws_eks_addon" "before_nodes" {
  for_each = {
    "vpc-cni"                = jsonencode({ enableNetworkPolicy = "true" }) # without it NetworkPolicies do nothing
    "kube-proxy"             = null
    "eks-pod-identity-agent" = null
  }

  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  configuration_values        = each.value
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"
}

# And these without a node never are.
resource "aws_eks_addon" "on_nodes" {
  for_each = toset(["coredns", "metrics-server"])

  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"
  depends_on                  = [module.system_nodes]
}

locals {
  for_nodes = {
    # What makes a node ready must be there when the first one comes; this waits for all of them.
    name          = aws_eks_addon.before_nodes["vpc-cni"].cluster_name
    version       = aws_eks_cluster.this.version
    node_role_arn = var.node_role_arn
    subnet_ids    = var.subnet_ids
  }
}

module "system_nodes" {
  source = "../node_group"

  name          = "system"
  cluster       = local.for_nodes
  subnet_ids    = values(var.subnet_ids)
  instance_type = var.system_nodes.instance_type
  min_nodes     = var.system_nodes.count
  max_nodes     = var.system_nodes.count + 2
  labels        = { "raylaunch.dev/nodes" = "system" }
  disk          = { gib = 30 }
}

# On demand, for a run dies with its head too often; tainted, so that nothing else keeps a node from going away.
module "head_nodes" {
  source = "../node_group"

  name          = "head"
  cluster       = local.for_nodes
  subnet_ids    = values(var.subnet_ids)
  instance_type = var.head_nodes.instance_type
  max_nodes     = var.head_nodes.max_nodes
  labels        = { "raylaunch.dev/nodes" = "head" }
  taints        = { "raylaunch.dev/head" = "true" }
  resources     = { "ephemeral-storage" = "${local.head_disk_gib - 20}Gi" }
  disk          = { gib = local.head_disk_gib }
}

locals {
  head_disk_gib = 80
}
