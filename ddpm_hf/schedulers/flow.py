"""Flow matching along straight lines (Lipman et al. 2022, arXiv:2210.02747), also named rectified flow (Liu et al.
2022, arXiv:2209.03003).

    x_t = (1 - t) x_0 + t noise, for t in 0 ... 1
    the network predicts the velocity v = noise - x_0; so x_0 = x_t - t v
    step: x_{t'} = x_t - (t - t') v

The network is given the timestep T t, with T = `num_train_timesteps`.
"""

import torch
from diffusers.configuration_utils import register_to_config

from ddpm_hf.schedulers.continuous import CONTINUOUS_CALL, ContinuousScheduler
from ddpm_hf.schedulers.noise import MOST_TIMESTEPS, only
from ddpm_hf.utils.arguments import explained, integer, number

# Settings of diffusers' scheduler that ours does not implement: any value but this default raises ValueError.
FLOW_ONLY = {
    "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "time_shift_type": "exponential",
    "stochastic_sampling": False,
}  # fmt: skip


class FlowMatchScheduler(ContinuousScheduler):
    """Flow matching, with the interface, the settings and the times of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
        num_train_timesteps: T; the network is given T t, and sampling in n steps visits n times from 1 to about 1/T.
        shift: s of the times t' = s t / (1 + (s - 1) t) of sampling; above 1, more steps have much noise (Esser et al.
            2024, arXiv:2403.03206, equation 23).
        all others: not supported, accepted for interchange with diffusers; any value but the default raises ValueError.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    settings = {
        "num_train_timesteps": integer(1, MOST_TIMESTEPS, "the scheduler keeps tables of this length"),
        "shift": number(above=0),
        **{name: only(default) for name, default in FLOW_ONLY.items()},
    }
    solvers = {
        "euler": None,
        "heun": "FlowMatchHeunDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
    }
    objective = "flow"
    init_noise_sigma = 1.0
    last_signal = 0.0
    axis = "t"
    paper = "flow matching model (Lipman et al. 2022, [arXiv:2210.02747](https://arxiv.org/abs/2210.02747))"
    in_words = "x_t = (1 - t) x_0 + t noise, predicts the velocity noise - x_0"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ):
        self._set_up()

    @classmethod
    def own_settings(cls, config: dict) -> dict:
        """The settings of this class for the configuration of any scheduler of diffusers that samples flows."""
        shared = {name: config[name] for name in cls.settings if name in config}
        return {**shared, "shift": config.get("shift", config.get("flow_shift", 1.0))}

    def settings_of(self, solver: str) -> dict:
        """The settings with which diffusers' solver of this name samples the same flow."""
        T, shift = len(self), self.config.shift
        if solver == "heun":
            return {"num_train_timesteps": T, "shift": shift}
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        return {"num_train_timesteps": T, "flow_shift": shift, **flow}

    def level_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """t of timesteps (...)."""
        return timesteps / len(self)

    def timestep_of(self, levels: torch.Tensor) -> torch.Tensor:
        """The timesteps of t (...)."""
        return levels * len(self)

    @explained(CONTINUOUS_CALL)
    def target(self, original_samples, noise, timesteps) -> torch.Tensor:
        """The velocity noise - x_0, which is the same at all times. The arguments are those of `add_noise`."""
        return noise - original_samples

    def name_of(self, timestep) -> str:
        return f"t = {float(timestep) / len(self):.2g}"

    def _levels(self, n: int) -> torch.Tensor:
        # diffusers shifts the least time twice.
        times = torch.linspace(1, self._shifted(1 / len(self)), n, dtype=torch.float64)
        return self._shifted(times)

    def _shifted(self, t):
        return self.config.shift * t / (1 + (self.config.shift - 1) * t)

    def _signal(self, t):
        return 1 - t

    def _input_scale(self, t) -> float:
        return 1.0

    def _original(self, velocity, sample, t) -> torch.Tensor:
        return sample - t * velocity

    def _share(self, t):
        return t

    def _at_share(self, share):
        return self.timestep_of(share).float()
