from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from torch.testing import assert_close

from ddpm_hf import LinearNoiseScheduler
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.data.neighbours import nearest_images
from ddpm_hf.training.drawing import forward_process, loss_curve, side_by_side
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.pictures import nearness
from ddpm_hf.utils.pictures import grid, save_film


def test_grid_places_each_image():
    images = np.zeros((5, 2, 3, 1), np.float32)
    images[4, 1, 2] = 0.6
    picture = np.asarray(grid(images, columns=3, scale=2))
    assert picture.shape == (2 * 5 - 1, 3 * 7 - 1)
    assert (picture[4] == 255).all()  # between the rows
    assert (picture[7:9, 11:13] == 153).all()  # image 4 is the second of the second row; its last pixel, twice as large
    assert (picture[5:7, 7:13] == 0).all()
    assert (picture[5:, 14:] == 255).all()  # no sixth image


def test_grid_of_any_channels():
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA"), (5, "L")):
        assert grid(np.zeros((2, 4, 4, channels)), 2).mode == mode
    five = np.stack([np.full((4, 3), k / 5) for k in range(5)], axis=-1)[None]
    assert np.asarray(grid(five, 1))[0].tolist() == [51 * (k // 3) for k in range(15)]  # band beside band


def test_forward_process_goes_from_the_image_to_noise():
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown = forward_process(images, LinearNoiseScheduler(), columns=5).reshape(2, 5, 64, 64)
    assert_close(torch.from_numpy(shown[:, 0]), images[:, 0] / 2 + 0.5)
    similar = [[np.corrcoef(row[0].ravel(), x.ravel())[0, 1] for x in row] for row in shown]
    for row in similar:
        assert row == sorted(row, reverse=True)
        assert row[1] > 0.99
        assert abs(row[-1]) < 0.1


def test_gif(tmp_path):
    frames = [Image.new("L", (4, 4), 50 * k) for k in range(5)]
    save_film(frames, tmp_path / "film.gif")
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 5
    film.seek(4)
    assert film.info["duration"] > 2000


def test_loss_curve(tmp_path):
    parts = {name: 0.1 * k if k else None for k, name in enumerate(TrainingLog.BY_TIMESTEP)}
    log = [{"step": k, "loss": 1 / (k + 1), "held_out_loss": 0.5 if k == 4 else None, **parts} for k in range(5)]
    loss_curve(log, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1200, 480)


def test_pictures_side_by_side():
    black, gray = Image.new("L", (3, 5)), Image.new("RGB", (2, 4), (128, 128, 128))
    pixels = np.asarray(side_by_side([black, gray], gap=2))
    assert pixels.shape == (5, 7, 3)
    assert (pixels[:, :3] == 0).all()
    assert (pixels[:, 3:5] == 255).all()
    assert (pixels[:4, 5:] == 128).all()
    assert (pixels[4, 5:] == 255).all()


def test_nearness_shows_models_that_repeat_their_data(tmp_path):
    """Training images are black, held-out ones 0.4 brighter, and samples 0.1 or as much as those."""
    pixels = torch.zeros(30, 1, 4, 4)
    run = SimpleNamespace(
        images=ImageData(pixels, (0.0, 2.0)), held_out=ImageData(pixels + 0.4, (0.0, 2.0)), config=tiny_config(tmp_path)
    )
    for brighter, ratio in ((0.1, 0.25), (0.4, 1.0)):
        distances = nearest_images(run.images.batch(torch.arange(20)) + brighter, run.images)[1][:, 0]
        (metric,) = nearness(run, distances)
        assert metric["value"] == pytest.approx(ratio, rel=1e-5)
        assert f"{brighter:.4f} of 20 samples" in metric["protocol"]
        assert "0.4000 of 30 held-out images" in metric["protocol"]
    assert nearness(run, distances[:15]) == []  # too few to say anything
