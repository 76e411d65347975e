"""An AWS account on 127.0.0.1: moto, behind what it lacks or gets wrong. Holds nothing after its end.

    python -m tests.terraforming.aws

prints its address and serves until its standard input is closed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import boto3
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from tests.terraforming.budgets import Budgets
from tests.terraforming.eks import Eks, Object, Refusal

ACCOUNT = "123456789012"
"""That of moto, and of the examples."""

Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Account:
    """The account as a WSGI application; `address` is where it is served."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._moto: Wsgi = DomainDispatcherApplication(create_backend_app)
        self._eks: dict[str, Eks] = {}
        self._budgets = Budgets()
        self.address = ""

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(environ)
        # AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, …
        scope = request.headers.get("Authorization", "").split(",")[0].split("/")
        region, service = scope[2:4] if len(scope) == 5 else ("", "")
        try:
            if service == "eks":
                eks = self._eks.setdefault(region, Eks(ACCOUNT, region, Groups(self.address, region)))
                answer = _json(eks.answer(request.method, request.path, request.get_json(silent=True) or {}))
            elif service == "budgets":
                action = request.headers["X-Amz-Target"].rpartition(".")[2]
                answer = _json(self._budgets.answer(action, request.get_json(force=True)))
            elif service == "ec2":
                answer = _without_own_tags(Response.from_app(self._moto, environ))
            else:
                return self._moto(environ, start)
        except Refusal as refusal:
            answer = _json({"message": refusal.message}, refusal.status)
            answer.headers["x-amzn-ErrorType"] = refusal.kind
        return answer(environ, start)


def _json(body: Object, status: int = 200) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


def _without_own_tags(answer: Response) -> Response:
    """Without the tags of a launch template itself among those of what is started from it, where moto puts them."""
    own = rb"<item>\s*<resourceType>launch-template</resourceType>.*?</tagSet>\s*</item>"
    answer.data = re.sub(own, b"", answer.get_data(), flags=re.DOTALL)
    return answer


class Groups:
    """The Auto Scaling groups behind node groups, tagged as EKS does it."""

    def __init__(self, address: str, region: str) -> None:
        self._api = client("autoscaling", address, region)

    def make(self, node_group: Object) -> str:
        """Makes one for a node group as EKS describes it, without instances, and returns its name."""
        cluster, group = node_group["clusterName"], node_group["nodegroupName"]
        tags = {
            "eks:cluster-name": cluster, "eks:nodegroup-name": group,
            "k8s.io/cluster-autoscaler/enabled": "true", f"k8s.io/cluster-autoscaler/{cluster}": "owned",
        }  # fmt: skip
        template = node_group["launchTemplate"]
        name = f"eks-{group}-{uuid.uuid4()}"
        self._api.create_auto_scaling_group(
            AutoScalingGroupName=name, MinSize=0, MaxSize=node_group["scalingConfig"]["maxSize"], DesiredCapacity=0,
            LaunchTemplate={"LaunchTemplateId": template["id"], "Version": template["version"]},
            VPCZoneIdentifier=",".join(node_group["subnets"]),
            Tags=[{"Key": key, "Value": value, "PropagateAtLaunch": True} for key, value in tags.items()],
        )  # fmt: skip
        return name

    def drop(self, name: str) -> None:
        self._api.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)


def client(service: str, address: str, region: str) -> Any:
    """A client of the account at that address."""
    session: Any = boto3.session.Session(
        aws_access_key_id="testing", aws_secret_access_key="testing", region_name=region
    )
    return session.client(service, endpoint_url=address)


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"  # read when moto is imported
    account = Account()
    server = make_server("127.0.0.1", 0, account, threaded=True)
    account.address = f"http://127.0.0.1:{server.port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(account.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
