# The least: one kind of GPU, first on demand, and on spot for --spot. Prices are those of us-east-1 in November 2026;
# look up yours. Change what has example, 123456789012 or 203.0.113 in it.
region               = "us-east-1"
admin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]
endpoint_cidrs       = ["203.0.113.0/24"]
budget               = { monthly_usd = 500, emails = ["ml-costs@example.com"] }

gpu_types = [
  {
    name          = "a10g"
    instance_type = "g5.2xlarge"
    max_nodes     = 4
    on_demand     = { price_per_hour = 1.21 }
    spot          = { price_per_hour = 0.55 }
  },
]

head_nodes = { price_per_hour = 0.19 }
