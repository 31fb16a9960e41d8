"""The pictures of a run: training images, samples, the loss, films and nearest training images."""

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ddpm_hf.data.dataset import ImageData
from ddpm_hf.data.neighbours import nearest_images
from ddpm_hf.pipelines.images import to_output
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.training.batch import draw_random
from ddpm_hf.training.drawing import forward_process, loss_curve
from ddpm_hf.training.previews import sample_together
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup import MEASURED, MEASURED_NUMBERS
from ddpm_hf.utils.arguments import mode_of
from ddpm_hf.utils.files import save_picture
from ddpm_hf.utils.pictures import channel_names, columns_for, grid, save_film

FILM_FRAMES, FILM_IMAGES, FILM_PIXELS = 40, 20, 2**15  # of these images without enlarging them
FILM_BYTES = 500_000  # pages of the Hub load the film
FIRST_SAMPLES = "first_samples.png"
NEIGHBOURS, NEIGHBOURS_SHOWN = 4, 16
MOST_ROWS = 100  # classes
FEWEST_COMPARED, MOST_HELD_OUT = 16, 256  # images for the medians of distances


def draw_data(run: Run) -> None:
    """Write data.png before the first update: training images as the network sees them, and their statistics."""
    images, (channels, height, width) = run.images, run.images.shape
    shown = images.first(64, run.config.seed)
    draw_random(run.config, 0, torch.arange(len(shown)), len(shown), images.shape).augment_(shown)
    count = "a stream of" if images.num_images is None else f"{images.num_images:,}"
    lines = [f"{count} images of {width}x{height}, {channels} channel{'s' if channels > 1 else ''}; {len(shown)} shown"]
    if isinstance(images, ImageData):
        if images.window:
            lines[0] += f"; random windows of images of {images.pixels.shape[3]}x{images.pixels.shape[2]}"
        low, high = images.value_range
        lines.append(f"{str(images.pixels.dtype).split('.')[-1]}: {low:g} becomes -1 and {high:g} becomes 1")
        if names := images.label_names:
            lines.append(f"{len(names)} classes: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
        number = min(MEASURED, len(images), max(1, MEASURED_NUMBERS // math.prod(images.shape)))
        measured, valid = images.batch_and_valid(images.order.indices(run.config.seed, 0, number))
    else:
        measured, valid = shown, None
    if valid is not None:
        share = 1 - valid.double().mean()
        lines.append(
            f"{share:.2%} of the values are missing and not trained on; {images.fill:g} is shown in their place"
        )
    for k, name in enumerate(channel_names(channels, images.has_alpha)):
        x = measured[:, k] if valid is None or not valid[:, k].any() else measured[:, k][valid[:, k]]
        std, mean = torch.std_mean(x, correction=0)
        numbers = f"{x.min():.3f} ... {x.max():.3f}, mean {mean:.3f}, std {std:.3f}"
        lines.append(f"{name}, over {len(measured):,} images: {numbers}")
    if not run.step:
        (run.output_dir / FIRST_SAMPLES).unlink(missing_ok=True)  # of an earlier run
    picture = grid(
        to_output(shown, "np"),
        columns_for(len(shown), images.shape, images.has_alpha),
        title="training images, as the network sees them",
        notes="\n".join(lines),
        has_alpha=images.has_alpha,
    )
    save_picture(picture, run.output_dir / "data.png")


def draw_pictures(run: Run) -> list[dict]:
    """Draw samples.png and loss.png. All processes call this after a save.

    The first call also draws first_samples.png, which compares EMA and training weights. At the end of training it also
    draws forward.png, denoising.gif and neighbours.png, samples with their nearest training images.

    Returns:
        The distance of samples to training images as a list of one metric, in the main process at the end of training;
        else [].
    """
    config, folder = run.config, run.output_dir
    labels, number, columns = _layout(run)
    is_first = broadcast_object_list([not (folder / FIRST_SAMPLES).exists()])[0]
    steps = config.ddpm_num_inference_steps
    frame_steps = tuple(range(0, steps - 1, max(1, steps // FILM_FRAMES))) if run.finished else ()
    *frames, samples = _sample(run, run.pipeline, number, labels, frame_steps)
    if is_first:
        of_training_weights = _sample_training_weights(run, number, labels)
    if not run.accelerator.is_main_process:
        return []

    rows = () if labels is None else [run.images.label_names[label] for label in labels[::columns]]
    alpha = run.images.has_alpha
    picture = grid(samples, columns, title=f"samples at update {run.step:,}", row_names=rows, has_alpha=alpha)
    save_picture(picture, folder / "samples.png")
    show(run, "samples", picture)
    loss_curve(run.log_history, folder / "loss.png", config.snr_gamma is not None, run.pipeline.scheduler.axis)
    if is_first:
        save_picture(_first_samples(run, [samples, of_training_weights], columns, rows), folder / FIRST_SAMPLES)
    if not run.finished:
        return []
    titles = [f"step {step + 1} of {steps}" for step in (*frame_steps, steps - 1)]
    film = _film(np.stack([*frames, samples]), titles, columns, rows, alpha)
    save_film(film, folder / "denoising.gif", most_bytes=FILM_BYTES)
    save_picture(_forward(run), folder / "forward.png")
    if not isinstance(run.images, ImageData):
        return []
    x = torch.from_numpy(samples).permute(0, 3, 1, 2) * 2 - 1
    found, distances = nearest_images(x, run.images, NEIGHBOURS)
    some = np.linspace(0, number - 1, min(number, NEIGHBOURS_SHOWN)).astype(int)
    save_picture(_neighbours(x[some], found[some], distances[some], alpha), folder / "neighbours.png")
    return nearness(run, distances[:, 0])


def _layout(run: Run) -> tuple[list[int] | None, int, int]:
    """The labels of the samples or None, their number and the columns of their grid, which has a row per class."""
    number = run.config.eval_batch_size
    if not run.config.class_conditional:
        return None, number, columns_for(number, run.images.shape, run.images.has_alpha)
    rows = min(run.pipeline.unet.config.num_classes, max(number, MOST_ROWS))
    columns = max(1, number // rows)
    return [row for row in range(rows) for _ in range(columns)], rows * columns, columns


def _sample(run: Run, pipeline: DDPMCustomPipeline, number: int, labels, frame_steps=()) -> np.ndarray:
    """(frames + 1, number, H, W, C) in [0, 1], see `sample_together`."""
    config, accelerator = run.config, run.accelerator
    pipeline.set_progress_bar_config(desc="samples", leave=False, disable=not accelerator.is_main_process)
    steps, guidance = config.ddpm_num_inference_steps, config.guidance_scale
    return sample_together(accelerator, pipeline, number, steps, config.seed, frame_steps, labels, guidance)


def _sample_training_weights(run: Run, number: int, labels) -> np.ndarray:
    """Samples (number, H, W, C) in [0, 1] with the training weights."""
    # Compiling for this one call, whose shapes differ from those in training, would take longer
    eagerly = torch.compiler.set_stance("force_eager") if run.config.compile else contextlib.nullcontext()
    try:
        with eagerly:
            pipeline = DDPMCustomPipeline(run.unet.eval(), run.pipeline.scheduler, run.config.sampling_scheduler)
            return _sample(run, pipeline, number, labels)[0]
    finally:
        run.unet.train()


def nearness(run: Run, of_samples: torch.Tensor) -> list[dict]:
    """Compare the distances of samples and of held-out images to their nearest training images.

    Args:
        of_samples: the distance of each sample to its nearest training image, (B,), from `nearest_images`.

    Returns:
        A list of one metric as in `Run.metrics`, or [] if there are too few samples or held-out images.
    """
    if run.held_out is None or min(len(of_samples), len(run.held_out)) < FEWEST_COMPARED:
        return []
    compared = min(len(run.held_out), MOST_HELD_OUT)
    held_out = run.held_out.batch(torch.linspace(0, len(run.held_out) - 1, compared).long())  # spread over all classes
    of_held_out = nearest_images(held_out, run.images)[1][:, 0]
    samples, unseen = (d.median().item() / math.prod(run.images.shape) ** 0.5 for d in (of_samples, of_held_out))
    steps, guidance = run.config.ddpm_num_inference_steps, run.config.guidance_scale
    solver = run.pipeline.sampler(None, steps)[0] or "the model's own scheduler"
    guided = f", the same number per class, guidance {guidance:g}" if run.config.class_conditional else ""
    return [
        {
            "type": "nearest_training_image",
            "name": "Distance of samples to the nearest training image, relative to held-out images",
            "value": samples / unseen if unseen else None,
            "split": "train",
            "protocol": f"medians of the root mean square difference of pixels in [-1, 1]: {samples:.4f} of "
            f"{len(of_samples)} samples ({steps} steps of {solver}, "
            f"seed {run.config.seed}{guided}), "
            f"{unseen:.4f} of {len(of_held_out)} held-out images, each to the nearest of {len(run.images):,} training "
            "images; a value near 0 means that the model repeats training images",
        }
    ]


def _first_samples(run: Run, halves: list[np.ndarray], columns: int, row_names: Sequence[str]) -> Image.Image:
    """A picture of samples (B, H, W, C) of the EMA weights on the left, and of the training weights on the right."""
    rows = []
    for start in range(0, len(halves[0]), columns):
        for half in halves:
            row = list(half[start : start + columns])
            rows += row + [None] * (columns - len(row))
    return grid(
        rows,
        2 * columns,
        title=f"samples of the same noise at update {run.step:,}",
        column_names=["EMA weights", "training weights"],
        row_names=row_names,
        gaps={columns: 3},
        has_alpha=run.images.has_alpha,
    )


def _film(
    frames: np.ndarray, titles: list[str], columns: int, row_names: Sequence[str], has_alpha: bool | None = None
) -> list[Image.Image]:
    """Pictures of the frames (F, B, H, W, C), of no more images than a small file can show."""
    number, height, width, channels = frames.shape[1:]
    rows, shown_channels = -(-number // columns), channels if mode_of(channels, has_alpha) is None else 1
    most = max(1, min(FILM_IMAGES, FILM_PIXELS // (height * width * shown_channels)))
    wide = min(columns, max(1, most // rows) if row_names else math.isqrt(most))
    chosen = [k for k in range(number) if k % columns < wide and k // columns < most // wide]
    return [
        grid(frame[chosen], wide, title=title, row_names=row_names[: most // wide], has_alpha=has_alpha)
        for frame, title in zip(frames, titles)
    ]


def _forward(run: Run) -> Image.Image:
    """A picture of training images with ever more noise."""
    noisy, timesteps = forward_process(run.images.first(4, run.config.seed), run.pipeline.scheduler)
    names = ["image", *map(run.pipeline.scheduler.name_of, timesteps)]
    title, alpha = "training images with ever more noise", run.images.has_alpha
    return grid(noisy, len(names), title=title, column_names=names, gaps={1: 2}, has_alpha=alpha)


def _neighbours(samples: torch.Tensor, found: torch.Tensor, distances: torch.Tensor, has_alpha: bool) -> Image.Image:
    """A picture, in two halves, of samples (B, C, H, W) and their nearest training images (B, k, C, H, W).

    Args:
        distances: Euclidean, (B, k).
    """
    images, k = to_output(torch.cat([samples[:, None], found], dim=1).flatten(0, 1), "np"), found.shape[1]
    rms = distances / math.prod(samples.shape[1:]) ** 0.5
    captions = [text for row in rms.tolist() for text in ("", *(f"{distance:.3f}" for distance in row))]
    halves = min(2, len(samples), columns_for(4, samples.shape[1:], has_alpha))
    names = ["sample", "nearest", *("2nd", "3rd", *(f"{n}th" for n in range(4, k + 1)))[: k - 1]]
    return grid(
        images,
        halves * (k + 1),
        title="samples, each with the training images that are most similar to it",
        column_names=names * halves,
        captions=captions,
        notes="below: the root mean square difference of their pixels in [-1, 1] from the sample's",
        gaps={1: 2, k + 1: 5, k + 2: 2} if halves == 2 else {1: 2},
        has_alpha=has_alpha,
    )


def show(run: Run, name: str, picture: Image.Image) -> None:
    """Send a picture to the trackers of the run that support images."""
    image = np.asarray(picture.convert("RGB"))[None]
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image}, step=run.step, **layout)
