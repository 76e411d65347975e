"""What must hold of everything that Terraform plans, as rules over `terraform show -json`. Builds nothing.

for address, words in violations(plan): …
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Object = dict[str, Any]
Resources = list[Object]
"""With `address`, `type` and `values`; a value that is known only after the apply is missing."""

OPEN = {"0.0.0.0/0", "::/0"}
MANAGED = {
    "AmazonEKSClusterPolicy", "AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly",
}  # fmt: skip
"""The policies of AWS itself that nodes and control plane need."""


def resources(plan: Object) -> Resources:
    """All that is planned, in all modules."""

    def inside(module: Object) -> Iterator[Object]:
        yield from module.get("resources", [])
        for child in module.get("child_modules", []):
            yield from inside(child)

    return [each for each in inside(plan["planned_values"]["root_module"]) if each["mode"] == "managed"]


def of(found: Resources, *kinds: str) -> Iterator[tuple[str, Object]]:
    """Address and values of the resources of those types."""
    return ((each["address"], each["values"]) for each in found if each["type"] in kinds)


def statements(found: Resources, *kinds: str) -> Iterator[tuple[str, Object]]:
    """Every statement of the policies of resources, with their addresses; of a role, of who may take it."""
    for kind in kinds:
        for address, values in of(found, kind):
            policy = values["assume_role_policy" if kind == "aws_iam_role" else "policy"]
            yield from ((address, each) for each in json.loads(policy)["Statement"])


def words(value: str | list[str]) -> list[str]:
    """Of what may be one or many in a policy, all."""
    return [value] if isinstance(value, str) else value


def allows(policies: Iterable[Object], action: str, resource: str, **context: str) -> bool:
    """Whether statements let an action be done; conditions are StringLike on keys of S3, with `_` for the dash."""
    answer = False
    for each in policies:
        limits = (each.get("Condition") or {}).get("StringLike", {})
        if (
            any(fnmatch.fnmatchcase(action, one) for one in words(each["Action"]))
            and any(fnmatch.fnmatchcase(resource, one) for one in words(each["Resource"]))
            and all(
                any(fnmatch.fnmatchcase(context.get(key.removeprefix("s3:"), "\0"), one) for one in words(wanted))
                for key, wanted in limits.items()
            )
        ):
            if each["Effect"] == "Deny":
                return False
            answer = True
    return answer


# -- rules: each yields what is wrong, by its address


def _nobody_comes_in(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_security_group", "aws_default_security_group", "aws_default_network_acl"):
        for rule in values.get("ingress") or []:
            if OPEN & {*(rule.get("cidr_blocks") or []), *(rule.get("ipv6_cidr_blocks") or [])}:
                yield address
    for address, values in of(found, "aws_security_group_rule", "aws_vpc_security_group_ingress_rule"):
        cidrs = {*(values.get("cidr_blocks") or []), values.get("cidr_ipv4"), values.get("cidr_ipv6")}
        if values.get("type", "ingress") == "ingress" and OPEN & cidrs:
            yield address
    for address, values in of(found, "aws_eks_cluster"):
        for access in values["vpc_config"]:
            if access["endpoint_public_access"] and OPEN & {*(access["public_access_cidrs"] or OPEN)}:
                yield address
    yield from (address for address, values in of(found, "aws_subnet") if values.get("map_public_ip_on_launch"))


def _nobody_may_do_anything(found: Resources) -> Iterator[str]:
    for address, each in statements(found, "aws_iam_policy", "aws_iam_role_policy", "aws_iam_role"):
        actions = words(each["Action"])
        if each["Effect"] == "Allow" and any("*" in action for action in actions):
            yield address
        looks = all(action.partition(":")[2].startswith(("Describe", "Get", "List")) for action in actions)
        if "*" in words(each.get("Resource", [])) and not looks:
            yield address
    for address, values in of(found, "aws_iam_role_policy_attachment"):
        arn = values.get("policy_arn")
        if arn and arn.rpartition("/")[2] not in MANAGED:
            yield address


def _every_role_is_for_somebody(found: Resources) -> Iterator[str]:
    for address, each in statements(found, "aws_iam_role"):
        who = each["Principal"]
        if who == "*" or "*" in [name for names in who.values() for name in words(names)]:
            yield address
        if who.get("Service") == "pods.eks.amazonaws.com" and "aws:SourceArn" not in str(each.get("Condition")):
            yield address


def _no_pod_reaches_the_metadata_service(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_launch_template"):
        (options,) = values["metadata_options"] or [{}]
        if (options.get("http_tokens"), options.get("http_put_response_hop_limit")) != ("required", 1):
            yield address
    for address, values in of(found, "aws_eks_node_group"):
        if not values["launch_template"] or values["remote_access"]:
            yield address


def _everything_is_encrypted(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_launch_template"):
        if not all(
            disk["ebs"][0]["encrypted"] == "true"
            for disk in values["block_device_mappings"] or [{"ebs": [{"encrypted": ""}]}]
        ):
            yield address
    for address, values in of(found, "aws_eks_cluster"):
        if [each["resources"] for each in values["encryption_config"]] != [["secrets"]]:
            yield address
    yield from (
        address for address, values in of(found, "aws_ecr_repository") if not values["encryption_configuration"]
    )
    yield from (address for address, values in of(found, "aws_kms_key") if not values["enable_key_rotation"])
    yield from _unprotected(found, "aws_s3_bucket_server_side_encryption_configuration", lambda values: bool(
        values["rule"][0]["apply_server_side_encryption_by_default"]
    ))  # fmt: skip


def _no_bucket_is_public(found: Resources) -> Iterator[str]:
    four = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    yield from _unprotected(found, "aws_s3_bucket_public_access_block", lambda it: all(it[each] for each in four))
    yield from _unprotected(found, "aws_s3_bucket_ownership_controls", lambda it: (
        it["rule"][0]["object_ownership"] == "BucketOwnerEnforced"
    ))  # fmt: skip
    yield from (address for address, _ in of(found, "aws_s3_bucket_acl"))
    for address, each in statements(found, "aws_s3_bucket_policy"):
        if each["Effect"] == "Allow" and "Service" not in each["Principal"]:
            yield address


def _buckets_are_reached_by_tls_alone(found: Resources) -> Iterator[str]:
    def denies(values: Object) -> bool:
        plain = {"Bool": {"aws:SecureTransport": "false"}}
        return any(
            each["Effect"] == "Deny" and each["Principal"] == "*" and each["Action"] == "s3:*"
            and each["Condition"] == plain and len(each["Resource"]) == 2
            for each in json.loads(values["policy"])["Statement"]
        )  # fmt: skip

    yield from _unprotected(found, "aws_s3_bucket_policy", denies)


def _what_is_there_is_never_deleted(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_s3_bucket"):
        if values["force_destroy"]:
            yield address
    yield from _unprotected(found, "aws_s3_bucket_versioning", lambda it: (
        it["versioning_configuration"][0]["status"] == "Enabled"
    ))  # fmt: skip
    for address, values in of(found, "aws_s3_bucket_lifecycle_configuration"):
        for rule in values["rule"]:
            ages = any(end.get("days") or end.get("date") for end in rule["expiration"])
            if (ages or rule["transition"]) and '["logs"]' not in address:
                yield address
    for address, values in of(found, "aws_ecr_lifecycle_policy"):
        if any(rule["selection"]["tagStatus"] != "untagged" for rule in json.loads(values["policy"])["rules"]):
            yield address


def _an_image_stays_what_it_was(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_ecr_repository"):
        scans = [each["scan_on_push"] for each in values["image_scanning_configuration"]]
        if values["image_tag_mutability"] != "IMMUTABLE" or scans != [True]:
            yield address


def _everything_is_tagged(found: Resources) -> Iterator[str]:
    wanted = {"Project", "ManagedBy"}
    for each in found:
        if "tags_all" in each["values"] and not wanted <= (each["values"]["tags_all"] or {}).keys():
            yield each["address"]
    for address, values in of(found, "aws_launch_template"):
        kinds = {each["resource_type"] for each in values["tag_specifications"] if wanted <= each["tags"].keys()}
        if kinds != {"instance", "volume", "network-interface"}:
            yield address


def _nothing_waits_at_a_price(found: Resources) -> Iterator[str]:
    for address, values in of(found, "aws_eks_node_group"):
        (scaling,) = values["scaling_config"]
        if scaling["min_size"] and ".system_nodes." not in address:
            yield address


def _unprotected(found: Resources, kind: str, good: Callable[[Object], bool]) -> Iterator[str]:
    """The buckets that have no resource of the type which is good."""
    have = {address.rpartition("[")[2] for address, values in of(found, kind) if good(values)}
    for address, _ in of(found, "aws_s3_bucket"):
        if address.rpartition("[")[2] not in have:
            yield address


RULES: dict[str, Callable[[Resources], Iterator[str]]] = {
    rule.__name__.strip("_"): rule
    for rule in (
        _nobody_comes_in, _nobody_may_do_anything, _every_role_is_for_somebody, _no_pod_reaches_the_metadata_service,
        _everything_is_encrypted, _no_bucket_is_public, _buckets_are_reached_by_tls_alone,
        _what_is_there_is_never_deleted, _an_image_stays_what_it_was, _everything_is_tagged, _nothing_waits_at_a_price,
    )
}  # fmt: skip
