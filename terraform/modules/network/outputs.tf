output "zones" {
  description = "The availability zones, sorted."
  value       = local.zones
}

output "private_subnet_ids" {
  description = "Private subnet of each zone, by zone."
  value       = { for zone, subnet in aws_subnet.private : zone => subnet.id }
}
