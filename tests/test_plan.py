import re
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import TINY_UNET, tiny_config

from ddpm_hf import DDPMCustomPipeline, DDPMUNet
from ddpm_hf.commands.main import main
from ddpm_hf.data.dataset import load_images
from ddpm_hf.training import train
from ddpm_hf.training.config import resolve
from ddpm_hf.training.plan import (
    DEVICES,
    KNOWN,
    PROCESS,
    at_rest,
    count_flops,
    count_memory,
    image_shape,
    network,
    plan,
    ring,
    time_of_update,
)
from ddpm_hf.training.recipes import listing

IMAGENET = str(Path(__file__).parent.parent / "benchmarks/imagenet-64.yaml")  # the script's network at 64x64


def made(**settings):
    config = resolve(settings)
    shape = image_shape(config)
    return network(config, shape), shape


@pytest.mark.parametrize(
    ("settings", "parameters", "forward", "train", "upsampled"),
    [
        ({"config": "explainingai-mnist"}, 10_188_081, 1.94, 5.82, ()),
        ({"config": "ddpm-cifar10"}, 35_746_307, 12.44, 37.3, ((256, 4), (256, 8), (256, 16))),
        ({"config": "labml-celeba", "channels": 3}, 167_767_235, 7.83, 23.5, ()),
        ({"config": IMAGENET}, 113_673_219, 31.0, 93.1, ((512, 2), (512, 4), (256, 8), (256, 16), (128, 32))),
    ],
)
def test_parameters_and_flops_of_known_networks(settings, parameters, forward, train, upsampled):
    """As were counted on the networks that ours are equal to (ddpm-cifar10: 12.1 without the products of attention).

    Ours has fewer where pixels are doubled before a convolution: 32 C^2 a pixel of the input in place of 72 C^2, and
    288 C^2 to make the kernel.
    """
    unet, shape = made(**settings)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    fewer = sum((40 * side**2 - 288) * channels**2 for channels, side in upsampled) / 1e9
    once, back = (sum(part) / 1e9 for part in count_flops(unet, shape))
    assert once == pytest.approx(forward - fewer, rel=3e-3)
    assert once + back == pytest.approx(train - 3 * fewer, rel=3e-3)


def test_flops_of_attention_are_those_of_its_products():
    """Two products of (HW x C) with (C x HW), 2 a multiply-add, whatever kernel a device has for them."""
    unet, shape = made(config="ddpm-cifar10")  # attention: 5 layers of 16x16 and one of 4x4, all 256 wide
    products = sum(4 * (side**2) ** 2 * 256 for side in (16, 16, 16, 16, 16, 4))
    linear = sum(2 * side**2 * 256 * 4 * 256 for side in (16, 16, 16, 16, 16, 4))
    time = 2 * (128 * 512 + 512 * 512)
    blocks = [m for m in unet.modules() if hasattr(m, "time_projection")]
    time += sum(2 * 512 * block.time_projection.out_features for block in blocks)
    kernels = 3 * 2 * 256**2 * 9 * 16  # of the three upsamplings
    assert count_flops(unet, shape)[0][1] == products + linear + time + kernels


def test_the_counts_are_those_of_the_real_network(tmp_path):
    """The fake network has the parameters of the one that training makes, for classes and a learned variance too."""
    settings = {"class_conditional": True, "learned_variance": True}
    run = train(tiny_config(tmp_path / "model", **settings))
    planned = network(run.config, image_shape(run.config))
    assert image_shape(run.config) == run.images.shape
    assert [(n, p.shape) for n, p in planned.named_parameters()] == [
        (n, p.shape) for n, p in run.unet.named_parameters()
    ]
    again = resolve({"config": "digits", "pretrained_model_name_or_path": str(tmp_path / "model"), **settings})
    loaded = network(again, image_shape(again))
    real = DDPMCustomPipeline.from_pretrained(tmp_path / "model").unet
    assert at_rest(loaded) == 4 * sum(p.nbytes for p in real.parameters())


def test_a_network_of_diffusers_that_is_trained_on_is_planned(tmp_path, capsys):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    planned = network(resolve({"config": "digits", "pretrained_model_name_or_path": str(tmp_path)}), (1, 8, 8))
    assert type(planned) is diffusers.UNet2DModel
    assert main(["plan", "--config", "digits", "--pretrained_model_name_or_path", str(tmp_path)]) == 0
    parameters = sum(p.numel() for p in unet.parameters())
    assert f"parameters         {parameters / 1e6:.2f} M" in capsys.readouterr().out


def test_the_embedded_digits_are_as_known():
    images, _ = load_images(resolve({}))
    shape, count, classes = KNOWN["digits"]
    assert (images.shape, len(images), len(images.label_names)) == (shape, count, classes)


def test_activations_are_what_autograd_keeps():
    """Of a real network, by its hooks: each storage once, and no weights."""
    unet, shape = made(config="mnist")
    real = DDPMUNet(**{k: v for k, v in unet.config.items() if not k.startswith("_")}).train()
    weights, saved = {p.untyped_storage().data_ptr() for p in real.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = 16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = real(torch.zeros(batch, *shape), torch.zeros(batch, dtype=torch.int64)).sample
        loss = output.square().mean()
    counted = count_memory(unet, shape, batch).activations
    assert loss.requires_grad
    assert counted == pytest.approx(sum(saved.values()), rel=0.02)


def test_memory_grows_with_the_batch_and_shrinks_with_half_precision_and_checkpointing():
    unet, shape = made(config="mnist")
    one, two = count_memory(unet, shape, 16), count_memory(unet, shape, 32)
    assert two.activations == pytest.approx(2 * one.activations, rel=1e-4)
    assert one.operations == two.operations
    assert one.peak >= at_rest(unet) + one.activations
    weights = sum(p.nbytes for p in unet.parameters())
    assert at_rest(unet) == 4 * weights
    assert one.peak >= at_rest(unet) + weights  # the gradients
    assert count_memory(unet, shape, 16) == one  # nothing is left behind
    assert count_memory(unet, shape, 16, "bf16").activations < 0.7 * one.activations
    flops = [sum(part) for part in count_flops(unet, shape)]
    unet.enable_gradient_checkpointing()
    checkpointed = count_memory(unet, shape, 16)
    assert checkpointed.activations < 0.2 * one.activations
    assert one.activations / 4 < checkpointed.peak - at_rest(unet) < one.peak - at_rest(unet)
    assert sum(count_flops(unet, shape)[1]) > flops[1] + 0.9 * flops[0]  # the forward again


def test_gradient_checkpointing_is_planned():
    settings = {"config": "mnist", "train_batch_size": 16}
    (plain, shape), (saving, _) = made(**settings), made(**settings, gradient_checkpointing=True)
    few, many = count_memory(saving, shape, 16), count_memory(plain, shape, 16)
    assert few.activations < 0.2 * many.activations
    assert few.peak < many.peak
    planned = ["\n".join(plan(resolve({**settings, "gradient_checkpointing": on}))) for on in (True, False)]
    sizes = [float(re.search(r"memory at batch +16: ([\d.]+) MiB", text)[1]) for text in planned]
    assert sizes == [pytest.approx(memory.peak / 2**20, abs=0.1) for memory in (few, many)]


def test_ring():
    assert ring(4e9, 1, 1e9) == 0
    assert ring(4e9, 2, 1e9) == 4
    assert ring(4e9, 4, 1e9) == 6  # three parts sent and summed, three sent on: 6 of 1e9 bytes
    assert ring(4e9, 10**9, 1e9) == pytest.approx(8)


def test_time_of_an_update():
    config = resolve({"config": "ddpm-cifar10", "train_batch_size": 10, "gradient_accumulation_steps": 3})
    of = {"shape": (3, 32, 32), "flops": ((2e9, 1e9), (4e9, 2e9)), "operations": 0, "parameters": 10**9}
    h100 = {name: constant.value for name, constant in DEVICES["h100"].items()}
    alone = time_of_update(config, **of, device="h100", gpus=1)
    seconds = 10 * (6e9 / h100["convolutions"] + 3e9 / h100["products"]) / h100["efficiency"]
    assert alone.compute == pytest.approx(3 * seconds)
    assert (alone.all_reduce, alone.waited_for) == (0, 0)
    drawing, picking = (PROCESS[name].value * 30 * 3072 for name in ("drawing", "picking"))
    assert alone.data == pytest.approx(drawing + picking)
    for gpus, wire in ((8, "link"), (16, "network")):
        many = time_of_update(config, **of, device="h100", gpus=gpus)
        assert many.compute == alone.compute
        assert many.all_reduce == pytest.approx(2 * (gpus - 1) / gpus * 4e9 / h100[wire])
        assert many.waited_for == pytest.approx(max(0, many.all_reduce - seconds * 2 / 3))
        assert many.data == pytest.approx(gpus * drawing + picking)
        assert many.total == max(many.compute + many.waited_for, many.data)
    on_cpu = time_of_update(config, **of, device="cpu", gpus=2)
    assert on_cpu.total == on_cpu.compute + on_cpu.waited_for + on_cpu.data
    slow = time_of_update(config, **{**of, "operations": 10**6}, device="h100", gpus=1)
    assert slow.compute == pytest.approx(3 * 10**6 * h100["operation"])
    half = resolve({**vars(config), "mixed_precision": "bf16"})
    half = time_of_update(half, **of, device="h100", gpus=1).compute
    assert half == pytest.approx(3 * 10 * 9e9 / h100["half"] / h100["efficiency"])


@pytest.mark.parametrize(
    ("settings", "gpus", "num_images", "run"),
    [
        ({}, 1, None, "1,800 updates: max_train_steps"),
        ({"num_epochs": 10, "train_batch_size": 100, "gradient_accumulation_steps": 2}, 3, None,
         "27 updates: num_epochs 10 of 1,617 images"),
        ({"num_epochs": 10, "train_batch_size": 100}, 2, 2001, "101 updates: num_epochs 10 of 2,001 images"),
        ({"num_epochs": 10, "train_data_dir": "my", "resolution": 8, "channels": 1, "train_batch_size": 100}, 2, None,
         "5,000 updates: 1,000,000 images; give --num_images for the whole run"),
    ],
)  # fmt: skip
def test_updates_are_counted_as_in_training(settings, gpus, num_images, run):
    lines = plan(resolve({"unet": TINY_UNET, **settings}), gpus, "cpu", num_images)
    assert run in next(line for line in lines if line.startswith("time of the run"))


def test_the_command(capsys):
    assert main(["plan", "--config", "digits", "--gpus", "16", "--train_batch_size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: 16 x h100, images of 1x8x8, mixed_precision no"
    assert lines[1].split() == ["parameters", "0.43", "M"]
    assert "128 = batch 8 x 1 micro-batches x 16 devices" in lines[3]
    first, last = (
        next(k for k, line in enumerate(lines) if line.startswith(w)) for w in ("largest", "time of the run")
    )
    assert all("estimate: " in line for line in lines[first : last + 1])
    constants = [line.split() for line in lines[last + 2 :]]
    assert [float(words[1]) > 0 for words in constants] == [True] * len(constants)
    assert [words[0] for words in constants if "data sheet" in " ".join(words)] == [
        "convolutions", "products", "network", "memory"]  # fmt: skip
    said = r"(?<!not )measured|data sheet|not measured, assumption|not measured here: what .* says"
    assert all(re.search(said, " ".join(words)) for words in constants)


@pytest.mark.parametrize(
    ("argv", "recipe"),
    [
        ([], "digits"),
        (["--train_data_dir", "my", "--resolution", "64", "--channels", "3"], "images-64"),
        (["--train_data_dir", "my", "--resolution", "28", "--channels", "1"], "mnist"),
        (["--dataset_name", "uoft-cs/cifar10"], "images-32"),
        (["--dataset_name", "uoft-cs/cifar10", "--resolution", "128"], "images-128"),
        (["--config", "cifar10", "--train_data_dir", "my", "--resolution", "64"], None),
    ],
)
def test_the_recipe_of_own_images_is_planned(capsys, argv, recipe):
    assert main(["plan", "--device", "cpu", *argv]) == (0 if recipe else 2)  # cifar10 leaves the channels open
    printed = capsys.readouterr()
    if recipe:
        assert printed.out.startswith(f"{recipe}: 1 x cpu, ")
        (told,) = re.findall(rf"^{recipe} .* ([\d.]+) M ", "\n".join(listing()), re.M)
        assert f"parameters         {told} M" in printed.out


def test_more_images_need_more_memory_than_there_is(capsys):
    """The largest batch is the one whose peak fills the device."""
    unet, shape = made(config="mnist")
    lines = plan(resolve({"config": "mnist"}), 1, "a100")
    largest = next(line for line in lines if line.startswith("largest"))
    largest = int(re.search(r"([\d,]+) per device", largest)[1].replace(",", ""))
    assert count_memory(unet, shape, largest).peak == pytest.approx(80e9, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config", "labml-celeba"],
            "channels=None: training takes it from the images, but plan reads none; give --channels",
        ),
        (["--train_data_dir", "my"], "resolution=None: training takes it from the images, but plan reads none"),
        (["--train_data_dir", "my", "--resolution", "64"], "channels=None: training takes it from the images"),
        (["--device", "tpu"], "device='tpu' must be one of cpu, a100, h100, h200"),
        (["--gpus", "0"], "gpus=0 must be an integer of at least 1"),
        (["--num_images", "0"], "num_images=0 must be an integer of at least 1, or None"),
        (["--gpu", "2"], "unknown flag '--gpu'"),
        (["--device", "cpu", "--mixed_precision", "fp16"], "mixed_precision='fp16' needs a CUDA device"),
        (["--unet", '{"width": 3}'], "unet: there is no setting 'width'"),
        (["--unet", '{"in_channels": 3}'], "unet has 3 input channels and the images have 1"),
        (
            ["--class_conditional", "true", "--train_data_dir", "my", "--resolution", "8", "--channels", "1"],
            "class_conditional=True: give the number of classes",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys, argv, message):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
