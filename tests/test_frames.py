"""Files that hold several images: animations, TIFF pages, reduced copies and volumes."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import decoder_of, load_images
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.reading import BadImage, count_images, read_image
from ddpm_hf.data.sources import source_of
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.recipes import for_training

rng = np.random.default_rng(0)
GRAY = rng.integers(0, 256, (5, 12, 10), dtype=np.uint8)  # frames, height, width
COLOUR = rng.integers(0, 256, (3, 12, 10, 3), dtype=np.uint8)
DEEP = rng.integers(0, 60000, (5, 12, 10), dtype=np.uint16)


def animation(frames, kind: str, **settings) -> bytes:
    file, (first, *rest) = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
    first.save(file, kind, save_all=True, append_images=rest, **settings)
    return file.getvalue()


def tiff(array, **settings) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def flat_frames(n: int = 3, size=(10, 12)) -> list[np.ndarray]:
    """Frames of one colour each, which a palette holds exactly."""
    return [np.full((*size[::-1], 3), (20 * k + 5, 200 - 40 * k, 60), np.uint8) for k in range(n)]


KINDS = {  # content, its frames (H, W, C), what one is called
    "gray TIFF": (tiff(GRAY, photometric="minisblack"), GRAY[..., None], "page"),
    "TIFF of Pillow": (animation(GRAY, "TIFF"), GRAY[..., None], "page"),
    "OME-TIFF": (tiff(GRAY, photometric="minisblack", ome=True, metadata={"axes": "ZYX"}), GRAY[..., None], "page"),
    "ImageJ": (tiff(GRAY, imagej=True), GRAY[..., None], "page"),
    "16-bit TIFF": (tiff(DEEP, photometric="minisblack", compression="zlib"), DEEP[..., None], "page"),
    "RGB TIFF": (tiff(COLOUR, photometric="rgb"), COLOUR, "page"),
    "GIF": (animation(flat_frames(), "GIF"), flat_frames(), "frame"),
    "WebP": (animation(COLOUR, "WEBP", lossless=True), COLOUR, "frame"),
    "APNG": (animation(COLOUR, "PNG"), COLOUR, "frame"),
    "gray APNG": (animation(GRAY, "PNG"), GRAY[..., None], "frame"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_an_image(kind):
    content, frames, _ = KINDS[kind]
    assert count_images(content) == len(frames)
    for k in [*range(len(frames)), 1, 0]:  # also backwards
        assert np.array_equal(read_image(content, None, frames="all", frame=k).colours, frames[k])
    assert np.array_equal(read_image(content, None, frames="first").colours, frames[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_is_dropped_in_silence(kind):
    content, frames, word = KINDS[kind]
    asks = f"has {len(frames)} {word}s: give --frames all .*, --frames channels .* or --frames first"
    for channels in (None, 1, 3 if len(frames) == 5 else 7):
        with pytest.raises(ValueError, match=asks):
            Decoder(channels, value_range=(0, 65535))(content)


def test_gray_pages_are_channels_if_that_is_their_number():
    for content in (KINDS["gray TIFF"][0], KINDS["ImageJ"][0]):
        for settings in ({"channels": 5}, {"frames": "channels", "channels": None}):
            assert np.array_equal(read_image(content, **settings).colours, np.moveaxis(GRAY, 0, 2))
    with pytest.raises(ValueError, match="has 5 channels, which can't be converted to channels=3"):
        Decoder(3, frames="channels")(KINDS["gray TIFF"][0])
    # three frames of a film in colour are not the colours of one image
    with pytest.raises(ValueError, match="has 3 frames: give --frames all"):
        Decoder(3)(KINDS["APNG"][0])
    with pytest.raises(ValueError, match="has pages of 3 channels, and --frames channels makes one channel of each"):
        Decoder(None, frames="channels")(KINDS["RGB TIFF"][0])
    sizes = [Image.new("L", size) for size in ((4, 4), (4, 5))]
    sizes[0].save(several := io.BytesIO(), "TIFF", save_all=True, append_images=sizes[1:])
    with pytest.raises(ValueError, match="has pages of several sizes or types, which are no channels of one image"):
        Decoder(None, frames="channels")(several.getvalue())


def test_frames_of_a_transparent_animation():
    """A frame that is drawn over an opaque one is opaque; transparency that is seen stays."""
    frames = [np.zeros((6, 6, 4), np.uint8) for _ in range(2)]
    for k, frame in enumerate(frames):
        frame[k : k + 3] = (250, 10 * k, 0, 255)
    content = animation(frames, "GIF", disposal=2)
    for k, frame in enumerate(frames):
        colours, opacity, *_ = read_image(content, None, frame=k)
        assert np.array_equal(opacity[..., 0], frame[..., 3] / 255)
        assert np.array_equal(colours[opacity[..., 0] == 1], frame[frame[..., 3] == 255][:, :3])
    for k in range(3):
        assert read_image(KINDS["GIF"][0], None, frame=k).opacity is None


def overviews(array, first: bool, **settings) -> bytes:
    """A TIFF file with its reduced copies before or after it, and a transparency mask."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        copies = [(array[::2, ::2], 1), (array[::4, ::4], 1), (np.ones(array.shape[:2], bool), 4)]
        for pixels, kind in [*copies, (array, 0)] if first else [(array, 0), *copies]:
            own = settings if kind != 4 else {"photometric": "mask"}
            writer.write(np.ascontiguousarray(pixels), subfiletype=kind, metadata=None, **own)
    return file.getvalue()


@pytest.mark.parametrize("first", [False, True])
def test_reduced_copies_are_no_images_and_no_bands(first):
    rgb = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    bands = rng.integers(0, 4000, (16, 20, 4), dtype=np.uint16)
    for array, kind in ((rgb, "rgb"), (rgb[..., 0], "minisblack"), (bands, "minisblack")):
        extra = {"planarconfig": "contig"} if array is bands else {}
        content = overviews(array, first, photometric=kind, **extra)
        assert count_images(content) == 1
        for settings in ({}, {"frames": "first"}, {"frames": "channels"}, {"channels": 4}):
            colours = read_image(content, **{"channels": None, **settings}).colours
            assert np.array_equal(colours, array.reshape(16, 20, -1))


def test_the_thumbnail_of_a_photo_is_no_frame():
    """As cameras and phones write them: MPO with a first image that is the photo, and layers of Photoshop."""
    frames = [Image.fromarray(frame) for frame in COLOUR]
    frames[0].save(file := io.BytesIO(), "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(file).n_frames == 3
    assert count_images(file.getvalue()) == 1
    assert read_image(file.getvalue(), None).colours.shape == (12, 10, 3)


@pytest.mark.parametrize("settings", [{"imagej": True}, {}])
def test_a_page_that_stands_for_many_is_not_taken_for_one(settings):
    content = tiff(GRAY, photometric="minisblack", truncate=True, **settings)
    assert Image.open(io.BytesIO(content)).n_frames == 1
    reason = Decoder(None, frames="first")(content)
    assert str(reason).startswith("has one page that stands for an array of shape (5, 12, 10), which is not supported")


STACK = rng.integers(0, 4000, (2, 3, 4, 8, 10), dtype=np.uint16)  # times, slices, channels


@pytest.mark.parametrize(
    ("axes", "imagej"), [("TZCYX", True), *((axes, False) for axes in ("TZCYX", "TCZYX", "ZTCYX", "CTZYX"))]
)
def test_the_channels_of_a_stack_make_one_image(axes, imagej):
    """A stack of a microscope whose file says which pages are its times, slices and channels, in any order."""
    stack = STACK.transpose(["TZCYX".index(axis) for axis in axes])
    content = tiff(
        np.ascontiguousarray(stack), imagej=imagej, ome=not imagej, metadata={"axes": axes}, photometric="minisblack"
    )
    advice = "24 pages: give .* --frames composite .the 4 channels make one image.*that they are .*4 channels"
    with pytest.raises(ValueError, match=advice):
        read_image(content, None)
    assert count_images(content) == 24
    assert count_images(content, frames="composite") == 6
    first, second = (axis for axis in axes if axis in "TZ")
    slow_z = STACK.swapaxes(0, 1) if (first, second) == ("Z", "T") else STACK
    expected = slow_z.reshape(6, 4, 8, 10).transpose(0, 2, 3, 1)
    for k in range(6):
        assert np.array_equal(read_image(content, None, "composite", k).colours, expected[k])


def test_composites_of_files_that_have_none():
    flat = tiff(STACK[0, 0], ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    assert count_images(flat, frames="composite") == 1
    assert np.array_equal(read_image(flat, None, "composite").colours, STACK[0, 0].transpose(1, 2, 0))
    slices = tiff(STACK[0, :, 0], imagej=True, metadata={"axes": "ZYX"})
    assert np.array_equal(read_image(slices, None, "composite", 1).colours[..., 0], STACK[0, 1, 0])
    assert np.array_equal(read_image(tiff(STACK[0, 0, 0]), None, "composite").colours[..., 0], STACK[0, 0, 0])
    plain = tiff(STACK[0, 0], photometric="minisblack", metadata=None)
    for content in (plain, tiff(COLOUR, photometric="rgb")):
        with pytest.raises(ValueError, match="does not say which are the channels"):
            count_images(content, frames="composite")


def test_a_folder_of_stacks(tmp_path):
    for k in range(4):
        tifffile.imwrite(tmp_path / f"{k}.tif", STACK + k, imagej=True, metadata={"axes": "TZCYX"})
    config = DataConfig(train_data_dir=str(tmp_path), frames="composite", value_range=[0, 4010])
    images, held_out = load_images(config)
    assert (images.shape, len(images), len(held_out)) == ((4, 8, 10), 18, 6)  # the images of a file stay together
    with pytest.raises(ValueError, match="reads one image a row, and frames=composite reads several"):
        DataConfig(train_data_dir=str(tmp_path), frames="composite", streaming=True)


def test_signed_bytes_are_not_taken_for_unsigned_ones():
    array = np.array([[-5, 7]], np.int8)
    assert np.array_equal(read_image(tiff(array, photometric="minisblack"), None).colours[..., 0], array)


# ---------------------------------------------------------------- volumes


def test_a_volume_is_not_taken_for_channels(tmp_path):
    volume = rng.integers(0, 1000, (20, 24, 28)).astype(np.float32)
    np.save(tmp_path / "v.npy", volume)
    for channels in (None, 1, 3):
        with pytest.raises(ValueError, match=r"shape \(20, 24, 28\), a volume .* --slices .* or --channels 20"):
            Decoder(channels, value_range=(0, 1000))(tmp_path / "v.npy")
    assert read_image(tmp_path / "v.npy", 20).colours.shape == (24, 28, 20)
    for axis in range(3):
        assert count_images(tmp_path / "v.npy", axis) == volume.shape[axis]
        for k in (0, 7):
            assert np.array_equal(
                read_image(tmp_path / "v.npy", None, slices=axis, frame=k).colours[..., 0], volume.take(k, axis)
            )


def test_an_array_of_many_images(tmp_path):
    images = rng.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    reason = Decoder(None)(tmp_path / "images.npy")
    assert isinstance(reason, BadImage)
    assert "give --slices with this axis" in str(reason)
    assert load_images(config(tmp_path, slices=0))[1] is None  # the images of one file stay together
    train, held_out = load_images(config(tmp_path, slices=0, held_out_split="random"))
    assert (len(train), len(held_out)) == (5, 1)
    assert {p.numpy().tobytes() for p in [*train.pixels, *held_out.pixels]} == {
        np.moveaxis(image, 2, 0).tobytes() for image in images
    }
    np.save(tmp_path / "images.npy", images[0])
    with pytest.raises(ValueError, match=r"images.npy is an array of shape \(12, 10, 3\), which has no slices along"):
        load_images(config(tmp_path, slices=3))


# ---------------------------------------------------------------- data sets


def config(folder, **settings) -> TrainConfig:
    return TrainConfig(train_data_dir=str(folder), output_dir=str(folder / "out"), **settings)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_of_animations(tmp_path, workers):
    for name, content in (("a.gif", KINDS["GIF"][0]), ("b.webp", KINDS["WebP"][0]), ("c.png", KINDS["APNG"][0])):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="gif has 3 frames: give --frames all"):
        load_images(config(tmp_path))
    settings = config(tmp_path, frames="all", dataloader_num_workers=workers)
    train, held_out = load_images(settings)
    stored = [frame for kind in ("GIF", "WebP", "APNG") for frame in KINDS[kind][1]]
    assert len(train) + len(held_out) == len(stored) == 9
    seen = {p.permute(1, 2, 0).contiguous().numpy().tobytes() for p in [*train.pixels, *held_out.pixels]}
    assert seen == {frame.tobytes() for frame in stored}
    aside = {p.permute(1, 2, 0).contiguous().numpy().tobytes() for p in held_out.pixels}  # all frames of one file
    assert aside in [{frame.tobytes() for frame in KINDS[kind][1]} for kind in ("GIF", "WebP", "APNG")]
    items = source_of(settings)[0]
    assert all(item.group == item.name for item in items)
    assert [item.name.rpartition("/")[2] for item in items] == ["a.gif"] * 3 + ["b.webp"] * 3 + ["c.png"] * 3
    assert [str(item).partition(" ")[2] for item in items] == ["frame 0", "frame 1", "frame 2"] * 3
    assert [items[k] for k in range(len(items))] == list(items)


def test_a_file_of_many_frames_is_read_once(tmp_path, monkeypatch):
    for name in ("a.gif", "b.gif"):
        (tmp_path / name).write_bytes(animation(flat_frames(5), "GIF"))
    items = source_of(config(tmp_path, frames="all"))[0]
    assert len(items) == 10
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    images = [read_image(item.source, None, "all", item.frame).colours for item in items]
    assert reads == ["a.gif", "b.gif"]
    (tmp_path / "b.gif").write_bytes(animation(flat_frames(6)[::-1], "GIF"))  # a file that has changed
    assert not np.array_equal(read_image(tmp_path / "b.gif", None, "all", 4).colours, images[9])


def test_a_broken_frame_is_named(tmp_path):
    (tmp_path / "a.tif").write_bytes(KINDS["16-bit TIFF"][0])
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages[3].dataoffsets[0]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[at : at + 8] = b"\xff" * 8
    (tmp_path / "a.tif").write_bytes(content)
    settings = config(tmp_path, frames="all", value_range=[0, 65535], max_bad_fraction=0.3)
    train, _ = load_images(settings)
    assert len(train) == 4
    ((name, reason),) = train.bad
    assert name.endswith("a.tif frame 3")
    assert reason.startswith("can't be read: ")


def test_animations_in_parquet_files(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    contents = [KINDS["APNG"][0], KINDS["gray APNG"][0]]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    train, held_out = load_images(config(tmp_path, frames="all", channels=3))
    assert sorted([*train.labels.tolist(), *held_out.labels.tolist()]) == [0] * 3 + [1] * 5
    with pytest.raises(ValueError, match="streaming=True reads one image a row, and frames=all reads several"):
        config(tmp_path, frames="all", streaming=True, max_train_steps=3)


def test_the_recipe_is_chosen_by_a_slice(tmp_path, capsys):
    np.save(tmp_path / "v.npy", rng.integers(0, 256, (20, 30, 40), dtype=np.uint8))
    flags = {"train_data_dir": str(tmp_path), "slices": 0}
    assert for_training(flags).config == "mnist"
    assert "1x30x40" in capsys.readouterr().out


def test_more_frames_than_a_file_can_hold():
    content = bytearray(KINDS["APNG"][0])
    at = content.index(b"acTL")
    import zlib

    content[at + 4 : at + 8] = (10**9).to_bytes(4, "big")
    content[at + 12 : at + 16] = zlib.crc32(content[at : at + 12]).to_bytes(4, "big")
    assert count_images(bytes(content)) == 1
    reason = Decoder(None, frames="all")(bytes(content))
    assert str(reason).startswith("is broken: it says that it has 1,000,000,000 frames")


def test_the_embedded_digits_have_no_frames():
    images, _ = load_images(TrainConfig(frames="all"))
    assert isinstance(images.pixels, torch.Tensor)
    assert decoder_of(TrainConfig(frames="first")).frames == "first"
