"""Schedulers whose noise level is a real number, as in flow matching and EDM: all that the two have in common.

    add_noise  x = signal(level) x_0 + level noise
    step       x_to = (to / level) x + (1 - to / level) x_0, with the predicted x_0

The level is the time t of flow matching, with signal(t) = 1 - t, or the sigma of EDM, with signal = 1. In both the
sampling ODE is dx / dlevel = (x - x_0) / level, and `step` is its Euler step from `level` to the lower level `to`. A
timestep is what the network is given, a function of the level. The levels that sampling visits are kept in float64.
"""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.schedulers.noise import CALL, MOST_TIMESTEPS, to_device
from ddpm_hf.utils.arguments import any_of, check, check_all, explained, integer, matching, number, require, show

TIMESTEP = any_of(
    "must be a finite number, or a tensor of numbers with one entry per image",
    number(),
    matching(lambda v: v.numel() > 0 and v.isfinite().all(), ""),
)
CONTINUOUS_CALL = CALL | dict.fromkeys(("timesteps", "timestep", "to_timestep"), TIMESTEP)


class ContinuousScheduler(SchedulerMixin, ConfigMixin):
    """The forward process and the Euler step for real noise levels; `IntegerTimesteps` explains the class's names.

    Subclasses define `settings`, `_signal`, `_original` (the predicted x_0), `_input_scale`, `level_of`, `timestep_of`,
    `_levels` and `target`.

    Attributes:
        timesteps: float32 (num_inference_steps,): what the network is given in sampling.
        levels: float64 (num_inference_steps + 1,): the noise levels of `timesteps`, descending, and 0 for the image.
    """

    order = 1
    own, deterministic, clamping, has_bound = "euler", "euler", (), False
    spread_in_words = "noise levels spread evenly over those of training"

    def _set_up(self) -> None:
        """Check the registered settings."""
        self.register_to_config(**check_all(self.config, self.settings), _use_default_values=[])
        self.num_inference_steps = None
        self._use_levels(self._levels(len(self)))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ forward process

    @explained(CONTINUOUS_CALL)
    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """x = signal x_0 + level noise.

        Args:
            original_samples, noise: x_0 and epsilon, (B, ...), of shapes that broadcast.
            timesteps: as the network is given them, () or (B,).
        """
        level = self._level_at(timesteps, original_samples)
        return (self._signal(level) * original_samples + level * noise).to(original_samples.dtype)

    @explained(CONTINUOUS_CALL)
    def scale_model_input(self, sample: torch.Tensor, timestep) -> torch.Tensor:
        """What the network is given for x = `sample` (B, ...) at a timestep, () or (B,)."""
        return (self._input_scale(self._level_at(timestep, sample)) * sample).to(sample.dtype)

    @explained(CONTINUOUS_CALL)
    def predicted_original(self, model_output, timestep, sample) -> torch.Tensor:
        """The predicted x_0 (B, ...) of `model_output` for x = `sample` at `timestep`, () or (B,)."""
        return self._original(model_output, sample, self._level_at(timestep, sample)).to(sample.dtype)

    def _level_at(self, timesteps, sample) -> torch.Tensor:
        """The noise levels of timesteps () or (B,), each (B, 1, ...) to broadcast with `sample`."""
        timesteps = to_device(torch.as_tensor(timesteps).reshape(-1), sample.device)
        level = self.level_of(timesteps.to(torch.promote_types(sample.dtype, torch.float32)))
        return level.reshape(-1, *(1,) * (sample.ndim - 1))

    # ------------------------------------------------------------------ between levels

    @explained(CONTINUOUS_CALL)
    def renoise(self, sample, timestep, to_timestep, noise) -> torch.Tensor:
        """A draw from q(x_to | x) for `sample` at `timestep`, at a timestep `to_timestep` of more noise."""
        level, to = (self._level_at(each, sample) for each in (timestep, to_timestep))
        if not (level < to).all():
            rule = "the second must have more noise"
            raise ValueError(f"timestep={show(timestep)}, to_timestep={show(to_timestep)}: {rule}")
        gain = self._signal(to) / self._signal(level)
        return gain * sample + (to.square() - (gain * level).square()).sqrt() * noise

    @explained(CONTINUOUS_CALL)
    def inverse_step(self, model_output, timestep, to_timestep, sample, prev_sample) -> torch.Tensor:
        """The x at `timestep` that one Euler step maps to `prev_sample` at `to_timestep`; None is the image.

        The derivative is that which `model_output` predicts for `sample` at `timestep`.
        """
        level = self._level_at(timestep, sample)
        to = 0.0 if to_timestep is None else self._level_at(to_timestep, sample)
        return prev_sample + (level - to) / level * (sample - self._original(model_output, sample, level))

    # ------------------------------------------------------------------ reverse process

    @explained(CONTINUOUS_CALL)
    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose the levels that sampling visits, those of diffusers' schedulers with these settings."""
        n = check("num_inference_steps", num_inference_steps, integer(1, MOST_TIMESTEPS, "all levels are in memory"))
        self.num_inference_steps = n
        self._use_levels(self._levels(n), device)

    def _use_levels(self, levels: torch.Tensor, device=None) -> None:
        """Set `levels` from float64 (n,), descending and on the CPU, and `timesteps`."""
        self.timesteps = self.timestep_of(levels).float().to(device)
        levels = torch.cat([levels, levels.new_zeros(1)])
        on_mps = device is not None and torch.device(device).type == "mps"  # it has no float64
        self.levels = (levels.float() if on_mps else levels).to(device)

    @explained(CONTINUOUS_CALL)
    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """The Euler step from `timestep`, one of `timesteps`, to the next of them, or to the image after the last.

        Args:
            model_output, sample: the network's output for x, and x, (B, ...).
            timestep: a number, or a tensor of one. On a GPU its value is not copied to the host: the nearest is taken.
            generator: not used: the step is deterministic.

        Returns:
            `DDPMSchedulerOutput` with `prev_sample` and `pred_original_sample`, or a tuple of both, each (B, ...).
        """
        timestep = torch.as_tensor(timestep, dtype=self.timesteps.dtype, device=self.timesteps.device).reshape(1)
        distance = (self.timesteps - timestep).abs()
        index = distance.argmin().reshape(1)
        if distance.device.type == "cpu" and distance[index] != 0:
            visited = f"{self.timesteps[0]:g} ... {self.timesteps[-1]:g} ({len(self.timesteps)} steps)"
            require("timestep", timestep.item(), False, f"must be one of scheduler.timesteps, {visited}")
        # Tensors without dimensions do not change the dtype of the sample that they multiply.
        level, to = (self.levels.index_select(0, index + k).squeeze() for k in (0, 1))
        original = self._original(model_output, sample, level)
        prev_sample = to / level * sample + (1 - to / level) * original
        if not return_dict:
            return prev_sample, original
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    # ------------------------------------------------------------------ what `IntegerTimesteps` explains

    def part_of(self, timesteps: torch.Tensor, parts: int) -> torch.Tensor:
        return (self._share(self.level_of(timesteps)) * parts).long().clamp(0, parts - 1)

    def spread(self, number: int) -> torch.Tensor:
        return self._at_share(torch.linspace(0, 1, number, dtype=torch.float64))

    def midpoints(self, number: int) -> torch.Tensor:
        return self._at_share((torch.arange(number, dtype=torch.float64) + 0.5) / number)

    def nth_timestep(self, n: int) -> float:
        """The timestep of number n, from 0, of those that sampling in T steps visits, from the least noise."""
        return self.timestep_of(self._levels(len(self))).float().flip(0)[n].item()

    def for_picture(self, sample, timestep) -> torch.Tensor:
        return sample

    def original_of_input(self, model_output, timestep, model_input) -> torch.Tensor:
        sample = model_input / self._input_scale(self._level_at(timestep, model_input))
        return self.predicted_original(model_output, timestep, sample)

    def check_invertible(self, timestep) -> None:
        """Any step can be inverted."""
