"""Distances, compared with closed forms, with the sums that define them, and with known values for real images."""

import functools
import io
import json
import math
import operator
from itertools import pairwise

import numpy as np
import pandas
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

from ddpm_hf.data import neighbours
from ddpm_hf.data.dataset import ImageData, load_images
from ddpm_hf.data.neighbours import nearest, nearest_images
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.features.stats import FeatureStats, measure, measure_cached, unit_batches
from ddpm_hf.evaluation.metrics import fidelity
from ddpm_hf.evaluation.metrics.fidelity import (
    frechet_distance,
    frechet_estimate,
    inception_score,
    kernel_distance,
    precision_recall_density_coverage,
)
from ddpm_hf.evaluation.registry import Estimate
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.checksums import images_sha256

close = torch.testing.assert_close


def normal(n, d, seed=0, mean=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + mean


def covariance(d, seed, rank=None):
    root = normal(d, rank or d, seed)
    return root @ root.T / d


def moments(mean, covariance, count=1000) -> FeatureStats:
    mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, covariance))
    return FeatureStats(count, mean, covariance * (count - 1))


def interval(estimate: Estimate) -> tuple[float, float]:
    return estimate.value - 1.96 * estimate.stderr, estimate.value + 1.96 * estimate.stderr


# ---------------------------------------------------------------- statistics


def test_statistics_of_parts_add_up():
    """With a mean of a million, where sums of squares would lose six digits."""
    x = normal(1003, 7, mean=1e6) @ normal(7, 7, seed=1)
    parts = [FeatureStats.of(part) for part in x.split([1, 2, 500, 499, 1])]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        added = functools.reduce(operator.add, [parts[k] for k in order])
        assert added.count == 1003
        close(added.mean, x.mean(0), rtol=1e-12, atol=0)
        close(added.covariance, torch.from_numpy(np.cov(x.numpy().T, ddof=1)), rtol=0, atol=1e-8)
    assert parts[1].count == 2


class Counting:
    """Features of 4x4 images: their rows' sums."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.sum((1, 3)), images.flatten(1)[:, :2]


def test_features_are_cached_by_the_content_of_the_images(tmp_path, capsys):
    network = Counting()
    extractor = Extractor("sums", "0" * 64, "none", network, channels=1, classifies=True)
    pixels = torch.arange(10 * 16, dtype=torch.uint8).reshape(10, 1, 4, 4)
    images = ImageData(pixels)
    first = measure_cached(extractor, images, tmp_path, batch_size=4)
    assert network.seen == 10
    bar = capsys.readouterr().err
    assert "features of reference images" in bar
    assert "0/3" in bar
    again = measure_cached(extractor, ImageData(pixels.clone()), tmp_path)
    assert network.seen == 10
    for key in ("features", "logits"):
        close(getattr(again, key), getattr(first, key), rtol=0, atol=0)
    close(again.stats.covariance, first.stats.covariance, rtol=0, atol=0)
    direct = (pixels.double() / 255).sum((1, 3))
    assert (again.features.shape, again.logits.shape, again.stats.count) == ((10, 4), (10, 2), 10)
    close(again.features, direct, rtol=0, atol=1e-6)
    close(again.stats.covariance, torch.cov(direct.T), rtol=1e-5, atol=1e-8)

    other = pixels.clone()
    other[9, 0, 3, 3] += 1
    measure_cached(extractor, ImageData(other), tmp_path)
    assert network.seen == 20
    renewed = Extractor("sums", "1" * 64, "none", network, channels=1, classifies=True)
    measure_cached(renewed, images, tmp_path)
    assert network.seen == 30
    assert len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(b"half of it")
    close(measure_cached(extractor, images, tmp_path).features, first.features, rtol=0, atol=0)
    assert network.seen == 40
    assert images_sha256(ImageData(pixels.reshape(10, 1, 2, 8))) != images_sha256(images)
    assert images_sha256(ImageData(pixels[:9])) != images_sha256(images)


# ---------------------------------------------------------------- Fréchet distance


def test_frechet_distance_of_gaussians_whose_covariances_commute():
    a, b = torch.tensor([4.0, 1.0, 0.25, 0.0]).double(), torch.tensor([1.0, 9.0, 0.0, 0.0]).double()
    turn = torch.linalg.qr(normal(4, 4)).Q
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    found = frechet_distance(moments(mean, turn @ a.diag() @ turn.T), moments(0 * mean, turn @ b.diag() @ turn.T))
    assert found == pytest.approx(5.25 + ((a.sqrt() - b.sqrt()) ** 2).sum().item(), rel=1e-12)


def test_frechet_distance_of_gaussians_in_the_plane():
    """tr (AB)^(1/2) of 2x2 matrices is sqrt(tr AB + 2 sqrt(det AB))."""
    a, b = covariance(2, 1), covariance(2, 2)
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.linalg.det(a @ b)))
    assert frechet_distance(moments([0, 0], a), moments([3, 4], b)) == pytest.approx(
        25 + a.trace().item() + b.trace().item() - 2 * root, rel=1e-12
    )


def test_frechet_distance_is_that_of_the_matrix_square_root():
    a, b = moments(normal(1, 12)[0], covariance(12, 3)), moments(torch.zeros(12), covariance(12, 4))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real.trace()
    direct = a.mean.square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(direct.item(), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(direct.item(), rel=1e-10)


@pytest.mark.parametrize("n", [5, 300])
def test_frechet_distance_with_fewer_images_than_dimensions(n):
    """From points to the same points, moved and scaled: |shift|^2 + (s - 1)^2 tr A, for any rank of A."""
    x = normal(n, 40) @ covariance(40, 5, rank=11)
    a = FeatureStats.of(x)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    mean = x.mean(0)
    moved = FeatureStats.of((x - mean) * 1.5 + mean + 0.1)
    assert frechet_distance(a, moved) == pytest.approx(40 * 0.01 + 0.25 * a.covariance.trace().item(), rel=1e-9)


def test_frechet_distance_uses_the_unbiased_variance():
    """-1, 1 have the variance 2 and -2, 2 have 8; the biased ones, 1 and 4, would be half as far apart."""
    a, b = (FeatureStats.of(torch.tensor([[-s], [s]]).double()) for s in (1.0, 2.0))
    assert frechet_distance(a, b) == pytest.approx((math.sqrt(8) - math.sqrt(2)) ** 2, rel=1e-12)


def test_frechet_distance_of_identical_images():
    assert frechet_distance(
        FeatureStats.of(torch.ones(5, 3).double()), moments([0, 0, 0], torch.eye(3))
    ) == pytest.approx(6)


def test_the_interval_of_the_frechet_distance():
    reference = moments(torch.zeros(4), torch.eye(4))
    found = [frechet_estimate(normal(400, 4, seed, mean=0.3, scale=1.2), reference) for seed in range(80)]
    true = 4 * 0.09 + 4 * 0.2**2
    spread = np.std([e.value for e in found])
    assert 0.75 < np.mean([e.stderr for e in found]) / spread < 1.3
    covered = np.mean(
        [low < true + 0.01 and true < high for low, high in map(interval, found)]
    )  # 0.01: the bias at 400
    assert covered > 0.85
    assert found[0].value == pytest.approx(frechet_distance(FeatureStats.of(normal(400, 4, 0, 0.3, 1.2)), reference))


# ---------------------------------------------------------------- kernel distance


def double_sum(x, y):
    """The definition, pair by pair."""
    d = x.shape[1]

    def mean(a, b, skip):
        found = [(float(p @ q) / d + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        return sum(found) / len(found)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize("block", [2**23, 7])
def test_kernel_distance_is_the_double_sum(monkeypatch, block):
    monkeypatch.setattr(fidelity, "BLOCK", block)
    x, y = normal(9, 4), normal(6, 4, seed=1, mean=0.5)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(double_sum(x, y), rel=1e-12)
    left_out = [double_sum(torch.cat([x[:k], x[k + 1 :]]), y) for k in range(9)]
    left_out_too = [double_sum(x, torch.cat([y[:k], y[k + 1 :]])) for k in range(6)]
    assert found.stderr == pytest.approx(math.sqrt(8 * np.var(left_out) + 5 * np.var(left_out_too)), rel=1e-9)
    assert kernel_distance(y, x).value == pytest.approx(found.value, rel=1e-12)


def test_kernel_distance_is_unbiased_and_its_standard_error_is_right():
    same = [kernel_distance(normal(30, 3, 2 * s), normal(40, 3, 2 * s + 1)) for s in range(300)]
    values = np.array([e.value for e in same])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)  # with the diagonal it would be 20 times that
    assert 1 < np.mean([e.stderr for e in same]) / values.std() < 1.7
    apart = [kernel_distance(normal(60, 3, 2 * s), normal(60, 3, 2 * s + 1, mean=1.0)) for s in range(200)]
    values = np.array([e.value for e in apart])
    x, y = normal(20000, 3, 7), normal(20000, 3, 8, mean=1.0)
    pairs = [((p * q).sum(1) / 3 + 1) ** 3 for p, q in ((x[::2], x[1::2]), (y[::2], y[1::2]), (x, y))]
    truth = pairs[0].mean() + pairs[1].mean() - 2 * pairs[2].mean()
    error = sum(w * p.var() / len(p) for p, w in zip(pairs, (1, 1, 4))) + values.var() / 200
    assert abs(values.mean() - truth) < 4 * error.sqrt()
    assert 0.8 < np.mean([e.stderr for e in apart]) / values.std() < 1.25


# ---------------------------------------------------------------- precision, recall, density, coverage


def by_loops(real, fake, k):
    def radius(points, i):
        return sorted((points[i] - q).norm() for j, q in enumerate(points) if j != i)[k - 1]

    of_real, of_fake = ([radius(z, i) for i in range(len(z))] for z in (real, fake))
    inside = [[(f - r).norm() <= of_real[i] for i, r in enumerate(real)] for f in fake]
    around = [[(f - r).norm() <= of_fake[j] for j, f in enumerate(fake)] for r in real]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean([any(row) for row in around]),
        "density": np.sum(inside) / (k * len(fake)),
        "coverage": np.mean(np.any(inside, axis=0)),
    }


@pytest.mark.parametrize(("block", "k"), [(2**23, 1), (50, 3)])
def test_precision_recall_density_and_coverage_are_their_definitions(monkeypatch, block, k):
    monkeypatch.setattr(fidelity, "BLOCK", block)
    real, fake = normal(31, 2, mean=1e7), normal(23, 2, seed=1, mean=1e7 + 1.5, scale=0.7)
    found = precision_recall_density_coverage(real, fake, k)
    assert {name: e.value for name, e in found.items()} == pytest.approx(by_loops(real, fake, k), rel=1e-12)
    assert found["precision"].n == found["density"].n == 23
    assert found["recall"].n == found["coverage"].n == 31
    swapped = precision_recall_density_coverage(fake, real, k)
    assert swapped["precision"].value == found["recall"].value != found["precision"].value
    p = (23 * found["precision"].value + 2) / 27  # Agresti & Coull's
    assert found["precision"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 27), rel=1e-9)


def test_precision_recall_and_coverage_of_copies():
    """Copies of one real image, of all of them, of half of them."""
    real = normal(200, 6, mean=100.0)
    one = precision_recall_density_coverage(real, real[:1].repeat(200, 1), k=3)
    assert (one["precision"].value, one["recall"].value) == (1, 1 / 200)
    assert one["coverage"].value < 0.1
    copies = precision_recall_density_coverage(real, real.clone(), k=3)
    assert [copies[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    half = precision_recall_density_coverage(real, torch.cat([real[:100], real[:100]]), k=1)
    assert (half["precision"].value, half["recall"].value) == (1, 0.5)
    fourfold = normal(50, 48).repeat(4, 1)  # balls of radius 0, and nothing but copies in them
    copies = precision_recall_density_coverage(fourfold, fourfold.flip(0), k=3)
    assert [copies[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]


# ---------------------------------------------------------------- Inception Score, neighbours


def test_inception_score_of_certain_and_of_uniform_predictions():
    certain = torch.eye(5).double().repeat(20, 1) * 50
    assert inception_score(certain, splits=4) == pytest.approx((5, 0), abs=1e-9)
    in_order = certain[certain.argmax(1).argsort()]
    assert inception_score(in_order, splits=4) == pytest.approx((5, 0), abs=1e-9)
    assert inception_score(torch.ones(40, 5).double(), splits=4) == pytest.approx((1, 0), abs=1e-12)
    one_class = 50 * torch.eye(5).double()[[2]].repeat(40, 1)
    assert inception_score(one_class, splits=4) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_is_its_formula():
    logits = normal(60, 4, scale=2.0)
    scores = []
    for k in range(3):
        p = torch.softmax(logits[k::3], 1).numpy()
        marginal = p.mean(0)
        scores.append(np.exp(np.mean([np.sum(row * np.log(row / marginal)) for row in p])))
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_nearest_neighbours_are_found_and_copies_have_distance_0(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 100)
    references = normal(41, 5, mean=1e7)
    queries = torch.cat([references[[7, 30]], normal(9, 5, seed=1, mean=1e7)])
    indices, distances = nearest(queries, references, k=3)
    direct = (queries[:, None] - references).norm(dim=2)
    close(distances, direct.sort(1).values[:, :3], rtol=1e-9, atol=0)
    close(indices[2:], direct.argsort(1)[2:, :3])
    assert indices[:2, 0].tolist() == [7, 30]
    assert distances[:2, 0].tolist() == [0, 0]
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    shuffled, _ = nearest(queries, references[order], k=3)
    close(order[shuffled], indices)
    near = torch.cat([references - 1e7, torch.ones(1, 5) + 1e-8 * torch.tensor([[4], [2], [3]]).double()])
    indices, distances = nearest(torch.ones(1, 5).double(), near, k=3)
    assert indices.tolist() == [[42, 43, 41]]
    close(distances, 1e-8 * math.sqrt(5) * torch.tensor([[2.0, 3, 4]]).double(), rtol=1e-6, atol=0)
    assert nearest(queries, references[:2], k=3)[0].shape == (11, 2)


def test_nearest_images_are_those_of_their_pixels(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 100)
    images = ImageData(torch.randint(0, 256, (30, 2, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(0)))
    samples = images.batch(torch.tensor([17, 4])) * 0.9
    found, distances = nearest_images(samples, images, 2)
    direct = (samples[:, None] - images.batch(torch.arange(30))).flatten(2).norm(dim=2).sort(1)
    close(found, images.batch(direct.indices[:, :2].flatten()).unflatten(0, (2, 2)))
    close(distances, direct.values[:, :2])
    assert nearest_images(images.batch(torch.tensor([3])), images)[1].item() == 0


# ---------------------------------------------------------------- real images


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    at = torch.arange(-3, 4)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel[None, None])


@pytest.fixture(scope="module")
def digits():
    """Features of the training digits, and of held-out digits, of blurred ones, and of noise."""
    extractor = make_extractor("digits", 1)
    train, held_out = load_images(TrainConfig())
    real = next(unit_batches(held_out, len(held_out)))
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    sets = {"held-out": real, "blurred": blurred(real, 0.7), "noise": noise}
    return measure(extractor, unit_batches(train)), {name: measure(extractor, [s]) for name, s in sets.items()}


def in_order(estimates: list[Estimate]) -> bool:
    return all(interval(a)[1] < interval(b)[0] for a, b in pairwise(estimates))


def test_the_known_order_of_the_digits(digits):
    train, sets = digits
    order = [sets[name] for name in ("held-out", "blurred", "noise")]
    frechet = [frechet_estimate(s.features, train.stats) for s in order]
    kernel = [kernel_distance(s.features, train.features) for s in order]
    assert in_order(frechet), frechet
    assert in_order(kernel), kernel
    assert abs(kernel[0].value) < 0.05 * kernel[1].value
    found = [precision_recall_density_coverage(train.features[:180], s.features) for s in order]
    assert in_order([f["coverage"] for f in found[::-1]]), found
    assert found[0]["precision"].value > 0.8
    assert found[0]["recall"].value > 0.8
    scores = [inception_score(s.logits, splits=5) for s in order]
    assert scores[0][0] > 8
    assert scores[2][0] < 5


def test_shuffled_features_are_caught(digits):
    """Columns permuted for all images, or for each column separately."""
    train, sets = digits
    held_out = sets["held-out"].features
    generator = torch.Generator().manual_seed(0)
    columns = held_out[:, torch.randperm(48, generator=generator)]
    unpaired = torch.stack([column[torch.randperm(180, generator=generator)] for column in held_out.T], 1)
    for shuffled in (columns, unpaired):
        assert in_order([frechet_estimate(f, train.stats) for f in (held_out, shuffled)])
        found = [precision_recall_density_coverage(train.features[:180], f) for f in (shuffled, held_out)]
        assert in_order([f["coverage"] for f in found])
    assert in_order([kernel_distance(f, train.features) for f in (held_out, columns)])
    rows = held_out[torch.randperm(180, generator=generator)]
    close(FeatureStats.of(rows).covariance, sets["held-out"].stats.covariance, rtol=0, atol=1e-8)


def test_swapped_splits_are_caught(digits):
    """Training images as samples have distance 0 to the training split, but not to the held-out split."""
    train, sets = digits
    copies = train.features[5:90]
    assert nearest(copies, train.features)[1].max() == 0
    assert nearest(copies, train.features)[0][:, 0].tolist() == list(range(5, 90))
    assert nearest(copies, sets["held-out"].features)[1].min() > 0.1
    splits = load_images(TrainConfig())
    assert images_sha256(splits[0]) != images_sha256(splits[1])


def mnist(shared, split: str, n: int) -> torch.Tensor:
    """Any n, (n, 1, 28, 28) in [0, 1]."""
    rows = pandas.read_parquet(shared / f"data/mnist/{split}.parquet", columns=["image"])["image"]
    rows = rows.sample(n, random_state=0)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows])
    return torch.from_numpy(pixels)[:, None] / 255


def test_the_distances_of_mnist_are_those_of_an_independent_implementation(shared):
    folder = shared / "data/features/mnist"
    expected = json.loads((folder / "baselines.json").read_text())
    real, corrupt = expected["real_baselines"], expected["corruptions_vs_test10k"]
    test, train = (np.load(folder / f"stats_{name}.npz") for name in ("test10k", "train60k"))
    test, train = moments(test["mu"], test["cov"], 10_000), moments(train["mu"], train["cov"], 60_000)
    assert frechet_distance(train, test) == pytest.approx(real["train60k vs test10k"], rel=1e-5)

    extractor = make_extractor(str(folder), 1)
    black = measure(extractor, [torch.zeros(4, 1, 28, 28)])  # without variance, few images are enough
    assert frechet_distance(black.stats, test) == pytest.approx(corrupt["all black"]["FD"], rel=1e-5)
    noise = torch.rand(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noise = measure(extractor, noise.split(250))
    assert frechet_distance(noise.stats, test) == pytest.approx(corrupt["uniform noise"]["FD"], rel=0.02)

    digits = measure(extractor, mnist(shared, "train", 2000).split(250))
    for n in (1000, 2000):
        estimate = frechet_estimate(digits.features[:n], test)
        low, high = interval(estimate)
        assert low < real[f"N={n} real train (disjoint) vs test10k, mean of 5"] < high < 15, (n, estimate)
    images = mnist(shared, "test", 1000)
    inverted = measure(extractor, (1 - images).split(250))
    assert frechet_distance(inverted.stats, test) == pytest.approx(corrupt["inverted"]["FD"], rel=0.05)
    accuracy = (measure(extractor, images.split(250)).logits.argmax(1)).bincount(minlength=10)
    assert accuracy.min() > 50  # each of the ten digits is predicted about a hundred times
