"""What the package asks any scheduler of ours about its timesteps, answered for the integers 0 ... T-1 of a DDPM.

`ContinuousScheduler` answers the same questions for noise levels that are real numbers.
"""

import torch

SOLVERS = {  # name in papers and other programs -> class in diffusers
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "sa": "SASolverScheduler",
}
# Settings, of any scheduler, that decide what the network learns to predict
PREDICTION = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
              "rescale_betas_zero_snr", "sigma_data")  # fmt: skip
CLAMPING = ("ddpm", "ddim", "heun")  # solvers that implement `clip_sample`


class IntegerTimesteps:
    """The answers of a scheduler whose timesteps are 0 ... T-1.

    Attributes:
        solvers: the classes of diffusers that sample its models, by name; None for the scheduler itself.
        own, deterministic: the names of the scheduler itself, and of the solver that `invert` inverts.
        clamping: the names of the solvers that implement `clip_sample`.
        has_bound: whether the variational bound, and so bits per dimension, are defined.
        axis, spread_in_words: for pictures and texts.
    """

    solvers = {"ddpm": None, **SOLVERS}
    objective = "ddpm"  # of training
    own, deterministic, clamping, has_bound = "ddpm", "ddim", CLAMPING, True
    axis = "timestep / T"
    spread_in_words = "timesteps spread evenly over 0 ... T-1"
    paper = (
        "denoising diffusion probabilistic model (Ho et al. 2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239))"
    )
    last_signal_name = "sqrt(alpha_bar_T)"
    more_noise = (
        """Use --scheduler '{"beta_schedule": "squaredcos_cap_v2"}', more timesteps, or --prediction_type """
        """v_prediction with --scheduler '{"rescale_betas_zero_snr": true}'"""
    )

    @property
    def in_words(self) -> str:
        """The forward process, for the model card."""
        config = self.config
        return f"T = {len(self)}, {config.beta_schedule} betas, predicts {config.prediction_type}"

    @property
    def last_signal(self) -> float:
        """The contrast of the image that is left at the most noise, relative to that of the noisy image."""
        return self.alphas_cumprod_float64[-1].sqrt().item()

    @property
    def last_in_words(self) -> str:
        return f"after all {len(self)} timesteps"

    def part_of(self, timesteps: torch.Tensor, parts: int) -> torch.Tensor:
        """Which of so many equal ranges of timesteps each of `timesteps` (B,) is in: int64 (B,)."""
        return timesteps * parts // len(self)

    def spread(self, number: int) -> torch.Tensor:
        """`number` timesteps, evenly spread from the least to the most noise."""
        return torch.linspace(0, len(self) - 1, number).round().long()

    def midpoints(self, number: int) -> torch.Tensor:
        """The midpoints of M = min(`number`, T) equal ranges of timesteps: (M,)."""
        T = len(self)
        M = min(number, T)
        return ((torch.arange(M) + 0.5) * T / M).long()

    def name_of(self, timestep) -> str:
        """A timestep for people."""
        return f"t = {int(timestep)}"

    def for_picture(self, sample, timestep) -> torch.Tensor:
        """x (B, ...) at one timestep, in a range that can be shown."""
        return sample

    def original_of_input(self, model_output, timestep, model_input) -> torch.Tensor:
        """The predicted x_0 (B, ...), not clamped, of the network's output for its own input.

        Args:
            timestep: what the network was given, which a solver may have chosen between two integers.
            model_input: what `scale_model_input` returned, (B, ...).
        """
        return self.predicted_original(model_output, round(float(timestep)), model_input)

    def check_invertible(self, timestep) -> None:
        """Raise ValueError if nothing of the image is left at a timestep, from which no step can be inverted."""
        if self.alphas_cumprod[int(timestep)] == 0:
            raise ValueError(
                f"invert can't reach timestep {timestep}, where rescale_betas_zero_snr=True leaves nothing of the "
                "image; use a scheduler with timestep_spacing='leading'"
            )
