"""The exponential moving average of the weights, whose samples are the ones to look at."""

import copy

import torch
from torch import nn


class EMA:
    """`model`: a copy of a network whose parameters follow the network's own, in eval mode and without gradients.

    The decay warms up, min(max_decay, (1 + n) / (10 + n)) at update n, so that the average forgets its random start
    (TensorFlow's `ExponentialMovingAverage`; Ho et al. 2020 use a fixed 0.9999).
    """

    def __init__(self, network: nn.Module, max_decay: float):
        self.max_decay = max_decay
        self.model = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, applied: torch.Tensor | bool = True) -> None:
        """Move towards `network` after its update number `step`, counted from 1.

        Args:
            applied: whether that update took place: a bool, or a bool tensor () on the device, which the host does not
                wait to read.
        """
        decay = min(self.max_decay, (1 + step) / (10 + step))
        average, weights = list(self.model.parameters()), list(network.parameters())
        if isinstance(applied, torch.Tensor):
            steps = torch._foreach_sub(weights, average)
            torch._foreach_mul_(steps, (1 - decay) * applied)
            torch._foreach_add_(average, steps)
        elif applied:
            torch._foreach_lerp_(average, weights, 1 - decay)
