"""The cost of a run before it starts: counts parameters, FLOPs and memory, and estimates the time on N devices.

The forward and backward pass of the network run on fake tensors, which have shapes but no values. No image is read.
"""

import math
import weakref
from itertools import chain
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.data.config import EMBEDDED_DIGITS
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.pipeline import load_pipeline, num_classes
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.ema import POST_HOC
from ddpm_hf.training.model import build_network
from ddpm_hf.training.optimizer import matrices
from ddpm_hf.utils.arguments import checked, integer, one_of, optional

KNOWN = {  # data set: shape of an image, images to train on, classes
    EMBEDDED_DIGITS: ((1, 8, 8), 1617, 10),
    "ylecun/mnist": ((1, 28, 28), 60_000, 10),
    "uoft-cs/cifar10": ((3, 32, 32), 50_000, 10),
}
MANY = 1_000_000  # the time is given for so many images if their number is unknown
MACHINE = 8  # GPUs per machine
MOMENTS = {"adamw": "AdamW's two moments", "muon": "Muon's momentum or AdamW's two moments"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Constant(NamedTuple):
    """A number of the cost model in FLOP/s, bytes, seconds or bytes per second, and its unit and source."""

    value: float
    source: str


def _gpu(sheet, half, tf32, single, link, network, memory) -> dict[str, Constant]:
    return {
        "convolutions": Constant(tf32, f"FLOP/s, {sheet}: TF32 without sparsity, PyTorch's default of convolutions"),
        "products": Constant(single, f"FLOP/s, {sheet}: float32, PyTorch's default of matrix products"),
        "half": Constant(half, f"FLOP/s of both in bf16 or fp16, {sheet}: without sparsity"),
        "efficiency": Constant(
            0.13,
            "of these; not measured here: what the README of NVlabs/edm says (32 A100, 13 days, 2,500 M images of "
            "64x64, fp16), at 593 GFLOP per image, counted for a similar network; assumed for all GPUs",
        ),
        "operation": Constant(1e-5, "s at least; not measured, assumption: PyTorch without graphs"),
        "link": Constant(link, f"B/s, {sheet}: NVLink, of which half is one direction"),
        "network": Constant(network, f"B/s per GPU, data sheet of its DGX: InfiniBand, used beyond {MACHINE} GPUs"),
        "memory": Constant(memory, f"B, {sheet}"),
    }


_CPU = "measured on 2 cores (AVX512-BF16, PyTorch 2.13)"
DEVICES = {
    "cpu": {
        "convolutions": Constant(260e9, f"FLOP/s, {_CPU}: the most that convolutions reach"),
        "products": Constant(190e9, f"FLOP/s, {_CPU}: the most that matrix products reach"),
        "half": Constant(515e9, f"FLOP/s of both in bf16, {_CPU}: the most that convolutions reach"),
        "efficiency": Constant(0.5, f"of these, {_CPU}: four networks of this kind reached 0.4 to 0.7 in training"),
        "operation": Constant(0.0, "s at least: not in the model of the cpu"),
        "link": Constant(1.25e9, "B/s; not measured, assumption: Ethernet of 10 Gb/s between processes"),
        "network": Constant(1.25e9, "B/s; not measured, assumption: Ethernet of 10 Gb/s between processes"),
    },
    "a100": _gpu("NVIDIA A100 80GB SXM data sheet", 312e12, 156e12, 19.5e12, 300e9, 25e9, 80e9),
    "h100": _gpu("NVIDIA H100 SXM data sheet", 989e12, 495e12, 67e12, 450e9, 50e9, 80e9),
    "h200": _gpu("NVIDIA H200 SXM data sheet", 989e12, 495e12, 67e12, 450e9, 50e9, 141e9),
}
PROCESS = {  # whatever the device
    "drawing": Constant(5.0e-9, "s per value, measured on 1 core: drawing the noise of the global batch"),
    "picking": Constant(2.8e-9, "s per value, measured on 1 core: converting and flipping images"),
    "decoding": Constant(350e-6, "s per image, measured on 1 core: PNG of 64x64 (a JPEG of 500x375 took 4.2 ms)"),
}
CHECKED = "tensors only; on the CPU 5 to 39 % and at least 35 MiB more was measured (benchmarks/memory.csv)"


# ---------------------------------------------------------------- the network


def image_shape(config: TrainConfig) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images, without reading them."""
    known, pretrained = _known(config), _pretrained(config)
    unet = config.unet if pretrained is None else pretrained.config
    channels = config.channels or (known and known[0][0]) or unet.get("in_channels")
    sides = config.image_size or (known and known[0][1:]) or unet.get("sample_size")
    for name, value in (("resolution", sides), ("channels", channels)):
        if value is None:
            raise ValueError(f"{name}=None: training takes it from the images, but plan reads none; give --{name}")
    return (channels, sides, sides) if isinstance(sides, int) else (channels, sides[0], sides[-1])


def network(
    config: TrainConfig, shape: tuple[int, int, int], class_names: list[str] | None = None
) -> DDPMUNet | UNet2DModel:
    """The network that `config` trains, with fake tensors; a UNet2DModel if the pretrained one is.

    Args:
        shape: (C, H, W) of the images.
        class_names: the classes, for `class_conditional`; None: the number of classes in `KNOWN`.
    """
    pretrained = _pretrained(config)
    if config.class_conditional and pretrained is None and class_names is None and "num_classes" not in config.unet:
        known = _known(config)
        if known is None:
            raise ValueError("class_conditional=True: give the number of classes, as --unet '{\"num_classes\": 10}'")
        class_names = [str(k) for k in range(known[2])]
    with FakeTensorMode():
        fake = None if pretrained is None else type(pretrained).from_config(pretrained.config)
        return build_network(config, shape, class_names, fake).train()


def _known(config: TrainConfig):
    return None if config.train_data_dir is not None else KNOWN.get(config.dataset_name)


def _pretrained(config: TrainConfig) -> DDPMUNet | UNet2DModel | None:
    source = config.pretrained_model_name_or_path
    return None if source is None else load_pipeline(source, "pretrained_model_name_or_path").unet


# ---------------------------------------------------------------- counts


class Memory(NamedTuple):
    """Bytes of `activations` kept for the backward pass, `peak` bytes in an update, and its number of `operations`."""

    activations: int
    peak: int
    operations: int


def count_flops(unet: DDPMUNet, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """FLOPs per image, 2 per multiply-add: (convolutions, other products) of the forward and the backward pass.

    Attention is counted as matrix products, fused or not.
    """
    parts = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with _fake(unet), sdpa_kernel(SDPBackend.MATH):
        with parts[0]:
            loss = _loss(unet, shape, 1)
        with parts[1]:
            loss.backward()
    unet.zero_grad()
    counts = [part.get_flop_counts().get("Global", {}) for part in parts]
    convolutions = [sum(n for name, n in count.items() if "convolution" in str(name)) for count in counts]
    return [(n, sum(count.values()) - n) for n, count in zip(convolutions, counts)]


def at_rest(unet: DDPMUNet, config: TrainConfig | None = None) -> int:
    """Bytes of the weights, AdamW's two moments or Muon's momentum, and the EMAs. None: AdamW and one EMA."""
    weights, buffers = (sum(t.nbytes for t in tensors) for tensors in (unet.parameters(), unet.buffers()))
    muon, averages = (config.optimizer == "muon", config.post_hoc_ema * len(POST_HOC)) if config else (False, 0)
    one_less = sum(t.nbytes for t in chain(*matrices(unet))) if muon else 0
    return (4 + averages) * weights + 2 * buffers - one_less


def count_memory(
    unet: DDPMUNet, shape: tuple[int, int, int], batch: int, precision: str = "no", config: TrainConfig | None = None
) -> Memory:
    """Count the memory of all tensors that are alive during a forward and backward pass.

    Workspaces inside operations (and inside an optimizer's step) and memory that an allocator caches are not counted.
    """
    with _fake(unet), _Live(unet) as live:
        loss = _loss(unet, shape, batch, precision)
        activations = live.bytes
        loss.backward()
    unet.zero_grad()
    return Memory(activations, at_rest(unet, config) + live.peak, live.operations)


def _fake(unet: DDPMUNet) -> FakeTensorMode:
    return next(unet.parameters()).fake_mode


def _loss(unet, shape, batch, precision="no"):
    x, timesteps = torch.zeros(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    # the network checks the values of labels on the CPU; fake tensors have none
    labels = None if num_classes(unet) is None else torch.zeros(batch, dtype=torch.int64, device="meta")
    with torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES):
        output = unet(x, timesteps, labels).sample
    return output.float().square().mean()


class _Live(TorchDispatchMode):
    """Counts operations that allocate memory, and the bytes that are in use."""

    def __init__(self, unet):
        super().__init__()
        self.bytes = self.peak = self.operations = 0
        self.storages = {t.untyped_storage()._cdata: None for t in (*unet.parameters(), *unet.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [self._add(t.untyped_storage()) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.operations += any(made)
        return result

    def _add(self, storage) -> bool:
        """Count a storage and return true, unless it was counted before."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return False

        def let_go(_):
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, let_go)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return True


# ---------------------------------------------------------------- estimates


class Update(NamedTuple):
    """Seconds per update: arithmetic, the all-reduce and the part that is not overlapped, the batch, the total."""

    compute: float
    all_reduce: float
    waited_for: float
    data: float
    total: float


def ring(size: float, devices: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce: each link transfers 2 (N - 1) / N of the bytes (Patarasuk & Yuan 2009)."""
    return 2 * (devices - 1) / devices * size / bandwidth


def _wire(gpus: int) -> str:
    return "link" if gpus <= MACHINE else "network"


def time_of_update(config: TrainConfig, shape, flops, operations: int, parameters: int, device: str, gpus: int):
    """Estimate the `Update` of `gpus` devices with `train_batch_size x gradient_accumulation_steps` images each.

    The all-reduce (4 bytes per parameter) overlaps with the backward pass of the last micro-batch. On CUDA the batch is
    prepared while the device computes, on a CPU before that.
    """
    of = {name: constant.value for name, constant in (DEVICES[device] | PROCESS).items()}
    rates = [of["half"]] * 2 if config.mixed_precision in DTYPES else [of["convolutions"], of["products"]]
    forward, backward = (
        sum(n / rate for n, rate in zip(part, rates)) * config.train_batch_size / of["efficiency"] for part in flops
    )
    micro_batch = max(forward + backward, operations * of["operation"])
    all_reduce = ring(4 * parameters, gpus, of[_wire(gpus)])
    waited_for = max(0.0, all_reduce - micro_batch * backward / (forward + backward))
    images = config.train_batch_size * config.gradient_accumulation_steps
    data = images * math.prod(shape) * (gpus * of["drawing"] + of["picking"])
    if config.streaming:
        data += images * of["decoding"] / max(1, config.dataloader_num_workers)
    compute = config.gradient_accumulation_steps * micro_batch
    total = compute + waited_for + data if device == "cpu" else max(compute + waited_for, data)
    return Update(compute, all_reduce, waited_for, data, total)


# ---------------------------------------------------------------- report


@checked({"gpus": integer(1), "device": one_of(*DEVICES), "num_images": optional(integer(1))})
def plan(config: TrainConfig, gpus: int = 1, device: str = "h100", num_images: int | None = None) -> list[str]:
    """Report the cost of a run on `gpus` devices, as lines. Numbers that are not counted are marked "estimate"."""
    if device == "cpu" and config.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use bf16 or no")
    batch, micros = config.train_batch_size, config.gradient_accumulation_steps
    precision = config.mixed_precision or "no"
    shape = image_shape(config)
    unet = network(config, shape)
    parameters, flops = sum(p.numel() for p in unet.parameters()), count_flops(unet, shape)
    sizes = sorted({max(1, batch // 2), batch, 2 * batch})
    counted = {n: count_memory(unet, shape, n, precision, config) for n in sizes}
    operations = counted[batch].operations
    update, alone = (time_of_update(config, shape, flops, operations, parameters, device, n) for n in (gpus, 1))
    forward, with_backward = sum(flops[0]) / 1e9, sum(map(sum, flops)) / 1e9
    images_an_update = batch * micros * gpus
    buckets = 4 * parameters if gpus > 1 else 0
    lines = [
        f"{config.config}: {gpus} x {device}, images of {'x'.join(map(str, shape))}, mixed_precision {precision}",
        f"parameters         {parameters / 1e6:.2f} M",
        f"FLOPs per image    forward {forward:.4g} G, with backward {with_backward:.4g} G; 2 per multiply-add",
        f"images per update  {images_an_update:,} = batch {batch} x {micros} micro-batches x {gpus} devices",
        f"memory at rest     {bytes_in_words(at_rest(unet, config) + buckets)} per device: "
        f"weights, {MOMENTS[config.optimizer]}, {'three EMAs' if config.post_hoc_ema else 'EMA weights'}"
        + (", buckets of the all-reduce" if buckets else ""),
        *(
            f"memory at batch    {n}: {bytes_in_words(memory.peak + buckets)}, of which activations "
            f"{bytes_in_words(memory.activations)}"
            for n, memory in counted.items()
        ),
        f"                   {CHECKED}",
    ]
    if "memory" in DEVICES[device]:
        few, many, room = min(counted), max(counted), DEVICES[device]["memory"].value - buckets
        an_image = (counted[many].peak - counted[few].peak) / (many - few)
        largest = max(0, math.floor(many + (room - counted[many].peak) / an_image))
        lines.append(f"largest batch      estimate: {largest:,} per device")
    unused = {"convolutions", "products"} if precision in DTYPES else {"half"}
    unused |= {"link", "network"} - ({_wire(gpus)} if gpus > 1 else set())
    constants = [(name, *c) for name, c in (DEVICES[device] | PROCESS).items() if name not in unused]
    speed, speedup = images_an_update / update.total, gpus * alone.total / update.total
    lines += [
        f"time per update    estimate: {_time(update.total)}, {speed:,.0f} images/s, {speedup:.3g} times one device",
        f"  compute          estimate: {_time(update.compute)}",
        f"  all-reduce       estimate: {_time(update.all_reduce)}, of which {_time(update.waited_for)} not overlapped",
        f"  data             estimate: {_time(update.data)}",
        *_run(config, update.total, images_an_update, num_images),
        "not included       checkpoints, samples, the held-out loss, the optimizer, the EMA, slow processes",
        *(f"  {name:<16} {value:.4g} {source}" for name, value, source in constants),
    ]
    return lines


def _run(config: TrainConfig, seconds: float, images_an_update: int, num_images: int | None) -> list[str]:
    known = _known(config)
    images = num_images or (known and known[1])
    lines = []
    if images and not config.streaming and known is not KNOWN[EMBEDDED_DIGITS]:
        decoding = images * PROCESS["decoding"].value / max(1, config.dataloader_num_workers)
        lines.append(f"decoding at start  estimate: {_time(decoding)}, in every process")
    if config.max_train_steps:
        updates, what = config.max_train_steps, "max_train_steps"
    elif images:
        updates = math.ceil(config.num_epochs * images / images_an_update)
        what = f"num_epochs {config.num_epochs} of {images:,} images"
    else:
        updates, what = math.ceil(MANY / images_an_update), f"{MANY:,} images; give --num_images for the whole run"
    return [*lines, f"time of the run    estimate: {_time(updates * seconds)}, {updates:,} updates: {what}"]


def bytes_in_words(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    return next((f"{seconds / unit:.3g} {name}" for name, unit in units if seconds >= unit), f"{1000 * seconds:.3g} ms")
