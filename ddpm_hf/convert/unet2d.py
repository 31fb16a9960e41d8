"""Conversion of diffusers' `UNet2DModel` and schedulers, in both directions."""

import re
from pathlib import Path

import diffusers
import torch

from ddpm_hf.convert.flat_row import settings_of
from ddpm_hf.convert.source import Weights
from ddpm_hf.convert.weights import check_shape, first_line, load_checked, load_weights
from ddpm_hf.models.unet import ARGUMENTS, DDPMUNet
from ddpm_hf.pipelines.loading import OURS, read_scheduler_config
from ddpm_hf.schedulers.noise import LinearNoiseScheduler
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.utils.arguments import check_all, read_json, show

BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}  # with attention?
# Settings with the same name and meaning in both networks
SAME = (
    "in_channels", "layers_per_block", "downsample_padding", "attention_head_dim", "flip_sin_to_cos", "freq_shift",
    "norm_num_groups", "norm_eps", "dropout",
)  # fmt: skip
RESIDUAL = {
    "norm_1": "norm1", "conv_1": "conv1", "time_projection": "time_emb_proj",
    "norm_2": "norm2", "conv_2": "conv2", "shortcut": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "to_qkv": "to_{}", "to_out": "to_out.0"}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(folder: Path):
    """The network, the scheduler and notes for a diffusers folder of a pipeline or of a network alone.

    Raises:
        ValueError: a file is missing or damaged, or `DDPMUNet` cannot express a setting.
    """
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config_file = unet_folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"source={str(folder)!r} has neither unet/config.json nor config.json")
    stored = read_json(config_file)
    kind = stored.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{config_file} configures {show(kind)}; it must be 'UNet2DModel'")
    try:
        check_all(stored, {name: ARGUMENTS[name] for name in ("block_out_channels", *SAME)})  # before it is built
        with torch.device("meta"):
            config = dict(diffusers.UNet2DModel.from_config(stored).config)  # adds defaults
    except Exception as error:  # invalid values raise various exceptions in its constructor
        raise ValueError(f"{config_file} is not a valid UNet2DModel: {first_line(error)}") from error
    # One file or shards, but no variants
    names = [re.compile(rf"diffusion_pytorch_model(-\d+-of-\d+)?\.{ending}") for ending in ("safetensors", "bin")]
    found = [[path for path in sorted(unet_folder.iterdir()) if name.fullmatch(path.name)] for name in names]
    files = found[0] or found[1]
    if not files:
        raise ValueError(f"{unet_folder} has no diffusion_pytorch_model.safetensors or .bin")
    weights = {}
    for file in files:
        weights |= load_weights(file)
    with torch.device("meta"):
        unet = DDPMUNet(**settings_from(config))
    load_checked(unet, weights_from(weights, unet.state_dict(), unet_folder), unet_folder)
    # Next to unet/, in the same folder as the weights (google/ddpm-*), or next to the given unet/
    places = [folder / "scheduler", folder, *([folder.parent / "scheduler"] if folder.name == "unet" else [])]
    file = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    if file is None:
        return unet, LinearNoiseScheduler(), ["scheduler: DDPMScheduler's defaults are assumed; the folder has none"]
    return unet, *_read_scheduler(file)


def _read_scheduler(file: Path):
    """A scheduler of this package if it supports the configuration, else `DDPMScheduler`; and notes."""
    try:
        config = read_scheduler_config(file)
        name = config.get("_class_name", "DDPMScheduler")
        try:
            kind = scheduler_class(config)
            scheduler = kind.from_config(config if kind.objective == "ddpm" else kind.own_settings(config))
        except ValueError:  # an unsupported setting
            scheduler = diffusers.DDPMScheduler.from_config(config)
    except Exception as error:  # not JSON, not a configuration, or not one of a DDPM
        raise ValueError(f"{file} is not a valid DDPM scheduler: {first_line(error)}") from error
    notes = [f"scheduler: {type(scheduler).__name__} with the settings of {file.name}"]
    if name != "DDPMScheduler" and name not in OURS and scheduler_class(config).objective == "ddpm":
        notes.append(f"scheduler: the folder uses {name}; the pipeline keeps its betas but samples with all DDPM steps")
    return scheduler, notes


def settings_from(config: dict) -> dict:
    """Arguments of `DDPMUNet` from the complete configuration of a `UNet2DModel`.

    Raises:
        ValueError: `DDPMUNet` cannot express a setting.
    """
    for key in ("down_block_types", "up_block_types"):
        for block in config[key]:
            if block not in BLOCKS:
                raise ValueError(f"{key}: {block!r} is not supported; it must be one of {', '.join(BLOCKS)}")
    down, up = ([BLOCKS[block] for block in config[f"{way}_block_types"]] for way in ("down", "up"))
    _require(config, "up_block_types", up == down[::-1], "must mirror down_block_types")
    expressible = {
        "center_input_sample": (False,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
        "downsample_type": ("conv",), "upsample_type": ("conv",), "act_fn": ("silu", "swish"), "add_attention": (True,),
        "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "resnet_time_scale_shift": ("default",),
        "attn_norm_num_groups": (None, config["norm_num_groups"]), "class_embed_type": (None,),
        "num_class_embeds": (None,), "out_channels": (config["in_channels"], 2 * config["in_channels"]),
    }  # fmt: skip
    for key, values in expressible.items():
        _require(config, key, config[key] in values, f"is not supported by DDPMUNet; it must be {values[0]!r}")
    return _settings(config) | {
        "sample_size": config["sample_size"] or 32,
        "out_channels": None if config["out_channels"] == config["in_channels"] else config["out_channels"],
    }


def _settings(config: dict) -> dict:
    """Arguments of `DDPMUNet` from the widths, the blocks and the `SAME` settings of a `UNet2DModel`."""
    widths = list(config["block_out_channels"])
    attention = [BLOCKS[block] for block in config["down_block_types"]]
    return (
        settings_of(widths, config["layers_per_block"], attention)
        | {key: config[key] for key in SAME}
        | {
            "stem_channels": widths[0],
            "up_block_out_channels": widths[::-1],
            "downsample": [True] * (len(widths) - 1) + [False],
            "upsample_type": "nearest",
            "num_attention_heads": 1,
            "time_sinusoid_dim": widths[0],
            "time_embedding_dim": 4 * widths[0],
        }
    )


def to_diffusers(unet: DDPMUNet) -> diffusers.UNet2DModel:
    """The same network as a `UNet2DModel`: equal weights, and predictions that are equal up to rounding.

    Raises:
        ValueError: `UNet2DModel` cannot express a setting.
    """
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in unet.config.items()}
    _require(config, "num_classes", config["num_classes"] is None, "is not supported: DDPMPipeline has no classes")
    stages = len(config["block_out_channels"])
    attention = config["attention"]
    attention = [attention] * stages if isinstance(attention, bool) else list(attention)
    arguments = {key: config[key] for key in ("sample_size", "block_out_channels", *SAME)} | {
        "out_channels": config["out_channels"] or config["in_channels"],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
    }
    # The settings of DDPMUNet that are equivalent to this UNet2DModel
    wanted = _settings(arguments) | {"attention_norm": True, "time_table_size": None, "dropout_channels": False}
    wanted |= {"attention": config["attention"], "norm_num_groups_out": config["norm_num_groups"]}
    as_default = {"downsample": None, "norm_num_groups_out": None}
    for key, value in wanted.items():
        same = config[key] == value or (key in as_default and config[key] is None)
        same = same or (key == "num_attention_heads" and config["attention_head_dim"] is not None)
        _require(config, key, same, f"is not supported by UNet2DModel; it must be {value!r}")
    model = diffusers.UNet2DModel(**arguments)
    weights = {}
    for key, value in unet.state_dict().items():
        name = _to_diffusers_key(key)
        if "{}" in name:
            weights |= {name.format(x): part.clone() for x, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            weights[name] = value
    model.load_state_dict(weights)
    return model.eval()


def _require(config: dict, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}={config[key]!r} {rule}")


def weights_from(weights: Weights, state_dict: Weights, path) -> Weights:
    """The weights of a `UNet2DModel` under the keys of `DDPMUNet`; missing weights are left out.

    Args:
        state_dict: the state dict of the `DDPMUNet`, for the shapes.
        path: the origin of the weights, for messages.

    Raises:
        ValueError: a key is unexpected, or the query, key or value of an attention is missing or has another shape.
    """
    renamed = {}
    for key, value in weights.items():
        for older, newer in OLDER_ATTENTION.items():
            key = re.sub(rf"(attentions\.\d+)\.{older}\.", rf"\1.{newer}.", key)
        renamed[key] = value
    taken = {}
    for key, wanted in state_dict.items():
        name = _to_diffusers_key(key)
        if "{}" not in name:
            if name in renamed:
                taken[key] = renamed.pop(name)
            continue
        parts = []
        for part in (name.format(x) for x in "qkv"):
            if part not in renamed:
                raise ValueError(f"{path} lacks {part}")
            parts.append(renamed.pop(part))
            check_shape(path, part, parts[-1], (wanted.shape[0] // 3, *wanted.shape[1:]))
        taken[key] = torch.cat(parts)
    if renamed:
        raise ValueError(f"{path} has {len(renamed)} unexpected keys, such as {', '.join(sorted(renamed)[:3])}")
    return taken


def _to_diffusers_key(key: str) -> str:
    """The key of `UNet2DModel` for a key of `DDPMUNet`; for `to_qkv`, with `{}` in place of q, k or v."""
    part, *rest = key.split(".")
    if part in ("stem", "norm_out", "time_embedding", "conv_out"):
        return ".".join([{"stem": "conv_in", "norm_out": "conv_norm_out"}.get(part, part), *rest])
    stage, what, *rest = rest
    block = {"down": f"down_blocks.{stage}", "up": f"up_blocks.{stage}", "middle": "mid_block"}[part]
    if what == "downsample":
        return ".".join([block, "downsamplers.0.conv", *rest])
    if what == "upsample":  # UNet2DModel upsamples at the end of the previous stage
        return ".".join([f"up_blocks.{int(stage) - 1}", "upsamplers.0.conv", *rest])
    layer, kind, name, *rest = rest
    kind, name = ("resnets", RESIDUAL[name]) if kind == "residual" else ("attentions", ATTENTION[name])
    return ".".join([block, kind, layer, name, *rest])
