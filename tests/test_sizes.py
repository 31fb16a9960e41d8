"""How images come to the size and the alpha that the settings ask for."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from diffusers import UNet2DModel
from PIL import Image, ImageOps

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.main import main
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.training import train
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.pictures import draw_data

rng = np.random.default_rng(0)
BILINEAR = Image.Resampling.BILINEAR


def png(array) -> bytes:
    Image.fromarray(np.ascontiguousarray(array)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """A random image whose neighbours are similar, (H, W, C)."""
    small = Image.fromarray(rng.integers(0, 256, (5, 5, channels), dtype=np.uint8))
    return np.array(small.resize((width, height), BILINEAR))


def decoded(array, **settings) -> np.ndarray:
    """(H, W, C)"""
    return np.moveaxis(Decoder(None, **settings)(png(array)).pixels, 0, 2)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 47), (9, 9), (8, 30), (80, 71)])
def test_one_number_is_the_side_of_a_square(size):
    """To the same bits as before there was a choice: the centre square, scaled."""
    for channels in (3, 4):
        array = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        array[..., 3:] = 255
        square = min(size)
        top, left = ((side - square) // 2 for side in size)
        image = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)
        image = image[:, top : top + square, left : left + square]
        for side in (7, 9, 32):
            scaled = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
            expected = scaled.clamp(image.min(), image.max()).round().permute(1, 2, 0).numpy()
            assert np.array_equal(
                decoded(array, resolution=side), expected if side != square else image.permute(1, 2, 0)
            )


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (24, 24), (30, 31)])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (20, 20), (33, 127)])
def test_sizes_are_those_of_pillow(size, shape):
    array = smooth(*shape, 3)
    image, to = Image.fromarray(array), size[::-1]
    padded, inner = Image.new("RGB", to), ImageOps.contain(image, to, BILINEAR)
    padded.paste(inner, tuple((side - own) // 2 for side, own in zip(to, inner.size)))
    results = {
        "crop": ImageOps.fit(image, to, BILINEAR),
        "pad": padded,
        "squeeze": image.resize(to, BILINEAR),
    }
    for resize, expected in results.items():
        result = decoded(array, resolution=size, resize=resize)
        assert result.shape == (*size, 3)
        difference = np.abs(result.astype(int) - np.asarray(expected))
        if resize != "crop":
            assert difference.max() <= 1
        else:  # Pillow cuts out fractions of pixels, so that an edge is up to half a pixel elsewhere
            steps = [np.abs(np.diff(array.astype(int), axis=axis)).max() for axis in (0, 1)]
            assert difference.max() <= 0.5 * sum(steps) + 1


def test_padding_is_black_or_transparent_and_around_the_image():
    array = np.full((10, 20, 4), 200, np.uint8)
    array[..., 3] = 255
    colour = decoded(array[..., :3], resolution=(8, 8), resize="pad")
    alpha = decoded(array, resolution=8, resize="pad")
    assert (colour[2:6] == 200).all()
    assert not colour[[0, 1, 6, 7]].any()
    assert np.array_equal(alpha[..., :3], colour)
    assert (alpha[2:6, :, 3] == 255).all()
    assert not alpha[[0, 1, 6, 7]].any()
    deep = Decoder(None, resolution=(8, 8), resize="pad", value_range=(-5, 300))(np.full((10, 20), 7.0)).pixels
    assert (deep[0, [0, 7]] == -5).all()


def test_crops_are_in_the_middle_and_nothing_is_scaled_without_need():
    array = rng.integers(0, 256, (20, 50, 3), dtype=np.uint8)
    assert np.array_equal(decoded(array, resolution=(20, 30)), array[:, 10:40])
    assert np.array_equal(decoded(array, resolution=(10, 50)), array[5:15])
    for resize in ("crop", "pad", "squeeze"):
        assert np.array_equal(decoded(array, resolution=(20, 50), resize=resize), array)
        for shape in ((1, 50), (50, 1), (1, 1)):
            thin = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            assert decoded(thin, resolution=(4, 6), resize=resize).shape == (4, 6, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_cropping_first_changes_no_bit(channels):
    """Colours are combined after the centre is cut out, which must give what the centre of the whole would."""
    array = rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)
    whole = Decoder(channels)(png(array)).pixels
    assert np.array_equal(Decoder(channels, resolution=61)(png(array)).pixels, whole[:, :, 11:72])


# ---------------------------------------------------------------- alpha


def red_disc() -> np.ndarray:
    """A red disc with soft edges, and green hidden under alpha 0; (64, 64, 4)."""
    y, x = np.mgrid[:64, :64] - 31.5
    alpha = np.clip(255 * (20 - np.hypot(x, y)), 0, 255).astype(np.uint8)
    colours = np.where(alpha[..., None] > 0, [250, 10, 20], [0, 255, 0])
    return np.dstack([colours, alpha]).astype(np.uint8)


@pytest.mark.parametrize("side", [8, 24, 64, 100])
def test_no_hidden_colour_is_seen(side):
    result = decoded(red_disc(), resolution=side).astype(int)
    colours, alpha = result[..., :3], result[..., 3]
    assert (colours[alpha == 0] == 0).all()  # one constant where nothing is seen
    assert (np.abs(colours[alpha > 0] - [250, 10, 20]) <= 1).all()  # straight alpha: the disc has one colour
    assert 0 < (alpha > 0).mean() < 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_are_scaled_as_pillow_does(mode):
    array = smooth(60, 90, len(mode))
    array[:20, :, -1] = 0
    array[30:, :, -1] = 255
    expected = np.asarray(Image.fromarray(array, mode).resize((30, 20), BILINEAR)).astype(int)
    result = decoded(array, resolution=(20, 30), resize="squeeze").astype(int)
    assert np.abs(result[..., -1] - expected[..., -1]).max() <= 1
    shown, theirs = (image[..., :-1] * image[..., -1:] / 255 for image in (result, expected))
    assert np.abs(shown - theirs).max() <= 2


def test_what_a_background_shows_is_what_alpha_shows():
    """Blending the scaled image is scaling the blended one."""
    straight = decoded(red_disc(), resolution=16).astype(float)
    blended = decoded(red_disc(), resolution=16, background=[0.5])
    alpha = straight[..., 3:] / 255
    assert np.abs(straight[..., :3] * alpha + 127.5 * (1 - alpha) - blended).max() <= 1.5


def test_deep_images_hide_no_colour_either():
    import imagecodecs

    content = imagecodecs.png_encode(red_disc().astype(np.uint16) * 257)
    for resolution in (None, 24):
        image = Decoder(4, resolution, (0, 65535))(content).pixels
        hidden = image[3] == 0
        assert hidden.any()
        assert not image[:3, hidden].any()
        assert np.abs(image[1, ~hidden] - 10 * 257).max() < 3


# ---------------------------------------------------------------- runs


def folder_of(path, arrays):
    path.mkdir()
    for k, array in enumerate(arrays):
        (path / f"{k}.png").write_bytes(png(array))
    return path


@pytest.mark.parametrize(("size", "stored"), [((10, 108), (20, 300)), ((28, 21), (56, 42))])
def test_a_run_of_images_that_are_not_square(tmp_path, size, stored):
    folder = folder_of(tmp_path / "images", [smooth(*stored, 3)[..., 0] for _ in range(20)])
    settings = {"train_data_dir": str(folder), "resolution": list(size), "max_train_steps": 2}
    run = train(tiny_config(tmp_path / "run", **settings))
    draw_data(run)
    assert run.images.shape == (1, *size)
    assert tuple(run.pipeline.unet.config.sample_size) == size
    saved = TrainConfig(config=str(tmp_path / "run/train_config.json"), output_dir="x")
    assert saved.resolution is None  # `config` alone reads nothing
    argv = ["sample", str(tmp_path / "run"), "--output_dir", str(tmp_path / "samples"), "--num_images", "2"]
    assert main([*argv, "--num_inference_steps", "2"]) == 0
    images = [Image.open(file) for file in sorted((tmp_path / "samples").rglob("*.png"))]
    assert {image.size for image in images} >= {size[::-1]}


def test_the_flags_of_sizes(tmp_path):
    folder = folder_of(tmp_path / "images", [smooth(30, 50, 3) for _ in range(3)])
    shapes = {
        ("--resolution", "12"): (3, 12, 12),
        ("--resolution", "12", "18"): (3, 12, 18),
        ("--resolution", "12", "18", "--resize", "pad"): (3, 12, 18),
    }
    for flags, shape in shapes.items():
        run = ["train", "--train_data_dir", str(folder), "--max_train_steps", "1", "--output_dir", str(tmp_path / "r")]
        more = ["--overwrite_output_dir", "--config", "digits", "--eval_batch_size", "1", "--ddpm_num_inference_steps"]
        assert main([*run, *flags, *more, "1"]) == 0
        read = TrainConfig.from_json(tmp_path / "r/train_config.json")
        assert load_images(read)[0].shape == shape


def test_numbers_of_numpy_are_numbers():
    for given, kept in ((np.int64(8), 8), ([8], 8), ((8, 8), 8), ([8, 9], [8, 9]), (np.array([8, 9]), [8, 9])):
        assert TrainConfig(resolution=given).resolution == kept


def test_a_network_of_diffusers_that_cannot_have_such_sides(tmp_path):
    """Ours takes any height and width."""
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, layers_per_block=1,
    )  # fmt: skip
    DDPMCustomPipeline(unet, LinearNoiseScheduler()).save_pretrained(tmp_path / "theirs")
    folder = folder_of(tmp_path / "images", [smooth(30, 50, 3) for _ in range(3)])
    settings = {"train_data_dir": str(folder), "pretrained_model_name_or_path": str(tmp_path / "theirs"), "unet": {}}
    with pytest.raises(ValueError, match="needs sides that are multiples of 4, and the images are 18x16 pixels: give"):
        train(tiny_config(tmp_path / "run", **settings, resolution=[16, 18], max_train_steps=1))
    train(tiny_config(tmp_path / "run", **settings, resolution=[16, 20], max_train_steps=1))
