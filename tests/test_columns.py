"""Which columns are taken as images and classes."""

import io
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import tiny_config
from PIL import Image

from ddpm_hf.data.columns import class_names
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.training import train as run_training
from ddpm_hf.training.config import TrainConfig

PICTURE, TEXT, NUMBER = datasets.Image(), datasets.Value("string"), datasets.Value("int64")
CLASSES = datasets.ClassLabel(names=["a", "b", "c"])


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, np.uint8))


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


def write(folder, features, split="train", **rows):
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / f"{split}.parquet")


def config(folder, **settings):
    return TrainConfig(train_data_dir=str(folder), output_dir="elsewhere", **settings)


def labels_of(folder, **settings):
    """Brightness -> the name of the class, of all images; and the names of the classes."""
    images, held_out = load_images(config(folder, **settings))
    found = {}
    for part in filter(None, (images, held_out)):
        for pixels, label in zip(
            part.pixels, part.labels if part.labels is not None else [-1] * len(part), strict=True
        ):
            found[int(pixels[0, 0, 0])] = None if label < 0 else part.label_names[label]
    return found, images.label_names


# ---------------------------------------------------------------- images


def test_of_several_columns_of_images_one_is_asked_for(tmp_path):
    write(tmp_path, {"mask": PICTURE, "photo": PICTURE}, mask=[picture(1)], photo=[picture(2)])
    with pytest.raises(ValueError, match="several columns of type Image: mask, photo; choose the images with --image"):
        load_images(config(tmp_path))
    assert set(labels_of(tmp_path, image_column="photo")[0]) == {2}
    with pytest.raises(ValueError, match="image_column='fotos' is not a column of images of .*, which are: mask, ph"):
        load_images(config(tmp_path, image_column="fotos"))


@pytest.mark.parametrize("values", [
    [encoded(7), encoded(9)], [{"bytes": encoded(7), "path": None}, {"bytes": encoded(9), "path": "0.png"}],
], ids=["bytes", "structs"])  # fmt: skip
def test_encoded_images_without_metadata(tmp_path, values):
    """As pandas and pyarrow write them."""
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a", "b"], "content": values}), tmp_path / "train.parquet")
    assert set(labels_of(tmp_path)[0]) == {7, 9}
    features = {"thumbnail": datasets.Value("binary"), "picture": PICTURE}
    write(tmp_path / "both", features, thumbnail=[encoded(1)], picture=[picture(2)])
    assert set(labels_of(tmp_path / "both")[0]) == {2}  # what is typed as an image is one
    assert set(labels_of(tmp_path / "both", image_column="thumbnail")[0]) == {1}


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6)])
def test_arrays(tmp_path, shape):
    kind = (datasets.Array2D if len(shape) == 2 else datasets.Array3D)(shape, "uint8")
    arrays = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    write(tmp_path, {"x": kind, "label": CLASSES}, x=arrays, label=[0, 0, 0])
    images, held_out = load_images(config(tmp_path))
    first = arrays[:, None] if len(shape) == 2 else arrays if shape[0] == 3 else np.moveaxis(arrays, 3, 1)
    pixels = np.concatenate([images.pixels, held_out.pixels])
    assert {p.tobytes() for p in pixels} == {np.ascontiguousarray(a).tobytes() for a in first}
    assert images.pixels.dtype.itemsize == 1


# ---------------------------------------------------------------- classes


def two_label_columns(folder):
    write(folder, {"image": PICTURE, "coarse": CLASSES, "fine": CLASSES}, image=[picture(k) for k in range(3)],
          coarse=[0, 0, 1], fine=[2, 1, 0])  # fmt: skip
    return folder


def test_of_several_columns_of_classes_one_is_asked_for(tmp_path):
    folder = two_label_columns(tmp_path)
    assert labels_of(folder) == ({0: None, 1: None, 2: None}, None)  # without classes, nobody asks
    with pytest.raises(ValueError, match="has several columns of classes: coarse, fine; choose one with --label_"):
        run_training(config(folder, class_conditional=True))
    assert labels_of(folder, label_column="fine") == ({0: "c", 1: "b", 2: "a"}, ["a", "b", "c"])
    stream = ImageStream(config(folder, label_column="fine", streaming=True, max_train_steps=1), 0, 1)
    assert stream.label_names == ["a", "b", "c"]


def test_an_evaluation_has_the_classes_of_training(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8), k, np.uint8)) for k in range(30)]
    classes = {"coarse": [k % 2 for k in range(30)], "fine": [k % 3 for k in range(30)]}
    write(tmp_path / "data", {"image": PICTURE, "coarse": CLASSES, "fine": CLASSES}, image=pictures, **classes)
    settings = {"train_data_dir": str(tmp_path / "data"), "class_conditional": True, "max_train_steps": 1}
    run_training(tiny_config(tmp_path / "run", label_column="fine", **settings))
    quickly = {"metrics": ("drift",), "num_samples": 12, "num_inference_steps": 1, "output": tmp_path / "e.json"}
    assert evaluate(str(tmp_path / "run"), **quickly)["protocol"]["class_labels"] == "as in the training images"
    (tmp_path / "run/train_config.json").unlink()  # as of a model from elsewhere
    quickly["train_data_dir"] = settings["train_data_dir"]
    with pytest.raises(ValueError, match="the images have no classes: .* coarse, fine; choose one with --label_column"):
        evaluate(str(tmp_path / "run"), **quickly)
    assert evaluate(str(tmp_path / "run"), label_column="fine", **quickly)["protocol"]["reference"]["train"]


@pytest.mark.parametrize(("kind", "values", "expected"), [
    (NUMBER, [10, 2, -1, 3], ["10", "2", None, "3"]), (TEXT, ["t10", "t2", "", "t3"], ["t10", "t2", None, "t3"]),
    (datasets.Value("uint8"), [1, 2, None, 3], ["1", "2", None, "3"]),
    (datasets.Value("bool"), [True, False, None, True], ["True", "False", None, "True"]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["label", "kind"])
def test_columns_of_integers_and_texts(tmp_path, kind, values, expected, name):
    write(tmp_path, {"image": PICTURE, name: kind}, image=[picture(k) for k in range(8)], **{name: values * 2})
    found, names = labels_of(tmp_path, label_column=name)
    assert found == dict(enumerate(expected * 2))
    assert names == sorted(filter(None, set(expected)), key=lambda n: (len(n), n) if n != "False" else (0, n))
    assert labels_of(tmp_path)[1] == (names if name == "label" else None)
    with pytest.raises(ValueError, match="column '.*', which is not of type ClassLabel, are not known before all"):
        ImageStream(config(tmp_path, label_column=name, streaming=True, max_train_steps=1), 0, 1)


def test_captions_are_no_classes_unless_someone_says_so(tmp_path):
    captions = [f"picture {k}" for k in range(6)]
    write(tmp_path, {"image": PICTURE, "label": TEXT}, image=[picture(k) for k in range(6)], label=captions)
    images, held_out = load_images(config(tmp_path))
    assert (images.label_names, len(images), len(held_out)) == (None, 5, 1)
    assert images.no_classes.startswith("the column 'label' has 6 values for 6 images; if they are classes, choose it")
    assert labels_of(tmp_path, label_column="label")[1] == captions
    folder = folder_of(tmp_path / "folder", "x/0.png", "y/1.png")
    (folder / "metadata.csv").write_text("file_name,label\nx/0.png,a house\ny/1.png,a hill\n")
    assert labels_of(folder) == ({0: "x", 1: "y"}, ["x", "y"])
    assert labels_of(folder, label_column="label") == ({0: "a house", 1: "a hill"}, ["a hill", "a house"])


def test_the_test_split_is_labelled_by_the_names_of_the_training_split(tmp_path, caplog):
    for split, values in (("train", ["x", "y"] * 2), ("test", ["y", "z"])):
        write(tmp_path, {"image": PICTURE, "label": TEXT}, split, image=[picture(0)] * len(values), label=values)
    for given in (None, "label"):
        _, held_out = load_images(config(tmp_path, label_column=given))
        assert (held_out.label_names, held_out.labels.tolist()) == (["x", "y"], [1, -1])
    assert "images of these classes are held out and none is for training: ['z']" in caplog.text
    write(tmp_path, {"image": PICTURE, "label": TEXT}, "test", image=[picture(0)], label=["y"])  # one class
    assert load_images(config(tmp_path, label_column="label"))[1].labels.tolist() == [1]


@pytest.mark.parametrize(("kind", "values", "message"), [
    (datasets.List(CLASSES), [[0, 1], [2]], "several labels per image; one is supported"),
    (datasets.List(TEXT), [["a"], ["b"]], "several labels per image; one is supported"),
    (datasets.Value("float32"), [0.5, 1.5], "is not a column of classes, integers or texts of .*, which are: none"),
    (PICTURE, [picture(0)] * 2, "is not a column of classes, integers or texts of .*, which are: none"),
    (NUMBER, [4, 4], "the column 'kind' has fewer than two values"),
])  # fmt: skip
def test_columns_that_are_no_classes(tmp_path, kind, values, message):
    write(tmp_path, {"image": PICTURE, "kind": kind}, image=[picture(k) for k in range(2)], kind=values)
    with pytest.raises(ValueError, match=f"label_column='kind' .*{message}"):
        load_images(config(tmp_path, label_column="kind", image_column="image"))
    with pytest.raises(ValueError, match="label_column='nothing' is not a column of classes"):
        load_images(config(tmp_path, label_column="nothing", image_column="image"))


def test_several_labels_per_image_are_no_classes(tmp_path):
    write(tmp_path, {"image": PICTURE, "tags": datasets.List(CLASSES)}, image=[picture(0)], tags=[[0, 1]])
    with pytest.raises(ValueError, match="have no classes; the column 'tags' of .* has several labels per image"):
        run_training(config(tmp_path, class_conditional=True))


def test_names_of_classes():
    assert class_names(iter([3, 10, 3, None, -1, ""]), 6, False) == (["3", "10"], "")
    assert class_names(["x", None], 6, True) == (None, "fewer than two values")


def test_the_digits_have_no_columns():
    with pytest.raises(ValueError, match="the embedded digits have no columns: leave image_column and"):
        load_images(TrainConfig(label_column="label"))


# ---------------------------------------------------------------- metadata of a folder of images


def folder_of(path, *names):
    for k, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path / name)
    return path


ROWS = [("0.png", "t10"), ("sub/../1.png", "t2"), ("2.png", None), ("gone.png", "t3")]


def write_metadata(folder, kind, rows=ROWS, name="label"):
    rows = [{"file_name": file, name: label} for file, label in rows]
    if kind == "csv":
        lines = [f"file_name,{name}", *(f"{row['file_name']},{row[name] or ''}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["label", "species"])
def test_classes_in_the_metadata_of_a_folder(tmp_path, caplog, kind, name):
    folder_of(tmp_path, "0.png", "1.png", "2.png", "3.png")
    write_metadata(tmp_path, kind, name=name)
    found, names = labels_of(tmp_path, label_column=None if name == "label" else name)
    assert (found, names) == ({0: "t10", 1: "t2", 2: None, 3: None}, ["t2", "t10"])
    assert "4 images in 2 classes, 2 training images without one of these classes" in caplog.text
    assert "left out: 1 row of metadata without an image here" in caplog.text


def test_metadata_of_each_split_and_of_class_folders(tmp_path):
    folder_of(tmp_path, "train/x/0.png", "train/y/1.png", "test/x/2.png", "train/x/3.png", "train/y/4.png")
    for split, file in (("train", "x/0.png"), ("test", "x/2.png")):
        (tmp_path / split / "metadata.csv").write_text(f"file_name,caption\n{file},a picture\n")
    assert labels_of(tmp_path) == ({0: "x", 1: "y", 2: "x", 3: "x", 4: "y"}, ["x", "y"])
    rows = "file_name,label\nx/0.png,5\ny/1.png,6\nx/3.png,6\ny/4.png,5\n"
    (tmp_path / "train/metadata.csv").write_text(rows)
    (tmp_path / "test/metadata.csv").write_text("file_name,label\nx/2.png,6\n")
    assert labels_of(tmp_path) == ({0: "5", 1: "6", 2: "6", 3: "6", 4: "5"}, ["5", "6"])


def test_masks_in_the_metadata_are_no_images(tmp_path):
    folder_of(tmp_path, "0.png", "masks/0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name\n0.png,masks/0.png\n1.png,\n")
    with pytest.raises(ValueError, match="metadata.csv' has several columns of type Image: image, mask; choose the"):
        load_images(config(tmp_path))
    assert set(labels_of(tmp_path, image_column="image")[0]) == {0, 2}
    assert set(labels_of(tmp_path, image_column="mask")[0]) == {1}


@pytest.mark.parametrize("content", ["", "name,label\n0.png,a\n", "\xff\xfe\0", "file_name"])
def test_other_files_of_that_name(tmp_path, caplog, content):
    folder_of(tmp_path, "x/0.png", "y/1.png")
    (tmp_path / "metadata.csv").write_text(content, encoding="latin-1")
    assert labels_of(tmp_path) == ({0: "x", 1: "y"}, ["x", "y"])
    with pytest.raises(ValueError, match="label_column='kind'"):
        load_images(config(tmp_path, label_column="kind"))
