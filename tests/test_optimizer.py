"""Muon against its formula; resuming and several processes with each optimizer."""

import math
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import calls, tiny_config, tiny_unet
from safetensors.torch import load_file
from test_training import finish, quietly, script, weights
from torch import nn
from torch.testing import assert_close

from ddpm_hf.hub.cards import model_card
from ddpm_hf.training import train
from ddpm_hf.training.facts import facts_of
from ddpm_hf.training.optimizer import COEFFICIENTS, ITERATIONS, build_optimizer, matrices, orthogonal
from ddpm_hf.training.plan import at_rest, image_shape
from ddpm_hf.training.plan import network as planned

MUON = {"optimizer": "muon", "muon_learning_rate": 8e-3}
SETTINGS = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}
SETTINGS |= {"adam_weight_decay": 0.0, **MUON}


def by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """The polynomial of Newton and Schulz, of the singular values."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (6, 6)])
def test_a_matrix_becomes_almost_orthogonal_and_keeps_its_singular_vectors(shape):
    batch = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    batch[1] *= 1e-6
    made = orthogonal(batch)
    for matrix, each in zip(batch, made, strict=True):
        assert_close(each.double(), by_svd(matrix), rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(each)
        assert 0.68 < values.min() <= values.max() < 1.21
    assert not orthogonal(torch.zeros(1, 3, 4)).any()


class Layers(nn.Module):
    """One of each kind of weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv_out = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)
        self.convolution, self.transposed = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 3, 2)
        self.same, self.linear = nn.Conv2d(4, 6, 3), nn.Linear(5, 8)
        self.norm, self.embedding = nn.GroupNorm(2, 4), nn.Embedding(3, 5)


def give_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_its_formula_for_matrices_and_adamw_for_the_rest(decay):
    layers, same = Layers(), Layers()
    config = SimpleNamespace(**{**SETTINGS, "adam_weight_decay": decay})
    muon, adam = (build_optimizer(SimpleNamespace(**{**vars(config), "optimizer": name}), each)
                  for name, each in (("muon", layers), ("adamw", same)))  # fmt: skip
    names = ("convolution", "transposed", "same", "linear")
    expected = {name: layers.get_submodule(name).weight.detach().double() for name in names}
    means = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step, rate in enumerate((1e-3, 4e-4, 7e-4)):
        for network, optimizer in ((layers, muon), (same, adam)):
            give_gradients(network, step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
        for name, weight in expected.items():
            gradient = layers.get_submodule(name).weight.grad.double()
            means[name] = 0.95 * means[name] + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * means[name]
            ahead = ahead.transpose(0, 1) if name == "transposed" else ahead
            moved = by_svd(ahead.flatten(1)) * 0.2 * math.sqrt(max(len(ahead), ahead[0].numel()))
            moved = moved.view(ahead.shape)
            moved = moved.transpose(0, 1) if name == "transposed" else moved
            expected[name] = (1 - 8 * rate * decay) * weight - 8 * rate * moved
    for name, weight in expected.items():
        assert_close(layers.get_submodule(name).weight.double(), weight, rtol=0, atol=1e-6)
    for name, parameter in layers.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert_close(parameter, same.get_parameter(name), rtol=0, atol=0)
            moments = [optimizer.state[p] for optimizer, p in ((muon, parameter), (adam, same.get_parameter(name)))]
            assert_close(moments[0], moments[1], rtol=0, atol=0)


def test_muon_is_for_the_weights_between_the_first_and_the_last_convolution():
    ours = tiny_unet(num_classes=3, time_table_size=10)
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )  # fmt: skip
    left = r"(stem|conv_in|conv_out|class_embedding|time_embedding\.table)\."
    for network, transposed in ((ours, {"up.1.upsample.weight"}), (theirs, set())):
        first, second = matrices(network)
        assert len({*first, *second}) == len(first) + len(second)
        names = {parameter: name for name, parameter in network.named_parameters()}
        assert {names[p] for p in second} == transposed
        many = {name for name, p in network.named_parameters() if p.ndim > 1}
        assert {names[p] for p in (*first, *second)} == {name for name in many if not re.match(left, name)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scaler_of_gradients_tells_muon_what_to_leave_out(value):
    """As float16 does, which needs CUDA."""
    layers, scaler = Layers(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = build_optimizer(SimpleNamespace(**SETTINGS), layers)
    scaler.scale(torch.ones(()))  # makes its numbers

    def step(poison):
        give_gradients(layers, 0)
        for parameter in layers.parameters():
            parameter.grad *= scaler.get_scale()
        if poison:
            layers.linear.weight.grad[0, 0] = value
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return [t.clone() for p in layers.parameters() for t in (p.detach(), *optimizer.state[p].values())]

    before = step(False)
    assert_close(step(True), before, rtol=0, atol=0)
    assert scaler.get_scale() == 4.0
    assert not any(torch.equal(a, b) for a, b in zip(before, step(False), strict=True))


def test_the_planned_memory_is_what_muon_keeps(tmp_path):
    run = train(tiny_config(tmp_path, **MUON))
    state = load_file(tmp_path / "checkpoint-4/optimizer.safetensors")
    assert {name.split("/")[0] for name in state} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    kept = sum(t.nbytes for name, t in state.items() if not name.startswith("step/"))
    assert (
        at_rest(planned(run.config, image_shape(run.config)), run.config)
        == 2 * sum(p.nbytes for p in run.unet.parameters()) + kept
    )


# ---------------------------------------------------------------- whole runs

FLOW = {"objective": "flow", "noise_assignment": True, "class_conditional": True, "lr_scheduler": "wsd"}
WAYS = {
    "assigned": FLOW,
    "muon": {**MUON, "adam_weight_decay": 0.01},
    "power-function": {"ema_sigma_rel": 0.1},
    "post-hoc": {"post_hoc_ema": True, "post_hoc_ema_limit": 2, **MUON},
}
each_way = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)


class Dies(Exception):  # noqa: N818
    """Ends a run as a signal does that nobody can catch."""


def die(run):
    raise Dies


@each_way
def test_a_resumed_run_ends_with_the_same_bytes_each_way(tmp_path, settings):
    settings = settings | {"max_train_steps": 9, "checkpointing_steps": 4, "gradient_accumulation_steps": 2}
    train(tiny_config(tmp_path / "whole", **settings))
    with pytest.raises(Dies):
        train(tiny_config(tmp_path / "again", **settings), callbacks=[calls(on_save=die)])
    assert train(tiny_config(tmp_path / "again", **settings, resume_from_checkpoint="latest")).finished
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert len(files) >= 8
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert quietly(tmp_path / "again") == quietly(tmp_path / "whole")


@pytest.mark.slow
@each_way
def test_two_processes_do_what_one_does_each_way(tmp_path, settings):
    settings = settings | {"max_train_steps": 50}
    train(tiny_config(tmp_path / "one", train_batch_size=8, gradient_accumulation_steps=2, **settings))
    finish(script(tmp_path, tmp_path / "two", train_batch_size=8, **settings), 2)
    one, two = (quietly(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [10, 20, 30, 40, 50]
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
    assert abs(one[-1]["held_out_loss"] - two[-1]["held_out_loss"]) < 1e-5
    assert one[-1]["loss"] < one[0]["loss"]
    for name in ("ema", "post_hoc") if "post_hoc_ema" in settings else ("ema",):
        a, b = (load_file(tmp_path / of / f"checkpoint-50/{name}.safetensors") for of in ("one", "two"))
        assert_close(a, b, rtol=0, atol=1e-3)


def test_a_run_does_not_resume_with_another_optimizer(tmp_path):
    train(tiny_config(tmp_path / "run", **MUON))
    again = {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"optimizer='adamw', and the checkpoint's run had optimizer='muon', whose"):
        train(tiny_config(tmp_path / "run", **again))
    tuned = {"unet": {}, "pretrained_model_name_or_path": str(tmp_path / "run")}
    train(tiny_config(tmp_path / "tuned", **tuned, optimizer="adamw", learning_rate=1e-5))
    for name, weight in weights(tmp_path / "tuned").items():
        assert (weight - weights(tmp_path / "run")[name]).abs().max() < 1e-4


def test_a_checkpoint_before_the_decay_goes_on_to_a_longer_run(tmp_path):
    settings = {"lr_scheduler": "wsd", "lr_decay_share": 0.5, "checkpointing_steps": 4}
    train(tiny_config(tmp_path / "short", max_train_steps=8, **settings))
    before = {"resume_from_checkpoint": str(tmp_path / "short/checkpoint-4")}
    train(tiny_config(tmp_path / "longer", max_train_steps=12, **settings, **before))
    train(tiny_config(tmp_path / "planned", max_train_steps=12, **settings))
    for variant in (None, "raw"):
        assert_close(weights(tmp_path / "longer", variant), weights(tmp_path / "planned", variant), rtol=0, atol=0)


def test_the_card_names_the_optimizer(tmp_path):
    run = train(tiny_config(tmp_path / "run", **MUON))
    facts = facts_of(run, {})
    card = str(model_card(run.pipeline, facts, tmp_path / "run"))
    assert "images seen |\n| optimizer | Muon and AdamW |\n| seed | 0 |\n" in card
    del facts["training"]["optimizer"]  # of an earlier version
    assert "images seen |\n| seed | 0 |\n" in str(model_card(run.pipeline, facts, tmp_path / "run"))
