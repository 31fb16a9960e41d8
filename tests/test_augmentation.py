"""The order of unbalanced classes, and what is done to images before the network sees them."""

import re

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_data import folder_of, pictures
from test_split import folder_of_all

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import ImageData, load_images, windows
from ddpm_hf.data.order import Order
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.evaluation.reference import load_references
from ddpm_hf.pipelines.pipeline import load_pipeline
from ddpm_hf.training import train
from ddpm_hf.training.batch import Batches, draw_random
from ddpm_hf.training.config import TrainConfig

LONG_TAIL = torch.tensor([0] * 90 + [1] * 7 + [2] * 2 + [-1])


def epochs(order: Order, number: int, seed=0) -> torch.Tensor:
    return order.indices(seed, 0, number * order.num_images).reshape(number, -1)


# ---------------------------------------------------------------- class balance


@pytest.mark.parametrize(
    ("balance", "shares"), [(1.0, [25, 25, 25, 25]), (0.5, [67, 19, 10, 7]), (1e-9, [1, 90, 7, 2])]
)
def test_the_share_of_a_class_is_a_power_of_its_size(balance, shares):
    order = Order(100, LONG_TAIL, balance)
    seen = torch.stack([torch.bincount(LONG_TAIL[epoch] + 1, minlength=4) for epoch in epochs(order, 20)])
    assert (seen == seen[0]).all()
    if balance == 0.5:
        sizes = np.sqrt([1, 90, 7, 2])
        np.testing.assert_allclose(seen[0], 100 * sizes / sizes.sum(), atol=1)
    else:
        assert seen[0].tolist() == shares


@pytest.mark.parametrize("balance", [0.3, 0.7, 1.0])
def test_the_images_of_a_class_are_seen_equally_often(balance):
    order = Order(100, LONG_TAIL, balance)
    for number in (1, 2, 7, 30):
        times = torch.bincount(epochs(order, number).flatten(), minlength=100)
        for label in LONG_TAIL.unique():
            of_class = times[label == LONG_TAIL]
            assert of_class.min() > 0 or number < 7
            assert of_class.max() - of_class.min() <= 1


def test_a_balanced_order_is_a_function_of_seed_and_position():
    order, again = Order(100, LONG_TAIL, 1.0), Order(100, LONG_TAIL, 1.0)
    whole = order.indices(3, 0, 700)
    assert torch.equal(whole, torch.cat([again.indices(3, step, 35) for step in range(20)]))
    assert torch.equal(order.indices(3, 6, 35), whole[210:245])
    assert not torch.equal(whole, order.indices(4, 0, 700))
    assert len({tuple(epoch.tolist()) for epoch in whole.reshape(7, 100)}) == 7
    runs = (whole[1:] // 90 == whole[:-1] // 90).double().mean()
    assert runs < 0.9  # shuffled, not class by class


def test_without_balance_the_order_does_not_look_at_classes():
    assert torch.equal(Order(100, LONG_TAIL, 0.0).indices(1, 3, 64), Order(100).indices(1, 3, 64))


def test_a_balanced_run_sees_rare_classes_often_and_resumes_exactly(tmp_path):
    images = {f"{'ab'[k >= 90]}/{k:03d}.png": image for k, image in enumerate(pictures(100, mode="L"))}
    settings = {"train_data_dir": str(folder_of_all(images, tmp_path / "images")), "class_conditional": True}
    settings |= {"dataset_name": None, "class_balance": 1.0, "checkpointing_steps": 3}
    whole = train(tiny_config(tmp_path / "whole", **settings, max_train_steps=7))
    _, labels = whole.images.batch_for_step(0, 0, 90, torch.arange(90))
    assert labels.bincount().tolist() == [45, 45]
    train(tiny_config(tmp_path / "cut", **settings, max_train_steps=3))
    train(tiny_config(tmp_path / "cut", **settings, max_train_steps=7, resume_from_checkpoint="latest"))
    a, b = ((tmp_path / run / "checkpoint-7/unet.safetensors").read_bytes() for run in ("whole", "cut"))
    assert a == b


def test_balance_needs_classes(tmp_path):
    folder_of(tmp_path / "images", pictures(5))
    run = tiny_config(tmp_path / "run", train_data_dir=str(tmp_path / "images"), dataset_name=None, class_balance=0.5)
    with pytest.raises(ValueError, match=r"class_balance=0.5: the images of '.*' have no classes; they need a column"):
        train(run)
    with pytest.raises(ValueError, match="class_balance=1.0 must be 0 with streaming=True"):
        TrainConfig(class_balance=1, streaming=True, max_train_steps=1)


# ---------------------------------------------------------------- flips and turns


def augmented(settings, images, step=0):
    """The images at positions 0 ... of an update, each augmented."""
    draws = draw_random(settings, step, torch.arange(len(images)), len(images), tuple(images.shape[1:]))
    return draws.augment_(images.clone())


def test_each_of_the_eight_symmetries_is_equally_frequent():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    all_eight = [x.rot90(k, (2, 3)) for x in (image, image.flip(3)) for k in range(4)]
    settings = TrainConfig(random_flip=True, random_vertical_flip=True, random_rotate90=True)
    seen = augmented(settings, image.expand(4000, -1, -1, -1))
    counts = torch.tensor([int((seen == x).flatten(1).all(1).sum()) for x in all_eight])
    assert counts.sum() == 4000
    assert ((counts - 500).abs() < 5 * (4000 * 7 / 64) ** 0.5).all()


@pytest.mark.parametrize(("setting", "change"), [
    ("random_flip", lambda x: x.flip(2)),
    ("random_vertical_flip", lambda x: x.flip(1)),
])  # fmt: skip
def test_a_flip_is_along_its_axis_and_half_of_the_time(setting, change):
    images = torch.rand(2000, 3, 2, 3)
    seen = augmented(TrainConfig(**{setting: True}), images)
    flipped = (seen != images).flatten(1).any(1)
    assert abs(flipped.double().mean() - 0.5) < 5 * 0.5 / 2000**0.5
    for k, image in enumerate(images):
        assert torch.equal(seen[k], change(image) if flipped[k] else image)


def test_other_augmentations_change_no_other_random_number():
    plain, more = (
        draw_random(TrainConfig(random_flip=True, **extra), 5, torch.arange(40), 40, (1, 2, 2))
        for extra in ({}, {"random_vertical_flip": True, "random_rotate90": True})
    )
    for name in ("noise", "uniform", "flips", "drops"):
        assert torch.equal(getattr(plain, name), getattr(more, name))
    assert plain.vertical is plain.turns is None


def test_turns_need_square_images(tmp_path):
    folder_of(tmp_path / "images", pictures(5, (8, 6)))
    run = tiny_config(tmp_path / "run", train_data_dir=str(tmp_path / "images"), random_rotate90=True)
    with pytest.raises(ValueError, match="random_rotate90=True needs square images; these are 8x6: give --resolution"):
        train(run)


# ---------------------------------------------------------------- windows


def test_windows_are_everywhere_equally_often():
    image = torch.arange(5 * 4.0).reshape(1, 1, 5, 4).expand(4000, -1, -1, -1)
    corners = torch.rand((4000, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = windows(image, corners, (3, 3))
    assert cut.shape == (4000, 1, 3, 3)
    first = cut[:, 0, 0, 0].long()
    places = torch.bincount(first, minlength=20)[[0, 1, 4, 5, 8, 9]]
    assert places.sum() == 4000
    assert ((places - 4000 / 6).abs() < 5 * (4000 * 5 / 36) ** 0.5).all()
    assert torch.equal(cut, torch.stack([image[0, :, f // 4 : f // 4 + 3, f % 4 : f % 4 + 3] for f in first.tolist()]))


def wide_images(tmp_path, n=40):
    """Images of 24x20 whose pixels tell their place: red the column, green the row, blue the image."""
    rows, columns = np.mgrid[:20, :24]
    images = [Image.fromarray(np.stack([columns, rows, np.full_like(rows, k)], -1).astype(np.uint8)) for k in range(n)]
    return folder_of(tmp_path / "images", images)


def test_a_run_sees_random_windows_of_larger_images(tmp_path):
    settings = {"resolution": 8, "random_crop": 20}
    settings = tiny_config(tmp_path / "run", train_data_dir=str(wide_images(tmp_path)), dataset_name=None, **settings)
    images, held_out = load_images(settings)
    assert (images.shape, images.pixels.shape[2:]) == ((3, 8, 8), (20, 20))
    assert held_out.pixels.shape == (4, 3, 8, 8)
    seen = [Batches(settings, images, None, 0, 1).draw(step)[0].images for step in range(50)]
    pixels = ((torch.cat(seen) + 1) * 127.5).round().long()
    left, top = pixels[:, 0, 0, 0], pixels[:, 1, 0, 0]
    assert (left.min(), left.max(), top.min(), top.max()) == (2, 14, 0, 12)
    expected = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"))
    assert torch.equal(pixels[:, :2], expected + torch.stack([left, top], 1)[:, :, None, None])
    of_one = pixels[:, 2, 0, 0] == pixels[0, 2, 0, 0]
    assert len(set(left[of_one].tolist())) > 5  # another window in each epoch
    two = [Batches(settings, images, None, rank, 2) for rank in (0, 1)]
    of_two = [batches.draw(0)[0].images for batches in two]
    settings.train_batch_size *= 2
    assert torch.equal(torch.cat(of_two), Batches(settings, images, None, 0, 1).draw(0)[0].images)
    run = train(settings)
    assert run.pipeline.image_shape == (3, 8, 8)


def test_references_are_one_window_of_each_image(tmp_path):
    run = tiny_config(tmp_path / "run", train_data_dir=str(wide_images(tmp_path)), resolution=8, random_crop=20)
    train(run)
    settings = DataConfig.from_json(tmp_path / "run/train_config.json")
    pipeline = load_pipeline(str(tmp_path / "run"), "model")
    (images, held_out), (again, _) = (load_references(settings, pipeline) for _ in range(2))
    assert torch.equal(images.pixels, again.pixels)
    assert (images.shape, held_out.shape) == ((3, 8, 8), (3, 8, 8))
    assert images.pixels[:, 2, 0, 0].unique().numel() == len(images) == 36
    assert images.pixels[:, 0, 0, 0].unique().numel() > 5
    whole, _ = load_images(settings)
    assert torch.equal(whole.batch(torch.arange(36)), images.batch(torch.arange(36)))


def test_windows_of_a_stream(tmp_path):
    images = [Image.open(path) for path in sorted(wide_images(tmp_path).iterdir())]
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train.parquet")
    settings = {"train_data_dir": str(tmp_path), "streaming": True, "resolution": 8, "random_crop": 20}
    settings = tiny_config(tmp_path / "run", **settings)
    stream = ImageStream(settings, 0, 1)
    batch = Batches(settings, stream, None, 0, 1).draw(0)[0].images
    assert (stream.shape, tuple(batch.shape[1:]), stream.held_out.shape) == ((3, 8, 8),) * 3
    assert (batch[:, 0, 0, 0] * 127.5).round().unique().numel() > 4
    assert stream.first(3, 0).shape == (3, 3, 8, 8)


def test_windows_need_not_be_square(tmp_path):
    settings = {"train_data_dir": str(wide_images(tmp_path)), "resolution": [6, 10], "random_crop": [20, 24]}
    settings = tiny_config(tmp_path / "run", **settings, dataset_name=None)
    images, held_out = load_images(settings)
    assert images.shape == held_out.shape == (3, 6, 10)
    seen = torch.cat([Batches(settings, images, None, 0, 1).draw(step)[0].images for step in range(40)])
    corners = ((seen[:, :2, 0, 0] + 1) * 127.5).round()
    assert (corners.amin(0).tolist(), corners.amax(0).tolist()) == ([0, 0], [14, 14])


@pytest.mark.parametrize("resolution", [None, 21, [8, 21]])
def test_a_window_fits_into_the_image(resolution):
    with pytest.raises(ValueError, match=f"random_crop=20 needs .* at most that, not {re.escape(str(resolution))}"):
        DataConfig(random_crop=20, resolution=resolution)
    with pytest.raises(ValueError, match="random_crop=9: the embedded digits have 8x8 pixels"):
        load_images(DataConfig(random_crop=9, resolution=8))


def test_windows_as_large_as_the_image_are_the_image():
    images = ImageData(torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8), window=(4, 4))
    assert torch.equal(images.cropped().pixels, images.pixels)
