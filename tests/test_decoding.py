"""Images of every kind, and files that are none."""

import io
import re
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
import torch
from PIL import Image
from torch.testing import assert_close

from ddpm_hf.data import pages as limits
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.reading import ORIENTED, BadImage, count_images, is_image_file, read_image

HEIGHT, WIDTH = 5, 7
rng = np.random.default_rng(0)
GRAY = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
RGB = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
RGBA = rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
DEEP_RGB = rng.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
BANDS = rng.integers(0, 4096, (HEIGHT, WIDTH, 5), dtype=np.uint16)
FLOATS = rng.standard_normal((HEIGHT, WIDTH)).astype(np.float32)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def tiff(array, **settings) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def png16(array) -> bytes:
    import imagecodecs

    return imagecodecs.png_encode(array)


def array_file(path, array, **settings):
    np.save(path / "a.npy", array, **settings)
    return path / "a.npy"


def as_pillow_reads(image: Image.Image, kind: str, **settings) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(image, kind, **settings))).convert("RGB"))


PALETTE = Image.fromarray(RGB).quantize(16)
CMYK = Image.fromarray(RGB).convert("CMYK")
KINDS = {  # content -> colours (H, W, C), whether there is opacity
    "gray": (encoded(Image.fromarray(GRAY), "PNG"), GRAY[..., None], False),
    "one bit": (encoded(Image.fromarray(GRAY > 99), "PNG"), (GRAY > 99)[..., None] * np.uint8(255), False),
    "gray+alpha": (encoded(Image.fromarray(RGBA[..., :2].copy()), "PNG"), RGBA[..., :1], True),
    "palette": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), False),
    "CMYK": (encoded(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB")), False),
    "RGB": (encoded(Image.fromarray(RGB), "PNG"), RGB, False),
    "RGB TIFF": (tiff(RGB, photometric="rgb"), RGB, False),
    "RGBA": (encoded(Image.fromarray(RGBA), "PNG"), RGBA[..., :3], True),
    "16-bit PNG": (encoded(Image.fromarray(DEEP), "PNG"), DEEP[..., None], False),
    "16-bit TIFF": (tiff(DEEP), DEEP[..., None], False),
    "big-endian TIFF": (tiff(DEEP, byteorder=">"), DEEP[..., None], False),
    "compressed TIFF": (tiff(DEEP_RGB, photometric="rgb", compression="lzw"), DEEP_RGB, False),
    "16-bit RGB PNG": (png16(DEEP_RGB), DEEP_RGB, False),
    "16-bit RGB TIFF": (tiff(DEEP_RGB, photometric="rgb"), DEEP_RGB, False),
    "float TIFF": (tiff(FLOATS), FLOATS[..., None], False),
    "5 bands": (tiff(BANDS, photometric="minisblack", planarconfig="contig"), BANDS, False),
    "5 planes": (
        tiff(np.moveaxis(BANDS, 2, 0).copy(), photometric="minisblack", planarconfig="separate"), BANDS, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_it_is_stored(kind):
    content, expected, has_opacity = KINDS[kind]
    pixels, opacity, *_ = read_image(content, None)
    assert pixels.dtype.newbyteorder("=") == expected.dtype
    assert np.array_equal(pixels, expected)
    assert (opacity is not None) == has_opacity
    if has_opacity:
        alpha = RGBA[..., -1:] if expected.shape[2] == 3 else RGBA[..., 1:2]
        assert_close(opacity, alpha.astype(np.float32) / 255)


def test_sixteen_bits_with_alpha():
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    for content in (png16(deep), tiff(deep, photometric="rgb", extrasamples=["unassalpha"])):
        pixels, opacity, *_ = read_image(content, None)
        assert np.array_equal(pixels, deep[..., :3])
        assert_close(opacity, deep[..., 3:].astype(np.float32) / 65535)


def pnm(kind: int, array, most: int) -> bytes:
    head = f"P{kind}\n# a comment\n{WIDTH} {HEIGHT}\n{most}\n".encode()
    return head + (" ".join(map(str, array.ravel())).encode() if kind < 4 else array.astype(">u2").tobytes())


def jp2(array) -> bytes:
    import imagecodecs

    return imagecodecs.jpeg2k_encode(array, level=0, reversible=True, codecformat="jp2")


LARGE = rng.integers(0, 32768, (32, 40, 5), dtype=np.uint16)  # JPEG 2000 halves the sides several times
SIGNED = LARGE[..., 0].astype(np.int16) - 9000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (jp2(LARGE[..., 0]), LARGE[..., :1]),
        (jp2(LARGE[..., :3].copy()), LARGE[..., :3]),
        (jp2(LARGE[..., :4].copy()), LARGE[..., :4]),  # four bands, none of which is opacity
        (jp2(LARGE), LARGE),
        (jp2(SIGNED), SIGNED[..., None]),
        (pnm(5, DEEP // 16, 4095), DEEP[..., None] // 16),
        (pnm(2, DEEP // 16, 4095), DEEP[..., None] // 16),
        (pnm(6, DEEP_RGB, 65535), DEEP_RGB),
        (pnm(3, DEEP_RGB, 65535), DEEP_RGB),
        (tiff(65535 - DEEP, photometric="miniswhite"), DEEP[..., None]),
        (tiff(255 - GRAY, photometric="miniswhite"), GRAY[..., None]),
    ]
    + [
        (tiff(RGB, photometric="rgb", compression=compression), RGB)
        for compression in ("lerc", "webp", "png", "jpegxl", "zstd")
    ],
)
def test_what_pillow_would_change_or_refuse(content, expected):
    for tail in (b"", b"\n"):
        pixels, opacity, *_ = read_image(content + tail, None)
        assert pixels.dtype == expected.dtype
        assert np.array_equal(pixels, expected)
        assert opacity is None


def test_opacity_of_jpeg_2000_and_jpeg_xl():
    import imagecodecs

    large = rng.integers(0, 256, (32, 40, 4), dtype=np.uint8)
    pixels, opacity, *_ = read_image(encoded(Image.fromarray(large), "JPEG2000"), None)
    assert np.array_equal(pixels, large[..., :3])
    assert np.array_equal(opacity * 255, large[..., 3:])
    if is_image_file(Path("a.jxl")):
        deep = rng.integers(0, 65536, (8, 8, 4), dtype=np.uint16)
        pixels, opacity, *_ = read_image(imagecodecs.jpegxl_encode(deep, lossless=True), None)
        assert np.array_equal(pixels, deep[..., :3])
        assert np.array_equal(opacity[..., 0] * 65535, deep[..., 3])


def test_colours_that_are_multiplied_with_the_opacity():
    alpha = np.array([0, 1, 128, 255], np.uint8)
    colours = np.array([[0, 0, 0], [1, 0, 1], [100, 128, 5], [9, 8, 7]], np.uint8)
    as_pillow = np.asarray(Image.fromarray(np.c_[colours, alpha][None], "RGBa").convert("RGBA"))[0]
    for most in (255, 65535, 2**32 - 1, 1.0):
        type = np.float32 if most == 1 else np.min_scalar_type(most)
        array = np.round(np.c_[colours, alpha] * (most / 255), 6).astype(type)
        straight = read_image(tiff(array[None], photometric="rgb", extrasamples=["assocalpha"]), None).colours[0]
        if most == 255:
            assert np.array_equal(straight, as_pillow[:, :3])
        expected = colours[2:] / alpha[2:, None] * most
        assert np.abs(straight[2:] - expected).max() <= max(1e-5, most / 2**16, most > 1)
    gray = tiff(np.array([[[60, 120]]], np.uint8), photometric="minisblack", extrasamples=["assocalpha"])
    assert read_image(gray, None).colours.item() == 127


def test_a_file_of_a_stack_says_nothing_of_the_other_files(caplog):
    """OME-TIFF of one file per plane: each describes the whole stack."""
    file = io.BytesIO(tiff(np.stack([DEEP, DEEP]), photometric="minisblack", ome=True, metadata={"axes": "ZYX"}))
    description = tifffile.TiffFile(file).pages[0].description
    content = tiff(DEEP, description=description, metadata=None, photometric="minisblack")
    assert np.array_equal(read_image(content, None).colours[..., 0], DEEP)
    assert not caplog.records


def test_jpeg_of_four_inks_is_not_a_negative():
    content = encoded(Image.new("RGB", (8, 8), (250, 120, 10)).convert("CMYK"), "JPEG")
    pixels, *_ = read_image(content, None)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (250, 120, 10)).max() < 12


@pytest.mark.parametrize("array", [GRAY, RGB, BANDS, FLOATS, BANDS.astype(np.int32), BANDS.astype(np.float64)])
def test_arrays(tmp_path, array):
    expected = array.reshape(HEIGHT, WIDTH, -1)
    assert np.array_equal(read_image(array_file(tmp_path, array), None)[0], expected)
    planes = np.moveaxis(expected, 2, 0)
    assert np.array_equal(read_image(array_file(tmp_path, planes), None)[0], expected)
    truth = read_image(array_file(tmp_path, GRAY > 99), None)[0]
    assert np.array_equal(truth[..., 0], (GRAY > 99) * np.uint8(255))


def test_which_axis_holds_the_channels_can_be_said(tmp_path):
    path = array_file(tmp_path, np.zeros((5, 7, 5), np.uint8))
    assert read_image(path, None)[0].shape == (5, 7, 5)
    path = array_file(tmp_path, np.zeros((9, 4, 7), np.uint8))  # 9 bands of 4x7 or 7 of 9x4
    assert read_image(path, None)[0].shape == (9, 4, 7)
    assert read_image(path, 9)[0].shape == (4, 7, 9)
    pages = tiff(np.moveaxis(BANDS, 2, 0).copy(), photometric="minisblack")  # five pages
    assert np.array_equal(read_image(pages, 5)[0], BANDS)
    assert np.array_equal(read_image(pages, None, frames="first")[0], BANDS[..., :1])
    for channels in (None, 3):
        with pytest.raises(ValueError, match="has 5 pages: give --frames"):
            read_image(pages, channels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    """Our own turning, used for 16 bits in colour, is Pillow's."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, *_ = read_image(encoded(Image.fromarray(RGB), "PNG", exif=exif), None)
    assert np.array_equal(pixels, ORIENTED.get(orientation, lambda a: a)(RGB))
    deep = tiff(DEEP_RGB, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    assert np.array_equal(read_image(deep, None)[0], ORIENTED.get(orientation, lambda a: a)(DEEP_RGB))


# ---------------------------------------------------------------- channels


def decoded(content, **settings) -> torch.Tensor:
    settings = {"channels": None, "value_range": (0, 65535), **settings}
    return torch.from_numpy(Decoder(**settings)(content).pixels)


def of(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 2, 0)))


def test_channels_are_made_of_what_there_is():
    gray, rgb, rgba, gray_alpha = (KINDS[k][0] for k in ("gray", "RGB", "RGBA", "gray+alpha"))
    assert torch.equal(decoded(gray, channels=3), of(GRAY[..., None].repeat(3, 2)))
    luminance = np.asarray(Image.fromarray(RGB).convert("L"), dtype=int)
    assert np.abs(decoded(rgb, channels=1)[0].numpy() - luminance).max() <= 1
    deep = decoded(KINDS["16-bit TIFF"][0], channels=3)
    assert torch.equal(deep, of(DEEP[..., None].repeat(3, 2).astype(np.float32)))
    settings = {"value_range": None}
    assert torch.equal(decoded(rgba, **settings), of(RGBA))
    assert torch.equal(decoded(gray_alpha, **settings), of(RGBA[..., :2]))
    assert torch.equal(decoded(rgb, channels=4, **settings)[:3], of(RGB))
    assert (decoded(rgb, channels=4, **settings)[3] == 255).all()
    assert torch.equal(decoded(gray_alpha, channels=4, **settings)[2:], of(RGBA[..., :2]))


def test_opacity_in_deep_images_fills_the_range():
    content = png16(rng.integers(0, 4096, (4, 4, 3), dtype=np.uint16))
    alpha = decoded(content, channels=4, value_range=(0, 4095))[3]
    assert (alpha == 4095).all()


@pytest.mark.parametrize(("background", "under"), [([0.0], 0), ([1.0], 255), ([0.2, 0.4, 0.6], (51, 102, 153))])
def test_background(background, under):
    image = decoded(KINDS["RGBA"][0], background=background, value_range=None)
    alpha = RGBA[..., 3:] / 255
    assert_close(
        image, of((RGBA[..., :3] * alpha + np.array(under) * (1 - alpha)).round().astype(np.uint8)), rtol=0, atol=1
    )
    again = Image.new("RGB", (WIDTH, HEIGHT), under if isinstance(under, tuple) else (under,) * 3)
    again.paste(Image.fromarray(RGBA), mask=Image.fromarray(RGBA[..., 3].copy()))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(again)).max() <= 1


def test_a_background_of_one_colour_serves_gray_too():
    image = decoded(KINDS["gray+alpha"][0], background=[1.0], value_range=None)
    alpha = RGBA[..., 1] / 255
    assert np.abs(image[0].numpy() - (RGBA[..., 0] * alpha + 255 * (1 - alpha))).max() <= 0.51


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("RGBA", {"channels": 3}, "alpha channel, which channels=3 would lose: give --channels 4, or --background"),
        ("gray+alpha", {"channels": 1}, "would lose: give --channels 2, or --background"),
        ("5 bands", {"channels": 3}, "has 5 channels, which can't be converted to channels=3"),
        ("RGB", {"channels": 5}, "has 3 channels, which can't be converted to channels=5"),
        ("RGBA", {"background": [0.0, 1.0]}, r"has 3 colours and background=\[0.0, 1.0\] has 2"),
        (
            "float TIFF",
            {"value_range": None},
            r"has more than 8 bits \(float32, values .*: give the values of black and white as --value_range",
        ),
        ("RGB", {"channels": 1, "channels_are_inferred": True}, "has colour and the first image has none"),
    ],
)
def test_settings_that_fit_no_such_image(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        decoded(KINDS[kind][0], **settings)


def test_eight_bits_keep_their_range_among_deep_images():
    """Whatever --value_range says of others: opacity and background do not wrap around."""
    for value_range in ((0, 1), (0, 4095), (0, 65535)):
        alone = decoded(KINDS["RGBA"][0], background=[1.0], value_range=None)
        assert torch.equal(decoded(KINDS["RGBA"][0], background=[1.0], value_range=value_range), alone)
        assert torch.equal(decoded(KINDS["RGBA"][0], channels=4, value_range=value_range), of(RGBA))
        assert (decoded(KINDS["RGB"][0], channels=4, value_range=value_range)[3] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (9, 1), (9, 2), (9, 3), (1, 9)])
def test_images_of_few_rows_are_not_turned(size):
    width, height = size
    for channels in (1, 3, 4):
        array = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        image = Image.fromarray(array[..., 0] if channels == 1 else array)
        pixels, opacity, *_ = read_image(encoded(image, "PNG"), None)
        assert np.array_equal(pixels, array[..., :3])
        assert (opacity is not None) == (channels == 4)
    deep = rng.integers(0, 65536, (height, width, 3), dtype=np.uint16)
    assert np.array_equal(read_image(png16(deep), None)[0], deep)


@pytest.mark.parametrize("bands", [2, 3, 4, 5])
@pytest.mark.parametrize("planes", [False, True])
def test_no_band_of_a_tiff_is_lost(bands, planes):
    array = rng.integers(0, 256, (HEIGHT, WIDTH, bands), dtype=np.uint8)
    stored = np.moveaxis(array, 2, 0).copy() if planes else array
    settings = {"planarconfig": "separate" if planes else "contig"}
    assert np.array_equal(read_image(tiff(stored, photometric="minisblack", **settings), None)[0], array)
    if bands == 4:  # red, green, blue and near infrared
        content = tiff(stored, photometric="rgb", extrasamples=["unspecified"], **settings)
        pixels, opacity, *_ = read_image(content, None)
        assert np.array_equal(pixels, array)
        assert opacity is None
        opaque = tiff(stored, photometric="rgb", extrasamples=["unassalpha"], **settings)
        pixels, opacity, *_ = read_image(opaque, None)
        assert np.array_equal(pixels, array[..., :3])
        assert_close(opacity, array[..., 3:].astype(np.float32) / 255)


# ---------------------------------------------------------------- broken files


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


NOISE = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
PNG, JPEG = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")
BOMB = encoded(Image.new("1", (20_000, 20_000)), "PNG")


def fits(array) -> bytes:
    """A gray image of 16 bits as astronomers store it."""
    keys = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": array.shape[1], "NAXIS2": array.shape[0]}
    cards = [f"{key:8}= {value:>20}" for key, value in keys.items()] + ["END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + array.astype(">i2").tobytes().ljust(2880)


def broken_files(folder) -> dict[str, str]:
    """Write one of each; its name and what its reason must say."""
    zero_wide = b"P5\n0 5\n255\n"
    np.save(folder / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "whole.npy", np.zeros((64, 64)))
    array = (folder / "whole.npy").read_bytes()
    (folder / "whole.npy").unlink()
    contents = {
        "empty.png": (b"", "is empty"),
        "empty.npy": (b"", "is empty"),
        "truncated.jpg": (JPEG[: len(JPEG) // 2], "can't be read: .*truncated"),
        "truncated.png": (PNG[: len(PNG) // 2], "can't be read: .*"),
        "no_end.png": (PNG[:-12], "can't be read: .*"),
        "crc.png": (damaged(PNG, PNG.index(b"IDAT") + 40), "can't be read: broken PNG file"),
        "crc_alone.png": (damaged(PNG, PNG.index(b"IEND") - 5), "can't be read: broken PNG file"),
        "crc_deep.png": (damaged(png16(DEEP_RGB), 60), "can't be read: broken PNG file"),
        "text.png": (b"not an image", "is not in a known image format: it begins with b'not an image'"),
        "page.jpg": (b"<!DOCTYPE html><html>", "is not in a known image format: it begins with b'<!DOCTYPE html"),
        "zeros.png": (bytes(500), "is not in a known image format: it begins with b'\\\\x00"),
        "magic.png": (b"\x88" + PNG[1:], "is not in a known image format"),
        "truncated.tif": (tiff(np.zeros((64, 64), np.uint16))[:3000], "can't be read: .*"),
        "truncated8.tif": (tiff(np.zeros((64, 64, 3), np.uint8), photometric="rgb")[:3000], "can't be read: .*"),
        "bomb.png": (BOMB, "is too large: Image size .* exceeds limit"),
        "zero_wide.pgm": (zero_wide, "is not in a known image format|is 0x5 pixels"),
        "corrupt.npy": (damaged(array, 20), "can't be read: .*"),
        "truncated.npy": (array[:1000], "can't be read: .*"),
        "magic.npy": (b"x" + array[1:], "is not a .npy file: it begins with b.xNUMPY"),
        "opacity.tif": (
            tiff(np.full((4, 4, 4), 200, np.float32), photometric="rgb", extrasamples=["unassalpha"]),
            "has an opacity of 200 ... 200, outside .0, 1.",
        ),
        "inks.tif": (
            tiff(np.zeros((4, 4, 4), np.uint16), photometric="separated"),
            "is a TIFF file of 4 SEPARATED channels of the type uint16, which is not supported",
        ),
        "white.tif": (tiff(SIGNED, photometric="miniswhite"), "of 1 MINISWHITE channel of the type int16"),
        "volume.tif": (
            tiff(np.zeros((16, 32, 32), np.uint8), volumetric=True, tile=(16, 16, 16)),
            "has pages that are volumes of 16 planes: save it again with a page for each",
        ),
        "complex.tif": (tiff(np.zeros((4, 4), np.complex64)), "contains complex64, which are no real numbers"),
        "truncated.jp2": (jp2(LARGE)[:4000], "can't be read: "),
        "head.jp2": (jp2(LARGE)[:60], "is cut off"),
        "truncated.ppm": (pnm(6, DEEP_RGB, 65535)[:-2], "is cut off: it has 104 of 105 values"),
        "bomb.pgm": (b"P5 90000 90000 65535 ", "is too large"),
        "deep.fits": (fits(DEEP), "has more than 8 bits in the format FITS, which is not supported"),
        "deep.sgi": (encoded(Image.fromarray(RGB), "SGI", bpc=2), "has more than 8 bits in the format SGI"),
        "nan.tif": (tiff(np.full((4, 4), np.nan, np.float32)), "has values that are not finite"),
    }
    reasons = {"pickled.npy": "can't be read: .*Python objects"}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        reasons[name] = reason
    np.save(folder / "zero_wide.npy", np.zeros((5, 0), np.uint8))
    np.save(folder / "row.npy", np.zeros(5, np.uint8))
    np.save(folder / "words.npy", np.array([["a", "b"]]))
    with open(folder / "bomb.npy", "wb") as file:  # a header that lies
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (90_000, 90_000)})
    return reasons | {
        "zero_wide.npy": "is 0x5 pixels|can't be read",
        "row.npy": r"is an array of shape \(5,\)",
        "words.npy": "contains <U1, which are no real numbers",
        "bomb.npy": "can't be read|is too large",
    }


def test_every_broken_file_has_its_reason(tmp_path):
    for name, expected in broken_files(tmp_path).items():
        reason = Decoder(None, value_range=(0, 1))(tmp_path / name)
        assert isinstance(reason, BadImage), name
        assert re.search(expected, str(reason)), f"{name}: {reason}"
        assert "allow_pickle" not in str(reason)  # which is no advice for a file from somewhere


def test_errors_of_the_machine_are_not_the_file_s(tmp_path, monkeypatch):
    """An image that is left out because a disk failed for a moment would change the order of all."""
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(
        type(tmp_path), "read_bytes", lambda self: (_ for _ in ()).throw(OSError(24, "Too many open files"))
    )
    with pytest.raises(OSError, match="Too many open files"):
        Decoder(None)(tmp_path / "a.png")


def test_infinite_values_are_black_or_white_if_values_are_clipped(tmp_path):
    """Spectrograms in decibels have the logarithm of 0."""
    array = np.array([[-np.inf, -40], [0, np.inf]], np.float32)
    assert "--value_range BLACK WHITE --clip_values true" in str(Decoder(1)(array))
    clipped = Decoder(1, value_range=(-80, 0), clip_values=True)(array)
    assert clipped.pixels.tolist() == [[[-80, -40], [0, 0]]]
    constant = np.full((2, 2), -np.inf)
    assert "makes infinite ones black or white" in str(Decoder(1, value_range=(-80, 0))(constant))


def test_a_npz_file_of_one_array_is_an_image(tmp_path):
    np.savez(tmp_path / "one.npz", mel=FLOATS)
    np.savez_compressed(tmp_path / "many.npz", a=FLOATS, b=FLOATS)
    np.savez(tmp_path / "pickled.npz", a=np.array([{"a": 1}]))
    assert is_image_file(tmp_path / "one.npz")
    assert np.array_equal(read_image(tmp_path / "one.npz", None).colours[..., 0], FLOATS)
    assert count_images(tmp_path / "one.npz") == 1
    with pytest.raises(BadImage, match=r"holds 2 arrays \(a, b\): save each as a .npy file"):
        read_image(tmp_path / "many.npz", None)
    with pytest.raises(BadImage, match="can't be read"):
        read_image(tmp_path / "pickled.npz", None)


def test_a_pickle_is_never_opened(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    np.save(tmp_path / "a.npy", np.array([Dangerous()], dtype=object), allow_pickle=True)
    assert isinstance(Decoder(None)(tmp_path / "a.npy"), BadImage)
    assert not (tmp_path / "opened").exists()


def test_a_large_array_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = array_file(tmp_path, np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(limits, "MOST_BYTES", 9999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some users set it: ours still holds
    pages = tiff(np.zeros((3, 50, 50), np.uint16), photometric="minisblack")
    contents = [path, pages, *(tiff(np.zeros((100, 100), kind)) for kind in (np.uint8, np.uint16))]
    contents += [encoded(Image.new("L", (100, 100)), "PNG"), png16(np.zeros((50, 50, 3), np.uint16))]
    for content in contents:
        with pytest.raises(
            BadImage, match=r"is too large: .* bytes when decoded, more than the limit of 9,999; cut or"
        ):
            read_image(content, 3)


def test_a_sparse_array_is_refused(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (400, 8000, 8000)})
        file.truncate(400 * 8000 * 8000 + 200)  # no block on the disk
    with pytest.raises(BadImage, match="is too large: 400x8000x8000 values are 25,600,000,000 bytes"):
        read_image(tmp_path / "a.npy", None)


@pytest.mark.parametrize(("kind", "suffix", "most"), [("JXL", ".jxl", 0), ("HEIF", ".heic", 8), ("AVIF", ".avif", 8)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_formats_of_plugins(tmp_path, kind, suffix, most, channels):
    """Upright, of the channels that the file has, within what the format loses; `most` values of 256."""
    y, x = np.mgrid[:48, :64]
    planes = np.stack([2 * x + y, 4 * y, 255 - 3 * x, 255 - y], axis=-1).clip(0, 255).astype(np.uint8)[..., :channels]
    turned = Image.fromarray(np.rot90(planes).squeeze().copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    settings = {"lossless": True} if kind == "JXL" else {"quality": 100}
    turned.save(tmp_path / f"a{suffix}", kind, exif=exif.tobytes(), **settings)
    assert is_image_file(tmp_path / f"a{suffix.upper()}")
    pixels = Decoder(channels)(tmp_path / f"a{suffix}").pixels
    difference = abs(pixels.transpose(1, 2, 0).astype(int) - planes)
    assert pixels.shape == (channels, 48, 64)
    assert np.percentile(difference, 99) <= most  # subsampled colours differ at borders


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_heic_and_avif_of_more_than_eight_bits(monkeypatch, bits, channels):
    y, x = np.mgrid[:48, :64]
    most = 2**bits - 1
    planes = np.stack([2 * x + y, 4 * y, 255 - 3 * x, 255 - y], axis=-1).clip(0, 255) / 255
    planes = (planes * most).round().astype(np.uint16)[..., :channels]
    avif = imagecodecs.avif_encode(planes.squeeze(), level=100, bitspersample=bits)
    decoded = Decoder(channels, value_range=(0, most))(avif)
    assert np.array_equal(decoded.pixels.transpose(1, 2, 0).round(), planes)
    with pytest.raises(ValueError, match="has more than 8 bits .*: give the values of black and white as"):
        Decoder(channels)(avif)

    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    turned = np.rot90(planes) << (16 - bits)
    mode = {1: "I;16", 3: "RGB;16", 4: "RGBA;16"}[channels]
    image = pillow_heif.from_bytes(mode=mode, size=(48, 64), data=turned.tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(heic := io.BytesIO(), quality=-1, chroma=444, exif=exif.tobytes())
    pixels = Decoder(channels, value_range=(0, most))(heic.getvalue()).pixels.transpose(1, 2, 0)
    assert pixels.shape == planes.shape
    assert np.abs(pixels - planes).max() <= 2  # from RGB to YCbCr and back


def test_opacity_of_twelve_bits_in_jpeg_2000():
    array = rng.integers(0, 4096, (32, 40, 4), dtype=np.uint16)
    content = imagecodecs.jpeg2k_encode(array, bitspersample=12, codecformat="jp2", reversible=True, level=0)
    channels = np.array([[0, 0, 1], [1, 0, 2], [2, 0, 3], [3, 1, 0]], ">u2")  # the last one is opacity
    box = b"\0\0\0\x22cdef\0\4" + channels.tobytes()
    start = content.index(b"jp2h") - 4
    length = int.from_bytes(content[start : start + 4])
    header = (length + len(box)).to_bytes(4) + content[start + 4 : start + length] + box
    pixels = Decoder(4, value_range=(0, 4095))(content[:start] + header + content[start + length :]).pixels
    is_seen = array[..., 3:] > 0
    assert np.array_equal(pixels.transpose(1, 2, 0).round(), array * is_seen)


def test_a_file_that_calls_a_band_alpha_wrongly():
    """As GDAL writes red, green, blue and near infrared of 8 bits. Alpha would make colours black where it is 0."""
    array = rng.integers(0, 3, (8, 8, 4), dtype=np.uint8)
    content = tiff(array, photometric="rgb", extrasamples=["unassalpha"])
    seen = array * np.where(array[..., 3:] > 0, 1, [0, 0, 0, 1])
    assert np.array_equal(Decoder(4)(content).pixels.transpose(1, 2, 0), seen)
    for decoder in (Decoder(4, alpha_channel=False), Decoder(None, alpha_channel=False)):
        assert np.array_equal(decoder(content).pixels.transpose(1, 2, 0), array)
    assert np.array_equal(Decoder(4, alpha_channel=True)(array).pixels.transpose(1, 2, 0), seen)
    gray = array[..., 0]
    assert Decoder(1, alpha_channel=True)(gray).pixels.shape == (1, 8, 8)  # it has no such channel
