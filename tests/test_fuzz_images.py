"""Damaged files of every kind end as an image, or in one sentence, and never hang."""

import functools
import gzip
import io
import tempfile
import time
import zipfile
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pillow_heif
import pytest
import test_medical
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid

from ddpm_hf.data import pages
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decoding import Decoded, Decoder
from ddpm_hf.data.pages import BadImage, WrongSetting
from ddpm_hf.data.reading import count_images

SECONDS, LONGEST = 5, 500


def saved(kind: str, *arrays, **options) -> bytes:
    images = [Image.fromarray(array) for array in arrays]
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(file := io.BytesIO(), kind, **more, **options)
    return file.getvalue()


def tiff(array, **options) -> bytes:
    tifffile.imwrite(file := io.BytesIO(), array, **options)
    return file.getvalue()


def dicom(array, **tags) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return test_medical.dicom(Path(folder, "a.dcm"), array, **tags).read_bytes()


def heic(array) -> bytes:
    image = pillow_heif.from_bytes(mode="RGB;16", size=array.shape[1::-1], data=array.tobytes())
    image.save(file := io.BytesIO(), quality=50)
    return file.getvalue()


def encoded_dicom(frames, syntax, encode) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return test_medical.compressed(Path(folder, "a.dcm"), frames, syntax, *map(encode, frames)).read_bytes()


def nifti(array) -> bytes:
    return nibabel.Nifti1Image(array, np.eye(4)).to_bytes()


@functools.cache
def originals() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (8, 6, 3), dtype=np.uint8) for _ in range(3)]
    gray, deep = rng.integers(0, 256, (3, 8, 6), dtype=np.uint8), rng.integers(0, 65536, (3, 8, 6), dtype=np.uint16)
    np.save(array := io.BytesIO(), deep)
    return {
        "png": saved("PNG", frames[0]), "apng": saved("PNG", *frames), "gif": saved("GIF", *frames),
        "webp": saved("WEBP", *frames), "jpg": saved("JPEG", frames[0]), "pages": tiff(gray, photometric="minisblack"),
        "deep": tiff(deep, photometric="minisblack", compression="zlib"), "npy": array.getvalue(),
        "colour": saved("TIFF", *frames, compression="tiff_lzw"),
        "jp2": imagecodecs.jpeg2k_encode(np.tile(deep[0], (4, 4)), reversible=True, codecformat="jp2"),
        "ppm": b"P5 6 8 4095 " + (deep[0] // 16).astype(">u2").tobytes(),
        "straight": tiff(deep[0].repeat(4).reshape(8, 6, 4), photometric="rgb", extrasamples=["assocalpha"]),
        "nodata": tiff(deep[0].astype(np.float32), extratags=[(42113, "s", 0, "-9999", True)]),
        "dicom": dicom(deep, RescaleSlope=1, RescaleIntercept=-1024), "nii": nifti(deep),
        "nii.gz": gzip.compress(nifti(deep)), "nii of a series": nifti(deep[..., None, None] * np.ones((1, 1, 2, 3))),
        "avif": imagecodecs.avif_encode(rng.integers(0, 1024, (8, 6, 3), dtype=np.uint16), bitspersample=10),
        "heic": heic(rng.integers(0, 65536, (16, 16, 3), dtype=np.uint16)),
        "compressed dicom": encoded_dicom(deep, uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode),
    }  # fmt: skip


def damage(content: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    """Bytes at fractions of the length are replaced, and what follows the fraction `cut` is cut off."""
    content = bytearray(content)
    for where, byte in changes:
        content[int(where * len(content))] = byte
    return bytes(content[: int(cut * len(content)) + 1])


FRACTION = st.floats(0, 1, exclude_max=True)
AT_THE_START = st.floats(0, 0.1)  # headers
CHANGES = st.lists(st.tuples(FRACTION | AT_THE_START, st.integers(0, 255)), max_size=8)
WAYS = st.sampled_from([{}, {"frames": "all"}, {"frames": "first"}, {"frames": "channels"}, {"nodata": "tag"}])


@pytest.fixture
def _small(monkeypatch):
    """A false header of a few bytes may ask for as much memory as the limit allows, which takes its time to fill."""
    monkeypatch.setattr(pages, "MOST_BYTES", 2**22)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kind", list(originals()))
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CHANGES, FRACTION | st.just(0.9999), WAYS, st.sampled_from([None, 1, 3, 4]), st.none() | st.integers(1, 40))
def test_damaged_files(tmp_path_factory, kind, changes, cut, ways, channels, side):
    source = damage(originals()[kind], changes, cut)
    if kind == "npy":
        path = tmp_path_factory.getbasetemp() / "damaged.npy"
        path.write_bytes(source)
        source = path
    if kind.startswith(("npy", "nii")):
        ways = {"slices": 0} if ways else {}
    began = time.perf_counter()
    try:
        number = count_images(source, ways.get("slices"))
    except WrongSetting:  # a volume without slices, which the decoder refuses too
        number = 1
    several = number > 1 and (ways.get("frames") == "all" or "slices" in ways)
    decoder = Decoder(channels, side, (-1024, 65535), **ways)
    for frame in range(min(number, 4)) if several else [None]:
        try:
            result = decoder(source, frame)
        except ValueError as error:
            result = error
        if isinstance(result, Decoded):
            assert result.pixels.ndim == 3
            assert result.pixels.dtype in (np.uint8, np.float32)
            assert side is None or result.pixels.shape[1:] == (side, side)
        else:
            assert type(result) in (ValueError, BadImage, WrongSetting)
            assert 0 < len(str(result)) <= LONGEST
            assert "\n" not in str(result)
    assert time.perf_counter() - began < SECONDS


@functools.cache
def archive() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as into:
        for k, kind in enumerate(("png", "jpg", "png", "jpg")):
            into.writestr(f"{'ab'[k // 2]}/{k}.{kind}", originals()[kind])
        into.writestr("metadata.csv", "file_name,label\na/0.png,x\nb/2.png,y\n")
    return file.getvalue()


@pytest.mark.usefixtures("_small")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(FRACTION | st.floats(0.6, 1, exclude_max=True), st.integers(0, 255)), max_size=6), FRACTION)
def test_damaged_archives(tmp_path_factory, changes, cut):
    """Its directory is in the last 40 %."""
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(damage(archive(), changes, max(cut, 0.9999 * (cut > 0.2))))
    began = time.perf_counter()
    config = DataConfig(train_data_dir=str(path), output_dir="elsewhere", max_bad_fraction=0.9, resolution=4)
    try:
        result = load_images(config)[0].shape
    except ValueError as error:
        result = str(error)
    assert result == (3, 4, 4) or (isinstance(result, str) and 0 < len(result) <= LONGEST and "\n" not in result)
    assert time.perf_counter() - began < SECONDS
