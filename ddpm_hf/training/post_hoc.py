"""An average of any length, made after the training (Karras et al. 2023, arXiv:2312.02696, section 3.2, appendix C).

Each save keeps two power-function averages. A third one of another length is nearly a weighted sum of all of them.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ddpm_hf.pipelines.pipeline import load_pipeline
from ddpm_hf.training.checkpoints import TRAIN_CONFIG, Checkpoints
from ddpm_hf.training.config import SIGMA_REL
from ddpm_hf.training.ema import POST_HOC, gamma_of
from ddpm_hf.utils.arguments import checked, optional, path
from ddpm_hf.utils.files import part_of, sync, writing_tree

NEAR = 0.1  # a larger error is worth a word


@checked({"run": path, "sigma_rel": SIGMA_REL, "output_dir": optional(path)})
def make_average(run, sigma_rel: float, output_dir=None) -> list[str]:
    """Write the pipeline of a run with the average of length `sigma_rel` of its weights.

    Args:
        run: the output folder of a run with `post_hoc_ema`.
        output_dir: a folder that does not exist; None: beside `run`.

    Returns:
        What was made, in lines.

    Raises:
        ValueError: the run has no such averages, or the folder exists.
    """
    folder = Path(os.path.abspath(run))  # resolves `.`
    output = folder.with_name(f"{folder.name}-ema-{sigma_rel:g}") if output_dir is None else Path(output_dir)
    if output.exists():
        raise ValueError(f"output_dir={str(output)!r} exists already; it must be a new folder")
    files = Checkpoints(folder, 1).newest_averages()
    if not files:
        raise ValueError(
            f"run={str(run)!r} has no checkpoint with averages: they are kept by training with --post_hoc_ema true"
        )
    pipeline = load_pipeline(str(folder), "run")
    weights, error = combine(files, sigma_rel)
    pipeline.unet.load_state_dict(weights)
    beside = part_of(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside.mkdir()
        with writing_tree(beside):
            pipeline.save_pretrained(beside)
            if (folder / TRAIN_CONFIG).is_file():  # `ddpm-hf evaluate` reads there how the images are decoded
                shutil.copyfile(folder / TRAIN_CONFIG, beside / TRAIN_CONFIG)
        os.replace(beside, output)
        sync(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    lines = [
        f"{output}: the average of length sigma_rel={sigma_rel:g} after update {max(files)}, made of the averages of "
        f"{len(files)} saves",
        f"how much each update counts differs from that length by {error:.2g} of its root mean square",
    ]
    if error > NEAR:
        lines.append("more saves would come nearer: a smaller --checkpointing_steps, or sigma_rel from 0.05 to 0.2")
    return lines


def coefficients(steps: list[int], sigma_rel: float) -> tuple[np.ndarray, float]:
    """The weighted sum of averages that is nearest to one of length `sigma_rel` at the end, and how near it is.

    Contrary to the paper, the numbers must sum to 1: with few saves they would otherwise shrink the weights.

    Args:
        steps: the updates of the saves, in order; the last one is the end.

    Returns:
        Coefficients (saves, 2), for both averages of each save, and the root mean square of the difference between both
        densities over that of the wanted one.
    """
    times = np.repeat(np.divide(steps, steps[-1]), len(POST_HOC))
    gammas = np.tile([gamma_of(sigma) for sigma in POST_HOC], len(steps))
    products, wanted = (_inner_product(gammas, times, *others) for others in
                        ((gammas[:, None], times[:, None]), (gamma_of(sigma_rel), 1.0)))  # fmt: skip
    border = np.ones((len(times), 1))
    system = np.block([[products, border], [border.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-12)[0][:-1]
    square = _inner_product(gamma_of(sigma_rel), 1.0, gamma_of(sigma_rel), 1.0)
    error = (square - 2 * found @ wanted + found @ products @ found) / square
    return found.reshape(len(steps), len(POST_HOC)), float(np.sqrt(max(0.0, error)))


def _inner_product(gamma, time, other_gamma, other_time):
    """The integral of the product of two densities (gamma + 1) k^gamma / time^(gamma + 1), each on [0, time]."""
    end = np.minimum(time, other_time)
    scale = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return scale * (end / time) ** gamma * (end / other_time) ** other_gamma * end / (time * other_time)


def combine(files: dict[int, Path], sigma_rel: float) -> tuple[dict[str, torch.Tensor], float]:
    """The parameters of a network whose average has the length `sigma_rel`, and the error of `coefficients`.

    Args:
        files: of the two averages, by update.
    """
    steps, total = sorted(files), {}
    factors, error = coefficients(steps, sigma_rel)
    for step, of_save in zip(steps, factors, strict=True):
        with safe_open(files[step], "pt") as file:
            for sigma, factor in zip(POST_HOC, of_save, strict=True):
                prefix = f"{sigma}/"
                for key in filter(lambda key, prefix=prefix: key.startswith(prefix), file.keys()):
                    name, part = key.removeprefix(prefix), float(factor) * file.get_tensor(key).float()
                    total[name] = part + total[name] if name in total else part
    return total, error
