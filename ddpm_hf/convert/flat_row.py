"""Networks with one skip connection per layer (labml, learnopencv, diffusers), and their blocks in one flat list.

In the two tutorials, the list has the layers of each stage and, between stages, a resampling block.
"""

from ddpm_hf.convert.source import Weights, count


def stages_of(weights: Weights, prefix: str, width_key: str, resample_key: str) -> tuple[list[int], list[list[int]]]:
    """The width of each stage and the indices of its layers in the list of blocks `prefix`.0, `prefix`.1, ..."""
    widths, layers, stage = [], [], 0
    for k in range(count(weights, rf"{prefix}\.(\d+)\.")):
        if f"{prefix}.{k}.{resample_key}" in weights:
            stage += 1
            continue
        if stage == len(widths):
            widths.append(0)
            layers.append([])
        widths[stage] = weights[f"{prefix}.{k}.{width_key}"].shape[0]
        layers[stage].append(k)
    return widths, layers


def names_of(down: str, up: str, stages: int, layers: int, downsample: str, upsample: str, inner: dict) -> list:
    """Rules, as in `Source.names`, for `layers` blocks per stage on the way down and `layers + 1` on the way up.

    The block that ends an up stage in the source begins the next stage in `DDPMUNet`.
    """
    names, rows = [], [(down, "down", layers, downsample, 0), (up, "up", layers + 1, upsample, 1)]
    for row, part, length, resample, shift in rows:
        for stage in range(stages):
            first = stage * (length + 1)
            for k in range(length):
                names += [(rf"{row}\.{first + k}\.{a}", f"{part}.{stage}.layers.{k}.{b}") for a, b in inner.items()]
            names.append((rf"{row}\.{first + length}\.{resample}", f"{part}.{stage + shift}.{part}sample"))
    return names


def settings_of(widths: list[int], layers: int, attention: list[bool]) -> dict:
    """The settings of `DDPMUNet` that sources with one skip connection per layer share."""
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
