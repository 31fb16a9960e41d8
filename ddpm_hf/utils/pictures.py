"""Pictures of several images: grids with titles and names, contact sheets and films."""

import functools
import importlib.util
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ddpm_hf.utils.arguments import mode_of
from ddpm_hf.utils.files import write, writing

CELL = 60  # pixels, the least that the longer side of an image has in a picture
GRAY = "#808080"  # between images, where white would prolong white strokes and black would prolong black ones
CHECKERBOARD = 0.9, 0.7  # behind transparent pixels
NAMES = {"L": ["gray"], "LA": ["gray", "alpha"], "RGB": ["red", "green", "blue"],
         "RGBA": ["red", "green", "blue", "alpha"]}  # fmt: skip
LONGEST_NAME = 24  # letters
FILMS = (".gif", ".webp", ".mp4")
FILMED = {"samples": "x after the step", "pred_original_samples": "prediction of x_0"}


def to_unit_range(images: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1], clamped to it -> (B, H, W, C) in [0, 1].

    Raises:
        ValueError: images hold NaN or infinities.
    """
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise ValueError(f"the samples are not finite: {bad} of {len(images)} images hold NaN or infinities")
    return (images / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()


def channel_names(channels: int, has_alpha: bool | None = None) -> list[str]:
    """What each channel of an image is: a colour, alpha (opacity) or a numbered band. `has_alpha`: see `grid`."""
    return NAMES.get(mode_of(channels, has_alpha)) or [f"band {k + 1}" for k in range(channels)]


def columns_for(number: int, shape: Sequence[int], has_alpha: bool | None = None) -> int:
    """The columns that make a picture of images (C, H, W) about as wide as high; all bands are drawn."""
    channels, height, width = shape
    drawn = channels if mode_of(channels, has_alpha) is None else 1
    return max(1, min(number, math.ceil(math.sqrt(number * height / (width * drawn)))))


def grid(
    images: Sequence[np.ndarray | Image.Image | None] | np.ndarray,
    columns: int,
    scale: int | None = None,
    *,
    title: str = "",
    column_names: Sequence[str] = (),
    row_names: Sequence[str] = (),
    captions: Sequence[str] = (),
    notes: str = "",
    gaps: Mapping[int, int] | None = None,
    has_alpha: bool | None = None,
) -> Image.Image:
    """Draw images row by row on gray, so that no stroke of an image meets a stroke of its neighbour.

    Gaps and margins are a sixth of the longer side, or a third of the shorter one if that is less. Alpha is shown by
    a checkerboard. Images of bands are drawn as one gray image per band. The picture has the mode L or RGB.

    Args:
        images: (N, H, W, C) in [0, 1], or a list of such arrays, PIL images of 8 bits per channel, and `None`, which
            leaves its place empty.
        columns: images per row.
        scale: how many times an image is enlarged; by default until its longer side has `CELL` pixels or more.
        title, notes: lines above and below all images.
        column_names, captions: texts above the columns and below the images. If there are fewer texts than columns or
            images, each belongs to equally many of them.
        row_names: texts to the left of the rows.
        gaps: {column: width of the gap before it, as a multiple of the others}.
        has_alpha: whether the last of 2 or 4 channels is alpha. If not, the channels are bands, as 5 or more are. None:
            it is.
    """
    images = [_to_array(image) if isinstance(image, Image.Image) else image for image in images]
    height, width, channels = next(image.shape for image in images if image is not None)
    scale = scale or max(1, -(-CELL // max(height, width)))
    gutter = max(1, round(scale * min(max(height, width), 2 * min(height, width)) / 6))
    kind = mode_of(channels, has_alpha)
    cells = [None if image is None else _cell(image, scale, gutter // 2, kind) for image in images]
    mode, (width, height) = next((cell.mode, cell.size) for cell in cells if cell is not None)
    row_names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in row_names]
    font = ImageFont.load_default(size=max(13, round(1.2 * gutter)))
    line = round(1.3 * font.size)
    of_name, of_caption = (n // max(1, len(texts)) for n, texts in ((columns, column_names), (len(cells), captions)))
    # Texts that are wider than their images move the columns apart.
    pitch = max(width + gutter, *(
        -(-(_longest(texts, font) + gutter) // of) for texts, of in ((column_names, of_name), (captions, of_caption))
    ))  # fmt: skip
    left = gutter + (_longest(row_names, font) + gutter if row_names else 0) + (pitch - gutter - width) // 2
    wider = [gutter * sum(n - 1 for at, n in (gaps or {}).items() if at <= k) for k in range(columns)]
    lefts = [left + k * pitch + wider[k] for k in range(columns)]
    top, below = gutter + (line if column_names else 0), height + gutter + (line if captions else 0)
    size = lefts[-1] + (pitch + width + gutter) // 2, top + -(-len(cells) // columns) * below
    canvas = Image.new(mode, size, GRAY)
    pen = ImageDraw.Draw(canvas)
    for k, cell in enumerate(cells):
        if cell is not None:
            canvas.paste(cell, (lefts[k % columns], top + k // columns * below))
    texts = [(name, k * of_name, of_name, gutter // 2) for k, name in enumerate(column_names)]
    texts += [
        (caption, k * of_caption % columns, of_caption, top + k * of_caption // columns * below + height + gutter // 4)
        for k, caption in enumerate(captions)
    ]
    for text, first, number, y in texts:
        pen.text(((lefts[first] + lefts[first + number - 1] + width) / 2, y), text, "black", font, anchor="ma")
    for k, name in enumerate(row_names):
        pen.text((gutter, top + k * below + height / 2), name, "black", font, anchor="lm")
    if kind is None:
        title = f"{title}\neach image: its {channels} bands from left to right".strip()
    return _with_lines(canvas, title, notes, font, gutter)


def _to_array(image: Image.Image) -> np.ndarray:
    """A picture of 8 bits per channel -> (H, W, C) in [0, 1]."""
    pixels = np.asarray(image) / 255
    return pixels.reshape(*pixels.shape[:2], -1)


def _cell(image: np.ndarray, scale: int, gap: int, mode: str | None) -> Image.Image:
    """One enlarged image (H, W, C) in [0, 1] of `mode`, as L or RGB. Without a mode it is bands, `gap` pixels apart."""
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width, channels = image.shape
    if mode in ("LA", "RGBA"):
        square = max(1, round(max(height, width) / 8))
        rows, columns = np.arange(height)[:, None, None] // square, np.arange(width)[:, None] // square
        image, opacity = image[..., :-1], image[..., -1:]
        image = opacity * image + (1 - opacity) * np.where((rows + columns) % 2, *CHECKERBOARD)
    pixels = (image * 255).round().astype(np.uint8)
    if mode is not None:
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    bands = Image.new("L", (channels * (width + gap) - gap, height), GRAY)
    for k in range(channels):
        bands.paste(Image.fromarray(pixels[..., k]), (k * (width + gap), 0))
    return bands


def _longest(texts: Sequence[str], font) -> int:
    """The width of the longest text in pixels."""
    return max((math.ceil(font.getlength(text)) for text in texts), default=0)


def _with_lines(picture: Image.Image, above: str, below: str, font, margin: int) -> Image.Image:
    """The picture with lines of text above and below it."""
    line = round(1.3 * font.size)
    upper, lower = (text.split("\n") if text else [] for text in (above, below))
    top = margin + line * len(upper) if upper else 0
    width = max(picture.width, _longest([*upper, *lower], font) + 2 * margin)
    height = top + picture.height + (line * len(lower) + margin if lower else 0)
    canvas = Image.new(picture.mode, (width, height), GRAY)
    canvas.paste(picture, (0, top))
    pen = ImageDraw.Draw(canvas)
    for first, texts in ((margin, upper), (top + picture.height, lower)):
        for k, text in enumerate(texts):
            pen.text((margin, first + line * k), text, "black", font)
    return canvas


def save_film(
    frames: list[Image.Image], path, seconds: float = 4.0, hold: float = 2.0, most_bytes: int | None = None
) -> None:
    """Save a film that lasts `seconds` and shows its last frame for `hold` seconds more; .gif and .webp repeat.

    Args:
        most_bytes: a .gif that is larger has fewer colours, then fewer frames; `None` keeps them all.

    Raises:
        ValueError: the suffix is not .gif, .webp or .mp4, or it is .mp4 without imageio-ffmpeg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILMS:
        raise ValueError(f"{str(path)!r} must be the name of a film, with one of the suffixes {', '.join(FILMS)}")
    width, height = (max(frame.size[axis] for frame in frames) for axis in (0, 1))
    if suffix == ".mp4":
        width, height = width + width % 2, height + height % 2  # the encoder needs even sides
        with writing(path) as beside:
            return _save_mp4([_padded(frame, width, height) for frame in frames], beside, seconds, hold)
    frames = [_padded(frame, width, height) for frame in frames]
    exact = {"lossless": True} if suffix == ".webp" else {}
    for kept in [frames] if most_bytes is None or suffix != ".gif" else _ever_smaller(frames):
        durations = [max(20, round(1000 * seconds / len(kept)))] * len(kept)
        durations[-1] += round(1000 * hold)
        file = io.BytesIO()
        kept[0].save(file, suffix[1:], save_all=True, append_images=kept[1:], duration=durations, loop=0, **exact)
        if most_bytes is None or file.tell() <= most_bytes:
            break
    write(path, file.getvalue())


def _padded(frame: Image.Image, width: int, height: int) -> Image.Image:
    if frame.size == (width, height):
        return frame
    canvas = Image.new(frame.mode, (width, height), GRAY)
    canvas.paste(frame, (0, 0))
    return canvas


def _ever_smaller(frames: list[Image.Image]) -> Iterator[list[Image.Image]]:
    """The frames, then versions with fewer colours and frames; the last frame is in all of them."""
    yield frames
    frames = [frame.convert("RGB") for frame in frames]
    pixels = np.concatenate([np.asarray(frame)[::3, ::3].reshape(-1, 3) for frame in frames])
    for colours, every in ((64, 1), (32, 1), (32, 2), (16, 2), (16, 3), (16, 4), (16, 6), (16, 8)):
        palette = Image.fromarray(pixels[None]).quantize(colours)  # one for all frames, which then do not flicker
        yield [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in frames[::-every][::-1]]


def _save_mp4(frames: list[Image.Image], path, seconds: float, hold: float) -> None:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"{str(path)!r}: .mp4 needs `pip install ddpm-hf[film]`; .gif and .webp do not")
    import imageio_ffmpeg

    fps = len(frames) / seconds
    writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, fps=fps, macro_block_size=2, quality=8)
    writer.send(None)
    for frame in [*frames, *frames[-1:] * round(hold * fps)]:
        writer.send(np.ascontiguousarray(frame.convert("RGB")))
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
        self.steps, self.has_alpha = steps, None
        self.timesteps, self._samples, self._originals = [], [], []

    def __call__(self, pipeline, step: int, timestep, tensors: dict) -> None:
        if step == 0:  # a new call
            self.timesteps, self._samples, self._originals = [], [], []
            unet = getattr(pipeline, "unet", None)  # of another pipeline perhaps none
            self.has_alpha = None if unet is None else unet.config.get("has_alpha")
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

    def contact_sheet(self, of: str = "samples", scale: int | None = None) -> Image.Image:
        """A picture with one row per image and one column per frame.

        Args:
            of: "samples" or "pred_original_samples".
            scale: see `grid`.
        """
        frames = self._frames(of)
        images = np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:])
        texts = {"title": f"{FILMED[of]} at timestep t", "column_names": [f"t = {t:.0f}" for t in self.timesteps]}
        return grid(images, len(frames), scale, **texts, has_alpha=self.has_alpha)

    def save(self, path, of: str = "samples", scale: int | None = None, seconds: float = 4.0) -> None:
        """Save the images side by side as .gif, .webp or .mp4. The arguments are those of `contact_sheet`."""
        frames = self._frames(of)
        columns = math.ceil(math.sqrt(len(frames[0])))
        titles = [f"t = {t:.0f}" for t in self.timesteps]
        draw = functools.partial(grid, columns=columns, scale=scale, has_alpha=self.has_alpha)
        save_film([draw(frame, title=title) for frame, title in zip(frames, titles)], path, seconds)

    def _frames(self, of: str) -> list[np.ndarray]:
        if of not in FILMED:
            raise ValueError(f"of={of!r}; choose from {', '.join(FILMED)}")
        return [to_unit_range(frame) for frame in getattr(self, of)]
