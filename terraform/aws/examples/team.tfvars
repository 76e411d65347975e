# A team with data of its own on S3, big machines beside small ones, an API server that only the VPC reaches, and no
# zone that the rest depends on.
region                  = "us-west-2"
name                    = "vision"
admin_principal_arns    = ["arn:aws:iam::123456789012:role/platform"]
launcher_principal_arns = ["arn:aws:iam::123456789012:role/vision-team"]
endpoint_cidrs          = []
budget                  = { monthly_usd = 20000, emails = ["vision-lead@example.com", "finance@example.com"] }
data_locations          = ["s3://example-images/flowers", "s3://example-archive"]

gpu_types = [
  {
    name          = "a10g"
    instance_type = "g5.2xlarge"
    max_nodes     = 8
    on_demand     = { price_per_hour = 1.21 }
    spot          = { price_per_hour = 0.60 }
  },
  {
    name          = "a10g-x4"
    instance_type = "g5.12xlarge"
    max_nodes     = 4
    on_demand     = { price_per_hour = 5.67 }
  },
  {
    name          = "h100-x8"
    instance_type = "p5.48xlarge"
    max_nodes     = 2
    on_demand     = { price_per_hour = 55.04 }
  },
]

head_nodes    = { price_per_hour = 0.19, max_nodes = 20 }
run_limits    = { max_gpus = 16, max_hours = 72 }
confirm_above = 200
cache_gib     = 150
nat_per_zone  = true
tags          = { CostCentre = "vision" }
