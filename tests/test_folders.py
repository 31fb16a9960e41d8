"""Which files of a folder are taken as images and classes, and what is said of the others."""

import contextlib
import logging
import os
import tarfile
import unicodedata
import zipfile

import datasets
import hypothesis
import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import strategies as st
from PIL import Image

from ddpm_hf.data import folders
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.folders import natural_order, take_inventory
from ddpm_hf.data.sources import source_of
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.training import train as run_training
from ddpm_hf.training.config import TrainConfig

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def draw(folder, *names):
    """Real images, of which the k-th is all of brightness 10 * k."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 * k, np.uint8)).save(folder / name)
    return folder


def found(folder, **more):
    """The names of the training and of the held-out files with their classes, and the names of the classes."""
    *splits, names = source_of(TrainConfig(train_data_dir=str(folder), output_dir="elsewhere", **more))
    named = [{os.path.relpath(item.name, folder): names and item.label is not None and names[item.label]
              for item in split} for split in splits]  # fmt: skip
    return *named, names


def files(folder):
    """The relative names of the files for training and of those held out."""
    inventory = take_inventory(folder)
    return tuple([str(f.relative_to(folder)) for f in split] for split in (inventory.train, inventory.held_out))


def left_out(folder):
    return dict(take_inventory(folder).left_out)


@pytest.fixture
def without_plugins(monkeypatch):
    """Pillow as it is without plug-ins."""
    monkeypatch.setattr(folders, "_is_suffix_of_images", lambda suffix: suffix in (".png", ".npy"))


# ---------------------------------------------------------------- what is told


def test_one_line_says_what_is_taken_and_what_is_not(tmp_path, caplog, without_plugins):
    touch(tmp_path, "a.png", "b.PNG", "1.raw", "2.raw", "3.raw", "x.heic", "y.HEIC", "all.zip", "LICENSE", "film.mpg")
    with caplog.at_level(logging.WARNING):
        found(tmp_path)
        found(tmp_path)  # to choose the recipe and to train
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        f"train_data_dir={str(tmp_path)!r}: 2 images; left out: 3 .raw, 2 .heic (`pip install pillow-heif`), "
        "1 without a known suffix, 1 .mpg, 1 .zip beside images"
    )


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    touch(tmp_path, "a/0.png", "b/0.png", ".DS_Store", "a/._0.png", "a/Thumbs.db", "b/desktop.ini", "__MACOSX/a/0.png")
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path)[0] == {"a/0.png": "a", "b/0.png": "b"}
    assert not caplog.records


@pytest.mark.parametrize(("names", "words"), [
    (("0.raw", "1.raw", "notes.txt"), "it holds 2 .raw, 1 .txt; hidden"),
    (("photos.zip",), "it holds 1 .zip that is damaged; hidden"),
    (("metadata.csv",), "it holds 1 .csv; hidden"),
    (("photos.tar.gz",), r"it holds 1 .gz \(unpack it\); hidden"),
    ((), "it holds no files; hidden"),
    ((".hidden/0.png",), "it holds no files; hidden"),
    (("a.jxl",), r"it holds 1 .jxl \(`pip install pillow-jxl-plugin`\); hidden"),
    (("run/train_config.json", "run/0.png"), "it holds 1 folder of a run; hidden"),
])  # fmt: skip
def test_a_folder_without_images_says_what_it_has(tmp_path, names, words, without_plugins):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=f"contains no images and no train.*: {words}") as error:
        found(tmp_path)
    assert len(str(error.value)) < 500


def test_many_kinds_of_files_are_a_short_line(tmp_path):
    touch(tmp_path, *(f"0.x{k}" for k in range(30)), "\n\x1b[31m.\udcff", "0." + "y" * 200)
    words = take_inventory(tmp_path).left_out_in_words()
    assert words.endswith("files of 23 more kinds")
    assert len(words) < 200
    assert words.isprintable()


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(("train", "test", "held_out"), [
    ("train", "test", "test"), ("Train", "Test", "test"), ("TRAINING", "testing", "test"),
    ("train", "val", "validation"), ("train", "valid", "validation"), ("train", "validation", "validation"),
    ("train", "dev", "validation"),
    ("train2017", "val2017", "validation"), ("data/train", "data/test", "test"),
])  # fmt: skip
def test_folders_named_as_splits(tmp_path, train, test, held_out):
    touch(tmp_path, f"{train}/0.png", f"{train}/1.png", f"{test}/2.png")
    assert files(tmp_path) == ([f"{train}/0.png", f"{train}/1.png"], [f"{test}/2.png"])
    inventory = take_inventory(tmp_path)
    assert (inventory.held_out_name, inventory.classes, inventory.left_out) == (held_out, None, {})


def test_the_test_split_is_held_out_before_the_validation_split(tmp_path):
    touch(tmp_path, "train/0.png", "val/1.png", "val/2.png", "test/3.png")
    assert files(tmp_path) == (["train/0.png"], ["test/3.png"])
    assert left_out(tmp_path) == {"images of a validation split (the test split is held out)": 2}


def test_images_beside_the_training_split(tmp_path):
    touch(tmp_path, "train/0.png", "banner.png", "more/1.png")
    assert files(tmp_path) == (["train/0.png"], [])
    assert left_out(tmp_path) == {"images beside the training split": 2}


def test_splits_without_one_for_training(tmp_path):
    touch(tmp_path, "test/0.png", "val/1.png")
    with pytest.raises(ValueError, match="has images of a test and of a validation split and none to train on: name"):
        found(tmp_path)


def test_classes_that_are_called_as_splits(tmp_path):
    touch(tmp_path, "cat/0.png", "test/1.png", "val/2.png")  # without a folder `train` there are no splits
    assert found(tmp_path) == (
        {"cat/0.png": "cat", "test/1.png": "test", "val/2.png": "val"},
        {},
        ["cat", "test", "val"],
    )


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("above", ["", "images", "images/all of them", "train", "train/images"])
@pytest.mark.parametrize("below", ["", "persian", "x/y"])
def test_class_folders_at_any_depth(tmp_path, above, below):
    root = tmp_path / above
    touch(root, f"cat/{below}/0.png", "dog/1.png")
    train, _, names = found(tmp_path)
    assert names == ["cat", "dog"]
    assert sorted(train.values()) == ["cat", "dog"]


def test_the_test_split_has_the_classes_of_the_training_split(tmp_path, caplog):
    touch(
        tmp_path, "train/images/cat/0.png", "train/images/dog/1.png", "test/images/dog/2.png", "test/images/emu/3.png"
    )
    touch(tmp_path, "notes.txt")
    with caplog.at_level(logging.WARNING):
        _, test, names = found(tmp_path)
    assert (names, test) == (["cat", "dog"], {"test/images/dog/2.png": "dog", "test/images/emu/3.png": False})
    assert "2 images in 2 classes, 2 held out (test), 1 held-out images without one of these classes" in caplog.text


def test_a_stray_image_takes_no_class_from_the_others(tmp_path, caplog):
    touch(tmp_path, "cat/0.png", "dog/1.png", "overview.png", "notes.txt")
    with caplog.at_level(logging.WARNING):
        train, _, names = found(tmp_path)
    assert train == {"cat/0.png": "cat", "dog/1.png": "dog", "overview.png": False}
    assert names == ["cat", "dog"]
    assert "3 images in 2 classes, 1 training images without one of these classes; left out: 1 .txt" in caplog.text


def test_names_of_folders(tmp_path):
    names = ["0.png", "Ünï ☃", "[a-z]*", "with space", "猫", unicodedata.normalize("NFD", "é")]
    touch(tmp_path, *(f"{name}/0.png" for name in names))
    train, _, classes = found(tmp_path)
    assert sorted(classes) == sorted(names)
    assert train == {f"{name}/0.png": name for name in names}


def test_names_in_natural_order(tmp_path):
    assert natural_order(["10", "9", "1", "01", "b2", "b10", "a"]) == ["01", "1", "9", "10", "a", "b2", "b10"]
    assert natural_order(["9" * 5000, "1" + "0" * 5000])[0] == "9" * 5000
    touch(tmp_path, *(f"{name}/0.png" for name in ("1", "10", "2")))
    assert found(tmp_path)[2] == ["1", "2", "10"]


# ---------------------------------------------------------------- links


def test_class_folders_that_are_links(tmp_path):
    touch(tmp_path / "data", "cat/0.png")
    touch(tmp_path / "far", "1.png", "2.png")
    (tmp_path / "data/dog").symlink_to(tmp_path / "far")
    assert found(tmp_path / "data")[0] == {"cat/0.png": "cat", "dog/1.png": "dog", "dog/2.png": "dog"}


def test_a_run_in_a_folder_that_a_link_leads_to_is_refused(tmp_path):
    touch(tmp_path / "far", "0.png")
    touch(tmp_path / "data", "a/0.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "far")
    config = TrainConfig(train_data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "far"))
    with pytest.raises(ValueError, match="output_dir='.*far' contains images of train_data_dir="):
        source_of(config)


def test_links_that_lead_nowhere_or_back(tmp_path):
    touch(tmp_path / "data", "a/0.png", "b/1.png")
    for name, target in (("a/up", ".."), ("a/self", "self"), ("b/a", "../a"), ("latest", "b"), ("top", tmp_path),
                         ("gone.png", "nothing")):  # fmt: skip
        (tmp_path / "data" / name).symlink_to(target)
    os.mkfifo(tmp_path / "data/pipe.png")  # reading it would wait for ever
    assert files(tmp_path / "data") == (["a/0.png", "b/1.png"], [])
    assert left_out(tmp_path / "data") == {
        "links to folders that are taken already": 4, "links to nothing": 2, "of no regular kind of file": 1,
    }  # fmt: skip


# ---------------------------------------------------------------- tables


def write_rows(path, values, features=FEATURES):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in values]}
    rows["label"] = [value % 2 for value in values]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def brightness(images):
    return sorted(images.pixels[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(("train", "test"), [
    ("train.parquet", "test.parquet"), ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ("default/train/0000.parquet", "default/validation/0000.parquet"), ("my_train.parquet", "my_val.parquet"),
    ("train/0.parquet", "test/0.parquet"), ("[a] b*/trainset.parquet", "[a] b*/testset.parquet"),
])  # fmt: skip
def test_parquet_files_and_their_splits(tmp_path, train, test):
    write_rows(tmp_path / train, [10, 20, 30])
    write_rows(tmp_path / test, [40])
    draw(tmp_path, "assets/banner.png")  # of a cloned repository of the Hub
    touch(tmp_path, "README.md")
    images, held_out = load_images(TrainConfig(train_data_dir=str(tmp_path), output_dir="elsewhere"))
    assert (brightness(images), brightness(held_out)) == ([10, 20, 30], [40])
    assert left_out(tmp_path) == {"images beside .parquet files": 1, ".md": 1}


def test_parquet_files_without_a_split(tmp_path):
    write_rows(tmp_path / "0000.parquet", range(0, 100, 10))
    write_rows(tmp_path / "0001.parquet", range(100, 200, 10))
    images, held_out = load_images(TrainConfig(train_data_dir=str(tmp_path), output_dir="elsewhere"))
    assert sorted(brightness(images) + brightness(held_out)) == list(range(0, 200, 10))
    draw(tmp_path, "0.png")  # then they are something else, such as features of the images
    assert files(tmp_path) == (["0.png"], [])
    assert left_out(tmp_path) == {".parquet": 2}


def test_the_nearest_of_several_parquet_files(tmp_path):
    touch(tmp_path, "a/train.parquet", "b/train.parquet")
    with pytest.raises(ValueError, match="has .parquet files in the folders 'a' and 'b': give one of them as --train"):
        take_inventory(tmp_path)
    touch(tmp_path, "train.parquet", "test.parquet")
    assert files(tmp_path) == (["train.parquet"], ["test.parquet"])
    assert left_out(tmp_path) == {".parquet in other folders": 2}


def test_parquet_files_for_tests_only(tmp_path):
    touch(tmp_path, "test-0.parquet")
    with pytest.raises(ValueError, match="has .parquet files of a test or validation split only, such as 'test-0.par"):
        take_inventory(tmp_path)


def test_a_folder_of_save_to_disk(tmp_path):
    for split, values in (("train", [10, 20, 31]), ("test", [41])):
        write_rows(tmp_path / f"{split}.parquet", values)
    parts = {s: datasets.Dataset.from_parquet(str(tmp_path / f"{s}.parquet")) for s in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    both, one = (TrainConfig(train_data_dir=str(tmp_path / name), output_dir="elsewhere") for name in ("both", "one"))
    images, held_out = load_images(both)
    assert (brightness(images), brightness(held_out), images.label_names) == ([10, 20, 31], [41], ["a", "b"])
    images, held_out = load_images(one)
    assert sorted(brightness(images) + brightness(held_out)) == [10, 20, 31]
    streamed = tiny_config(tmp_path / "run", train_data_dir=both.train_data_dir, streaming=True, max_train_steps=1)
    stream = ImageStream(streamed, 0, 1)
    values = stream.batch_for_step(0, 0, 3, torch.arange(3))[0][:, 0, 0, 0]
    assert sorted(((values + 1) * 127.5).round().int().tolist()) == [10, 20, 31]


def write_tar(path, values, suffix="cls"):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path.parent / "parts", *(f"{k}.png" for k in range(max(values) // 10 + 1)))
    with tarfile.open(path, "w") as tar:
        for value in values:
            tar.add(path.parent / f"parts/{value // 10}.png", f"{value:05d}.png")
            (path.parent / "label").write_text(str(value // 10 % 3))
            tar.add(path.parent / "label", f"{value:05d}.{suffix}")
    for file in (path.parent / "parts").iterdir():
        file.unlink()


def test_webdataset(tmp_path):
    write_tar(tmp_path / "train-000.tar", [0, 10, 20, 30])
    write_tar(tmp_path / "train-001.tar", [40, 50])
    write_tar(tmp_path / "val-000.tar", [60])
    (tmp_path / "label").unlink()
    images, held_out = load_images(TrainConfig(train_data_dir=str(tmp_path), output_dir="elsewhere"))
    assert (brightness(images), brightness(held_out)) == ([0, 10, 20, 30, 40, 50], [60])
    assert (images.label_names, held_out.labels.tolist()) == (["0", "1", "2"], [0])
    assert images.labels[images.pixels[:, 0, 0, 0].argsort()].tolist() == [0, 1, 2, 0, 1, 2]


def zipped(folder, archive, root="", **settings):
    """Write what is in a folder to an archive, below `root`, and return its path."""
    with zipfile.ZipFile(archive, "w", **settings) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, os.path.join(root, path.relative_to(folder)))
    return archive


TREES = {
    "plain": ["0.png", "1.png", "2.png"],
    "classes": ["cat/0.png", "cat/1.png", "dog/2.png", "dog/more/3.png", "__MACOSX/cat/._0.png", "cat/._1.png"],
    "splits": ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png", "notes.txt"],
    "nested": ["data/v1/train/0.png", "data/v1/train/1.png", "data/v1/val/2.png", "run/train_config.json", "run/0.png"],
    "metadata": ["sub/0.png", "sub/1.png", "sub/2.png", "sub/metadata.csv"],
    "arrays": ["0.npy", "1.npy"],
}


@pytest.mark.parametrize(
    ("tree", "way", "workers"),
    [(tree, way, 0) for tree in TREES for way in ("the archive", "in a folder", "with a root")]
    + [("classes", "in a folder", 1)],
)
def test_an_archive_gives_what_its_content_gives_as_a_folder(tmp_path, tree, way, workers):
    content = touch(tmp_path / "content", *(name for name in TREES[tree] if "png" not in name or "._" in name))
    draw(content, *(name for name in TREES[tree] if name.endswith(".png") and "._" not in name))
    for k, path in enumerate(content.glob("*.npy")):
        np.save(path, np.full((4, 5, 3), k, np.uint8))
    for path in content.rglob("metadata.csv"):
        path.write_text("file_name,label\n0.png,b\n1.png,a\n2.png,b\n")
    (tmp_path / "data").mkdir()
    archive = zipped(content, tmp_path / "data/photos.zip", "photos" if way == "with a root" else "",
                     compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    place = archive if way == "the archive" else archive.parent

    def both(folder, workers=0):
        images = load_images(TrainConfig(train_data_dir=str(folder), output_dir="elsewhere", channels=3,
                                         dataloader_num_workers=workers))  # fmt: skip
        return [(each.fingerprint, each.label_names, each.labels is not None and each.labels.tolist())
                for each in images if each]  # fmt: skip

    assert both(place, workers) == both(content)
    assert take_inventory(place).left_out == take_inventory(content).left_out


def test_archives_are_read_as_if_unpacked_in_their_place(tmp_path):
    draw(tmp_path / "a", "cat/0.png", "dog/1.png")
    (tmp_path / "parts").mkdir()
    for name in ("part_1", "part_2"):
        zipped(tmp_path / "a", tmp_path / f"parts/{name}.zip")
    train, test, names = found(tmp_path / "parts")
    assert (set(train.values()), len(train), test, names) == ({"cat", "dog"}, 4, {}, ["cat", "dog"])
    assert all(os.path.dirname(os.path.dirname(name)) in ("part_1.zip", "part_2.zip") for name in train)


@pytest.mark.parametrize("root", ["", "train", "images"])
def test_archives_that_are_named_after_splits(tmp_path, root):
    draw(tmp_path / "a", "cat/0.png", "dog/1.png")
    (tmp_path / "b").mkdir()
    zipped(tmp_path / "a", tmp_path / "b/toys_train.zip", root)
    zipped(tmp_path / "a", tmp_path / "b/Test.ZIP", root.replace("train", "test"))
    train, test, names = found(tmp_path / "b")
    assert [sorted(split.values()) for split in (train, test)] == [["cat", "dog"], ["cat", "dog"]]
    assert names == ["cat", "dog"]
    (tmp_path / "c").mkdir()
    draw(tmp_path / "d", "train/0.png", "test/1.png")
    zipped(tmp_path / "d", tmp_path / "c/train_and_test.zip")  # its folders say more than its name
    assert files(tmp_path / "c") == (["train_and_test.zip/train/0.png"], ["train_and_test.zip/test/1.png"])


def test_an_archive_beside_its_own_content_is_not_taken_twice(tmp_path):
    zipped(draw(tmp_path, "0.png"), tmp_path / "more.zip")
    assert files(tmp_path) == (["0.png"], [])
    assert left_out(tmp_path) == {".zip beside images": 1}
    (tmp_path / "0.png").rename(tmp_path / "train.parquet")
    assert left_out(tmp_path) == {".zip beside .parquet": 1}


def test_names_in_an_archive_lead_nowhere(tmp_path):
    secret = draw(tmp_path, "secret.png") / "secret.png"
    data = tmp_path / "data"
    data.mkdir()
    with zipfile.ZipFile(data / "a.zip", "w") as file:
        for name in (str(secret), "../secret.png", "x/../../../secret.png", "C:/secret.png", "D:\\secret.png"):
            file.writestr(name, secret.read_bytes())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, str(secret))
        locked = zipfile.ZipInfo("locked.png")
        file.writestr(locked, secret.read_bytes())
        locked.flag_bits |= 1
        file.writestr("x\\good.png", secret.read_bytes())  # as some programs for Windows write it
        file.writestr("inner.zip", b"")
        file.writestr("train.parquet", b"")
        file.writestr("notes.txt", b"")
    assert files(data) == (["a.zip/x/good.png"], [])
    assert left_out(data) == {
        "files with unsafe names in a .zip": 5, "links in a .zip": 1, "files with a password in a .zip": 1,
        ".zip in a .zip": 1, ".parquet in a .zip": 1, ".txt": 1,
    }  # fmt: skip
    images, _ = load_images(TrainConfig(train_data_dir=str(data), output_dir="elsewhere"))
    assert len(images) == 1


def test_damaged_and_changed_archives(tmp_path, monkeypatch):
    draw(tmp_path / "a", *(f"{k}.png" for k in range(4)))
    archive = zipped(tmp_path / "a", tmp_path / "a.zip")
    content = bytearray(archive.read_bytes())
    content[content.find(b"IDAT")] ^= 1  # the archive has its own checksum
    archive.write_bytes(content)
    config = TrainConfig(train_data_dir=str(archive), output_dir="elsewhere", max_bad_fraction=0.5)
    images, held_out = load_images(config)
    assert (len(images), len(held_out)) == (2, 1)
    ((name, reason),) = images.bad
    assert name == str(archive / "0.png")
    assert "Bad CRC-32" in reason
    monkeypatch.setattr("ddpm_hf.data.archives.MOST_OF_A_FILE", 10)
    config.cache_dir = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="too large: it says that it has .* bytes when decompressed"):
        load_images(config)
    archive.write_bytes(content[:100])
    with pytest.raises(ValueError, match="contains no images .* it holds 1 .zip that is damaged"):
        load_images(config)


# ---------------------------------------------------------------- the order of classes


def test_a_run_keeps_the_order_of_classes_with_which_it_began(tmp_path, monkeypatch):
    for k, name in enumerate(("1", "2", "10")):
        draw(tmp_path / "data", *(f"{name}/{n}.png" for n in range(3 + k)))
    common = {"train_data_dir": str(tmp_path / "data"), "class_conditional": True, "max_train_steps": 2}
    monkeypatch.setattr("ddpm_hf.data.folders.natural_order", sorted)  # as earlier versions did
    run_training(tiny_config(tmp_path / "old", **common))
    monkeypatch.undo()
    new = run_training(tiny_config(tmp_path / "new", **common))
    assert new.images.label_names == ["1", "2", "10"]
    common["max_train_steps"] = 3
    resumed = run_training(tiny_config(tmp_path / "old", **common, resume_from_checkpoint="latest"))
    tuned = {**common, "pretrained_model_name_or_path": str(tmp_path / "old"), "unet": {}}
    for run in (resumed, run_training(tiny_config(tmp_path / "tuned", **tuned))):
        assert run.images.label_names == run.pipeline.unet.config.class_names == ["1", "10", "2"]
        assert run.held_out.label_names == ["1", "10", "2"]
        labels = torch.cat([run.images.labels, run.held_out.labels])
        assert labels.bincount().tolist() == [3, 5, 4]


# ---------------------------------------------------------------- any tree

NAMES = st.sampled_from([
    "0.png", "1.PNG", "2.npy", "cat", "dog", "train", "Test", "val", "images", ".hidden", "._0.png", "Thumbs.db", "10",
    "x.parquet", "train.parquet", "test.parquet", "w.tar", "metadata.csv", "metadata.jsonl", "state.json", "9", "3.raw",
    "train_config.json", "a.zip", "[*]", "\udcff.png", "é ☃", "-", " ",
])  # fmt: skip
IN_ARCHIVES = NAMES.filter(lambda n: not n.endswith((".parquet", ".tar", ".zip", "state.json", "\udcff.png")))
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
LINKS = st.tuples(PATHS, st.sampled_from(["..", ".", "../..", "nothing", "cat", "0.png", "../train"]))


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(st.lists(PATHS, max_size=12), st.lists(LINKS, max_size=3))
def test_any_tree_is_an_inventory_or_one_sentence(tmp_path_factory, paths, links):
    folder = tmp_path_factory.mktemp("tree")
    for path in paths:
        with contextlib.suppress(OSError):  # a file of that name is where a folder would be
            touch(folder, path)
    for path, target in links:
        with contextlib.suppress(OSError):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(target)
    message = None
    try:
        train, test, names = source_of(TrainConfig(train_data_dir=str(folder), output_dir="elsewhere"))
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert 0 < len(message) < 500
        assert "\n" not in message
        return
    assert train
    for item in (*train, *test):
        assert os.path.isfile(item.name)
        assert item.label is None or 0 <= item.label < len(names)
    places = {(os.path.realpath(os.path.dirname(item.name)), os.path.basename(item.name)) for item in (*train, *test)}
    assert len(places) == len(train) + len(test)  # no file of a folder is taken twice
    assert names is None or len(set(names)) == len(names) > 1


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.lists(IN_ARCHIVES, min_size=1, max_size=4).map("/".join), max_size=12))
def test_any_archive_is_the_inventory_of_its_content(tmp_path_factory, paths):
    folder = tmp_path_factory.mktemp("tree") / "content"
    folder.mkdir()
    for path in paths:
        with contextlib.suppress(OSError):
            touch(folder, path)
    archive = zipped(folder, folder.parent / "photos.zip")

    def facts(place):
        try:
            found = take_inventory(place)
        except ValueError as error:
            return str(error).replace(str(place), "")
        names = [[path.relative_to(place) for path in files] for files in (found.train, found.held_out, found.metadata)]
        return found.kind, *names, found.classes, found.held_out_name, list(found.below.values()), found.left_out

    assert facts(archive) == facts(folder)
