"""The forward process, and loss curves."""

import math

import numpy as np
import torch

from ddpm_hf.pipelines.images import to_output
from ddpm_hf.utils.files import writing
from ddpm_hf.utils.ticks import plain_ticks


def forward_process(images: torch.Tensor, scheduler, columns: int = 11) -> tuple[np.ndarray, list]:
    """Images (B, C, H, W) in [-1, 1] from the least to the most noise.

    Returns:
        (B * columns, H, W, C) in [0, 1]: each image without noise, then with the noise of each timestep; the timesteps.
    """
    timesteps = scheduler.spread(columns - 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [scheduler.for_picture(scheduler.add_noise(images, noise, t), t) for t in timesteps]
    return to_output(torch.stack([images, *noisy], dim=1).flatten(0, 1), "np"), timesteps.tolist()


def loss_curve(log: list[dict], path, weighted: bool = False, axis: str = "timestep / T") -> None:
    """Save a PNG of training and held-out loss against updates, and of the training loss against timesteps.

    Args:
        log: rows of log.csv.
        weighted: whether the training loss is weighted by min-SNR.
        axis: what the columns `loss_t00` ... of the log are ranges of.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, by_timestep = figure.subplots(1, 2, width_ratios=(2, 1))
    train, held_out = (
        [(row["step"], row[name]) for row in log if row[name] is not None] for name in ("loss", "held_out_loss")
    )
    label = f"training (training weights{', min-SNR weighted' if weighted else ''})"
    axes.plot(*zip(*train, strict=True), color="0.6", linewidth=1, label=label)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C3", label="held out (EMA weights)")
    axes.set(xlabel="update", ylabel="mean squared error", yscale="log", title="loss")
    axes.legend()
    lately = log[-max(1, len(log) // 10) :]
    names = [name for name in log[0] if name.startswith("loss_t")]
    columns = [[row[name] for row in lately if row[name] is not None] for name in names]
    means = [sum(column) / len(column) if column else math.nan for column in columns]
    by_timestep.stairs(means, [k / len(means) for k in range(len(means) + 1)], color="C0", baseline=None)
    title = f"loss by timestep,\nlast {len(lately)} row{'s' if len(lately) > 1 else ''} of log.csv"
    by_timestep.set(xlabel=axis, ylabel="mean squared error", yscale="log", title=title)
    for each in (axes, by_timestep):
        each.grid(alpha=0.3, which="both")
        plain_ticks(each.xaxis, each.yaxis)
    with writing(path) as beside:
        figure.savefig(beside, dpi=120)
