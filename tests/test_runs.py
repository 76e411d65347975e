"""The run directory keeps what it promises, on disk and on S3: one owner of a name, one driver, no lost state."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from launcher.errors import Exit, LaunchError, NotFoundError, SiteError, UserError
from launcher.runs import LEASE_SECONDS, Owner, Run, State, Status, all_runs, boot_id, find
from launcher.spec import Data, Spec

SPEC = Spec(name="first", data=Data(uri="s3://bucket/flowers"))


@pytest.fixture
def run(place: str) -> Run:
    made = Run(place, "first")
    made.create(SPEC, {"workers": 1})
    return made


def _outcome(act: object) -> str:
    try:
        act()  # type: ignore[operator]
    except LaunchError as error:
        return type(error).__name__
    return "won"


def test_of_many_that_take_a_name_one_gets_it(place: str) -> None:
    with ThreadPoolExecutor(16) as threads:
        specs = [SPEC.updated({"train.seed": number}) for number in range(16)]
        tries = [threads.submit(_outcome, lambda spec=spec: Run(place, "first").create(spec, {})) for spec in specs]
        outcomes = [future.result() for future in tries]
    assert sorted(outcomes) == ["UserError"] * 15 + ["won"]
    assert Run(place, "first").spec() == specs[outcomes.index("won")]


def test_the_loser_of_a_name_is_told_what_to_type(run: Run) -> None:
    with pytest.raises(UserError, match="there is a run named first already") as raised:
        Run(run.storage, "first").create(SPEC, {})
    assert raised.value.exit_code is Exit.USAGE
    assert "launch resume first" in raised.value.hint
    assert raised.value.where == run.uri


def test_a_new_run_is_pending_and_keeps_spec_and_plan(run: Run) -> None:
    again = Run.at(run.uri)
    assert again.spec() == SPEC
    assert again.plan() == {"workers": 1}
    assert again.state().status is Status.PENDING
    assert time.time() - again.state().created < 60
    assert again.latest_step() == -1
    assert again.metrics() == {}


@pytest.mark.parametrize("status", Status)
def test_a_state_survives_the_trip(place: str, status: Status) -> None:
    run = Run(place, "first")
    run.create(SPEC, {})
    error = {"kind": "DataError", "family": "data", "what": "ünï\n[/]", "where": "", "hint": "x"}
    state = State(status, "why", 3, 1.5, 2.5, None, error, {"top1": 0.5})
    run.set_state(state)
    assert run.state() == state
    assert type(run.state().status) is Status
    assert run.update(reason="") == replace(state, reason="")


def test_each_end_has_its_exit_code() -> None:
    codes = {status.name: int(status.exit_code) for status in Status if status.final}
    assert codes == {"SUCCEEDED": 0, "FAILED": 100, "CANCELLED": 103, "INTERRUPTED": 100}
    assert {status.exit_code for status in Status if not status.final} == {Exit.NOT_FINISHED}


def test_a_run_between_its_creation_and_its_state_is_pending(place: str) -> None:
    run = Run(place, "first")
    run.write_json("spec.json", SPEC.model_dump(mode="json"))
    assert run.state().status is Status.PENDING


# -- who drives it


def test_the_lease_of_this_process_counts_until_it_is_released(run: Run) -> None:
    assert run.owner() is None
    run.hold(Owner.me())
    assert run.owner() == Owner.me()
    run.release()
    run.release()
    assert run.owner() is None


def test_the_lease_of_a_dead_process_does_not_count(run: Run) -> None:
    child = subprocess.Popen(["sleep", "60"])
    import psutil

    owner = replace(Owner.me(), pid=child.pid, started=psutil.Process(child.pid).create_time())
    run.hold(owner)
    assert run.owner() == owner
    child.kill()
    # Not waited for: a zombie drives nothing.
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert run.owner() is None
    child.wait()
    assert run.owner() is None


@pytest.mark.parametrize(
    "other", [{"boot": "another boot"}, {"started": 1.0}, {"pid": 2**22 + 1}], ids=["boot", "start", "pid"]
)
def test_a_process_that_only_looks_alike_does_not_count(run: Run, other: dict[str, object]) -> None:
    run.hold(replace(Owner.me(), **other))  # type: ignore[arg-type]
    assert run.owner() is None


@pytest.mark.parametrize(("age", "counts"), [(0.0, True), (LEASE_SECONDS / 2, True), (LEASE_SECONDS + 1, False)])
def test_the_lease_of_another_machine_counts_while_it_is_confirmed(run: Run, age: float, counts: bool) -> None:
    owner = replace(Owner.me(), host="elsewhere", boot="its boot", pid=1)
    run.write_json("lease.json", {"owner": asdict(owner), "confirmed": time.time() - age})
    assert (run.owner() == owner) == counts


def test_this_machine_is_known_by_its_name_and_boot() -> None:
    me = Owner.me()
    assert me.here()
    assert me.alive()
    assert (me.host, me.boot, me.pid) == (socket.gethostname(), boot_id(), os.getpid())


def test_of_many_drivers_one_begins_the_attempt(run: Run) -> None:
    assert run.begin_attempt({"host": "a"}) == 1
    with ThreadPoolExecutor(8) as threads:
        tries = [threads.submit(_outcome, lambda: Run.at(run.uri).begin_attempt({})) for _ in range(8)]
        won = [future.result() for future in tries].count("won")
    # One that looks only after another has won may take the number after it; none is taken twice.
    assert len(list(run.store.list("attempts/"))) == won + 1 >= 2
    assert run.begin_attempt({}) == won + 2


def test_a_request_to_stop_stands_until_it_is_cleared(run: Run) -> None:
    assert not run.cancel_requested()
    run.request_cancel()
    run.request_cancel(force=True)
    assert run.cancel_requested()
    assert run.read_json("cancel.json")["force"] is True
    run.clear_cancel()
    run.clear_cancel()
    assert not run.cancel_requested()


# -- finding and deleting


def test_only_runs_are_found(place: str) -> None:
    for name in ("second", "first"):
        Run(place, name).create(SPEC, {})
    stray = Run(place, "stray")
    stray.write_json("notes.json", {})
    Run(place, "Not_A_Name").write_json("spec.json", {})
    assert [run.name for run in all_runs(place)] == ["first", "second"]
    assert find(place, "first").spec() == SPEC


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("frist", "there is no run frist; did you mean first?"),
        ("zzz", "there is no run zzz"),
        ("../first", "there is no run ../first; did you mean first?"),
        ("", "there is no run "),
    ],
)
def test_a_name_that_is_not_found_gets_the_nearest(run: Run, name: str, what: str) -> None:
    with pytest.raises(NotFoundError) as raised:
        find(run.storage, name)
    assert raised.value.what == what
    assert raised.value.exit_code is Exit.NOT_FOUND


def test_a_storage_of_which_nothing_exists_has_no_runs(place: str) -> None:
    assert all_runs(place) == []
    with pytest.raises(NotFoundError):
        find(place, "first")
    with pytest.raises(NotFoundError):
        Run(place, "first").state()


def test_a_deleted_run_leaves_nothing_and_its_name_is_free(run: Run) -> None:
    run.store.write("checkpoints/step-00000001/manifest.json", b"{}")
    log = run.store.append("logs/rank-0.log")
    log.write(b"line\n")
    log.close()
    run.delete()
    assert list(run.store.list()) == []
    assert all_runs(run.storage) == []
    run.create(SPEC, {})


def test_the_newest_whole_checkpoint_counts(run: Run) -> None:
    for step, file in (
        (0, "manifest.json"),
        (40, "manifest.json"),
        (120, "manifest.json"),
        (200, "weights.safetensors"),
    ):
        run.store.write(f"checkpoints/step-{step:08d}/{file}", b"{}")
    assert run.latest_step() == 120


def test_a_sweep_has_come_as_far_as_its_trials_have_saved_or_told(run: Run) -> None:
    def trial(number: int, ended: float | None, *steps: int) -> dict[str, object]:
        return {"number": number, "ended": ended, "epochs": [{"step": step} for step in steps]}

    trials = [trial(1, 9.0, 10, 20), trial(2, None, 10), trial(3, None)]
    run.write_json("sweep.json", {"trials": trials})
    assert run.milestone() == 30
    run.trial(2).store.write("checkpoints/step-00000015/manifest.json", b"{}")
    assert run.milestone() == 35, "half an epoch that was saved is a reason to try again"
    run.trial(3).store.write("checkpoints/step-00000000/manifest.json", b"{}")
    run.trial(1).store.write("checkpoints/step-00000020/manifest.json", b"{}")
    assert run.milestone() == 35


def test_a_damaged_file_is_named(run: Run) -> None:
    run.store.write("state.json", b'{"status": "RUN')
    with pytest.raises(SiteError, match="damaged") as raised:
        run.state()
    assert raised.value.where == f"{run.uri}/state.json"
