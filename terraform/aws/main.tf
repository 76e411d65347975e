# From an empty AWS account to a cluster whose GPU nodes come from zero and go back to it.
#
#     terraform -chdir=terraform/aws init
#     terraform -chdir=terraform/aws apply -var-file=examples/minimal.tfvars

locals {
  tags = merge(var.tags, { Project = var.name, ManagedBy = "terraform" })

  # Names of what stands in the cluster; its manifests must use the same.
  namespace      = "raylaunch"
  trainer        = { namespace = local.namespace, service_account = "trainer" }
  autoscaler     = { namespace = "kube-system", service_account = "cluster-autoscaler" }
  launcher_group = "raylaunch-launchers"

  runs_prefix = "runs"
  log_days    = 90
}

module "storage" {
  source = "../modules/storage"

  name              = var.name
  undelete_days     = var.undelete_days
  log_days          = local.log_days
  delete_on_destroy = var.delete_on_destroy
}

module "registry" {
  source = "../modules/registry"

  name              = var.name
  delete_on_destroy = var.delete_on_destroy
}

module "network" {
  source = "../modules/network"

  name           = var.name
  cidr           = var.vpc_cidr
  zone_count     = var.zone_count
  nat_per_zone   = var.nat_per_zone
  log_bucket_arn = module.storage.log_bucket_arn
}

module "identity" {
  source = "../modules/identity"

  name         = var.name
  cluster_name = module.cluster.name

  read = concat(
    [{ bucket = module.storage.buckets.data, prefix = "" }],
    [for place in var.data_locations : {
      bucket = split("/", trimprefix(place, "s3://"))[0]
      prefix = trim(join("/", slice(split("/", place), 3, length(split("/", place)))), "/")
    }],
  )
  runs                    = { bucket = module.storage.buckets.runs, prefix = local.runs_prefix }
  trainer                 = local.trainer
  autoscaler              = local.autoscaler
  launcher_group          = local.launcher_group
  launcher_principal_arns = sort(setunion(var.admin_principal_arns, var.launcher_principal_arns))
}

module "cluster" {
  source = "../modules/cluster"

  name                 = var.name
  kubernetes_version   = var.kubernetes_version
  subnet_ids           = module.network.private_subnet_ids
  endpoint_cidrs       = var.endpoint_cidrs
  admin_principal_arns = var.admin_principal_arns
  node_role_arn        = module.identity.node_role_arn
  system_nodes         = var.system_nodes
  head_nodes           = var.head_nodes
  log_days             = local.log_days
}

module "gpu_pool" {
  source   = "../modules/gpu_pool"
  for_each = { for kind in var.gpu_types : kind.name => kind }

  name          = each.key
  instance_type = each.value.instance_type
  max_nodes     = each.value.max_nodes
  on_demand     = each.value.on_demand
  spot          = each.value.spot
  cache_gib     = var.cache_gib
  cluster       = module.cluster.for_nodes
}

# Of the whole account: a budget by tag counts nothing until somebody activates the tag for billing, and says so nowhere.
resource "aws_budgets_budget" "monthly" {
  name         = "${var.name}-monthly"
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_unit   = "USD"
  limit_amount = tostring(var.budget.monthly_usd)

  dynamic "notification" {
    for_each = [["ACTUAL", 50], ["ACTUAL", 80], ["ACTUAL", 100], ["FORECASTED", 100]]
    content {
      notification_type          = notification.value[0]
      threshold                  = notification.value[1]
      threshold_type             = "PERCENTAGE"
      comparison_operator        = "GREATER_THAN"
      subscriber_email_addresses = var.budget.emails
    }
  }
}
