"""Samples into a folder, and solvers side by side: what `ddpm-hf sample` does."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.pipelines.images import PIL_MODES, NotFiniteError, to_pil
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.schedulers.solvers import SOLVERS
from ddpm_hf.utils.files import clear_parts, locked, write
from ddpm_hf.utils.pictures import grid, with_caption, with_row_names
from ddpm_hf.utils.seeds import image_generators

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
    """Write samples 0 ... `num_images` - 1 except those that exist already, and return how many were made.

    Sample k is a function of (`seed`, k): it is the same in any batch and any process, and whatever was made before it.
    Each process of a launcher (`RANK`, `WORLD_SIZE`) makes its own part without communication. Files are written
    atomically.

    Args:
        output: the folder. Its `sampling.json` keeps the settings, and samples of other settings are a ValueError.
        format: `"png"` and `"npy"` (float32 (H, W, C) in [0, 1], for any number of channels): a file an image, which is
            written with the batch that it was made in; `"parquet"`: files of 1,000, each written when it is whole, with
            the columns image and, of classes, label, which `datasets` reads.
        class_labels: image k is of the k-th of them, in turns.
        guidance_scale, scheduler (a name), num_inference_steps, clip_sample: as the pipeline has them.

    Raises:
        ValueError: an argument that can't be, a folder that holds samples of other settings, or samples that are not
            finite, of whose batch nothing is written.
    """
    output = Path(output)
    _check_arguments(pipeline, output, num_images, batch_size, seed, format, scheduler)
    labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
    of_call = {
        "guidance_scale": float(guidance_scale),
        "scheduler": scheduler,
        "clip_sample": clip_sample,
        "num_inference_steps": num_inference_steps,
    }
    pipeline.check_call(class_labels=labels, **of_call)  # before anything is written
    settings = {"model": _checksum(pipeline), "seed": seed, "format": format, "class_labels": labels, **of_call}
    _check_settings(output, settings)

    def make(numbers: Sequence[int]) -> np.ndarray:
        classes = {} if labels is None else {"class_labels": [labels[k % len(labels)] for k in numbers]}
        generators = image_generators(seed, numbers)
        return pipeline(len(numbers), generators, output_type="np", **classes, **of_call).images  # (B, H, W, C)

    folder = _Folder(output, settings, batch_size, make, pipeline.unet.config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    unit = SHARD if format == "parquet" else batch_size
    parts = [range(k, min(k + unit, num_images)) for k in range(rank * unit, num_images, world * unit)]
    made = 0
    lock = locked(output, "sample") if rank == 0 else contextlib.nullcontext()
    # The progress bar ends its line before an error is printed.
    with lock, tqdm(total=sum(map(len, parts)), unit=" images", disable=rank != 0) as bar:
        if rank == 0:
            clear_parts(output)
        for numbers in parts:
            made += folder.fill_shard(numbers) if format == "parquet" else folder.fill_files(numbers)
            bar.update(len(numbers))
    return made


def _check_arguments(pipeline, output: Path, num_images, batch_size, seed, format, scheduler) -> None:
    channels = pipeline.unet.config.in_channels
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
        raise ValueError(f"output={str(output)!r} is a file; it must be a folder or not exist yet")


@dataclass
class _Folder:
    """A folder of samples.

    Args:
        output: its path. It is created with the first sample: a model that makes none leaves nothing behind.
        settings: the content of its `sampling.json`.
        batch_size: images to make at a time.
        make: numbers of samples -> (B, H, W, C) in [0, 1].
        unet_config: number and names of the classes.
    """

    output: Path
    settings: dict
    batch_size: int
    make: Callable[[Sequence[int]], np.ndarray]
    unet_config: Mapping

    def fill_files(self, numbers: range) -> int:
        """Make the samples of one batch that have no file yet, and return how many."""
        format = self.settings["format"]
        paths = {k: self.output / f"{k:06d}.{format}" for k in numbers}
        missing = [k for k, path in paths.items() if not _is_whole(path)]
        for k, image in zip(missing, self.make(missing) if missing else (), strict=True):
            self._write(paths[k], _encoded(image, format))
        return len(missing)

    def fill_shard(self, numbers: range) -> int:
        """Make the samples that their parquet file lacks, and return how many."""
        import datasets
        import pyarrow.parquet

        path, labels = self.output / f"samples-{numbers.start // SHARD:05d}.parquet", self.settings["class_labels"]
        images = []
        if _is_whole(path):
            images = [row["bytes"] for row in pyarrow.parquet.read_table(path)["image"].to_pylist()]
        missing = numbers[len(images) :]
        if not missing:
            return 0
        for k in range(0, len(missing), self.batch_size):
            images += [_encoded(image, "png") for image in self.make(missing[k : k + self.batch_size])]
        columns, features = {"image": [{"bytes": image, "path": None} for image in images]}, {"image": datasets.Image()}
        if labels is not None:
            names = self.unet_config.class_names or [str(k) for k in range(self.unet_config.num_classes)]
            of_images = [labels[k % len(labels)] for k in numbers]
            columns["label"] = [names.index(label) if label in names else label for label in of_images]
            features["label"] = datasets.ClassLabel(names=names)
        file = BytesIO()
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
        self._write(path, file.getvalue())
        return len(missing)

    def _write(self, path: Path, content: bytes) -> None:
        if not (self.output / SETTINGS).exists():
            self.output.mkdir(parents=True, exist_ok=True)
            write(self.output / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        write(path, content)


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


def compare_solvers(
    pipeline: DDPMCustomPipeline,
    solvers: list[str],
    steps: list[int],
    num_images: int = 4,
    seed: int = 0,
    **settings,
) -> Image.Image:
    """A picture with a row for each solver and a column for each number of steps, from the same noise.

    Under each cell stands the time it took. A cell is empty where a solver does not support the number of steps or the
    model's betas, or where its samples are not finite.

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
    cells, failed, scale = [], None, max(1, 48 // max(pipeline.image_shape[1:]))
    warm = False  # the first call takes longer, and is repeated
    for solver, n in itertools.product(solvers, steps):
        call = {"scheduler": solver, "num_inference_steps": n, **settings}
        try:
            pipeline.check_call(**call)
            for _ in range(1 if warm else 2):
                began = time.perf_counter()
                generators = image_generators(seed, range(num_images))
                images = pipeline(num_images, generators, output_type="np", **call).images  # waits for the device
                took = time.perf_counter() - began
                warm = True
        except ValueError as error:
            if isinstance(error, NotFiniteError):
                failed, reason = error, "not finite"
            elif solver == "ddpm" or not 1 <= n <= pipeline.scheduler.config.num_train_timesteps:
                raise
            else:
                reason = "not supported"
            log.warning(f"{solver} with {n} steps is left out: {error}")
            cells.append(with_caption(Image.new("L", (1, 1)), [f"{n} steps: {reason}"]))
        else:
            cells.append(with_caption(grid(images, num_images, scale), [f"{n} steps, {took:.2f} s"]))
    if failed is not None and not warm:  # no cell has images
        raise failed
    width, height = (max(cell.size[axis] for cell in cells) + 6 for axis in (0, 1))
    picture = Image.new("RGB", (width * len(steps), height * len(solvers)), "white")
    for k, cell in enumerate(cells):
        picture.paste(cell, (k % len(steps) * width, k // len(steps) * height))
    return with_row_names(picture, solvers)
