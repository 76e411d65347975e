"""Before anything starts: data, names and paths are looked at, and a resumed run changes only what it may."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launcher import preflight
from launcher.catalog import model_facts
from launcher.errors import LaunchError, SiteError, UserError
from launcher.plan import Plan
from launcher.pools import Pool, _cpus, find_pool
from launcher.preflight import prepare, prepare_resume, whole
from launcher.runs import Run
from launcher.site import read_site
from launcher.spec import valid_name
from launcher.specfile import Draft
from launcher.storage import cache_folder
from launcher.sweeps import Ledger, Trial

POOL = Pool("local", cpus=4, memory=2**33)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Two classes of five tiny images."""
    for label in ("daisy", "tulip"):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "flowers" / label / f"{number}.png")
    return tmp_path / "flowers"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "runs"))


def draft(**values: Any) -> Draft:
    made = Draft()
    for key, value in {"model.name": "resnet18", "model.pretrained": "none", **values}.items():
        made.put(key.replace("__", "."), value, f"--{key.replace('__', '.')}")
    return made


def created(plan: Plan) -> Run:
    run = Run(plan.spec.storage or "", plan.spec.name or "")
    run.create(plan.spec, plan.to_json())
    return run


def test_a_plan_knows_the_data(flowers: Path) -> None:
    plan, index = prepare(draft(data__uri=str(flowers)), POOL)
    assert index is not None
    assert plan.facts == index.facts()
    assert (plan.facts["images"], plan.facts["classes"], plan.facts["val"]) == (10, 2, 2)
    assert plan.spec.name is not None
    assert plan.spec.name.startswith("flowers-")
    assert not (flowers.parent / "runs").exists()


def test_a_sample_is_planned_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_facts("resnet18")  # so that there is a list of models to copy
    (tmp_path / "cache" / "raylaunch").mkdir(parents=True)
    for models in cache_folder().glob("models-*.json"):
        shutil.copy(models, tmp_path / "cache" / "raylaunch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan, index = prepare(draft(data__uri="sample://digits", model__name=None), POOL)
    assert index is None
    assert plan.facts["images"] == 1_797
    assert not (tmp_path / "cache" / "raylaunch" / "samples").exists()


@pytest.mark.usefixtures("flowers")
def test_relative_paths_mean_the_folder_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    asked = draft(data__uri="./flowers/../flowers", storage="here", model__pretrained="w.pth")
    spec = prepare(asked, POOL)[0].spec
    assert spec.data.uri == str(tmp_path / "flowers")
    assert spec.storage == str(tmp_path / "here")
    assert spec.model.pretrained == str(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("place", "expected"), [("s3://b/x", "s3://b/x"), ("~/x", os.path.expanduser("~/x")), ("/a/../b", "/b")]
)
def test_addresses_stay_and_folders_become_whole(place: str, expected: str) -> None:
    assert whole(place) == expected


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"model__pretrained": "none.pth"}, "there is no such weights file"),
        ({"data__uri": "nowhere"}, "there is no such folder"),
        ({"data__classes": ["daisy", "rose"]}, "there is no class rose"),
        ({"data__val_split": "held"}, "held"),
        ({"resources__gpus_per_worker": 1}, "local has no GPU"),
    ],
)
def test_what_is_missing_is_named_with_a_way_out(flowers: Path, asked: dict[str, Any], what: str) -> None:
    with pytest.raises(LaunchError) as raised:
        prepare(draft(**{"data__uri": str(flowers), **asked}), POOL)
    assert what in str(raised.value)
    assert raised.value.where
    assert raised.value.hint


@pytest.mark.parametrize(
    ("uri", "start"),
    [
        ("s3://bucket/Flowers 2026/", "flowers-2026-"),
        ("s3://bucket", "bucket-"),
        ("/data/102flowers.csv", "run-102flowers-"),
        ("/data/Blüten", "bl-ten-"),
        ("/data/花", "run-"),
        ("/", "run-"),
        ("sample://digits", "digits-"),
        ("/data/" + "long-name-" * 20, "long-name-long-name-long-"),
        ("/data/--x--", "x-"),
    ],
)
def test_a_made_name_tells_the_data(uri: str, start: str) -> None:
    name = preflight._new_name(uri)
    assert name.startswith(start)
    assert valid_name(name)


@given(st.text())
def test_any_data_gives_a_valid_name(uri: str) -> None:
    assert valid_name(preflight._new_name(uri))


# -- resume


@pytest.fixture
def run(flowers: Path) -> Run:
    return created(prepare(draft(data__uri=str(flowers), name="first", train__epochs=10, train__batch_size=4), POOL)[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 20), ("resources.workers", 2), ("checkpoint.keep", 5), ("data.max_bad_fraction", 0.5),
        ("train.early_stop", 3),
    ],
)  # fmt: skip
def test_what_may_change_is_changed_and_told(run: Run, key: str, value: Any) -> None:
    plan, changes = prepare_resume(run, draft_of({key: value}), POOL)
    before = run.spec().flat()
    assert plan.spec.flat()[key] == value
    assert changes[key] == (before[key], value)
    assert set(changes) - {key} <= {"resources.cpus_per_worker"}
    assert plan.spec.fingerprint() == run.spec().fingerprint()


def draft_of(values: dict[str, Any]) -> Draft:
    made = Draft()
    for key, value in values.items():
        made.put(key, value, f"--set {key}")
    return made


def test_cores_are_shared_anew_among_other_workers(run: Run) -> None:
    _, changes = prepare_resume(run, draft_of({"resources.workers": 2}), POOL)
    assert changes == {"resources.workers": (1, 2), "resources.cpus_per_worker": (4, 2)}
    kept = {"resources.workers": 2, "resources.cpus_per_worker": 4}
    assert "resources.cpus_per_worker" not in prepare_resume(run, draft_of(kept), POOL)[1]


@pytest.mark.parametrize(
    ("key", "value"), [("optim.lr", 0.5), ("train.batch_size", 8), ("train.seed", 1), ("name", "b"), ("storage", "/b")]
)
def test_what_would_alter_what_was_trained_is_refused_with_the_difference(run: Run, key: str, value: Any) -> None:
    before = run.spec().flat()[key]
    with pytest.raises(UserError, match="a resumed run cannot change this") as raised:
        prepare_resume(run, draft_of({key: value, "train.epochs": 20}), POOL)
    assert f"\n  {key}: {before} -> {value}" in raised.value.what
    assert "train.epochs" not in raised.value.what
    assert "train.epochs" in raised.value.hint


def test_a_run_cannot_become_shorter(run: Run) -> None:
    with pytest.raises(UserError, match="a run cannot become shorter: 10 -> 9 epochs"):
        prepare_resume(run, draft_of({"train.epochs": 9}), POOL)


def test_without_changes_the_plan_is_the_old_one(run: Run) -> None:
    plan, changes = prepare_resume(run, Draft(), POOL)
    assert changes == {}
    assert plan.spec == run.spec()
    assert plan.to_json()["choices"] == run.plan()["choices"]


def test_a_sample_goes_on_with_what_the_user_once_asked_for() -> None:
    asked = draft(data__uri="sample://digits", model__name="resnet50", train__epochs=20, augment__flip=True, name="d")
    run = created(prepare(asked, POOL)[0])
    assert prepare_resume(run, draft_of({"checkpoint.keep": 3}), POOL)[1] == {"checkpoint.keep": (2, 3)}


def test_a_run_directory_that_was_moved_goes_on_where_it_lies(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = Run(str(tmp_path / "moved"), run.name)
    plan, changes = prepare_resume(moved, Draft(), POOL)
    assert changes == {}
    assert plan.spec.storage == str(tmp_path / "moved")


# -- sweeps


def test_hours_and_cost_of_a_sweep_come_from_an_earlier_run_of_the_same_kind(run: Run, flowers: Path) -> None:
    asked: dict[str, Any] = {"data__uri": str(flowers), "name": "s1", "sweep__trials": 4, "train__epochs": 10}
    ahead = prepare(draft(**asked), POOL)[0].schedule
    assert ahead is not None
    assert (ahead.hours_worst, ahead.speed_of) == (None, ""), "it has not been through an epoch"
    epochs = [{"seconds": seconds, "eval_seconds": 1.0} for seconds in (30.0, 7.0, 7.0)]
    run.write_json("metrics.json", {"epochs": epochs})
    ahead = prepare(draft(**asked), POOL)[0].schedule
    assert ahead is not None
    assert ahead.speed_of == "first"
    # 8 s an epoch on 4 cores are 32 s on one; 4 trials at once of 10 epochs each.
    assert ahead.hours_worst == pytest.approx(4 * 10 * 32 / 4 / 3600)
    other = prepare(draft(**{**asked, "data__image_size": 64}), POOL)[0].schedule
    assert other is not None
    assert other.hours_worst is None


def test_an_earlier_sweep_tells_the_speed_too_and_a_damaged_one_nothing(flowers: Path) -> None:
    asked: dict[str, Any] = {"data__uri": str(flowers), "sweep__trials": 4, "train__epochs": 10}
    past = created(prepare(draft(name="past", **asked), POOL)[0])
    trial = Trial(
        1, {}, epochs=[{"epoch": 1, "top1": 0.5, "seconds": 40.0}, {"epoch": 2, "top1": 0.6, "seconds": 64.0}]
    )
    Ledger({"top1": "max"}, [trial]).save(past)
    ahead = prepare(draft(name="s1", **asked), POOL)[0].schedule
    assert ahead is not None
    assert ahead.hours_worst == pytest.approx(4 * 10 * 32 / 4 / 3600)
    past.store.write("sweep.json", b"{")
    assert prepare(draft(name="s1", **asked), POOL)[0].schedule != ahead


def test_a_past_sweep_is_found_by_its_name_and_by_its_place(flowers: Path, tmp_path: Path) -> None:
    past = created(prepare(draft(data__uri=str(flowers), name="past", sweep__trials=4), POOL)[0])
    Ledger({"top1": "max"}, [Trial(1, {}, epochs=[{"epoch": 1, "top1": 0.5}])]).save(past)
    for word in ("past", "runs/past", str(tmp_path / "runs" / "past")):
        made = prepare(draft(data__uri=str(flowers), sweep__warm_from=word), POOL)[0].spec.sweep
        assert made is not None
        assert made.warm_from == past.uri


@pytest.fixture
def search(flowers: Path) -> Run:
    """A sweep of 4 trials, of which 3 have begun."""
    made = created(prepare(draft(data__uri=str(flowers), name="s1", sweep__trials=4, train__epochs=10), POOL)[0])
    Ledger({"top1": "max"}, [Trial(number, {}) for number in (1, 2, 3)]).save(made)
    return made


def test_a_resumed_sweep_without_changes_is_the_old_one(search: Run) -> None:
    plan, changes = prepare_resume(search, Draft(), POOL)
    assert changes == {}
    assert plan.spec == search.spec()
    assert plan.to_json()["choices"] == search.plan()["choices"]
    assert plan.to_json()["searched"] == search.plan()["searched"]


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        ({"sweep.trials": 64}, {"sweep.trials": (4, 64)}),
        ({"sweep.trials": 3}, {"sweep.trials": (4, 3), "sweep.concurrent": (4, 3)}),
        ({"sweep.concurrent": 2}, {"sweep.concurrent": (4, 2), "resources.cpus_per_worker": (1, 2)}),
        ({"sweep.time_limit": 2.0}, {"sweep.time_limit": (None, 2.0)}),
        ({"sweep.refit": True}, {"sweep.refit": (False, True)}),
        ({"resources.workers": 2}, {"resources.workers": (1, 2), "sweep.concurrent": (4, 2)}),
    ],
)  # fmt: skip
def test_a_sweep_may_grow_and_shares_the_machine_anew(
    search: Run, asked: dict[str, Any], changes: dict[str, Any]
) -> None:
    plan, found = prepare_resume(search, draft_of(asked), POOL)
    assert found == changes
    assert plan.spec.fingerprint() == search.spec().fingerprint()


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"sweep.trials": 2}, "the sweep has 3 trials already, and cannot have 2"),
        ({"train.epochs": 20}, "the trials of a sweep are all of one length: 10 -> 20 epochs"),
        ({"sweep.search": "random"}, "sweep.search: optuna -> random"),
        ({"sweep.space": {"optim.lr": [0.1]}}, "sweep.space: "),
        ({"sweep.concurrent": 9}, "9 trials at once, but local can hold 4"),
    ],
)
def test_what_would_make_trials_unlike_is_refused(search: Run, asked: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as raised:
        prepare_resume(search, draft_of(asked), POOL)
    assert what in raised.value.what
    assert raised.value.hint


def test_a_grid_keeps_the_trials_it_began_with(flowers: Path) -> None:
    space = {"optim.lr": [0.1, 0.2, 0.3]}
    asked = draft(data__uri=str(flowers), name="s1", sweep__search="grid", sweep__space=space, sweep__trials=2)
    made = created(prepare(asked, POOL)[0])
    Ledger({"top1": "max"}).save(made)
    assert prepare_resume(made, Draft(), POOL)[1] == {}
    extended = prepare_resume(made, draft_of({"sweep.trials": 9}), POOL)[0].spec.sweep
    assert extended is not None
    assert extended.trials == 3


def test_a_training_does_not_become_a_sweep(run: Run) -> None:
    with pytest.raises(UserError, match="first is a single training, not a sweep"):
        prepare_resume(run, draft_of({"sweep.trials": 4}), POOL)


def test_what_is_wrong_whatever_the_data_hold_is_said_before_they_are_looked_at() -> None:
    with pytest.raises(UserError, match="9 trials at once, but local can hold 4"):
        prepare(draft(data__uri="s3://no-such-bucket/x", sweep__concurrent=9), POOL)


# -- the machine


def test_this_machine_is_the_local_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pool = find_pool("local")
    assert (pool.name, pool.gpus, pool.gpu_type, pool.bf16) == ("local", 0, "", False)
    assert 1 <= pool.cpus <= (os.cpu_count() or 1)
    assert pool.memory > 2**28


def test_a_pool_without_a_kubeconfig_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    with pytest.raises(SiteError, match="no usable kubeconfig"):
        find_pool("gpu-pool")


def test_what_lies_here_cannot_be_seen_from_a_cluster(flowers: Path) -> None:
    site = read_site(
        "{image: i, ray_version: 2.60.0, storage: 's3://b/runs', node_types: [{name: cpu, cpus: 2, memory: 4Gi, "
        "max_nodes: 1, on_demand: {}}]}", "test",
    )  # fmt: skip
    for values in ({"data__uri": str(flowers)}, {"data__uri": "sample://digits", "storage": "/tmp/runs"}):
        with pytest.raises(UserError, match="which is on this machine"):
            prepare(draft(**values), Pool.of("cpu-pool", site))


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("100000 100000", 1), ("10000 100000", 1), ("max 100000", None), ("", None), ("99999999 100000", None)],
)
def test_a_container_has_the_cores_that_it_may_use(tmp_path: Path, quota: str, cpus: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert _cpus(tmp_path / "cpu.max") == (cpus or len(os.sched_getaffinity(0)))
    assert _cpus(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_gpus_are_those_that_the_environment_leaves_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        "echo '0, GPU-aaa, NVIDIA H100, 9.0'\necho '1, GPU-bbb, Tesla T4, 7.5'\necho '2, GPU-ccc, Tesla K80, [N/A]'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for visible, gpus, kind, bf16 in (
        (None, 3, "NVIDIA H100", False), ("0", 1, "NVIDIA H100", True), ("GPU-bbb", 1, "Tesla T4", False),
        ("", 0, "", False), ("-1", 0, "", False), ("1, 2", 2, "Tesla T4", False),
    ):  # fmt: skip
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        pool = find_pool("local")
        assert (pool.gpus, pool.gpu_type, pool.bf16) == (gpus, kind, bf16)
