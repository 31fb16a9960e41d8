import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_UNET, tiny_unet
from sklearn.datasets import load_digits

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.main import main
from ddpm_hf.evaluation.legibility import digits_legibility
from ddpm_hf.utils.seeds import image_generators
from ddpm_hf.utils.signals import Stopped, StopSignals


class ConstantPipeline:
    """A pipeline that returns these images, with values in 0 ... 16, for any class."""

    def __init__(self, images, num_classes=None):
        self.images = images.reshape(-1, 8, 8, 1) / 16
        self.unet = SimpleNamespace(config={"num_classes": num_classes})

    def __call__(self, n, generators, steps, output_type, callback_on_step_end, **classes):
        assert (len(generators), steps, output_type) == (n, 5, "np")
        if self.unet.config["num_classes"]:
            assert classes.pop("guidance_scale") == 3
            assert list(classes.pop("class_labels")[:12]) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert not classes
        return SimpleNamespace(images=self.images[:n])


@pytest.mark.parametrize(
    ("images", "low", "high", "kinds"),
    [
        (load_digits().data, 0.9, 1.0, 10),
        (load_digits().data[load_digits().target == 3], 0.9, 1.0, 1),
        (np.random.default_rng(0).uniform(0, 16, (256, 64)), 0.0, 0.02, 0),
        (load_digits().data[:, np.random.default_rng(0).permutation(64)], 0.0, 0.02, 0),
    ],
)
def test_digits_are_recognised_and_noise_is_not(images, low, high, kinds):
    found = digits_legibility(ConstantPipeline(images), 5, seed=0, num_samples=150)
    assert low <= found.samples <= high
    assert found.kinds == kinds
    assert found.held_out > 0.9
    assert f"{found.samples:.1%} of 150 samples" in str(found)


@pytest.mark.parametrize("off", [0, 1])
def test_accuracy_of_classes(off):
    digits = load_digits()
    of = [np.flatnonzero(digits.target == (k + off) % 10)[k // 10] for k in range(150)]
    found = digits_legibility(ConstantPipeline(digits.data[of], 10), 5, seed=0, num_samples=150, guidance_scale=3)
    assert (found.accuracy > 0.97) if off == 0 else (found.accuracy < 0.03)
    assert f"{found.accuracy:.1%} of the samples to their class (guidance 3)" in str(found)


def test_samples_are_a_function_of_seed_and_number():
    """They are those of `ddpm-hf sample`."""
    seen = []

    def pipeline(n, generators, steps, output_type, callback_on_step_end):
        seen.append([generator.initial_seed() for generator in generators])
        return SimpleNamespace(images=np.zeros((n, 8, 8, 1)))

    pipeline.unet = SimpleNamespace(config={})
    for n in (10, 12):
        digits_legibility(pipeline, 5, seed=3, num_samples=n)
    assert seen == [[g.initial_seed() for g in image_generators(3, range(n))] for n in (10, 12)]


def test_a_signal_stops_between_steps():
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler())
    pipeline.set_progress_bar_config(disable=True)
    with StopSignals() as stop:
        stop.name = "SIGTERM"
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            digits_legibility(pipeline, 1000, seed=0, num_samples=2)


# ---------------------------------------------------------------- seeds


@pytest.mark.slow
def test_the_largest_seed_works_from_training_to_the_report(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    seed = str(2**63 - 1)
    flags = ["--unet", json.dumps(TINY_UNET), "--max_train_steps", "2", "--train_batch_size", "8", "--seed", seed]
    flags += ["--eval_batch_size", "4", "--ddpm_num_inference_steps", "2", "--output_dir", "run"]
    flags += ["--random_flip", "true", "--antithetic_timesteps", "true"]
    assert main(["train", "--config", "digits-classes", *flags]) == 0, capfd.readouterr().err
    assert "% of 256 samples with a probability above" in capfd.readouterr().out
    card = Path("run/README.md").read_text(encoding="utf-8")
    assert "legibility" in card
    assert seed in card
    sampling = ["sample", "run", "--num_images", "2", "--num_inference_steps", "2", "--class_labels", "3"]
    assert main([*sampling, "--seed", seed]) == 0
    evaluating = ["evaluate", "run", "--seed", seed, "--num_samples", "20", "--num_inference_steps", "2"]
    assert main([*evaluating, "--bpd_images", "2"]) == 0
    assert json.loads(Path("run/evaluation.json").read_text(encoding="utf-8"))["protocol"]["seed"] == int(seed)


SEEDING = ("manual_seed", "manual_seed_all", "seed", "set_seed", "default_rng", "RandomState", "SeedSequence",
           "Generator", "stream_seed", "seeded_generator", "image_generators")  # fmt: skip


def arithmetic_on_seeds(code: str) -> list[int]:
    """Lines with arithmetic in the argument that seeds a generator, or on a name that contains "seed"."""

    def name_of(node) -> str:
        return getattr(node, "id", getattr(node, "attr", ""))

    def computed(node) -> list[ast.BinOp]:
        operations = [n for n in ast.walk(node) if isinstance(n, ast.BinOp | ast.AugAssign)]
        return [n for n in operations if any(isinstance(m, ast.Name | ast.Attribute) for m in ast.walk(n))]

    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            arguments = [word.value for word in node.keywords if word.arg in ("seed", "random_state")]
            if name_of(node.func) in SEEDING:
                arguments += node.args[:1]  # the other arguments are numbers of images or of steps
            inner = [a for a in arguments if not (isinstance(a, ast.Call) and name_of(a.func) in SEEDING)]
            found += [n.lineno for argument in inner for n in computed(argument)]
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            operands = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            found += [node.lineno for operand in operands if "seed" in name_of(operand).lower()]
    return sorted(set(found))


@pytest.mark.parametrize("code", [
    "torch.Generator().manual_seed(seed * n + k)", "torch.manual_seed(int(a.b + 1))", "seeded_generator(s + k, 'x', 0)",
    "data.shuffle(seed=s % 2**32)", "SVC(random_state=s % m)", "number = config.seed * 1000 + k", "seed += 1",
])  # fmt: skip
def test_arithmetic_on_seeds_is_found(code):
    assert arithmetic_on_seeds(code) == [1]


@pytest.mark.parametrize("code", [
    "torch.manual_seed(stream_seed(config.seed, 'dropout', step * n + k))", "0 <= seed < 2**63", "f'{seed}' + text",
    "torch.Generator().manual_seed(torch.randint(2**62, ()).item())", "image_generators(seed, range(k, k + n))",
])  # fmt: skip
def test_arithmetic_on_other_numbers_is_allowed(code):
    assert arithmetic_on_seeds(code) == []


def test_only_the_seeds_module_computes_seeds():
    """Sums and products leave the range of seeds, and collide between purposes."""
    root = Path(__file__).parents[1]
    files = [file for folder in ("ddpm_hf", "examples", "benchmarks") for file in (root / folder).rglob("*.py")]
    assert len(files) > 40
    lines = {file: arithmetic_on_seeds(file.read_text(encoding="utf-8")) for file in files if file.name != "seeds.py"}
    assert not {file: found for file, found in lines.items() if found}
