import multiprocessing
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch.testing import assert_close

from ddpm_hf.data.dataset import BadImages, ImageData, load_images
from ddpm_hf.data.order import Order
from ddpm_hf.data.sources import license_on_card
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.seeds import seeded_generator


def pictures(n, size=(8, 8), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(n)]


def folder_of(path, images, extension="png"):
    path.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        image.save(path / f"{k:03d}.{extension}")
    return path


def config(folder, **settings) -> TrainConfig:
    return TrainConfig(train_data_dir=str(folder), **settings)


def test_the_embedded_digits():
    train, held_out = load_images(TrainConfig())
    assert (len(train), len(held_out)) == (1617, 180)
    assert train.pixels.dtype == torch.uint8
    assert train.pixels.shape[1:] == (1, 8, 8)
    batch = train.batch(torch.arange(len(train)))
    assert (batch.min(), batch.max()) == (-1, 1)
    rows = {tuple(image.flatten().tolist()) for image in held_out.pixels}
    assert not rows & {tuple(image.flatten().tolist()) for image in train.pixels}


def test_a_folder_of_images(tmp_path):
    images = pictures(20)
    folder_of(tmp_path, images)
    train, held_out = load_images(config(tmp_path))
    assert (len(train), len(held_out)) == (18, 2)
    stored = {np.asarray(image).tobytes() for image in images}
    seen = {p.permute(1, 2, 0).contiguous().numpy().tobytes() for p in [*train.pixels, *held_out.pixels]}
    assert seen == stored
    x = train.batch(torch.tensor([3]))
    assert_close((x + 1) / 2 * 255, train.pixels[3:4].float(), rtol=0, atol=1e-4)


def test_folders_are_classes(tmp_path):
    for split, folders in (("train", ["dog", "cat", "cat/persian"]), ("test", ["cat", "mouse"])):
        for folder in folders:
            folder_of(tmp_path / split / folder, pictures(3))
    train, held_out = load_images(config(tmp_path))
    assert train.label_names == ["cat", "dog"]
    assert train.labels.tolist() == [0] * 6 + [1] * 3
    assert held_out.labels.tolist() == [0, 0, 0, -1, -1, -1]  # nobody has told what a mouse is
    folder_of(tmp_path / "train", pictures(1))  # an image of no class
    train, _ = load_images(config(tmp_path))
    assert (train.label_names, train.labels.tolist()) == (["cat", "dog"], [-1] + [0] * 6 + [1] * 3)


def test_one_folder_is_no_class(tmp_path):
    folder_of(tmp_path / "images", pictures(3))
    assert load_images(config(tmp_path))[0].label_names is None


def test_a_label_of_minus_1_is_none(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, labels in (("train", [0, 1, 1]), ("test", [-1, -1, -1])):
        rows = {"image": pictures(3), "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    train, held_out = load_images(config(tmp_path))
    assert (train.labels.tolist(), train.label_names) == ([0, 1, 1], ["a", "b"])
    assert held_out.labels.tolist() == [-1, -1, -1]


def test_a_test_split_with_its_own_order_of_classes(tmp_path):
    for split, names in (("train", ["a", "b"]), ("test", ["b", "c", "a"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": pictures(3), "label": [names.index(n) for n in ("b", "a", names[1])]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    train, held_out = load_images(config(tmp_path))
    assert train.labels.tolist() == [1, 0, 1]
    assert held_out.labels.tolist() == [1, 0, -1]


def test_a_label_that_is_no_class(tmp_path):
    rows = {"image": pictures(3), "label": [0, 1, 5]}
    plain = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(rows, features=plain)
    dataset.info.features["label"] = datasets.ClassLabel(names=["a", "b"])  # as a careless writer has it
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"row 2 has the label 5, which must be in -1 ... 1"):
        load_images(config(tmp_path))


def test_labels_go_with_their_images():
    train, _ = load_images(TrainConfig())
    images, labels = train.batch_for_step(5, 3, 100, torch.arange(20, 60))
    stored = {tuple(p.flatten().tolist()): label for p, label in zip(train.pixels, train.labels.tolist(), strict=True)}
    of_images = [stored[tuple(((image + 1) * 8).round().int().flatten().tolist())] for image in images]
    assert labels.tolist() == of_images


def test_train_and_test_folders(tmp_path):
    folder_of(tmp_path / "train" / "a", pictures(3))
    folder_of(tmp_path / "train" / "b", pictures(2))
    folder_of(tmp_path / "test", pictures(4))
    train, held_out = load_images(config(tmp_path))
    assert (len(train), len(held_out)) == (5, 4)


def test_parquet_files(tmp_path):
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    for split, n in (("train", 5), ("test", 3)):
        rows = {"label": [0] * n, "picture": pictures(n, mode="L")}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-0.parquet")
    train, held_out = load_images(config(tmp_path))
    assert (len(train), len(held_out)) == (5, 3)
    assert np.array_equal(train.pixels[4, 0], np.asarray(pictures(5, mode="L")[4]))


def test_real_parquet_files(shared):
    train, held_out = load_images(config(shared / "data/flowers17_64"))
    assert (len(train), len(held_out)) == (1224, 136)
    assert train.pixels.shape[1:] == (3, 64, 64)


def test_resolution_scales_the_shorter_side_and_crops_the_middle(tmp_path):
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200  # the middle square
    folder_of(tmp_path, [Image.fromarray(wide)])
    train, held_out = load_images(config(tmp_path, resolution=10))
    assert held_out is None
    assert train.pixels.shape == (1, 1, 10, 10)
    assert (train.pixels[:, :, :, 1:-1] == 200).all()


def test_channels(tmp_path):
    folder_of(tmp_path, pictures(2, mode="L"))
    assert load_images(config(tmp_path))[0].pixels.shape[1] == 1
    assert load_images(config(tmp_path, channels=3))[0].pixels.shape[1] == 3
    folder_of(tmp_path / "alpha", pictures(2, mode="RGBA"))
    assert load_images(config(tmp_path / "alpha"))[0].pixels.shape[1] == 4
    with pytest.raises(
        ValueError, match="png has an alpha channel, which channels=3 would lose: give --channels 4, or"
    ):
        load_images(config(tmp_path / "alpha", channels=3))


def test_sixteen_bits_need_a_range_and_lose_nothing(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    folder_of(tmp_path, [Image.fromarray(values), Image.fromarray(values + 1)])
    with pytest.raises(ValueError, match=r"000.png has more than 8 bits .* --value_range BLACK WHITE"):
        load_images(config(tmp_path))
    train, _ = load_images(config(tmp_path, value_range=[0, 65535]))
    expected = torch.from_numpy(values.astype(np.float64) / 65535 * 2 - 1).float()
    assert_close(train.batch(torch.tensor([0]))[0, 0], expected, rtol=0, atol=1e-6)


def test_a_value_outside_the_range_is_named(tmp_path):
    folder_of(tmp_path, [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (10, 2000)])
    with pytest.raises(ValueError, match=r"001.png has values 2000 ... 2000, outside value_range 0 ... 1000"):
        load_images(config(tmp_path, value_range=[0, 1000]))
    folder_of(tmp_path / "bytes", pictures(2))
    with pytest.raises(
        ValueError, match=r"value_range=\[0, 100\] is for images of more than 8 bits; these have 8 bits"
    ):
        load_images(config(tmp_path / "bytes", value_range=[0, 100]))


def test_scaling_does_not_leave_the_range(tmp_path):
    rng = np.random.default_rng(0)
    folder_of(tmp_path, [Image.fromarray(rng.choice([0, 65535], (40, 40)).astype(np.uint16)) for _ in range(3)])
    Image.fromarray(np.full((40, 40), 65535, np.uint16)).save(tmp_path / "white.png")
    for resolution in (7, 10, 13, 19):
        train, held_out = load_images(config(tmp_path, value_range=[0, 65535], resolution=resolution))
        assert train.pixels[:].min() >= 0
        assert max(train.pixels[:].max(), held_out.pixels[:].max()) == 65535


def test_sixteen_bits_are_told_by_the_file_and_not_by_its_values(tmp_path):
    folder_of(tmp_path, [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (0, 40000)])
    train, held_out = load_images(config(tmp_path, value_range=[0, 65535]))
    assert {train.pixels[:].max().item(), held_out.pixels[:].max().item()} == {0, 40000}


@pytest.mark.parametrize(("depths", "message"), [
    ((8, 8, 16), "002.png has more than 8 bits and the first image has 8: all images must have the same bit depth"),
    ((16, 8, 8), "001.png has only 8 bits and the first image has more: all images must have the same bit depth"),
])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_8_bits_and_of_more_are_not_mixed(tmp_path, depths, message, split):
    images = [Image.fromarray(np.full((4, 4), 99, {8: np.uint8, 16: np.uint16}[bits])) for bits in depths]
    folder_of(tmp_path / split, images)
    folder_of(tmp_path / ("test" if split == "train" else "train"), images[:1])
    with pytest.raises(ValueError, match=f"{split}/{message}"):
        load_images(config(tmp_path, value_range=[0, 2000]))


def test_colour_after_a_gray_image_is_not_lost_silently(tmp_path):
    folder_of(tmp_path / "train", [*pictures(1, mode="L"), *pictures(1)])
    with pytest.raises(ValueError, match="001.png has colour and the first image has none: give --channels 1 or"):
        load_images(config(tmp_path))


def test_the_digits_are_what_they_are():
    for settings in ({"channels": 3}, {"value_range": [0, 1]}):
        with pytest.raises(ValueError, match="the embedded digits have channels=1 and value_range 0 ... 16"):
            load_images(TrainConfig(**settings))


@pytest.mark.parametrize(("images", "aside"), [(1, 0), (2, 1), (5, 1), (20, 2)])
def test_a_tenth_is_held_out_and_at_least_one(tmp_path, images, aside):
    folder_of(tmp_path, pictures(images))
    train, held_out = load_images(config(tmp_path))
    assert (len(train), 0 if held_out is None else len(held_out)) == (images - aside, aside)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert load_images(config(tmp_path))[0].pixels.shape == (1, 1, 3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "train_data_dir='.*' is not a folder"),
        (lambda p: p.mkdir(), "contains no images and no train"),
        (lambda p: folder_of(p, [*pictures(1), *pictures(1, (9, 8))]), "001.png is 9x8 pixels .* give --resolution"),
        (
            lambda p: (folder_of(p, pictures(1)) / "001.png").write_text("text"),
            "1 of 2 images can't be used.*001.png is not in a known",
        ),
        (lambda p: (folder_of(p, pictures(1)) / "001.jpg").write_bytes(b""), "can't be used.*001.jpg is empty"),
    ],
)
def test_sources_that_cannot_be(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_images(config(tmp_path / "data"))


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "train.parquet").write_text("text")
    with pytest.raises(ValueError, match="its parquet files can't be read"):
        load_images(config(tmp_path))


def test_a_row_without_an_image(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [*pictures(1), None]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(BadImages, match="1 of 2 images can't be used.*row 1 has no image"):
        load_images(config(tmp_path))


def test_a_parquet_file_without_images(tmp_path):
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no column of type Image; its columns are x"):
        load_images(config(tmp_path))


def test_a_data_set_that_is_not_there(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("no\nsuch thing")))
    with pytest.raises(ValueError, match="dataset_name='nobody/nothing' can't be loaded: no such thing"):
        load_images(TrainConfig(dataset_name="nobody/nothing"))


def test_labels_are_found_by_their_type(tmp_path):
    names = ["cat", "dog", "owl"]
    features = datasets.Features(
        {"x": datasets.ClassLabel(names=names), "y": datasets.Image(), "z": datasets.Value("int64")}
    )
    rows = {"x": [2, 0, 1, 1], "y": pictures(4), "z": [9, 9, 9, 9]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    train, held_out = load_images(config(tmp_path))
    assert train.label_names == held_out.label_names == names
    stored = {np.asarray(image).tobytes(): label for image, label in zip(rows["y"], rows["x"])}
    for part in (train, held_out):
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            assert stored[pixels.permute(1, 2, 0).contiguous().numpy().tobytes()] == label
    digits, _ = load_images(TrainConfig())
    assert digits.label_names == list("0123456789")
    assert len(digits.labels) == len(digits)


def test_bad_images_up_to_the_limit_are_left_out(tmp_path):
    folder_of(tmp_path, pictures(20))
    (tmp_path / "005.png").write_bytes(b"")
    (tmp_path / "017.png").write_text("<html>")
    train, held_out = load_images(config(tmp_path, max_bad_fraction=0.1))
    assert len(train) + len(held_out) == 18
    assert {(name[-7:], reason) for name, reason in train.bad} == {
        ("005.png", "is empty"),
        ("017.png", "is not in a known image format: it begins with b'<html>'"),
    }
    with pytest.raises(
        BadImages, match=r"2 of 20 images can't be used, more than max_bad_fraction=0.09; the first one: "
    ) as e:
        load_images(config(tmp_path, max_bad_fraction=0.09))
    assert len(e.value.bad) == 2


def test_hidden_files_and_others_are_no_images(tmp_path):
    folder_of(tmp_path, pictures(3))
    for name in ("._000.png", "labels.csv", "paper.pdf", "clip.mp4"):
        (tmp_path / name).write_text("x")
    folder_of(tmp_path / ".thumbnails", pictures(1))
    train, held_out = load_images(config(tmp_path))
    assert len(train) + len(held_out) == 3


@pytest.mark.parametrize("mark", ["train_config.json", "model_index.json", "sampling.json"])
@pytest.mark.parametrize("output", ["photos/made/mine", "photos/other", "elsewhere"])
def test_pictures_of_runs_models_and_samples_are_no_data_whoever_asks(tmp_path, monkeypatch, mark, output):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos/a", pictures(3))
    folder_of(tmp_path / "photos/b", pictures(3))
    folder_of(tmp_path / "photos/made/mine/grids", pictures(1, (99, 99)))
    folder_of(tmp_path / "photos/train", pictures(1, (99, 99)))  # a name like any other for a folder of a run
    for folder in ("made/mine", "train"):
        (tmp_path / "photos" / folder / mark).write_text("{}")
    train, held_out = load_images(config("photos", output_dir=output))
    assert (len(train) + len(held_out), train.label_names) == (6, ["a", "b"])


def test_a_test_split_that_is_a_run_is_none(tmp_path):
    folder_of(tmp_path / "train", pictures(10))
    folder_of(tmp_path / "test", pictures(1, (99, 99)))
    (tmp_path / "test/train_config.json").write_text("{}")
    train, held_out = load_images(config(tmp_path))
    assert (len(train), len(held_out)) == (9, 1)


def test_the_folder_of_a_run_is_no_data_set_and_one_of_samples_is(tmp_path):
    folder_of(tmp_path, pictures(3))
    (tmp_path / "sampling.json").write_text("{}")
    train, held_out = load_images(config(tmp_path))
    assert len(train) + len(held_out) == 3
    for mark, kind in (("model_index.json", "a model"), ("train_config.json", "a run")):
        (tmp_path / mark).write_text("{}")
        with pytest.raises(ValueError, match=f"is the folder of {kind} .it has {mark}.: give a folder of imag"):
            load_images(config(tmp_path))


@pytest.mark.parametrize("output", [".", "a", "b", "b/c", "linked"])
def test_a_run_among_its_images_is_refused(tmp_path, output):
    """Its mark would take them away from the next who asks."""
    folder_of(tmp_path / "a", pictures(3))
    folder_of(tmp_path / "b/c", pictures(3))
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="output_dir='.*' contains images of train_data_dir='.*a separate folder"):
        load_images(config(tmp_path, output_dir=str(tmp_path / output)))
    for allowed in ("runs", "b/d", ".."):
        load_images(config(tmp_path, output_dir=str(tmp_path / allowed)))


@pytest.mark.parametrize("output", [".", "train", "test"])
def test_a_run_among_the_splits_of_its_images_is_refused(tmp_path, output):
    for split in ("train", "test"):
        folder_of(tmp_path / split, pictures(3))
    with pytest.raises(ValueError, match="output_dir='.*' contains images of train_data_dir='.*a separate folder"):
        load_images(config(tmp_path, output_dir=str(tmp_path / output)))


def test_a_run_among_its_parquet_files_is_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures(3)}, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="output_dir='.*' contains images of train_data_dir='.*a separate folder"):
        load_images(config(tmp_path, output_dir=str(tmp_path)))


# ---------------------------------------------------------------- licences


@pytest.mark.parametrize(("front", "license"), [
    ("license: cc-by-4.0", "cc-by-4.0"),
    ("license: [mit, cc0-1.0]", "mit, cc0-1.0"),
    ("pretty_name: It", None),
])  # fmt: skip
def test_the_licence_on_the_card_of_a_data_set(hub, tmp_path, caplog, front, license):
    card = f"---\n{front}\n---\n"
    hub.plant("you/data", {"README.md": card.encode()}, repo_type="dataset")
    (tmp_path / "README.md").write_text(card)
    assert license_on_card("you/data") == license_on_card(str(tmp_path)) == license
    assert not caplog.text


def test_a_data_set_without_a_card_has_no_licence_and_that_is_no_fault(hub, tmp_path, caplog):
    hub.plant("you/data", {"a.txt": b"a"}, repo_type="dataset")
    assert license_on_card("you/data") is license_on_card(str(tmp_path)) is None
    assert not caplog.text


def test_a_licence_that_could_not_be_asked_for_is_told(hub, tmp_path, caplog, monkeypatch):
    hub.plant("you/data", {"README.md": b"---\nlicense: mit\n---\n"}, repo_type="dataset")
    hub.fail("README.md", times=100, status=403)
    assert license_on_card("you/data") is None
    assert (
        "dataset_name='you/data': its licence is unknown because its card can't be read: HfHubHTTPError: 403"
        in caplog.text
    )
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # which the client tells as an entry that is not found
    assert license_on_card("you/data") is None
    assert "dataset_name='you/data': its licence is unknown because its card can't be read: Offline" in caplog.text
    caplog.clear()
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_on_card(str(tmp_path)) is None
    assert "its licence is unknown" in caplog.text


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path):
    """They are spawned, so all that goes to them can be pickled."""
    folder_of(tmp_path, pictures(100, (9, 12)))
    (tmp_path / "050.png").write_bytes(b"")
    settings = {"resolution": 8, "max_bad_fraction": 0.1}
    caches = (str(tmp_path.parent / f"cache{n}") for n in (0, 2))
    alone = load_images(config(tmp_path, **settings, cache_dir=next(caches)))
    helped = load_images(config(tmp_path, **settings, cache_dir=next(caches), dataloader_num_workers=2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.pixels[:], b.pixels[:])
        assert a.bad == b.bad
    assert not multiprocessing.active_children()
    (tmp_path / "099.png").unlink()
    np.save(tmp_path / "099.npy", np.zeros((9, 9)))
    with pytest.raises(ValueError, match="099.npy has more than 8 bits"):
        load_images(config(tmp_path, resolution=8, max_bad_fraction=0.1, dataloader_num_workers=2))


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    folder_of(tmp_path, pictures(3))
    script = (
        "import sys, time, signal, os, psutil\n"
        "from ddpm_hf.data.workers import decode_each\nfrom ddpm_hf.data.decoding import Decoder\n"
        "from ddpm_hf.data.sources import Item\n"
        "def items():\n    while True:\n        yield Item('a', sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    each = decode_each(items(), Decoder(None), 2)\n"
        "    for _ in range(200):\n        next(each)\n"
        "    workers = psutil.Process().children(recursive=True)\n"
        "    print(*[p.pid for p in workers], flush=True)\n"
        "    [p.send_signal(signal.SIGINT) for p in workers]\n"  # Ctrl-C reaches all of a terminal's processes
        "    for _ in range(200):\n        next(each)\n"
        "    print('goes on', flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", str(tmp_path / "000.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[1] == "goes on", done.stderr
    workers = [int(pid) for pid in done.stdout.splitlines()[0].split()]
    assert len(workers) >= 2
    until = time.monotonic() + 20
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, workers))


def test_bounds_are_compared_as_the_images_are_stored(tmp_path):
    """1.1 is no float32: the nearest one is a little larger."""
    np.save(tmp_path / "a.npy", np.float32([[0, 1.1], [0.5, 1.0]]))
    train, _ = load_images(config(tmp_path, value_range=[0, 1.1]))
    assert_close(train.batch(torch.tensor([0])).max().item(), 1.0)
    np.save(tmp_path / "a.npy", np.float32([[0, 1.1001], [0.5, 1.0]]))
    with pytest.raises(ValueError, match="outside value_range 0 ... 1.1"):
        load_images(config(tmp_path, value_range=[0, 1.1]))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_epoch_sees_every_image_once(batch_size):
    stream = torch.cat([Order(10).indices(0, step, batch_size) for step in range(100)])
    assert len(stream) == 100 * batch_size
    epochs = stream[: len(stream) // 10 * 10].reshape(-1, 10)
    assert (epochs.sort(dim=1).values == torch.arange(10)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_the_order_does_not_depend_on_how_it_is_cut():
    whole = torch.cat([Order(10).indices(3, step, 12) for step in range(5)])
    halves = torch.cat([Order(10).indices(3, step, 6) for step in range(10)])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, torch.cat([Order(10).indices(4, step, 12) for step in range(5)]))


def test_generators_of_different_purposes_differ():
    seeds = [
        seeded_generator(s, purpose, k).initial_seed()
        for s in range(10)
        for purpose in ("order", "noise", "dropout")
        for k in range(100)
    ]
    assert len(set(seeds)) == len(seeds)
    assert seeded_generator(1, "noise", 2).initial_seed() == seeded_generator(1, "noise", 2).initial_seed()


@pytest.mark.parametrize(("pixels", "value_range", "levels"), [
    (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), (0.0, 255.0), 256),
    (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), (0.0, 16.0), 17),
    (torch.tensor([0.0, 65535.0]).reshape(2, 1, 1, 1), (0.0, 65535.0), 65536),
    (torch.tensor([0.0, 0.25]).reshape(2, 1, 1, 1), (0.0, 1.0), 256),
])  # fmt: skip
def test_how_many_values_a_pixel_can_have(pixels, value_range, levels):
    assert ImageData(pixels, value_range).levels == levels
