"""Write the samples of a pipeline to a folder, as one file per image or as parquet files."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.data.pages import EIGHT_BITS
from ddpm_hf.pipelines.denoising import BATCH
from ddpm_hf.pipelines.images import mode_for, to_pil
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.utils.arguments import checked, integer, matching, mode_of, one_of, optional, path, read_json
from ddpm_hf.utils.files import clear_parts, locked, save_picture, write
from ddpm_hf.utils.pictures import columns_for, grid
from ddpm_hf.utils.seeds import image_generators

FORMATS = ("png", "npy", "parquet")
SHARD = 1000  # images per parquet file
SETTINGS = "sampling.json"
GRID, COMPARISON = "grid.png", "compare.png"  # pictures of `ddpm-hf sample`, which may be in the same folder
SHOWN = 64  # samples in the grid
MOST_COLUMNS = 16  # of the grid, one per class
ARGUMENTS = {
    "output": path,
    "num_images": integer(1),
    "batch_size": BATCH,
    "seed": integer(0, 2**63 - 1),
    "format": optional(one_of(*FORMATS)),
    "scheduler": optional(
        matching(lambda v: isinstance(v, str), "must be a name; set pipeline.scheduler for an object")
    ),
}


@checked(ARGUMENTS)
def sample_to_folder(
    pipeline: DDPMCustomPipeline,
    output,
    num_images: int,
    batch_size: int = 64,
    seed: int = 0,
    format: str | None = None,
    class_labels: int | str | list[int | str] | None = None,
    guidance_scale: float = 1.0,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    clip_sample: bool | None = None,
) -> int:
    """Write samples 0 ... `num_images` - 1, except those that exist already, and return how many were generated.

    Sample k depends only on (`seed`, k), not on the batch (up to 1e-6), on the process or on earlier samples. Each
    process of a launcher (`RANK`, `WORLD_SIZE`) generates its own part without communication. Files are written
    atomically.

    Args:
        output: the folder. Its `sampling.json` records the settings.
        format: `"png"` and `"npy"` (float32 (H, W, C), any number of channels) write one file per image, batch by
            batch. `"parquet"` writes files of 1,000 PNG images, which `datasets` reads, with the columns `image` and,
            for a class-conditional model, `label`. `None`: PNG if it can hold the images, or else npy. Images of a
            model with `value_range` have the pixel values of its training images, with 16 bits in PNG; others have
            0 ... 255 in PNG and [0, 1] in npy.
        class_labels: sample k has label k modulo their number.
        guidance_scale, scheduler (a name), num_inference_steps, clip_sample: arguments of the pipeline's call.

    Raises:
        ValueError: an argument is invalid, the folder holds samples of other settings or other files, or samples are
            not finite; nothing of that batch is written.
    """
    output = Path(output)
    format = ("npy" if _not_in_png(pipeline.unet.config) else "png") if format is None else format
    _check_output(output, format, pipeline.unet.config)
    labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
    scheduler, num_inference_steps = pipeline.sampler(scheduler, num_inference_steps)
    of_call = {
        "guidance_scale": float(guidance_scale),
        "scheduler": scheduler,
        "clip_sample": clip_sample,
        "num_inference_steps": num_inference_steps,
    }
    pipeline.check_call(class_labels=labels, **of_call)  # before anything is written
    settings = {"model": _checksum(pipeline), "seed": seed, "format": format, "class_labels": labels, **of_call}
    _check_settings(output, settings)

    def generate(numbers: Sequence[int]) -> np.ndarray:
        classes = {} if labels is None else {"class_labels": [labels[k % len(labels)] for k in numbers]}
        generators = image_generators(seed, numbers)
        return pipeline(len(numbers), generators, output_type="np", **classes, **of_call).images  # (B, H, W, C)

    folder = _SampleFolder(output, settings, batch_size, generate, pipeline.unet.config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    unit = SHARD if format == "parquet" else batch_size
    parts = [range(k, min(k + unit, num_images)) for k in range(rank * unit, num_images, world * unit)]
    made = 0
    lock = locked(output, "sample") if rank == 0 else contextlib.nullcontext()
    # The progress bar is closed before an error is printed, so that the error has a line of its own.
    with lock, tqdm(total=sum(map(len, parts)), unit=" images", disable=rank != 0) as bar:
        if rank == 0:
            clear_parts(output)
        for numbers in parts:
            made += folder.fill_shard(numbers) if format == "parquet" else folder.fill_files(numbers)
            bar.update(len(numbers))
    return made


def _check_output(output: Path, format: str, unet_config: Mapping) -> None:
    if format != "npy" and (why := _not_in_png(unet_config)):
        raise ValueError(f"format={format!r} {why}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; it must be a folder or not exist yet")


@dataclass
class _SampleFolder:
    """A folder of samples.

    Args:
        output: its path. The folder is created with the first sample, so a model that fails leaves nothing behind.
        settings: the content of its `sampling.json`.
        batch_size: images per batch.
        generate: maps numbers of samples to images (B, H, W, C) in [0, 1].
        unet_config: gives the number and the names of the classes.
    """

    output: Path
    settings: dict
    batch_size: int
    generate: Callable[[Sequence[int]], np.ndarray]
    unet_config: Mapping

    def fill_files(self, numbers: range) -> int:
        """Generate the samples that have no file yet, as one batch, and return how many."""
        format = self.settings["format"]
        paths = {k: self.output / f"{k:06d}.{format}" for k in numbers}
        missing = [k for k, path in paths.items() if not _is_whole(path)]
        for k, image in zip(missing, self.generate(missing) if missing else (), strict=True):
            self._write(paths[k], _encoded(image, format, _pixel_values(self.unet_config)))
        return len(missing)

    def fill_shard(self, numbers: range) -> int:
        """Generate the samples that are missing from their parquet file, and return how many."""
        import datasets
        import pyarrow.parquet

        path, labels = _shard(self.output, numbers.start // SHARD), self.settings["class_labels"]
        images = []
        if _is_whole(path):
            images = [row["bytes"] for row in pyarrow.parquet.read_table(path)["image"].to_pylist()]
        missing = numbers[len(images) :]
        if not missing:
            return 0
        for k in range(0, len(missing), self.batch_size):
            batch = self.generate(missing[k : k + self.batch_size])
            images += [_encoded(image, "png", _pixel_values(self.unet_config)) for image in batch]
        columns, features = {"image": [{"bytes": image, "path": None} for image in images]}, {"image": datasets.Image()}
        if labels is not None:
            names = self.unet_config.class_names or [str(k) for k in range(self.unet_config.num_classes)]
            of_images = [labels[k % len(labels)] for k in numbers]
            columns["label"] = [names.index(label) if label in names else label for label in of_images]
            features["label"] = datasets.ClassLabel(names=names)
        file = io.BytesIO()
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
        self._write(path, file.getvalue())
        return len(missing)

    def _write(self, path: Path, content: bytes) -> None:
        if not (self.output / SETTINGS).exists():
            self.output.mkdir(parents=True, exist_ok=True)
            write(self.output / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        write(path, content)


def _shard(output: Path, number: int) -> Path:
    """The path of a parquet file, from 0."""
    return output / f"samples-{number:05d}.parquet"


def _is_whole(path: Path) -> bool:
    """Whether a sample exists. After a power failure, a file system may have kept its name without its content."""
    return path.exists() and path.stat().st_size > 0


def _checksum(pipeline) -> str:
    """A checksum of the weights and the scheduler's configuration."""
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(output: Path, settings: dict) -> None:
    """Raise ValueError if the folder holds samples of other settings, or other files."""
    path = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    # List the files before reading the settings: another process may be writing the settings now, then its images.
    files = output.iterdir() if output.exists() else ()
    others = [file for file in files if file.name not in (GRID, COMPARISON) and not file.name.startswith(".")]
    if path.exists():
        try:
            before = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{error}, so the settings of the samples in that folder are unknown: choose another folder"
            ) from error
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                there = f"{output} holds samples made with {name}={before.get(name)!r}"
                raise ValueError(f"{name}={settings.get(name)!r}: {there}; choose another folder")
    elif others:
        raise ValueError(f"output={str(output)!r} holds other files: choose a folder that is empty or does not exist")


def _not_in_png(unet_config: Mapping) -> str | None:
    """Why PNG files can't hold a model's images; `None` if they can."""
    channels, (low, high) = unet_config["in_channels"], _pixel_values(unet_config)
    if mode_for(unet_config) is None:
        return f"holds gray or RGB, perhaps with alpha, and this model has {channels} bands: use npy"
    if low < 0 or high > 2**16 - 1 or high - low < 255:
        return f"holds whole numbers up to 65535, and this model has pixel values of {low:g} ... {high:g}: use npy"
    if channels > 1 and (low, high) != EIGHT_BITS and importlib.util.find_spec("imagecodecs") is None:
        return f"of {channels} channels of 16 bits needs `pip install ddpm-hf[train]`; npy does not"
    return None


def _pixel_values(unet_config: Mapping) -> tuple[float, float]:
    """The pixel values of black and white in the files of a model's images."""
    return tuple(unet_config.get("value_range") or EIGHT_BITS)


def _encoded(image: np.ndarray, format: str, value_range: tuple[float, float]) -> bytes:
    """An image (H, W, C) in [0, 1] as the content of a file."""
    file = io.BytesIO()
    if format == "npy":
        low, high = (0, 1) if value_range == EIGHT_BITS else value_range
        np.save(file, (low + image * (high - low)).astype(np.float32))
    elif value_range == EIGHT_BITS:
        to_pil(image[None])[0].save(file, "PNG")
    else:
        low, high = _of_channels(image.shape[2], value_range)
        pixels = (low + image.astype(np.float64) * (high - low)).round().astype(np.uint16)
        if pixels.shape[2] > 1:  # Pillow writes only gray images of 16 bits
            import imagecodecs

            return imagecodecs.png_encode(np.ascontiguousarray(pixels))
        Image.fromarray(pixels[..., 0]).save(file, "PNG")
    return file.getvalue()


def _decoded(content: bytes, format: str, value_range: tuple[float, float]) -> np.ndarray:
    """The inverse of `_encoded`, up to rounding."""
    if format == "npy":
        low, high = (0, 1) if value_range == EIGHT_BITS else value_range
        return (np.load(io.BytesIO(content)) - low) / (high - low)
    image = Image.open(io.BytesIO(content))
    if value_range == EIGHT_BITS or image.mode.startswith("I"):
        pixels = np.asarray(image)
    else:
        import imagecodecs

        pixels = imagecodecs.png_decode(content)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    low, high = _of_channels(pixels.shape[2], value_range)
    return ((pixels - low) / (high - low)).clip(0, 1)


def _of_channels(channels: int, value_range: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The pixel values of 0 and 1 in each channel of a PNG file, where full opacity is always the largest number."""
    low, high = (np.full(channels, value) for value in value_range)
    if mode_of(channels) in ("LA", "RGBA") and value_range != EIGHT_BITS:
        low[-1], high[-1] = 0, 2**16 - 1
    return low, high


def draw_grid(output, unet_config: Mapping, scale: int | None = None) -> Path:
    """Draw the first samples of a folder that `sample_to_folder` filled, and return the path of the picture.

    The classes that samples take in turn are the columns; if there are many, their names stand below the images.

    Args:
        scale: how many times an image is enlarged; see `grid`.
    """
    output = Path(output)
    settings = read_json(output / SETTINGS)
    format, value_range = settings["format"], _pixel_values(unet_config)
    if format == "parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(_shard(output, 0))["image"][:SHOWN].to_pylist()
        files = {k: row["bytes"] for k, row in enumerate(rows)}
    else:
        paths = {k: output / f"{k:06d}.{format}" for k in range(SHOWN)}
        files = {k: path.read_bytes() for k, path in paths.items() if _is_whole(path)}
    images, texts = [_decoded(file, format, value_range) for file in files.values()], {}
    height, width, channels = images[0].shape
    alpha = unet_config.get("has_alpha")
    columns = min(len(images), columns_for(SHOWN, (channels, height, width), alpha))
    if labels := settings["class_labels"]:
        known = unet_config.get("class_names")
        names = [known[label] if known and isinstance(label, int) else str(label) for label in labels]
        if 1 < len(names) <= MOST_COLUMNS:
            columns, texts = len(names), {"column_names": names}
        else:
            texts = {"captions": [names[k % len(names)] for k in files]}
    save_picture(grid(images, columns, scale, **texts, has_alpha=alpha), output / GRID)
    return output / GRID
