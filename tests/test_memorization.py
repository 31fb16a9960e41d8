"""The tests of memorisation, on sets with and without copies."""

import pytest
import torch
from scipy.stats import mannwhitneyu

from ddpm_hf.evaluation.metrics.memorization import nearness, share_of_copies


def distances(n, seed, scale=1.0):
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alike", [distances(300, 1), distances(300, 1).round(decimals=1)])
def test_nearness_is_the_mann_whitney_test(alike):
    a = distances(200, 0).round(decimals=1) if len(alike.unique()) < 20 else distances(200, 0)
    expected = mannwhitneyu(a, alike, alternative="less", method="asymptotic", use_continuity=False)
    found = nearness(a, alike)
    assert found["p_value"] == pytest.approx(expected.pvalue, rel=1e-10)
    assert abs(found["value"]) < 4


def test_z_is_standard_normal_without_copies():
    z = torch.tensor([nearness(distances(60, k), distances(40, 10**6 + k))["value"] for k in range(500)])
    assert abs(z.mean()) < 4 / 500**0.5
    assert z.std() == pytest.approx(1, abs=4 / 1000**0.5)


def test_copies_and_distant_samples_are_detected():
    held_out = distances(200, 0)
    copies = nearness(distances(200, 1, scale=1e-3), held_out)
    assert copies["value"] < -15
    assert copies["p_value"] < 1e-50
    assert copies["median_ratio"] < 0.01
    some = torch.cat([torch.zeros(60), distances(140, 1)])  # three in ten are copies
    assert nearness(some, held_out)["value"] < -4
    assert nearness(3 + distances(200, 1), held_out)["value"] > 15


def test_all_distances_are_0():
    found = nearness(torch.zeros(5), torch.zeros(4))
    assert found["value"] == 0
    assert found["median_ratio"] is None


def test_pale_images_are_near_but_are_not_copies():
    data = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    unseen = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    pale = 0.7 * unseen
    copies = torch.cat([unseen[:150], data[:50] + 0.01 * unseen[:50]])

    def two_nearest(images):
        return torch.cdist(images, data).topk(2, largest=False).values

    of_unseen, of_pale, of_copies = (two_nearest(images) for images in (unseen, pale, copies))
    assert nearness(of_pale[:, 0], of_unseen[:, 0])["value"] < -5
    assert share_of_copies(of_pale) == share_of_copies(of_unseen) == 0
    assert share_of_copies(of_copies) == 0.25
