"""The exponential moving averages (EMAs) of the weights, of which one is saved as the model and sampled from."""

import copy
import functools

import numpy as np
import torch
from torch import nn

POST_HOC = (0.05, 0.10)  # sigma_rel of the two averages of which those of other lengths are made (Karras et al. 2023)


class EMA:
    """`model` is a copy of a network, in eval mode and without gradients, whose parameters are their EMA.

    The decay is min(max_decay, (1 + n) / (10 + n)) at update n, so that the average forgets the random initial weights
    (as in TensorFlow's `ExponentialMovingAverage`; Ho et al. 2020 use a constant 0.9999), or that of `power_decay`.

    Args:
        sigma_rel: length of a power-function average in place of `max_decay`; None: `max_decay`.
        post_hoc: also keep the two averages `POST_HOC`, in `post_hoc` by length and name of the parameter.
    """

    def __init__(self, network: nn.Module, max_decay: float, sigma_rel: float | None = None, post_hoc: bool = False):
        self.max_decay, self.sigma_rel = max_decay, sigma_rel
        self.model = copy.deepcopy(network).eval().requires_grad_(False)
        self.post_hoc = {
            sigma: {name: weight.detach().clone() for name, weight in network.named_parameters()}
            for sigma in (POST_HOC if post_hoc else ())
        }

    def to(self, device: torch.device) -> None:
        """Move all averages to a device."""
        self.model.to(device)
        for average in self.post_hoc.values():
            average.update({name: weight.to(device) for name, weight in average.items()})

    def averages(self) -> dict[str, torch.Tensor]:
        """The tensors of `post_hoc`, called <length>/<name of the parameter>."""
        return {f"{sigma}/{name}": weight for sigma, all_ in self.post_hoc.items() for name, weight in all_.items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, applied: torch.Tensor | bool = True) -> None:
        """Average in the weights of `network` after update `step`, counted from 1.

        Args:
            applied: false if that update was skipped. A bool tensor () on the device does not make the host wait.
        """
        weights, warming_up = list(network.parameters()), min(self.max_decay, (1 + step) / (10 + step))
        decay = warming_up if self.sigma_rel is None else power_decay(self.sigma_rel, step)
        _average_in(list(self.model.parameters()), weights, decay, applied)
        for sigma, average in self.post_hoc.items():
            _average_in(list(average.values()), weights, power_decay(sigma, step), applied)


def _average_in(average: list[torch.Tensor], weights: list[torch.Tensor], decay: float, applied) -> None:
    if isinstance(applied, torch.Tensor):
        steps = torch._foreach_sub(weights, average)
        torch._foreach_mul_(steps, (1 - decay) * applied)
        torch._foreach_add_(average, steps)
    elif applied:
        torch._foreach_lerp_(average, weights, 1 - decay)


def power_decay(sigma_rel: float, step: int) -> float:
    """The decay (1 - 1 / n)^(gamma + 1) at update n of a power-function EMA (Karras et al. 2023, arXiv:2312.02696).

    After n updates the weights after update k count (k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1): the average
    always reaches over the same share of the training and has forgotten how it began (section 3.1).
    """
    return (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of the density (gamma + 1) k^gamma / n^(gamma + 1) on [0, n] with standard deviation sigma_rel n.

    It is the largest root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1.
    """
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())
