"""Images: what is read, how it is divided and labelled, and how bad input is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.images import make_images
from autoeff.evaluators.loading import ModelFacts, inspect_model
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.space import SpaceSpec

ALL = TextSpec(windows=0)


@pytest.fixture
def facts(tiny_vit: Path) -> ModelFacts:
    return inspect_model(tiny_vit)


def images_in(folder: Path, **fields: object) -> TextSpec:
    return TextSpec(str(folder), **{"windows": 0, "draw": "first"} | fields)  # type: ignore[arg-type]


def test_every_fifth_image_is_held_out_and_labelled_by_its_folder(facts: ModelFacts, tiny_images: Path) -> None:
    found = make_images(facts, images_in(tiny_images), None, 0)
    assert {split: tuple(p.inputs.shape) for split, p in found.items()} == {"search": (16, 3, 8, 8), "held_out": (4, 3, 8, 8)}
    assert found["held_out"].labels is not None
    assert found["held_out"].labels.tolist() == [0, 0, 1, 1]
    assert found["search"].length == 5  # four patches and the class token
    assert found["search"].tokens == 16 * 5


def test_images_are_what_the_models_own_processor_makes_of_them(facts: ModelFacts, tiny_images: Path) -> None:
    from PIL import Image

    first = sorted(tiny_images.rglob("*.png"))[0]
    processor = AutoImageProcessor.from_pretrained(facts.path, backend="pil")
    expected = processor(Image.open(first), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(make_images(facts, images_in(tiny_images), None, 0)["search"].inputs[0], expected)


def test_other_images_may_be_held_out_and_the_seed_draws(facts: ModelFacts, tiny_images: Path) -> None:
    five, other = images_in(tiny_images, draw="random", windows=5), images_in(tiny_images / "cat")
    drawn = [make_images(facts, five, other, seed) for seed in (0, 0, 1)]
    digests = [found["search"].digest for found in drawn]
    assert digests[0] == digests[1] != digests[2]
    assert len(drawn[0]["held_out"].inputs) == 10


def test_accuracy_is_that_of_the_classifier(tiny_vit: Path, tiny_images: Path, tmp_path: Path) -> None:
    setup = EvaluationSetup(str(tiny_vit), images_in(tiny_images), None, SpaceSpec({"skip": {}}), 0, "cpu", str(tmp_path))
    evaluator = Evaluator(setup)
    dense = {decision.key: decision.levels[0] for decision in evaluator.space.decisions}
    found = {item.name: item.value for item in evaluator.evaluate(EvaluationRequest(dense, "held_out", 4))}
    model = AutoModelForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32).eval()
    held_out = evaluator.preparation.passages["held_out"]
    with torch.no_grad():
        hits = model(pixel_values=held_out.inputs).logits.argmax(-1) == held_out.labels
    assert found == {"damage_cosine_held_out": 0.0, "accuracy:labels": float(hits.float().mean())}


def test_folders_that_are_no_labels_leave_accuracy_out_with_a_notice(facts: ModelFacts, tiny_images: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_images / "cat", tmp_path / "tiger")
    found = make_images(facts, images_in(tmp_path), None, 0)["search"]
    assert found.labels is None
    assert found.notices == ("accuracy is not measured: the folder 'tiger' is no label of the model",)


def test_what_is_no_image_is_refused_in_a_line(facts: ModelFacts, tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    cases = {
        "brings no images of its own": ALL,
        "do not exist": images_in(tmp_path / "absent"),
        "holds no images": images_in(tmp_path / "empty"),
        "is no image that can be read": images_in(tmp_path),
        "50 images were asked for": images_in(tiny_images, windows=50),
    }
    for message, spec in cases.items():
        with pytest.raises(InputError, match=message):
            make_images(facts, spec, spec if spec.source else None, 0)


def test_a_model_without_its_processor_is_refused(tiny_vit: Path, tiny_images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vit, tmp_path / "vit"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"holds no preprocessor_config\.json"):
        make_images(inspect_model(folder), images_in(tiny_images), None, 0)
