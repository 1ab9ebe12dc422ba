"""Images as a model sees them: read from folders, prepared by the model's own processor, drawn by a seed, named by a digest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.checkpoint import existing_path, read_json
from autoeff.evaluators.loading import ModelFacts, skeleton
from autoeff.evaluators.model_config import quiet_transformers, refuse_code
from autoeff.evaluators.setup import TextSpec
from autoeff.evaluators.text import Passages, chosen, digest_of, with_others
from autoeff.spaces.measurements import Split
from autoeff.spaces.sites import blank_inputs

__all__ = ["PROCESSOR", "SUFFIXES", "make_images"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PROCESSOR = "preprocessor_config.json"
_SETTINGS_LIMIT = 1 << 20
_EVERY = 5


def make_images(facts: ModelFacts, data: TextSpec, eval_data: TextSpec | None, seed: int, *, spared: bool = False) -> dict[Split, Passages]:
    """Search and held-out images of a job; where `spared`, with as many others `beside` those that are searched on.

    Without a held-out source every fifth image of the search source is held out. Where the images lie in folders that are named as
    labels of the model, they are labelled so.

    Raises:
        InputError: There are no images, too few, or one cannot be read; the model's processor is missing.
    """
    if data.source is None:
        raise InputError(f"{facts.path} brings no images of its own; give a folder of them with --data")
    held_out = eval_data or data
    searched = _files(data.source)
    if held_out.source in (None, data.source):
        part = [file for number, file in enumerate(searched, start=1) if number % _EVERY], f"{data.source}, four of every five"
        rest = searched[_EVERY - 1 :: _EVERY], f"{data.source}, every fifth"
    else:
        part, rest = (searched, data.source), (_files(str(held_out.source)), str(held_out.source))
    return {
        "search": _passages(facts, data, *part, seed, "search", spared=spared),
        "held_out": _passages(facts, held_out, *rest, seed, "held_out"),
    }


def _files(source: str) -> list[Path]:
    folder = existing_path(source)
    if folder is None or not folder.is_dir():
        raise InputError(f"images {source!r} do not exist; expected a folder of images, or of one folder per label")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{source} holds no images; expected files that end in {', '.join(SUFFIXES)}")
    return files


def _passages(
    facts: ModelFacts, spec: TextSpec, files: list[Path], where: str, seed: int, split: Split, *, spared: bool = False
) -> Passages:
    taken = chosen(len(files), spec, "images", seed, split, where)

    def passages(taken: Sequence[int]) -> Passages:
        paths = [files[i] for i in taken]
        pixels = _pixels(facts, paths)
        labels, notices = _labels(facts, paths)
        return Passages(pixels, None, None, digest_of(pixels, labels), where, len(taken) * (facts.context or 1), notices, labels)

    return with_others(passages, taken, sorted(set(range(len(files))) - set(taken)), int(spared), spec, seed)


def _pixels(facts: ModelFacts, files: list[Path]) -> Tensor:
    """What the model's processor makes of images, float32 [images, C, H, W]."""
    try:
        from PIL import Image
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise InputError(f"images need the package {error.name}; run `pip install pillow`") from None
    path = facts.path / PROCESSOR
    if not path.is_file():
        raise InputError(f"{facts.path} holds no {PROCESSOR}, which says how images are prepared; it stands beside the weights")
    refuse_code(read_json(path, _SETTINGS_LIMIT), path)
    try:
        with quiet_transformers():
            processor: Any = AutoImageProcessor.from_pretrained(str(facts.path), local_files_only=True, backend="pil")
    except Exception as error:  # each processor fails in its own way on bad settings
        raise InputError(f"{path} cannot be read: {str(error).strip()[:200].splitlines()[0]}") from None
    expected = blank_inputs(skeleton(facts), 1, 1)["pixel_values"].shape[1:]
    rows = []
    for file in files:
        try:
            with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(file) as image:
                rows.append(processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{file} is no image that can be read: {str(error).splitlines()[0][:200]}") from None
        if rows[-1].shape != expected:
            raise InputError(f"{path} makes {tuple(rows[-1].shape)} of {file}, config.json asks for {tuple(expected)}")
    return torch.stack(rows).float()


def _labels(facts: ModelFacts, files: list[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The model's labels by the names of the folders; None with a notice where a folder is none of them."""
    if not any(name.endswith("ForImageClassification") for name in facts.architectures):
        return None, ()
    known = {str(name).lower(): int(i) for i, name in facts.config.get("id2label", {}).items()}
    names = [file.parent.name for file in files]
    if strange := sorted({name for name in names if name.lower() not in known}):
        return None, (f"accuracy is not measured: the folder {strange[0]!r} is no label of the model",)
    return torch.tensor([known[name.lower()] for name in names]), ()
