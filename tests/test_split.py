"""Which images are held out: classes, groups and copies."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_data import config, folder_of, pictures

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.split import Traits, random_split, stratified_split
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.training import train
from ddpm_hf.training.config import resolve


def split_of(labels=None, groups=None, copies=None, number=None):
    """Indices (training, held out) as lists, of images that are unlike each other unless `copies` says so."""
    number = number or len(labels if labels is not None else groups if groups is not None else copies)
    traits = Traits(np.array(copies if copies is not None else range(number), np.uint64), groups or [None] * number)
    sides = stratified_split(traits, None if labels is None else torch.tensor(labels))
    assert torch.equal(torch.cat(sides).sort().values, torch.arange(number))
    return [side.tolist() for side in sides]


def folder_of_all(images, path):
    """Write {path: image}."""
    for name, image in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(path / name)
    return path


def contents(images) -> set[bytes]:
    return set() if images is None else {image.numpy().tobytes() for image in images.pixels}


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([198, 2], [19, 1]),
        ([1] * 20, [0] * 20),
        ([1, 1, 8], [0, 0, 1]),
        ([50, 30, 20], [5, 3, 2]),
        ([80] * 17, [8] * 17),
        ([2] * 10, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),  # not half of the images
    ],
)
def test_each_class_has_its_share_and_keeps_an_image(sizes, held_out):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    train, aside = split_of(labels.tolist())
    assert np.bincount(labels[aside], minlength=len(sizes)).tolist() == held_out
    assert set(labels[train]) == set(labels)


def test_unlabelled_images_are_held_out_in_proportion():
    _, aside = split_of([-1] * 60 + [0] * 40)
    assert (sum(k < 60 for k in aside), sum(k >= 60 for k in aside)) == (6, 4)


@pytest.mark.parametrize("number", [1, 2, 5, 97, 20_000])
def test_without_classes_groups_and_copies_the_split_is_the_earlier_one(number):
    assert split_of(number=number) == [side.tolist() for side in random_split(number)]


# ---------------------------------------------------------------- groups and copies


def test_groups_are_on_one_side():
    groups = [f"patient {k % 20}" for k in range(200)]
    train, aside = split_of([k % 2 for k in range(200)], groups)
    assert len(aside) == 20
    assert not {groups[k] for k in train} & {groups[k] for k in aside}


def test_large_groups_are_held_out_whole_if_need_be_the_smallest():
    groups = ["a"] * 400 + ["b"] * 100 + ["c"] * 300
    assert split_of(groups=groups)[1] == list(range(400, 500))
    labels = [0] * 500 + [1] * 300
    assert split_of(labels, groups)[1] == list(range(400, 500))  # the only group of class 1 is for training


def test_large_groups_of_many_classes_hold_out_at_most_twice_a_tenth():
    labels, groups = [k // 40 for k in range(2000)], [k // 20 for k in range(2000)]  # 50 classes of 2 groups of 20
    train, aside = split_of(labels, [str(group) for group in groups])
    assert 180 <= len(aside) <= 400
    assert not {groups[k] for k in train} & {groups[k] for k in aside}
    assert {labels[k] for k in train} == set(labels)


def test_groups_that_are_classes_are_held_out_all_the_same():
    labels = [k // 10 for k in range(200)]
    train, aside = split_of(labels, [str(label) for label in labels])
    assert len(aside) == 20
    assert not {labels[k] for k in train} & {labels[k] for k in aside}


def test_copies_are_on_one_side_across_groups_too():
    for copies, groups in (([k // 2 for k in range(100)], None), (None, [str(k // 2) for k in range(100)])):
        train, aside = split_of(groups=groups, copies=copies)
        assert len(aside) == 10
        assert not {k // 2 for k in train} & {k // 2 for k in aside}
    # 0 and 1 are copies, 1 and 2 a group, 2 and 3 copies, and so on
    chain = [k // 2 for k in range(10)] + list(range(5, 95))
    links = [str((k + 1) // 2) for k in range(10)] + [None] * 90
    _, aside = split_of(groups=links, copies=chain)
    assert len(aside) in (10, 13)  # the chain of 10 came after 3 others
    assert not set(range(10)) & set(aside) or set(range(10)) <= set(aside)


def test_copies_of_images_in_files_are_on_one_side(tmp_path):
    folder_of(tmp_path, [image for image in pictures(50) for _ in range(2)])
    train, held_out = load_images(config(tmp_path))
    assert (len(train), len(held_out)) == (90, 10)
    assert not contents(train) & contents(held_out)


def test_blank_images_do_not_tie_groups_together(tmp_path):
    blank = Image.new("RGB", (8, 8), (1, 2, 3))
    images = {f"scan{k}/{n}.png": image for k in range(10) for n, image in enumerate([*pictures(2, seed=k), blank])}
    train, held_out = load_images(config(folder_of_all(images, tmp_path), group_by=r"scan\d"))
    assert (len(train), len(held_out)) == (27, 3)


def test_training_images_keep_their_order(tmp_path):
    folder_of(tmp_path, pictures(3000, (2, 2)))
    train, held_out = load_images(config(tmp_path))
    files = [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in sorted(tmp_path.iterdir())]
    kept, aside = random_split(3000)
    assert [image.numpy().tobytes() for image in train.pixels] == [files[k] for k in kept]
    assert [image.numpy().tobytes() for image in held_out.pixels] == [files[k] for k in aside]


def test_copies_across_a_given_split_are_told(tmp_path, caplog):
    folder_of(tmp_path / "train/a", pictures(20))
    folder_of(tmp_path / "test/a", [*pictures(3), *pictures(4, seed=1)])
    load_images(config(tmp_path))
    assert [r.getMessage() for r in caplog.records] == [
        "of 7 held-out images, 3 have exactly the pixels of a training image: measured on them, the model seems better "
        "than it is"
    ]
    caplog.clear()
    load_images(config(tmp_path, group_by="folder"))
    assert "3 have exactly the pixels of a training image and 7 are of a group that has training" in caplog.text


def test_no_image_to_hold_out_is_told(tmp_path, caplog):
    folder_of_all({f"{k}/a.png": image for k, image in enumerate(pictures(20))}, tmp_path)
    train, held_out = load_images(config(tmp_path))
    assert (len(train), held_out) == (20, None)
    assert "no image is held out: each class has a single image" in caplog.text


# ---------------------------------------------------------------- group_by


def test_groups_are_folders_columns_or_parts_of_the_path(tmp_path):
    images = {f"{c}/p{k % 10}_{k}.png": image for c in "ab" for k, image in enumerate(pictures(40, seed=ord(c)))}
    folder_of_all(images, tmp_path / "files")
    rows = {"image": list(images.values()), "patient": [name[3] for name in images]}
    parquet = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "rows").mkdir()
    parquet.to_parquet(tmp_path / "rows/train.parquet")
    patient = {np.asarray(image).transpose(2, 0, 1).tobytes(): name[3] for name, image in images.items()}
    for folder, group_by in (("files", r"/p(\d)_"), ("rows", "patient")):
        train, held_out = load_images(config(tmp_path / folder, group_by=group_by))
        assert len(held_out) == 8  # one patient
        assert not {patient[c] for c in contents(train)} & {patient[c] for c in contents(held_out)}
    train, held_out = load_images(config(tmp_path / "files", group_by="folder"))
    assert set(train.labels.tolist()) != set(held_out.labels.tolist())


@pytest.mark.parametrize(("group_by", "message"), [
    ("(", r"group_by='\(' is not a regular expression: missing \)"),
    ("patient", "group_by='patient': .*0.png has the path '000.png', in which it is not found"),
])  # fmt: skip
def test_groups_that_are_nowhere(tmp_path, group_by, message):
    with pytest.raises(ValueError, match=message):
        load_images(config(folder_of(tmp_path, pictures(2)), group_by=group_by))


def test_groups_are_a_column_of_the_metadata_of_files(tmp_path):
    folder_of(tmp_path, pictures(40))
    rows = [f"{k:03d}.png,{k % 10},{'ab'[k % 2]}\n" for k in range(40)]
    (tmp_path / "metadata.csv").write_text("file_name,patient,label\n" + "".join(rows))
    train, held_out = load_images(config(tmp_path, group_by="patient"))
    number = {np.asarray(image).transpose(2, 0, 1).tobytes(): k % 10 for k, image in enumerate(pictures(40))}
    assert len(held_out) in (4, 8)
    assert not {number[c] for c in contents(train)} & {number[c] for c in contents(held_out)}
    with pytest.raises(ValueError, match="'who': .* in which it is not found, nor a column, which are patient, label"):
        load_images(config(tmp_path, group_by="who"))


def test_rows_without_the_column_name_those_that_there_are(tmp_path):
    rows = datasets.Dataset.from_dict({"image": pictures(3), "who": [1, 2, 3]}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train.parquet")
    for group_by in ("patient", "folder"):
        with pytest.raises(ValueError, match=f"'{group_by}': .* row 0 has no path, nor a column, which are image, who"):
            load_images(config(tmp_path, group_by=group_by))
    with pytest.raises(ValueError, match="group_by='who': the embedded digits have no groups"):
        load_images(DataConfig(group_by="who"))


def test_a_stream_keeps_groups_together(tmp_path):
    rows = {"image": pictures(300), "who": [k // 10 for k in range(300)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    settings = {"train_data_dir": str(tmp_path), "streaming": True, "max_train_steps": 1, "group_by": "who"}
    stream = ImageStream(tiny_config(tmp_path / "out", **settings), 0, 1)
    who = {np.asarray(image).transpose(2, 0, 1).tobytes(): k for image, k in zip(rows["image"], rows["who"])}
    aside = {who[content] for content in contents(stream.held_out)}
    n = 300 - len(stream.held_out)
    images, _ = stream.batch_for_step(0, 0, n, torch.arange(n))
    seen = {who[((image + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()] for image in images}
    assert 0 < len(aside) < 10
    assert (seen | aside, seen & aside) == (set(range(30)), set())


# ---------------------------------------------------------------- runs of earlier versions


def without_split(path, *keys) -> None:
    """Take the settings of the split out of a JSON file, as earlier versions wrote it."""
    settings = json.loads(path.read_text())
    inner = settings
    for key in keys:
        inner = inner[key]
    del inner["held_out_split"], inner["group_by"]
    path.write_text(json.dumps(settings))


@pytest.fixture
def by_class(tmp_path):
    """Images of 198 + 2 in two classes."""
    images = {f"{'ab'[k >= 198]}/{k:03d}.png": image for k, image in enumerate(pictures(200))}
    return folder_of_all(images, tmp_path / "images")


def test_a_run_of_an_earlier_version_keeps_its_split(tmp_path, by_class, monkeypatch, caplog):
    settings = {"train_data_dir": str(by_class), "dataset_name": None, "max_train_steps": 2}
    earlier = train(tiny_config(tmp_path / "run", **settings, held_out_split="random"))
    state = tmp_path / "run/checkpoint-2/state.json"
    saved = json.loads(state.read_text())
    del saved["seal"], saved["settings"]["held_out_split"], saved["settings"]["group_by"]
    monkeypatch.setattr("ddpm_hf.training.checkpoints._seal", lambda state: "as it was")
    state.write_text(json.dumps({**saved, "seal": "as it was"}))
    settings |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    resumed = train(tiny_config(tmp_path / "run", **settings))
    assert resumed.images.fingerprint == earlier.images.fingerprint
    assert "are not those of the checkpoint" not in caplog.text
    assert json.loads((tmp_path / "run/train_config.json").read_text())["held_out_split"] == "random"
    with pytest.raises(ValueError, match="group_by='folder': the run to resume has held out images of all groups"):
        train(tiny_config(tmp_path / "run", **settings, group_by="folder"))


def test_a_run_is_not_resumed_with_other_groups(tmp_path, by_class):
    settings = {"train_data_dir": str(by_class), "dataset_name": None, "max_train_steps": 1}
    train(tiny_config(tmp_path / "run", **settings, group_by=r"/(\d)"))
    settings["resume_from_checkpoint"] = "latest"
    with pytest.raises(
        ValueError, match="group_by=None: the run to resume had group_by='/.*', and with another one it"
    ):
        train(tiny_config(tmp_path / "run", **settings))
    assert train(tiny_config(tmp_path / "run", **settings, group_by=r"/(\d)")).finished


def test_settings_of_earlier_versions_mean_the_earlier_split(tmp_path, by_class):
    new, old = resolve({"train_data_dir": str(by_class)}), tmp_path / "train_config.json"
    new.save(old)
    assert DataConfig.from_json(old).held_out_split == resolve({"config": str(old)}).held_out_split == "stratified"
    without_split(old)
    for read in (DataConfig.from_json(old), resolve({"config": str(old)})):
        train, held_out = load_images(read)
        kept, aside = random_split(200)
        assert train.labels.tolist() == [int(k >= 198) for k in kept]
        assert held_out.labels.tolist() == [int(k >= 198) for k in aside]
    with pytest.raises(ValueError, match="group_by='folder' needs held_out_split='stratified', not 'random'"):
        DataConfig.from_json(old, group_by="folder")
