"""Builds the network, the scheduler and the objective of a configuration for given images and classes."""

import inspect
from collections.abc import Callable

from diffusers import UNet2DModel

from ddpm_hf.data.pages import EIGHT_BITS
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.pipeline import load_pipeline, num_classes
from ddpm_hf.schedulers.solvers import CONTINUOUS, make_solver, scheduler_class, set_timesteps_checked
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.edm import EDMLoss
from ddpm_hf.training.flow import FlowMatchingLoss
from ddpm_hf.training.loss import DenoisingLoss

MOST_SIGNAL = 0.05  # of sqrt(alpha_bar_T); 0.006 with the 1000 linear betas of Ho et al.


def build_model(
    config: TrainConfig,
    shape: tuple[int, int, int],
    class_names: list[str] | None,
    measure_std: Callable[[], float] | None = None,
):
    """The network and the scheduler for training, new or those of `pretrained_model_name_or_path`.

    Args:
        shape: (C, H, W) of the images.
        class_names: the names of the classes; None without classes.
        measure_std: called for the standard deviation of the values of the images, if the scheduler has to know it.

    Raises:
        ValueError: invalid settings, or settings that do not fit the images.
    """
    source = config.pretrained_model_name_or_path
    pipeline = None if source is None else load_pipeline(source, "pretrained_model_name_or_path")
    scheduler = _build_scheduler(config, {} if pipeline is None else pipeline.scheduler.config, measure_std)
    unet = build_network(config, shape, class_names, None if pipeline is None else pipeline.unet)
    variance, predicts = scheduler.config.get("variance_type"), unet.config.get("out_channels") or shape[0]
    if (variance == "learned_range") != (predicts == 2 * shape[0]):
        raise ValueError(
            f"learned_variance={config.learned_variance}: the network predicts {predicts} channels for images of "
            f"{shape[0]}, but the scheduler has variance_type={variance!r}. For a new network, "
            "set only learned_variance; to fine-tune a network that has it, leave it out"
        )
    if config.objective in CONTINUOUS and unet.config.get("time_table_size"):
        raise ValueError(
            f"time_table_size={unet.config.time_table_size}: the network knows integer timesteps only, and "
            f"objective={config.objective!r} has others; leave it out"
        )
    return unet, scheduler


def build_objective(config: TrainConfig, levels: int):
    """The loss that `config.objective` names; `levels`: values that a pixel can have."""
    names = {"mean": config.noise_level_mean, "std": config.noise_level_std, "times": config.flow_times}
    given = {name: value for name, value in names.items() if value is not None}
    if config.objective == "ddpm":
        return DenoisingLoss(config.snr_gamma, levels)
    return (FlowMatchingLoss if config.objective == "flow" else EDMLoss)(**given)


def _build_scheduler(config: TrainConfig, pretrained: dict, measure_std):
    settings = {**config.scheduler, **({"prediction_type": config.prediction_type} if config.prediction_type else {})}
    if config.learned_variance:
        settings["variance_type"] = "learned_range"
    kind = CONTINUOUS.get(config.objective) or scheduler_class({**pretrained, **settings})
    if pretrained and (before := scheduler_class(pretrained).objective) != config.objective:
        raise ValueError(
            f"objective={config.objective!r}: the pipeline {config.pretrained_model_name_or_path!r} was trained with "
            f"objective={before!r}, and fine-tuning needs the same"
        )
    unknown = sorted(settings.keys() - inspect.signature(kind.__init__).parameters.keys())
    if unknown:
        raise ValueError(f"scheduler={config.scheduler!r}: {kind.__name__} has no {', '.join(unknown)}")
    settings = {**pretrained, **settings}
    if kind.objective != "ddpm":
        settings = kind.own_settings(settings)  # without those of diffusers' solvers
    if "sigma_data" in kind.settings and "sigma_data" not in settings and measure_std is not None:
        settings["sigma_data"] = measure_std()
    scheduler = kind.from_config(settings)
    if config.snr_gamma is not None and scheduler.config.rescale_betas_zero_snr:
        raise ValueError(
            f"snr_gamma={config.snr_gamma:g} with rescale_betas_zero_snr gives the first timestep of sampling "
            "the weight 0: leave one of them out"
        )
    solver = make_solver(config.sampling_scheduler, scheduler)
    for steps in filter(None, (config.ddpm_num_inference_steps, config.sampling_steps)):
        set_timesteps_checked(solver, steps, None)  # raises now if the number is invalid
    return scheduler


def signal_left(scheduler) -> str | None:
    """A warning if the last timestep of the forward process is far from the pure noise at which sampling begins."""
    signal = scheduler.last_signal
    if signal <= MOST_SIGNAL:
        return None
    return (
        f"{scheduler.last_signal_name}={signal:.2f}: {scheduler.last_in_words} an image still has {signal:.0%} of its "
        "contrast, but sampling begins at pure noise, which the network never sees, so samples will be pale or tinted. "
        + scheduler.more_noise
    )


def build_network(
    config: TrainConfig,
    shape: tuple[int, int, int],
    class_names: list[str] | None,
    pretrained: DDPMUNet | UNet2DModel | None = None,
) -> DDPMUNet | UNet2DModel:
    """A new network or the pretrained one, after checking that it fits the images and their classes.

    Args:
        shape: (C, H, W) of the images.
        class_names: the names of the classes; None without classes.
        pretrained: the network of `pretrained_model_name_or_path`.

    Raises:
        ValueError: `config.unet` has invalid arguments, or the network has other channels or classes.
    """
    channels, height, width = shape
    if pretrained is None:
        settings = {"sample_size": height if height == width else (height, width), "in_channels": channels}
        if config.learned_variance:
            settings["out_channels"] = 2 * channels
        if config.class_conditional and class_names:
            settings |= {"num_classes": len(class_names), "class_names": class_names}
        unet = DDPMUNet(**settings | config.unet)
    else:
        unet = pretrained
    if unet.config.in_channels != channels:
        source = config.pretrained_model_name_or_path
        name = "unet" if source is None else f"pretrained_model_name_or_path={source!r}"
        raise ValueError(
            f"{name} has {unet.config.in_channels} input channels and the images have {channels}: set channels"
        )
    if isinstance(unet, UNet2DModel):
        parts = 2 ** (len(unet.config.block_out_channels) - 1)
        if height % parts or width % parts:
            raise ValueError(
                f"pretrained_model_name_or_path={config.pretrained_model_name_or_path!r}: its UNet2DModel needs sides "
                f"that are multiples of {parts}, and the images are {width}x{height} pixels: give --resolution HEIGHT "
                "WIDTH"
            )
    _check_classes(config, unet, class_names)
    value_range = None if config.value_range == list(EIGHT_BITS) else config.value_range
    if isinstance(unet, DDPMUNet) and unet.config.value_range != value_range:
        unet.register_to_config(value_range=value_range)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _check_classes(config: TrainConfig, unet: DDPMUNet | UNet2DModel, names: list[str] | None) -> None:
    """Raise ValueError if the network and the images have different classes; store their names in the network."""
    classes = num_classes(unet)
    if not config.class_conditional:
        if classes is not None:
            raise ValueError(f"the network has {classes} classes (num_classes): set class_conditional=True")
    elif names is not None and (classes != len(names) or sorted(unet.config.class_names or names) != sorted(names)):
        made_for = (
            "none" if classes is None else f"{classes} ({', '.join(unet.config.class_names or ['no names'])[:80]})"
        )
        raise ValueError(
            f"class_conditional=True: the images have {len(names)} classes ({', '.join(names)[:80]}) and the network "
            f"has {made_for}: leave out class_conditional, pretrained_model_name_or_path or num_classes"
        )
    elif names is not None and unet.config.class_names is None:
        unet.register_to_config(class_names=names)
