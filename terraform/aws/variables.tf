locals {
  # The ARN of an IAM role or user, without wildcards.
  principal = "^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/[^*]+$"
}

# -- what must be said

variable "region" {
  type        = string
  description = "AWS region of everything, such as eu-west-1: the one where the images lie."

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "A region is written like eu-west-1."
  }
}

variable "admin_principal_arns" {
  type        = set(string)
  description = "IAM roles and users that administer the cluster; nobody else can, not even who creates it."

  validation {
    condition     = length(var.admin_principal_arns) > 0
    error_message = "Name at least one administrator, or nobody can reach the cluster: aws sts get-caller-identity shows who you are."
  }
  validation {
    condition     = alltrue([for arn in var.admin_principal_arns : can(regex(local.principal, arn))])
    error_message = "An administrator is the ARN of an IAM role or user, such as arn:aws:iam::123456789012:role/admin."
  }
}

variable "endpoint_cidrs" {
  type        = list(string)
  description = "Addresses that may reach the API server, such as [\"203.0.113.0/24\"] for an office; [] makes it private to the VPC."

  validation {
    condition     = alltrue([for cidr in var.endpoint_cidrs : can(cidrhost(cidr, 0)) && can(regex("^[0-9.]+/", cidr))])
    error_message = "Each is a range of IPv4 addresses, such as 203.0.113.0/24."
  }
  validation {
    condition     = alltrue([for cidr in var.endpoint_cidrs : try(tonumber(split("/", cidr)[1]), 32) >= 8])
    error_message = "A range wider than /8 is the open internet; name those you launch from."
  }
}

variable "budget" {
  type        = object({ monthly_usd = number, emails = list(string) })
  description = "What the account may cost a month, and who hears at 50, 80 and 100 percent of it, or when it is forecast."

  validation {
    condition     = var.budget.monthly_usd > 0
    error_message = "monthly_usd is more than 0."
  }
  validation {
    condition     = length(var.budget.emails) > 0 && alltrue([for email in var.budget.emails : can(regex("^[^@ ]+@[^@ ]+[.][^@ ]+$", email))])
    error_message = "emails needs one address or more: an alarm that nobody hears is none."
  }
}

variable "gpu_types" {
  type = list(object({
    name          = string
    instance_type = string
    max_nodes     = number
    on_demand     = optional(object({ price_per_hour = optional(number) }))
    spot          = optional(object({ price_per_hour = optional(number) }))
  }))
  description = <<-EOT
    Kinds of GPU nodes, by the name that `launch --gpu` takes; the first is what runs get without it. Offered on demand,
    on spot, or both. max_nodes is the most of each that a run gets. Prices are what a plan reckons with: those of your
    region, from https://aws.amazon.com/ec2/pricing/ (the launcher asks nobody).
  EOT

  validation {
    condition     = length(var.gpu_types) > 0
    error_message = "A GPU pool needs one kind of GPU node or more."
  }
  validation {
    condition     = length(distinct(var.gpu_types[*].name)) == length(var.gpu_types)
    error_message = "Two kinds of GPU nodes have one name."
  }
  validation {
    condition = alltrue([
      for kind in var.gpu_types :
      can(regex("^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$", kind.name)) && !contains(["system", "head"], kind.name)
    ])
    error_message = "The name of a kind is up to 20 of a-z, 0-9 and -, and not system or head."
  }
  validation {
    condition     = alltrue([for kind in var.gpu_types : can(regex("^[a-z0-9-]+[.][a-z0-9-]+$", kind.instance_type))])
    error_message = "An instance_type is written like g5.2xlarge."
  }
  validation {
    condition     = alltrue([for kind in var.gpu_types : kind.max_nodes >= 1 && floor(kind.max_nodes) == kind.max_nodes])
    error_message = "max_nodes is a whole number from 1."
  }
  validation {
    condition     = alltrue([for kind in var.gpu_types : kind.on_demand != null || kind.spot != null])
    error_message = "Each kind is offered on_demand = {}, spot = {}, or both."
  }
  validation {
    condition = alltrue(flatten([
      for kind in var.gpu_types : [
        for offer in [kind.on_demand, kind.spot] : try(offer.price_per_hour, null) == null ? true : offer.price_per_hour >= 0
      ]
    ]))
    error_message = "A price is not less than 0."
  }
}

# -- what has a default

variable "name" {
  type        = string
  description = "Name of the pool, as in `launch --cluster NAME`, of the cluster, and first part of the names of the rest."
  default     = "gpu-pool"

  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", var.name))
    error_message = "The name is up to 30 of a-z, 0-9 and -, and begins with a letter: buckets are named after it."
  }
}

variable "launcher_principal_arns" {
  type        = set(string)
  description = "IAM roles and users that may launch runs, and nothing more. Administrators may too."
  default     = []

  validation {
    condition     = alltrue([for arn in var.launcher_principal_arns : can(regex(local.principal, arn))])
    error_message = "Who launches is the ARN of an IAM role or user, such as arn:aws:iam::123456789012:user/anna."
  }
}

variable "data_locations" {
  type        = list(string)
  description = "Buckets, or prefixes in them, that are there already and that runs may read: s3://team-images/flowers."
  default     = []

  validation {
    condition     = alltrue([for place in var.data_locations : can(regex("^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^*?]*)?$", place))])
    error_message = "A place is written like s3://bucket or s3://bucket/prefix, without wildcards."
  }
}

variable "image_tag" {
  type        = string
  description = "Tag of the image that runs use, in the registry made here; tags there cannot move. May end in @sha256:…"
  default     = "0.1.0"

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(@sha256:[0-9a-f]{64})?$", var.image_tag)) && !startswith(var.image_tag, "latest")
    error_message = "A tag is a version such as 0.1.0, or 0.1.0@sha256:…; never latest."
  }
}

variable "queue" {
  type        = string
  description = "The Kueue LocalQueue that runs wait in, which k8s/ makes; null runs without Kueue."
  default     = "gpu-pool"

  validation {
    condition     = var.queue == null || can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.queue))
    error_message = "A queue has a Kubernetes name: a-z, 0-9 and -."
  }
}

variable "run_limits" {
  type = object({
    max_gpus      = optional(number)
    max_hours     = optional(number, 24)
    start_minutes = optional(number, 30)
    idle_minutes  = optional(number, 30)
  })
  description = "Limits of every run, as in docs/cluster.md."
  default     = {}

  validation {
    condition     = alltrue([for limit in values(var.run_limits) : limit == null ? true : limit > 0])
    error_message = "Every limit is more than 0."
  }
  validation {
    condition     = var.run_limits.max_gpus == null ? true : floor(var.run_limits.max_gpus) == var.run_limits.max_gpus
    error_message = "max_gpus is a whole number."
  }
}

variable "confirm_above" {
  type        = number
  description = "`launch` asks before a run that may cost more USD than this."
  default     = 25

  validation {
    condition     = var.confirm_above >= 0
    error_message = "confirm_above is not less than 0."
  }
}

variable "cache_gib" {
  type        = number
  description = "Space for downloaded images on each GPU node: on its NVMe disks, or where it has none on a volume of its size."
  default     = 100

  validation {
    condition     = var.cache_gib >= 10 && var.cache_gib <= 10000 && floor(var.cache_gib) == var.cache_gib
    error_message = "cache_gib is a whole number from 10 to 10000."
  }
}

variable "kubernetes_version" {
  type        = string
  description = "Kubernetes version. EKS supports each for 14 months and then upgrades by itself."
  default     = "1.35"

  validation {
    condition     = can(regex("^1[.](3[4-9]|[4-9][0-9])$", var.kubernetes_version))
    error_message = "A version is written like 1.35, and is 1.34 or newer."
  }
}

variable "system_nodes" {
  type = object({
    instance_type = optional(string, "t3.medium")
    count         = optional(number, 2)
  })
  description = "The nodes that are always there, for operators. Together they need about 2 cores and 4 GiB."
  default     = {}

  validation {
    condition     = var.system_nodes.count >= 1 && floor(var.system_nodes.count) == var.system_nodes.count
    error_message = "count is a whole number from 1."
  }
}

variable "head_nodes" {
  type = object({
    instance_type  = optional(string, "m6i.xlarge")
    max_nodes      = optional(number, 10)
    price_per_hour = optional(number, 0)
  })
  description = "The nodes of the heads of runs, one for each, from zero: at least 4 cores and 16 GiB."
  default     = {}

  validation {
    condition     = var.head_nodes.max_nodes >= 1 && floor(var.head_nodes.max_nodes) == var.head_nodes.max_nodes
    error_message = "max_nodes is a whole number from 1."
  }
  validation {
    condition     = var.head_nodes.price_per_hour >= 0
    error_message = "A price is not less than 0."
  }
}

variable "vpc_cidr" {
  type        = string
  description = "Private addresses of the network. Change it where it meets one that you connect to."
  default     = "10.42.0.0/16"

  validation {
    condition     = can(cidrhost(var.vpc_cidr, 0)) && endswith(var.vpc_cidr, "/16")
    error_message = "Write a /16 such as 10.42.0.0/16: a VPC cannot be larger, and a smaller one runs out of addresses for pods."
  }
}

variable "zone_count" {
  type        = number
  description = "Availability zones to span. More are more places to find a GPU in; a run stays in one."
  default     = 3

  validation {
    condition     = contains([2, 3, 4, 5, 6], var.zone_count)
    error_message = "zone_count is a number from 2, which EKS asks for, to 6."
  }
}

variable "nat_per_zone" {
  type        = bool
  description = "A NAT gateway in each zone (about 33 USD a month each) instead of one: the loss of a zone is that zone's only."
  default     = false
}

variable "undelete_days" {
  type        = number
  description = "For how many days what was deleted or overwritten on S3 can be got back, and is paid for."
  default     = 14

  validation {
    condition     = var.undelete_days >= 1 && floor(var.undelete_days) == var.undelete_days
    error_message = "undelete_days is a whole number from 1."
  }
}

variable "delete_on_destroy" {
  type        = bool
  description = "Let `terraform destroy` delete all images, runs and container images too. Set it and apply just before."
  default     = false
}

variable "tags" {
  type        = map(string)
  description = "More tags for everything; Project and ManagedBy are there already."
  default     = {}

  validation {
    condition     = length(setintersection(keys(var.tags), ["Project", "ManagedBy", "Name"])) == 0
    error_message = "Project, ManagedBy and Name are set here."
  }
}
