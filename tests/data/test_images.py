import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from data_samples import encode, picture
from PIL import Image

from blip_pipelines.data.images import ImageLimits, decode, encode_plain, extension, needs_reencoding
from blip_pipelines.data.records import Refused

LIMITS = ImageLimits(min_side=2, max_side=10_000, max_pixels=10_000_000)
RED = (200, 30, 10)


def refusal(content: bytes, limits: ImageLimits | None = LIMITS) -> str:
    with pytest.raises(Refused) as refused:
        decode(content, limits=limits)
    assert str(refused.value)
    return refused.value.reason


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def test_zero_bytes_text_and_cut_files_are_refused_by_name():
    jpeg = encode(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
    assert refusal(b"") == "empty_file"
    assert refusal(b"a picture of a crab, they said") == "not_an_image"
    assert refusal(b"<html><body>404</body></html>") == "not_an_image"
    assert refusal(jpeg[: len(jpeg) // 2]) == "truncated"
    assert refusal(picture(0)[: len(picture(0)) // 2]) == "truncated"
    assert refusal(picture(0)[:20]) == "truncated"
    assert refusal(jpeg[:12]) == "truncated"


def test_damaged_content_is_refused_not_raised():
    content = bytearray(picture(0))
    for place in range(0, len(content), 7):
        damaged = bytes(content[:place]) + b"\xff\x00\xff" + bytes(content[place + 3 :])
        with contextlib.suppress(Refused):
            assert decode(damaged, limits=LIMITS).mode == "RGB"


def test_sizes_are_checked_before_pixels():
    assert refusal(png_header(1, 400)) == "too_small"
    assert refusal(png_header(20_000, 30)) == "too_large"
    assert refusal(png_header(9_000, 9_000)) == "decompression_bomb"
    assert refusal(png_header(60_000, 60_000)) == "decompression_bomb"
    assert refusal(png_header(60_000, 60_000), limits=None) == "decompression_bomb"


def test_global_pillow_limit_is_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    refusal(png_header(60_000, 60_000))
    decode(picture(0), limits=LIMITS)
    assert before == Image.MAX_IMAGE_PIXELS


def test_animation_is_refused_and_a_still_gif_is_not():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert refusal(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == "animated"
    assert refusal(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])) == "animated"
    assert decode(encode(frames[0], "GIF"), limits=LIMITS).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("PPM", {})]
)
def test_formats_without_loss_keep_their_pixels(kind, options):
    assert decode(encode(Image.new("RGB", (8, 6), RED), kind, **options), limits=LIMITS).getpixel((0, 0)) == RED


def test_every_mode_becomes_rgb():
    grey16 = np.full((6, 8), 200 << 8, np.uint16)
    cases = {
        "1": (Image.new("1", (8, 6), 1), "PNG", (255, 255, 255)),
        "L": (Image.new("L", (8, 6), 77), "PNG", (77, 77, 77)),
        "P": (Image.new("RGB", (8, 6), RED).quantize(4), "PNG", RED),
        "16 bit": (Image.fromarray(grey16), "PNG", (200, 200, 200)),
        "16 bit TIFF": (Image.fromarray(grey16), "TIFF", (200, 200, 200)),
        "32 bit": (Image.fromarray(grey16.astype(np.int32)), "TIFF", (200, 200, 200)),
        "CMYK": (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        "clear RGBA": (Image.new("RGBA", (8, 6), (*RED, 0)), "PNG", (255, 255, 255)),
        "opaque RGBA": (Image.new("RGBA", (8, 6), (*RED, 255)), "PNG", RED),
        "clear LA": (Image.new("LA", (8, 6), (0, 0)), "PNG", (255, 255, 255)),
    }
    for name, (image, kind, expected) in cases.items():
        found = decode(encode(image, kind), limits=LIMITS)
        assert (found.mode, found.getpixel((2, 2))) == ("RGB", expected), name


def test_palette_with_a_clear_colour_is_flattened_on_white():
    image = Image.new("P", (8, 6), 0)
    image.putpalette([*RED, 0, 0, 0])
    assert decode(encode(image, "PNG", transparency=0), limits=LIMITS).getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_jpeg_keeps_its_colours():
    found = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), limits=LIMITS)
    assert np.abs(np.array(found.getpixel((4, 4))) - (255, 0, 0)).max() <= 3  # JPEG rounding


def test_floating_point_pixels_are_refused():
    assert refusal(encode(Image.new("F", (8, 6), 0.5), "TIFF")) == "unsupported_mode"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied_and_makes_reencoding_needed(kind):
    image = Image.new("RGB", (16, 8), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 8, 8))  # left half black
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left side becomes the top
    content = encode(image, kind, exif=exif)
    upright = decode(content, limits=LIMITS)
    assert upright.size == (8, 16)
    assert max(upright.getpixel((4, 2))) < 40 and min(upright.getpixel((4, 13))) > 215
    assert needs_reencoding(content)
    assert not needs_reencoding(encode(image, kind))


def test_only_plain_upright_files_are_stored_as_they_are():
    rgb, grey = Image.new("RGB", (8, 8), RED), Image.new("L", (8, 8), 9)
    for kind, name in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        content = encode(rgb, kind)
        assert not needs_reencoding(content)
        assert extension(content) == name
    assert not needs_reencoding(encode(grey, "JPEG"))
    others = [
        encode(rgb, "GIF"),
        encode(rgb, "BMP"),
        encode(rgb.quantize(4), "PNG"),
        encode(rgb.convert("RGBA"), "PNG"),
        encode(rgb.convert("CMYK"), "JPEG"),
        encode(rgb, "PNG", transparency=RED),
    ]
    for content in others:
        assert needs_reencoding(content)
        plain = encode_plain(decode(content, limits=LIMITS))
        assert not needs_reencoding(plain)


def test_plain_encoding_is_lossless_and_carries_no_metadata():
    image = Image.open(io.BytesIO(picture(3)))
    exif = Image.Exif()
    exif[0x010E] = "words"
    image.info["comment"] = "words"
    content = encode_plain(image)
    assert content == encode_plain(decode(content, limits=LIMITS))
    assert np.array_equal(np.asarray(image), np.asarray(decode(content, limits=LIMITS)))
    assert b"words" not in content


def test_a_large_jpeg_is_decoded_at_the_scale_that_suffices():
    content = encode(Image.effect_noise((640, 480), 60).convert("RGB"), "JPEG")
    assert decode(content, limits=LIMITS, at_least=(150, 110)).size == (160, 120)
    assert decode(content, limits=LIMITS).size == (640, 480)
