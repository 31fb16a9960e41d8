"""Pictures of several images: grids, captions, contact sheets and films."""

import importlib.util
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ddpm_hf.utils.files import writing

LONGEST_NAME = 24  # letters
FILMS = (".gif", ".webp", ".mp4")


def to_unit_range(images: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1], clamped to it -> (B, H, W, C) in [0, 1].

    Raises:
        ValueError: images hold NaN or infinities.
    """
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise ValueError(f"the samples are not finite: {bad} of {len(images)} images hold NaN or infinities")
    return (images / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int, scale: int = 1, modes=(1, 2, 3, 4)) -> Image.Image:
    """Draw images (N, H, W, C) in [0, 1] row by row, one pixel apart, each enlarged `scale` times.

    Images whose number of channels is not in `modes` are drawn as their channels side by side, in gray.
    """
    if images.shape[-1] not in modes:
        images = np.concatenate(np.split(images, images.shape[-1], axis=-1), axis=2)
    n, height, width, _ = images.shape
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + 1, width * scale + 1
    canvas = np.ones((rows * cell_h - 1, columns * cell_w - 1, images.shape[-1]))
    for k, image in enumerate(images):
        top, left = k // columns * cell_h, k % columns * cell_w
        canvas[top : top + cell_h - 1, left : left + cell_w - 1] = image
    pixels = (canvas * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def with_caption(picture: Image.Image, lines: list[str]) -> Image.Image:
    """The picture with lines of text below it."""
    font = ImageFont.load_default(size=13)
    width = max(picture.width, *(math.ceil(font.getlength(line)) + 12 for line in lines))
    canvas = Image.new("RGB", (width, picture.height + 17 * len(lines) + 8), "white")
    canvas.paste(picture.convert("RGB"), (0, 0))
    pen = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        pen.text((6, picture.height + 4 + 17 * k), line, "black", font)
    return canvas


def with_row_names(picture: Image.Image, names: list[str]) -> Image.Image:
    """The picture with a name to the left of each of its rows, which have equal heights."""
    font = ImageFont.load_default(size=13)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in names]
    margin = max(math.ceil(font.getlength(name)) for name in names) + 12
    mode = "RGBA" if picture.mode in ("LA", "RGBA") else "RGB"
    canvas = Image.new(mode, (margin + picture.width, picture.height), "white")
    canvas.paste(picture.convert(mode), (margin, 0))
    pen, height = ImageDraw.Draw(canvas), picture.height / len(names)
    for k, name in enumerate(names):
        pen.text((6, (k + 0.5) * height), name, "black", font, anchor="lm")
    return canvas


def save_film(frames: list[Image.Image], path, seconds: float = 4.0, hold: float = 2.0) -> None:
    """Save a film that lasts `seconds` and shows its last frame for `hold` seconds more; .gif and .webp repeat.

    Raises:
        ValueError: the suffix is not .gif, .webp or .mp4, or it is .mp4 without imageio-ffmpeg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILMS:
        raise ValueError(f"{str(path)!r} must be the name of a film, with one of the suffixes {', '.join(FILMS)}")
    if suffix == ".mp4":
        with writing(path) as beside:
            return _save_mp4(frames, beside, seconds, hold)
    durations = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    durations[-1] += round(1000 * hold)
    exact = {"lossless": True} if suffix == ".webp" else {}
    with writing(path) as beside:
        frames[0].save(beside, save_all=True, append_images=frames[1:], duration=durations, loop=0, **exact)


def _save_mp4(frames: list[Image.Image], path, seconds: float, hold: float) -> None:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"{str(path)!r}: .mp4 needs `pip install ddpm-hf[film]`; .gif and .webp do not")
    import imageio_ffmpeg

    fps = len(frames) / seconds
    width, height = (-(-side // 2) * 2 for side in frames[0].size)  # the encoder needs even sides
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2, quality=8)
    writer.send(None)
    for frame in [*frames, *frames[-1:] * round(hold * fps)]:
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(frame.convert("RGB"), (0, 0))
        writer.send(np.ascontiguousarray(canvas))
    writer.close()


class Film:
    """Records sampling: pass it to a pipeline as `callback_on_step_end`.

    Args:
        steps: indices of the steps to record, from 0; `None` records all.

    Attributes (of the last call):
        timesteps: the timestep of each frame.
        samples: (frames, B, C, H, W) in the model's range, x after each recorded step.
        pred_original_samples: (frames, B, C, H, W), the prediction of x_0 in each recorded step.
    """

    def __init__(self, steps: Collection[int] | None = None):
        self.steps = steps
        self.timesteps, self._samples, self._originals = [], [], []

    def __call__(self, pipeline, step: int, timestep, tensors: dict) -> None:
        if step == 0:  # a new call
            self.timesteps, self._samples, self._originals = [], [], []
        if self.steps is None or step in self.steps:
            self.timesteps.append(float(timestep))
            self._samples.append(tensors["sample"].float().cpu())
            if tensors["pred_original_sample"] is not None:
                self._originals.append(tensors["pred_original_sample"].float().cpu())

    @property
    def samples(self) -> torch.Tensor:
        if not self._samples:
            raise ValueError("the film has no frames yet: pass it to a pipeline as callback_on_step_end")
        return torch.stack(self._samples)

    @property
    def pred_original_samples(self) -> torch.Tensor:
        if not self._originals:
            raise ValueError("pred_original_samples: the film has no frames yet, or the scheduler does not predict x_0")
        return torch.stack(self._originals)

    def contact_sheet(self, of: str = "samples", scale: int = 1) -> Image.Image:
        """A picture with one row per image and one column per frame. `of`: "samples" or "pred_original_samples"."""
        frames = self._frames(of)
        return grid(np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:]), len(frames), scale)

    def save(self, path, of: str = "samples", scale: int = 1, seconds: float = 4.0) -> None:
        """Save the images side by side as .gif, .webp or .mp4."""
        frames = self._frames(of)
        columns = math.ceil(math.sqrt(len(frames[0])))
        save_film([grid(frame, columns, scale) for frame in frames], path, seconds)

    def _frames(self, of: str) -> list[np.ndarray]:
        if of not in ("samples", "pred_original_samples"):
            raise ValueError(f"of={of!r}; choose from samples, pred_original_samples")
        return [to_unit_range(frame) for frame in getattr(self, of)]
