"""The objective of flow matching (Lipman et al. 2022, arXiv:2210.02747, equation 23; `schedulers/flow.py`)."""

import torch

from ddpm_hf.training.loss import Batch, Losses, normal_quantile, squared_errors

FLOW_TIMES = ("logit_normal", "uniform")


class FlowMatchingLoss:
    """Mean squared error of the predicted velocity noise - x_0 at x_t = (1 - t) x_0 + t noise.

    Args:
        times: the distribution of t: `"uniform"`, or `"logit_normal"`, t = sigmoid(mean + std z) with z ~ N(0, 1),
            which favours the times in the middle (Esser et al. 2024, arXiv:2403.03206, equation 19).
        mean, std: of the logit-normal distribution.
    """

    def __init__(self, times: str = "logit_normal", mean: float = 0.0, std: float = 1.0):
        self.times, self.mean, self.std = times, mean, std

    def __call__(self, network, scheduler, batch: Batch) -> Losses:
        t = batch.uniform
        if self.times == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * normal_quantile(t))
        return squared_errors(network, scheduler, batch, scheduler.timestep_of(t).float())
