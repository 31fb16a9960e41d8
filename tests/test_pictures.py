import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_unet
from matplotlib.figure import Figure
from PIL import Image
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.data.neighbours import nearest_images
from ddpm_hf.pipelines.images import to_pil
from ddpm_hf.training.drawing import forward_process, loss_curve
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.pictures import FILM_BYTES, _film, nearness
from ddpm_hf.utils.pictures import columns_for, grid, save_film
from ddpm_hf.utils.ticks import plain_ticks


def test_grid_places_each_image():
    """12 pixels are the longer side, so gaps and margins have 2 pixels of mid-gray."""
    images = np.zeros((5, 8, 12, 1), np.float32)
    images[4, 7, 11] = 0.6
    picture = np.asarray(grid(images, columns=3, scale=1))
    assert picture.shape == (2 * 10 + 2, 3 * 14 + 2)
    expected = np.full(picture.shape, 128)
    for k in range(5):
        expected[2 + k // 3 * 10 :, 2 + k % 3 * 14 :][:8, :12] = 0
    expected[2 + 10 + 7, 2 + 14 + 11] = 153
    assert (picture == expected).all()


@pytest.mark.parametrize(("side", "scale", "gap"), [(8, 8, 11), (28, 3, 14), (32, 2, 11), (64, 1, 11), (128, 1, 21)])
def test_small_images_are_enlarged_by_whole_factors(side, scale, gap):
    pattern = np.random.default_rng(0).random((1, side, side, 3))
    picture = np.asarray(grid(pattern, 1))
    assert picture.shape == (side * scale + 2 * gap, side * scale + 2 * gap, 3)
    inner = picture[gap:-gap, gap:-gap]
    assert (inner == (pattern[0] * 255).round().repeat(scale, 0).repeat(scale, 1)).all()
    assert (np.delete(picture, np.s_[gap:-gap], axis=0) == 128).all()


@pytest.mark.parametrize(
    ("shape", "columns"), [((3, 64, 64), 8), ((1, 80, 860), 3), ((13, 64, 64), 3), ((1, 90, 9), 26)]
)
def test_pictures_of_wide_images_are_not_wide(shape, columns):
    assert columns_for(64, shape) == columns
    assert columns_for(2, shape) <= 2
    channels, height, width = shape
    picture = grid(np.zeros((64, height, width, channels), np.float32), columns, title="title", notes="notes")
    assert 0.5 < picture.width / picture.height < 2.2
    text = picture.height - grid(np.zeros((64, height, width, channels), np.float32), columns).height
    assert text < max(250, picture.height / 3)  # letters are not larger than images


def test_grid_of_any_channels():
    for channels, mode in ((1, "L"), (2, "L"), (3, "RGB"), (4, "RGB"), (5, "L")):
        assert grid(np.zeros((2, 4, 4, channels)), 2).mode == mode
    five = np.stack([np.full((60, 60), k / 5) for k in range(5)], axis=-1)[None]
    row = np.asarray(grid(five, 1))[-40, 10:-10].tolist()
    expected = [each for k in range(5) for each in [51 * k] * 60 + [128] * 5]  # band beside band
    assert row == expected[:-5]
    assert grid(five, 1).height > grid(five[..., :3], 1).height + 13  # and says so


def test_alpha_is_shown_by_a_checkerboard():
    image = np.zeros((1, 64, 64, 4))
    image[0, :32, :, 3] = 1
    inner = np.asarray(grid(image, 1))[11:-11, 11:-11]
    assert (inner[:32] == 0).all()
    assert inner[32, ::8, 0].tolist() == [178, 230] * 4
    assert (inner[32::16] == inner[32]).all()
    assert (inner[40] == inner[32, ::-1]).all()


def test_texts_of_a_grid_are_drawn_beside_its_images():
    """Each text adds ink, and only where it belongs; the images stay as they are, in the same order."""
    images = [*np.ones((3, 60, 60, 1)), None]
    texts = {"title": "words", "notes": "a\nb", "column_names": ["t = 1", "t = 2"], "row_names": ["x", "y"]}
    plain = np.asarray(grid(images, 2))
    assert not (plain < 128).any()
    for name, text in (texts | {"captions": ["0.1", "0.2", "0.3", "0.4"]}).items():
        picture = np.asarray(grid(images, 2, **{name: text}))
        assert (picture < 64).sum() > 5, name
        assert (picture == 255).sum() == 3 * 60 * 60, name
        assert picture.size > plain.size
    wide = grid(images, 2, column_names=["a name as long as this one", "b"])
    assert wide.width > 2 * 150  # the columns move apart
    assert grid(images, 2, gaps={1: 4}).width == grid(images, 2).width + 3 * 10


def test_forward_process_goes_from_the_image_to_noise():
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown, timesteps = forward_process(images, LinearNoiseScheduler(), columns=5)
    shown = shown.reshape(2, 5, 64, 64)
    assert timesteps == [0, 333, 666, 999]
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


@pytest.mark.parametrize(
    ("values", "scale", "labels"),
    [
        ((0.031, 0.042), "log", {"0.032", "0.04"}),
        ((0.15, 0.9), "log", {"0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"}),
        ((0.011, 0.9), "log", {"0.02", "0.05", "0.1", "0.2", "0.5"}),
        ((1e-6, 1), "log", {"0.00001", "0.1"}),
        ((1_000_000, 1_000_004), "linear", {"1000001", "1000004"}),
        ((0, 2e-5), "linear", {"0", "0.00002"}),
    ],
)
def test_ticks_are_plain_numbers(values, scale, labels):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot(values, values)
    axes.set(xscale=scale, yscale=scale)
    plain_ticks(axes.xaxis, axes.yaxis)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    shown = {label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high}
    assert labels <= shown
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", text) for text in shown)
    assert axes.yaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize(("number", "shape"), [(64, (8, 8, 1)), (64, (28, 28, 3)), (16, (64, 64, 4))])
def test_the_film_of_a_run_is_small(tmp_path, number, shape):
    """Even if all frames are noise, which no file format makes smaller."""
    frames = np.random.default_rng(0).random((40, number, *shape), np.float32)
    columns = round(number**0.5)
    film = _film(frames, [f"step {k}" for k in range(40)], columns, ())
    save_film(film, tmp_path / "film.gif", most_bytes=FILM_BYTES)
    assert (tmp_path / "film.gif").stat().st_size < 500_000
    saved = Image.open(tmp_path / "film.gif")
    assert saved.n_frames >= 5
    saved.seek(saved.n_frames - 1)
    assert abs(np.asarray(saved.convert("RGB"))[-5:].astype(int) - 128).max() < 12  # the margin is still gray


def test_nearness_shows_models_that_repeat_their_data(tmp_path):
    """Training images are black, held-out ones 0.4 brighter, and samples 0.1 or as much as those."""
    pixels = torch.zeros(30, 1, 4, 4)
    run = SimpleNamespace(
        images=ImageData(pixels, (0.0, 2.0)),
        held_out=ImageData(pixels + 0.4, (0.0, 2.0)),
        config=tiny_config(tmp_path),
        pipeline=DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(), "unipc"),
    )
    for brighter, ratio in ((0.1, 0.25), (0.4, 1.0)):
        distances = nearest_images(run.images.batch(torch.arange(20)) + brighter, run.images)[1][:, 0]
        (metric,) = nearness(run, distances)
        assert metric["value"] == pytest.approx(ratio, rel=1e-5)
        assert f"{brighter:.4f} of 20 samples" in metric["protocol"]
        assert "0.4000 of 30 held-out images" in metric["protocol"]
        assert "steps of unipc" in metric["protocol"]
    assert nearness(run, distances[:15]) == []  # too few to say anything


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_grid_of_pictures_is_the_grid_of_their_pixels(channels):
    """`ddpm_hf.grid(pipe(16).images, 4)`"""
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 8, channels), dtype=np.uint8) / 255
    assert grid(to_pil(images), 2).tobytes() == grid(images, 2).tobytes()
