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
    def update(self, network: nn.Module, step: int, moved: torch.Tensor | None = None) -> None:
        """Move towards `network` after its update number `step`, counted from 1.

        Args:
            moved: 1.0 if that update took place and 0.0 if it was skipped, (), on the device, where nobody waits to
                read it; `None`: it took place.
        """
        decay = min(self.max_decay, (1 + step) / (10 + step))
        average, weights = list(self.model.parameters()), list(network.parameters())
        if moved is None:
            torch._foreach_lerp_(average, weights, 1 - decay)
        else:
            steps = torch._foreach_sub(weights, average)
            torch._foreach_mul_(steps, (1 - decay) * moved)
            torch._foreach_add_(average, steps)
