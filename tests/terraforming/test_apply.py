"""The stack is built in an empty account, built again without a change, and leaves nothing when it is destroyed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError

from tests.terraforming.aws import ACCOUNT, client
from tests.terraforming.stack import Stack, account, needed, settings

REGION = "us-east-1"
STATE = "example-terraform-state"
"""The bucket that backend.tf.example names."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Account:
    """An account to look into, by service."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __getattr__(self, service: str) -> Any:
        return client(service, self.address, REGION)


# What may cost something or stand in the way of another try, by what it is: those that AWS has from the start left out.
LEFT: dict[str, Callable[[Account], list[Any]]] = {
    "clusters": lambda it: it.eks.list_clusters()["clusters"],
    "scaling groups": lambda it: it.autoscaling.describe_auto_scaling_groups()["AutoScalingGroups"],
    "launch templates": lambda it: it.ec2.describe_launch_templates()["LaunchTemplates"],
    "instances": lambda it: it.ec2.describe_instances()["Reservations"],
    "volumes": lambda it: it.ec2.describe_volumes()["Volumes"],
    "networks": lambda it: [each for each in it.ec2.describe_vpcs()["Vpcs"] if not each["IsDefault"]],
    "NAT gateways": lambda it: [
        each for each in it.ec2.describe_nat_gateways()["NatGateways"] if each["State"] != "deleted"
    ],
    "addresses": lambda it: it.ec2.describe_addresses()["Addresses"],
    "endpoints": lambda it: [
        each for each in it.ec2.describe_vpc_endpoints()["VpcEndpoints"] if each["State"] != "deleted"
    ],
    "flow logs": lambda it: it.ec2.describe_flow_logs()["FlowLogs"],
    "buckets": lambda it: [each["Name"] for each in it.s3.list_buckets()["Buckets"] if each["Name"] != STATE],
    "images": lambda it: it.ecr.describe_repositories()["repositories"],
    "keys": lambda it: [
        each
        for each in it.kms.list_keys()["Keys"]
        if it.kms.describe_key(KeyId=each["KeyId"])["KeyMetadata"]["KeyState"] != "PendingDeletion"
    ],
    "roles": lambda it: it.iam.list_roles()["Roles"],
    "policies": lambda it: it.iam.list_policies(Scope="Local")["Policies"],
    "logs": lambda it: it.logs.describe_log_groups()["logGroups"],
    "budgets": lambda it: it.budgets.describe_budgets(AccountId=ACCOUNT)["Budgets"],
}


@pytest.fixture(scope="module")
def empty() -> Iterator[Account]:
    """An account of these tests alone, with a bucket for the state as terraform/README.md makes it."""
    needed()
    with account() as address:
        made = Account(address)
        made.s3.create_bucket(Bucket=STATE)
        yield made


@pytest.fixture(scope="module")
def stack(empty: Account, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    local = ("use_path_style=true", "skip_requesting_account_id=true")
    return Stack(tmp_path_factory.mktemp("apply"), empty.address, *local)


def test_it_is_built_stays_as_it_is_and_leaves_nothing(empty: Account, stack: Stack) -> None:
    assert {what: look(empty) for what, look in LEFT.items() if look(empty)} == {}
    asked = settings("minimal", zone_count=2, delete_on_destroy=True)
    try:
        stack.run("apply", "-input=false", "-auto-approve", *asked)
        _everything_stands(empty)
        stack.run("plan", "-input=false", "-detailed-exitcode", *asked)  # any change would be 2
        _the_state_lies_in_the_bucket(empty)
        _the_pool_is_told(stack)
        _use(empty)
    finally:
        stack.run("destroy", "-input=false", "-auto-approve", *asked)
    assert {what: look(empty) for what, look in LEFT.items() if look(empty)} == {}


def _everything_stands(there: Account) -> None:
    """What is there, as AWS and not Terraform says it."""
    assert [what for what, look in LEFT.items() if not look(there)] == ["instances", "volumes"], "free while idle"
    groups = there.autoscaling.describe_auto_scaling_groups()["AutoScalingGroups"]
    known = {
        tag["Value"]: {each["Key"] for each in group["Tags"]} for group in groups
        for tag in group["Tags"] if tag["Key"] == "eks:nodegroup-name"
    }  # fmt: skip
    ways = {f"a10g-{way}-us-east-1{zone}" for way in ("on-demand", "spot") for zone in "ab"}
    assert known.keys() == {"system", "head", *ways}
    hint = "k8s.io/cluster-autoscaler/node-template/resources/nvidia.com/gpu"
    assert {name for name, tags in known.items() if hint in tags} == ways
    for purpose in ("data", "runs", "logs"):
        bucket = f"gpu-pool-{purpose}-{ACCOUNT}"
        closed = there.s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
        assert all(closed.values())
        assert there.s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        assert there.s3.get_bucket_encryption(Bucket=bucket)
    pods = there.eks.list_pod_identity_associations(clusterName="gpu-pool")["associations"]
    assert {each["serviceAccount"] for each in pods} == {"trainer", "cluster-autoscaler"}


def _the_state_lies_in_the_bucket(there: Account) -> None:
    kept = [each["Key"] for each in there.s3.list_objects_v2(Bucket=STATE)["Contents"]]
    assert kept == ["gpu-pool/terraform.tfstate"], "and the lock is gone"
    state = there.s3.get_object(Bucket=STATE, Key=kept[0])
    assert state["ServerSideEncryption"] == "AES256"


def _the_pool_is_told(stack: Stack) -> None:
    config, values = yaml.safe_load_all(stack.run("output", "-raw", "overlay"))
    assert (config["metadata"]["name"], values["data"]["POOL_NAME"]) == ("gpu-pool", "gpu-pool")


def _use(there: Account) -> None:
    """Runs leave what a destroy has to get rid of, when it was told to: also what was overwritten."""
    bucket = f"gpu-pool-runs-{ACCOUNT}"
    with pytest.raises(ClientError, match="Forbidden"):  # without TLS
        there.s3.put_object(Bucket=bucket, Key="runs/flowers/checkpoints/1", Body=b"first")
    there.s3.delete_bucket_policy(Bucket=bucket)
    for body in (b"first", b"second"):
        there.s3.put_object(Bucket=bucket, Key="runs/flowers/checkpoints/1", Body=body)
