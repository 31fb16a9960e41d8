"""Decodes what pydicom alone can't, lossless JPEG, JPEG-LS and JPEG of 12 bits, with imagecodecs.

The names `is_available` and the arguments of `decode_frame` are those that pydicom asks of a plug-in.
"""

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

DECODERS = {  # HTJ2K is not among them: OpenJPH hangs at damaged files
    uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode,  # by libjpeg-turbo, which has more than 8 bits and lossless JPEG
    uid.JPEGLossless: imagecodecs.jpeg8_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg8_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
}


def is_available(syntax: str) -> bool:
    return syntax in DECODERS


def decode_frame(content: bytes, runner) -> bytes:
    """An encoded frame as the bytes of its pixels, with the colours of a pixel side by side."""
    if runner.transfer_syntax == uid.JPEGExtended12Bit and runner.samples_per_pixel > 1:
        raise NotImplementedError("JPEG of 12 bits in colour")
    shape = (runner.rows, runner.columns, runner.samples_per_pixel)
    decode, usual = DECODERS[runner.transfer_syntax], runner.bits_allocated
    try:
        pixels = decode(content, out=_empty(shape, usual))  # refuses a frame that would be larger than the header says
    except ValueError:  # some files store frames of 8 bits as ones of 16
        pixels = decode(content, out=_empty(shape, 24 - usual))
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return pixels.tobytes()


def _empty(shape: tuple[int, int, int], bits: int) -> np.ndarray:
    return np.empty(shape if shape[2] > 1 else shape[:2], f"u{bits // 8}")


for syntax in DECODERS:
    get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))
