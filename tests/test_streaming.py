"""Data sets that are read while training."""

import io

import datasets
import numpy as np
import pytest
import torch
from conftest import calls, tiny_config
from PIL import Image

from ddpm_hf.data.dataset import BadImages
from ddpm_hf.data.sources import Rows
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.training import DenoisingLoss, train
from ddpm_hf.training.pictures import draw_data

FEATURES_OF_IMAGE = datasets.Features({"image": datasets.Image()})
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """datasets waits for 5 s at the end of each pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([[value % 256, value // 256] * 4] * 8, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value_of(image: torch.Tensor) -> int:
    low, high = ((image[0, 0, :2] + 1) / 2 * 255).round().int().tolist()
    return low + 256 * high


def write(folder, n=300, shards=1, bad=(), test=0):
    folder.mkdir(parents=True, exist_ok=True)
    contents = [b"<html>" if k in bad else encoded(k) for k in range(n)]
    for shard in range(shards):
        part = contents[shard::shards]
        rows = {"image": [{"bytes": c, "path": None} for c in part], "label": [0] * len(part)}
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"train-{shard}.parquet")
    if test:
        rows = {"image": [{"bytes": encoded(1000 + k), "path": None} for k in range(test)], "label": [0] * test}
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / "test.parquet")
    return folder


def config(folder, out="out", **settings):
    settings = {"train_data_dir": str(folder), "streaming": True, "max_train_steps": 20, **settings}
    return tiny_config(folder / out, **settings)


def values(stream, n):
    return [value_of(image) for image in stream.batch_for_step(0, 0, n, torch.arange(n))[0]]


def test_every_epoch_has_every_image_once_but_those_held_out(tmp_path):
    stream = ImageStream(config(write(tmp_path)), 0, 1)
    aside = {value_of(image) for image in stream.held_out.batch(torch.arange(len(stream.held_out)))}
    assert 10 < len(aside) < 60
    n = 300 - len(aside)
    first, second = values(stream, n), values(stream, n)
    assert set(first) == set(second) == set(range(300)) - aside
    assert first != second
    assert first != sorted(first)


def test_the_largest_seed_shuffles_as_any_other(tmp_path):
    write(tmp_path, n=100, test=5)
    streams = [ImageStream(config(tmp_path, seed=2**63 - 1 - k), 0, 1) for k in (0, 0, 1)]
    first, again, other = (values(stream, 250) for stream in streams)  # over the ends of epochs
    assert sorted(first[:100]) == sorted(first[100:200]) == list(range(100))
    assert first == again
    assert first != other


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_processes_share_the_stream(tmp_path, shards):
    write(tmp_path, shards=shards, test=5)
    streams = [ImageStream(config(tmp_path), k, 2) for k in (0, 1)]
    seen = [values(stream, 150) for stream in streams]
    assert sorted(seen[0] + seen[1]) == list(range(300))
    for stream in streams:  # all measure on the same images
        assert len(stream.held_out) == 5


def test_a_stream_goes_on_where_it_was(tmp_path):
    whole = ImageStream(config(write(tmp_path, bad={7, 250}), max_bad_fraction=0.1), 0, 1)
    for before in (3, 100, 290, 600):
        stream = ImageStream(config(tmp_path, max_bad_fraction=0.1), 0, 1)
        values(stream, before)
        state, expected = stream.state(), values(stream, 50)
        whole.go_to(state)
        assert values(whole, 50) == expected


def test_bad_images_are_passed_over_and_told(tmp_path):
    stream = ImageStream(config(write(tmp_path, bad={7}, test=3)), 0, 1)
    assert 7 not in values(stream, 299)
    ((name, reason),) = stream.bad
    assert "of epoch 0" in name
    assert reason == "is not in a known image format: it begins with b'<html>'"
    stream = ImageStream(config(write(tmp_path / "worse", bad=set(range(0, 300, 4)), test=3)), 0, 1)
    run = config(tmp_path / "worse")
    with pytest.raises(ValueError, match="quarantine.csv lists all of them"):
        train(run)
    assert (tmp_path / "worse/out/quarantine.csv").read_text().count("begins with b'<html>'") == 2
    with pytest.raises(BadImages, match="2 of .* images can't be used, more than max_bad_fraction=0.01"):
        values(stream, 100)


def test_files_that_are_elsewhere_are_read(tmp_path):
    """A streamed data set of files has their addresses."""
    (tmp_path / "a.png").write_bytes(encoded(300))
    rows = Rows(datasets.Dataset.from_dict({"image": [encoded(1)]}, features=FEATURES_OF_IMAGE), "it")
    item = rows.item(5, {"image": {"bytes": None, "path": f"file://{tmp_path}/a.png"}})
    assert item.source == encoded(300)
    assert item.name == f"it row 5 (file://{tmp_path}/a.png)"


def test_what_can_not_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="streaming=True needs max_train_steps"):
        config(tmp_path, max_train_steps=None)
    with pytest.raises(ValueError, match=r"streaming=True needs train\*.parquet, and train_data_dir=.* has none"):
        ImageStream(config(tmp_path), 0, 1)
    with pytest.raises(ValueError, match="the embedded digits are in memory already"):
        train(config(tmp_path, train_data_dir=None))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_a_stream_goes_on_to_the_same_bytes(tmp_path, workers):
    write(tmp_path, bad={7})
    settings = {"checkpointing_steps": 5, "train_batch_size": 32}  # an epoch has about 8 updates
    train(
        config(tmp_path, "whole", **settings), callbacks=[calls(on_init_end=draw_data)]
    )  # without workers, which change nothing
    settings["dataloader_num_workers"] = workers

    def stop(run):
        if run.step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, "cut", **settings), callbacks=[calls(on_save=stop)])
    train(
        config(tmp_path, "cut", **settings, resume_from_checkpoint="latest"), callbacks=[calls(on_init_end=draw_data)]
    )
    for name in ("unet.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        a, b = ((tmp_path / run / "checkpoint-20" / name).read_bytes() for run in ("whole", "cut"))
        assert a == b
    for run in ("whole", "cut"):
        assert "it begins with b'<html>'" in (tmp_path / run / "quarantine.csv").read_text()


def test_a_stream_has_the_labels_of_its_images(tmp_path):
    rows = {"image": [{"bytes": encoded(k), "path": None} for k in range(100)], "label": [k % 2 for k in range(100)]}
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(tmp_path / "train.parquet")
    stream = ImageStream(config(tmp_path), 0, 1)
    images, labels = stream.batch_for_step(0, 0, 40, torch.arange(40))
    assert labels.tolist() == [value_of(image) % 2 for image in images]
    assert stream.label_names == ["a", "b"]
    run = train(config(tmp_path, class_conditional=True, max_train_steps=3))
    assert run.pipeline.unet.config.class_names == ["a", "b"]


def test_an_image_without_a_class_is_learnt_without_one(tmp_path):
    rows = {"image": [{"bytes": encoded(k), "path": None} for k in range(100)]}
    rows["label"] = [-1 if k % 3 else k % 2 for k in range(100)]
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(tmp_path / "train.parquet")
    seen = []

    def loss(network, scheduler, batch):
        seen.extend((value_of(image), label) for image, label in zip(batch.images, batch.labels.tolist(), strict=True))
        return DenoisingLoss()(network, scheduler, batch)

    settings = {"class_conditional": True, "label_dropout": 0, "max_train_steps": 3}
    train(config(tmp_path, **settings), objective=loss)
    assert len(seen) > 48
    assert all(label == (2 if value % 3 else value % 2) for value, label in seen)


def test_labels_that_are_texts_need_their_names(tmp_path):
    """What the error says to do is done."""
    rows = {"image": [{"bytes": encoded(k), "path": None} for k in range(100)], "kind": ["cat", "dog"] * 50}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"label_column='kind' of .*: the classes of the column 'kind', which is not .*"
                       r"leave --streaming out, or save .*`dataset.class_encode_column\('kind'\).to_p"):  # fmt: skip
        ImageStream(config(tmp_path, label_column="kind"), 0, 1)
    dataset.class_encode_column("kind").to_parquet(tmp_path / "train.parquet")
    stream = ImageStream(config(tmp_path, label_column="kind"), 0, 1)
    images, labels = stream.batch_for_step(0, 0, 40, torch.arange(40))
    assert labels.tolist() == [value_of(image) % 2 for image in images]
    assert stream.label_names == ["cat", "dog"]
