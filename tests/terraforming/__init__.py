"""An account of AWS to build in: what tests of Terraform need to plan, apply and destroy without a cloud."""
