"""One contestant of `benchmarks/speed.py` in a process of its own; it is told what to do a line of JSON at a time.

`{"do": "make", ...}` builds what is to be timed; `{"do": "run", "times": n}` does it n times and says how many seconds
each took; `{"do": "peak"}` says how many MiB it has taken at most (on a CPU: by how many the process has grown);
`{"do": "output", "path": ...}` keeps what the network predicts of a fixed input.

Contestants: `ours`; `diffusers` (`UNet2DModel` with the same weights, `DDPMScheduler`, `DDPMPipeline`, `EMAModel`, used
as its train_unconditional.py uses them, with the moving average on); `tutorial` (our own network and weights computed
as the network's tutorial does: ExplainingAI's attention is torch's `nn.MultiheadAttention` and its scheduler brings its
tables to the device at each use; labml's attention is two einsums around a softmax, its SiLU a product with a sigmoid,
and its tables are gathered at each use; both have Adam, no clipping and no average, and the loss is looked at after
each update); `lucidrains` (denoising-diffusion-pytorch with a network of its own; if there is no torchvision, with an
empty stand-in for the transforms that it imports).
"""

import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {  # what diffusers can express too
    "skip_connections": "layer", "stem_channels": 32, "block_out_channels": [32, 64, 128],
    "attention": [False, False, True], "layers_per_block": 1, "mid_block_out_channels": [128],
    "mid_layers_per_block": 1, "up_block_out_channels": [128, 64, 32], "downsample_kernel_size": 3,
    "upsample_type": "nearest", "project_every_shortcut": False, "attention_head_dim": 8, "time_sinusoid_dim": 32,
    "time_embedding_dim": 128, "norm_num_groups": 32,
}  # fmt: skip
NETWORKS = {  # recipe, or settings of DDPMUNet; (C, H, W)
    "small": (SMALL, (1, 28, 28)),
    "explainingai": ("explainingai-mnist", (1, 28, 28)),
    "labml": ("labml-celeba", (3, 32, 32)),
    "digits": ("digits", (1, 8, 8)),
    "ddpm-cifar10": ("ddpm-cifar10", (3, 32, 32)),
    "script": (str(Path(__file__).parent / "imagenet-64.yaml"), (3, 64, 64)),
    "lucidrains": (None, (3, 32, 32)),
}


def our_network(name: str):
    from ddpm_hf import DDPMUNet
    from ddpm_hf.training.config import load_recipe

    settings, (channels, height, _) = NETWORKS[name]
    settings = settings if isinstance(settings, dict) else load_recipe(settings).get("unet", {})
    torch.manual_seed(0)
    return DDPMUNet(**{"sample_size": height, "in_channels": channels, **settings}).to(DEVICE)


def make_network(contestant: str, name: str) -> nn.Module:
    if contestant == "lucidrains":
        return lucidrains_network()
    network = our_network(name)
    if contestant.startswith("diffusers"):
        from ddpm_hf.convert.unet2d import to_diffusers

        return to_diffusers(network).to(DEVICE)
    return as_in_tutorial(network, name) if contestant == "tutorial" else network


# ---------------------------------------------------------------- the tutorials' way


def as_in_tutorial(network: nn.Module, name: str) -> nn.Module:
    return _labml_attention(_swish(network)) if name == "labml" else _tutorial_attention(network)


def _tutorial_attention(network):
    """By torch's module, which returns its weights, with the parameters of ours."""
    from ddpm_hf.models.unet import SelfAttention

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x.reshape(B, C, H * W)).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return x + mixed.transpose(1, 2).reshape(B, C, H, W)

    for module in [m for m in network.modules() if isinstance(m, SelfAttention)]:
        attention = nn.MultiheadAttention(module.to_out.in_features, module.num_heads, batch_first=True)
        attention.in_proj_weight, attention.in_proj_bias = module.to_qkv.weight, module.to_qkv.bias
        attention.out_proj.weight, attention.out_proj.bias = module.to_out.weight, module.to_out.bias
        module.attention = attention
        module.forward = types.MethodType(forward, module)
    return network


def _labml_attention(network):
    """By einsums, which make the weights as (B, i, j, heads)."""
    from ddpm_hf.models.unet import SelfAttention

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).view(B, C, -1).permute(0, 2, 1)
        q, k, v = self.to_qkv(tokens).view(B, H * W, 3, self.num_heads, -1).unbind(2)
        weights = (torch.einsum("bihd,bjhd->bijh", q, k) * q.shape[-1] ** -0.5).softmax(dim=2)
        mixed = torch.einsum("bijh,bjhd->bihd", weights, v).reshape(B, -1, C)
        return x + self.to_out(mixed).permute(0, 2, 1).view(B, C, H, W)

    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.forward = types.MethodType(forward, module)
    return network


def _swish(network):
    from ddpm_hf.models import unet

    unet.F = types.SimpleNamespace(**vars(F) | {"silu": lambda x: x * torch.sigmoid(x)})  # in this process
    return network


class ExplainingAIScheduler:
    """Tables that are brought to the device and into shape at each use."""

    def __init__(self):
        self.betas = torch.linspace(1e-4, 0.02, 1000)
        self.alphas = 1 - self.betas
        self.abar = torch.cumprod(self.alphas, dim=0)
        self.signal, self.sigma = self.abar.sqrt(), (1 - self.abar).sqrt()

    def add_noise(self, original, noise, t):
        signal, sigma = (table.to(original.device)[t].reshape(len(original)) for table in (self.signal, self.sigma))
        for _ in range(original.ndim - 1):
            signal, sigma = signal.unsqueeze(-1), sigma.unsqueeze(-1)
        return signal.to(original.device) * original + sigma.to(original.device) * noise

    def step(self, network, xt, i):
        predicted = network(xt, torch.as_tensor(i).unsqueeze(0).to(DEVICE))
        t = torch.as_tensor(i).to(DEVICE)
        x0 = (xt - self.sigma.to(xt.device)[t] * predicted) / torch.sqrt(self.abar.to(xt.device)[t])
        x0 = torch.clamp(x0, -1.0, 1.0)
        mean = xt - self.betas.to(xt.device)[t] * predicted / self.sigma.to(xt.device)[t]
        mean = mean / torch.sqrt(self.alphas.to(xt.device)[t])
        if t == 0:
            return mean
        variance = (1 - self.abar.to(xt.device)[t - 1]) / (1.0 - self.abar.to(xt.device)[t])
        sigma = (variance * self.betas.to(xt.device)[t]) ** 0.5
        return mean + sigma * torch.randn(xt.shape).to(xt.device)


class LabmlScheduler:
    """Tables that are on the device; of them is gathered, and what else is needed is computed, at each use."""

    def __init__(self):
        self.beta = torch.linspace(1e-4, 0.02, 1000).to(DEVICE)
        self.alpha = 1 - self.beta
        self.abar = torch.cumprod(self.alpha, dim=0)

    def add_noise(self, original, noise, t):
        mean, variance = self._of(self.abar, t) ** 0.5 * original, 1 - self._of(self.abar, t)
        return mean + variance**0.5 * noise

    def step(self, network, xt, i):
        t = xt.new_full((len(xt),), i, dtype=torch.long)
        predicted = network(xt, t)
        alpha, abar = self._of(self.alpha, t), self._of(self.abar, t)
        mean = (xt - (1 - alpha) / (1 - abar) ** 0.5 * predicted) * (1 / alpha**0.5)
        return mean + self._of(self.beta, t) ** 0.5 * torch.randn(xt.shape, device=DEVICE)

    @staticmethod
    def _of(table, t):
        return table.gather(-1, t).reshape(-1, 1, 1, 1)


# ---------------------------------------------------------------- what is timed


def work(contestant: str, name: str, what: str, batch: int, dtype: str, variant: str | None) -> Callable[[], None]:
    if what == "data":
        return their_data(batch) if contestant == "diffusers" else our_data(batch)
    if what in ("scheduler step", "add_noise"):
        return scheduler_work(contestant, what, batch)
    network = make_network(contestant, name)
    if what == "EMA":
        return average(contestant, network)
    if contestant == "lucidrains":
        return lucidrains(network, what, batch)
    if what == "train":
        return train(contestant, network, name, batch, dtype, variant)
    return sample(contestant, network.eval().to(DTYPES[dtype]), name, what, batch, dtype, variant)


def tutorial_scheduler(name: str):
    return LabmlScheduler() if name == "labml" else ExplainingAIScheduler()


def train(contestant, network, name, batch, dtype, variant) -> Callable[[], None]:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    from ddpm_hf import LinearNoiseScheduler
    from ddpm_hf.training import Batch, DenoisingLoss
    from ddpm_hf.training.ema import EMA

    network = CHANGES[variant](network.train()) if variant in CHANGES else network.train()
    ours, shape = contestant == "ours", NETWORKS[name][1]
    x, z = torch.randn(batch, *shape, device=DEVICE), torch.randn(batch, *shape, device=DEVICE)
    t, objective = torch.randint(1000, (batch,)).to(DEVICE), DenoisingLoss()
    parameters = list(network.parameters())
    if contestant == "tutorial":
        optimizer, scheduler, criterion = torch.optim.Adam(parameters, 1e-4), tutorial_scheduler(name), nn.MSELoss()
    else:
        fused = {"fused": True} if ours and variant != "AdamW as torch has it by default" else {}
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, **fused)
        scheduler = LinearNoiseScheduler() if ours else DDPMScheduler()
        ours_average = ours and variant != "diffusers' moving average"
        average = EMA(network, 0.9999) if ours_average else EMAModel(
            parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
            model_cls=type(network), model_config=network.config,
        )  # fmt: skip
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=True)
    applied = torch.tensor(True, device=DEVICE) if DEVICE == "cuda" else True  # as our loop has it there
    parts = list(zip(*(each.chunk(4 if variant == IN_PARTS else 1) for each in (x, z, t)), strict=True))
    updates = 0

    def step():
        nonlocal updates
        updates += 1
        if contestant == "tutorial":
            optimizer.zero_grad()
            noisy = scheduler.add_noise(x, z, t)
            with autocast:
                prediction = network(noisy, t).sample
            loss = criterion(prediction.float(), z)
            loss.item()
            loss.backward()
            optimizer.step()
            return
        for x_, z_, t_ in parts:
            if ours:
                with autocast:
                    loss = objective(network, scheduler, Batch(x_, z_, (t_ + 0.5).double() / 1000)).loss.mean()
            else:
                noisy = scheduler.add_noise(x_, z_, t_)
                with autocast:
                    loss = F.mse_loss(network(noisy, t_).sample.float(), z_)
            (loss / len(parts)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ours_average:
            average.update(network, updates, applied)
        else:
            average.step(parameters)

    return step


def sample(contestant, network, name, what, batch, dtype, variant) -> Callable[[], None]:
    from diffusers import DDPMPipeline, DDPMScheduler

    from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler

    C, size = network.config.in_channels, network.config.sample_size
    x, generator = torch.randn(batch, C, size, size, device=DEVICE), torch.Generator().manual_seed(0)
    if contestant == "tutorial":
        scheduler = tutorial_scheduler(name)

        @torch.no_grad()
        def walk(timesteps, x=x):
            for i in timesteps:
                x = scheduler.step(lambda x, t: network(x.to(DTYPES[dtype]), t).sample.float(), x, i)

        return (lambda: walk([500])) if what == "step" else (lambda: walk(range(980, -1, -20)))
    ours = contestant == "ours"
    network = CHANGES[variant](network) if variant in CHANGES else network
    pipe = (DDPMCustomPipeline if ours else DDPMPipeline)(network, (LinearNoiseScheduler if ours else DDPMScheduler)())
    pipe.set_progress_bar_config(disable=True)
    if what == "sample":
        return lambda: pipe(batch_size=batch, generator=generator, num_inference_steps=50, output_type="np")
    scheduler = pipe.scheduler
    scheduler.set_timesteps(50)
    if ours:

        @torch.no_grad()
        def step():
            output = network(x.to(DTYPES[dtype]), scheduler.timesteps[25]).sample.float()
            scheduler.step(output, scheduler.timesteps[25], x, generator=generator)

        return step

    @torch.no_grad()
    def step():
        output = network(x.to(DTYPES[dtype]), scheduler.timesteps[25]).sample
        scheduler.step(output, scheduler.timesteps[25], x.to(DTYPES[dtype]), generator=generator)

    return step


def scheduler_work(contestant, what, batch) -> Callable[[], None]:
    from diffusers import DDPMScheduler

    from ddpm_hf import LinearNoiseScheduler

    scheduler = LinearNoiseScheduler() if contestant == "ours" else DDPMScheduler()
    x, z = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randn(batch, 3, 32, 32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    if what == "add_noise":
        t = torch.randint(1000, (batch,)).to(DEVICE)
        return lambda: scheduler.add_noise(x, z, t)
    scheduler.set_timesteps(1000, device=DEVICE)
    t = scheduler.timesteps[500]
    return torch.no_grad()(lambda: scheduler.step(z, t, x, generator=generator))


def average(contestant, network) -> Callable[[], None]:
    if contestant == "ours":
        from ddpm_hf.training.ema import EMA

        ema = EMA(network, 0.9999)
        return lambda: ema.update(network, 1000)
    from diffusers.training_utils import EMAModel

    parameters = list(network.parameters())
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                   foreach=contestant == "diffusers, foreach")  # fmt: skip
    return lambda: ema.step(parameters)


# ---------------------------------------------------------------- data: PNG files of 32x32x3 in a `datasets.Dataset`


def png_files(n: int = 2048) -> list[bytes]:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    random, files = np.random.default_rng(0), []
    for coarse in random.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8):
        image = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)).astype(np.int16)
        image = (image + random.integers(-8, 9, image.shape)).clip(0, 255).astype(np.uint8)
        file = BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    return files


def our_data(batch: int) -> Callable[[], None]:
    """Decoded once, before; then what the training loop does for an update."""
    from ddpm_hf.data.config import DataConfig
    from ddpm_hf.data.dataset import collect
    from ddpm_hf.data.decoding import Decoder
    from ddpm_hf.data.sources import Item
    from ddpm_hf.training.batch import flip_

    items = [Item(str(k), source, None) for k, source in enumerate(png_files())]
    config = DataConfig(cache_dir=tempfile.mkdtemp())
    images, step = collect(items, Decoder(3, None), config, None)[0], 0
    rows = torch.arange(batch)

    def run():
        nonlocal step
        pixels, _ = images.batch_for_step(0, step, batch, rows)
        flip_(pixels, torch.rand(batch) < 0.5, 3)
        pixels.to(DEVICE)
        step += 1

    return run


def their_data(batch: int) -> Callable[[], None]:
    """What the script does, without torchvision: its transforms' arithmetic by PIL and numpy, in a `DataLoader`."""
    import datasets
    import numpy as np
    from torch.utils.data import DataLoader

    files = png_files()
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": f, "path": None} for f in files]})
    dataset = dataset.cast_column("image", datasets.Image())

    def transform(examples):
        tensors = []
        for image in examples["image"]:
            pixels = np.array(image.convert("RGB"))  # Resize and CenterCrop give back what has their size
            pixels = pixels[:, ::-1] if torch.rand(1) < 0.5 else pixels
            tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div(255)
            tensors.append(tensor.sub_(0.5).div_(0.5))
        return {"input": tensors}

    dataset.set_transform(transform)

    def batches():
        while True:
            yield from DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)

    batches = batches()
    return lambda: next(batches)["input"].to(DEVICE)


# ---------------------------------------------------------------- lucidrains


def lucidrains_network():
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        torchvision = types.ModuleType("torchvision")
        for name in ("transforms", "utils"):
            setattr(torchvision, name, types.ModuleType(f"torchvision.{name}"))
        sys.modules["torchvision"] = torchvision
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(0)
    unet = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=DEVICE == "cuda")
    return GaussianDiffusion(unet, image_size=32, timesteps=1000).to(DEVICE)


def lucidrains(diffusion, what, batch) -> Callable[[], None]:
    """Its `Trainer`'s update and its sampler's step."""
    from ema_pytorch import EMA

    x = torch.rand(batch, 3, 32, 32, device=DEVICE)
    if what == "step":
        return torch.no_grad()(lambda: diffusion.p_sample(x, 500))
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def step():
        loss = diffusion(x)
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


# ---------------------------------------------------------------- ours, changed in one place


def _pixels_doubled(network):
    from ddpm_hf.models.unet import NearestUpsample

    def forward(self, x):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)

    for module in network.modules():
        if isinstance(module, NearestUpsample):
            module.forward = types.MethodType(forward, module)
    return network


def _channels_last(network):
    def innermost(_, args):
        return args[0].contiguous(memory_format=torch.channels_last), *args[1:]

    network.register_forward_pre_hook(innermost)
    return network


def _weights_channels_last(network):
    return _channels_last(network).to(memory_format=torch.channels_last)


def _one_time_product(network):
    """All time projections as one layer."""
    from ddpm_hf.models.unet import ResidualBlock

    class Part(nn.Module):
        def forward(self, time):
            return self.part

    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    linears, parts = [block.time_projection for block in blocks], [Part() for _ in blocks]
    for block, part in zip(blocks, parts, strict=True):
        block.time_projection = part
    embedding, network.time_projections = network.time_embedding.forward, nn.Linear(1, 1)
    for name in ("weight", "bias"):
        together = torch.cat([getattr(linear, name).detach() for linear in linears])
        setattr(network.time_projections, name, nn.Parameter(together))

    def forward(timesteps):
        time = embedding(timesteps)
        values = network.time_projections(F.silu(time)).split([linear.out_features for linear in linears], dim=1)
        for part, value in zip(parts, values, strict=True):
            part.part = value
        return time

    network.time_embedding.forward = forward
    return network


def _compiled(network):
    network.compile()
    return network


def _checkpointed(network):
    network.enable_gradient_checkpointing()
    return network


IN_PARTS = "batch in four parts"
CHANGES = {
    "gradient checkpointing": _checkpointed,
    "attention of the tutorials": _tutorial_attention,
    "pixels doubled, then convolved": _pixels_doubled,
    "channels innermost": _channels_last,
    "channels innermost, of weights too": _weights_channels_last,
    "one product for all time projections": _one_time_product,
    "torch.compile": _compiled,
}


# ---------------------------------------------------------------- the conversation


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def status(field: str) -> int:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) // 1024


def import_all(contestant: str) -> None:
    """Before memory is looked at: libraries are not what is compared."""
    if contestant == "lucidrains":
        lucidrains_network()
    else:
        for module in ("diffusers.pipelines.ddpm", "diffusers.training_utils", "ddpm_hf.convert.unet2d"):
            importlib.import_module(module)
        importlib.import_module("ddpm_hf.training")


def forget_peak() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew (proc(5))


def peak(before: int) -> int:
    """MiB since then, at most: of the device, or on the CPU of this process."""
    return torch.cuda.max_memory_allocated() // 2**20 if DEVICE == "cuda" else status("VmHWM") - before


@torch.no_grad()
def keep_output(contestant: str, name: str, path: str) -> None:
    network, (C, H, W) = make_network(contestant, name).eval(), NETWORKS[name][1]
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, C, H, W, generator=generator), torch.tensor([0, 10, 500, 999])
    torch.save(network(x.to(DEVICE), t.to(DEVICE)).sample.cpu(), path)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    this, before = None, 0
    for line in sys.stdin:
        message = json.loads(line)
        reply = {}
        try:
            if message["do"] == "make":
                message.pop("do")
                import_all(message["contestant"])
                if message.pop("malloc"):
                    from ddpm_hf.utils.memory import keep_freed_memory

                    keep_freed_memory()
                before = status("VmRSS")
                this = work(**message)
                forget_peak()  # to build theirs takes ours as well
            elif message["do"] == "peak":
                reply = {"peak": peak(before)}
            elif message["do"] == "run":
                if message["warm"]:  # another process had the caches
                    this()
                began = time.perf_counter()
                for _ in range(message["times"]):
                    this()
                synchronize()
                reply = {"seconds": (time.perf_counter() - began) / message["times"]}
            else:
                keep_output(message["contestant"], message["name"], message["path"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    os._exit(0)  # to take networks and libraries apart takes seconds


if __name__ == "__main__":
    main()
