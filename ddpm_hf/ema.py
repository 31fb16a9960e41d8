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
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards `network` after its update number `step`, counted from 1."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(network.parameters()), 1 - decay)
