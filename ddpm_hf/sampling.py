"""Samples by the thousand into a folder, and solvers side by side: what `ddpm-hf sample` does."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.films import grid, with_caption, with_row_names
from ddpm_hf.images import PIL_MODES, to_pil
from ddpm_hf.pipeline import DDPMCustomPipeline
from ddpm_hf.seeds import image_generators
from ddpm_hf.solvers import SOLVERS

FORMATS = ("png", "npy", "parquet")
SHARD = 1000  # images a parquet file
SETTINGS = "sampling.json"


def sample_to_folder(
    pipeline: DDPMCustomPipeline,
    output,
    num_images: int,
    batch_size: int = 64,
    seed: int = 0,
    format: str = "png",
    class_labels: list[int | str] | None = None,
    **settings,
) -> int:
    """Write samples 0 ... `num_images` - 1, but those that are there already; how many were made is given back.

    Sample k is a function of (`seed`, k): it is the same in any batch and any process, and whatever was made before it.
    Each process of a launcher (`RANK`, `WORLD_SIZE`) makes its part, without a word to the others. A file is there
    whole or not at all.

    Args:
        output: the folder. `sampling.json` in it keeps the settings; others are refused, so that it holds one kind.
        format: `"png"` and `"npy"` (float32 (H, W, C) in [0, 1], for any number of channels): a file an image;
            `"parquet"`: files of 1,000, with the columns image and, of classes, label, which `datasets` reads.
        class_labels: image k is of the k-th of them, in turns.
        settings: more arguments of the pipeline.

    Raises:
        ValueError: an argument that can't be, or a folder that holds samples of other settings.
    """
    output, channels = Path(output), pipeline.unet.config.in_channels
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be an integer in 0 ... 2^63 - 1")
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; choose from {', '.join(FORMATS)}")
    if format != "npy" and channels not in PIL_MODES:
        raise ValueError(f"format={format!r} holds 1 to 4 channels and these images have {channels}: use npy")
    pipeline.check_call(class_labels=class_labels, **settings)  # before anything is written
    model = {"model": _checksum(pipeline)}
    _keep_settings(output, {**model, "seed": seed, "format": format, "class_labels": class_labels, **settings})

    def make(numbers: list[int]) -> np.ndarray:
        labels = (
            {} if class_labels is None else {"class_labels": [class_labels[k % len(class_labels)] for k in numbers]}
        )
        generators = image_generators(seed, numbers)
        return pipeline(len(numbers), generators, output_type="np", **labels, **settings).images  # (B, H, W, C)

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    unit = SHARD if format == "parquet" else batch_size
    mine = range(rank * unit, num_images, world * unit)
    made, bar = 0, tqdm(total=sum(min(unit, num_images - s) for s in mine), unit=" images", disable=rank != 0)
    for start in mine:
        numbers = range(start, min(start + unit, num_images))
        if format == "parquet":
            made += _write_shard(
                output / f"samples-{start // SHARD:05d}.parquet", numbers, batch_size, make, pipeline, class_labels
            )
        else:
            missing = [k for k in numbers if not (output / f"{k:06d}.{format}").exists()]
            for k, image in zip(missing, make(missing) if missing else (), strict=True):
                _write(output / f"{k:06d}.{format}", _encoded(image, format))
            made += len(missing)
        bar.update(len(numbers))
    bar.close()
    return made


def _checksum(pipeline) -> str:
    """Other weights or another scheduler have another."""
    digest = hashlib.sha256(pipeline.scheduler.to_json_string().encode())
    for name, weight in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _keep_settings(output: Path, settings: dict) -> None:
    path = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    # Looked at before the settings are: another process may just now be writing them, and then the first images.
    there = [file for file in output.iterdir() if not file.name.endswith(".part")] if output.exists() else []
    if path.exists():
        before = json.loads(path.read_text())
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                here = f"{output} holds samples with {before.get(name)!r}"
                raise ValueError(f"{name}={settings.get(name)!r}: {here}; name another folder")
    elif there:
        raise ValueError(f"output={str(output)!r} holds other things: name a folder that is empty or not there yet")
    output.mkdir(parents=True, exist_ok=True)
    _write(path, (json.dumps(settings, indent=2) + "\n").encode(), own=str(os.getpid()))


def _write(path: Path, content: bytes, own: str = "") -> None:
    beside = path.with_name(f".{path.name}{own}.part")
    beside.write_bytes(content)
    os.replace(beside, path)


def _encoded(image: np.ndarray, format: str) -> bytes:
    file = BytesIO()
    if format == "npy":
        np.save(file, image)
    else:
        to_pil(image[None])[0].save(file, "PNG")
    return file.getvalue()


def _write_shard(path: Path, numbers: range, batch_size: int, make: Callable, pipeline, class_labels) -> int:
    """How many were made: all of the shard, or none if a whole one is there."""
    import datasets
    import pyarrow.parquet

    if path.exists() and pyarrow.parquet.read_metadata(path).num_rows >= len(numbers):
        return 0
    images = [image for part in _parts(numbers, batch_size) for image in make(part)]
    columns = {"image": [{"bytes": _encoded(image, "png"), "path": None} for image in images]}
    features = {"image": datasets.Image()}
    if class_labels is not None:
        config = pipeline.unet.config
        names = config.class_names or [str(k) for k in range(config.num_classes)]
        columns["label"] = [class_labels[k % len(class_labels)] for k in numbers]
        columns["label"] = [names.index(label) if isinstance(label, str) else label for label in columns["label"]]
        features["label"] = datasets.ClassLabel(names=names)
    file = BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    _write(path, file.getvalue())
    return len(numbers)


def _parts(numbers: range, size: int) -> Iterator[list[int]]:
    return (list(numbers[start : start + size]) for start in range(0, len(numbers), size))


def compare_solvers(
    pipeline: DDPMCustomPipeline,
    solvers: list[str],
    steps: list[int],
    num_images: int = 4,
    seed: int = 0,
    **settings,
) -> Image.Image:
    """A picture: a row a solver, a column a number of steps, the same noise everywhere, and what each took.

    Args:
        solvers: of "ddpm" and `SOLVERS`.
        num_images: in each cell.
        settings: more arguments of the pipeline.
    """
    for solver in solvers:
        if solver not in ("ddpm", *SOLVERS):
            raise ValueError(f"solvers: there is no {solver!r}; choose from ddpm, {', '.join(SOLVERS)}")
    generators = image_generators(seed, range(num_images))
    pipeline(num_images, generators, min(steps), scheduler=solvers[0], **settings)  # which takes longer the first time
    cells = []
    for solver in solvers:
        for n in steps:
            began = time.perf_counter()
            generators = image_generators(seed, range(num_images))
            images = pipeline(num_images, generators, n, "np", scheduler=solver, **settings).images
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            side = max(images.shape[1:3])
            cells.append(with_caption(grid(images, num_images, max(1, 48 // side)), [f"{n} steps, {took:.2f} s"]))
    width, height = (max(cell.size[axis] for cell in cells) + 6 for axis in (0, 1))
    picture = Image.new("RGB", (width * len(steps), height * len(solvers)), "white")
    for k, cell in enumerate(cells):
        picture.paste(cell, (k % len(steps) * width, k // len(steps) * height))
    return with_row_names(picture, solvers)
