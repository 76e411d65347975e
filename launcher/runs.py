"""The run directory `<storage>/<run>/`: the only state there is, and how it is read and written.

Any machine that reaches the storage can list, watch, cancel, resume and report a run from this alone. This module
knows the names and shapes of the files; it starts nothing and trains nothing.

    spec.json          the resolved spec; its creation decides who owns the name
    plan.json          what was planned, and why each value was chosen
    index.parquet      the list of samples
    data_report.json   images that could not be read
    state.json         where the run stands (State)
    lease.json         who drives it, and when that was last confirmed
    cancel.json        a request to stop
    attempts/0001.json one life of the run
    submission.json    how often the driver was submitted on its cluster
    events.jsonl       what happened to the run: attempts, retries, states
    progress.jsonl     what the training does: steps and epochs
    metrics.json, metrics.csv, predictions.parquet
    logs/              driver.log, rank-0.log, ...
    checkpoints/       step-00000000/ ..., each whole only with its manifest.json
    model/             what `launch predict` needs
    report.html
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.errors import Exit, FencedError, NotFoundError, SiteError, UserError, nearest
from launcher.spec import Spec, valid_name
from launcher.storage import Store, open_store

SCHEMA = 1
STRIKES = 3
"""What was lost is tried again until this many losses in a row came without a new checkpoint between them."""
FIGURES = ("split", "epoch", "count", "top1", "top5", "macro_f1", "loss", "trial", "trials")
"""Of the final evaluation, what state.json tells; the last two of a sweep only."""
LEASE_SECONDS = 60.0
"""A lease that was not confirmed for this long no longer counts."""


class Status(StrEnum):
    """Where a run stands: PENDING for a place, QUEUED behind other runs, ... Those up to CANCELLING are not final."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    CANCELLING = "CANCELLING"
    INTERRUPTED = "INTERRUPTED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED)

    @property
    def exit_code(self) -> Exit:
        """What `launch` exits with when it watched the run to here."""
        ends = {Status.SUCCEEDED: Exit.DONE, Status.CANCELLED: Exit.CANCELLED, Status.FAILED: Exit.FAILED,
                Status.INTERRUPTED: Exit.FAILED}  # fmt: skip
        return ends.get(self, Exit.NOT_FINISHED)


@dataclass(frozen=True)
class State:
    """The content of state.json. Times are Unix seconds; `submitted` is when a cluster was last asked to run it.

    `hint` is what to type about `reason`.
    """

    status: Status
    reason: str = ""
    attempt: int = 0
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    error: dict[str, str] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    hint: str = ""
    submitted: float = 0.0


@dataclass(frozen=True)
class Owner:
    """The process that drives a run, told apart from any later one with the same number."""

    host: str
    boot: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        import psutil

        return cls(socket.gethostname(), boot_id(), os.getpid(), psutil.Process().create_time())

    def here(self) -> bool:
        """Whether that process would be on this machine."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether that process still runs; only an answer if `here`."""
        import psutil

        if self.boot != boot_id():
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def boot_id() -> str:
    """A text that changes with each boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return f"{psutil.boot_time():.0f}"


def default_storage() -> str:
    """Where runs lie when nothing else is said."""
    return os.environ.get("RAYLAUNCH_STORAGE") or str(Path.home() / "raylaunch")


class Run:
    """One run directory. A trial's `home` is its sweep, which has the index and the first weights; else itself."""

    def __init__(self, storage: str, name: str, home: Run | None = None) -> None:
        self.storage = storage
        self.name = name
        self.home = home or self
        self.store: Store = open_store(storage).child(name)

    @classmethod
    def at(cls, uri: str, home: str = "") -> Run:
        """The run whose directory is `uri`, or the trial of the sweep at `home`."""
        storage, _, name = uri.rstrip("/").rpartition("/")
        return cls(storage, name, cls.at(home) if home not in ("", uri) else None)

    def trial(self, number: int) -> Run:
        """The run directory of a sweep's trial."""
        return Run(f"{self.uri}/trials", f"{number:04d}", home=self)

    @property
    def uri(self) -> str:
        return self.store.uri

    # -- what it is

    def create(self, spec: Spec, plan: dict[str, Any]) -> None:
        """Takes the name; of two that try, one gets `UserError`."""
        if not self.store.create("spec.json", _pretty(spec.model_dump(mode="json"))):
            raise self.taken()
        self.store.write("plan.json", _pretty(plan))
        self.set_state(State(Status.PENDING, created=time.time()))

    def taken(self) -> UserError:
        """The error for a name that is in use."""
        return UserError(f"there is a run named {self.name} already", where=self.uri,
                         hint=f"launch resume {self.name}, launch rm {self.name}, or another --name")  # fmt: skip

    def exists(self) -> bool:
        """Whether the name is in use, if only by the remains of a run."""
        try:
            self.store.read("spec.json")
        except FileNotFoundError:
            return False
        return True

    def spec(self) -> Spec:
        document = self._json("spec.json")
        if document is None:
            raise self._missing()
        try:
            return Spec.model_validate_json(json.dumps(document))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise SiteError(f"another version of raylaunch wrote the spec ({key}: {first['msg']})",
                            where=f"{self.uri}/spec.json", hint="use that version") from error  # fmt: skip

    def set_spec(self, spec: Spec, plan: dict[str, Any]) -> None:
        """Replaces the spec of a run that is resumed with allowed changes."""
        self.store.write("plan.json", _pretty(plan))
        self.store.write("spec.json", _pretty(spec.model_dump(mode="json")))

    def plan(self) -> dict[str, Any]:
        return self._json("plan.json") or {}

    def pool(self) -> str:
        """Name of the pool it runs on; a damaged plan counts as this machine's."""
        try:
            return str(self.plan().get("pool") or "local")
        except SiteError:
            return "local"

    # -- where it stands

    def state(self) -> State:
        """state.json as it was last written; `status` also asks whether somebody still drives the run."""
        document = self._json("state.json")
        if document is None:
            if not self.exists():
                raise self._missing()
            return State(Status.PENDING, reason="nothing has started yet")
        try:
            return State(**{key: value for key, value in document.items() if key not in ("schema", "status")},
                         status=Status(document["status"]))  # fmt: skip
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise self._damaged("state.json", error) from error

    def set_state(self, state: State) -> None:
        self.store.write("state.json", _pretty({"schema": SCHEMA, **asdict(state)}))

    def update(self, **changes: Any) -> State:
        """Writes the state with some of its fields changed."""
        state = replace(self.state(), **changes)
        self.set_state(state)
        return state

    def owner(self) -> Owner | None:
        """Who drives the run now, or None if nobody does."""
        lease = self._json("lease.json")
        if lease is None:
            return None
        owner = Owner(**lease["owner"])
        alive = owner.alive() if owner.here() else time.time() - lease["confirmed"] < LEASE_SECONDS
        return owner if alive else None

    def hold(self, owner: Owner) -> None:
        """Confirms the lease; call it well within `LEASE_SECONDS`."""
        self.store.write("lease.json", _pretty({"owner": asdict(owner), "confirmed": time.time()}))

    def release(self) -> None:
        self.store.delete("lease.json")

    def attempts(self) -> int:
        """How many attempts were begun."""
        return len(list(self.store.list("attempts/")))

    def begin_attempt(self, about: dict[str, Any]) -> int:
        """Takes the next attempt's number; a second driver that tries at the same time gets another error.

        The number is a fencing token: whoever finds a higher one begun must not write any more.
        """
        number = self.attempts() + 1
        if not self.store.create(f"attempts/{number:04d}.json", _pretty({"began": time.time(), **about})):
            raise UserError(f"attempt {number} of {self.name} was begun elsewhere", where=self.uri,
                            hint=f"launch status {self.name}")  # fmt: skip
        return number

    def check_attempt(self, number: int) -> None:
        """Raises `FencedError` if a later attempt than `number` was begun."""
        newest = self.attempts()
        if newest > number:
            raise FencedError(f"attempt {newest} has taken over from attempt {number}", where=self.uri)

    def hours(self) -> float:
        """Hours of all attempts so far, each from its begin to its last sign of life."""
        records = [self._json(entry.key) or {} for entry in self.store.list("attempts/")]
        spans = (max(record.get("ended") or 0, record.get("seen") or 0) - record.get("began", 0) for record in records)
        return float(sum(max(span, 0.0) for span in spans)) / 3600

    def spent(self) -> float:
        """What all attempts so far have cost, at the price an hour that was planned; 0 where there was none."""
        price = (self.plan().get("layout") or {}).get("price_per_hour") or 0.0
        return float(self.hours() * price) if price else 0.0

    def request_cancel(self, *, force: bool = False) -> None:
        """Asks whoever drives the run to save and stop, or with `force` to kill it."""
        self.store.write("cancel.json", _pretty({"time": time.time(), "force": force}))

    def cancel_requested(self) -> bool:
        """Whether the run, or the sweep it is a trial of, was asked to stop."""
        return self._json("cancel.json") is not None or (self.home is not self and self.home.cancel_requested())

    def clear_cancel(self) -> None:
        self.store.delete("cancel.json")

    # -- what it left

    def metrics(self) -> dict[str, Any]:
        """metrics.json: {"epochs": [one dict per epoch], "final": {...}}; empty before the first epoch ends."""
        return self._json("metrics.json") or {}

    def figures(self) -> dict[str, Any]:
        """What state.json tells of the final evaluation; empty before it."""
        final = self.metrics().get("final", {})
        return {key: final[key] for key in FIGURES if key in final}

    def write_json(self, key: str, document: Any) -> None:
        self.store.write(key, _pretty(document))

    def read_json(self, key: str) -> Any:
        """The document, or None if there is none."""
        return self._json(key)

    def latest_step(self) -> int:
        """Step of the newest whole checkpoint, or -1."""
        return max(checkpoint_steps(self.store), default=-1)

    def milestone(self) -> int:
        """How far it has come, to be compared with later: the step of the newest checkpoint, of a sweep's trials their
        sum. What a trial has saved counts before the sweep has written it down."""
        ledger = self._json("sweep.json")
        if ledger is None:
            return self.latest_step()
        try:
            told = {trial["number"]: max((epoch["step"] for epoch in trial["epochs"]), default=0)
                    for trial in ledger["trials"]}  # fmt: skip
            unfinished = [trial["number"] for trial in ledger["trials"] if trial["ended"] is None]
        except (TypeError, KeyError) as error:
            raise self._damaged("sweep.json", error) from error
        saved = {number: self.trial(number).latest_step() for number in unfinished}
        return sum(max(step, saved.get(number, 0)) for number, step in told.items())

    def delete(self) -> None:
        """Removes everything; spec.json goes last, so an interrupted removal is still found."""
        for entry in list(self.store.list()):
            if entry.key != "spec.json":
                self.store.delete(entry.key)
        self.store.delete("spec.json")

    def _json(self, key: str) -> Any:
        try:
            return json.loads(self.store.read(key))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: Exception) -> SiteError:
        return SiteError(f"the file is damaged: {error}", where=f"{self.uri}/{key}",
                         hint="restore it, or delete the run")  # fmt: skip

    def _missing(self) -> NotFoundError:
        close = nearest(self.name, open_store(self.storage).folders())
        return NotFoundError(f"there is no run {self.name}" + (f"; {close}" if close else ""), where=self.storage,
                             hint="launch list shows all; --storage names another place")  # fmt: skip


def driver_command(run_uri: str) -> str:
    """What Ray runs on the head for a run; Ray gives it to a shell."""
    return shlex.join(["python", "-m", "trainers.driver", run_uri])


def checkpoint_steps(store: Store) -> list[int]:
    """Steps of a run's sealed checkpoints, those with a manifest, ascending."""
    keys = (entry.key for entry in store.list("checkpoints/step-"))
    return sorted(int(key.split("/")[1][5:]) for key in keys if key.endswith("/manifest.json"))


def all_runs(storage: str) -> list[Run]:
    """Every run in a storage, by name."""
    runs = (Run(storage, name) for name in open_store(storage).folders() if valid_name(name))
    return [run for run in runs if run.exists()]


def find(storage: str, name: str) -> Run:
    """The run of that name, or `NotFoundError` with the nearest one."""
    run = Run(storage, name)
    if not valid_name(name) or not run.exists():
        raise run._missing()
    return run


def _pretty(document: Any) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"
