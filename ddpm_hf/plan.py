"""What a run costs before it is begun: parameters, FLOPs and memory are counted, its time on N devices is estimated.

Counted is the network's own forward and backward, run on fake tensors, which have shapes and no values. No image is
read and nothing is trained.
"""

import math
import weakref
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.config import EMBEDDED_DIGITS, TrainConfig
from ddpm_hf.pipeline import load_pipeline
from ddpm_hf.unet import DDPMUNet

KNOWN = {  # data set: shape of an image, images to train on, classes
    EMBEDDED_DIGITS: ((1, 8, 8), 1617, 10),
    "ylecun/mnist": ((1, 28, 28), 60_000, 10),
    "uoft-cs/cifar10": ((3, 32, 32), 50_000, 10),
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUND_NUMBER = 1_000_000  # of images, where nobody knows how many there are
GIB = 2**30


class Constant(NamedTuple):
    """A number of the cost model, in SI units, and where it is from."""

    value: float
    source: str


class Device(NamedTuple):
    """A kind of device.

    Args:
        convolutions, products: FLOP/s of convolutions and of other matrix products, by `mixed_precision`.
        efficiency: the part of them that training reaches.
        operation: seconds that an operation of PyTorch takes at least.
        link: bytes a second and direction between devices of a machine; of the cpu, between machines.
        network: the same between machines, a device.
        devices: in a machine.
        memory: bytes, or None: as the machine has.
    """

    convolutions: dict[str, Constant]
    products: dict[str, Constant]
    efficiency: Constant
    operation: Constant
    link: Constant
    network: Constant
    devices: int
    memory: float | None


def _gpu(sheet, half, tf32, single, link, network, network_source, memory) -> Device:
    half = Constant(half, f"{sheet}: dense bf16 and fp16")
    tf32 = Constant(tf32, f"{sheet}: dense TF32, cuDNN's default in PyTorch")
    single = Constant(single, f"{sheet}: fp32, PyTorch's default for matrix products")
    return Device(
        {"no": tf32, "bf16": half, "fp16": half},
        {"no": single, "bf16": half, "fp16": half},
        Constant(0.3, "assumption, not measured"),
        Constant(10e-6, "assumption, not measured: PyTorch without graphs"),
        Constant(link, f"{sheet}: NVLink, half of what it gives for both directions"),
        Constant(network, network_source),
        8,
        memory,
    )


_HOPPER = (989e12, 495e12, 67e12, 450e9, 50e9, "NVIDIA DGX H100 and H200 data sheets: a 400 Gb/s InfiniBand port a GPU")
_MEASURED = "measured on 2 cores (AVX512-BF16), PyTorch 2.13"
DEVICES = {
    "cpu": Device(
        dict.fromkeys(DTYPES, Constant(260e9, f"{_MEASURED}: the peak of its convolutions"))
        | {"bf16": Constant(515e9, f"{_MEASURED}: the peak of its convolutions")},
        dict.fromkeys(DTYPES, Constant(190e9, f"{_MEASURED}: the peak of its matrix products"))
        | {"bf16": Constant(515e9, "assumption, not measured: as convolutions")},
        Constant(0.5, f"{_MEASURED}: networks of this kind reached 0.4 to 0.7 in training"),
        Constant(0.0, "not in the model of the cpu"),
        Constant(1.25e9, "assumption, not measured: 10 Gb/s Ethernet"),
        Constant(1.25e9, "assumption, not measured: 10 Gb/s Ethernet"),
        1,
        None,
    ),
    "a100": _gpu("NVIDIA A100 80GB SXM data sheet", 312e12, 156e12, 19.5e12, 300e9, 25e9,
                 "NVIDIA DGX A100 data sheet: a 200 Gb/s InfiniBand port a GPU", 80e9),
    "h100": _gpu("NVIDIA H100 SXM data sheet", *_HOPPER, 80e9),
    "h200": _gpu("NVIDIA H200 SXM data sheet", *_HOPPER, 141e9),
}  # fmt: skip
# Of a process, whatever the device:
DRAW = Constant(5.0e-9, "measured on 1 core: training.draw, noise of the whole global batch in every process")
BATCH = Constant(2.8e-9, "measured on 1 core: 64 images of uint8 picked, normalised and flipped")
DECODE = Constant(350e-6, "measured on 1 core: PNG of 64x64; a JPEG of 500x375 took 4.2 ms")


class Flops(NamedTuple):
    """FLOPs, 2 a multiply-add, of convolutions and of other matrix products."""

    convolutions: float
    products: float

    @property
    def total(self) -> float:
        return self.convolutions + self.products


class Update(NamedTuple):
    """Seconds of an update: arithmetic, what of the all-reduce the backward does not hide, what the CPU prepares."""

    compute: float
    all_reduce: float
    data: float


def image_shape(config: TrainConfig) -> tuple[int, int, int]:
    """(C, H, W) of the images, without looking at them."""
    (channels, *size), _, _ = _known(config) or ((None, None, None), None, None)
    made_for = _unet_settings(config)
    channels = config.channels or channels or made_for.get("in_channels")
    sides = config.resolution or (size[0] and size) or made_for.get("sample_size")
    for name, value in (("resolution", sides), ("channels", channels)):
        if value is None:
            raise ValueError(f"{name}=None: config={config.config!r} leaves it to the images: give --{name}")
    height, width = (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])
    return channels, height, width


def network(config: TrainConfig, shape: tuple[int, int, int]) -> DDPMUNet:
    """The network that `config` trains, of fake tensors."""
    channels, height, width = shape
    settings = _unet_settings(config)
    variance = {"out_channels": 2 * channels} if config.learned_variance else {}
    classes = {}
    if config.class_conditional and settings.get("num_classes") is None:
        if not _known(config):
            raise ValueError("class_conditional=True: give the number of classes, as --unet '{\"num_classes\": 10}'")
        classes["num_classes"] = _known(config)[2]
    size = height if height == width else (height, width)
    try:
        with FakeTensorMode():
            unet = DDPMUNet(**{"sample_size": size, "in_channels": channels, **variance, **classes, **settings})
    except TypeError as error:  # an argument that DDPMUNet does not have, or a value of the wrong type
        raise ValueError(f"unet={config.unet!r}: {error}") from error
    if unet.config.in_channels != channels:
        made_for = unet.config.in_channels
        raise ValueError(f"unet is made for {made_for} channels and the images have {channels}: set channels")
    return unet.train()


def _known(config: TrainConfig):
    return None if config.train_data_dir is not None else KNOWN.get(config.dataset_name)


def _unet_settings(config: TrainConfig) -> dict:
    if config.pretrained_model_name_or_path is None:
        return config.unet
    unet = load_pipeline(config.pretrained_model_name_or_path, "pretrained_model_name_or_path").unet
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


# ---------------------------------------------------------------- counted


def count_flops(unet: DDPMUNet, shape: tuple[int, int, int]) -> tuple[Flops, Flops]:
    """Forward and backward, of one image. Attention is counted as the products that it is, fused or not."""
    parts = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with _fake(unet), sdpa_kernel(SDPBackend.MATH):
        with parts[0]:
            loss = _loss(unet, shape, 1)
        with parts[1]:
            loss.backward()
    unet.zero_grad()
    return tuple(_by_kind(part.get_flop_counts().get("Global", {})) for part in parts)


def _by_kind(counts: dict) -> Flops:
    convolutions = sum(n for operation, n in counts.items() if "convolution" in str(operation))
    return Flops(convolutions, sum(counts.values()) - convolutions)


class Memory(NamedTuple):
    """Bytes of `activations` that the backward of a batch waits for, and of all at the `peak` of an update."""

    activations: int
    peak: int
    operations: int


def at_rest(unet: DDPMUNet) -> int:
    """Bytes of the weights, of AdamW's two moments and of the average."""
    weights, buffers = (sum(t.nbytes for t in tensors) for tensors in (unet.parameters(), unet.buffers()))
    return 4 * weights + 2 * buffers


def count_memory(unet: DDPMUNet, shape: tuple[int, int, int], batch: int, precision: str = "no") -> Memory:
    """Every tensor that a forward and backward make, from the operation that makes it until the last one lets go.

    What operations use inside (workspaces, reordered weights) is not seen, nor what an allocator keeps.
    """
    with _fake(unet), _Live(unet) as live:
        loss = _loss(unet, shape, batch, precision)
        activations = live.bytes
        loss.backward()
    unet.zero_grad()
    return Memory(activations, at_rest(unet) + live.peak, live.operations)


def _fake(unet: DDPMUNet) -> FakeTensorMode:
    return next(unet.parameters()).fake_mode


def _loss(unet, shape, batch, precision="no"):
    x, timesteps = torch.zeros(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    # the network looks at the values of labels on the CPU, and these have none
    labels = None if unet.config.num_classes is None else torch.zeros(batch, dtype=torch.int64, device="meta")
    with torch.autocast("cpu", DTYPES[precision], enabled=precision != "no"):
        output = unet(x, timesteps, labels).sample
    return output.float().square().mean()


class _Live(TorchDispatchMode):
    """Counts operations, and the bytes that they have made and that somebody still holds."""

    def __init__(self, unet):
        super().__init__()
        self.bytes = self.peak = self.operations = 0
        self.storages = {t.untyped_storage()._cdata: None for t in (*unet.parameters(), *unet.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:  # a view of it
            return

        def let_go(_):
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, let_go)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
