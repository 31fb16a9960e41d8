"""The U-Net that predicts the noise (Ho et al. 2020, arXiv:2006.11239, appendix B), with the variants of tutorials.

    sample -> stem -> down[0] -> down[1] -> ... -> middle -> ... -> up[-2] -> up[-1] -> norm_out, SiLU, conv_out
                        \\________\\______ skip connections ________/________/

A stage (`down[i]`, `middle[i]`, `up[i]`) is a sequence of layers at one resolution; a layer is a residual block with
optional self-attention. Shapes: B images, C channels, H x W pixels, E = time_embedding_dim.
"""

from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ddpm_hf.utils.arguments import (
    any_of,
    boolean,
    check_all,
    explained,
    integer,
    limit,
    list_of,
    matching,
    number,
    one_of,
    optional,
    require,
    show,
    text,
)

SKIP_CONNECTIONS = ("stage", "layer")


@dataclass
class DDPMUNetOutput(BaseOutput):
    """`sample`: (B, out_channels, H, W), the network's prediction."""

    sample: torch.Tensor


class TimeEmbedding(nn.Module):
    """timesteps (B,) -> (B, E): sinusoids (Vaswani et al. 2017, arXiv:1706.03762, section 3.5) and two linear layers.

    All sines come before all cosines, or after them with `flip_sin_to_cos`. The frequencies are
    10000^(-i / (time_sinusoid_dim / 2 - freq_shift)) for i = 0 ... time_sinusoid_dim / 2 - 1.
    """

    def __init__(self, config):
        super().__init__()
        self.cos_first, self.shift = config.flip_sin_to_cos, config.freq_shift
        width = config.time_embedding_dim
        self.linear_1 = nn.Linear(config.time_sinusoid_dim or width, width)
        self.linear_2 = nn.Linear(width, width)
        self.table = None
        if config.time_table_size is not None:
            table = self._sinusoids(torch.arange(config.time_table_size))
            self.table = nn.Embedding.from_pretrained(table, freeze=True)

    def _sinusoids(self, timesteps):
        width = self.linear_1.in_features
        return get_timestep_embedding(timesteps, width, self.cos_first, downscale_freq_shift=self.shift)

    def forward(self, timesteps):
        # Angles reach 1000 radians, which half precision cannot resolve, so the sinusoids are computed in float32.
        x = self._sinusoids(timesteps) if self.table is None else self.table(timesteps.long())  # (B, sinusoids)
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class SelfAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): multi-head self-attention over the H*W positions, with a residual connection."""

    def __init__(self, channels: int, config):
        super().__init__()
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        if channels % (head_dim or heads):
            setting = f"num_attention_heads={heads}" if head_dim is None else f"attention_head_dim={head_dim}"
            raise ValueError(f"{setting} must divide {channels}, the channels of a stage with attention")
        self.num_heads = channels // head_dim if head_dim else heads
        norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.norm = norm if config.attention_norm else nn.Identity()
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.to_qkv(tokens).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, HW, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
        tokens = self.to_out(mixed.transpose(1, 2).reshape(B, H * W, C))
        return x + tokens.transpose(1, 2).reshape(B, C, H, W)


class ResidualBlock(nn.Module):
    """x (B, in, H, W), SiLU of the time embedding (B, E) -> (B, out, H, W)"""

    def __init__(self, in_channels: int, out_channels: int, config):
        super().__init__()
        self.norm_1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(config.time_embedding_dim, out_channels)
        self.norm_2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = (nn.Dropout2d if config.dropout_channels else nn.Dropout)(config.dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = config.project_every_shortcut or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()

    def forward(self, x, time):
        h = self.conv_1(F.silu(self.norm_1(x)))  # (B, out, H, W)
        h = h + self.time_projection(time)[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        return self.shortcut(x) + h


class Layer(nn.Module):
    """A residual block, then attention if `attention`: (B, in, H, W), (B, E) -> (B, out, H, W)"""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, config):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, config)
        self.attention = SelfAttention(out_channels, config) if attention else None

    def forward(self, x, time):
        x = self.residual(x, time)
        return x if self.attention is None else self.attention(x)


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""

    def __init__(self, channels: int, config):
        super().__init__(channels, channels, config.downsample_kernel_size, 2, config.downsample_padding)

    def forward(self, x):
        # Like the authors' code, pad right and bottom where the convolution has no padding.
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.padding == (0, 0) else x)


class TransposedUpsample(nn.ConvTranspose2d):
    """(B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 4, stride=2, padding=1)


class NearestUpsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest-neighbour upsampling, then a 3x3 convolution.

    The two are computed as one equal 4x4 transposed convolution, which needs 4 instead of 9 products per output pixel
    and pair of channels, and no intermediate image. Weight (i, j) of the flipped 3x3 kernel is added to rows i, i + 1
    and columns j, j + 1 of the 4x4 kernel.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        # Not a buffer: checkpoints have none, so it would stay uninitialised in networks built on the meta device.
        adds_to = self.weight.new_ones(3, 4).triu().tril(1).flip(0)  # (3, 4), for one axis
        kernel = (self.weight.flatten(2) @ torch.kron(adds_to, adds_to)).unflatten(2, (4, 4))
        kernel = kernel.transpose(0, 1)  # (in, out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


UPSAMPLE_TYPES = {"transposed": TransposedUpsample, "nearest": NearestUpsample}


class DownStage(nn.Module):
    """(B, in, H, W) -> (B, out, H/2, W/2), or (B, out, H, W) without `downsample`, and the list of its skips.

    The skips (B, C, H, W) are the input of the stage (skip_connections="stage"), or also the output of each layer.
    """

    def __init__(self, widths: list[int], attention: bool, downsample: bool, config):
        super().__init__()
        self.skips_every_layer = config.skip_connections == "layer"
        self.layers = nn.ModuleList(Layer(i, o, attention, config) for i, o in pairwise(widths))
        self.downsample = Downsample(widths[-1], config) if downsample else None

    def forward(self, x, time):
        features = [x]
        for layer in self.layers:
            features.append(layer(features[-1], time))
        x = features[-1] if self.downsample is None else self.downsample(features[-1])  # H, W -> H/2, W/2
        return x, features if self.skips_every_layer else features[:1]


class MiddleStage(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): `num_layers` layers with attention, then one without."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, config):
        super().__init__()
        widths = [in_channels, *[out_channels] * (num_layers + 1)]
        self.layers = nn.ModuleList(Layer(i, o, k < num_layers, config) for k, (i, o) in enumerate(pairwise(widths)))

    def forward(self, x, time):
        for layer in self.layers:
            x = layer(x, time)
        return x


class UpStage(nn.Module):
    """(B, in, H, W), the skips of its down stage -> (B, out, 2H, 2W), or (B, out, H, W) without `upsample`."""

    def __init__(self, widths: list[int], skip_widths: list[int], attention: bool, upsample: bool, config):
        super().__init__()
        self.upsample = UPSAMPLE_TYPES[config.upsample_type](widths[0]) if upsample else None
        self.layers = nn.ModuleList(
            Layer(i + skip, o, attention, config)
            for (i, o), skip in zip_longest(pairwise(widths), skip_widths, fillvalue=0)
        )

    def forward(self, x, time, skips):
        if self.upsample is not None:
            x = self.upsample(x)  # H, W -> 2H, 2W
        for layer, skip in zip_longest(self.layers, reversed(skips)):
            x = layer(x if skip is None else torch.cat([x, skip], dim=1), time)
        return x


# ---------------------------------------------------------------- types and ranges of the arguments

MOST_PARAMETERS, MOST_CLASSES, LARGEST_SIDE = 10**10, 10**6, 2**16
_COUNT = integer(1)
_LAYERS = integer(1, 100, "each is a part of the network")
_WIDTHS = list_of(_COUNT, "integers of at least 1, one per stage, at most 10", most=10)
_BOOLEANS = list_of(boolean, "booleans", most=10)
_SIDE = integer(1, LARGEST_SIDE)
ARGUMENTS = {
    "sample_size": any_of(
        f"must be a side or a (height, width), in integers of 1 ... {LARGEST_SIDE}", _SIDE, list_of(_SIDE, "", most=2)
    ),
    "in_channels": _COUNT,
    "stem_channels": _COUNT,
    "block_out_channels": _WIDTHS,
    "downsample": optional(_BOOLEANS),
    "attention": any_of("must be true or false, or a list of them, one per stage", boolean, _BOOLEANS),
    "layers_per_block": _LAYERS,
    "mid_block_out_channels": _WIDTHS,
    "mid_layers_per_block": _LAYERS,
    "up_block_out_channels": _WIDTHS,
    "up_layers_per_block": optional(_LAYERS),
    "skip_connections": one_of(*SKIP_CONNECTIONS),
    "downsample_kernel_size": _COUNT,
    "downsample_padding": integer(0),
    "upsample_type": one_of(*UPSAMPLE_TYPES),
    "project_every_shortcut": boolean,
    "num_attention_heads": _COUNT,
    "attention_head_dim": optional(_COUNT),
    "attention_norm": boolean,
    "time_sinusoid_dim": optional(_COUNT),
    "time_embedding_dim": _COUNT,
    "flip_sin_to_cos": boolean,
    "freq_shift": number(),
    "time_table_size": optional(integer(1, 10**6)),
    "norm_num_groups": _COUNT,
    "norm_num_groups_out": optional(_COUNT),
    "norm_eps": number(above=0, most=1),
    "dropout": number(0, below=1),
    "dropout_channels": boolean,
    "num_classes": optional(integer(1, MOST_CLASSES)),
    "class_names": optional(list_of(text, "names", most=MOST_CLASSES)),
    "value_range": optional(list_of(number(), "numbers", 2, 2)),
    "has_alpha": optional(boolean),
    "out_channels": optional(_COUNT),
}


_CALL = {
    "sample": matching(lambda v: v.is_floating_point() and not v.is_meta, "must be a tensor of floating-point numbers"),
    "timestep": matching(lambda v: torch.as_tensor(v).numel() > 0, "must be a number, or a tensor with one per image"),
}


def _check(config) -> None:
    """Raise ValueError for settings that contradict one another, with the first one's name and value."""

    def holds(name, condition, words):
        require(name, config[name], condition, words)

    groups, stages = config.norm_num_groups, len(config.block_out_channels)
    for name in ("stem_channels", "block_out_channels", "mid_block_out_channels", "up_block_out_channels"):
        widths = [config[name]] if name == "stem_channels" else config[name]
        holds(name, not any(width % groups for width in widths), f"must be multiples of norm_num_groups={groups}")
    one_each = f"must have {stages} entries, one per entry of block_out_channels"
    for name in ("up_block_out_channels", "downsample", "attention"):
        holds(name, not isinstance(config[name], list | tuple) or len(config[name]) == stages, one_each)
    widths_out = (None, config.in_channels, 2 * config.in_channels)
    holds("out_channels", config.out_channels in widths_out, f"must be None, or 1 or 2 times {config.in_channels}")
    layers = (None, config.layers_per_block + 1)
    by_layer = config.skip_connections == "stage" or config.up_layers_per_block in layers
    holds("up_layers_per_block", by_layer, "must be None or layers_per_block + 1 with skip_connections='layer'")
    kernel, padding = config.downsample_kernel_size, config.downsample_padding
    rule = f"with downsample_kernel_size={kernel}: kernel and padding must be 4 and 1, 3 and 1, or 3 and 0"
    holds("downsample_padding", (kernel, padding) in ((4, 1), (3, 1), (3, 0)), rule)
    sinusoids_from = "time_embedding_dim" if config.time_sinusoid_dim is None else "time_sinusoid_dim"
    half = config[sinusoids_from] / 2
    holds(
        sinusoids_from, half == int(half) and half > config.freq_shift, "must be even and greater than 2 * freq_shift"
    )
    last = config.up_block_out_channels[-1] % (config.norm_num_groups_out or groups)
    holds("norm_num_groups_out", not last, "must divide the last entry of up_block_out_channels")
    names = config.class_names
    different = names is None or len(set(names)) == len(names) == config.num_classes
    holds("class_names", different, f"must be num_classes={config.num_classes} different names")
    black_white = config.value_range
    holds("value_range", not black_white or black_white[0] < black_white[1], "must be black and the greater white")
    what = "block_out_channels and the other settings give a network of about {} weights"
    limit(what, _parameters(config), MOST_PARAMETERS, "they take 40 GB in float32")


def _parameters(config) -> int:
    """About how many weights the network has, before any is in memory: two convolutions in each layer, and tables."""
    up = config.up_layers_per_block or config.layers_per_block
    layers = [(config.block_out_channels, config.layers_per_block), (config.up_block_out_channels, up)]
    layers.append((config.mid_block_out_channels, config.mid_layers_per_block + 1))
    convolutions = sum(18 * number * width**2 for widths, number in layers for width in widths)
    inputs, E = (config.in_channels + (config.out_channels or 0)) * 9 * config.stem_channels, config.time_embedding_dim
    sinusoids = config.time_sinusoid_dim or E
    tables = (config.num_classes or 0) * E + (config.time_table_size or 0) * sinusoids
    return convolutions + inputs + tables + E * (E + sinusoids + sum(sum(widths) for widths, _ in layers))


class DDPMUNet(ModelMixin, ConfigMixin):
    """The U-Net of a DDPM: noisy images (B, in_channels, H, W), timesteps and optional class labels -> a prediction.

    The defaults are the network of the ExplainingAI tutorial for MNIST (10.2 M parameters). Images of any height and
    width are accepted: sizes that the stages cannot halve are padded by repeating the last row and column, and the
    prediction is cropped. A down stage and the up stage of the same resolution are called a pair.

    Args:
        sample_size: side, or (height, width), of the training images and, by default, of samples.
        in_channels: channels of the images.
        out_channels: channels of the prediction; `None`: `in_channels`. A learned variance needs 2 * in_channels
            (Nichol & Dhariwal 2021, arXiv:2102.09672): the second half is the share of `NoiseScheduler.split_output`.
        stem_channels: channels of the first convolution.
        block_out_channels: output channels of each down stage, starting at the image.
        downsample: per pair of stages, whether the down stage halves height and width at its end and the up stage
            doubles them; `None`: all but the last.
        attention: per pair of stages, whether its layers have attention; or one bool for all. The middle stages always
            have attention.
        layers_per_block: layers of each down stage.
        mid_block_out_channels: output channels of each middle stage.
        mid_layers_per_block: layers with attention in each middle stage; one layer without attention follows them.
        up_block_out_channels: output channels of each up stage, starting at the lowest resolution.
        up_layers_per_block: layers of each up stage; `None`: `layers_per_block`, or `layers_per_block + 1` with
            `skip_connections="layer"`, which allows no other number.
        skip_connections: `"stage"`: the first layer of an up stage sees the input of its down stage; `"layer"`: each
            layer of an up stage sees the input or one layer's output of its down stage (Ho et al. 2020).
        downsample_kernel_size, downsample_padding: kernel and padding of the strided convolution: 4 and 1, 3 and 1, or
            3 and 0, where zeros are padded right and bottom only.
        upsample_type: `"transposed"`: a 4x4 transposed convolution; `"nearest"`: nearest-neighbour upsampling and a 3x3
            convolution.
        project_every_shortcut: use a 1x1 convolution in the shortcut of every residual block, not only of those that
            change the number of channels.
        num_attention_heads: heads of every attention layer.
        attention_head_dim: channels per head; replaces `num_attention_heads`.
        attention_norm: apply group normalisation to the input of attention.
        time_sinusoid_dim: number of sinusoids; `None`: `time_embedding_dim`.
        time_embedding_dim: E, the width of the time embedding.
        flip_sin_to_cos: put the cosines before the sines.
        freq_shift: the s in the frequencies 10000^(-i / (time_sinusoid_dim / 2 - s)) of the sinusoids.
        time_table_size: save the sinusoids of this many timesteps with the weights, as a fixed table; `None`: compute
            them.
        norm_num_groups: groups of the group normalisations; it divides all numbers of channels.
        norm_num_groups_out: groups of the last group normalisation; `None`: `norm_num_groups`.
        norm_eps: epsilon of the group normalisations.
        dropout: dropout probability in the residual blocks.
        dropout_channels: drop whole channels.
        num_classes: number of classes, with the labels 0 ... num_classes - 1; the label `num_classes` is the null label
            of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). `None`: unconditional.
        class_names: names of the classes, in the order of their labels.
        value_range: the pixel values of black and white in the files of training images of more than 8 bits, which
            `ddpm-hf sample` writes again; `None`: images of 8 bits. The network does not use it.
        has_alpha: whether the last of 2 or 4 channels is opacity, for files and pictures of samples; `None`: it is. The
            network does not use it.

    Raises:
        ValueError: a setting is invalid; the message names it, its value and what is valid.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DownStage", "MiddleStage", "UpStage"]
    _repeated_blocks = ["Layer"]
    _skip_layerwise_casting_patterns = ["time_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        stem_channels: int = 32,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        downsample: tuple[bool, ...] | None = None,
        attention: bool | tuple[bool, ...] = True,
        layers_per_block: int = 2,
        mid_block_out_channels: tuple[int, ...] = (256, 128),
        mid_layers_per_block: int = 2,
        up_block_out_channels: tuple[int, ...] = (64, 32, 16),
        up_layers_per_block: int | None = None,
        skip_connections: str = "stage",
        downsample_kernel_size: int = 4,
        downsample_padding: int = 1,
        upsample_type: str = "transposed",
        project_every_shortcut: bool = True,
        num_attention_heads: int = 4,
        attention_head_dim: int | None = None,
        attention_norm: bool = True,
        time_sinusoid_dim: int | None = None,
        time_embedding_dim: int = 128,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 0,
        time_table_size: int | None = None,
        norm_num_groups: int = 8,
        norm_num_groups_out: int | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        dropout_channels: bool = False,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        out_channels: int | None = None,
        value_range: tuple[float, float] | None = None,
        has_alpha: bool | None = None,
    ):
        super().__init__()
        self.register_to_config(**check_all(self.config, ARGUMENTS))
        config = self.config
        _check(config)
        stages = len(block_out_channels)
        downsample = config.downsample or [True] * (stages - 1) + [False]
        attention = [config.attention] * stages if isinstance(config.attention, bool) else config.attention
        self.gradient_checkpointing = False
        self.size_factor = 2 ** sum(downsample)

        self.stem = nn.Conv2d(in_channels, stem_channels, 3, padding=1)
        self.time_embedding = TimeEmbedding(config)

        self.down = nn.ModuleList()
        down_widths = []
        for i, (width_in, width) in enumerate(pairwise([stem_channels, *block_out_channels])):
            down_widths.append([width_in, *[width] * layers_per_block])
            self.down.append(DownStage(down_widths[i], attention[i], downsample[i], config))

        self.middle = nn.ModuleList(
            MiddleStage(i, o, mid_layers_per_block, config)
            for i, o in pairwise([block_out_channels[-1], *mid_block_out_channels])
        )

        self.up = nn.ModuleList()
        width = mid_block_out_channels[-1]
        for i, width_out in zip(reversed(range(stages)), up_block_out_channels, strict=True):
            if skip_connections == "stage":
                skip_widths = down_widths[i][:1]
                widths = [width, *[width_out] * (up_layers_per_block or layers_per_block)]
            else:
                skip_widths = down_widths[i][::-1]
                widths = [width, *[block_out_channels[i]] * layers_per_block, width_out]
            self.up.append(UpStage(widths, skip_widths, attention[i], downsample[i], config))
            width = width_out

        self.norm_out = nn.GroupNorm(norm_num_groups_out or norm_num_groups, width, norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels or in_channels, 3, padding=1)
        # (B,) -> (B, E), added to the time embedding; the last row is the null label's
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, config.time_embedding_dim)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`ModelMixin.from_pretrained` without its fallback to pickle files.

        Weights on the CPU are copied out of the memory-mapped file, because their alignment there depends on the file's
        header, and the last bits of matrix products depend on the alignment.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False is not supported: loading a pickle file can run any code")
        loaded = super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})
        unet = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        for tensor in (*unet.parameters(), *unet.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        return loaded

    @explained(_CALL)
    def forward(self, sample: torch.Tensor, timestep, class_labels=None, return_dict: bool = True):
        """Predict the noise (or x_0 or v, by the scheduler's `prediction_type`) in noisy images.

        Args:
            sample: noisy images x_t, (B, in_channels, H, W).
            timestep: int or float, or a tensor of shape (), (1,) or (B,).
            class_labels: int64 (B,), each in 0 ... num_classes; required if the network is class-conditional, invalid
                otherwise.

        Returns:
            `DDPMUNetOutput` with `sample` (B, out_channels, H, W), or a tuple of it.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or not sample.numel():
            raise ValueError(f"sample has shape {tuple(sample.shape)}; it must be (B, {self.config.in_channels}, H, W)")
        B, _, H, W = sample.shape
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if timesteps.shape[0] not in (1, B):  # `len` would fix B in torch.export
            raise ValueError(f"timestep has {timesteps.shape[0]} elements for a batch of {B}; it must be 1 or {B}")
        time = self.time_embedding(timesteps.expand(B))
        self._check_labels(class_labels, B)
        if class_labels is not None:
            time = time + self.class_embedding(class_labels.to(sample.device))
        time = F.silu(time)  # (B, E)

        pad_h, pad_w = -H % self.size_factor, -W % self.size_factor
        if pad_h or pad_w:
            sample = F.pad(sample, (0, pad_w, 0, pad_h), mode="replicate")

        x = self.stem(sample)  # (B, stem_channels, H + pad_h, W + pad_w)
        skips = []
        for stage in self.down:
            x, features = self._run(stage, x, time)  # H, W -> H/2, W/2 where the stage downsamples
            skips.append(features)
        for stage in self.middle:
            x = self._run(stage, x, time)
        for stage in self.up:
            x = self._run(stage, x, time, skips.pop())  # H, W -> 2H, 2W where its down stage halved them
        x = self.conv_out(F.silu(self.norm_out(x)))[:, :, :H, :W]  # (B, out_channels, H, W)

        return DDPMUNetOutput(sample=x) if return_dict else (x,)

    def _check_labels(self, labels, batch_size: int) -> None:
        classes = self.config.num_classes
        if classes is None:
            if labels is not None:
                raise ValueError("class_labels must be None: this network is unconditional (num_classes=None)")
            return
        rule = f"0 ... {classes - 1}, or {classes} for no class"
        if labels is None:
            raise ValueError(f"class_labels=None: this network is class-conditional and needs labels in {rule}")
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != (batch_size,):
            what = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else show(labels)
            raise ValueError(f"class_labels={what} must be an int64 tensor of shape ({batch_size},)")
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading the values would synchronise the GPU or break the graph
        if not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ValueError(f"class_labels={show(labels.tolist())} must be in {rule}")

    def _run(self, stage, *args):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(stage, *args)
        return stage(*args)
