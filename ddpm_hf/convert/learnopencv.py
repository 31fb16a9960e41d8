"""LearnOpenCV's DDPM from scratch: blocks in one flat list, and a stored table of time embeddings."""

from ddpm_hf.convert.flat_row import names_of, settings_of, stages_of
from ddpm_hf.convert.source import Source, Weights


def _sizes(weights: Weights) -> dict:
    widths, layers = stages_of(weights, "encoder_blocks", "conv_1.weight", "downsample.weight")
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


def _settings(sizes: dict) -> dict:
    base = sizes["base_channels"]
    widths = [base * multiple for multiple in sizes["base_channels_multiples"]]
    return settings_of(widths, sizes["num_res_blocks"], sizes["apply_attention"]) | {
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


def _names(sizes: dict) -> list:
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
    return names + names_of("encoder_blocks", "decoder_blocks", stages, layers, "downsample", r"upsample\.1", inner)


def _scheduler(sizes: dict) -> dict:
    steps = sizes["total_time_steps"]  # the source scales the betas by 1000 / steps
    betas = {"beta_start": 1000 / steps * 1e-4, "beta_end": 1000 / steps * 0.02}
    return {"clip_sample": False, "variance_type": "fixed_large", "num_train_timesteps": steps, **betas}


SOURCE = Source(
    signature="time_embeddings.time_blocks.0.weight",
    sizes=_sizes,
    defaults={"image_size": 32, "dropout_rate": 0.1},
    settings=_settings,
    names=_names,
    scheduler=_scheduler,
    notes=("sampling: the source stops at t = 1; ddpm_hf also takes the step t = 0",),
)
