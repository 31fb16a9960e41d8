"""The pictures of the page of `ddpm-hf demo`: samples, interpolations and films, and how long they take."""

import copy
import math
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from ddpm_hf.pipelines.editing import slerp
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, num_classes
from ddpm_hf.schedulers.noise import draw_noise
from ddpm_hf.schedulers.solvers import SOLVERS, scheduler_class
from ddpm_hf.utils.pictures import Film, grid, save_film, to_unit_range
from ddpm_hf.utils.seeds import image_generators, seeded_generator

OWN, EACH = "", -1  # choices on the page: the model's own solver, and each class in turn
LARGEST_SEED = 2**53 - 1  # JavaScript's largest exact integer
FILM_FRAMES, SHEET_FRAMES = 40, 10
LONGEST = 60.0  # seconds that a drawing may be expected to take
OPENING = 30.0  # seconds in which the samples that the page opens with should be made


@dataclass
class Pace:
    """The measured time of sampling: a step with n images takes `step` + n `image` seconds.

    Images of one step share its overhead, so both are measured.
    """

    step: float
    image: float

    def seconds(self, number: int, steps: int, solver: str = OWN, guidance_scale: float = 1) -> float:
        """The expected time; guidance doubles the images, and solvers of order 2 the steps."""
        order = getattr(getattr(diffusers, SOLVERS.get(solver, ""), None), "order", 1)
        return order * steps * (self.step + self.image * number * (1 if guidance_scale == 1 else 2))

    def sentence(self, number: int, steps: int, solver: str = OWN, guidance_scale: float = 1) -> str:
        """What the visitor is told before sampling.

        Raises:
            ValueError: it would take longer than `LONGEST`.
        """
        seconds = self.seconds(number, steps, solver, guidance_scale)
        what = f"{number} image{'s' * (number > 1)} in {steps} step{'s' * (steps > 1)}"
        if seconds > LONGEST:
            raise ValueError(
                f"{what} would take about {seconds:.0f} s here, but this page draws for at most {LONGEST:.0f} s: "
                "choose fewer images or steps, or use the command `ddpm-hf sample`"
            )
        return f"{what}: about {max(0.1, seconds):.{seconds < 10:d}f} s."


def open_with_samples(pipeline) -> tuple[int, int, Pace, tuple]:
    """Draw the samples that the page opens with, and measure the time of a step.

    A progress bar is shown on the terminal. A slow model draws fewer samples, and then takes fewer steps.

    Returns:
        The numbers of images and of steps, the pace, and what `draw_samples` returns.
    """
    most = min(2 * len(class_names(pipeline)) or 16, 20)
    steps = min(50, pipeline.scheduler.config.num_train_timesteps)

    def draw(number: int, steps: int, words: str) -> tuple[float, tuple]:
        twin, began = own_copy(pipeline), time.perf_counter()
        twin.set_progress_bar_config(desc=words, unit="step", leave=number > 1)
        drawn = draw_samples(twin, number, OWN, steps, 0, EACH, 1)
        return (time.perf_counter() - began) / steps, drawn

    first = draw(1, 1, "Measuring the time of a step")[0]
    one = draw(1, max(1, min(steps, int(0.5 / first))), "Measuring the time of a step")[0]  # later steps are faster
    steps = min(steps, max(10, int(OPENING / one)))
    number = max(1, min(most, int(OPENING / (steps * one))))
    all, drawn = draw(number, steps, f"Drawing {number} samples to open the page with")
    image = max(0.0, all - one) / (number - 1) if number > 1 else one
    return number, steps, Pace(max(0.0, one - image), image), drawn


def own_copy(pipeline: DDPMCustomPipeline) -> DDPMCustomPipeline:
    """A pipeline with the same network, and a scheduler of its own: calls of several copies can run at a time."""
    twin = copy.copy(pipeline)
    twin.scheduler = copy.deepcopy(pipeline.scheduler)
    twin.set_progress_bar_config(disable=True)
    return twin


def draw_samples(pipeline, number, solver, steps, seed, label, guidance_scale, progress=None):
    """Draw samples 0 ... `number` - 1 of `seed`.

    Args:
        solver: a name, or `OWN`.
        label: a class, or `EACH`. An unconditional model ignores it and `guidance_scale`.
        progress: called with (steps done, number of steps) after each step; an exception that it raises ends sampling.

    Returns:
        A picture, and a text with the time and the command that generates the same samples as files.

    Raises:
        ValueError: the pipeline does not accept an argument.
    """
    began, labels, names = time.perf_counter(), _labels(pipeline, label, number), class_names(pipeline)
    settings = _settings(pipeline, solver, steps, labels, guidance_scale, progress)
    images = pipeline(number, _generators(seed, number), output_type="np", **settings).images
    took = time.perf_counter() - began
    words = ["ddpm-hf", "sample", pipeline.name_or_path or "MODEL", "--num_images", number, "--seed", seed]
    words += ["--num_inference_steps", steps] + (["--scheduler", solver] if solver else [])
    if names:
        words += ["--guidance_scale", guidance_scale, "--class_labels", *dict.fromkeys(names[k] for k in labels)]
    in_columns = label == EACH and 1 < len(names) <= min(number, 10)
    columns = len(names) if in_columns else math.ceil(math.sqrt(number))
    command = shlex.join(map(str, words))
    return _picture(
        pipeline, images, columns, names if in_columns else ()
    ), f"{took:.2f} s. The same images as files:\n```\n{command}\n```"


def draw_interpolation(
    pipeline, method, number, steps, t, seed_a, seed_b, label_a, label_b, guidance_scale, progress=None
):
    """Draw `number` images between the first samples of two seeds.

    Args:
        method: `"mix"` adds noise up to timestep `t` to the two samples, mixes them and denoises the mixtures; the
            samples themselves are drawn at both ends. `"slerp"` interpolates between the noises of the two seeds on an
            arc, and samples with DDIM.
        label_a, label_b: classes of the first and of the second half of the row.
        others: see `draw_samples`.

    Returns:
        A picture, and a text with the time.
    """
    began, generators = time.perf_counter(), _generators(seed_a, 1) + _generators(seed_b, 1)
    labels = [label_a] * (number - number // 2) + [label_b] * (number // 2)
    of_call = (pipeline, scheduler_class(pipeline.scheduler.config).deterministic if method == "slerp" else OWN, steps)
    settings = {"output_type": "pt", **_settings(*of_call, labels, guidance_scale, progress)}
    if method == "slerp":
        a, b = (draw_noise((1, *pipeline.image_shape), each, "cpu", torch.float32) for each in generators)
        noise = slerp(a, b, torch.linspace(0, 1, number).reshape(-1, 1, 1, 1))
        row, note = pipeline(latents=noise, **settings).images, "The first and the last are the samples of the seeds."
    else:
        of_ends = _settings(*of_call, [label_a, label_b], guidance_scale, progress)
        ends = pipeline(2, generators, output_type="pt", **of_ends).images
        again = seeded_generator(seed_a, "interpolation", seed_b)
        row = pipeline.interpolate(*ends, t, number, method, generator=again, **settings).images
        row, note = torch.cat([ends[:1], row, ends[1:]]), "Between the two samples are their denoised mixtures."
    images = row.permute(0, 2, 3, 1).cpu().numpy()
    return _picture(pipeline, images, len(images), width=1200), f"{time.perf_counter() - began:.2f} s. {note}"


def draw_film(folder, pipeline, number, solver, steps, seed, label, guidance_scale, of, progress=None):
    """Make a film of the samples that `draw_samples` draws.

    Args:
        folder: a `TemporaryDirectory` for the film.
        of: `"samples"` or `"pred_original_samples"`, the attribute of `Film`.
        others: see `draw_samples`.

    Returns:
        The path of the film, a contact sheet, and a text with the time.
    """
    began, labels, film = time.perf_counter(), _labels(pipeline, label, number), Film()
    settings = _settings(pipeline, solver, steps, labels, guidance_scale, progress, film)
    pipeline(number, _generators(seed, number), output_type="latent", **settings)
    frames = np.stack([to_unit_range(frame) for frame in getattr(film, of)], axis=1)  # (B, frames, H, W, C)
    names = [class_names(pipeline)[k] for k in labels] if class_names(pipeline) else ()
    path = Path(folder.name, f"film-{secrets.token_hex(8)}.webp")  # lossless, and smaller than a GIF
    save_film([_picture(pipeline, frames[:, k], number, names) for k in range(frames.shape[1])], path)
    sheet = frames[:, _spread(frames.shape[1], SHEET_FRAMES)]
    picture = _picture(pipeline, sheet.reshape(-1, *sheet.shape[2:]), sheet.shape[1])
    return path, picture, f"{time.perf_counter() - began:.2f} s, {frames.shape[1]} frames."


def _picture(
    pipeline, images: np.ndarray, columns: int, names: Sequence[str] = (), width: int = 780, height: int = 560
) -> Image.Image:
    """A `grid` of images (N, H, W, C) in [0, 1], enlarged by the largest integer that fits `width` x `height`.

    `names`: of the columns.
    """
    alpha = pipeline.unet.config.get("has_alpha")
    least = grid(images, columns, 1, has_alpha=alpha)
    scale = max(1, min(width // least.width, height // least.height))
    return grid(images, columns, scale, column_names=names, has_alpha=alpha)


def _spread(total: int, most: int) -> list[int]:
    """At most `most` indices in 0 ... `total` - 1, evenly spaced from the first to the last."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(int).tolist()


def _generators(seed, number: int) -> list[torch.Generator]:
    if not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed!r} must be an integer in 0 ... 2^53 - 1")
    return image_generators(seed, range(number))


def class_names(pipeline) -> list[str]:
    """The names of the classes; [] for an unconditional model."""
    return pipeline.unet.config.get("class_names") or [str(k) for k in range(num_classes(pipeline.unet) or 0)]


def _labels(pipeline, label, number: int) -> list[int]:
    return [k % max(1, len(class_names(pipeline))) if label == EACH else label for k in range(number)]


def _settings(pipeline, solver, steps, labels, guidance_scale, progress, film=None) -> dict:
    """Arguments of a pipeline call that reports each step to `progress`, and evenly spaced steps to `film`."""

    def on_step(pipeline, step, timestep, tensors):
        if progress is not None:
            progress((step + 1, pipeline.num_timesteps))
        if film is not None:
            film.steps = _spread(pipeline.num_timesteps, FILM_FRAMES)
            film(pipeline, step, timestep, tensors)

    classes = {"class_labels": torch.tensor(labels), "guidance_scale": guidance_scale} if class_names(pipeline) else {}
    return {"num_inference_steps": steps, "scheduler": solver or None, "callback_on_step_end": on_step, **classes}
