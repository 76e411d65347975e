"""The command line as it is typed: real processes where the process matters, click's runner elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from launcher import manage
from launcher.cli import main
from launcher.journal import Journal
from launcher.pools import find_pool
from launcher.preflight import prepare, prepare_resume
from launcher.runs import Owner, Run, State, Status
from launcher.s3 import s3_client
from launcher.spec import Spec
from launcher.specfile import Draft
from launcher.sweeps import Ledger, Outcome, Trial
from tests.report_run import build

ROOT = Path(__file__).parent.parent
COMMANDS = ("run", "sweep", "resume", "schema", "list", "status", "trials", "attach", "logs", "cancel", "report",
            "predict", "rm", "data", "bench-data", "pools", "doctor", "dashboard", "gc")  # fmt: skip
GOLDEN = Path(__file__).parent / "golden"
RESULT = {"split": "val", "epoch": 19, "count": 800, "top1": 0.9325, "top5": 0.991, "macro_f1": 0.9301, "loss": 0.7}


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default storage of the test, where `launch` stands too."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "runs"


def launch(*words: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, list(words), prog_name="launch")


def process(*words: str, prelude: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some Python."""
    code = f"{prelude}\nimport sys\nfrom launcher.cli import main\nmain(prog_name='launch')"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, **options,
    )  # fmt: skip


def told(result: Result | subprocess.CompletedProcess[str], code: int) -> list[str]:
    """The lines on stderr of a command that failed as it should: one error, and what to type next."""
    exit_code = result.exit_code if isinstance(result, Result) else result.returncode
    assert exit_code == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("next:  ")
    return lines


def images(folder: Path, **labels: int) -> Path:
    """Class folders with so many tiny images each."""
    for label, number in labels.items():
        (folder / label).mkdir(parents=True)
        for count in range(number):
            Image.new("RGB", (4, 4), (count, 0, 0)).save(folder / label / f"{count}.png")
    return folder


def finished(storage: Path) -> Run:
    """A run named first that was planned as `launch` plans, and has succeeded after 20 epochs."""
    draft = Draft()
    for key, value in {"name": "first", "data.uri": "sample://digits", "train.epochs": 20}.items():
        draft.put(key, value, "--test")
    plan, _ = prepare(draft, find_pool("local"))
    run = build(storage, name="first")
    run.set_spec(plan.spec, plan.to_json())
    run.update(result=RESULT)
    return run


# -- help


@pytest.mark.parametrize("words", [(), *((command,) for command in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(words: tuple[str, ...], flag: str) -> None:
    result = launch(*words, flag)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {' '.join(['launch', *words])} ")
    assert result.stderr == ""


def test_help_lists_the_commands_in_the_order_of_their_use() -> None:
    shown = launch("--help").stdout.partition("Commands:\n")[2]
    assert tuple(line.split()[0] for line in shown.splitlines() if line[2:3].strip()) == COMMANDS


def test_nothing_typed_shows_the_help_and_is_a_usage_error() -> None:
    result = launch()
    assert result.exit_code == 2
    assert "launch --data FOLDER" in result.stderr


def test_the_module_is_the_command() -> None:
    for flag in ("--help", "--version"):
        here = subprocess.run(
            [sys.executable, "-m", "launcher", flag], capture_output=True, text=True, cwd=ROOT, check=True
        )
        script = subprocess.run(
            [Path(sys.executable).parent / "launch", flag], capture_output=True, text=True, check=True
        )
        assert here.stdout.replace("python -m launcher", "launch") == script.stdout


def test_the_flags_are_these_and_no_others() -> None:
    flags = {command: sorted(option for parameter in main.commands[command].params for option in parameter.opts
                             if option.startswith("--")) for command in COMMANDS}  # fmt: skip
    spec = ["--batch-size", "--data", "--epochs", "--image-size", "--lr", "--model", "--name", "--precision",
            "--pretrained", "--seed", "--set", "--workers"]  # fmt: skip
    site = ["--gpu", "--max-cost", "--max-hours", "--priority", "--spot"]
    where = ["--cluster", "--context", "--namespace", "--pool-file", "--storage"]
    search = ["--concurrent", "--refit", "--scheduler", "--search", "--time-limit", "--trials", "--warm-from"]
    assert flags == {
        "run": sorted([*spec, *site, *where, "--detach", "--dry-run", "--output", "--yes"]),
        "sweep": sorted([*spec, *site, *where, *search, "--detach", "--dry-run", "--output", "--yes"]),
        "resume": sorted([*where, "--concurrent", "--detach", "--epochs", "--max-cost", "--max-hours", "--output",
                          "--set", "--time-limit", "--trials", "--workers", "--yes"]),
        "schema": [],
        "list": sorted([*where, "--output"]),
        "status": sorted([*where, "--output"]),
        "trials": sorted([*where, "--output"]),
        "attach": sorted([*where, "--output"]),
        "logs": sorted([*where, "--follow", "--rank", "--since", "--tail", "--trial"]),
        "cancel": sorted([*where, "--force"]),
        "report": sorted([*where, "--open", "--trial"]),
        "predict": ["--output", "--storage", "--top"],
        "rm": sorted([*where, "--yes"]),
        "pools": sorted([*where, "--output"]),
        "doctor": sorted([*where, "--output"]),
        "dashboard": sorted([*where, "--port"]),
        "gc": sorted([*where, "--dry-run", "--output", "--yes"]),
        "data": [],
        "bench-data": ["--batch-size", "--image-size", "--images", "--model", "--need", "--output", "--seconds",
                       "--threads"],
    }  # fmt: skip


@pytest.mark.parametrize("words", [
    ("--help",), ("run", "--data", "sample://digits", "--dry-run"), ("list",), ("sweep", "--help"),
    ("sweep", "--data", "sample://digits", "--dry-run"),
])  # fmt: skip
def test_nothing_heavy_is_imported_to_say_what_would_be_done(words: tuple[str, ...]) -> None:
    heavy = ("torch", "ray", "timm", "kubernetes", "boto3", "torchvision", "sklearn", "pandas", "matplotlib", "moto")
    prelude = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', *(name for name in {heavy} if name in sys.modules), file=sys.stderr))"
    )
    result = process(*words, prelude=prelude)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].strip() == "LOADED"


# -- what is planned


def test_a_bare_launch_is_launch_run() -> None:
    words = ("--data", "sample://digits", "--name", "x", "--epochs", "3", "--dry-run")
    bare, full = launch(*words), launch("run", *words)
    assert bare.exit_code == 0
    assert (bare.stdout, bare.stderr) == (full.stdout, full.stderr)


def test_a_dry_run_prints_a_spec_that_gives_the_same_dry_run(tmp_path: Path, storage: Path) -> None:
    data = images(tmp_path / "1e3", daisy=4, tulip=4)
    words = ("--data", str(data), "--model", "resnet18", "--lr", "1e-5", "--set", "model.freeze=[layer1, '1e3']")
    first = launch(*words, "--dry-run")
    assert first.exit_code == 0, first.stderr
    assert Spec.model_validate_json(json.dumps(yaml.safe_load(first.stdout))).optim.lr == 1e-5
    assert "\nfield " in first.stderr
    assert "tuned" not in first.stdout
    (tmp_path / "spec.yaml").write_text(first.stdout)
    again = launch("spec.yaml", "--dry-run")
    assert again.stdout == first.stdout
    assert list(storage.iterdir()) == []


def test_a_dry_run_as_json_holds_the_spec_and_the_reasons() -> None:
    document = json.loads(launch("--data", "sample://digits", "--dry-run", "-o", "json").stdout)
    assert document["spec"]["train"]["epochs"] == 12
    assert document["facts"]["images"] == 1_797
    assert all(choice["why"] for choice in document["choices"])


# -- sweeps


def sweep(storage: Path, name: str = "s1", trials: int = 2, **outcomes: Outcome) -> Run:
    """A sweep that was planned as `launch sweep` plans, has trained its trials, and succeeded."""
    draft = Draft(sweep=True)
    for key, value in {"name": name, "data.uri": "sample://digits", "sweep.trials": trials}.items():
        draft.put(key, value, "--test")
    plan, _ = prepare(draft, find_pool("local"))
    run = Run(str(storage), name)
    run.create(plan.spec, plan.to_json())
    made = [Trial(number, {"optim.lr": 0.1}, outcome=Outcome.FINISHED, epochs=[{"epoch": 1, "top1": 0.9, "loss": 0.1}])
            for number in range(1, trials + 1)]  # fmt: skip
    for key, outcome in outcomes.items():
        made[int(key.removeprefix("trial")) - 1].outcome = outcome
    Ledger(dict(plan.spec.sweep.objectives if plan.spec.sweep else {}), made).save(run)
    run.update(status=Status.SUCCEEDED, result=RESULT)
    return run


def test_the_plan_of_a_sweep_is_shown_before_it_is_paid_for() -> None:
    result = launch("sweep", "--data", "sample://digits", "--name", "s1", "--trials", "12", "--dry-run",
                    "--time-limit", "90m", "--concurrent", "1", "--set", "resources.cpus_per_worker=1")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    text = "\n".join(line.rstrip() for line in result.stderr[result.stderr.index("searched  ") :].splitlines()) + "\n"
    golden = GOLDEN / "sweep_plan.txt"
    if os.environ.get("RAYLAUNCH_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_dry_run_of_a_sweep_prints_a_spec_that_gives_the_same_dry_run(tmp_path: Path, storage: Path) -> None:
    words = ("--data", "sample://digits", "--trials", "8", "--search", "random", "--time-limit", "1.5h", "--refit",
             "--set", "sweep.space={optim.lr: {loguniform: [1e-3, 1]}, model.freeze: [[], ['conv1']]}")  # fmt: skip
    first = launch("sweep", *words, "--dry-run")
    assert first.exit_code == 0, first.stderr
    (tmp_path / "sweep.yaml").write_text(first.stdout)
    for command in (("sweep", "sweep.yaml"), ("run", "sweep.yaml"), ("sweep.yaml",)):
        assert launch(*command, "--dry-run").stdout == first.stdout
    asked = yaml.safe_load(first.stdout)["sweep"]
    assert (asked["trials"], asked["search"], asked["time_limit"], asked["refit"]) == (8, "random", 1.5, True)
    assert list(asked["space"]) == ["optim.lr", "model.freeze"]
    assert list(storage.iterdir()) == []


def test_a_dry_run_of_a_sweep_as_json_holds_the_space_the_reasons_and_the_schedule() -> None:
    document = json.loads(launch("sweep", "--data", "sample://digits", "--dry-run", "-o", "json").stdout)
    assert document["searched"].keys() == document["spec"]["sweep"]["space"].keys()
    assert document["schedule"]["epochs_worst"] == 16 * 12
    assert document["schedule"]["epochs_expected"] < 16 * 12


@pytest.mark.parametrize(("text", "hours"), [("2h", 2), ("90m", 1.5), ("1.5h", 1.5), ("1d", 24), ("30m", 0.5)])
def test_a_time_is_typed_with_its_unit(text: str, hours: float) -> None:
    result = launch("sweep", "--data", "sample://digits", "--time-limit", text, "--dry-run")
    assert yaml.safe_load(result.stdout)["sweep"]["time_limit"] == hours


def test_an_empty_sweep_section_makes_a_spec_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("data: {uri: sample://digits}\nsweep:\n")
    assert yaml.safe_load(launch("s.yaml", "--dry-run").stdout)["sweep"]["trials"] == 16
    (tmp_path / "s.yaml").write_text("data: {uri: sample://digits}\n")
    assert "sweep" not in yaml.safe_load(launch("s.yaml", "--dry-run").stdout)


SWEEP_MISTAKES: list[tuple[str, int, str, str]] = [
    ("--data pair --trials 4", 2, "--trials: only a sweep has this", "launch sweep … --trials …"),
    ("run --data pair --no-refit", 2, "--no-refit: only a sweep has this", "launch sweep"),
    ("--data pair --set sweep.trials=4", 2, "--set sweep.trials: only a sweep has this", "launch sweep"),
    ("sweep --data pair --search tpe", 2, "--search: sweep.search: should be 'optuna', 'random' or 'grid'", "schema"),
    ("sweep --data pair --trials 0", 2, "--trials: sweep.trials: should be greater than or equal to 1", "schema"),
    ("sweep --data pair --time-limit 90", 2, "--time-limit: 90 is not a time", "write 90m, 2h or 1.5h"),
    ("sweep --data pair --time-limit 0h", 2, "--time-limit: 0h is not a time", "write 90m, 2h or 1.5h"),
    ("sweep --data pair --concurrent 999 --trials 1000", 2, "999 trials at once, but local can hold", "--concurrent"),
    ("sweep --data pair --warm-from nobody", 102, "there is no run nobody", "launch list"),
    ("sweep --data pair --warm-from ./nobody", 2, "there is no such sweep", "the name of one"),
    ("sweep --data pair --warm-from first", 2, "first is a single training, not a sweep", "launch list"),
    ("sweep --data pair --warm-from empty", 2, "no trial of empty has a result yet", "leave it out"),
    ("sweep --data pair --set sweep.space={augment.policy:[x]}", 2, "'x' is not one of none, randaugment", "schema"),
    ("sweep --data nowhere --set sweep.space={model.name:[resnet5]}", 2, "did you mean resnet50?", "schema"),
    ("sweep --data nowhere --concurrent 999 --trials 1000", 2, "999 trials at once", "--concurrent"),
    ("resume s1", 2, "s1 has finished", "launch resume s1 --trials N makes it longer"),
    ("resume s1 --trials 1", 2, "the sweep has 2 trials already, and cannot have 1", "--trials 2 or more"),
    ("resume s1 --epochs 20", 2, "the trials of a sweep are all of one length: 12 -> 20", "--warm-from s1"),
    ("resume s1 --set sweep.search=random", 2, "sweep.search: optuna -> random", "sweep.trials"),
    ("resume first --trials 4", 2, "first is a single training, not a sweep", "launch sweep"),
]


@pytest.mark.parametrize(("words", "code", "what", "hint"), SWEEP_MISTAKES, ids=[row[0] for row in SWEEP_MISTAKES])
def test_a_mistake_about_sweeps_is_told_once_before_anything_starts(
    words: str, code: int, what: str, hint: str, tmp_path: Path, storage: Path
) -> None:
    images(tmp_path / "pair", daisy=3, tulip=3)
    finished(storage)
    sweep(storage)
    Ledger({"top1": "max"}).save(sweep(storage, "empty"))
    before = sorted(folder.name for folder in storage.iterdir())
    lines = told(launch(*words.split()), code)
    assert what in "\n".join(lines[:-1])
    assert hint in lines[-1]
    assert sorted(folder.name for folder in storage.iterdir()) == before


@pytest.mark.parametrize(
    ("outcomes", "asked", "over"),
    [
        ({}, {}, True),
        ({}, {"sweep.trials": 4}, False),
        ({}, {"sweep.refit": True}, False),
        ({"trial2": Outcome.STOPPED, "trial1": Outcome.FAILED}, {}, True),
        ({"trial2": Outcome.INTERRUPTED}, {}, False),
        ({"trial1": Outcome.PAUSED}, {}, False),
    ],
)
def test_a_sweep_has_finished_when_all_its_trials_have(
    storage: Path, outcomes: dict[str, Any], asked: dict[str, Any], over: bool
) -> None:
    from launcher.cli import _finished

    run = sweep(storage, **outcomes)
    draft = Draft()
    for key, value in asked.items():
        draft.put(key, value, "--test")
    plan, _ = prepare_resume(run, draft, find_pool("local"))
    assert bool(_finished(plan, run)) == over


def test_the_schema_is_json() -> None:
    assert json.loads(launch("schema").stdout)["properties"]["train"]


def test_file_flags_and_set_win_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {uri: sample://digits}\ntrain: {epochs: 1, seed: 1, batch_size: 10}\n")
    words = ("spec.yaml", "--epochs", "2", "--seed", "2", "--set", "train.seed=3", "--dry-run")
    train = yaml.safe_load(launch(*words).stdout)["train"]
    assert (train["batch_size"], train["epochs"], train["seed"]) == (10, 2, 3)


# -- what goes wrong before anything starts

MISTAKES: list[tuple[str, str, int, str, str]] = [
    (
        "a typo of a command",
        "statsu first",
        2,
        "there is no command or spec file statsu",
        "did you mean launch status?",
    ),
    ("a word without sense", "xyzzy", 2, "no command or spec file xyzzy", "launch --help lists the commands"),
    ("data for a spec", "s3://bucket/x", 2, "this is data, not a spec file", "launch --data s3://bucket/x"),
    ("a folder for a spec", "pair", 2, "this is data, not a spec file", "launch --data pair"),
    ("a manifest for a spec", "m.csv", 2, "this is data, not a spec file", "launch --data m.csv"),
    ("no such spec", "none.yaml", 2, "none.yaml: there is no such file", "launch --data URI"),
    ("no data", "--epochs 3", 2, "data.uri: is missing", "launch schema"),
    ("a pool, but no kubeconfig", "--data pair --cluster gpu-pool", 100, "no usable kubeconfig", "set KUBECONFIG"),
    ("what only a cluster has", "--data pair --spot --max-hours 2", 2, "resources.spot, limits.max_hours", "--cluster"),
    ("an unknown field", "--data pair --set trian.epochs=3", 2, "did you mean train.epochs?", "launch schema"),
    ("a bad value", "--data pair --epochs 0", 2, "--epochs: train.epochs: should be greater", "launch schema"),
    ("no such folder", "--data nowhere", 100, "there is no such folder", "holds empty, hollow"),
    ("an unknown scheme", "--data gs://b/x", 2, "storage of kind gs:// is not supported", "s3://"),
    ("an unknown sample", "--data sample://digit", 2, "there is no sample digit", "did you mean digits?"),
    ("one class", "--data single", 100, "there is only one class: daisy", "two or more"),
    ("an empty class", "--data hollow", 100, "1 class folders hold no image: rose", "fill or delete"),
    ("no image", "--data empty", 100, "empty: there is nothing here", ""),
    ("a class of one", "--data lone", 100, "have a single image", "add images"),
    ("an unknown class", "--data pair --set data.classes=[daisy,roses]", 2, "there is no class roses", ""),
    ("an unknown model", "--data pair --model resnet5", 2, "timm has no model resnet5; did you mean resnet", "timm"),
    ("an unknown tag", "--data pair --model resnet18.a1_in2k", 2, "did you mean resnet18.a1_in1k?", "timm"),
    ("no weights", "--data pair --pretrained w.pth", 2, "there is no such weights file", "--pretrained hub"),
    ("no GPU", "--data pair --set resources.gpus_per_worker=1", 2, "local has no GPU", "gpus_per_worker=0"),
    ("a bad name", "--data pair --name First", 2, "--name: should be a letter", "launch schema"),
    ("a bad storage", "--data pair --storage gs://x", 2, "gs:// is not supported", "s3://"),
    ("no such run", "status frist", 102, "there is no run frist; did you mean first?", "launch list"),
    ("no such run", "logs zzz", 102, "there is no run zzz", "--storage"),
    ("no such run", "resume zzz", 102, "there is no run zzz", ""),
    ("no such run", "predict zzz x.jpg", 102, "there is no run zzz", ""),
    ("no such run", "rm zzz --yes", 102, "there is no run zzz", ""),
    ("no such rank", "logs first --rank 7", 2, "there is no log of rank 7", "driver, rank-0"),
    ("no terminal to ask on", "rm first", 2, "there is no terminal", "launch rm first --yes"),
    ("the same name", "--data pair --name first", 2, "there is a run named first already", "launch resume first"),
    ("finished already", "resume first", 2, "first has finished", "--epochs N"),
    ("a refused change", "resume first --set optim.lr=3", 2, "optim.lr: 0.0125 -> 3.0", "launch a new run"),
    ("fewer epochs", "resume first --epochs 3", 2, "cannot become shorter: 20 -> 3", "launch a new run"),
    ("no such model folder", "predict ./nothing x.jpg", 101, "there is no model here", "path of a model folder"),
    ("no model yet", "predict first x.jpg", 101, "there is no model here", "launch status first"),
]


@pytest.mark.parametrize(
    ("words", "code", "what", "hint"), [row[1:] for row in MISTAKES], ids=[row[1] for row in MISTAKES]
)
def test_a_mistake_is_told_once_with_what_to_do(
    words: str, code: int, what: str, hint: str, tmp_path: Path, storage: Path
) -> None:
    images(tmp_path / "pair", daisy=3, tulip=3)
    images(tmp_path / "single", daisy=3)
    images(tmp_path / "lone", daisy=3, tulip=1)
    images(tmp_path / "hollow", daisy=3, tulip=3, rose=0)
    (tmp_path / "empty").mkdir()
    run = finished(storage)
    for source in ("driver", "rank-0"):
        run.store.write(f"logs/{source}.log", b"line\n")
    lines = told(launch(*words.split()), code)
    assert what in "\n".join(lines[:-1])
    assert hint in lines[-1]
    assert [folder.name for folder in storage.iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs x --data d", "'x' is not a valid integer"),
        ("--epoch 3 --data d", "No such option"),
        ("status", "Missing argument 'NAME'"),
        ("a.yaml b.yaml", "unexpected extra argument"),
        ("list -o yaml", "'yaml' is not one of"),
        ("logs first --tail -1", "not in the range"),
    ],
)
def test_what_click_finds_is_a_usage_error(words: str, message: str) -> None:
    result = launch(*words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert "-h" in result.stderr


S3_MISTAKES: list[tuple[str, dict[str, str], int, str]] = [
    ("s3://nobody-made-this/x", {}, 100, "there is no bucket nobody-made-this"),
    ("BUCKET/nothing", {}, 100, "nothing: there is nothing here"),
    ("BUCKET/single", {}, 100, "there is only one class: daisy"),
    ("BUCKET/pair", {"AWS_PROFILE": "nobody"}, 100, "nobody"),
    ("BUCKET/pair", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, 100, "connect"),
    ("s3://", {}, 2, "no bucket in the address"),
    ("BUCKET/none.csv", {}, 100, "no such"),
]


@pytest.mark.parametrize(("uri", "environment", "code", "what"), S3_MISTAKES)
def test_a_mistake_on_s3_is_told_once(
    uri: str, environment: dict[str, str], code: int, what: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = bucket.removeprefix("s3://")
    for key in ("single/daisy/1.png", "single/daisy/2.png", "pair/daisy/1.png", "pair/tulip/1.png"):
        s3_client().put_object(Bucket=name, Key=key, Body=b"x")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    lines = told(process("--data", uri.replace("BUCKET", bucket)), code)
    assert what in lines[0]


def test_a_bug_is_told_as_one_and_its_traceback_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = process("list", prelude="import launcher.where\nlauncher.where.Where.root = lambda where: 1 / 0")
    lines = told(result, 1)
    assert "a bug in raylaunch: ZeroDivisionError" in lines[0]
    (kept,) = tmp_path.glob("raylaunch-*.txt")
    assert str(kept) in lines[1]
    assert "Traceback" in kept.read_text()


# -- without the train extra

EXTRA = ("torch", "ray", "timm", "torchvision", "sklearn", "safetensors")
WITHOUT = f"import sys\nfor name in {EXTRA}: sys.modules[name] = None"


def test_all_but_training_works_without_the_train_extra(tmp_path: Path, storage: Path) -> None:
    build(storage, name="first").update(result=RESULT)
    images(tmp_path / "pair", daisy=3, tulip=3)
    for words in ("--help", "--data sample://digits --dry-run", "--data pair --dry-run", "list", "status first",
                  "logs first", "report first", "schema"):  # fmt: skip
        result = process(*words.split(), prelude=WITHOUT)
        assert result.returncode == 0, result.stderr
    assert (storage / "first" / "report.html").stat().st_size > 10_000


def test_training_without_the_train_extra_says_what_to_install_and_leaves_nothing(
    tmp_path: Path, storage: Path
) -> None:
    images(tmp_path / "pair", daisy=3, tulip=3)
    result = process("--data", "pair", "--name", "first", prelude=WITHOUT)
    assert result.returncode == 100
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "next:  pip install 'raylaunch[train]'"
    assert list(storage.rglob("*")) == []


def test_predicting_without_the_train_extra_says_what_to_install(storage: Path) -> None:
    build(storage, name="first").store.write("model/config.json", b"{}")
    lines = told(process("predict", "first", "x.jpg", prelude=WITHOUT), 100)
    assert lines[-1] == "next:  pip install 'raylaunch[train]'"


# -- runs that exist


@pytest.fixture
def run(storage: Path) -> Run:
    made = build(storage, name="first")
    made.update(result=RESULT)
    for source, lines in (("driver", 3), ("rank-0", 2), ("rank-10", 1)):
        made.store.write(f"logs/{source}.log", b"".join(b"line %d\n" % number for number in range(lines)))
    return made


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("words", ["list", "status first", "attach first"])
def test_json_is_all_there_is_on_stdout(words: str) -> None:
    result = launch(*words.split(), "-o", "json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    shown = document[0] if isinstance(document, list) else document
    assert (shown["name"], shown["status"], shown["result"]["top1"]) == ("first", "SUCCEEDED", 0.9325)
    assert shown["report"].endswith("/first/report.html")
    assert ("epochs" in shown) == words.startswith("status")


def test_the_newest_run_stands_first(run: Run, storage: Path) -> None:
    build(storage, Status.FAILED, name="second").update(created=run.state().created + 10)
    assert [row["name"] for row in json.loads(launch("list", "-o", "json").stdout)] == ["second", "first"]
    assert [line.split()[0] for line in launch("list").stdout.splitlines()] == ["name", "second", "first"]


def test_no_runs_are_no_error(tmp_path: Path) -> None:
    for where in (tmp_path / "runs", tmp_path / "not there"):
        result = launch("list", "--storage", str(where))
        assert (result.exit_code, result.stdout) == (0, "")
        assert "launch --data sample://digits makes the first" in result.stderr
        assert json.loads(launch("list", "--storage", str(where), "-o", "json").stdout) == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.SUCCEEDED, 0),
        (Status.FAILED, 100),
        (Status.CANCELLED, 103),
        (Status.INTERRUPTED, 100),
        (Status.RUNNING, 100),
    ],
)
def test_watching_ends_with_the_code_of_the_run(storage: Path, status: Status, code: int) -> None:
    build(storage, status, name="first")
    assert launch("attach", "first").exit_code == code
    assert launch("logs", "first", "-f").exit_code == code
    assert launch("status", "first").exit_code == 0


def test_the_error_of_a_run_decides_the_code(storage: Path) -> None:
    error = {"kind": "UserError", "family": "user", "what": "timm has no model x", "where": "model.name", "hint": "y"}
    build(storage, Status.FAILED, name="first", error=error)
    result = launch("attach", "first")
    assert result.exit_code == 2
    assert (
        "failed    timm has no model x\nat        model.name\nnext      y\nlogs      launch logs first\n"
        in result.stderr
    )


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rank 0", ["line 0", "line 1"]),
        ("--rank 10", ["line 0"]),
        ("--rank 0 --tail 1", ["line 1"]),
        ("--tail 0", []),
        ("", ["[driver] line 0", "[driver] line 1", "[driver] line 2", "[rank-0] line 0", "[rank-0] line 1",
              "[rank-10] line 0"]),
        ("--tail 2 -f", ["[rank-0] line 1", "[rank-10] line 0"]),
    ],
)  # fmt: skip
def test_logs_are_printed_as_asked(words: str, expected: list[str]) -> None:
    assert launch("logs", "first", *words.split()).stdout.splitlines() == expected


@pytest.mark.parametrize("words", ["logs first", "list", "schema", "status first -o json"])
def test_a_reader_that_goes_away_is_no_error(run: Run, words: str) -> None:
    run.store.write("logs/rank-0.log", b"a line\n" * 200_000)
    code = "import sys; from launcher.cli import main; main(prog_name='launch')"
    command = f"'{sys.executable}' -c \"{code}\" {words} | head -c 5"
    shell = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert len(shell.stdout) == 5
    assert shell.stderr == ""


@pytest.mark.usefixtures("run")
def test_a_run_that_is_over_is_deleted_when_told_so(storage: Path) -> None:
    result = launch("rm", "first", "-y")
    assert (result.exit_code, result.stderr) == (0, "first is deleted\n")
    assert list(storage.iterdir()) == []


def test_a_run_that_is_driven_is_neither_deleted_nor_resumed(storage: Path) -> None:
    run = build(storage, Status.RUNNING, name="first")
    run.hold(Owner.me())
    assert "first is still running" in told(launch("rm", "first", "--yes"), 101)[0]
    assert "launch attach first" in told(launch("resume", "first"), 2)[1]
    assert run.exists()


@pytest.mark.usefixtures("run")
def test_cancelling_what_is_over_changes_nothing() -> None:
    result = launch("cancel", "first")
    assert (result.exit_code, result.stderr) == (0, "first is over already: succeeded\n")


@pytest.mark.usefixtures("run")
def test_a_report_says_where_it_is(storage: Path) -> None:
    result = launch("report", "first")
    assert result.stdout == f"{storage}/first/report.html\n"
    assert (storage / "first" / "report.html").exists()


def test_runs_on_s3_are_managed_alike(bucket: str, tmp_path: Path) -> None:
    local = build(tmp_path / "made", name="first")
    local.update(result=RESULT)
    there = Run(bucket, "first")
    for entry in local.store.list():
        there.store.write(entry.key, local.store.read(entry.key))
    at = ("--storage", bucket)
    assert json.loads(launch("list", *at, "-o", "json").stdout)[0]["uri"] == f"{bucket}/first"
    assert f"{bucket}/first/report.html" in launch("status", "first", *at).stdout
    assert launch("report", "first", *at).stdout == f"{bucket}/first/report.html\n"
    assert launch("rm", "first", *at, "--yes").exit_code == 0
    assert json.loads(launch("list", *at, "-o", "json").stdout) == []


def test_names_are_completed(run: Run, storage: Path) -> None:
    build(storage, name="fourth")
    context = main.make_context("launch", ["status", run.name])
    assert manage._complete(context, "f") == ["first", "fourth"]
    assert manage._complete(context, "fi") == ["first"]


def test_logs_begin_so_long_ago(run: Run) -> None:
    def stamp(seconds: float) -> str:
        return datetime.fromtimestamp(time.time() - seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    lines = [f"{stamp(3600)} old", "old too", f"{stamp(60)} new", "  its traceback", f"{stamp(1)} newest"]
    run.store.write("logs/rank-0.log", "\n".join(lines).encode() + b"\n")
    shown = launch("logs", run.name, "--rank", "0", "--since", "5m").stdout.splitlines()
    assert [line.split(" ", 1)[-1].strip() for line in shown] == ["new", "its traceback", "newest"]
    told(launch("logs", run.name, "--since", "yesterday"), 2)


# -- Ctrl-C


@pytest.fixture
def running(storage: Path) -> Iterator[Run]:
    """A run that some process drives."""
    run = build(storage, Status.RUNNING, name="first")
    run.store.write("logs/driver.log", b"line\n")
    progress = Journal(run.store, "progress.jsonl")
    progress.write("start", step=0, epochs=20, workers=1, device="CPU")
    progress.close()
    run.hold(Owner.me())
    yield run
    run.release()


@pytest.mark.parametrize(
    ("words", "waits_for", "says"),
    [
        ("attach first", "training on CPU", "launch attach first comes back, launch cancel first stops it"),
        ("logs first -f", "[driver] line", "interrupted"),
        ("cancel first", "stopping after a checkpoint", "launch status first shows the end"),
    ],
)
def test_ctrl_c_leaves_cleanly_and_the_run_goes_on(running: Run, words: str, waits_for: str, says: str) -> None:
    code = "import sys; print('ready', flush=True); from launcher.cli import main; main(prog_name='launch')"
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    seen = ""
    while waits_for not in seen:
        line = child.stdout.readline()
        assert line, seen
        seen += line
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert says in rest
    assert "Traceback" not in rest
    assert running.owner() is not None


def test_ctrl_c_before_anything_is_shown_is_clean_too() -> None:
    result = process("list", prelude="import launcher.where\ndef stop(*_): raise KeyboardInterrupt\n"
                                     "launcher.where.Where.root = stop")  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\ninterrupted\n")


def test_a_state_is_told_in_every_summary(storage: Path) -> None:
    run = build(storage, name="first")
    document = manage.summary(run, State(Status.FAILED, "why", attempt=2))
    assert document | {"name": "first", "status": "FAILED", "reason": "why", "attempt": 2} == document
    assert json.dumps(document)
