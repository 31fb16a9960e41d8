"""The loop over timesteps that every method of `DDPMCustomPipeline` runs."""

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.pipelines.images import OUTPUT_TYPES
from ddpm_hf.schedulers.noise import GENERATORS, draw_noise
from ddpm_hf.schedulers.solvers import add_noise, own_scheduler, scale_model_input, start_scale
from ddpm_hf.utils.arguments import boolean, integer, matching, number, one_of, optional

# Arguments of all methods of the pipeline that sample. Those that are not here depend on the network or the scheduler.
BATCH = integer(1, 2**16, "a batch is in memory at once; sample in several calls")
CALL = {
    "batch_size": optional(BATCH),
    "generator": GENERATORS,
    "output_type": one_of(*OUTPUT_TYPES),
    "return_dict": boolean,
    "callback_on_step_end": optional(matching(callable, "must be a function")),
    "guidance_scale": number(0),
    "strength": optional(number(above=0, most=1)),
    "clip_sample": optional(boolean),
    "jump_length": integer(1),
    "num_resamples": integer(1, 1000, "each is a pass over all timesteps"),
    "iterations": integer(1, 1000, "each is a network evaluation at every step"),
    "steps": integer(2, 2**16, "all images are in memory at once"),
}
MOST_VALUES = 2**31  # of the images of one call


@dataclass
class DenoisingLoop:
    """The settings that all steps of one call share, and the steps.

    Args:
        pipeline: a `DDPMCustomPipeline`: its network predicts, and its `interrupt` ends the loop.
        solver: the scheduler, with its timesteps set.
        batch_size: B.
        labels: int64 (B,) on the network's device; `None` for an unconditional network.
        guidance_scale, generator, callback: see `DDPMCustomPipeline.__call__`.
        guide: the network of autoguidance; `None`: that of the pipeline, without a class.
    """

    pipeline: DiffusionPipeline
    solver: SchedulerMixin
    batch_size: int
    labels: torch.Tensor | None
    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    callback: Callable | None
    guide: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        self.timesteps = self.solver.timesteps
        # Deterministic solvers of diffusers take no generator, and no solver of diffusers takes a tuple of generators.
        self._draws_noise = "generator" in inspect.signature(self.solver.step).parameters
        self.generator = list(self.generator) if isinstance(self.generator, tuple) else self.generator
        self._learned_variance = self.solver.config.get("variance_type") == "learned_range"
        self._ours = None  # computes x_0 for the callback where the solver does not
        if self.callback is not None:
            with contextlib.suppress(ValueError):  # ours does not support these settings, so x_0 stays None
                self._ours = own_scheduler(self.solver)

    def draw_noise(self, shape) -> torch.Tensor:
        return draw_noise(shape, self.generator, self.pipeline._execution_device, self.pipeline._state_dtype)

    def start_noise(self, shape) -> torch.Tensor:
        """The noise from which the solver starts."""
        return self.draw_noise(shape) * start_scale(self.solver)

    def skip_steps(self, number: int) -> None:
        """Start `number` steps later."""
        first = number * self.solver.order  # solvers of order 2 have two timesteps per step
        if hasattr(self.solver, "set_begin_index"):
            self.solver.set_begin_index(first)
        elif first and isinstance(self.solver, PNDMScheduler):
            raise ValueError("scheduler: PNDMScheduler can't start in the middle of its timesteps; choose another one")
        self.timesteps = self.timesteps[first:]
        self.pipeline.num_timesteps = len(self.timesteps)

    def start_from_image(self, image: torch.Tensor, strength: float) -> torch.Tensor:
        """Keep the last `strength` of the steps, and return `image` (B, C, H, W) with the noise of their first one."""
        steps = self.solver.num_inference_steps
        self.skip_steps(steps - max(1, round(steps * strength)))
        noise = self.draw_noise(image.shape)
        return add_noise(self.solver, image, noise, self.timesteps[:1].expand(self.batch_size))

    def run(self, sample: torch.Tensor) -> torch.Tensor:
        """Denoise x (B, C, H, W) from the first timestep to the image."""
        for i, timestep in enumerate(self.pipeline.progress_bar(self.timesteps)):
            if self.pipeline.interrupt:
                break
            sample = self.end_step(i, timestep, self.step(sample, timestep))
        return sample

    def step(self, sample: torch.Tensor, timestep) -> dict[str, torch.Tensor | None]:
        """x after one step, and the predicted x_0, which is `None` if neither the solver nor the callback needs it."""
        model_input = scale_model_input(self.solver, sample, timestep)
        model_output = self.predict(model_input, timestep)
        prediction = model_output[:, : sample.shape[1]]
        solver_input = model_output if self._learned_variance else prediction
        options = {"generator": self.generator} if self._draws_noise else {}
        output = self.solver.step(solver_input, timestep, sample, **options)
        original = getattr(output, "pred_original_sample", None)
        if original is None and self._ours is not None:
            original = self._ours.original_of_input(prediction, timestep, model_input)
        return {"sample": output.prev_sample, "pred_original_sample": original}

    def end_step(self, i: int, timestep, tensors: dict) -> torch.Tensor:
        """Call the callback after step `i`. Return x, or the x that the callback returned."""
        changed = {} if self.callback is None else self.callback(self.pipeline, i, timestep, tensors) or {}
        return changed.get("sample", tensors["sample"])

    def predict(self, sample: torch.Tensor, timestep) -> torch.Tensor:
        """The network's output (B, C or 2 C, H, W) for `sample` (B, C, H, W), in its dtype, with guidance.

        For a given x_t the noise, x_0 and v are affine in one another, so guidance is the same for each of them. A
        learned variance is that of the class.
        """
        unet, labels, dtype, C = self.pipeline.unet, self.labels, sample.dtype, sample.shape[1]
        timestep = torch.as_tensor(timestep, device=sample.device)  # torch.compile makes a graph for each Python number
        classes = {} if labels is None else {"class_labels": labels}
        if self.guidance_scale == 1:
            output = unet(sample.to(unet.dtype), timestep, **classes).sample.to(dtype)
        else:
            if self.guide is not None:
                networks = (each(sample.to(each.dtype), timestep, **classes).sample for each in (unet, self.guide))
                output, weaker = (each.to(dtype) for each in networks)
            else:
                both, null = (
                    torch.cat([sample, sample]).to(unet.dtype),
                    torch.full_like(labels, unet.config.num_classes),
                )
                both = unet(both, timestep, class_labels=torch.cat([labels, null])).sample
                output, weaker = both.to(dtype).chunk(2)
            guided = weaker[:, :C] + self.guidance_scale * (output[:, :C] - weaker[:, :C])
            output = torch.cat([guided, output[:, C:]], dim=1)
        # Clamping x_0 would turn infinities into black or white pixels. NaN survives until the check of the samples,
        # and this needs no synchronisation with the GPU.
        return torch.nan_to_num(output, nan=math.nan, posinf=math.nan, neginf=math.nan)
