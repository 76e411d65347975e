"""Checkpoints that are whole or do not count: safetensors and JSON, sealed by a manifest that is written last.

A checkpoint is the folder `checkpoints/step-00000123/`. Only with its `manifest.json`, and with every file as the
manifest's sha256 says, is it ever loaded; otherwise the next older one is. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from launcher.errors import InfrastructureError, SiteError
from launcher.runs import checkpoint_steps
from launcher.storage import Store

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

MISSES = 3
"""Checkpoints that may fail in a row, because the storage is away, before the run does."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after `step` steps: tensors in named groups, and plain JSON values."""

    step: int
    fingerprint: str
    tensors: dict[str, Tensors]
    values: dict[str, Any]


def folder(step: int) -> str:
    """Where the checkpoint of a step lies in the run directory."""
    return f"checkpoints/step-{step:08d}"


def save(store: Store, snapshot: Snapshot, fence: Callable[[], None] = lambda: None) -> None:
    """Writes the checkpoint; until the last write it does not exist for a reader.

    `fence` is called before that, and raises where another attempt has taken over.
    """
    files = {f"{name}.safetensors": save_tensors(tensors) for name, tensors in snapshot.tensors.items()}
    files["state.json"] = json.dumps(snapshot.values).encode()
    base = folder(snapshot.step)
    for name, data in files.items():
        store.write(f"{base}/{name}", data)
    manifest = {
        "schema": 1,
        "step": snapshot.step,
        "fingerprint": snapshot.fingerprint,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
        },
    }
    fence()
    store.write(f"{base}/manifest.json", json.dumps(manifest, indent=1).encode())


def load(store: Store, step: int) -> Snapshot:
    """The checkpoint of a step; `SiteError` names the file that is absent or damaged."""
    base = folder(step)

    def read(name: str) -> bytes:
        try:
            return store.read(f"{base}/{name}")
        except FileNotFoundError:
            raise SiteError("a file of the checkpoint is absent", where=f"{store.uri}/{base}/{name}") from None

    try:
        manifest = json.loads(read("manifest.json"))
        files = {name: read(name) for name in manifest["files"]}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
                raise SiteError("a file of the checkpoint is damaged", where=f"{store.uri}/{base}/{name}")
        tensors = {name.removesuffix(".safetensors"): load_tensors(data) for name, data in files.items()
                   if name.endswith(".safetensors")}  # fmt: skip
        return Snapshot(manifest["step"], manifest["fingerprint"], tensors, json.loads(files["state.json"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SiteError("the manifest of the checkpoint is damaged", where=f"{store.uri}/{base}") from error


def load_latest(store: Store, skipped: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint that is whole, or None. `skipped` is told of each that is not."""
    for step in reversed(checkpoint_steps(store)):
        try:
            return load(store, step)
        except SiteError as error:
            skipped(str(error))
    return None


def prune(store: Store, keep: int, also: Iterable[int]) -> None:
    """Deletes all but the `keep` newest checkpoints and those of the steps in `also`; the manifest goes first."""
    kept = {*checkpoint_steps(store)[-keep:], *also}
    newest = max(kept, default=-1)
    doomed: dict[int, list[str]] = {}
    for entry in store.list("checkpoints/step-"):
        step = int(entry.key.split("/")[1][5:])
        # A folder beyond the newest sealed one is being written now.
        if step not in kept and step < newest:
            doomed.setdefault(step, []).append(entry.key)
    for keys in doomed.values():
        for key in sorted(keys, key=lambda key: not key.endswith("manifest.json")):
            store.delete(key)


class Saver:
    """Writes checkpoints in the background, one at a time, and prunes after each.

    Storage that is away does not stop the training until `MISSES` checkpoints in a row could not be written; any other
    failure surfaces in the next call. `seconds` is the time the training waited for this object.
    """

    def __init__(
        self, store: Store, keep: int, written: Callable[[int, float], None], fence: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._fence = fence
        self._keep = keep
        self._written = written
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._missed: tuple[Snapshot, int | None] | None = None
        self._misses = 0
        self.seconds = 0.0

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Takes ownership of the snapshot's tensors, which nobody may change afterwards. `best` is a step to keep."""
        self._join()
        self._thread = threading.Thread(target=self._run, args=(snapshot, best), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Returns when the last checkpoint is sealed; raises what keeps it from being."""
        self._join()
        if self._missed is not None:
            self._misses = MISSES - 1
            self._run(*self._missed)
            self._join()

    def _join(self) -> None:
        began = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.seconds += time.monotonic() - began
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, snapshot: Snapshot, best: int | None) -> None:
        began = time.monotonic()
        try:
            save(self._store, snapshot, self._fence)
            self._missed, self._misses = None, 0
            self._written(snapshot.step, time.monotonic() - began)
            prune(self._store, self._keep, [] if best is None else [best])
        except InfrastructureError as error:
            log.warning("the checkpoint of step %d was not written: %s", snapshot.step, error)
            self._missed = snapshot, best
            self._misses += 1
            self._error = error if self._misses >= MISSES else None
        except Exception as error:  # carried to the training thread, which raises it
            log.exception("the checkpoint of step %d was not written", snapshot.step)
            self._error = error
