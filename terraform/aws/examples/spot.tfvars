# As cheap as it gets: spot only, several small GPUs to choose from (`launch --gpu l4`), a smaller footprint while idle.
region                  = "eu-central-1"
name                    = "cheap-pool"
admin_principal_arns    = ["arn:aws:iam::123456789012:role/admin"]
launcher_principal_arns = ["arn:aws:iam::123456789012:user/anna", "arn:aws:iam::123456789012:role/students"]
endpoint_cidrs          = ["203.0.113.0/24", "198.51.100.7/32"]
budget                  = { monthly_usd = 200, emails = ["ml-costs@example.com"] }

gpu_types = [
  { name = "t4", instance_type = "g4dn.xlarge", max_nodes = 8, spot = { price_per_hour = 0.22 } },
  { name = "l4", instance_type = "g6.xlarge", max_nodes = 8, spot = { price_per_hour = 0.35 } },
  { name = "a10g", instance_type = "g5.xlarge", max_nodes = 8, spot = { price_per_hour = 0.42 } },
]

system_nodes = { count = 1 } # while it is replaced nothing new starts; runs go on
head_nodes   = { price_per_hour = 0.21 }
run_limits   = { max_gpus = 8, max_hours = 12 }
cache_gib    = 60
