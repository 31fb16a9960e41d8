"""What a run leaves to look at: grids of images, films, the loss curve."""

import contextlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ddpm_hf.data import ImageData, batch_indices
from ddpm_hf.files import save_picture, writing
from ddpm_hf.films import grid, save_film, with_caption, with_row_names
from ddpm_hf.images import to_output
from ddpm_hf.pipeline import DDPMCustomPipeline
from ddpm_hf.previews import sample_together
from ddpm_hf.progress import Progress, read_log
from ddpm_hf.training import Run, draw

FILM_FRAMES = 40
FIRST_SAMPLES = "first_samples.png"
NEIGHBOURS, NEIGHBOURS_SHOWN = 4, 16
CHUNK_BYTES = 2**26  # of images looked at at a time
MOST_ROWS = 100  # classes
FEWEST_COMPARED, MOST_HELD_OUT = 16, 256  # images whose distance to the data is measured
MEASURED = 10_000  # images whose mean and spread stand beside data.png


def forward_process(images: torch.Tensor, scheduler, columns: int = 11) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> (B * columns, H, W, C): each row one image at t = none, 0 ... T-1."""
    timesteps = torch.linspace(0, len(scheduler) - 1, columns - 1).round().long()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [scheduler.add_noise(images, noise, t) for t in timesteps]
    return to_output(torch.stack([images, *noisy], dim=1).flatten(0, 1), "np")


def loss_curve(log: list[dict], path, weighted: bool = False) -> None:
    """Training and held-out loss against updates, and the training loss against timesteps, as a PNG.

    Args:
        weighted: that the training loss is, unlike the others.
    """
    from matplotlib.figure import Figure  # takes half a second; without pyplot it needs no display and no backend

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, by_timestep = figure.subplots(1, 2, width_ratios=(2, 1))
    train = [(row["step"], row["loss"]) for row in log if row["loss"] is not None]
    held_out = [(row["step"], row["held_out_loss"]) for row in log if row["held_out_loss"] is not None]
    axes.plot(
        *zip(*train, strict=True),
        color="0.6",
        linewidth=1,
        label=f"training (raw weights{', min-SNR weighted' if weighted else ''})",
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C3", label="held out (averaged weights)")
    axes.set(xlabel="update", ylabel="mean squared error", yscale="log")
    axes.legend()
    lately = log[-max(1, len(log) // 10) :]
    columns = [[row[name] for row in lately if row[name] is not None] for name in Progress.BY_TIMESTEP]
    means = [sum(column) / len(column) if column else math.nan for column in columns]
    by_timestep.stairs(means, [k / len(means) for k in range(len(means) + 1)], color="C0", baseline=None)
    by_timestep.set(xlabel="timestep / T", yscale="log", title=f"of the last {len(lately)} rows of log.csv")
    for each in (axes, by_timestep):
        each.grid(alpha=0.3, which="both")
    with writing(path) as beside:
        figure.savefig(beside, dpi=120)


def draw_data(run: Run) -> None:
    """Before the first update: data.png, what the network will see, decoded back from its input, and its numbers."""
    shown = run.images.first(64, run.config.seed)
    flips = draw(run.config, run.pipeline.scheduler, shown.shape, 0)[2]
    shown = torch.where(flips, shown.flip(3), shown)
    columns = math.ceil(math.sqrt(len(shown)))
    picture = grid(to_output(shown, "np"), columns, _scale(run), modes=(1, 3))  # opacity would not be seen
    channels, height, width = run.images.shape
    count = "a stream of" if run.images.num_images is None else f"{run.images.num_images:,}"
    lines = [f"{count} images of {width}x{height}, {channels} channel{'s' if channels > 1 else ''}; {len(shown)} shown"]
    if isinstance(run.images, ImageData):
        low, high = run.images.value_range
        lines.append(f"{str(run.images.pixels.dtype).split('.')[-1]}: {low:g} becomes -1 and {high:g} becomes 1")
        if run.images.label_names:
            names = run.images.label_names
            lines.append(f"{len(names)} classes: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
        numbers = batch_indices(run.config.seed, 0, min(MEASURED, len(run.images)), len(run.images))
        parts = (run.images.batch(part) for part in numbers.split(_chunk(run.images)))
    else:
        numbers, parts = shown, [shown]
    for c, (least, most, mean, std) in enumerate(_moments(parts)):
        lines.append(f"channel {c} of {len(numbers):,}: {least:.3f} ... {most:.3f}, mean {mean:.3f}, std {std:.3f}")
    if not run.step:
        (run.output_dir / FIRST_SAMPLES).unlink(missing_ok=True)  # of a run before this one
    save_picture(with_caption(picture, lines), run.output_dir / "data.png")


def _moments(parts: Iterable[torch.Tensor]) -> list[tuple[float, float, float, float]]:
    """Of images (B, C, H, W) in parts: least, most, mean and standard deviation of each channel."""
    least, most, sums, squares, count = torch.tensor(math.inf), torch.tensor(-math.inf), 0.0, 0.0, 0
    for x in parts:
        x = x.transpose(0, 1).flatten(1).double()
        least, most = torch.minimum(x.amin(1), least), torch.maximum(x.amax(1), most)
        sums, squares, count = sums + x.sum(1), squares + x.square().sum(1), count + x.shape[1]
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return list(zip(*(column.tolist() for column in (least, most, mean, std)), strict=True))


def _chunk(images: ImageData) -> int:
    """How many images to look at at a time."""
    return max(1, CHUNK_BYTES // (4 * images.pixels[0].numel()))


def nearest(samples: torch.Tensor, images: ImageData, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` images nearest to each sample in Euclidean distance.

    Args:
        samples: (B, C, H, W) in [-1, 1].

    Returns:
        The images (B, k, C, H, W) in [-1, 1], and their distances (B, k), nearest first.
    """
    k = min(k, len(images))
    best = torch.full((len(samples), k), math.inf)
    which = torch.zeros((len(samples), k), dtype=torch.long)
    for indices in torch.arange(len(images)).split(_chunk(images)):
        distances = torch.cdist(samples.flatten(1), images.batch(indices).flatten(1))
        best, order = torch.cat([best, distances], dim=1).topk(k, largest=False)
        which = torch.cat([which, indices.expand(len(samples), -1)], dim=1).gather(1, order)
    return images.batch(which.flatten()).unflatten(0, which.shape), best


def draw_pictures(run: Run) -> None:
    """After a save, by all processes: samples.png and loss.png.

    The first time first_samples.png too, averaged and raw weights side by side; when the training is done also
    forward.png, denoising.gif and neighbours.png, samples beside the images of the data that are most like them.
    """
    config, accelerator = run.config, run.accelerator
    steps, first = config.ddpm_num_inference_steps, run.output_dir / FIRST_SAMPLES
    labels, number, columns = _layout(run)
    draws_raw = broadcast_object_list([not first.exists()])[0]
    frame_steps = tuple(range(0, steps - 1, max(1, steps // FILM_FRAMES))) if run.finished else ()
    run.pipeline.set_progress_bar_config(desc="samples", leave=False, disable=not accelerator.is_main_process)
    classes = {"class_labels": labels, "guidance_scale": config.guidance_scale}
    *frames, samples = sample_together(accelerator, run.pipeline, number, steps, config.seed, frame_steps, **classes)
    if draws_raw:
        pipeline = DDPMCustomPipeline(run.unet.eval(), run.pipeline.scheduler)
        pipeline.set_progress_bar_config(desc="samples", leave=False, disable=not accelerator.is_main_process)
        # Once, and of another shape than what it is trained on: compiling it for that would take longer
        eagerly = torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()
        try:
            with eagerly:
                (raw,) = sample_together(accelerator, pipeline, number, steps, config.seed, **classes)
        finally:
            run.unet.train()
    if not accelerator.is_main_process:
        return
    scale = _scale(run)

    def arranged(images: np.ndarray) -> Image.Image:
        picture = grid(images, columns, scale)
        if labels is None:
            return picture
        names = run.images.label_names
        return with_row_names(picture, [names[label] for label in labels[::columns]])

    picture = arranged(samples)
    save_picture(picture, run.output_dir / "samples.png")
    show(run, "samples", picture)
    weighted = config.snr_gamma is not None
    loss_curve(read_log(run.output_dir / "log.csv"), run.output_dir / "loss.png", weighted)
    if draws_raw:
        halves = [
            with_caption(arranged(of), [f"{name} weights, update {run.step}"])
            for name, of in (("averaged", samples), ("raw", raw))
        ]
        both = Image.new("RGB", (halves[0].width + 8 + halves[1].width, halves[0].height), "white")
        both.paste(halves[0], (0, 0))
        both.paste(halves[1], (halves[0].width + 8, 0))
        save_picture(both, first)
    if run.finished:
        save_film([arranged(frame) for frame in [*frames, samples]], run.output_dir / "denoising.gif")
        shown = run.images.first(4, config.seed)
        row = forward_process(shown, run.pipeline.scheduler)
        save_picture(grid(row, len(row) // len(shown), scale), run.output_dir / "forward.png")
        if isinstance(run.images, ImageData):
            x = torch.from_numpy(samples).permute(0, 3, 1, 2) * 2 - 1
            found, distances = nearest(x, run.images, NEIGHBOURS)
            some = np.linspace(0, number - 1, min(number, NEIGHBOURS_SHOWN)).astype(int)
            _draw_neighbours(run, x[some], found[some], scale)
            _tell_nearness(run, distances[:, 0])


def _layout(run: Run) -> tuple[list[int] | None, int, int]:
    """Labels of the samples, or None, their number, and the columns of their grid: one row a class, if it has any."""
    number = run.config.eval_batch_size
    if not run.config.class_conditional:
        return None, number, math.ceil(math.sqrt(number))
    rows = min(run.pipeline.unet.config.num_classes, max(number, MOST_ROWS))
    columns = max(1, number // rows)
    return [row for row in range(rows) for _ in range(columns)], rows * columns, columns


def _tell_nearness(run: Run, of_samples: torch.Tensor) -> None:
    """A metric of the run: whether samples are nearer to images of the data than images are that it has not seen."""
    if run.held_out is None or min(len(of_samples), len(run.held_out)) < FEWEST_COMPARED:
        return  # a median of so few says nothing
    compared = min(len(run.held_out), MOST_HELD_OUT)
    held_out = run.held_out.batch(torch.linspace(0, len(run.held_out) - 1, compared).long())  # of all classes
    of_held_out = nearest(held_out, run.images, 1)[1][:, 0]
    samples, unseen = (d.median().item() / math.prod(run.images.shape) ** 0.5 for d in (of_samples, of_held_out))
    guidance = run.config.guidance_scale
    guided = f", each class as often, guidance {guidance:g}" if run.config.class_conditional else ""
    run.metrics.append(
        {
            "type": "nearest_training_image",
            "name": "Distance of samples to the nearest training image, over that of held-out images",
            "value": samples / unseen if unseen else None,
            "split": "train",
            "protocol": f"medians of the root mean square difference of pixels in [-1, 1]: {samples:.4f} of "
            f"{len(of_samples)} samples ({run.config.ddpm_num_inference_steps} steps of the model's own scheduler, "
            f"seed {run.config.seed}{guided}), "
            f"{unseen:.4f} of {len(of_held_out)} held-out images, each to the nearest of {len(run.images):,} training "
            "images; near 0 if the model repeats its data",
        }
    )


def _draw_neighbours(run: Run, samples: torch.Tensor, found: torch.Tensor, scale: int) -> None:
    pairs = torch.cat([samples[:, None], found], dim=1)
    halves = [
        grid(to_output(half.flatten(0, 1), "np"), pairs.shape[1], scale)
        for half in pairs.split(-(-len(pairs) // 2))  # two columns of rows
    ]
    gap = 4 * scale
    picture = Image.new("RGB", (sum(h.width for h in halves) + gap * (len(halves) - 1), halves[0].height), "white")
    for k, half in enumerate(halves):
        picture.paste(half, (k * (halves[0].width + gap), 0))
    caption = [f"first of each row: a sample; the others: the {found.shape[1]} most similar images of the data"]
    save_picture(with_caption(picture, caption), run.output_dir / "neighbours.png")


def show(run: Run, name: str, picture: Image.Image) -> None:
    """To the tracker, if the run has one that takes pictures."""
    image = np.asarray(picture.convert("RGB"))[None]
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: image}, step=run.step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: image}, step=run.step)


def _scale(run: Run) -> int:
    """How many times to draw each pixel so that it can be seen."""
    return max(1, 64 // max(run.images.shape[1:]))
