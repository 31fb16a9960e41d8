"""What each update sees: images and random numbers that are functions of (seed, update, position in the global batch).

So a resumed run continues as if it had not been interrupted, and several processes, or several micro-batches, see what
one large batch would. Random numbers are drawn in blocks of positions: a process draws its own and few others.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment

from ddpm_hf.data.missing import split_missing
from ddpm_hf.schedulers.noise import to_device
from ddpm_hf.training.loss import Batch
from ddpm_hf.utils.seeds import seeded_generator

BLOCK = 16  # positions that share a generator; another number would draw other noise


class Draws(NamedTuple):
    """Random numbers of some positions (B,): `noise` (B, C, H, W), `uniform` float64, `drops` bool, and augmentations.

    `flips` and `vertical` are bool, `turns` counts quarters, and `corners` (B, 2) are the places of windows. The last
    three are None unless a setting needs them.
    """

    noise: torch.Tensor
    uniform: torch.Tensor
    flips: torch.Tensor
    drops: torch.Tensor
    vertical: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    corners: torch.Tensor | None = None

    def augment_(self, images: torch.Tensor) -> torch.Tensor:
        """Flip and turn the images (B, C, H, W), in place. They must be square if there are `turns`."""
        flip_(images, self.flips, 3)
        if self.vertical is not None:
            flip_(images, self.vertical, 2)
        for turn in range(1, 4) if self.turns is not None else ():
            which = self.turns == turn
            images[which] = images[which].rot90(turn, (2, 3))
        return images


def flip_(images: torch.Tensor, which: torch.Tensor, axis: int) -> None:
    """Flip the images (B, C, H, W) where `which`, bool (B,), is true, along an axis and in place."""
    images[which] = images[which].flip(axis)


def draw_random(config, step: int, positions: torch.Tensor, global_batch: int, shape: tuple[int, ...]) -> Draws:
    """The random numbers of update `step` at `positions` (B,) of the global batch, for images of `shape` (C, H, W).

    With `antithetic_timesteps`, `uniform` is (u + i / global_batch) mod 1 at position i, with one u for all (Kingma et
    al. 2021, arXiv:2107.00630, appendix I.1): each alone is uniform, and together they leave no part of [0, 1) out.
    """
    blocks, place = (positions // BLOCK).unique(return_inverse=True)
    rows = place * BLOCK + positions % BLOCK
    noise, others = [], []
    for block in blocks.tolist():
        generator = seeded_generator(config.seed, "batch", step, block)
        noise.append(torch.randn((BLOCK, *shape), generator=generator))
        others.append(torch.rand((BLOCK, 3), generator=generator, dtype=torch.float64))
    uniform, flips, drops = torch.cat(others)[rows].unbind(1)
    if config.antithetic_timesteps:
        offset = torch.rand((), generator=seeded_generator(config.seed, "offset", step), dtype=torch.float64)
        uniform = (offset + positions / global_batch) % 1
    flips = flips < (0.5 if config.random_flip else 0.0)
    draws = Draws(torch.cat(noise)[rows], uniform, flips, drops < config.label_dropout)
    if config.random_vertical_flip or config.random_rotate90 or config.random_crop:
        more = [seeded_generator(config.seed, "augment", step, block) for block in blocks.tolist()]
        more = torch.cat([torch.rand((BLOCK, 4), generator=each, dtype=torch.float64) for each in more])[rows]
        if config.random_vertical_flip:
            draws = draws._replace(vertical=more[:, 0] < 0.5)
        if config.random_rotate90:
            draws = draws._replace(turns=(more[:, 1] * 4).long())
        draws = draws._replace(corners=more[:, 2:])
    return draws


class Batches:
    """Draws the micro-batches of this process.

    Args:
        config: a `TrainConfig`.
        images: `ImageData` or `ImageStream`.
        null_label: the label that stands for no class; None for an unconditional network.
        rank, world: which of how many processes this is.
    """

    def __init__(self, config, images, null_label: int | None, rank: int, world: int):
        self.config, self.images, self.null_label = config, images, null_label
        size, micros = config.train_batch_size, config.gradient_accumulation_steps
        self.global_batch, self.micros = size * micros * world, micros * world
        self.numbers = range(rank, self.micros, world)  # of the micro-batches that this process sees
        self.positions = (torch.tensor(self.numbers)[:, None] * size + torch.arange(size)).flatten()

    def draw(self, step: int) -> list[Batch]:
        """This process's micro-batches of update `step`, on the CPU. A stream must stand where that update begins."""
        config, global_batch = self.config, self.global_batch
        draws = draw_random(config, step, self.positions, global_batch, self.images.shape)
        images, labels = self.images.batch_for_step(config.seed, step, global_batch, self.positions, draws.corners)
        images, valid = split_missing(draws.augment_(images), self.images.fill)
        parts = {"images": images, "noise": draws.noise, "uniform": draws.uniform}
        if self.null_label is not None:
            parts["labels"] = torch.where(draws.drops | (labels < 0), self.null_label, labels)
        if valid is not None:
            parts["valid"] = valid
        micros = zip(*(part.split(config.train_batch_size) for part in parts.values()), strict=True)
        made = [Batch(**dict(zip(parts, micro, strict=True))) for micro in micros]
        return [assign_noise(batch) for batch in made] if config.noise_assignment else made


def assign_noise(batch: Batch) -> Batch:
    """Exchange the noise among the images of a batch, so that the sum of all squared distances between them is least.

    Paths from noise to images then cross less often (Pooladian et al. 2023, arXiv:2304.14772; Tong et al. 2023,
    arXiv:2302.00482). Images exchange it only with those of the same label, as the network sees it (images without one
    are a class of their own): so the noise of each class stays standard normal. Missing values do not count.
    """
    images, noise = batch.images.flatten(1), batch.noise.flatten(1)
    if batch.valid is None:  # the squares are the same in every order
        costs = -images @ noise.T
    else:
        seen = batch.valid.flatten(1).to(images.dtype)
        costs = seen @ noise.square().T - 2 * (images * seen) @ noise.T
    order = torch.arange(len(images))
    labels = torch.zeros_like(order) if batch.labels is None else batch.labels
    for label in labels.unique():
        alike = (labels == label).nonzero()[:, 0]
        order[alike] = alike[linear_sum_assignment(costs[alike][:, alike])[1]]
    return batch._replace(noise=batch.noise[order])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, to which the host does not wait for it to come."""
    if device.type == "mps":  # has no float64; `uniform` must stay below 1
        batch = batch._replace(uniform=batch.uniform.float().clamp(max=1 - 2**-24))
    return Batch(*(None if part is None else to_device(part, device) for part in batch))
