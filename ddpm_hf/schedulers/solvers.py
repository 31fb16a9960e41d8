"""diffusers' solvers by name, built from our scheduler's configuration with the same betas and settings."""

import json
import math

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.schedulers.continuous import ContinuousScheduler
from ddpm_hf.schedulers.edm import EDMScheduler
from ddpm_hf.schedulers.flow import FlowMatchScheduler
from ddpm_hf.schedulers.noise import COSINE_SCHEDULE, CosineNoiseScheduler, LinearNoiseScheduler, NoiseScheduler
from ddpm_hf.schedulers.timesteps import SOLVERS
from ddpm_hf.utils.arguments import boolean, check, one_of, optional

EVERY_SOLVER = dict.fromkeys(
    name for kind in (NoiseScheduler, FlowMatchScheduler, EDMScheduler) for name in kind.solvers
)
# Objective -> its scheduler; that of "ddpm" depends on its `beta_schedule`
CONTINUOUS = {"flow": FlowMatchScheduler, "edm": EDMScheduler}
# Solvers that need one more timestep than steps, so they cannot take T steps
ONE_MORE = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.SASolverScheduler,
)
# Solvers that assume that consecutive timesteps are T // num_inference_steps apart
EVEN_STEPS = (diffusers.DDIMScheduler, diffusers.PNDMScheduler)


def scheduler_class(config: dict) -> type[NoiseScheduler] | type[ContinuousScheduler]:
    """Our scheduler class for a configuration, which may be diffusers'."""
    if "sigma_data" in config:
        return EDMScheduler
    if "shift" in config or config.get("prediction_type") == "flow_prediction":
        return FlowMatchScheduler
    cosine = config.get("beta_schedule") == COSINE_SCHEDULE and config.get("trained_betas") is None
    return CosineNoiseScheduler if cosine else LinearNoiseScheduler


def own_scheduler(scheduler):
    """`scheduler` if it is one of ours, else ours with the settings of this scheduler of diffusers.

    Raises:
        ValueError: ours does not support a setting.
    """
    if isinstance(scheduler, NoiseScheduler | ContinuousScheduler):
        return scheduler
    return make_solver(scheduler_class(scheduler.config).own, scheduler)


def make_solver(solver: str | SchedulerMixin | None, scheduler, clip_sample: bool | None = None):
    """Build the named solver for the models of `scheduler`.

    Args:
        solver: a name in `solvers` of our class for the scheduler, such as `"ddpm"` or `"euler"`; a solver, which is
            returned; or `None`, which returns `scheduler`.
        clip_sample: whether a solver named in `clamping` of our class clamps the predicted x_0; `None`: as `scheduler`
            does.

    Raises:
        ValueError: an unknown name, or a solver that does not support `clip_sample` or the betas of `scheduler`.
    """
    check("clip_sample", clip_sample, optional(boolean))
    kind = scheduler_class(scheduler.config)
    choices = ", ".join(kind.clamping)
    if solver is None or isinstance(solver, SchedulerMixin):
        if clip_sample is not None and choices:
            raise ValueError(f"clip_sample={clip_sample} needs the name of a scheduler: {choices}")
        made = scheduler if solver is None else solver
    else:
        check("scheduler", solver, one_of(*kind.solvers, hint=", or a scheduler object"))
        if clip_sample is not None and choices and solver not in kind.clamping:
            raise ValueError(
                f"clip_sample={clip_sample} is not supported by scheduler={solver!r}; choose from {choices}"
            )
        made = (_with_betas if issubclass(kind, NoiseScheduler) else _continuous)(solver, scheduler, kind, clip_sample)
    if clip_sample is not None and not choices:
        raise ValueError(f"clip_sample={clip_sample} is not supported by models of {kind.__name__}; leave it out")
    return made


def _continuous(solver: str, scheduler, kind, clip_sample: None):
    """The named solver for a model with continuous noise levels."""
    ours = kind.from_config({**kind.own_settings(scheduler.config), "_use_default_values": []})
    name = kind.solvers[solver]
    if name is None:
        return ours
    return getattr(diffusers, name).from_config({**ours.settings_of(solver), "_use_default_values": []})


def _with_betas(solver: str, scheduler, kind, clip_sample: bool | None):
    """The named solver with the betas and the prediction type of `scheduler`."""
    # An empty _use_default_values makes diffusers pass on every setting, also those that were left at their default.
    config = {**scheduler.config, "_use_default_values": []}
    config |= {} if clip_sample is None else {"clip_sample": clip_sample}
    if solver != "ddpm" and config.get("variance_type") == "learned_range":
        config["variance_type"] = "fixed_small"  # the pipeline passes these solvers no variance
    made = (scheduler_class(config) if solver == "ddpm" else getattr(diffusers, SOLVERS[solver])).from_config(config)
    # The last entry is compared with a tolerance: with zero-terminal SNR some solvers replace 0 by 2^-24.
    theirs, ours = made.alphas_cumprod, scheduler.alphas_cumprod
    if not torch.allclose(theirs[:-1], ours[:-1], rtol=1e-3, atol=1e-7) or abs(theirs[-1] - ours[-1]) > 1e-6:
        why = " (rescale_betas_zero_snr=True)" if scheduler.config.get("rescale_betas_zero_snr") else ""
        raise ValueError(f"scheduler={solver!r} does not support the betas of this model{why}; ddim does")
    return made


def nth_timestep(scheduler, n: int):
    """The timestep of number n in 0 ... T-1, from the least noise."""
    kind = scheduler_class(scheduler.config)
    return n if issubclass(kind, NoiseScheduler) else own_scheduler(scheduler).nth_timestep(n)


# ---------------------------------------------------------------- what some solvers of diffusers lack


def start_scale(solver) -> float:
    """The standard deviation of the noise from which `solver` starts: 1 for diffusers' flows, which do not say it."""
    return getattr(solver, "init_noise_sigma", 1.0)


def scale_model_input(solver, sample: torch.Tensor, timestep) -> torch.Tensor:
    """What the network is given. diffusers' solvers for flows lack this method."""
    return solver.scale_model_input(sample, timestep) if hasattr(solver, "scale_model_input") else sample


def add_noise(solver, original_samples, noise, timesteps) -> torch.Tensor:
    """x at the solver's `timesteps` (B,). diffusers' solvers for flows name this method `scale_noise`."""
    if hasattr(solver, "add_noise"):
        return solver.add_noise(original_samples, noise, timesteps)
    return solver.scale_noise(original_samples, timesteps, noise)


# ---------------------------------------------------------------- timesteps


def set_timesteps_checked(solver, num_inference_steps: int | None, device) -> None:
    """Call `solver.set_timesteps`; raise ValueError where diffusers' solvers would fail later or sample wrongly.

    Args:
        num_inference_steps: number of steps; `None`: the most that the solver supports.
    """
    T, spacing = solver.config.num_train_timesteps, solver.config.get("timestep_spacing")
    most = T - 1 if isinstance(solver, ONE_MORE) and spacing != "trailing" else T
    least = 4 if isinstance(solver, diffusers.PNDMScheduler) else 1
    n, name = most if num_inference_steps is None else num_inference_steps, type(solver).__name__
    if not least <= n <= most:
        raise ValueError(f"num_inference_steps={n}: {name} takes {least} ... {most} steps for a model of {T} timesteps")
    solver.set_timesteps(n, device=device)
    if isinstance(solver, EVEN_STEPS) and spacing in ("trailing", "linspace"):
        # PNDM starts with Runge-Kutta steps, whose intermediate timesteps are not in `plms_timesteps`.
        visited = torch.as_tensor(getattr(solver, "plms_timesteps", solver.timesteps)).cpu().unique()
        if n > 1 and not (visited.diff() == T // n).all():
            raise ValueError(
                f"num_inference_steps={n}: {name} with timestep_spacing={spacing!r} needs evenly spaced timesteps: "
                f"choose a divisor of {T}, or another solver"
            )


def plain_config(scheduler) -> dict:
    """The class and the settings of a scheduler, in types that JSON has."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    infinite = {key: str(v) for key, v in settings.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.loads(json.dumps({"class": type(scheduler).__name__, **settings, **infinite}, default=str))
