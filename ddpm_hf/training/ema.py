"""The exponential moving average (EMA) of the weights, which is saved and sampled from."""

import copy

import torch
from torch import nn


class EMA:
    """`model` is a copy of a network, in eval mode and without gradients, whose parameters are their EMA.

    The decay is min(max_decay, (1 + n) / (10 + n)) at update n, so that the average forgets the random initial weights
    (as in TensorFlow's `ExponentialMovingAverage`; Ho et al. 2020 use a constant 0.9999).
    """

    def __init__(self, network: nn.Module, max_decay: float):
        self.max_decay = max_decay
        self.model = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, applied: torch.Tensor | bool = True) -> None:
        """Average in the weights of `network` after update `step`, counted from 1.

        Args:
            applied: false if that update was skipped. A bool tensor () on the device does not make the host wait.
        """
        decay = min(self.max_decay, (1 + step) / (10 + step))
        average, weights = list(self.model.parameters()), list(network.parameters())
        if isinstance(applied, torch.Tensor):
            steps = torch._foreach_sub(weights, average)
            torch._foreach_mul_(steps, (1 - decay) * applied)
            torch._foreach_add_(average, steps)
        elif applied:
            torch._foreach_lerp_(average, weights, 1 - decay)
