"""What a container finds when it starts: its volumes as real folders, and its environment from Secrets and ConfigMaps.

Processes here share one file system, so a mount cannot be where the manifest puts it. The mount paths at the start of
words in the container's command, arguments and environment values are replaced by the real folders: with a volume at
`/cache`, `--cache=/cache/a` becomes `--cache=<pod folder>/volumes/<name>/a`. What a program has hard-coded is not
replaced. /dev/shm is left alone. A hostPath is one folder per node, a claim one folder per name.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from tests.kube.cluster import Cluster
from tests.kube.schema import Object


class NotReady(Exception):
    """A container cannot be started yet; `reason` is what its waiting state says."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def make_volumes(cluster: Cluster, pod: Object, folder: Path, shared: Path) -> dict[str, Path]:
    """Fills the pod's volumes; returns where each is."""
    places = {}
    for volume in pod["spec"].get("volumes") or []:
        name = volume["name"]
        place = folder / "volumes" / name
        if "hostPath" in volume:
            place = shared / "nodes" / pod["spec"]["nodeName"] / volume["hostPath"]["path"].lstrip("/")
        elif "persistentVolumeClaim" in volume:
            place = shared / "claims" / volume["persistentVolumeClaim"]["claimName"]
        place.mkdir(parents=True, exist_ok=True)
        for source in (volume.get("projected") or {}).get("sources") or [volume]:
            _fill(cluster, pod, name, source, place)
        places[name] = place
    return places


def _fill(cluster: Cluster, pod: Object, volume: str, source: Object, place: Path) -> None:
    kind = next((kind for kind in ("configMap", "secret") if kind in source), None)
    if kind is None:
        return
    reference = source[kind]
    name = reference.get("name") or reference.get("secretName")
    data = _data(cluster, pod["metadata"]["namespace"], f"{kind.lower()}s", name)
    if data is None:
        if reference.get("optional"):
            return
        noun = kind.lower()
        raise NotReady(
            "ContainerCreating", f'MountVolume.SetUp failed for volume "{volume}" : {noun} "{name}" not found'
        )
    wanted = {item["key"]: item["path"] for item in reference.get("items") or []} or {key: key for key in data}
    for key, path in wanted.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(data[key])


def _data(cluster: Cluster, namespace: str, plural: str, name: str) -> dict[str, bytes] | None:
    thing = cluster.get(plural, namespace, name)
    if thing is None:
        return None
    if plural == "secrets":
        return {key: base64.b64decode(value) for key, value in (thing.get("data") or {}).items()}
    result = {key: value.encode() for key, value in (thing.get("data") or {}).items()}
    return result | {key: base64.b64decode(value) for key, value in (thing.get("binaryData") or {}).items()}


def environment(cluster: Cluster, pod: Object, container: Object) -> dict[str, str]:
    """The container's variables, `envFrom` first, with `$(NAME)` replaced."""
    result: dict[str, str] = {}
    namespace = pod["metadata"]["namespace"]
    for source in container.get("envFrom") or []:
        kind = "secretRef" if "secretRef" in source else "configMapRef"
        plural = "secrets" if kind == "secretRef" else "configmaps"
        data = _data(cluster, namespace, plural, source[kind]["name"])
        if data is None and not source[kind].get("optional"):
            raise NotReady("CreateContainerConfigError", f'{plural[:-1]} "{source[kind]["name"]}" not found')
        result |= {source.get("prefix", "") + key: value.decode() for key, value in (data or {}).items()}
    for entry in container.get("env") or []:
        if "valueFrom" in entry:
            value = _value_from(cluster, pod, entry["valueFrom"])
        else:
            value = re.sub(r"\$\((\w+)\)", lambda match: result.get(match[1], match[0]), entry.get("value") or "")
        if value is not None:
            result[entry["name"]] = value
    return result


def _value_from(cluster: Cluster, pod: Object, source: Object) -> str | None:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    kind = next((kind for kind in ("secretKeyRef", "configMapKeyRef") if kind in source), None)
    if kind is None:
        return None
    reference, namespace = source[kind], pod["metadata"]["namespace"]
    plural = "secrets" if kind == "secretKeyRef" else "configmaps"
    data = _data(cluster, namespace, plural, reference["name"])
    if data is not None and reference["key"] in data:
        return data[reference["key"]].decode()
    if reference.get("optional"):
        return None
    if data is None:
        raise NotReady("CreateContainerConfigError", f'{plural[:-1]} "{reference["name"]}" not found')
    noun = "Secret" if plural == "secrets" else "ConfigMap"
    where = f"{noun} {namespace}/{reference['name']}"
    raise NotReady("CreateContainerConfigError", f"couldn't find key {reference['key']} in {where}")


def _field(pod: Object, path: str) -> str:
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str((pod["metadata"].get(keyed[1]) or {}).get(keyed[2], ""))
    if path in ("status.podIP", "status.hostIP", "status.podIPs"):
        return "127.0.0.1"
    value: object = pod
    for part in path.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)


class Translation:
    """Turns what a manifest says into what is true on this machine: mount paths, and addresses in the cluster."""

    def __init__(self, container: Object, volumes: dict[str, Path], addresses: dict[str, str]) -> None:
        self._addresses = addresses
        self._mounts: list[tuple[str, str]] = []
        for mount in container.get("volumeMounts") or []:
            if mount["mountPath"] != "/dev/shm" and mount["name"] in volumes:
                real = volumes[mount["name"]] / mount.get("subPath", "")
                self._mounts.append((mount["mountPath"].rstrip("/"), str(real)))
        self._mounts.sort(key=lambda pair: -len(pair[0]))

    def __call__(self, text: str) -> str:
        """A command-line word or an environment value, made true."""
        for inside, real in self._addresses.items():
            text = text.replace(inside, real)
        if not self._mounts:
            return text
        real_of = dict(self._mounts)
        pattern = "|".join(re.escape(path) for path, _ in self._mounts)
        return re.sub(rf"(?<![\w./-])({pattern})(?=[/:,;\s\"']|$)", lambda match: real_of[match[1]], text)
