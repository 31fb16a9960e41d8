"""Solvers by name: diffusers' schedulers, built from our configuration without losing or changing a setting."""

import json
import math

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.schedulers.noise import COSINE_SCHEDULE, CosineNoiseScheduler, LinearNoiseScheduler, NoiseScheduler

SOLVERS = {  # for sampling in few steps, by the names that papers and programs use
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
CLAMPING = ("ddpm", "ddim", "heun")  # implement `clip_sample`
# These need one timestep more than they take steps, so they cannot take T steps.
ONE_MORE = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.SASolverScheduler,
)
# These assume that the next timestep is T // n lower, whatever it is.
EVEN_STEPS = (diffusers.DDIMScheduler, diffusers.PNDMScheduler)


def scheduler_class(config: dict) -> type[NoiseScheduler]:
    """Our class for a configuration of ours or of diffusers' DDPM scheduler, by its `beta_schedule`."""
    cosine = config.get("beta_schedule") == COSINE_SCHEDULE and config.get("trained_betas") is None
    return CosineNoiseScheduler if cosine else LinearNoiseScheduler


def make_solver(solver: str | SchedulerMixin | None, scheduler, clip_sample: bool | None = None):
    """The solver of that name with the noise schedule and prediction type of `scheduler`.

    Args:
        solver: a name; a solver, which is returned; or `None`, for which `scheduler` is returned.
        clip_sample: whether the solver clamps the predicted x_0, for those in `CLAMPING`; `None`: as `scheduler` does.
            For a solver by name only.

    Raises:
        ValueError: for an unknown name, and for a solver that cannot have the betas or the settings of `scheduler`.
    """
    if solver is None or isinstance(solver, SchedulerMixin):
        if clip_sample is not None:
            raise ValueError(f"clip_sample={clip_sample} needs a scheduler by its name: one of {', '.join(CLAMPING)}")
        return scheduler if solver is None else solver
    if solver != "ddpm" and solver not in SOLVERS:
        raise ValueError(f"scheduler={solver!r}; choose from ddpm, {', '.join(SOLVERS)}, or give a scheduler")
    if clip_sample is not None and solver not in CLAMPING:
        raise ValueError(f"clip_sample={clip_sample}: scheduler={solver!r} can't clamp; {', '.join(CLAMPING)} can")
    # diffusers drops from a configuration what was left at its default, and another class may have another one.
    config = {**scheduler.config, "_use_default_values": []}
    config |= {} if clip_sample is None else {"clip_sample": clip_sample}
    if solver != "ddpm" and config.get("variance_type") == "learned_range":
        config["variance_type"] = "fixed_small"  # the pipeline passes them the prediction without the variance
    made = (scheduler_class(config) if solver == "ddpm" else getattr(diffusers, SOLVERS[solver])).from_config(config)
    # The last one is compared separately: with zero-terminal SNR some solvers replace 0 by 2^-24.
    theirs, ours = made.alphas_cumprod, scheduler.alphas_cumprod
    if not torch.allclose(theirs[:-1], ours[:-1], rtol=1e-3, atol=1e-7) or abs(theirs[-1] - ours[-1]) > 1e-6:
        why = " (rescale_betas_zero_snr)" if scheduler.config.get("rescale_betas_zero_snr") else ""
        raise ValueError(f"scheduler={solver!r} can't have this model's betas{why}; try ddim")
    return made


def set_timesteps_checked(solver, num_inference_steps: int | None, device) -> None:
    """`set_timesteps`, with a ValueError where a solver of diffusers would fail later or silently give wrong samples.

    Args:
        num_inference_steps: `None`: as many as the solver can take.
    """
    T, spacing = solver.config.num_train_timesteps, solver.config.get("timestep_spacing")
    most = T - 1 if isinstance(solver, ONE_MORE) and spacing != "trailing" else T
    least = 4 if isinstance(solver, diffusers.PNDMScheduler) else 1
    n, name = most if num_inference_steps is None else num_inference_steps, type(solver).__name__
    if not least <= n <= most:
        raise ValueError(f"num_inference_steps={n}: {name} takes {least} ... {most} steps of a model of {T} timesteps")
    solver.set_timesteps(n, device=device)
    if isinstance(solver, EVEN_STEPS) and spacing in ("trailing", "linspace"):
        # PNDM begins with Runge-Kutta steps, whose timesteps in between are not among `plms_timesteps`
        visited = torch.as_tensor(getattr(solver, "plms_timesteps", solver.timesteps)).cpu().unique()
        if n > 1 and not (visited.diff() == T // n).all():
            raise ValueError(
                f"num_inference_steps={n}: {name} with timestep_spacing={spacing!r} takes numbers of steps that divide "
                f"{T} into equal parts only; another solver takes any"
            )


def plain_config(scheduler) -> dict:
    """A scheduler's class and settings, as JSON gives them back."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    infinite = {key: str(v) for key, v in settings.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.loads(json.dumps({"class": type(scheduler).__name__, **settings, **infinite}, default=str))
