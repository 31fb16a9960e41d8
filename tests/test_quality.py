"""benchmarks/quality.py: what it can get wrong before it has trained anything."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from ddpm_hf.training.config import resolve

spec = importlib.util.spec_from_file_location("quality", Path(__file__).parents[1] / "benchmarks/quality.py")
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)

KEYS = ("frechet", "frechet_stderr", "kid", "kid_stderr")


def compute(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.parametrize("recipe", ["digits", "mnist"])
def test_the_networks_have_as_many_parameters(recipe):
    ours, theirs = quality.parameters(recipe)
    assert 0.9 <= theirs / ours <= 1.1


def test_the_clock_counts_what_is_computed_and_neither_waiting_nor_what_it_is_stopped_for():
    clock = quality.Clock()
    compute(0.1)
    time.sleep(0.3)
    with clock.stopped():
        compute(0.3)
    assert 0.1 <= clock() < 0.25


def test_weights_are_kept_once_a_mark_and_the_budget_ends_the_run(tmp_path):
    record, seconds = quality.Record(tmp_path, [1.0, 2.0, 3.0]), iter([0.5, 2.5, 2.75, 3.25])
    record.clock = type("Clock", (quality.Clock,), {"__call__": lambda self: next(seconds)})()
    for update in (1, 2, 3):
        record(update, lambda: {"w": torch.ones(1)})
    with pytest.raises(quality.BudgetSpent):
        record(4, lambda: {"w": torch.ones(1)})
    assert [path.stem for path in sorted(tmp_path.iterdir())] == ["000002", "000004"]
    with safe_open(tmp_path / "000002.safetensors", "pt") as file:
        assert file.metadata() == {"update": "2", "seconds": "2.50"}


def test_their_loop_averages_the_weights_that_it_trains_at_the_rate_that_the_clock_says():
    torch.manual_seed(0)
    network = quality.their_network("digits")
    settings = quality.their_settings(quality.MIXED, resolve({"config": "digits"})) | {"batch": 4, "warmup": 1}
    spent = iter([0.2, 0.4, 0.7, 1.0])
    updates = quality.their_updates(network, torch.zeros(8, 1, 8, 8), settings, lambda: next(spent))
    weights, steps = [weight.detach().clone() for weight in network.parameters()], []
    for _ in range(4):
        average = next(updates).shadow_params
        steps.append(max(float((new.detach() - old).abs().max()) for new, old in zip(network.parameters(), weights)))
        if len(steps) == 1:
            assert_close(average, list(network.parameters()))  # a decay of 0: the random start is forgotten
        weights = [weight.detach().clone() for weight in network.parameters()]
    assert steps[0] == steps[3] == 0  # before the warm-up, and when the budget is spent
    assert steps[1] > 3e-3  # AdamW's steps are about as long as the learning rate
    assert 1e-3 < steps[2] < 3e-3  # half way down the cosine


def test_who_was_how_good_when(capsys):
    ours, other = [(10, 9.0), (20, 3.0), (40, 1.0)], [(10, 9.0), (20, 3.5), (40, 3.0), (50, 3.2)]
    assert quality.first_at(other, 3.5) == 20
    assert quality.first_at(other, 2.9) is None
    met = {"best": 3.0, "at": 40, "ours_at": 20, "ratio": 0.5, "met": True}
    assert quality.verdict(ours, other) == met
    assert quality.verdict(other, ours) == {"best": 1.0, "at": 40, "ours_at": None, "ratio": None, "met": False}
    rows = [
        {"contestant": name, "seed": 0, "seconds": seconds, "updates": 1, **dict.fromkeys(KEYS, distance)}
        for name, curve in (("digits", ours), ("diffusers", other))
        for seconds, distance in curve
    ]
    quality.report(rows, ("digits", "diffusers"))
    printed = capsys.readouterr().out
    assert "| KID | 0 | 1 | 40 s | not |" in printed
    assert "| KID | 0 | diffusers | 3 | 40 s | digits | 20 s | 0.50 | at most 0.6: met |" in printed
