"""What Terraform plans is closed, encrypted, tagged and free while idle, and lets a run do what it must, no more."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.terraforming.policy import RULES, Object, allows, of, resources, statements

DATA, RUNS, OWN = (f"arn:aws:s3:::{name}" for name in (
    "gpu-pool-data-123456789012", "gpu-pool-runs-123456789012", "team-images",
))  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_plan_keeps_the_rule(plan: Object, rule: str) -> None:
    assert list(RULES[rule](resources(plan))) == []


def _statement(change: Callable[[Object], Any], part: str = "policy") -> Callable[[Object], Any]:
    """A change to every statement of a policy."""

    def edit(values: Object) -> None:
        policy = json.loads(values[part])
        for each in policy["Statement"]:
            change(each)
        values[part] = json.dumps(policy)

    return edit


def _expires(values: Object) -> None:
    values["rule"][0]["expiration"][0]["days"] = 30


# For each rule: a type of resource, and what would break it there.
BREACHES: list[tuple[str, str, Callable[[Object], Any]]] = [
    ("nobody_comes_in", "aws_eks_cluster", lambda it: it["vpc_config"][0].update(public_access_cidrs=["0.0.0.0/0"])),
    ("nobody_comes_in", "aws_eks_cluster", lambda it: it["vpc_config"][0].update(public_access_cidrs=None)),
    ("nobody_comes_in", "aws_subnet", lambda it: it.update(map_public_ip_on_launch=True)),
    ("nobody_comes_in", "aws_default_security_group", lambda it: it.update(ingress=[{"cidr_blocks": ["0.0.0.0/0"]}])),
    ("nobody_may_do_anything", "aws_iam_policy", _statement(lambda it: it.update(Action="s3:*"))),
    ("nobody_may_do_anything", "aws_iam_policy", _statement(lambda it: it.update(Resource="*"))),
    ("nobody_may_do_anything", "aws_iam_role_policy_attachment",
     lambda it: it.update(policy_arn="arn:aws:iam::aws:policy/AdministratorAccess")),
    ("every_role_is_for_somebody", "aws_iam_role",
     _statement(lambda it: it.update(Principal={"AWS": "*"}), "assume_role_policy")),
    ("every_role_is_for_somebody", "aws_iam_role",
     _statement(lambda it: it.pop("Condition", None), "assume_role_policy")),
    ("no_pod_reaches_the_metadata_service", "aws_launch_template",
     lambda it: it["metadata_options"][0].update(http_put_response_hop_limit=2)),
    ("no_pod_reaches_the_metadata_service", "aws_launch_template", lambda it: it.update(metadata_options=[])),
    ("everything_is_encrypted", "aws_launch_template",
     lambda it: it["block_device_mappings"][0]["ebs"][0].update(encrypted="false")),
    ("everything_is_encrypted", "aws_eks_cluster", lambda it: it.update(encryption_config=[])),
    ("no_bucket_is_public", "aws_s3_bucket_public_access_block", lambda it: it.update(block_public_policy=False)),
    ("no_bucket_is_public", "aws_s3_bucket_policy", _statement(lambda it: it.update(Effect="Allow"))),
    ("buckets_are_reached_by_tls_alone", "aws_s3_bucket_policy", _statement(lambda it: it.update(Principal={}))),
    ("what_is_there_is_never_deleted", "aws_s3_bucket_lifecycle_configuration", _expires),
    ("what_is_there_is_never_deleted", "aws_s3_bucket", lambda it: it.update(force_destroy=True)),
    ("an_image_stays_what_it_was", "aws_ecr_repository", lambda it: it.update(image_tag_mutability="MUTABLE")),
    ("everything_is_tagged", "aws_nat_gateway", lambda it: it.update(tags_all={"Name": "nat"})),
    ("everything_is_tagged", "aws_launch_template", lambda it: it.update(tag_specifications=[])),
    ("nothing_waits_at_a_price", "aws_eks_node_group", lambda it: it["scaling_config"][0].update(min_size=1)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "kind", "breach"), BREACHES)
def test_a_breach_of_the_rule_is_seen(plan: Object, rule: str, kind: str, breach: Callable[[Object], Any]) -> None:
    found = copy.deepcopy(resources(plan))
    for _, values in of(found, kind):
        breach(values)
    assert list(RULES[rule](found))


def test_every_rule_has_a_breach() -> None:
    assert {rule for rule, *_ in BREACHES} == RULES.keys()


def _of_runs(plan: Object) -> list[Object]:
    return [each for _, each in statements(resources(plan), "aws_iam_policy")]


@pytest.mark.parametrize(("action", "resource"), [
    ("s3:GetObject", f"{DATA}/flowers/1.jpg"),
    ("s3:GetObject", f"{OWN}/flowers/1.jpg"),
    ("s3:ListBucket", DATA),
    ("s3:ListBucket", RUNS),
    *((f"s3:{action}", f"{RUNS}/runs/flowers-1123/checkpoints/1") for action in (
        "GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload",
    )),
])  # fmt: skip
def test_a_run_may_do_what_it_must(plan: Object, action: str, resource: str) -> None:
    assert allows(_of_runs(plan), action, resource)


@pytest.mark.parametrize(("action", "resource"), [
    ("s3:PutObject", f"{DATA}/flowers/1.jpg"),
    ("s3:DeleteObject", f"{DATA}/flowers/1.jpg"),
    ("s3:GetObject", f"{OWN}/salaries.csv"),
    ("s3:PutObject", f"{OWN}/flowers/1.jpg"),
    ("s3:ListBucket", OWN),
    ("s3:PutObject", f"{RUNS}/elsewhere"),
    ("s3:DeleteObjectVersion", f"{RUNS}/runs/flowers-1123/checkpoints/1"),
    ("s3:DeleteBucket", RUNS),
    ("s3:PutBucketPolicy", RUNS),
    ("s3:PutLifecycleConfiguration", RUNS),
    ("s3:GetObject", "arn:aws:s3:::gpu-pool-logs-123456789012/AWSLogs/1"),
    ("iam:PassRole", "arn:aws:iam::123456789012:role/admin"),
])  # fmt: skip
def test_a_run_may_do_no_more(plan: Object, action: str, resource: str) -> None:
    assert not allows(_of_runs(plan), action, resource)


def test_of_a_bucket_that_is_not_the_pools_own_a_run_lists_its_prefix_alone(plan: Object) -> None:
    assert allows(_of_runs(plan), "s3:ListBucket", OWN, prefix="flowers/")
    assert not allows(_of_runs(plan), "s3:ListBucket", OWN, prefix="")
    assert not allows(_of_runs(plan), "s3:ListBucket", OWN, prefix="flowers-of-others/")


def test_the_autoscaler_scales_groups_of_its_own_cluster_alone(plan: Object) -> None:
    found = [each for address, each in statements(resources(plan), "aws_iam_role_policy") if "autoscaler" in address]
    (scales,) = [each for each in found if "autoscaling:SetDesiredCapacity" in each["Action"]]
    assert scales["Condition"] == {"StringEquals": {"aws:ResourceTag/k8s.io/cluster-autoscaler/gpu-pool": "owned"}}


def test_only_named_administrators_get_in_and_who_launches_is_a_group_without_rights_of_its_own(plan: Object) -> None:
    admin = "arn:aws:iam::123456789012:role/admin"
    found = resources(plan)
    entries = {address.rpartition(".")[2]: it for address, it in of(found, "aws_eks_access_entry")}
    assert entries.keys() == {f'admin["{admin}"]', "launcher"}
    assert entries["launcher"]["kubernetes_groups"] == [
        plan["planned_values"]["outputs"]["site"]["value"]["LAUNCHER_GROUP"]
    ]
    assert [it["principal_arn"] for _, it in of(found, "aws_eks_access_policy_association")] == [admin]
    (access,) = [it["access_config"][0] for _, it in of(found, "aws_eks_cluster")]
    assert access == {"authentication_mode": "API", "bootstrap_cluster_creator_admin_permissions": False}
