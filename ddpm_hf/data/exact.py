"""Files that Pillow would read with a loss of bits or bands: JPEG 2000, and PNM of more than 8 bits."""

import re
import struct

import numpy as np

from ddpm_hf.data.pages import BadImage, Pages, check_size

JP2_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # a file, or a codestream alone
SIZ = b"\xff\x4f\xff\x51"  # begins a codestream: the sizes and depths of its components follow
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
        return pixels.reshape(*pixels.shape[:2], -1), bands in (2, 4) and _has_opacity(content[:at])

    return Pages(1, "image", read, nbytes=size)


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
