"""labml.ai's annotated DDPM: blocks in one flat list, some with attention."""

from ddpm_hf.convert.flat_row import names_of, settings_of, stages_of
from ddpm_hf.convert.source import Source, Weights


def _sizes(weights: Weights) -> dict:
    widths, layers = stages_of(weights, "down", "res.conv1.weight", "conv.weight")
    stem = weights["image_proj.weight"]
    return {
        "image_channels": stem.shape[1],
        "n_channels": stem.shape[0],
        "ch_mults": [w // before for w, before in zip(widths, [stem.shape[0], *widths], strict=False)],
        "is_attn": [f"down.{stage[0]}.attn.projection.weight" in weights for stage in layers],
        "n_blocks": len(layers[0]),
    }


def _settings(sizes: dict) -> dict:
    widths = [sizes["n_channels"]]
    for multiple in sizes["ch_mults"]:
        widths.append(widths[-1] * multiple)
    return settings_of(widths[1:], sizes["n_blocks"], sizes["is_attn"]) | {
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


def _names(sizes: dict) -> list:
    residual = {"norm1": "norm_1", "conv1": "conv_1", "norm2": "norm_2", "conv2": "conv_2"}
    residual |= {"shortcut": "shortcut", "time_emb": "time_projection"}
    attention = {"projection": "to_qkv", "output": "to_out"}
    inner = {rf"res\.{a}": f"residual.{b}" for a, b in residual.items()}
    inner |= {rf"attn\.{a}": f"attention.{b}" for a, b in attention.items()}
    names = [("image_proj", "stem"), ("norm", "norm_out"), ("final", "conv_out")]
    names += [(rf"time_emb\.lin{k}", f"time_embedding.linear_{k}") for k in (1, 2)]
    names += [(r".*\.attn\.norm", None)]  # the source never uses these weights
    names += [
        (rf"middle\.res{k}\.{a}", f"middle.0.layers.{k - 1}.residual.{b}") for k in (1, 2) for a, b in residual.items()
    ]
    names += [(rf"middle\.attn\.{a}", f"middle.0.layers.0.attention.{b}") for a, b in attention.items()]
    return names + names_of("down", "up", len(sizes["ch_mults"]), sizes["n_blocks"], "conv", "conv", inner)


SOURCE = Source(
    signature="image_proj.weight",
    sizes=_sizes,
    defaults={"image_size": 32},
    settings=_settings,
    names=_names,
    scheduler=lambda sizes: {"clip_sample": False, "variance_type": "fixed_large"},
    aliases={"channel_multipliers": "ch_mults", "is_attention": "is_attn"},
    notes=("sampling: the source adds noise after the last step, t = 0; ddpm_hf and the paper do not",),
)
