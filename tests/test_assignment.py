"""Noise that is assigned to the nearest images of a batch."""

from itertools import permutations

import pytest
import torch
from conftest import tiny_config
from torch.testing import assert_close

from ddpm_hf.data.dataset import load_images
from ddpm_hf.training import DenoisingLoss, train
from ddpm_hf.training.batch import Batches, assign_noise
from ddpm_hf.training.facts import facts_of
from ddpm_hf.training.loss import Batch
from ddpm_hf.training.saving import held_out_loss


def batch_of(n, seed=0, labels=None, valid=None, shape=(2, 3, 3)) -> Batch:
    images, noise = torch.randn(2, n, *shape, generator=torch.Generator().manual_seed(seed)).unbind()
    return Batch(images, noise, torch.rand(n, dtype=torch.float64), labels, valid)


def distance(batch: Batch, order=slice(None)) -> float:
    squares = (batch.images - batch.noise[order]).double().square()
    return float((squares if batch.valid is None else squares * batch.valid).sum())


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_order_has_a_smaller_distance(seed, missing):
    valid = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5 if missing else None
    batch = batch_of(6, seed, valid=valid)
    least = min(distance(batch, list(order)) for order in permutations(range(6)))
    made = assign_noise(batch)
    assert distance(made) == pytest.approx(least, rel=1e-6)
    assert distance(made) < distance(batch)
    for name in ("images", "uniform", "valid"):
        assert getattr(made, name) is getattr(batch, name)


def test_noise_stays_in_its_class():
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 0, 2, 2, 0])
    batch = batch_of(10, labels=labels)
    made = assign_noise(batch)
    for label in range(3):
        alone = Batch(*(part[labels == label] for part in batch[:3]))
        assert torch.equal(made.noise[labels == label], assign_noise(alone).noise)
    assert distance(assign_noise(batch._replace(labels=None))) < distance(made) < distance(batch)


def assigned(config):
    """The configuration with noise that is assigned, whatever the objective is."""
    config.noise_assignment = True
    return config


def test_the_micro_batches_of_all_processes_are_those_of_one(tmp_path):
    settings = {"train_batch_size": 40, "class_conditional": True, "label_dropout": 0.5}
    images, _ = load_images(tiny_config(tmp_path, **settings))
    config = tiny_config(tmp_path, **settings, gradient_accumulation_steps=2)
    plain, whole = Batches(config, images, 10, 0, 1).draw(3), Batches(assigned(config), images, 10, 0, 1).draw(3)
    for before, after in zip(plain, whole, strict=True):
        assert not torch.equal(before.noise, after.noise)
        assert_close(after.noise, assign_noise(before).noise, rtol=0, atol=0)
        assert torch.equal(before.noise.flatten().sort().values, after.noise.flatten().sort().values)
        assert torch.equal(before.images, after.images)
    halves = assigned(tiny_config(tmp_path, **settings))
    for rank in (0, 1):
        (part,) = Batches(halves, images, 10, rank, 2).draw(3)
        assert torch.equal(part.noise, whole[rank].noise)


def test_held_out_images_have_assigned_noise_too_and_the_card_says_so(tmp_path):
    run = train(tiny_config(tmp_path, train_batch_size=64))
    plain, protocol = held_out_loss(run, DenoisingLoss()), facts_of(run, {})["metrics"][0]["protocol"]
    assert "assigned" not in protocol
    assigned(run.config)
    assert held_out_loss(run, DenoisingLoss()) != plain
    assert ", assigned within batches of 64, " in facts_of(run, {})["metrics"][0]["protocol"]


def test_only_flow_matching_may_assign_noise(tmp_path):
    with pytest.raises(ValueError, match="noise_assignment=True needs objective='flow'"):
        tiny_config(tmp_path, noise_assignment=True)
