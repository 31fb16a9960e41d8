"""Files that Pillow would read with a loss of bits or bands.

JPEG 2000; PNM, PNG, JPEG XL, HEIC and AVIF of more than 8 bits.
"""

import io
import re
import struct

import numpy as np
from PIL import Image

from ddpm_hf.data.pages import BadImage, Pages, check_size

JP2_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # a file, or a codestream alone
SIZ = b"\xff\x4f\xff\x51"  # begins a codestream: the sizes and depths of its components follow
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # gray of more than 8 bits
PNM_HEAD = re.compile(rb"P([2356])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s")


def exact_pages(content: bytes) -> Pages | None:
    """The image in such a file; None if the file is of another kind.

    Raises:
        BadImage: the header is damaged, or the image is too large.
    """
    if content.startswith(JP2_MAGIC) and b"pclr" not in content[:4096]:  # Pillow reads those with a palette
        return _jpeg2000(content)
    head = PNM_HEAD.match(content)
    if head is not None and int(head[4]) > 255:
        return _pnm(content, head)
    return None


def _jpeg2000(content: bytes) -> Pages:
    import imagecodecs

    at = content.find(SIZ)
    if at < 0 or len(content) < at + 43:
        raise BadImage("is cut off")
    right, bottom, left, top = struct.unpack(">4I", content[at + 8 : at + 24])
    (bands,) = struct.unpack(">H", content[at + 40 : at + 42])
    size = (bottom - top) * (right - left) * bands * (1 + (content[at + 42] % 128 > 7))
    check_size(size, (bottom - top, right - left, bands))

    def read(k: int) -> tuple[np.ndarray, bool]:
        pixels = imagecodecs.jpeg2k_decode(content)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if bands not in (2, 4) or not _has_opacity(content[:at]):
            return pixels, False
        return _with_full_opacity(pixels, content[at + 42] % 128 + 1), True

    return Pages(1, "image", read, nbytes=size)


def bits_of(image: Image.Image, content: bytes) -> int:
    """The bits of a value in a PNG, HEIC or AVIF file that Pillow has opened; 8 of another file."""
    if image.format == "PNG":
        return content[24]
    if image.format == "HEIF":
        return image.info.get("bit_depth", 8)
    at = content.find(b"av1C") if image.format == "AVIF" else -1
    if at < 0 or len(content) < at + 7:
        return 8
    is_deep, is_deepest = content[at + 6] & 0x40, content[at + 6] & 0x20  # high_bitdepth and twelve_bit
    return (12 if is_deepest else 10) if is_deep else 8


def exact_pixels(image: Image.Image, content: bytes) -> np.ndarray | None:
    """The current frame (H, W, C) of a file of more than 8 bits, as it is stored; None if Pillow reads it right."""
    bits, frame = bits_of(image, content), image.tell()
    if bits <= 8 and (image.format, image.mode) not in (("JXL", "LA"), ("JXL", "RGB"), ("JXL", "RGBA")):
        return None
    import imagecodecs

    if image.format == "PNG":
        if "transparency" in image.info:
            raise BadImage("has 16 bits and a transparent colour (a tRNS chunk), which is not supported")
        if image.mode in DEEP_MODES:
            return None
        if getattr(image, "is_animated", False):
            raise BadImage("is an animation of 16 bits in colour, which is not supported")
        pixels = imagecodecs.png_decode(content)
    elif image.format == "JXL":
        pixels = imagecodecs.jpegxl_decode(content)
        if pixels.dtype == np.uint8:
            return None
    elif image.format == "AVIF":
        pixels = imagecodecs.avif_decode(content, index=frame)
    else:
        import pillow_heif

        found = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=False)[frame]
        pixels = np.asarray(found) >> (16 - bits)  # it has moved them to the upper bits
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    has_opacity = image.format in ("AVIF", "HEIF") and pixels.shape[2] in (2, 4)
    return _with_full_opacity(pixels, bits) if has_opacity else pixels


def _with_full_opacity(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Of pixels of `bits` in a larger type, what is opaque gets the largest number of the type, as readers expect."""
    most = np.iinfo(pixels.dtype).max
    opacity = (pixels[..., -1:].astype(np.float64) * (most / (2**bits - 1))).round().clip(0, most)
    return np.concatenate([pixels[..., :-1], opacity.astype(pixels.dtype)], axis=2)


def _has_opacity(head: bytes) -> bool:
    """Whether the channel definitions (`cdef`) in the header of a JP2 file have one of opacity."""
    at = head.find(b"cdef")
    if at < 0 or len(head) < at + 6:
        return False
    (number,) = struct.unpack(">H", head[at + 4 : at + 6])
    kinds = [head[k + 2 : k + 4] for k in range(at + 6, at + 6 + 6 * number, 6)]
    return b"\0\1" in kinds


def _pnm(content: bytes, head: re.Match) -> Pages:
    kind, width, height = int(head[1]), int(head[2]), int(head[3])
    shape = (height, width, 3 if kind in (3, 6) else 1)
    number = height * width * shape[2]
    check_size(2 * number, shape)

    def read(k: int) -> tuple[np.ndarray, bool]:
        values = content[head.end() :]
        pixels = np.array(values.split(), np.uint16) if kind in (2, 3) else np.frombuffer(values[: 2 * number], ">u2")
        if len(pixels) < number:
            raise BadImage(f"is cut off: it has {len(pixels):,} of {number:,} values")
        return pixels[:number].astype(np.uint16).reshape(shape), False

    return Pages(1, "image", read, nbytes=2 * number)
