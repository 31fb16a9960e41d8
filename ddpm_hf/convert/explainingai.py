"""ExplainingAI's DDPM-Pytorch: one skip connection per stage, and attention in every layer."""

from ddpm_hf.convert.source import Source, Weights, count


def _sizes(weights: Weights) -> dict:
    stages, mids = (count(weights, rf"{part}s\.(\d+)\.") for part in ("down", "mid"))
    first = [weights[f"downs.{i}.resnet_conv_first.0.2.weight"] for i in range(stages)]
    mid = [weights[f"mids.{i}.resnet_conv_first.0.2.weight"] for i in range(mids)]
    return {
        "im_channels": weights["conv_in.weight"].shape[1],
        "down_channels": [w.shape[1] for w in first] + [first[-1].shape[0]],
        "mid_channels": [w.shape[1] for w in mid] + [mid[-1].shape[0]],
        "down_sample": [f"downs.{i}.down_sample_conv.weight" in weights for i in range(stages)],
        "time_emb_dim": weights["t_proj.0.weight"].shape[0],
        "num_down_layers": count(weights, r"downs\.0\.attentions\.(\d+)\."),
        "num_mid_layers": count(weights, r"mids\.0\.attentions\.(\d+)\."),
        "num_up_layers": count(weights, r"ups\.0\.attentions\.(\d+)\."),
    }


def _settings(sizes: dict) -> dict:
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


def _names(sizes: dict) -> list:
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
    for source, part in (("down", "down"), ("mid", "middle"), ("up", "up")):
        names += [(rf"{source}s\.(\d+)\.{source}_sample_conv", rf"{part}.\1.{source}sample")]
        names += [(rf"{source}s\.(\d+)\.{a}", rf"{part}.\1.layers.\2.{b}") for a, b in inner.items()]
    return [*names, (r"norm_out", "norm_out"), (r"conv_out", "conv_out")]


SOURCE = Source(
    signature="t_proj.0.weight",
    sizes=_sizes,
    defaults={"im_size": 28},
    settings=_settings,
    names=_names,
    scheduler=lambda sizes: {"clip_sample": False},
    never_read=("num_heads",),
)
