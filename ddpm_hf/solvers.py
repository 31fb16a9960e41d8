"""Solvers by name: diffusers' schedulers, built from our configuration with nothing lost or changed."""

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


def scheduler_class(config: dict) -> type[NoiseScheduler]:
    """Ours that a configuration, of ours or of diffusers' DDPM scheduler, asks for by its `beta_schedule`."""
    cosine = config.get("beta_schedule") == COSINE_SCHEDULE and config.get("trained_betas") is None
    return CosineNoiseScheduler if cosine else LinearNoiseScheduler


def make_solver(solver: str | SchedulerMixin | None, scheduler, clip_sample: bool | None = None):
    """The solver of that name for what `scheduler` was trained with; `None`: `scheduler`; a solver: itself.

    Args:
        clip_sample: of a solver by name, in place of what `scheduler` has. "ddpm", which is ours, "ddim" and "heun"
            clamp the predicted x_0 if it says so; the others can't.

    Raises:
        ValueError: a name that is not there, or a solver that can't have the betas or the walk of `scheduler`.
    """
    if not isinstance(solver, str):
        if clip_sample is not None:
            raise ValueError(f"clip_sample={clip_sample}: say for which scheduler, by its name")
        return solver or scheduler
    clip = {} if clip_sample is None else {"clip_sample": clip_sample}
    if solver == "ddpm":
        return scheduler_class(scheduler.config).from_config(scheduler.config, **clip)
    if solver not in SOLVERS:
        raise ValueError(f"scheduler={solver!r}; choose from ddpm, {', '.join(SOLVERS)}")
    made = getattr(diffusers, SOLVERS[solver]).from_config(scheduler.config, **clip)
    for name in ("num_train_timesteps", "prediction_type", "timestep_spacing"):
        if made.config.get(name) != scheduler.config.get(name):
            has, wants = made.config.get(name), scheduler.config.get(name)
            raise ValueError(f"scheduler={solver!r} has {name}={has!r} and the model wants {wants!r}")
    # The last one apart: with zero-terminal SNR some solvers put 2^-24 in the place of 0.
    theirs, ours = made.alphas_cumprod, scheduler.alphas_cumprod
    close = torch.allclose(theirs[:-1], ours[:-1], rtol=1e-3, atol=1e-7) and abs(theirs[-1] - ours[-1]) < 1e-6
    if not close:
        raise ValueError(f"scheduler={solver!r} can't have this model's betas (rescale_betas_zero_snr); try ddim")
    return made
