"""The objective of EDM (Karras et al. 2022, arXiv:2206.00364, table 1 and equation 8; `schedulers/edm.py`)."""

from ddpm_hf.training.loss import Batch, Losses, normal_quantile, squared_errors


class EDMLoss:
    """Mean squared error of the predicted x_0 at x = x_0 + sigma noise, weighted by 1 / c_out^2.

    With these weights of the paper it is the mean squared error of the preconditioned network's own output F.

    Args:
        mean, std: of ln(sigma), which is normal (P_mean and P_std of the paper).
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        self.mean, self.std = mean, std

    def __call__(self, network, scheduler, batch: Batch) -> Losses:
        sigma = (self.mean + self.std * normal_quantile(batch.uniform)).exp()
        return squared_errors(network, scheduler, batch, scheduler.timestep_of(sigma).float())
