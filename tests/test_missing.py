"""Missing values: found, left out of the loss, and named where nobody has told of them."""

import io
import json

import numpy as np
import pytest
import tifffile
import torch
from conftest import tiny_config, tiny_unet
from PIL import Image
from torch.testing import assert_close

from ddpm_hf import LinearNoiseScheduler
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.reading import BadImage, read_image
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.training import DenoisingLoss, train
from ddpm_hf.training.batch import Batches
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.loss import Batch
from ddpm_hf.training.pictures import draw_data

rng = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)


def geotiff(array, nodata=None, **settings) -> bytes:
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    tifffile.imwrite(file := io.BytesIO(), array, photometric="minisblack", extratags=tags, metadata=None, **settings)
    return file.getvalue()


def elevation(value, dtype=np.float32, shape=(12, 16)) -> np.ndarray:
    """Heights of 0 ... 2999 with a border of `value`."""
    array = rng.integers(0, 3000, shape).astype(dtype)
    array[:, :3] = value
    return array


def config(folder, **settings) -> TrainConfig:
    return TrainConfig(train_data_dir=str(folder), output_dir=str(folder / "out"), **settings)


RANGE = {"value_range": (0, 3000)}


@pytest.mark.parametrize(("value", "dtype", "tag", "advice"), [
    (-9999, np.float32, None, "if -9999 stands for missing values, give --nodata -9999"),
    (-32768, np.int16, None, "if -32768 stands for missing values, give --nodata -32768"),
    (LOWEST, np.float32, None, "stands for missing values, give --nodata -3.4028234663852886e\\+38"),
    (-5, np.int16, "-5", "GDAL's nodata tag .42113. says that -5 stands for missing values: give --nodata tag"),
    (65535, np.uint16, "65535", "says that 65535 stands for missing values: give --nodata tag"),
    (-5, np.int16, None, "--clip_values true makes them black or white"),
    (-5, np.int16, "no number", "--clip_values true makes them black or white"),
])  # fmt: skip
def test_an_error_about_the_range_says_what_may_be_missing(value, dtype, tag, advice):
    content = geotiff(elevation(value, dtype), tag)
    with pytest.raises(ValueError, match=f"outside value_range 0 ... 3000; .*{advice}"):
        Decoder(None, **RANGE)(content)
    if "nodata" in advice:  # the first thing that people see is a question for the range
        with pytest.raises(ValueError, match=f"as --value_range BLACK WHITE; .*{advice}"):
            Decoder(None)(content)


def test_nan_is_named():
    reason = Decoder(None, **RANGE)(geotiff(elevation(np.nan)))
    assert str(reason) == "has values that are not finite; if NaN stands for missing values, give --nodata nan"
    reason = Decoder(None, **RANGE, nodata="nan")(geotiff(elevation(np.inf)))
    advice = "--value_range BLACK WHITE --clip_values true makes infinite ones black or white"
    assert str(reason) == f"has values that are not finite; {advice}"


@pytest.mark.parametrize(("value", "dtype", "tag", "nodata"), [
    (-9999, np.float32, None, -9999), (-9999, np.int16, "-9999", "tag"), (np.nan, np.float32, None, "nan"),
    (np.nan, np.float64, "nan", "tag"), (LOWEST, np.float32, LOWEST, "tag"), (LOWEST, np.float32, None, LOWEST),
    (0, np.uint8, None, 0), (255, np.uint8, "255", "tag"),
])  # fmt: skip
def test_missing_values_become_nan_and_no_others(value, dtype, tag, nodata):
    array = elevation(value, dtype)
    found = Decoder(None, **RANGE, nodata=nodata)(geotiff(array, tag))
    missing = np.isnan(array) if value != value else array == value
    assert np.array_equal(np.isnan(found.pixels[0]), missing)
    assert np.array_equal(found.pixels[0][~missing], array[~missing])
    assert found.pixels.dtype == np.float32
    assert found.fill == -1
    assert found.deep == (dtype != np.uint8)


def test_files_without_the_tag_or_the_value_miss_nothing():
    array = elevation(7, np.uint8)
    for nodata in ("tag", -9999, "nan", 2.5):
        found = Decoder(None, nodata=nodata)(geotiff(array))
        assert np.array_equal(found.pixels[0], array)
    assert str(Decoder(None, nodata=7)(geotiff(np.full((4, 4), 7, np.uint8)))) == "has only missing values"


def test_a_missing_value_does_not_bleed_when_it_is_scaled():
    array = np.full((40, 60), 1000, np.float32)
    array[:, :15] = -9999
    for side in (8, 16, 64):
        for resize in ("crop", "pad", "squeeze"):
            pixels = Decoder(None, side, (0, 3000), resize=resize, nodata=-9999)(geotiff(array)).pixels[0]
            valid = pixels[~np.isnan(pixels)]
            assert set(valid.round(2).tolist()) == ({1000.0, 0.0} if resize == "pad" else {1000.0})
            if resize == "squeeze":
                assert abs(np.isnan(pixels).mean() - 0.25) < 0.04
    # of three colours made one, a value is missing if one of the three is
    rgb = np.full((4, 4, 3), 100, np.uint8)
    rgb[0, 0, 1] = 0
    pixels = Decoder(1, nodata=0)(geotiff(rgb, planarconfig="contig")).pixels
    assert np.isnan(pixels[0, 0, 0])
    assert np.isnan(pixels).sum() == 1
    gray = Decoder(3, nodata=0)(geotiff(rgb[..., 1].copy())).pixels
    assert np.isnan(gray[:, 0, 0]).all()
    assert np.isnan(gray).sum() == 3


def test_alpha_and_missing_values():
    array = np.full((8, 8, 4), 200, np.uint8)
    array[:4, :, 3] = 0
    array[:, :4, 0] = 9
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    pixels = Decoder(None, 4, nodata=9)(file.getvalue()).pixels
    assert np.isnan(pixels[0, :, :2]).all()
    assert np.isnan(pixels).sum() == 8
    assert (pixels[1:3, 2:] == 200).all()
    assert (pixels[1:, :1] == 0).all()


@pytest.mark.parametrize("mask", [bool, np.uint8])
def test_a_mask_page_says_what_is_missing(mask):
    """As GDAL writes it where compression would change a nodata value; here also with reduced copies of both."""
    rgb = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    valid = np.ones((12, 16), bool)
    valid[:, :5] = False
    if mask is bool:
        content = io.BytesIO()
        with tifffile.TiffWriter(content) as writer:
            for step, kind in ((1, 0), (2, 1)):
                writer.write(rgb[::step, ::step].copy(), photometric="rgb", subfiletype=kind, metadata=None)
                writer.write(valid[::step, ::step].copy(), photometric="mask", subfiletype=kind + 4, metadata=None)
        content = content.getvalue()
    else:  # a mask of other values than 0 and 1
        content = io.BytesIO()
        images = [Image.fromarray(rgb), Image.fromarray(valid.astype(np.uint8) * 255)]
        images[1].encoderinfo = {"tiffinfo": {254: 4}}
        images[0].save(content, "TIFF", save_all=True, append_images=images[1:])
        content = content.getvalue()
    found = Decoder(None, nodata="tag")(content).pixels
    assert np.array_equal(~np.isnan(found), np.broadcast_to(valid, (3, 12, 16)))
    assert np.array_equal(np.moveaxis(found, 0, 2)[valid], rgb[valid])
    assert np.array_equal(Decoder(None)(content).pixels, np.moveaxis(rgb, 2, 0))  # nobody has asked
    assert not np.isnan(Decoder(None, nodata=-9999)(content).pixels).any()


def test_clipping_is_a_setting():
    array = np.array([[-1000, -160, 40, 240, 3000]], np.int16)
    content = geotiff(array)
    with pytest.raises(ValueError, match="has values -1000 ... 3000, outside value_range -160 ... 240"):
        Decoder(None, value_range=(-160, 240))(content)
    pixels = Decoder(None, value_range=(-160, 240), clip_values=True)(content).pixels
    assert pixels[0, 0].tolist() == [-160, -160, 40, 240, 240]
    found = Decoder(None, value_range=(-160, 240), clip_values=True, nodata=-1000)(content).pixels
    assert np.isnan(found[0, 0, 0])
    assert found[0, 0, 1:].tolist() == [-160, 40, 240, 240]


@pytest.mark.parametrize(("settings", "message"), [
    ({"clip_values": True}, "clip_values=True needs value_range"),
    ({"nodata_fill": 3}, "nodata_fill=3.0 needs nodata and must be a pixel value in 0 ... 255"),
    ({"nodata": 0, "nodata_fill": 256}, "nodata_fill=256.0 needs nodata and must be a pixel value in 0 ... 255"),
    ({"nodata": "many"}, "nodata='many' must be a number, nan or tag, or null"),
    ({"nodata": torch.zeros(2)}, "nodata=.* must be a number, nan or tag, or null"),
    ({"nodata": [1]}, "nodata=.* must be a number, nan or tag, or null"),
    ({"nodata": True}, "nodata=True must be a number, nan or tag, or null"),
])  # fmt: skip
def test_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_settings_are_saved_as_json(tmp_path):
    for given, kept in (("-9999", -9999.0), (float("nan"), "nan"), ("nan", "nan"), ("tag", "tag"), (LOWEST, LOWEST)):
        TrainConfig(nodata=given).save(tmp_path / "c.json")
        strict = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert strict["nodata"] == kept
        assert TrainConfig.from_json(tmp_path / "c.json").nodata == kept


# ---------------------------------------------------------------- training


def test_the_loss_is_the_mean_over_valid_values():
    unet, scheduler = tiny_unet(in_channels=2, out_channels=4), LinearNoiseScheduler(variance_type="learned_range")
    fixed = tiny_unet(in_channels=2)
    torch.manual_seed(0)
    images, noise = torch.rand(3, 2, 8, 8) * 2 - 1, torch.randn(3, 2, 8, 8)
    uniform = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    valid = torch.rand(3, 2, 8, 8) < 0.7
    valid[1] = True
    for network, made in ((unet, scheduler), (fixed, LinearNoiseScheduler())):
        none = DenoisingLoss()(network, made, Batch(images, noise, uniform))
        every = DenoisingLoss()(network, made, Batch(images, noise, uniform, None, torch.ones_like(valid)))
        some = DenoisingLoss()(network, made, Batch(images, noise, uniform, None, valid))
        assert_close(every.loss, none.loss)
        assert_close(some.loss[1], none.loss[1])
        output = network(made.add_noise(images, noise, some.timesteps), some.timesteps).sample[:, :2]
        squares = (output - noise).square()
        expected = torch.stack([squares[k][valid[k]].mean() for k in range(3)])
        assert_close(some.errors, expected)
        network.zero_grad()
        torch.where(valid, 0.0, squares).sum().backward()  # of the others no gradient comes
        assert some.loss.requires_grad
    nothing = DenoisingLoss()(fixed, LinearNoiseScheduler(), Batch(images, noise, uniform, None, valid & False))
    assert nothing.loss.tolist() == [0, 0, 0]


@pytest.fixture
def maps(tmp_path):
    """A folder of 20 elevation maps with -9999 in the border that the left side of each has."""
    (tmp_path / "maps").mkdir()
    for k in range(20):
        (tmp_path / f"maps/{k}.tif").write_bytes(geotiff(elevation(-9999, np.int16, (8, 8)), -9999))
    return tmp_path / "maps"


SETTINGS = {"nodata": "tag", "value_range": [0, 3000]}


def test_batches_flip_what_is_missing_with_the_image(maps):
    settings = config(maps, **SETTINGS, random_flip=True, nodata_fill=1500.3, train_batch_size=16)
    images, _ = load_images(settings)
    assert images.fill == pytest.approx(0.0002)
    batch = Batches(settings, images, None, 0, 1).draw(0)[0]
    left, right = (~batch.valid[..., columns].any((1, 2, 3)) for columns in (slice(0, 3), slice(5, 8)))
    assert (left ^ right).all()
    assert left.any()
    assert right.any()
    assert torch.equal(batch.images == torch.tensor(images.fill), ~batch.valid)
    assert batch.valid.float().mean() == 5 / 8
    assert batch.images.isfinite().all()
    plain = Batches(settings, load_images(TrainConfig())[0], None, 0, 1).draw(0)[0]
    assert plain.valid is None


def test_a_run_with_missing_values(maps, tmp_path):
    run = train(tiny_config(tmp_path / "run", train_data_dir=str(maps), **SETTINGS, max_train_steps=3))
    assert run.images.batch(torch.arange(5)).isfinite().all()
    assert run.images.levels == 3001
    draw_data(run)
    rows = run.log_history
    assert all(np.isfinite(row["held_out_loss"]) for row in rows if row["held_out_loss"] is not None)
    again = train(
        tiny_config(tmp_path / "run", train_data_dir=str(maps), **SETTINGS, max_train_steps=4,
                    resume_from_checkpoint="latest")
    )  # fmt: skip
    assert again.step == 4


def test_a_stream_with_missing_values(maps, tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    contents = [path.read_bytes() for path in sorted(maps.glob("*.tif"))]
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    (tmp_path / "stream").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "stream/train.parquet")
    settings = config(tmp_path / "stream", **SETTINGS, streaming=True, max_train_steps=2, train_batch_size=4)
    stream = ImageStream(settings, 0, 1)
    batch = Batches(settings, stream, None, 0, 1).draw(0)[0]
    assert batch.valid.float().mean() == 5 / 8
    assert (batch.images[~batch.valid] == -1).all()
    assert stream.first(3, 0).isfinite().all()


def test_the_tag_is_read_from_whole_images_only():
    assert read_image(geotiff(elevation(-9999), "-9999"), None).nodata == -9999
    assert read_image(geotiff(elevation(-9999)), None).nodata is None
    assert isinstance(Decoder(None, nodata="tag", **RANGE)(b""), BadImage)
