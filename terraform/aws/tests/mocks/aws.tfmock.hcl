# What AWS would answer, where a random text would be refused or lead nowhere.

mock_data "aws_caller_identity" {
  defaults = { account_id = "123456789012" }
}

mock_data "aws_partition" {
  defaults = { partition = "aws", dns_suffix = "amazonaws.com" }
}

mock_data "aws_region" {
  defaults = { name = "us-east-1" }
}

mock_data "aws_default_tags" {
  defaults = { tags = { Project = "gpu-pool" } }
}

mock_data "aws_availability_zones" {
  defaults = { names = ["us-east-1d", "us-east-1a", "us-east-1b", "us-east-1c"] }
}

mock_data "aws_ec2_instance_type_offerings" {
  defaults = { locations = ["us-east-1b", "us-east-1c", "us-east-1d"] }
}

# As a g5.2xlarge is.
mock_data "aws_ec2_instance_type" {
  defaults = {
    supported_architectures    = ["x86_64"]
    default_vcpus              = 8
    memory_size                = 32768
    instance_storage_supported = true
    total_instance_storage     = 450
    gpus                       = [{ count = 1, manufacturer = "NVIDIA", memory_size = 24576, name = "A10G" }]
  }
}

mock_resource "aws_iam_role" {
  defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
}

mock_resource "aws_iam_policy" {
  defaults = { arn = "arn:aws:iam::123456789012:policy/mock" }
}

mock_resource "aws_kms_key" {
  defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/11111111-1111-1111-1111-111111111111" }
}

mock_resource "aws_launch_template" {
  defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
}

mock_resource "aws_eks_node_group" {
  defaults = { resources = [{ autoscaling_groups = [{ name = "eks-mock" }], remote_access_security_group_id = "" }] }
}
