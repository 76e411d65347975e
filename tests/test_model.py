"""Networks and the weights they begin with; predictions from a model folder alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launcher.errors import SiteError, UserError
from launcher.spec import Data, Model, Spec, Train
from launcher.storage import open_store
from trainers.data.recipes import EvalRecipe
from trainers.model import Preprocess, build, freeze, initial
from trainers.predict import Predictor


def spec(pretrained: str = "none", name: str = "test_resnet", seed: int = 0) -> Spec:
    return Spec(data=Data(uri="x"), model=Model(name=name, pretrained=pretrained), train=Train(seed=seed))


@pytest.fixture(scope="module")
def thousand() -> torch.nn.Module:
    torch.manual_seed(5)
    return build(Model(name="test_resnet"), 1000)


def test_the_seed_decides_the_first_weights() -> None:
    one, same, other = (initial(spec(seed=seed), 10).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "pth", "s3"])
def test_weights_from_a_file_fill_all_but_the_classifier(
    tmp_path: Path, thousand: torch.nn.Module, kind: str, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / ("weights.pth" if kind == "pth" else "weights.safetensors")
    if kind == "pth":
        torch.save(thousand.state_dict(), path)
    else:
        save_file(thousand.state_dict(), path)
    source = str(path)
    if kind == "s3":
        source = f"{request.getfixturevalue('bucket')}/zoo/weights.safetensors"
        open_store(source.rpartition("/")[0]).upload("weights.safetensors", path)
    found = initial(spec(source), 7).state_dict()
    for key, tensor in thousand.state_dict().items():
        assert key.startswith("fc.") or torch.equal(found[key], tensor), key
    assert found["fc.weight"].shape[0] == 7


def test_a_classifier_that_fits_is_kept(tmp_path: Path, thousand: torch.nn.Module) -> None:
    save_file(thousand.state_dict(), tmp_path / "w.safetensors")
    found = initial(spec(str(tmp_path / "w.safetensors")), 1000).state_dict()
    assert torch.equal(found["fc.weight"], thousand.state_dict()["fc.weight"])


def test_a_file_of_another_model_is_refused_with_the_first_tensor_named(
    tmp_path: Path, thousand: torch.nn.Module
) -> None:
    save_file(thousand.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"do not fit the model.*first: "):
        initial(spec(str(tmp_path / "w.safetensors"), "resnet18"), 10)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pt"])
def test_a_pickle_in_disguise_runs_nothing(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    (tmp_path / name).write_bytes(pickle.dumps({"fc.weight": _Payload(trap)}))
    with pytest.raises(UserError, match="not a file of weights"):
        initial(spec(str(tmp_path / name)), 10)
    torch.save({"fc.weight": _Payload(trap)}, tmp_path / name)
    with pytest.raises(UserError, match="not a file of weights"):
        initial(spec(str(tmp_path / name)), 10)
    assert not trap.exists()


def test_a_missing_file_and_a_missing_object_are_told(tmp_path: Path, bucket: str) -> None:
    for source in (str(tmp_path / "none.pth"), f"{bucket}/none.pth"):
        with pytest.raises(UserError, match="no such weights file"):
            initial(spec(source), 10)


def test_the_hub_out_of_reach_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(SiteError, match="timm hub") as caught:
        initial(spec("hub", "resnet18"), 10)
    assert "--pretrained" in caught.value.hint


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean resnet50"):
        build(Model(name="resnet5O"), 3)


def test_an_option_the_model_does_not_take_is_told() -> None:
    with pytest.raises(UserError, match="drop_path_rate"):
        build(Model(name="vgg11", drop_path_rate=0.1), 3)


def test_freezing_the_backbone_leaves_the_classifier() -> None:
    model = build(Model(name="test_resnet"), 3)
    norms = freeze(model, ["backbone"])
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {"fc.weight", "fc.bias"}
    assert norms


def test_freezing_a_module_spares_the_others_and_a_wrong_name_is_told() -> None:
    model = build(Model(name="test_resnet"), 3)
    freeze(model, ["layer1"])
    frozen = {name.partition(".")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"layer1"}
    with pytest.raises(UserError, match="did you mean layer1"):
        freeze(model, ["layr1"])
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, [name for name, _ in model.named_children()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build(Model(name="test_resnet"), 3)
    store = open_store(tmp_path / "model")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    store.upload("weights.safetensors", tmp_path / "weights.safetensors")
    store.write("labels.json", json.dumps(["a", "b", "c"]).encode())
    store.write("config.json", json.dumps({"schema": 1, "architecture": "test_resnet", "classes": 3}).encode())
    preprocess = Preprocess.of(model, 32)
    store.write("preprocess.json", json.dumps(preprocess.__dict__).encode())
    return tmp_path / "model"


def test_predictions_survive_bad_files_and_keep_the_order(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(pictures / "a.png")
    (pictures / "b.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(pictures / "c.tiff")
    rows = list(Predictor(open_store(folder)).predict([pictures, tmp_path / "absent.png"], top=2))
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.jpg", "c.tiff", "absent.png"]
    assert "error" in rows[1]
    assert rows[3]["error"] == "No such file or directory"
    for row in (rows[0], rows[2]):
        assert [set(item) for item in row["classes"]] == [{"label", "probability"}] * 2
        assert row["classes"][0]["probability"] >= row["classes"][1]["probability"]


def test_a_prediction_equals_the_evaluation_of_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    predictor = Predictor(open_store(folder))
    row = next(predictor.predict([tmp_path / "x.png"], top=3))
    settings = predictor.preprocess
    recipe = EvalRecipe(settings.image_size, settings.crop_pct, settings.interpolation)
    pixels = torch.from_numpy(recipe.one(np.asarray(image)))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (settings.mean, settings.std))
    with torch.inference_mode():
        expected = predictor.model(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None]).softmax(1)[0]
    for item in row["classes"]:
        assert item["probability"] == pytest.approx(float(expected["abc".index(item["label"])]), abs=1e-5)
