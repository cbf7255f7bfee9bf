"""Encoded pictures from strangers, checked and turned into plain RGB.

What cannot be a picture, or would cost too much to decode, is refused by name before its pixels are touched;
what merely has an unusual mode (CMYK, 16 bit, palette, alpha, EXIF rotation) is converted, for a picture is worth
more than its container.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from blip_pipelines.data.records import Refused

# No plugin beyond these is tried: some start other programs (EPS), and none is common in caption data.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_STORED_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class ImageLimits:
    """Sizes that ingestion accepts, in pixels; read from the header before anything is decoded."""

    min_side: int = 16
    max_side: int = 10_000
    max_pixels: int = 50_000_000


def decode(content: bytes, *, limits: ImageLimits | None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image: alpha flattened on white, EXIF rotation applied, all other modes converted.

    Args:
        content: the encoded file.
        limits: accepted sizes; None leaves only Pillow's own bound against decompression bombs.
        at_least: (width, height) that suffice; a JPEG is then decoded at the smallest of its 1/1 to 1/8 scales that
            is no smaller, at a fraction of the cost.

    Raises:
        Refused: empty_file, not_an_image, truncated, corrupt, decompression_bomb, too_small, too_large, animated or
            unsupported_mode.
    """
    image = _open(content, limits)
    try:
        if at_least is not None:
            image.draft(None, at_least)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Refused:
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to zlib.error on hostile bytes
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise Refused(reason, f"{image.format} file cannot be decoded: {error}") from error


def needs_reencoding(content: bytes) -> bool:
    """Whether the bytes cannot be stored as they are: not JPEG, PNG or WebP, not plain RGB or grey, or not upright.

    Call after `decode` has accepted the content.
    """
    image = _open(content, None)
    plain = image.format in _STORED_FORMATS and image.mode in ("RGB", "L") and not image.has_transparency_data
    return not plain or image.getexif().get(_ORIENTATION, 1) != 1


def encode_plain(image: Image.Image) -> bytes:
    """A lossless PNG of the image without metadata; equal pixels give equal bytes."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")
    return file.getvalue()


def extension(content: bytes) -> str:
    """File name extension of content that is stored as it is: jpg, png or webp."""
    if content.startswith(b"\x89PNG"):
        return "png"
    return "webp" if content[8:12] == b"WEBP" else "jpg"


def _open(content: bytes, limits: ImageLimits | None) -> Image.Image:
    if not content:
        raise Refused("empty_file", "the file has no bytes")
    try:
        with warnings.catch_warnings():  # our limits decide; Pillow's warning would only repeat them
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Image.DecompressionBombError as error:
        raise Refused("decompression_bomb", str(error)) from error
    except Exception as error:
        if content.startswith(_SIGNATURES):
            raise Refused("truncated", f"an image header that breaks off or is damaged: {error}") from error
        raise Refused("not_an_image", f"starts with {content[:16]!r}, which no known image format does") from error
    if limits is not None:
        _check_size(*image.size, limits)
    if is_animated:
        raise Refused("animated", f"{image.format} file with several frames; only still pictures are used")
    return image


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise Refused("decompression_bomb", f"{width}x{height} is over the limit of {limits.max_pixels} pixels")
    if max(width, height) > limits.max_side:
        raise Refused("too_large", f"{width}x{height} has a side over the limit of {limits.max_side}")
    if min(width, height) < limits.min_side:
        raise Refused("too_small", f"{width}x{height} has a side under the limit of {limits.min_side}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise Refused("unsupported_mode", "floating point pixels, whose range the file does not tell")
    if image.mode.startswith("I"):  # 16 bit; Pillow's own conversion would clip at 255 instead of scaling
        grey = np.clip(np.asarray(image), 0, 65_535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", image.size, WHITE)
        flat.paste(rgba, mask=rgba.getchannel("A"))
        return flat
    return image.convert("RGB")
