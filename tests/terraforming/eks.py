"""EKS at the wire: clusters, node groups, add-ons, access entries and pod identities, as Terraform asks for them.

What was asked for is answered as it came, with what EKS itself adds; a node group brings the Auto Scaling group that
the real one does. Nothing ever runs: everything is ACTIVE at once, and no instance is started.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

Object = dict[str, Any]


class Refusal(Exception):
    """What EKS answers instead of doing it."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


class AutoScaling(Protocol):
    """What EKS needs of it."""

    def make(self, node_group: Object) -> str: ...

    def drop(self, name: str) -> None: ...


class Eks:
    """The clusters of one account in one region."""

    def __init__(self, account: str, region: str, groups: AutoScaling) -> None:
        self._arn = f"arn:aws:eks:{region}:{account}"
        self._groups = groups
        self._things: dict[tuple[str, ...], Object] = {}
        self._lock = threading.Lock()

    def answer(self, method: str, path: str, body: Object) -> Object:
        """The answer to a request, or `Refusal`."""
        with self._lock:
            for pattern, handlers in self._ROUTES.items():
                found = re.fullmatch(pattern, path)
                if found and method in handlers:
                    return handlers[method](self, *found.groups(), body)
        raise Refusal(501, "NotImplemented", f"{method} {path} is not part of this EKS")

    # -- what is kept, by its path

    def _add(self, key: tuple[str, ...], thing: Object) -> Object:
        if len(key) > 1:
            self._get(key[:1])
        if key in self._things:
            raise Refusal(409, "ResourceInUseException", f"{' '.join(key)} exists already")
        self._things[key] = {"createdAt": time.time(), "modifiedAt": time.time(), "tags": {}} | thing
        return self._things[key]

    def _get(self, key: tuple[str, ...]) -> Object:
        if key not in self._things:
            raise Refusal(404, "ResourceNotFoundException", f"there is no {' '.join(key)}")
        return self._things[key]

    def _drop(self, key: tuple[str, ...]) -> Object:
        return {**self._get(key), **({"status": "DELETING"} if self._things.pop(key) else {})}

    def _under(self, *key: str) -> list[tuple[str, ...]]:
        return [each for each in self._things if each[: len(key)] == key and len(each) > len(key)]

    # -- clusters

    def _create_cluster(self, body: Object) -> Object:
        name = body["name"]
        for kind in ("endpointPrivateAccess", "endpointPublicAccess"):
            body["resourcesVpcConfig"].setdefault(kind, kind == "endpointPublicAccess")
        made = body | {
            "arn": f"{self._arn}:cluster/{name}", "status": "ACTIVE", "platformVersion": "eks.1",
            "endpoint": f"https://{uuid.uuid4().hex}.eks.example", "certificateAuthority": {"data": "Q0E="},
            "identity": {"oidc": {"issuer": f"https://oidc.eks.example/id/{uuid.uuid4().hex}"}},
            "kubernetesNetworkConfig": {"serviceIpv4Cidr": "172.20.0.0/16", "ipFamily": "ipv4"},
            "resourcesVpcConfig": {"publicAccessCidrs": ["0.0.0.0/0"], "clusterSecurityGroupId": "sg-0123456789abcdef0"}
            | {key: value for key, value in body["resourcesVpcConfig"].items() if value != []},
        }  # fmt: skip
        return {"cluster": self._add((name,), made)}

    def _describe_cluster(self, name: str, _: Object) -> Object:
        return {"cluster": self._get((name,))}

    def _list_clusters(self, _: Object) -> Object:
        return {"clusters": [key[0] for key in self._things if len(key) == 1]}

    def _delete_cluster(self, name: str, _: Object) -> Object:
        if self._under(name, "node-groups"):
            raise Refusal(409, "ResourceInUseException", "Cluster has nodegroups attached")
        for key in self._under(name):
            del self._things[key]
        return {"cluster": self._drop((name,))}

    # -- node groups

    def _create_node_group(self, cluster: str, body: Object) -> Object:
        name = body["nodegroupName"]
        made = self._add((cluster, "node-groups", name), body | {
            "clusterName": cluster, "status": "ACTIVE", "health": {"issues": []},
            "nodegroupArn": f"{self._arn}:nodegroup/{cluster}/{name}/{uuid.uuid4()}",
            "version": body.get("version") or self._get((cluster,))["version"], "releaseVersion": "1.0.0-20261101",
        })  # fmt: skip
        made["resources"] = {"autoScalingGroups": [{"name": self._groups.make(made)}]}
        return {"nodegroup": made}

    def _describe_node_group(self, cluster: str, name: str, _: Object) -> Object:
        return {"nodegroup": self._get((cluster, "node-groups", name))}

    def _delete_node_group(self, cluster: str, name: str, _: Object) -> Object:
        gone = self._drop((cluster, "node-groups", name))
        self._groups.drop(gone["resources"]["autoScalingGroups"][0]["name"])
        return {"nodegroup": gone}

    # -- add-ons

    def _create_addon(self, cluster: str, body: Object) -> Object:
        name = body["addonName"]
        return {"addon": self._add((cluster, "addons", name), body | {
            "clusterName": cluster, "status": "ACTIVE", "health": {"issues": []}, "addonVersion": "v1.0.0-eksbuild.1",
            "addonArn": f"{self._arn}:addon/{cluster}/{name}/{uuid.uuid4()}",
        })}  # fmt: skip

    def _describe_addon(self, cluster: str, name: str, _: Object) -> Object:
        return {"addon": self._get((cluster, "addons", name))}

    def _delete_addon(self, cluster: str, name: str, _: Object) -> Object:
        return {"addon": self._drop((cluster, "addons", name))}

    # -- who gets in

    def _create_access(self, cluster: str, body: Object) -> Object:
        principal = body["principalArn"]
        return {"accessEntry": self._add((cluster, "access", principal), {
            "kubernetesGroups": [], "username": principal, "type": "STANDARD", "clusterName": cluster,
            "accessEntryArn": f"{self._arn}:access-entry/{cluster}/{uuid.uuid4()}",
        } | body)}  # fmt: skip

    def _describe_access(self, cluster: str, principal: str, _: Object) -> Object:
        return {"accessEntry": self._get((cluster, "access", principal))}

    def _delete_access(self, cluster: str, principal: str, _: Object) -> Object:
        for key in self._under(cluster, "access", principal):
            del self._things[key]
        self._drop((cluster, "access", principal))
        return {}

    def _associate_policy(self, cluster: str, principal: str, body: Object) -> Object:
        self._get((cluster, "access", principal))
        made = self._add((cluster, "access", principal, body["policyArn"]), body | {"associatedAt": time.time()})
        return {"clusterName": cluster, "principalArn": principal, "associatedAccessPolicy": made}

    def _list_policies(self, cluster: str, principal: str, _: Object) -> Object:
        found = [self._things[key] for key in self._under(cluster, "access", principal)]
        return {"clusterName": cluster, "principalArn": principal, "associatedAccessPolicies": found}

    def _disassociate_policy(self, cluster: str, principal: str, policy: str, _: Object) -> Object:
        self._drop((cluster, "access", principal, policy))
        return {}

    # -- pod identities

    def _create_identity(self, cluster: str, body: Object) -> Object:
        number = f"a-{uuid.uuid4().hex[:17]}"
        return {"association": self._add((cluster, "identities", number), body | {
            "clusterName": cluster, "associationId": number, "disableSessionTags": False,
            "associationArn": f"{self._arn}:podidentityassociation/{cluster}/{number}",
        })}  # fmt: skip

    def _list_identities(self, cluster: str, _: Object) -> Object:
        return {"associations": [self._things[key] for key in self._under(cluster, "identities")]}

    def _describe_identity(self, cluster: str, number: str, _: Object) -> Object:
        return {"association": self._get((cluster, "identities", number))}

    def _delete_identity(self, cluster: str, number: str, _: Object) -> Object:
        return {"association": self._drop((cluster, "identities", number))}

    _ROUTES: ClassVar[dict[str, dict[str, Callable[..., Object]]]] = {
        "/clusters": {"POST": _create_cluster, "GET": _list_clusters},
        "/clusters/([^/]+)": {"GET": _describe_cluster, "DELETE": _delete_cluster},
        "/clusters/([^/]+)/node-groups": {"POST": _create_node_group},
        "/clusters/([^/]+)/node-groups/([^/]+)": {"GET": _describe_node_group, "DELETE": _delete_node_group},
        "/clusters/([^/]+)/addons": {"POST": _create_addon},
        "/clusters/([^/]+)/addons/([^/]+)": {"GET": _describe_addon, "DELETE": _delete_addon},
        "/clusters/([^/]+)/access-entries": {"POST": _create_access},
        "/clusters/([^/]+)/access-entries/(.+)/access-policies": {"POST": _associate_policy, "GET": _list_policies},
        "/clusters/([^/]+)/access-entries/(.+)/access-policies/(.+)": {"DELETE": _disassociate_policy},
        "/clusters/([^/]+)/access-entries/(.+)": {"GET": _describe_access, "DELETE": _delete_access},
        "/clusters/([^/]+)/pod-identity-associations": {"POST": _create_identity, "GET": _list_identities},
        "/clusters/([^/]+)/pod-identity-associations/(.+)": {"GET": _describe_identity, "DELETE": _delete_identity},
    }
