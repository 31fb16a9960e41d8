"""The network that a configuration asks for, for images of a shape and of classes."""

from diffusers import UNet2DModel

from ddpm_hf.config import TrainConfig
from ddpm_hf.pipeline import num_classes
from ddpm_hf.unet import DDPMUNet


def build_network(
    config: TrainConfig,
    shape: tuple[int, int, int],
    class_names: list[str] | None,
    pretrained: DDPMUNet | UNet2DModel | None = None,
) -> DDPMUNet | UNet2DModel:
    """A new network, or the pretrained one, after checking that it fits the images and their classes.

    Args:
        shape: (C, H, W) of the images.
        class_names: of the images; None if they have no classes.
        pretrained: the network of `pretrained_model_name_or_path`.

    Raises:
        ValueError: DDPMUNet does not take the arguments in `config.unet`, or the network is made for other channels or
            classes.
    """
    channels, height, width = shape
    if pretrained is None:
        settings = {"sample_size": height if height == width else (height, width), "in_channels": channels}
        if config.learned_variance:
            settings["out_channels"] = 2 * channels
        if config.class_conditional and class_names:
            settings |= {"num_classes": len(class_names), "class_names": class_names}
        try:
            unet = DDPMUNet(**settings | config.unet)
        except TypeError as error:  # an argument that DDPMUNet does not have, or a value of the wrong type
            raise ValueError(f"unet={config.unet!r}: {error}") from error
    elif config.unet:
        raise ValueError(f"unet={config.unet!r} must be empty: the network comes with the weights")
    else:
        unet = pretrained
    if unet.config.in_channels != channels:
        source = config.pretrained_model_name_or_path
        name = "unet" if source is None else f"pretrained_model_name_or_path={source!r}"
        raise ValueError(
            f"{name} is made for {unet.config.in_channels} channels and the images have {channels}: set channels"
        )
    _check_classes(config, unet, class_names)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _check_classes(config: TrainConfig, unet: DDPMUNet | UNet2DModel, names: list[str] | None) -> None:
    """Have the network's classes be those of the images, by number and, where it has names, by name."""
    classes = num_classes(unet)
    if not config.class_conditional:
        if classes is not None:
            raise ValueError(f"the network has {classes} classes (num_classes): set class_conditional")
    elif names is not None and (classes != len(names) or (unet.config.class_names or names) != names):
        made_for = (
            "none" if classes is None else f"{classes} ({', '.join(unet.config.class_names or ['nameless'])[:80]})"
        )
        raise ValueError(
            f"class_conditional=True: the images have {len(names)} classes ({', '.join(names)[:80]}) and the network "
            f"has {made_for}: leave out class_conditional, or pretrained_model_name_or_path, or num_classes"
        )
    elif names is not None and unet.config.class_names is None:
        unet.register_to_config(class_names=names)
