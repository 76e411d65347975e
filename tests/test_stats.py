"""What `launch data stats` says of a data set is so."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from launcher.cli import main
from launcher.spec import Data
from tests.test_shards import fill, samples, shard
from trainers.data import stats as module
from trainers.data.index import Index, build_index
from trainers.data.stats import contents, packing, summary

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAYLAUNCH_CACHE", raising=False)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB", kind: str = "JPEG", turn: int = 0) -> bytes:
    image = Image.new(mode, (width, height))
    image.putpixel((0, 0), seed)
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    out = io.BytesIO()
    image.save(out, kind, exif=exif)
    return out.getvalue()


def indexed(place: str, files: dict[str, bytes]) -> Index:
    return build_index(Data(uri=fill(place, files)))


def launch(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["data", "stats", *words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception}"
    assert "Traceback" not in result.stderr
    return result


def said(*words: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(launch(*words, "-o", "json").stdout)
    return document


MIXED = {
    "train/cat/a.jpg": picture(40, 30),
    "train/cat/b.jpg": picture(40, 30, turn=6),
    "train/cat/c.png": picture(20, 10, kind="PNG", mode="L"),
    "train/dog/d.jpg": picture(100, 50, turn=1),
    "train/dog/e.gif": b"GIF89a that ends",
    "train/dog/f.webp": b"",
    "val/cat/g.bmp": picture(4, 4, kind="BMP"),
    "val/dog/h.jpg": picture(40, 30),
    "val/dog/notes.txt": b"no image",
}


def test_counts_and_sizes_are_those_of_the_files(place: str) -> None:
    document = said(fill(place, MIXED), "--sample", "0")
    sizes = sorted(len(data) for key, data in MIXED.items() if not key.endswith(".txt"))
    assert (document["images"], document["bytes"], document["ignored"]) == (8, sum(sizes), 1)
    assert document["classes"] == {
        "cat": {"train": 3, "val": 1, "test": 0}, "dog": {"train": 3, "val": 1, "test": 0},
    }  # fmt: skip
    assert document["splits"] == {"train": 6, "val": 2, "test": 0}
    spread = document["file_bytes"]
    assert (spread["min"], spread["median"], spread["max"]) == (0, (sizes[3] + sizes[4]) / 2, sizes[-1])
    assert "contents" not in document


def test_what_is_in_the_images_is_seen(place: str) -> None:
    found = said(fill(place, MIXED), "--all")["contents"]
    assert found["all"]
    assert found["looked_at"] == 8
    assert found["formats"] == {"JPEG": 4, "PNG": 1, "BMP": 1}
    assert found["modes"] == {"RGB": 5, "L": 1}
    assert found["sizes"] == {"40x30": 2, "30x40": 1, "20x10": 1, "100x50": 1, "4x4": 1}
    assert (found["width"]["min"], found["width"]["max"], found["height"]["max"]) == (4, 100, 50)
    assert found["rotated"] == 1 / 6
    assert found["decoded_bytes"] == 3 * (3 * 40 * 30 + 20 * 10 + 100 * 50 + 4 * 4)
    assert {image["key"] for image in found["unreadable"]} == {"train/dog/e.gif", "train/dog/f.webp"}
    assert all(image["why"] for image in found["unreadable"])


def test_copies_that_mislead_are_found(tmp_path: Path) -> None:
    files = MIXED | {"val/dog/copy.jpg": MIXED["train/dog/d.jpg"], "train/cat/copy.jpg": MIXED["val/cat/g.bmp"]}
    files["train/cat/wrong.jpg"] = MIXED["train/dog/d.jpg"]
    twice = contents(indexed(str(tmp_path), files), None)["duplicates"]
    assert twice["images"] == 4
    assert sorted(twice["in_several_splits"]) == [
        ["train/cat/a.jpg", "val/dog/h.jpg"], ["train/cat/copy.jpg", "val/cat/g.bmp"],
        ["train/cat/wrong.jpg", "train/dog/d.jpg", "val/dog/copy.jpg"],
    ]  # fmt: skip
    assert sorted(twice["of_several_classes"]) == [
        ["train/cat/a.jpg", "val/dog/h.jpg"], ["train/cat/wrong.jpg", "train/dog/d.jpg", "val/dog/copy.jpg"],
    ]  # fmt: skip


def test_a_sample_is_the_same_each_time_and_stands_for_all(tmp_path: Path) -> None:
    files = {f"{'ab'[n % 2]}/{n}.png": picture(10, 10 + n, n, kind="PNG") for n in range(100)}
    index = indexed(str(tmp_path), files)
    one, other, exact = contents(index, 30), contents(index, 30), contents(index, None)
    assert one == other
    assert one["looked_at"] == 30
    assert "duplicates" not in one
    assert abs(one["decoded_bytes"] / exact["decoded_bytes"] - 1) < 0.2
    assert contents(index, 1000)["all"]


def test_images_in_shards_are_looked_into_too(place: str) -> None:
    members = samples(0, 20) | {f"{n:04d}.jpg": picture(16, 12, n) for n in range(20)}
    found = contents(indexed(place, {"0.tar": shard(members)}), None)
    assert found["sizes"] == {"16x12": 20}
    assert not found["unreadable"]


def test_nothing_readable_is_no_error(tmp_path: Path) -> None:
    found = said(fill(str(tmp_path / "data"), {f"{c}/{n}.jpg": b"x" for c in "ab" for n in range(4)}))["contents"]
    assert len(found["unreadable"]) == found["looked_at"] == 8
    assert "8 of them cannot be read" in launch(str(tmp_path / "data")).stdout


# -- advice


@pytest.mark.parametrize(("most", "advised"), [(9, False), (10, True)])
def test_uneven_classes_get_advice_that_a_run_takes(tmp_path: Path, most: int, advised: bool) -> None:
    files = {f"train/{label}/{n}.jpg": b"" for label, count in (("a", most), ("b", 1)) for n in range(count)}
    files |= {f"val/{label}/0.jpg": b"" for label in "ab"}
    uneven = summary(indexed(str(tmp_path), files))["imbalance"]
    assert (uneven["largest"], uneven["smallest"], uneven["ratio"]) == ("a", "b", most)
    assert bool(uneven["advice"]) == advised
    if advised:
        key, _, value = uneven["advice"].removeprefix("--set data.").partition(" ")[0].partition("=")
        assert getattr(Data.model_validate({"uri": "x", key: value}), key) == value


@pytest.mark.parametrize(
    ("where", "size", "many", "pays", "why"),
    [
        ("s3", 1_000, True, True, "asks S3 for 40 objects of 1 kB"),
        ("s3", 1_000, False, False, "40 objects are few"),
        ("s3", 300_000, True, False, "300 kB"),
        ("folder", 1_000, True, False, "files, not objects of S3"),
        ("tar", 1_000, True, False, "one object already"),
    ],
)
def test_packing_pays_for_many_small_objects_of_s3(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, where: str, size: int, many: bool, pays: bool,
    why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "MANY", 40 if many else 41)
    files = {f"{'ab'[n % 2]}/{n}.jpg": random.Random(n).randbytes(size) for n in range(40)}
    if where == "tar":
        files = {"0.tar": shard(samples(0, 40))}
    said = packing(indexed(str(tmp_path / "data") if where == "folder" else bucket, files))
    assert said["pays"] is pays
    assert why in said["why"]


def test_images_that_a_local_manifest_has_on_s3_count_as_on_s3(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY", 4)
    fill(bucket, {f"{n}.jpg": b"x" for n in range(4)})
    (tmp_path / "all.csv").write_text("path,label\n" + "".join(f"{bucket}/{n}.jpg,{'ab'[n % 2]}\n" for n in range(4)))
    assert packing(build_index(Data(uri=str(tmp_path / "all.csv"))))["pays"]


# -- the command


def test_the_page_says_all_in_words(tmp_path: Path) -> None:
    text = launch(fill(str(tmp_path / "data"), MIXED), "--all").stdout
    for words in (
        "8 in 2 classes", "1 other file", "6 train, 2 val", "4 JPEG", "turned by EXIF 16.7%", "train/dog/e.gif: ",
        "1 image with the content of another", "does not pay", "cat    3      1",
    ):  # fmt: skip
        assert words in text


def test_what_a_class_is_called_steers_no_terminal(tmp_path: Path) -> None:
    files = {f"{name}/{n}.jpg": b"" for n in range(3) for name in ("\x1b[31mred", "[bold]blue")}
    text = launch(fill(str(tmp_path / "data"), files)).stdout
    assert "\x1b" not in text
    assert "[bold]blue" in text


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("nowhere", 100, "there is no such folder"),
        ("sample://nothing", 2, "there is no sample nothing"),
        (". --sample -1", 2, "--sample"),
        (". --val-split no", 100, "there is nothing here"),
    ],
)
def test_a_mistake_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = launch(*words.split(), code=code)
    assert says in result.stderr
    assert not result.stdout


def test_counting_needs_no_train_extra_and_looking_says_that_it_does(tmp_path: Path) -> None:
    uri = fill(str(tmp_path / "data"), MIXED)
    code = (
        "import sys\n"
        "for name in ('torch', 'ray', 'timm', 'simplejpeg', 'obstore', 'xxhash', 'numba'): sys.modules[name] = None\n"
        "from launcher.cli import main\nmain(prog_name='launch')"
    )

    def bare(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, "data", *words], capture_output=True, text=True, check=False,
                              cwd=ROOT, env=os.environ.copy())  # fmt: skip

    counted = bare("stats", uri, "--sample", "0", "-o", "json")
    assert json.loads(counted.stdout)["images"] == 8
    for refused in (bare("stats", uri), bare("pack", uri, str(tmp_path / "pack"))):
        assert refused.returncode == 100
        assert "pip install 'raylaunch[train]'" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "pack").exists()
