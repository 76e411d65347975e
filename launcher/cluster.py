"""A connection to one namespace of a Kubernetes cluster: objects as plain JSON, errors in terms of who has to act.

The `kubernetes` client is imported here only, on first use: for the kubeconfig, its credentials and TLS, and for port
forwarding. Requests go over its connection pool, so that any kind of object is one table row and watches are streams.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlencode

from launcher.errors import InfrastructureError, LaunchError, SiteError, UserError, nearest

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Where the API serves a kind of object."""

    base: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.base.split("/")[2] if self.base.startswith("/apis/") else ""


RAY_JOBS = Kind("/apis/ray.io/v1", "rayjobs")
RAY_CLUSTERS = Kind("/apis/ray.io/v1", "rayclusters")
PODS = Kind("/api/v1", "pods")
EVENTS = Kind("/api/v1", "events")
CONFIG_MAPS = Kind("/api/v1", "configmaps")
SECRETS = Kind("/api/v1", "secrets")
SERVICE_ACCOUNTS = Kind("/api/v1", "serviceaccounts")
QUOTAS = Kind("/api/v1", "resourcequotas")
NODES = Kind("/api/v1", "nodes", namespaced=False)
WORKLOADS = Kind("/apis/kueue.x-k8s.io/v1beta2", "workloads")
LOCAL_QUEUES = Kind("/apis/kueue.x-k8s.io/v1beta2", "localqueues")
DEPLOYMENTS = Kind("/apis/apps/v1", "deployments")
CRDS = Kind("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False)
REVIEWS = Kind("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews", namespaced=False)

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
LONGEST_PAUSE = 10.0
"""However long a server asks for patience before the next try."""


class ConflictError(LaunchError):
    """The object is there already, or was changed by somebody else."""

    family: ClassVar[str] = "user"


class ExpiredError(LaunchError):
    """The API server no longer knows what came after that resource version: list anew."""


class Cluster:
    """One namespace, through one context of the user's kubeconfig, or from within a pod."""

    def __init__(self, client: Any, namespace: str, context: str) -> None:
        self._client = client
        self.namespace = namespace
        self.context = context
        self._host = client.configuration.host

    @classmethod
    def connect(cls, context: str | None = None, namespace: str | None = None) -> Cluster:
        """The cluster of a context (by default the current one); nothing is requested yet."""
        from kubernetes import client, config

        # The library reads the variable when it is imported, and never again.
        file = os.environ.get("KUBECONFIG") or "~/.kube/config"
        try:
            contexts, current = _contexts(file)
        except (config.ConfigException, OSError, ValueError) as error:
            if context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
                return cls._within(namespace)
            raise SiteError(
                f"there is no usable kubeconfig ({error})", where=file,
                hint="set KUBECONFIG, or fetch one: aws eks update-kubeconfig --name CLUSTER",
            ) from None  # fmt: skip
        chosen = current if context is None else context
        if chosen not in contexts:
            close = nearest(chosen, contexts)
            what = f"the kubeconfig has no context {chosen}" if chosen else "the kubeconfig has no current context"
            raise UserError(what + (f"; {close}" if close else ""), where="--context",
                            hint=f"it has {', '.join(contexts) or 'none'}")  # fmt: skip
        configuration = client.Configuration()
        try:
            with _complaints() as heard:
                config.load_kube_config(file, chosen, configuration, persist_config=False)
        except (config.ConfigException, OSError, ValueError) as error:
            raise SiteError(f"the kubeconfig does not lead to a cluster: {error}", where=chosen,
                            hint=f"kubectl --context {chosen} get pods says more") from None  # fmt: skip
        if heard and not configuration.api_key and not configuration.cert_file:
            raise SiteError(f"the command of the kubeconfig gives no credentials: {heard[-1]}", where=chosen,
                            hint=f"install it, or log in; see kubectl --context {chosen} get pods")  # fmt: skip
        return cls(client.ApiClient(configuration), namespace or contexts[chosen], chosen)

    @classmethod
    def _within(cls, namespace: str | None) -> Cluster:
        from kubernetes import client, config

        configuration = client.Configuration()
        config.load_incluster_config(client_configuration=configuration)
        with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
            return cls(client.ApiClient(configuration), namespace or file.read().strip(), "in-cluster")

    @property
    def where(self) -> str:
        """The place as messages name it."""
        return f"{self.context}/{self.namespace}"

    # -- objects

    def get(self, kind: Kind, name: str) -> Object | None:
        """The object, or None if there is none."""
        answer = self._request("GET", self._path(kind, name), missing_ok=True)
        return None if answer is None else _json(answer)

    def objects(self, kind: Kind, *, labels: str = "", fields: str = "", everywhere: bool = False) -> list[Object]:
        """All objects that match; with `everywhere` in all namespaces."""
        return self.snapshot(kind, labels=labels, fields=fields, everywhere=everywhere)[0]

    def snapshot(
        self, kind: Kind, *, labels: str = "", fields: str = "", everywhere: bool = False
    ) -> tuple[list[Object], str]:
        """`objects`, and the resource version to watch from."""
        found: list[Object] = []
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": "500"}
        while True:
            page = _json(self._request("GET", self._path(kind, everywhere=everywhere), query), "metadata")
            found += page.get("items") or []
            query["continue"] = page["metadata"].get("continue") or ""
            if not query["continue"]:
                return found, page["metadata"].get("resourceVersion", "")

    def watch(self, kind: Kind, version: str, *, labels: str = "", fields: str = "", seconds: float) -> Watch:
        """Changes since `version`, for about so many seconds.

        Raises `ExpiredError` when the server has forgotten that version, here or while it is read.
        """
        query = {"labelSelector": labels, "fieldSelector": fields, "resourceVersion": version, "watch": "true",
                 "allowWatchBookmarks": "true", "timeoutSeconds": str(round(seconds))}  # fmt: skip
        answer = self._request("GET", self._path(kind), query, read_seconds=seconds + 15, stream=True)
        return Watch(self, answer, kind)

    def create(self, kind: Kind, body: Object, *, dry_run: bool = False) -> Object:
        """Creates it, with every field known to the server; `ConflictError` if it is there already."""
        query = {"fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        return _json(self._request("POST", self._path(kind), query, body))

    def patch(self, kind: Kind, name: str, body: Object) -> Object:
        """Merges `body` into the object."""
        return _json(self._request("PATCH", self._path(kind, name), {}, body))

    def delete(self, kind: Kind, name: str, *, uid: str = "") -> None:
        """Deletes it, and in the background what it owns; a missing one, or one of another uid, is no error."""
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self._request("DELETE", self._path(kind, name), {}, body, missing_ok=True)
        except ConflictError:
            return

    def pod_log(self, pod: str, container: str, *, previous: bool = False, tail: int = 20) -> str:
        """The last lines of a container; empty where there are none."""
        query = {"container": container, "tailLines": str(tail), "previous": "true" if previous else ""}
        try:
            answer = self._request("GET", f"{self._path(PODS, pod)}/log", query, missing_ok=True)
        except SiteError:  # a container that never ran has no log
            return ""
        return "" if answer is None else answer.data.decode("utf-8", "replace")

    def allowed(self, verb: str, kind: Kind, sub: str = "") -> bool:
        """Whether the user may do this in the namespace."""
        attributes = {"verb": verb, "resource": kind.plural, "group": kind.group, "subresource": sub}
        if kind.namespaced:
            attributes["namespace"] = self.namespace
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
                  "spec": {"resourceAttributes": attributes}}  # fmt: skip
        answer = _json(self._request("POST", self._path(REVIEWS), {}, review))
        return bool(answer.get("status", {}).get("allowed"))

    def version(self) -> str:
        """The API server's version, as in v1.33.1."""
        return str(_json(self._request("GET", "/version"), "gitVersion")["gitVersion"])

    def serves(self, kind: Kind) -> bool:
        """Whether this kind of object is known there at all."""
        answer = self._request("GET", kind.base, missing_ok=True)
        return answer is not None and any(item["name"] == kind.plural for item in _json(answer).get("resources") or [])

    def port_forward(self, pod: str, port: int) -> Any:
        """A websocket to a port of a pod. Each message begins with its channel: 0 for data, 1 for errors."""
        from kubernetes.stream import ws_client

        url = ws_client.get_websocket_url(f"{self._host}{self._path(PODS, pod)}/portforward?ports={port}")
        headers = {key.lower(): value for key, value in self._credentials().items()}
        headers["sec-websocket-protocol"] = "v4.channel.k8s.io"
        try:
            return ws_client.create_websocket(self._client.configuration, url, headers)
        except Exception as error:  # the library raises what its websocket does
            raise InfrastructureError(f"no connection to port {port}: {error}", where=f"pod {pod}",
                                      hint="launch doctor; the pod may have gone") from error  # fmt: skip

    # -- requests

    def _path(self, kind: Kind, name: str = "", *, everywhere: bool = False) -> str:
        middle = f"/namespaces/{self.namespace}" if kind.namespaced and not everywhere else ""
        return f"{kind.base}{middle}/{kind.plural}" + (f"/{name}" if name else "")

    def _request(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Object | None = None, *,
        missing_ok: bool = False, stream: bool = False, read_seconds: float = READ_SECONDS,
    ) -> Any:  # fmt: skip
        import urllib3

        headers = {"Accept": "application/json", "User-Agent": "raylaunch", **self._credentials()}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        kept = {key: value for key, value in (query or {}).items() if value}
        try:
            answer = self._client.rest_client.pool_manager.request(
                method, f"{self._host}{path}" + (f"?{urlencode(kept)}" if kept else ""),
                body=None if body is None else json.dumps(body), headers=headers, preload_content=not stream,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds), retries=_retries(method),
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.status == 404 and missing_ok:
            return None
        if answer.status >= 400:
            raise self._error(answer.status, _document(answer), path)
        return answer

    def _credentials(self) -> dict[str, str]:
        auth = self._client.configuration.auth_settings().get("BearerToken")
        return {"Authorization": auth["value"]} if auth else {}

    def _unreachable(self, error: Exception) -> LaunchError:
        cause = getattr(error, "reason", None) or error
        for part in (cause, *cause.args):
            if isinstance(part, ssl.SSLCertVerificationError):
                return SiteError(f"the certificate of the API server is not trusted: {part.verify_message}",
                                 where=self.where, hint="fetch the kubeconfig anew")  # fmt: skip
        reason = str(cause).split(">: ")[-1]
        return InfrastructureError(f"the API server does not answer ({reason[:200]})", where=self.where,
                                   hint="check the network or VPN; runs in the cluster go on")  # fmt: skip

    def _error(self, status: int, document: Object, path: str) -> LaunchError:
        message = str(document.get("message") or f"HTTP {status}")
        if status == 401:
            return SiteError("the cluster does not accept the credentials", where=self.where,
                             hint="renew them (aws sso login); kubectl get pods shows the same")  # fmt: skip
        if status == 403:
            hint = (
                "ask for the quota to be raised"
                if "exceeded quota" in message
                else "launch doctor lists what is needed"
            )
            return SiteError(message, where=self.where, hint=hint)
        if status == 404:
            if (document.get("details") or {}).get("kind") == "namespaces":
                return SiteError(f"there is no namespace {self.namespace}", where=self.where,
                                 hint="--namespace names another; kubectl get namespaces lists them")  # fmt: skip
            return SiteError(f"the cluster does not know {path.rpartition('/')[2]} ({message})", where=self.where,
                             hint="launch doctor says what has to be installed")  # fmt: skip
        if status == 409:
            return ConflictError(message, where=self.where)
        if status == 410:
            return ExpiredError(message, where=self.where)
        if status < 500 and status not in (408, 429):
            return SiteError(f"the cluster refuses the request: {message}", where=self.where,
                             hint="launch doctor compares the versions; --dry-run prints the object")  # fmt: skip
        return InfrastructureError(f"the API server answered {status}: {message}", where=self.where, hint="try again")


class Watch:
    """Changes as they happen: (ADDED, MODIFIED, DELETED or BOOKMARK, object). Another thread may close it."""

    def __init__(self, cluster: Cluster, answer: Any, kind: Kind) -> None:
        self._cluster, self._answer, self._kind = cluster, answer, kind

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        import urllib3

        try:
            for line in _lines(self._answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise self._cluster._error(event["object"].get("code", 500), event["object"], self._kind.plural)
                yield event["type"], event["object"]
        except (urllib3.exceptions.HTTPError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise self._cluster._unreachable(error) from error
        finally:
            # In this order: a connection with an unread rest must not serve the next request.
            self._answer.close()
            self._answer.release_conn()

    def close(self) -> None:
        """Ends it for whoever reads it, who gets an `InfrastructureError` if it was not at its end."""
        with suppress(RuntimeError, ValueError, OSError):  # it was
            self._answer.shutdown()


def _contexts(file: str) -> tuple[dict[str, str], str]:
    """The namespace of each context of the kubeconfig, and which is the current one."""
    import yaml
    from kubernetes.config.kube_config import KubeConfigMerger

    try:
        merged = KubeConfigMerger(file).config
        if merged is None:
            raise ValueError("there is no such file")
        found = {item["name"]: item["context"].safe_get("namespace") or "default" for item in merged.value["contexts"]}
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except (AttributeError, KeyError, TypeError):
        raise ValueError("it is not a kubeconfig") from None
    return found, merged.value.get("current-context") or ""


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the library only logs, such as that a command for credentials is not there."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear()
    logging.getLogger().addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(ear)


def _retries(method: str) -> Any:
    """What is safe to repeat: a create that may have reached the server is not."""
    import urllib3

    again = method != "POST"

    class Retries(urllib3.Retry):
        RETRY_AFTER_STATUS_CODES = frozenset({413, 429, 503} if again else {429})

        def increment(self, *args: Any, **kwargs: Any) -> Any:
            # Whoever did not answer in half a minute is not asked three times more.
            if isinstance(kwargs.get("error"), urllib3.exceptions.ReadTimeoutError):
                raise kwargs["error"]
            return super().increment(*args, **kwargs)

        def get_retry_after(self, response: Any) -> float | None:
            asked = super().get_retry_after(response)
            return None if asked is None else min(asked, LONGEST_PAUSE)

    return Retries(
        total=5, connect=3, read=3 if again else 0, status=4, other=0, backoff_factor=0.2, backoff_jitter=0.3,
        status_forcelist=(429, 500, 502, 503, 504) if again else (429,), allowed_methods=None,
        respect_retry_after_header=True, raise_on_status=False,
    )  # fmt: skip


def _json(answer: Any, needs: str = "") -> Object:
    try:
        document = json.loads(answer.data)
        if isinstance(document, dict) and (not needs or needs in document):
            return document
    except ValueError:
        pass
    raise InfrastructureError("what answers there is not an API server", hint="check the network, VPN or proxy")


def _document(answer: Any) -> Object:
    try:
        return _json(answer)
    except LaunchError:
        return {"message": answer.data.decode("utf-8", "replace")[:300]}


def _lines(answer: Any) -> Iterator[bytes]:
    rest = b""
    for part in answer.stream(amt=None, decode_content=True):
        *lines, rest = (rest + part).split(b"\n")
        yield from (line for line in lines if line.strip())
