"""Decoded images are kept on the disk, found again, and decoded again if anything that they depend on has changed."""

import logging
import os
import shutil
import threading

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from torch.testing import assert_close

from ddpm_hf.data import store
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.sources import Rows
from ddpm_hf.data.store import Pixels
from ddpm_hf.evaluation.reference import data_config
from ddpm_hf.training import train
from ddpm_hf.utils import signals


@pytest.fixture(name="settings")
def fixture_settings(tmp_path):
    """The settings of 40 images in two classes and one broken file."""
    for k in range(40):
        folder = tmp_path / "in" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 4, 3), k, np.uint8) + np.arange(4, dtype=np.uint8)[None, :, None]).save(
            folder / f"{k:02d}.png"
        )
    (tmp_path / "in/a/broken.png").write_bytes(b"")
    return {
        "train_data_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "max_bad_fraction": 0.1,
    }


@pytest.fixture(name="decoded")
def fixture_decoded(monkeypatch):
    """The names of the files that are decoded."""
    names, decode_each = [], store.decode_each

    def noting(items, *args):
        for item, image in decode_each(items, *args):
            names.append(item.name.rsplit("/", 1)[-1])
            yield item, image

    monkeypatch.setattr(store, "decode_each", noting)
    return names


def same(a, b) -> bool:
    return all(
        (torch.equal(x.pixels[:], y.pixels[:]), torch.equal(x.labels, y.labels), x.value_range, x.fill)
        == (True, True, y.value_range, y.fill)
        for x, y in zip(a, b, strict=True)
    )


def test_images_are_decoded_once(settings, decoded, caplog):
    with caplog.at_level(logging.INFO):
        first = load_images(DataConfig(**settings))
        assert len(decoded) == 41
        again = load_images(DataConfig(**settings, seed=3))
    assert len(decoded) == 41
    assert same(first, again)
    assert first[0].bad == again[0].bad == [(f"{settings['train_data_dir']}/a/broken.png", "is empty")]
    made, read = (record.getMessage() for record in caplog.records if "decoded images" in record.getMessage())
    assert f"41 decoded images of 0.0 MB are kept in {settings['cache_dir']}" in made
    assert "--cache_dir" in made
    assert f"are read from {settings['cache_dir']}" in read


def test_pixels_are_not_copied(settings):
    images, _ = load_images(DataConfig(**settings))
    assert isinstance(images.pixels, Pixels)
    assert len(images.pixels.pieces) == 2
    assert not any(piece.flags.owndata or piece.flags.writeable for piece in images.pixels.pieces)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, settings: settings.update(channels=1),
        lambda folder, settings: settings.update(resolution=3),
        lambda folder, settings: settings.update(background=[0.5]),
        lambda folder, settings: (folder / "a/00.png").write_bytes((folder / "a/02.png").read_bytes()),
        lambda folder, settings: os.utime(folder / "a/00.png", (0, 0)),
        lambda folder, settings: (folder / "a/00.png").rename(folder / "a/000.png"),
        lambda folder, settings: (folder / "a/00.png").unlink(),
    ],
)
def test_what_has_changed_is_decoded_again(settings, decoded, tmp_path, change):
    load_images(DataConfig(**settings))
    change(tmp_path / "in", settings)
    before = len(decoded)
    fresh = load_images(DataConfig(**{**settings, "cache_dir": str(tmp_path / "empty")}))
    number = len(decoded) - before
    assert same(load_images(DataConfig(**settings)), fresh)
    assert len(decoded) - before == 2 * number


def test_another_decoder_decodes_again(settings, decoded, monkeypatch):
    load_images(DataConfig(**settings))
    code = store._code()
    monkeypatch.setattr(store, "_code", lambda: [*code, "a newer Pillow"])
    load_images(DataConfig(**settings))
    assert len(decoded) == 82


def test_classes_and_groups_are_read_each_time(settings, decoded, tmp_path):
    load_images(DataConfig(**settings))
    table = "".join(f"{'ab'[k % 2]}/{k:02d}.png,c{k % 4}\n" for k in range(40))
    (tmp_path / "in/metadata.csv").write_text(f"file_name,label\n{table}")
    train, held_out = load_images(DataConfig(**settings, group_by=r"(\d|broken)\.png"))
    assert len(decoded) == 41
    assert train.label_names == ["c0", "c1", "c2", "c3"]
    of = {int(image[0, 0, 0]): label for image, label in zip(train.pixels[:], train.labels.tolist(), strict=True)}
    assert all(label == k % 4 for k, label in of.items())
    assert not {k % 10 for k in of} & {int(image[0, 0, 0]) % 10 for image in held_out.pixels[:]}


@pytest.mark.parametrize("kept", [2000, 0])
def test_a_damaged_file_is_decoded_again(settings, decoded, tmp_path, caplog, kept):
    first = load_images(DataConfig(**settings))
    for part in first:
        part.pixels = part.pixels[:]  # a mapped file must not become shorter
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:kept])
    again = load_images(DataConfig(**settings))
    assert len(decoded) == 82
    assert same(first, again)
    assert "are damaged and are decoded again" in caplog.text


def test_rows_of_datasets(tmp_path, decoded):
    """Their fingerprint tells whether they have changed; files that rows only name are looked at."""
    rows = {"image": [str(tmp_path / f"{k}.png") for k in range(30)], "label": [k % 3 for k in range(30)]}
    for k, file in enumerate(rows["image"]):
        Image.fromarray(np.full((4, 4), 5 * k, np.uint8)).save(file)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    naming = datasets.Dataset.from_dict(rows, features)
    naming.save_to_disk(tmp_path / "saved")  # with the content of the files
    settings = {"train_data_dir": str(tmp_path / "saved"), "output_dir": str(tmp_path / "out")}
    settings["cache_dir"] = str(tmp_path / "cache")
    first = load_images(DataConfig(**settings))
    assert same(first, load_images(DataConfig(**settings)))
    assert len(decoded) == 30
    for part in first:
        assert (part.pixels[:, 0, 0, 0] // 5 % 3).tolist() == part.labels.tolist()
    naming.map(lambda row: {"image": row["image"].rotate(90)}).save_to_disk(tmp_path / "saved")
    load_images(DataConfig(**settings))
    assert len(decoded) == 60

    before = list(Rows(naming, "named").identity())
    assert list(Rows(naming, "named").identity()) == before
    os.utime(tmp_path / "7.png", (0, 0))
    assert [a == b for a, b in zip(before, Rows(naming, "named").identity(), strict=True)].index(False) == 8
    assert [*Rows(naming.select([4, 3]), "named").marks()] == [(1, None), (0, None)]


def test_one_process_decodes_while_others_wait(settings, decoded):
    """Threads stand for the processes of a machine: each opens the cache for itself."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_images(DataConfig(**settings)))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(decoded) == 41
    assert all(same(found[0], other) for other in found)


def test_a_stop_leaves_nothing_behind(settings, tmp_path):
    with signals.StopSignals() as stop:
        stop.name = "SIGTERM"
        with pytest.raises(signals.Stopped):
            load_images(DataConfig(**settings))
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert len(load_images(DataConfig(**settings))[0]) == 36


def test_a_cache_that_can_not_be_written_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"Not a directory: '{tmp_path}/file/cache'"):
        load_images(DataConfig(**{**settings, "cache_dir": str(tmp_path / "file/cache")}))


def test_pixels_are_read_like_a_tensor():
    tensor = torch.arange(7 * 2 * 3 * 4, dtype=torch.float32).reshape(7, 2, 3, 4)
    pixels = Pixels([tensor[:3].numpy(), tensor[3:4].numpy(), tensor[4:].numpy()])
    assert (len(pixels), pixels.shape, pixels.dtype) == (7, tensor.shape, tensor.dtype)
    for key in (3, -1, slice(2, 6), slice(None, None, 2), torch.tensor([6, 0, 0]), (slice(1, 5), 1, 0), (4, 0)):
        assert_close(pixels[key], tensor[key], rtol=0, atol=0)
    some = torch.tensor([6, 1, 3])
    assert_close(pixels.select(some)[:], tensor[some], rtol=0, atol=0)
    assert_close(pixels.select(some).index_select(0, torch.tensor([2, 0])), tensor[some[[2, 0]]], rtol=0, atol=0)
    for mine, theirs in zip(pixels.split(3), tensor.split(3), strict=True):
        assert_close(mine, theirs, rtol=0, atol=0)
    assert [image.shape for image in pixels] == [(2, 3, 4)] * 7


def test_training_and_evaluation_share_what_is_decoded(settings, decoded, tmp_path):
    run = train(tiny_config(tmp_path / "run", **{k: v for k, v in settings.items() if k != "output_dir"}))
    assert len(decoded) == 41
    pipeline, path = run.pipeline, tmp_path / "run/train_config.json"
    arguments = {"dataset_name": None, "train_data_dir": None, "reading": {}, "output": tmp_path / "metrics.json"}
    config = data_config("run", path, pipeline, **arguments)
    assert config.cache_dir == settings["cache_dir"]
    load_images(config, test_limit=None)
    assert len(decoded) == 41
    shutil.rmtree(settings["cache_dir"])  # or on another machine
    assert data_config("run", path, pipeline, **arguments).cache_dir is None
