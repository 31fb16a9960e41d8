"""EDM: a preconditioned network and noise levels sigma (Karras et al. 2022, arXiv:2206.00364, table 1).

    x = x_0 + sigma noise
    x_0 = c_skip x + c_out F, with F = network(c_in x, c_noise)
    c_skip = d^2 / (sigma^2 + d^2)            c_in = 1 / sqrt(sigma^2 + d^2)
    c_out = sigma d / sqrt(sigma^2 + d^2)     c_noise = ln(sigma) / 4

d = `sigma_data` is the standard deviation of the images. If their mean is 0, the input and the target of the network
have variance 1 at all sigma. With the paper's weights of the loss all errors of F weigh the same.
"""

import math

import torch
from diffusers.configuration_utils import register_to_config

from ddpm_hf.schedulers.continuous import CONTINUOUS_CALL, ContinuousScheduler
from ddpm_hf.schedulers.noise import MOST_TIMESTEPS, only
from ddpm_hf.utils.arguments import explained, integer, number, one_of, require


class EDMScheduler(ContinuousScheduler):
    """EDM, with the interface, the settings and the noise levels of diffusers' `EDMEulerScheduler`.

    Args:
        sigma_min, sigma_max: the least and the most noise of sampling.
        sigma_data: standard deviation of the values of the images.
        sigma_schedule: `"karras"`: sigma^(1/rho) falls evenly (equation 5); `"exponential"`: ln(sigma) does.
        num_train_timesteps: the most steps of sampling.
        prediction_type: `"epsilon"`: F as above; `"v_prediction"`: its negative. diffusers names them so.
        rho: see `sigma_schedule`.
        final_sigmas_type: not supported, accepted for interchange with diffusers; it must be `"zero"`.
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    settings = {
        "sigma_min": number(above=0),
        "sigma_max": number(above=0),
        "sigma_data": number(above=0),
        "sigma_schedule": one_of("karras", "exponential"),
        "num_train_timesteps": integer(1, MOST_TIMESTEPS, "the scheduler keeps tables of this length"),
        "prediction_type": one_of("epsilon", "v_prediction"),
        "rho": number(above=0),
        "final_sigmas_type": only("zero"),
    }
    solvers = {"euler": None, "dpm++": "EDMDPMSolverMultistepScheduler"}
    objective = "edm"
    axis = "ln sigma, share of its range"
    paper = "diffusion model with the preconditioning of EDM (Karras et al. 2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364))"
    last_signal_name = "sigma_data / sqrt(sigma_data^2 + sigma_max^2)"
    last_in_words = "at sigma_max"
    more_noise = """Use --scheduler '{"sigma_max": 80}'"""

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ):
        self._set_up()

    def _set_up(self) -> None:
        low, high = self.config.sigma_min, self.config.sigma_max
        super()._set_up()
        require("sigma_min", low, low < high, f"must be less than sigma_max={high:g}")

    @classmethod
    def own_settings(cls, config: dict) -> dict:
        """The settings of this class for the configuration of any EDM scheduler of diffusers."""
        return {name: config[name] for name in cls.settings if name in config}

    def settings_of(self, solver: str) -> dict:
        """The settings with which diffusers' solver of this name samples the same models."""
        return self.own_settings(self.config)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of x where sampling begins, as diffusers computes it."""
        return math.sqrt(self.config.sigma_max**2 + 1)

    @property
    def last_signal(self) -> float:
        d = self.config.sigma_data
        return d / math.hypot(d, self.config.sigma_max)

    @property
    def in_words(self) -> str:
        config = self.config
        return (
            f"x = x_0 + sigma noise, preconditioned with sigma_data = {config.sigma_data:g}; sampling goes from sigma "
            f"{config.sigma_max:g} to {config.sigma_min:g}"
        )

    def level_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """sigma of timesteps c_noise (...)."""
        return (4 * timesteps).exp()

    def timestep_of(self, levels: torch.Tensor) -> torch.Tensor:
        """c_noise of sigma (...)."""
        return levels.log() / 4

    @explained(CONTINUOUS_CALL)
    def target(self, original_samples, noise, timesteps) -> torch.Tensor:
        """F = (x_0 - c_skip x) / c_out, without a division by small sigma. The arguments are those of `add_noise`."""
        sigma, d = self._level_at(timesteps, original_samples), self.config.sigma_data
        target = (sigma / d * original_samples - d * noise) / (sigma.square() + d**2).sqrt()
        return (self._sign * target).to(original_samples.dtype)

    def name_of(self, timestep) -> str:
        return f"sigma = {math.exp(4 * float(timestep)):.2g}"

    def for_picture(self, sample, timestep) -> torch.Tensor:
        """x scaled down to the variance of x_0, if that is 1: else the noise would be black and white only."""
        return sample / math.sqrt(1 + math.exp(8 * float(timestep)))

    @property
    def _sign(self) -> int:
        return -1 if self.config.prediction_type == "v_prediction" else 1

    def _levels(self, n: int) -> torch.Tensor:
        low, high = self.config.sigma_min, self.config.sigma_max
        if self.config.sigma_schedule == "exponential":
            return torch.linspace(math.log(low), math.log(high), n, dtype=torch.float64).exp().flip(0)
        power = 1 / self.config.rho
        return torch.linspace(high**power, low**power, n, dtype=torch.float64) ** self.config.rho

    def _signal(self, sigma) -> float:
        return torch.ones_like(sigma)

    def _input_scale(self, sigma):
        return (sigma.square() + self.config.sigma_data**2).rsqrt()

    def _original(self, model_output, sample, sigma) -> torch.Tensor:
        d = self.config.sigma_data
        total = sigma.square() + d**2
        return d**2 / total * sample + self._sign * sigma * d / total.sqrt() * model_output

    def _share(self, sigma):
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        return (sigma.log() - low) / (high - low)

    def _at_share(self, share):
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        return ((low + share * (high - low)) / 4).float()
