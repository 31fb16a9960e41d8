"""Solvers by name: diffusers' schedulers, built from our configuration with nothing lost or changed."""

import json
import math

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.scheduler import COSINE_SCHEDULE, CosineNoiseScheduler, LinearNoiseScheduler, NoiseScheduler

SOLVERS = {  # what takes few steps, by the names that papers and programs have for it
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
CLAMPING = ("ddpm", "ddim", "heun")  # know `clip_sample`
# These look at one timestep more than they take steps, and at T steps there is none left.
ONE_MORE = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.SASolverScheduler,
)
# These step by T // n, wherever the next timestep is.
EVEN_STEPS = (diffusers.DDIMScheduler, diffusers.PNDMScheduler)


def scheduler_class(config: dict) -> type[NoiseScheduler]:
    """Ours that a configuration, of ours or of diffusers' DDPM scheduler, asks for by its `beta_schedule`."""
    cosine = config.get("beta_schedule") == COSINE_SCHEDULE and config.get("trained_betas") is None
    return CosineNoiseScheduler if cosine else LinearNoiseScheduler


def make_solver(solver: str | SchedulerMixin | None, scheduler, clip_sample: bool | None = None):
    """The solver of that name for what `scheduler` was trained with; `None`: `scheduler`; a solver: itself.

    Args:
        clip_sample: of a solver by name, in place of what `scheduler` has: whether it clamps the predicted x_0, which
            those in `CLAMPING` can.

    Raises:
        ValueError: a name that is not there, or a solver that can't have the betas or the walk of `scheduler`.
    """
    if solver is None or isinstance(solver, SchedulerMixin):
        if clip_sample is not None:
            raise ValueError(f"clip_sample={clip_sample}: say for which scheduler, by its name")
        return scheduler if solver is None else solver
    if solver != "ddpm" and solver not in SOLVERS:
        raise ValueError(f"scheduler={solver!r}; choose from ddpm, {', '.join(SOLVERS)}, or give a scheduler")
    if clip_sample is not None and solver not in CLAMPING:
        raise ValueError(f"clip_sample={clip_sample}: scheduler={solver!r} can't clamp; {', '.join(CLAMPING)} can")
    # diffusers drops from a configuration what was left at its default, and another class may have another one.
    config = {**scheduler.config, "_use_default_values": []}
    config |= {} if clip_sample is None else {"clip_sample": clip_sample}
    if solver != "ddpm" and config.get("variance_type") == "learned_range":
        config["variance_type"] = "fixed_small"  # the pipeline gives them the prediction alone
    if solver != "ddpm" and config.get("timestep_spacing") == "quadratic":
        raise ValueError(f"scheduler={solver!r}: timestep_spacing='quadratic' is known to ddpm_hf alone; use ddpm")
    made = (scheduler_class(config) if solver == "ddpm" else getattr(diffusers, SOLVERS[solver])).from_config(config)
    for name in ("num_train_timesteps", "prediction_type", "timestep_spacing"):
        has, wants = made.config.get(name), scheduler.config.get(name)
        if name in made.config and name in scheduler.config and has != wants:
            raise ValueError(f"scheduler={solver!r} has {name}={has!r} and the model wants {wants!r}")
    # The last one apart: with zero-terminal SNR some solvers put 2^-24 in the place of 0.
    theirs, ours = made.alphas_cumprod, scheduler.alphas_cumprod
    if not torch.allclose(theirs[:-1], ours[:-1], rtol=1e-3, atol=1e-7) or abs(theirs[-1] - ours[-1]) > 1e-6:
        why = " (rescale_betas_zero_snr)" if scheduler.config.get("rescale_betas_zero_snr") else ""
        raise ValueError(f"scheduler={solver!r} can't have this model's betas{why}; try ddim")
    return made


def set_walk(solver, num_inference_steps: int | None, device) -> None:
    """`set_timesteps`, with a ValueError where a solver of diffusers would fail later or go wrong without a word.

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
        # without those between, of PNDM's first steps
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
