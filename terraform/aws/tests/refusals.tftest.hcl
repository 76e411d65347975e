# What is written wrong is refused before anything is asked of AWS. The sentences are in tests/terraforming.

mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  region               = "us-east-1"
  admin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]
  endpoint_cidrs       = ["203.0.113.0/24"]
  budget               = { monthly_usd = 500, emails = ["ml-costs@example.com"] }
  gpu_types            = [{ name = "a10g", instance_type = "g5.2xlarge", max_nodes = 4, on_demand = {} }]
}

run "nobody_and_nothing" {
  command = plan

  variables {
    admin_principal_arns    = []
    endpoint_cidrs          = ["0.0.0.0/0"]
    gpu_types               = []
    region                  = "Ireland"
    name                    = "-pool"
    budget                  = { monthly_usd = 0, emails = ["ml-costs@example.com"] }
    zone_count              = 1
    cache_gib               = 5
    vpc_cidr                = "10.0.0.0/20"
    undelete_days           = 0
    image_tag               = "latest"
    kubernetes_version      = "1.29"
    confirm_above           = -1
    queue                   = "Team A"
    system_nodes            = { count = 0 }
    head_nodes              = { max_nodes = 0 }
    run_limits              = { max_hours = 0 }
    tags                    = { Project = "mine" }
    launcher_principal_arns = ["anna"]
    data_locations          = ["https://bucket/data"]
  }

  expect_failures = [
    var.admin_principal_arns,
    var.endpoint_cidrs,
    var.gpu_types,
    var.region,
    var.name,
    var.budget,
    var.zone_count,
    var.cache_gib,
    var.vpc_cidr,
    var.undelete_days,
    var.image_tag,
    var.kubernetes_version,
    var.confirm_above,
    var.queue,
    var.system_nodes,
    var.head_nodes,
    var.run_limits,
    var.tags,
    var.launcher_principal_arns,
    var.data_locations,
  ]
}

run "half_of_it" {
  command = plan

  variables {
    admin_principal_arns    = ["arn:aws:iam::123456789012:role/*"]
    endpoint_cidrs          = ["::/0"]
    region                  = "us-east-1a"
    name                    = "a-name-that-is-much-too-long-for-a-bucket"
    gpu_types               = [{ name = "a10g", instance_type = "g5.2xlarge", max_nodes = 4 }]
    budget                  = { monthly_usd = 500, emails = [] }
    zone_count              = 2.5
    cache_gib               = 10.5
    vpc_cidr                = "10.42.0.0"
    undelete_days           = 1.5
    image_tag               = "0.1.0@sha256:abc"
    kubernetes_version      = "latest"
    system_nodes            = { count = 1.5 }
    head_nodes              = { price_per_hour = -1 }
    run_limits              = { max_gpus = 1.5 }
    tags                    = { Name = "mine" }
    launcher_principal_arns = ["arn:aws:iam::123456789012:root"]
    data_locations          = ["s3://bucket/*"]
  }

  expect_failures = [
    var.admin_principal_arns,
    var.endpoint_cidrs,
    var.region,
    var.name,
    var.gpu_types,
    var.budget,
    var.zone_count,
    var.cache_gib,
    var.vpc_cidr,
    var.undelete_days,
    var.image_tag,
    var.kubernetes_version,
    var.system_nodes,
    var.head_nodes,
    var.run_limits,
    var.tags,
    var.launcher_principal_arns,
    var.data_locations,
  ]
}
