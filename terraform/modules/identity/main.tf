# Who may do what: nodes, the pods of runs, the cluster autoscaler, and the people who launch. Pods get their roles by
# EKS Pod Identity, so no key is stored anywhere.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

locals {
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition
  here       = "${data.aws_region.current.name}:${local.account_id}"

  cluster_arn = "arn:${local.partition}:eks:${local.here}:cluster/${var.name}"

  # Only this cluster's pods; TagSession is how EKS says which pod it was, in CloudTrail too.
  for_pods = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Condition = {
        StringEquals = { "aws:SourceAccount" = local.account_id }
        ArnEquals    = { "aws:SourceArn" = local.cluster_arn }
      }
    }]
  })
}

# -- nodes

resource "aws_iam_role" "node" {
  name = "${var.name}-node"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "ec2.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each = toset(["AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly"])

  role       = aws_iam_role.node.name
  policy_arn = "arn:${local.partition}:iam::aws:policy/${each.key}"
}

# -- runs: what a pod of a run, and who launched it, may do with data

locals {
  read = [for place in var.read : merge(place, { arn = "arn:${local.partition}:s3:::${place.bucket}" })]
  runs = "arn:${local.partition}:s3:::${var.runs.bucket}"

  # A place is a whole bucket or a prefix in one. To list only the prefix has a price: an object that is missing there is
  # reported as refused. The bucket of runs is for nothing else and may be listed, for a run often asks what is not there.
  list_whole  = distinct(concat([local.runs], [for place in local.read : place.arn if place.prefix == ""]))
  list_prefix = [for place in local.read : place if place.prefix != ""]
}

resource "aws_iam_policy" "runs" {
  name        = "${var.name}-runs"
  description = "Read data sets; read and write run directories."
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      {
        Sid      = "ListBuckets"
        Effect   = "Allow"
        Action   = ["s3:ListBucket", "s3:GetBucketLocation"]
        Resource = local.list_whole
      },
      {
        Sid      = "ReadData"
        Effect   = "Allow"
        Action   = ["s3:GetObject"]
        Resource = [for place in local.read : "${place.arn}/${place.prefix == "" ? "*" : "${place.prefix}/*"}"]
      },
      {
        Sid    = "ReadAndWriteRuns"
        Effect = "Allow"
        Action = [
          "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts",
        ]
        Resource = ["${local.runs}/${var.runs.prefix}/*"]
      }
      ], [
      for index, place in local.list_prefix : {
        Sid       = "ListPrefix${index}"
        Effect    = "Allow"
        Action    = ["s3:ListBucket"]
        Resource  = [place.arn]
        Condition = { StringLike = { "s3:prefix" = [place.prefix, "${place.prefix}/*"] } }
      }
    ])
  })
}

resource "aws_iam_role" "trainer" {
  name               = "${var.name}-trainer"
  assume_role_policy = local.for_pods
}

resource "aws_iam_role_policy_attachment" "trainer" {
  role       = aws_iam_role.trainer.name
  policy_arn = aws_iam_policy.runs.arn
}

resource "aws_eks_pod_identity_association" "trainer" {
  cluster_name    = var.cluster_name
  namespace       = var.trainer.namespace
  service_account = var.trainer.service_account
  role_arn        = aws_iam_role.trainer.arn
  depends_on      = [aws_iam_role_policy_attachment.trainer]
}

# -- people: they take this role, on their own machines; what it may do in Kubernetes a RoleBinding to its group says

resource "aws_iam_role" "launcher" {
  name                 = "${var.name}-launcher"
  max_session_duration = 12 * 3600
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = var.launcher_principal_arns }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "launcher" {
  role       = aws_iam_role.launcher.name
  policy_arn = aws_iam_policy.runs.arn
}

resource "aws_iam_role_policy" "launcher" {
  name = "find-the-cluster"
  role = aws_iam_role.launcher.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["eks:DescribeCluster"] # all that `aws eks update-kubeconfig` asks
      Resource = [local.cluster_arn]
    }]
  })
}

resource "aws_eks_access_entry" "launcher" {
  cluster_name      = var.cluster_name
  principal_arn     = aws_iam_role.launcher.arn
  kubernetes_groups = [var.launcher_group]
}

# -- the cluster autoscaler

resource "aws_iam_role" "autoscaler" {
  name               = "${var.name}-cluster-autoscaler"
  assume_role_policy = local.for_pods
}

resource "aws_iam_role_policy" "autoscaler" {
  name = "scale-node-groups"
  role = aws_iam_role.autoscaler.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid    = "Look" # these actions cannot be limited to a resource
        Effect = "Allow"
        Action = [
          "autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingInstances",
          "autoscaling:DescribeLaunchConfigurations", "autoscaling:DescribeScalingActivities", "autoscaling:DescribeTags",
          "ec2:DescribeImages", "ec2:DescribeInstanceTypes", "ec2:DescribeLaunchTemplateVersions",
          "ec2:GetInstanceTypesFromInstanceRequirements",
        ]
        Resource = "*"
      },
      {
        Sid      = "LookAtNodeGroups"
        Effect   = "Allow"
        Action   = ["eks:DescribeNodegroup"]
        Resource = ["arn:${local.partition}:eks:${local.here}:nodegroup/${var.name}/*"]
      },
      {
        Sid       = "ScaleThisCluster" # EKS puts the tag on the groups behind node groups
        Effect    = "Allow"
        Action    = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
        Resource  = ["arn:${local.partition}:autoscaling:${local.here}:autoScalingGroup:*"]
        Condition = { StringEquals = { "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}" = "owned" } }
      },
    ]
  })
}

resource "aws_eks_pod_identity_association" "autoscaler" {
  cluster_name    = var.cluster_name
  namespace       = var.autoscaler.namespace
  service_account = var.autoscaler.service_account
  role_arn        = aws_iam_role.autoscaler.arn
  depends_on      = [aws_iam_role_policy.autoscaler]
}
