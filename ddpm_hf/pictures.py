"""What a run leaves to look at: grids of images, films, the loss curve."""

import numpy as np
import torch
from PIL import Image

from ddpm_hf.pipeline import PIL_MODES, to_output, to_pil
from ddpm_hf.training import Run, read_log

FILM_FRAMES = 40


def grid(images: np.ndarray, columns: int, scale: int = 1) -> Image.Image:
    """(N, H, W, C) in [0, 1] -> one picture, row by row, one pixel between images and each pixel `scale` times.

    Of images that are neither gray nor RGB(A), the first three channels (of two: the first) are shown.
    """
    n, height, width, channels = images.shape
    if channels not in PIL_MODES:
        images = images[..., : 3 if channels > 3 else 1]
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + 1, width * scale + 1
    canvas = np.ones((rows * cell_h - 1, columns * cell_w - 1, images.shape[-1]))
    for k, image in enumerate(images):
        top, left = k // columns * cell_h, k % columns * cell_w
        canvas[top : top + cell_h - 1, left : left + cell_w - 1] = image
    return to_pil(canvas[None])[0]


def save_gif(frames: list[Image.Image], path, seconds: float = 4.0, hold: float = 2.0) -> None:
    """A film that lasts `seconds`, holds its last frame and begins again."""
    durations = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    durations[-1] += round(1000 * hold)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def forward_process(images: torch.Tensor, scheduler, columns: int = 11) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> (B * columns, H, W, C): each row one image at t = none, 0 ... T-1."""
    timesteps = torch.linspace(0, len(scheduler) - 1, columns - 1).round().long()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [scheduler.add_noise(images, noise, t) for t in timesteps]
    return to_output(torch.stack([images, *noisy], dim=1).flatten(0, 1), "np")


def loss_curve(log: list[dict], path) -> None:
    """Training and held-out loss against updates, as a PNG."""
    from matplotlib.figure import Figure  # takes half a second; without pyplot it needs no display and no backend

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [(row["step"], row["loss"]) for row in log if row["loss"] is not None]
    held_out = [(row["step"], row["held_out_loss"]) for row in log if row["held_out_loss"] is not None]
    axes.plot(*zip(*train, strict=True), color="0.6", linewidth=1, label="training (raw weights)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C3", label="held out (averaged weights)")
    axes.set(xlabel="update", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_pictures(run: Run) -> None:
    """After a save: samples.png, loss.png and, when the training is done, forward.png and denoising.gif."""
    config, pipeline = run.config, run.pipeline
    height, width = run.images.pixels.shape[2:]
    scale = max(1, 64 // max(height, width))
    columns = int(np.ceil(np.sqrt(config.eval_batch_size)))
    steps, frames = config.ddpm_num_inference_steps, []

    def keep(pipeline, i, timestep, tensors):
        if run.finished and i % max(1, steps // FILM_FRAMES) == 0 and i < steps - 1:
            frames.append(grid(to_output(tensors["sample"], "np"), columns, scale))

    pipeline.set_progress_bar_config(desc="samples", leave=False)
    samples = pipeline(
        config.eval_batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        num_inference_steps=steps,
        output_type="np",
        callback_on_step_end=keep,
    ).images
    pipeline.set_progress_bar_config()
    picture = grid(samples, columns, scale)
    picture.save(run.output_dir / "samples.png")
    loss_curve(read_log(run.output_dir / "log.csv"), run.output_dir / "loss.png")
    if run.finished:
        save_gif([*frames, picture], run.output_dir / "denoising.gif")
        shown = run.images.batch(torch.arange(min(4, len(run.images))))
        row = forward_process(shown, pipeline.scheduler)
        grid(row, len(row) // len(shown), scale).save(run.output_dir / "forward.png")
