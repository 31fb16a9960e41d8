"""Where a model is good and where not: its loss, its bound and its x_0 by timestep, and the colours of its samples."""

import math

import torch

from ddpm_hf.likelihood import bound_terms
from ddpm_hf.seeds import seeded_generator

TIMESTEPS = 50


def chosen_timesteps(scheduler, number: int = TIMESTEPS) -> torch.Tensor:
    """(min(number, T),): the middles of as many equal parts of 0 ... T-1."""
    T = len(scheduler)
    number = min(number, T)
    return ((torch.arange(number) + 0.5) * T / number).long()


class ByTimestep:
    """Sums over images of what a network makes of them at each of `timesteps` (M,), float64.

    Two of them, of other images or processes, add up by `+`.
    """

    SUMS = ("images", "loss", "bits", "x0", "guess", "guess_guess", "x0_guess", "square")

    def __init__(self, timesteps: torch.Tensor, sums: torch.Tensor | None = None, losses=()):
        self.timesteps, self.losses = timesteps, list(losses)
        self.sums = torch.zeros(len(self.SUMS), len(timesteps), dtype=torch.float64) if sums is None else sums

    def __add__(self, other):
        return ByTimestep(self.timesteps, self.sums + other.sums, self.losses + other.losses)

    def see(self, predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64) -> None:
        """Look at images (N, C, H, W) in [-1, 1], each at all timesteps.

        Args:
            predict, labels, levels: as `likelihood` has them.
            numbers: N; the noise of an image is a function of (`seed`, its number).
        """
        M = len(self.timesteps)
        for k, number in enumerate(numbers):
            generator = seeded_generator(seed, "by timestep", number)
            noise = torch.randn((M, *images.shape[1:]), generator=generator, dtype=torch.float64)
            rows = [[] for _ in self.SUMS]
            for part in torch.arange(M).split(batch_size):
                t, z = self.timesteps[part], noise[part]
                x0 = images[k : k + 1].double().expand(len(part), -1, -1, -1)
                sample = scheduler.add_noise(x0, z, t)
                output = predict(sample, t, None if labels is None else labels[k].expand(len(part)))
                prediction, _ = scheduler.split_output(output, sample)
                errors = (prediction - scheduler.target(x0, z, t)).square()
                bits = bound_terms(scheduler, x0, sample, t, output, levels)
                guess = scheduler.reverse(output, sample, t)[2]
                of_pixels = (errors, x0, guess, guess * guess, x0 * guess, (guess - x0).square())
                loss, *others = (values.flatten(1).mean(1) for values in of_pixels)
                for row, values in zip(rows, (torch.ones_like(loss), loss, bits, *others), strict=True):
                    row.append(values)
            found = torch.stack([torch.cat(row) for row in rows])
            self.sums += found
            self.losses.append(found[1].mean().item())

    def columns(self) -> dict[str, torch.Tensor]:
        """Of each timestep (M,): the mean of L_simple, of the term of the bound in bits/dim, and how x_0 is guessed.

        `x0_rmse` and `x0_bias` are of the guess less the truth. `x0_slope` is that of the truth's regression on the
        guess: 1 of E[x_0 | x_t], which no network beats; below it the guesses are bolder than they may be. NaN where
        all guesses are the same.
        """
        n, loss, bits, x0, guess, guess_guess, x0_guess, square = self.sums
        spread = guess_guess / n - (guess / n) ** 2
        together = x0_guess / n - (x0 / n) * (guess / n)
        slope = torch.where(spread > 1e-12, together / spread.clamp(min=1e-12), math.nan)
        return {"loss": loss / n, "bits": bits / n, "x0_rmse": (square / n).sqrt(), "x0_slope": slope,
                "x0_bias": (guess - x0) / n}  # fmt: skip


def channel_moments(images: torch.Tensor) -> torch.Tensor:
    """Mean and mean square of the pixels of each channel of each image: (B, C, H, W) -> (B, 2, C), float64."""
    pixels = images.double().flatten(2)
    return torch.stack([pixels.mean(2), pixels.square().mean(2)], dim=1)
