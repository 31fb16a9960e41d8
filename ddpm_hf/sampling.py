"""Samples by the thousand into a folder, and solvers side by side: what `ddpm-hf sample` does."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.files import Lock, clear_parts, write
from ddpm_hf.films import grid, with_caption, with_row_names
from ddpm_hf.images import PIL_MODES, NotFiniteError, to_pil
from ddpm_hf.pipeline import DDPMCustomPipeline
from ddpm_hf.seeds import image_generators
from ddpm_hf.solvers import SOLVERS

FORMATS = ("png", "npy", "parquet")
SHARD = 1000  # images a parquet file
SETTINGS, COMPARISON = "sampling.json", "compare.png"
log = logging.getLogger(__name__)


def sample_to_folder(
    pipeline: DDPMCustomPipeline,
    output,
    num_images: int,
    batch_size: int = 64,
    seed: int = 0,
    format: str = "png",
    class_labels: int | str | list[int | str] | None = None,
    guidance_scale: float = 1.0,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    clip_sample: bool | None = None,
) -> int:
    """Write samples 0 ... `num_images` - 1, but those that are there already; how many were made is given back.

    Sample k is a function of (`seed`, k): it is the same in any batch and any process, and whatever was made before it.
    Each process of a launcher (`RANK`, `WORLD_SIZE`) makes its part, without a word to the others. A file is there
    whole or not at all.

    Args:
        output: the folder. `sampling.json` in it keeps the settings; others are refused, so that it holds one kind.
        format: `"png"` and `"npy"` (float32 (H, W, C) in [0, 1], for any number of channels): a file an image, which is
            written with the batch that it was made in; `"parquet"`: files of 1,000, each written when it is whole, with
            the columns image and, of classes, label, which `datasets` reads.
        class_labels: image k is of the k-th of them, in turns.
        guidance_scale, scheduler (a name), num_inference_steps, clip_sample: as the pipeline has them.

    Raises:
        ValueError: an argument that can't be, a folder that holds samples of other settings, or samples that are not
            finite, of whose batch nothing is written.
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
    if not isinstance(scheduler, str | None):
        raise ValueError(f"scheduler={scheduler!r}: give a name, which can be kept; or set pipeline.scheduler")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; it must be a folder or not be there yet")
    labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
    of_call = {"guidance_scale": float(guidance_scale), "scheduler": scheduler, "clip_sample": clip_sample}
    of_call["num_inference_steps"] = num_inference_steps
    pipeline.check_call(class_labels=labels, **of_call)  # before anything is written
    settings = {"model": _checksum(pipeline), "seed": seed, "format": format, "class_labels": labels, **of_call}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _check_settings(output, settings)
    kept = False

    def keep(path: Path, content: bytes) -> None:
        nonlocal kept
        if not kept:  # not before there is an image: a model that makes none leaves nothing behind
            output.mkdir(parents=True, exist_ok=True)
            write(output / SETTINGS, json.dumps(settings, indent=2) + "\n")
            kept = True
        write(path, content)

    def make(numbers: list[int]) -> np.ndarray:
        classes = {} if labels is None else {"class_labels": [labels[k % len(labels)] for k in numbers]}
        generators = image_generators(seed, numbers)
        return pipeline(len(numbers), generators, output_type="np", **classes, **of_call).images  # (B, H, W, C)

    unit = SHARD if format == "parquet" else batch_size
    mine = range(rank * unit, num_images, world * unit)
    made, total = 0, sum(min(unit, num_images - s) for s in mine)
    lock = Lock(output, "sample") if rank == 0 else contextlib.nullcontext()
    # The bar ends its line before an error is told.
    with lock, tqdm(total=total, unit=" images", disable=rank != 0) as bar:
        if rank == 0:
            clear_parts(output)
        for start in mine:
            numbers = range(start, min(start + unit, num_images))
            if format == "parquet":
                path = output / f"samples-{start // SHARD:05d}.parquet"
                made += _fill_shard(path, numbers, batch_size, make, keep, pipeline.unet.config, labels)
            else:
                missing = [k for k in numbers if not _is_whole(output / f"{k:06d}.{format}")]
                for k, image in zip(missing, make(missing) if missing else (), strict=True):
                    keep(output / f"{k:06d}.{format}", _encoded(image, format))
                made += len(missing)
            bar.update(len(numbers))
    return made


def _is_whole(path: Path) -> bool:
    """Whether a sample is there. A file system that lost power may have kept the name and not the content."""
    return path.exists() and path.stat().st_size > 0


def _checksum(pipeline) -> str:
    """Other weights or another scheduler have another."""
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(output: Path, settings: dict) -> None:
    """A ValueError if the folder holds samples of other settings, or other things."""
    path = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    # Looked at before the settings are: another process may just now be writing them, and then the first images.
    files = output.iterdir() if output.exists() else ()
    there = [file for file in files if file.name != COMPARISON and not file.name.startswith(".")]
    if path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, so nobody knows what the samples beside it are of ({error}): name another folder"
            ) from error
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                here = f"{output} holds samples with {before.get(name)!r}"
                raise ValueError(f"{name}={settings.get(name)!r}: {here}; name another folder")
    elif there:
        raise ValueError(f"output={str(output)!r} holds other things: name a folder that is empty or not there yet")


def _encoded(image: np.ndarray, format: str) -> bytes:
    file = BytesIO()
    if format == "npy":
        np.save(file, image)
    else:
        to_pil(image[None])[0].save(file, "PNG")
    return file.getvalue()


def _fill_shard(path: Path, numbers: range, batch_size: int, make: Callable, keep: Callable, config, labels) -> int:
    """How many were made: those that the file does not hold yet."""
    import datasets
    import pyarrow.parquet

    there = [row["bytes"] for row in pyarrow.parquet.read_table(path)["image"].to_pylist()] if _is_whole(path) else []
    missing = numbers[len(there) :]
    if not missing:
        return 0
    parts = (missing[k : k + batch_size] for k in range(0, len(missing), batch_size))
    images = there + [_encoded(image, "png") for part in parts for image in make(list(part))]
    columns, features = {"image": [{"bytes": image, "path": None} for image in images]}, {"image": datasets.Image()}
    if labels is not None:
        names = config.class_names or [str(k) for k in range(config.num_classes)]
        of_images = [labels[k % len(labels)] for k in numbers]
        columns["label"] = [names.index(label) if label in names else label for label in of_images]
        features["label"] = datasets.ClassLabel(names=names)
    file = BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    keep(path, file.getvalue())
    return len(missing)


def compare_solvers(
    pipeline: DDPMCustomPipeline,
    solvers: list[str],
    steps: list[int],
    num_images: int = 4,
    seed: int = 0,
    **settings,
) -> Image.Image:
    """A picture: a row a solver, a column a number of steps, the same noise everywhere, and what each took.

    A cell is empty where a solver can't do it, for the number of steps or the model's betas, or where its samples are
    not finite.

    Args:
        solvers: of "ddpm" and `SOLVERS`.
        num_images: in each cell.
        settings: more arguments of the pipeline.

    Raises:
        ValueError: an argument that can't be, or samples that are not finite in each cell that has any.
    """
    for solver in solvers:
        if solver not in ("ddpm", *SOLVERS):
            raise ValueError(f"solvers: there is no {solver!r}; choose from ddpm, {', '.join(SOLVERS)}")
    cells, warm, failed, side = [], False, None, max(pipeline.image_shape[1:])
    for solver in solvers:
        for n in steps:
            try:
                pipeline.check_call(scheduler=solver, num_inference_steps=n, **settings)
            except ValueError as error:
                if not 1 <= n <= pipeline.scheduler.config.num_train_timesteps or solver == "ddpm":
                    raise
                log.warning(f"{solver} with {n} steps is left out: {error}")
                cells.append(with_caption(Image.new("L", (1, 1)), [f"{n} steps: can't"]))
                continue
            try:
                for _ in range(1 if warm else 2):  # the first time takes longer
                    began = time.perf_counter()
                    generators = image_generators(seed, range(num_images))
                    images = pipeline(num_images, generators, n, "np", scheduler=solver, **settings).images
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    took = time.perf_counter() - began
                    warm = True
            except NotFiniteError as error:
                failed = error
                log.warning(f"{solver} with {n} steps is left out: {error}")
                cells.append(with_caption(Image.new("L", (1, 1)), [f"{n} steps: not finite"]))
                continue
            cells.append(with_caption(grid(images, num_images, max(1, 48 // side)), [f"{n} steps, {took:.2f} s"]))
    if failed is not None and not warm:  # no cell has images
        raise failed
    width, height = (max(cell.size[axis] for cell in cells) + 6 for axis in (0, 1))
    picture = Image.new("RGB", (width * len(steps), height * len(solvers)), "white")
    for k, cell in enumerate(cells):
        picture.paste(cell, (k % len(steps) * width, k // len(steps) * height))
    return with_row_names(picture, solvers)
