# Nodes and their network: from zero, locked down, and known to the autoscaler while there are none.

mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  cluster = {
    name          = "gpu-pool"
    version       = "1.35"
    node_role_arn = "arn:aws:iam::123456789012:role/node"
    subnet_ids    = { us-east-1a = "subnet-a", us-east-1b = "subnet-b", us-east-1c = "subnet-c" }
  }
}

run "a_group_starts_from_zero_and_says_what_its_nodes_would_be" {
  command = plan

  module {
    source = "../modules/node_group"
  }

  variables {
    name          = "a10g-spot-us-east-1b"
    instance_type = "g5.2xlarge"
    subnet_ids    = ["subnet-1"]
    spot          = true
    max_nodes     = 4
    labels        = { "raylaunch.dev/nodes" = "a10g" }
    taints        = { "nvidia.com/gpu" = "present" }
    resources     = { "nvidia.com/gpu" = "1" }
    disk          = { gib = 40 }
  }

  assert {
    condition = aws_eks_node_group.this.scaling_config[0] == {
      min_size = 0, desired_size = 0, max_size = 4
    }
    error_message = "what is not used costs nothing"
  }
  assert {
    condition     = aws_eks_node_group.this.capacity_type == "SPOT" && aws_eks_node_group.this.version == "1.35"
    error_message = "spot was asked for, and nodes are of the cluster's version"
  }
  assert {
    condition = { for key, hint in aws_autoscaling_group_tag.hint : trimprefix(key, local.template) => hint.tag[0].value } == {
      "/label/raylaunch.dev/nodes"    = "a10g"
      "/label/raylaunch.dev/capacity" = "spot"
      "/taint/nvidia.com/gpu"         = "present:NoSchedule"
      "/resources/nvidia.com/gpu"     = "1"
    }
    error_message = "the autoscaler must know labels, taints and GPUs of a node that is not there yet"
  }
  assert {
    condition = [for each in aws_eks_node_group.this.taint : "${each.key}=${each.value}:${each.effect}"] == [
      "nvidia.com/gpu=present:NO_SCHEDULE",
    ]
    error_message = "nothing but what asks for a GPU may come to its node"
  }
  assert {
    condition = alltrue([
      aws_launch_template.this.metadata_options[0].http_tokens == "required",
      aws_launch_template.this.metadata_options[0].http_put_response_hop_limit == 1,
    ])
    error_message = "no pod reaches the metadata service"
  }
  assert {
    condition     = aws_launch_template.this.block_device_mappings[0].ebs[0].encrypted == "true"
    error_message = "the disk is encrypted"
  }
  assert {
    condition = alltrue([
      for each in aws_launch_template.this.tag_specifications :
      each.tags == tomap({ Project = "gpu-pool", Name = "gpu-pool-a10g-spot-us-east-1b" })
    ]) && length(aws_launch_template.this.tag_specifications) == 3
    error_message = "instances, volumes and network interfaces bear the tags of everything"
  }
  assert {
    condition     = aws_launch_template.this.user_data == null
    error_message = "without disks of its own a node keeps to its volume"
  }
}

run "a_group_that_is_always_there_needs_no_hints" {
  command = plan

  module {
    source = "../modules/node_group"
  }

  variables {
    name          = "system"
    instance_type = "t3.medium"
    subnet_ids    = ["subnet-1"]
    min_nodes     = 2
    max_nodes     = 4
    labels        = {}
    disk          = { gib = 30 }
  }

  assert {
    condition     = length(aws_autoscaling_group_tag.hint) == 0 && aws_eks_node_group.this.capacity_type == "ON_DEMAND"
    error_message = "operators are on demand, and the autoscaler looks at the nodes themselves"
  }
}

run "a_kind_has_a_group_for_each_way_and_each_zone_that_sells_it" {
  command = plan

  module {
    source = "../modules/gpu_pool"
  }

  variables {
    name          = "a10g"
    instance_type = "g5.2xlarge"
    max_nodes     = 4
    on_demand     = {}
    spot          = {}
    cache_gib     = 100
  }

  assert {
    condition = keys(module.nodes) == [
      "a10g-on-demand-us-east-1b", "a10g-on-demand-us-east-1c", "a10g-spot-us-east-1b", "a10g-spot-us-east-1c",
    ]
    error_message = "us-east-1a does not sell it, and us-east-1d is none of the network's"
  }
  assert {
    condition     = module.nodes["a10g-spot-us-east-1b"].labels["raylaunch.dev/capacity"] == "spot"
    error_message = "the label says how it was bought"
  }
  assert {
    condition     = local.disk_gib == 40
    error_message = "with NVMe the volume holds the system alone"
  }
}

run "without_nvme_the_volume_holds_the_cache" {
  command = plan

  module {
    source = "../modules/gpu_pool"
  }

  override_data {
    target = data.aws_ec2_instance_type.this
    values = {
      supported_architectures    = ["x86_64"]
      default_vcpus              = 8
      memory_size                = 32768
      instance_storage_supported = false
      total_instance_storage     = 0
      gpus                       = [{ count = 1, manufacturer = "NVIDIA", memory_size = 24576, name = "A10G" }]
    }
  }

  variables {
    name          = "v100"
    instance_type = "p3.2xlarge"
    max_nodes     = 1
    on_demand     = {}
    spot          = null
    cache_gib     = 100
  }

  assert {
    condition     = local.disk_gib == 160
    error_message = "the cache and 60 GiB of images"
  }
  assert {
    condition     = keys(module.nodes) == ["v100-on-demand-us-east-1b", "v100-on-demand-us-east-1c"]
    error_message = "what is not offered on spot has no group for it"
  }
}

run "the_network_has_one_nat_gateway_unless_asked_for_more" {
  command = plan

  module {
    source = "../modules/network"
  }

  variables {
    name           = "gpu-pool"
    cidr           = "10.42.0.0/16"
    zone_count     = 3
    nat_per_zone   = false
    log_bucket_arn = "arn:aws:s3:::logs"
  }

  assert {
    condition     = keys(aws_nat_gateway.this) == ["us-east-1a"] && output.zones == tolist(["us-east-1a", "us-east-1b", "us-east-1c"])
    error_message = "one is enough, and the zones are the first by name"
  }
  assert {
    condition     = alltrue([for subnet in aws_subnet.private : subnet.map_public_ip_on_launch != true])
    error_message = "no node has a public address"
  }
}
