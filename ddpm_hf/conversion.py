"""Other people's checkpoints as pipelines of ours, and ours as diffusers' own.

Each source is described by three things: the settings of `DDPMUNet` that make its network, read off the weights; where
each of its weights goes; and the scheduler that samples as it does. A conversion accounts for every key, then checks
every shape, and only then writes.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file

from ddpm_hf.files import part_of, sync, write, writing_tree
from ddpm_hf.pipeline import DDPMCustomPipeline, load_pipeline
from ddpm_hf.scheduler import LinearNoiseScheduler
from ddpm_hf.solvers import scheduler_class
from ddpm_hf.unet import DDPMUNet
from ddpm_hf.yaml_files import read_yaml

Weights = dict[str, torch.Tensor]


@dataclass
class Source:
    """One tutorial's code.

    Args:
        signature: a key that its checkpoints have and no other source's.
        sizes: weights -> what they determine, under the source's own names.
        defaults: the source's values of what weights do not determine.
        settings: sizes -> arguments of `DDPMUNet`.
        names: sizes -> [(pattern of its keys, our key)], the first match counts; `None` for a weight that its network
            never uses.
        scheduler: sizes -> how the source samples, as arguments of `LinearNoiseScheduler`.
        never_read: names in its configuration that its code does not look at.
        aliases: other names that its own code has for a size.
        notes: what its sampler does and ours does not.
    """

    signature: str
    sizes: Callable[[Weights], dict]
    defaults: dict
    settings: Callable[[dict], dict]
    names: Callable[[dict], list]
    scheduler: Callable[[dict], dict]
    never_read: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _count(weights: Weights, pattern: str) -> int:
    """How many different numbers the first group of `pattern` takes among the keys."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))})


# ---------------------------------------------------------------- ExplainingAI


def _explainingai_sizes(weights: Weights) -> dict:
    stages, mids = (_count(weights, rf"{part}s\.(\d+)\.") for part in ("down", "mid"))
    first = [weights[f"downs.{i}.resnet_conv_first.0.2.weight"] for i in range(stages)]
    mid = [weights[f"mids.{i}.resnet_conv_first.0.2.weight"] for i in range(mids)]
    return {
        "im_channels": weights["conv_in.weight"].shape[1],
        "down_channels": [w.shape[1] for w in first] + [first[-1].shape[0]],
        "mid_channels": [w.shape[1] for w in mid] + [mid[-1].shape[0]],
        "down_sample": [f"downs.{i}.down_sample_conv.weight" in weights for i in range(stages)],
        "time_emb_dim": weights["t_proj.0.weight"].shape[0],
        "num_down_layers": _count(weights, r"downs\.0\.attentions\.(\d+)\."),
        "num_mid_layers": _count(weights, r"mids\.0\.attentions\.(\d+)\."),
        "num_up_layers": _count(weights, r"ups\.0\.attentions\.(\d+)\."),
    }


def _explainingai_settings(sizes: dict) -> dict:
    return {
        "sample_size": sizes["im_size"],
        "in_channels": sizes["im_channels"],
        "stem_channels": sizes["down_channels"][0],
        "block_out_channels": sizes["down_channels"][1:],
        "downsample": sizes["down_sample"],
        "layers_per_block": sizes["num_down_layers"],
        "mid_block_out_channels": sizes["mid_channels"][1:],
        "mid_layers_per_block": sizes["num_mid_layers"],
        "up_block_out_channels": [*sizes["down_channels"][-3::-1], 16],
        "up_layers_per_block": sizes["num_up_layers"],
        "time_embedding_dim": sizes["time_emb_dim"],
    }


def _explainingai_names(sizes: dict) -> list:
    inner = {
        r"resnet_conv_first\.(\d+)\.0": "residual.norm_1",
        r"resnet_conv_first\.(\d+)\.2": "residual.conv_1",
        r"t_emb_layers\.(\d+)\.1": "residual.time_projection",
        r"resnet_conv_second\.(\d+)\.0": "residual.norm_2",
        r"resnet_conv_second\.(\d+)\.2": "residual.conv_2",
        r"residual_input_conv\.(\d+)": "residual.shortcut",
        r"attention_norms\.(\d+)": "attention.norm",
        r"attentions\.(\d+)\.in_proj": "attention.to_qkv",
        r"attentions\.(\d+)\.out_proj": "attention.to_out",
    }
    names = [(r"conv_in", "stem"), (r"t_proj\.0", "time_embedding.linear_1"), (r"t_proj\.2", "time_embedding.linear_2")]
    for theirs, ours in (("down", "down"), ("mid", "middle"), ("up", "up")):
        names += [(rf"{theirs}s\.(\d+)\.{theirs}_sample_conv", rf"{ours}.\1.{theirs}sample")]
        names += [(rf"{theirs}s\.(\d+)\.{a}", rf"{ours}.\1.layers.\2.{b}") for a, b in inner.items()]
    return [*names, (r"norm_out", "norm_out"), (r"conv_out", "conv_out")]


# ---------------------------------------------------------------- labml and learnopencv: blocks in one flat row


def _flat_row(weights: Weights, prefix: str, width_key: str, resample_key: str) -> tuple[list[int], int]:
    """Width of each stage and layers a stage, of blocks `prefix`0, 1, ... in which a resampling ends a stage."""
    widths, layers, stage = [], [], 0
    for k in range(_count(weights, rf"{prefix}\.(\d+)\.")):
        if f"{prefix}.{k}.{resample_key}" in weights:
            stage += 1
            continue
        if stage == len(widths):
            widths.append(0)
            layers.append([])
        widths[stage] = weights[f"{prefix}.{k}.{width_key}"].shape[0]
        layers[stage].append(k)
    return widths, layers


def _flat_names(down: str, up: str, stages: int, layers: int, downsample: str, upsample: str, inner: dict) -> list:
    """Of blocks that stand in one row, `layers` a stage going down and `layers + 1` going up, and a resampling between.

    What ends one of their up stages begins the next of ours.
    """
    names, k = [], 0
    for stage in range(stages):
        for layer in range(layers):
            names += [(rf"{down}\.{k}\.{a}", f"down.{stage}.layers.{layer}.{b}") for a, b in inner.items()]
            k += 1
        if stage < stages - 1:
            names.append((rf"{down}\.{k}\.{downsample}", f"down.{stage}.downsample"))
            k += 1
    k = 0
    for stage in range(stages):
        for layer in range(layers + 1):
            names += [(rf"{up}\.{k}\.{a}", f"up.{stage}.layers.{layer}.{b}") for a, b in inner.items()]
            k += 1
        if stage < stages - 1:
            names.append((rf"{up}\.{k}\.{upsample}", f"up.{stage + 1}.upsample"))
            k += 1
    return names


def _one_skip_a_layer(widths: list[int], layers: int, attention: list[bool]) -> dict:
    """Settings that the sources with a skip connection a layer share."""
    return {
        "block_out_channels": widths,
        "attention": attention,
        "layers_per_block": layers,
        "mid_block_out_channels": [widths[-1]],
        "mid_layers_per_block": 1,
        "skip_connections": "layer",
        "downsample_kernel_size": 3,
        "project_every_shortcut": False,
        "freq_shift": 1,
    }


def _labml_sizes(weights: Weights) -> dict:
    widths, layers = _flat_row(weights, "down", "res.conv1.weight", "conv.weight")
    stem = weights["image_proj.weight"]
    return {
        "image_channels": stem.shape[1],
        "n_channels": stem.shape[0],
        "ch_mults": [w // before for w, before in zip(widths, [stem.shape[0], *widths], strict=False)],
        "is_attn": [f"down.{stage[0]}.attn.projection.weight" in weights for stage in layers],
        "n_blocks": len(layers[0]),
    }


def _labml_settings(sizes: dict) -> dict:
    widths = [sizes["n_channels"]]
    for multiple in sizes["ch_mults"]:
        widths.append(widths[-1] * multiple)
    return _one_skip_a_layer(widths[1:], sizes["n_blocks"], sizes["is_attn"]) | {
        "sample_size": sizes["image_size"],
        "in_channels": sizes["image_channels"],
        "stem_channels": widths[0],
        "up_block_out_channels": widths[-2::-1],
        "num_attention_heads": 1,
        "attention_norm": False,
        "time_sinusoid_dim": widths[0],
        "time_embedding_dim": 4 * widths[0],
        "norm_num_groups": 32,
        "norm_num_groups_out": 8,
        "dropout": 0.1,
    }


def _labml_names(sizes: dict) -> list:
    residual = {"norm1": "norm_1", "conv1": "conv_1", "norm2": "norm_2", "conv2": "conv_2"}
    residual |= {"shortcut": "shortcut", "time_emb": "time_projection"}
    attention = {"projection": "to_qkv", "output": "to_out"}
    inner = {rf"res\.{a}": f"residual.{b}" for a, b in residual.items()}
    inner |= {rf"attn\.{a}": f"attention.{b}" for a, b in attention.items()}
    names = [("image_proj", "stem"), ("norm", "norm_out"), ("final", "conv_out")]
    names += [(rf"time_emb\.lin{k}", f"time_embedding.linear_{k}") for k in (1, 2)]
    names += [(r".*\.attn\.norm", None)]  # built, saved and never called
    names += [
        (rf"middle\.res{k}\.{a}", f"middle.0.layers.{k - 1}.residual.{b}") for k in (1, 2) for a, b in residual.items()
    ]
    names += [(rf"middle\.attn\.{a}", f"middle.0.layers.0.attention.{b}") for a, b in attention.items()]
    return names + _flat_names("down", "up", len(sizes["ch_mults"]), sizes["n_blocks"], "conv", "conv", inner)


def _learnopencv_sizes(weights: Weights) -> dict:
    widths, layers = _flat_row(weights, "encoder_blocks", "conv_1.weight", "downsample.weight")
    stem = weights["first.weight"]
    return {
        "input_channels": stem.shape[1],
        "output_channels": weights["final.2.weight"].shape[0],
        "num_res_blocks": len(layers[0]),
        "base_channels": stem.shape[0],
        "base_channels_multiples": [w // stem.shape[0] for w in widths],
        "apply_attention": [f"encoder_blocks.{s[0]}.attention.mhsa.in_proj_weight" in weights for s in layers],
        "time_multiple": weights["time_embeddings.time_blocks.1.weight"].shape[0] // stem.shape[0],
        "total_time_steps": len(weights["time_embeddings.time_blocks.0.weight"]),
    }


def _learnopencv_settings(sizes: dict) -> dict:
    base = sizes["base_channels"]
    widths = [base * multiple for multiple in sizes["base_channels_multiples"]]
    return _one_skip_a_layer(widths, sizes["num_res_blocks"], sizes["apply_attention"]) | {
        "sample_size": sizes["image_size"],
        "in_channels": sizes["input_channels"],
        "stem_channels": base,
        "up_block_out_channels": widths[::-1],
        "upsample_type": "nearest",
        "num_attention_heads": 4,
        "time_sinusoid_dim": base,
        "time_embedding_dim": base * sizes["time_multiple"],
        "time_table_size": sizes["total_time_steps"],
        "norm_num_groups": 8,
        "dropout": sizes["dropout_rate"],
        "dropout_channels": True,
    }


def _learnopencv_names(sizes: dict) -> list:
    inner = {
        "normlize_1": "residual.norm_1",
        "conv_1": "residual.conv_1",
        "dense_1": "residual.time_projection",
        "normlize_2": "residual.norm_2",
        "conv_2": "residual.conv_2",
        "match_input": "residual.shortcut",
        r"attention\.group_norm": "attention.norm",
        r"attention\.mhsa\.in_proj": "attention.to_qkv",
        r"attention\.mhsa\.out_proj": "attention.to_out",
    }
    names = [("first", "stem"), (r"final\.0", "norm_out"), (r"final\.2", "conv_out")]
    names += [(r"time_embeddings\.time_blocks\.1", "time_embedding.linear_1")]
    names += [(r"time_embeddings\.time_blocks\.3", "time_embedding.linear_2")]
    names += [(r"time_embeddings\.time_blocks\.0", "time_embedding.table")]
    names += [(rf"bottleneck_blocks\.(\d)\.{a}", rf"middle.0.layers.\1.{b}") for a, b in inner.items()]
    stages, layers = len(sizes["base_channels_multiples"]), sizes["num_res_blocks"]
    return names + _flat_names("encoder_blocks", "decoder_blocks", stages, layers, "downsample", r"upsample\.1", inner)


def _learnopencv_scheduler(sizes: dict) -> dict:
    steps = sizes["total_time_steps"]  # its betas grow as the steps become fewer
    betas = {"beta_start": 1000 / steps * 1e-4, "beta_end": 1000 / steps * 0.02}
    return {"clip_sample": False, "variance_type": "fixed_large", "num_train_timesteps": steps, **betas}


# ---------------------------------------------------------------- diffusers' UNet2DModel, both ways


def _diffusers_settings(config: dict) -> dict:
    """Arguments of `DDPMUNet` from the whole configuration of a `UNet2DModel`."""
    widths, stages = list(config["block_out_channels"]), len(config["block_out_channels"])
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    plain = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    for key, blocks in (("down_block_types", down), ("up_block_types", up)):
        for block in blocks:
            if block not in plain:
                raise ValueError(f"{key}: {block!r} can't be expressed; it must be one of {', '.join(plain)}")
    attention = [plain[block] for block in down]
    _require(
        config, "up_block_types", [plain[block] for block in up] == attention[::-1], "must mirror down_block_types"
    )
    expressible = {
        "center_input_sample": (False,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
        "downsample_type": ("conv",), "upsample_type": ("conv",), "act_fn": ("silu", "swish"), "add_attention": (True,),
        "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "resnet_time_scale_shift": ("default",),
        "attn_norm_num_groups": (None, config["norm_num_groups"]), "class_embed_type": (None,),
        "num_class_embeds": (None,), "out_channels": (config["in_channels"], 2 * config["in_channels"]),
    }  # fmt: skip
    for key, values in expressible.items():
        _require(config, key, config[key] in values, f"can't be expressed; it must be {values[0]!r}")
    return _one_skip_a_layer(widths, config["layers_per_block"], attention) | {
        "sample_size": config["sample_size"] or 32,
        "in_channels": config["in_channels"],
        "out_channels": None if config["out_channels"] == config["in_channels"] else config["out_channels"],
        "stem_channels": widths[0],
        "up_block_out_channels": widths[::-1],
        "downsample": [True] * (stages - 1) + [False],
        "downsample_padding": config["downsample_padding"],
        "upsample_type": "nearest",
        "num_attention_heads": 1,
        "attention_head_dim": config["attention_head_dim"],
        "time_sinusoid_dim": widths[0],
        "time_embedding_dim": 4 * widths[0],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "freq_shift": config["freq_shift"],
        "norm_num_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
        "dropout": config["dropout"],
    }


def _require(config: dict, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}={config[key]!r} {rule}")


RESIDUAL = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time_projection": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _to_diffusers_key(key: str) -> str:
    """Our key -> that of `UNet2DModel`; for `to_qkv` with a `{}` where q, k or v stands."""
    part, *rest = key.split(".")
    if part == "stem":
        return ".".join(["conv_in", *rest])
    if part == "norm_out":
        return ".".join(["conv_norm_out", *rest])
    if part in ("time_embedding", "conv_out"):
        return key
    stage, what, *rest = rest
    block = {"down": f"down_blocks.{stage}", "up": f"up_blocks.{stage}", "middle": "mid_block"}[part]
    if what == "downsample":
        return ".".join([block, "downsamplers.0.conv", *rest])
    if what == "upsample":  # what begins a stage of ours ends the one before in theirs
        return ".".join([f"up_blocks.{int(stage) - 1}", "upsamplers.0.conv", *rest])
    layer, kind, name, *rest = rest
    if kind == "residual":
        return ".".join([block, "resnets", layer, RESIDUAL[name], *rest])
    theirs = {"norm": "group_norm", "to_qkv": "to_{}", "to_out": "to_out.0"}[name]
    return ".".join([block, "attentions", layer, theirs, *rest])


def _from_diffusers_weights(weights: Weights, ours: Weights, path) -> Weights:
    """Their weights under our keys; a key that they lack is missing in the answer."""
    renamed = {}
    for key, value in weights.items():
        for older, newer in OLDER_ATTENTION.items():
            key = re.sub(rf"(attentions\.\d+)\.{older}\.", rf"\1.{newer}.", key)
        renamed[key] = value
    taken = {}
    for key, wanted in ours.items():
        theirs = _to_diffusers_key(key)
        if "{}" not in theirs:
            if theirs in renamed:
                taken[key] = renamed.pop(theirs)
            continue
        parts = []
        for part in (theirs.format(x) for x in "qkv"):
            shape = (wanted.shape[0] // 3, *wanted.shape[1:])
            if part not in renamed:
                raise ValueError(f"{path} lacks {part}")
            parts.append(renamed.pop(part))
            if parts[-1].shape != shape:
                raise ValueError(f"{path}: {part} has shape {tuple(parts[-1].shape)} and the network wants {shape}")
        taken[key] = torch.cat(parts)
    if renamed:
        raise ValueError(f"{path}: no place for {len(renamed)} weights, {', '.join(sorted(renamed)[:3])} among them")
    return taken


def to_diffusers(unet: DDPMUNet) -> diffusers.UNet2DModel:
    """The same network as `UNet2DModel`: its weights bit for bit, its predictions to rounding.

    Raises:
        ValueError: a setting that `UNet2DModel` can't express, with what it would have to be.
    """
    config, widths = dict(unet.config), list(unet.config.block_out_channels)
    stages = len(widths)
    attention = config["attention"]
    attention = [attention] * stages if isinstance(attention, bool) else attention
    wanted = {
        "skip_connections": "layer", "stem_channels": widths[0], "mid_block_out_channels": widths[-1:],
        "mid_layers_per_block": 1, "up_block_out_channels": widths[::-1], "downsample_kernel_size": 3,
        "upsample_type": "nearest", "project_every_shortcut": False, "attention_norm": True,
        "time_embedding_dim": 4 * widths[0], "time_table_size": None, "dropout_channels": False,
    }  # fmt: skip
    _require(config, "num_classes", config["num_classes"] is None, "can't be: diffusers' DDPMPipeline knows no classes")
    config |= {k: list(config[k]) for k in ("mid_block_out_channels", "up_block_out_channels")}
    for key, value in wanted.items():
        _require(config, key, config[key] == value, f"can't be expressed by UNet2DModel; it would have to be {value!r}")
    down = config["downsample"]
    _require(config, "downsample", down is None or list(down) == [True] * (stages - 1) + [False],
             "can't be expressed by UNet2DModel; it would have to be all but the deepest")  # fmt: skip
    sinusoids_are = config["time_sinusoid_dim"] == widths[0]
    _require(config, "time_sinusoid_dim", sinusoids_are, f"can't be expressed by UNet2DModel; it must be {widths[0]}")
    out_groups = config["norm_num_groups_out"] in (None, config["norm_num_groups"])
    _require(config, "norm_num_groups_out", out_groups, "can't be expressed by UNet2DModel; it must be norm_num_groups")
    one_head = config["attention_head_dim"] is not None or config["num_attention_heads"] == 1
    _require(config, "num_attention_heads", one_head, "can't be expressed by UNet2DModel; it takes attention_head_dim")
    theirs = diffusers.UNet2DModel(
        sample_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        block_out_channels=widths,
        layers_per_block=config["layers_per_block"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        downsample_padding=config["downsample_padding"],
        flip_sin_to_cos=config["flip_sin_to_cos"],
        freq_shift=config["freq_shift"],
        attention_head_dim=config["attention_head_dim"],
        norm_num_groups=config["norm_num_groups"],
        norm_eps=config["norm_eps"],
        dropout=config["dropout"],
    )
    weights = {}
    for key, value in unet.state_dict().items():
        name = _to_diffusers_key(key)
        if "{}" in name:
            weights |= {name.format(x): part.clone() for x, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            weights[name] = value
    theirs.load_state_dict(weights)
    return theirs.eval()


# ---------------------------------------------------------------- the conversion

SOURCES = {
    "explainingai": Source(
        signature="t_proj.0.weight",
        sizes=_explainingai_sizes,
        defaults={"im_size": 28},
        settings=_explainingai_settings,
        names=_explainingai_names,
        scheduler=lambda sizes: {"clip_sample": False},
        never_read=("num_heads",),
    ),
    "labml": Source(
        signature="image_proj.weight",
        sizes=_labml_sizes,
        defaults={"image_size": 32},
        settings=_labml_settings,
        names=_labml_names,
        scheduler=lambda sizes: {"clip_sample": False, "variance_type": "fixed_large"},
        aliases={"channel_multipliers": "ch_mults", "is_attention": "is_attn"},
        notes=("sampling: the source adds noise after the last step, at t = 0; ours, as the paper, adds none",),
    ),
    "learnopencv": Source(
        signature="time_embeddings.time_blocks.0.weight",
        sizes=_learnopencv_sizes,
        defaults={"image_size": 32, "dropout_rate": 0.1},
        settings=_learnopencv_settings,
        names=_learnopencv_names,
        scheduler=_learnopencv_scheduler,
        notes=("sampling: the source's last step is t = 1; ours takes t = 0 too",),
    ),
}
KINDS = (*SOURCES, "diffusers")
WRAPPERS = ("ema_state_dict", "ema", "model_ema", "model_state_dict", "state_dict", "model", "unet")
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
COUNTERS = ("n_averaged", "initted", "step")  # of torch's AveragedModel and of ema_pytorch
DIFFUSION_KEYS = {
    "num_train_timesteps": "num_train_timesteps", "num_timesteps": "num_train_timesteps",
    "n_steps": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end",
}  # fmt: skip


def convert(source, output, kind: str | None = None, source_config=None) -> list[str]:
    """Write the pipeline folder `output` from somebody else's checkpoint.

    Args:
        source: a file of weights (`.pth`, `.pt`, `.bin`, `.safetensors`) or, for diffusers, a folder.
        output: a folder that is not there yet.
        kind: one of `KINDS`; `None`: the one whose weights these are.
        source_config: YAML or JSON in the source's own keys, flat or nested under `config` or `model_params`.

    Returns:
        What a person should know, a line each: what was assumed, what was ignored.

    Raises:
        ValueError: what can't be converted, and why; nothing has been written then.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"output {str(output)!r} is there already; name a folder that is not")
    if not source.exists():
        raise ValueError(
            f"source {str(source)!r} does not exist; it must be a file of weights or a folder of diffusers"
        )
    if kind not in (None, *KINDS):
        raise ValueError(f"from={kind!r}; choose from {', '.join(KINDS)}")
    if source.is_dir() and source_config is not None:
        raise ValueError("source_config is for a tutorial's checkpoint; a folder of diffusers has its own config.json")
    if source.is_dir() and kind in (None, "diffusers"):
        unet, scheduler, notes = _from_diffusers(source)
        kind = "diffusers"
    elif source.is_dir() or kind == "diffusers":
        form = {True: "folder", False: "file"}
        have, want = form[source.is_dir()], form[not source.is_dir()]
        raise ValueError(f"source {str(source)!r} is a {have}; what comes from {kind} is a {want}")
    else:
        unet, scheduler, notes, kind = _from_tutorial(source, kind, source_config)
    card = f"---\nlibrary_name: diffusers\ntags:\n- ddpm\n- ddpm_hf\n---\n\nConverted by ddpm_hf from {source.name}"
    card += f" ({kind}).\n" + "".join(f"\n- {note}" for note in notes) + "\n"
    write_whole(output, lambda folder: _write(DDPMCustomPipeline(unet, scheduler), folder, card))
    return [f"{kind}: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}", *notes]


def convert_back(source, output) -> list[str]:
    """Write a pipeline folder of ours as one of diffusers' own, which needs no package of ours.

    Raises:
        ValueError: a folder without our network, or a setting that diffusers' network can't express.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"output {str(output)!r} is there already; name a folder that is not")
    if not (source / "model_index.json").is_file():
        raise ValueError(f"source {str(source)!r} is not a pipeline folder: it has no model_index.json")
    pipeline = load_pipeline(str(source), "source")
    if not isinstance(pipeline.unet, DDPMUNet):
        raise ValueError(f"source {str(source)!r} holds a {type(pipeline.unet).__name__} already")
    unet = to_diffusers(pipeline.unet)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    write_whole(output, diffusers.DDPMPipeline(unet, scheduler).save_pretrained)
    return [f"UNet2DModel: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}"]


def write_whole(output: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` fill a folder beside and name it `output` when it is whole."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = part_of(output)
        beside.mkdir()
    except OSError as error:
        raise ValueError(f"output {str(output)!r} can't be written: {error}") from error
    try:
        with writing_tree(beside):
            fill(beside)
        os.replace(beside, output)
        sync(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(pipeline, folder: Path, card: str) -> None:
    pipeline.save_pretrained(folder)
    write(folder / "README.md", card)


def _from_tutorial(path: Path, kind, source_config):
    weights = load_weights(path)
    kinds = [name for name, source in SOURCES.items() if source.signature in weights]
    if kind is None and not kinds:
        raise ValueError(f"{path} is of no known source: its first keys are {', '.join(list(weights)[:3])}")
    kind = kind or kinds[0]
    if kind not in kinds:
        raise ValueError(f"{path} is not of {kind}" + (f" but of {kinds[0]}" if kinds else "; its keys are others"))
    source = SOURCES[kind]
    try:
        known = source.sizes(weights)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} lacks weights that every network of {kind} has: {error}") from error
    schedule, notes = {}, list(source.notes)
    for key, value in read_source_config(source_config).items():
        key = source.aliases.get(key, key)
        if key in source.never_read:
            notes.append(f"{key}: {value!r} in the configuration is ignored: {kind} never reads it")
        elif key in DIFFUSION_KEYS:
            schedule[DIFFUSION_KEYS[key]] = value
        elif key not in known | source.defaults:
            notes.append(f"{key}: {value!r} in the configuration is ignored: it says nothing about the network")
        elif key in known and known[key] != value:
            raise ValueError(f"{key} is {value!r} in {source_config} and {known[key]!r} in the weights of {path}")
        else:
            known[key] = value
    for key, value in source.defaults.items():
        if key not in known:
            known[key] = value
            notes.append(f"{key}: {value!r} is assumed, {kind}'s default; the weights do not tell it")
    schedule = {**source.scheduler(known), **schedule}
    told = schedule.get("num_train_timesteps")
    stored = known.get("total_time_steps", told)
    if told != stored:
        raise ValueError(f"the configuration has {told} timesteps and the weights of {path} have {stored}")
    try:
        unet, scheduler = DDPMUNet(**source.settings(known)), LinearNoiseScheduler(**schedule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} with {source_config or 'the source defaults'}: {_first_line(error)}") from error
    taken, left = {}, []
    rules = [(re.compile(pattern), ours) for pattern, ours in source.names(known)]
    for key, value in weights.items():
        ours = next((_renamed(key, match, new) for rule, new in rules if (match := rule.match(key))), "")
        if ours is None:
            left.append(key)
        elif ours:
            taken[ours] = value
        else:
            raise ValueError(f"{path}: no place for {key}, which no network of {kind} of this size has")
    load_checked(unet, taken, path)
    notes += [f"{key} is left out: the source's network does not use it" for key in left]
    return unet, scheduler, notes, kind


def _renamed(key: str, match: re.Match, new: str | None) -> str | None:
    if new is None:
        return None
    rest = key[match.end() :]
    return match.expand(new) + (f".{rest[1:]}" if rest[:1] == "_" else rest)  # in_proj_weight -> to_qkv.weight


def _from_diffusers(folder: Path):
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet_folder / "config.json").is_file():
        raise ValueError(f"source {str(folder)!r} has neither unet/config.json nor config.json")
    try:
        stored = json.loads((unet_folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{unet_folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("_class_name", "UNet2DModel") != "UNet2DModel":
        told = stored.get("_class_name") if isinstance(stored, dict) else stored
        raise ValueError(f"{unet_folder / 'config.json'} is of {told!r}, not of 'UNet2DModel'")
    try:
        with torch.device("meta"):
            config = dict(diffusers.UNet2DModel.from_config(stored).config)  # with the defaults that it leaves out
    except Exception as error:  # what its constructor trips over in wrong values
        raise ValueError(f"{unet_folder / 'config.json'} makes no UNet2DModel: {_first_line(error)}") from error
    # the weights proper, whole or in shards, and none of their variants
    names = [re.compile(rf"diffusion_pytorch_model(-\d+-of-\d+)?\.{ending}") for ending in ("safetensors", "bin")]
    found = [[path for path in sorted(unet_folder.iterdir()) if name.fullmatch(path.name)] for name in names]
    files = found[0] or found[1]
    if not files:
        raise ValueError(f"{unet_folder} holds no diffusion_pytorch_model.safetensors or .bin")
    weights = {}
    for file in files:
        weights |= load_weights(file)
    unet = DDPMUNet(**_diffusers_settings(config))
    load_checked(unet, _from_diffusers_weights(weights, unet.state_dict(), unet_folder), unet_folder)
    # beside unet/, flat as in google/ddpm-*, or next to the unet/ that was named
    places = [folder / "scheduler", folder, *([folder.parent / "scheduler"] if folder.name == "unet" else [])]
    file = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    if file is None:
        return unet, LinearNoiseScheduler(), ["scheduler: DDPMScheduler's defaults are assumed; the folder has none"]
    scheduler, notes = _scheduler_of(file)
    return unet, scheduler, notes


def _scheduler_of(file: Path):
    """Ours where it can do what the file says, else diffusers' `DDPMScheduler`; and what to know about it."""
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        name = theirs.get("_class_name", "DDPMScheduler")
        try:
            scheduler = scheduler_class(theirs).from_config(theirs)
        except ValueError:  # a setting that ours refuses
            scheduler = diffusers.DDPMScheduler.from_config(theirs)
    except Exception as error:  # not JSON, not a configuration, or one of another kind of process
        raise ValueError(f"{file} makes no scheduler: {_first_line(error)}") from error
    notes = [f"scheduler: {type(scheduler).__name__} with the settings of {file.name}"]
    if name not in ("DDPMScheduler", "LinearNoiseScheduler", "CosineNoiseScheduler"):
        notes.append(f"scheduler: the folder samples with {name}; this pipeline takes its betas and all steps of DDPM")
    return scheduler, notes


def load_weights(path: Path) -> Weights:
    """The tensors of a file, without what wraps them: `{"model": ...}`, `module.` and the like.

    Raises:
        ValueError: a file that is truncated, holds something else, or wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than weights ({_first_line(error)})") from error
    except Exception as error:  # what parsing foreign bytes trips over
        raise ValueError(f"{path} can't be read as weights: {_first_line(error)}") from error
    weights = _unwrapped(content)
    if weights is None:
        raise ValueError(f"{path} holds no weights by name")
    return weights


def _unwrapped(content) -> Weights | None:
    """The innermost dict of tensors, averaged ones first, under the keys that the network gave them."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict) and (inner := _unwrapped(content[wrapper])):
            return inner
    weights = {key: value for key, value in content.items() if key not in COUNTERS}
    if any(key.startswith("ema_model.") for key in weights):  # beside the model that it averages
        weights = {key: value for key, value in weights.items() if key.startswith("ema_model.")}
    while prefix := next((p for p in PREFIXES if weights and all(key.startswith(p) for key in weights)), None):
        weights = {key[len(prefix) :]: value for key, value in weights.items() if key[len(prefix) :] not in COUNTERS}
    return weights if weights and all(isinstance(v, torch.Tensor) for v in weights.values()) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_source_config(path) -> dict:
    """A source's configuration as one flat dict."""
    if path is None:
        return {}
    content = read_yaml(path, "source_config")
    flat = {}
    for key, value in content.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def load_checked(unet: DDPMUNet, weights: Weights, path) -> None:
    """Load after checking every key and every shape."""
    wanted = unet.state_dict()
    missing, over = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or over:
        what = f"lacks {len(missing)} weights ({missing[0]})" if missing else f"has {len(over)} too many ({over[0]})"
        raise ValueError(f"{path} {what}, as the network calls them")
    for key, value in weights.items():
        if value.shape != wanted[key].shape:
            shapes = tuple(value.shape), tuple(wanted[key].shape)
            raise ValueError(f"{path}: {key} has shape {shapes[0]} and the network wants {shapes[1]}")
    unet.load_state_dict(weights)
    unet.eval()
