# What comes of few settings: the defaults, the pool that the launcher reads, and what was asked for beside it.

mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  region               = "us-east-1"
  admin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]
  endpoint_cidrs       = ["203.0.113.0/24"]
  budget               = { monthly_usd = 500, emails = ["ml-costs@example.com"] }
  zone_count           = 2
}

run "of_the_least_comes_a_whole_pool" {
  command = apply

  variables {
    gpu_types = [
      {
        name          = "a10g"
        instance_type = "g5.2xlarge"
        max_nodes     = 4
        on_demand     = { price_per_hour = 1.21 }
        spot          = {}
      },
    ]
  }

  assert {
    condition     = yamldecode(output.pool_config).storage == "s3://gpu-pool-runs-123456789012/runs"
    error_message = "runs are kept in the bucket for runs, under the prefix that they may write"
  }
  assert {
    condition     = yamldecode(output.pool_config).image == "123456789012.dkr.ecr.us-east-1.amazonaws.com/gpu-pool:0.1.0"
    error_message = "the image is that of the registry made here"
  }
  assert {
    condition     = yamldecode(output.pool_config).limits == { max_hours = 24, start_minutes = 30, idle_minutes = 30 }
    error_message = "every run has clocks, and no limit of GPUs but the pool's own"
  }
  assert {
    condition = module.gpu_pool["a10g"].node_type == {
      name          = "a10g"
      gpus          = 1
      gpu_name      = "NVIDIA A10G"
      bf16          = true
      cpus          = 7
      memory        = "28Gi"
      max_nodes     = 4
      node_selector = { "raylaunch.dev/nodes" = "a10g" }
      tolerations   = [{ key = "nvidia.com/gpu", operator = "Exists", effect = "NoSchedule" }]
      on_demand     = { price_per_hour = 1.21, node_selector = { "raylaunch.dev/capacity" = "on-demand" } }
      spot          = { node_selector = { "raylaunch.dev/capacity" = "spot" } }
    }
    error_message = "a core and some memory are the system's, and a price that was not said is not made up"
  }
  assert {
    condition     = strcontains(output.aws_profile, "arn:aws:iam::123456789012:role/mock")
    error_message = "who launches takes the role for it"
  }
  assert {
    condition = toset([
      for each in aws_budgets_budget.monthly.notification : "${each.notification_type} ${each.threshold}"
    ]) == toset(["ACTUAL 50", "ACTUAL 80", "ACTUAL 100", "FORECASTED 100"])
    error_message = "somebody hears at half, at four fifths, at the end, and when the end is forecast"
  }
  assert {
    condition = alltrue([
      for each in aws_budgets_budget.monthly.notification :
      each.subscriber_email_addresses == toset(["ml-costs@example.com"])
    ])
    error_message = "everybody who was named hears it"
  }
}

run "what_was_asked_for_is_what_there_is" {
  command = plan

  variables {
    name  = "vision"
    queue = null
    gpu_types = [
      { name = "l4", instance_type = "g6.2xlarge", max_nodes = 3, spot = {} },
      { name = "a10g", instance_type = "g5.2xlarge", max_nodes = 4, on_demand = {} },
    ]
  }

  assert {
    condition = alltrue([
      can(module.gpu_pool["l4"].node_type.spot), !can(module.gpu_pool["l4"].node_type.on_demand),
      can(module.gpu_pool["a10g"].node_type.on_demand), !can(module.gpu_pool["a10g"].node_type.spot),
    ])
    error_message = "what is offered in one way is not in the other"
  }
  assert {
    condition     = [for kind in yamldecode(output.pool_config).node_types : kind.name] == ["l4", "a10g"]
    error_message = "the first kind that was written is the one runs get without --gpu"
  }
  assert {
    condition     = output.site.MAX_GPUS == "7" && output.site.MAX_HEADS == "10"
    error_message = "the quota counts all kinds together"
  }
  assert {
    condition     = output.site.QUEUE == "" && !can(yamldecode(output.pool_config).queue)
    error_message = "without a queue nothing speaks of one"
  }
  assert {
    condition     = alltrue([for bucket in values(output.buckets) : startswith(bucket, "vision-")])
    error_message = "a pool of another name shares no bucket"
  }
  assert {
    condition     = output.site.POOL_NAME == "vision" && output.site.CLUSTER_NAME == "vision"
    error_message = "pool and cluster have the name"
  }
}
