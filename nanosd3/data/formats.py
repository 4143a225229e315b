"""Which image files are read: what Pillow decodes by itself, to 8 bits a channel.

Content decides, not the suffix, except for formats without a signature of their own: many other
files might be taken for those. Suffixes of images that are not read are listed too, for messages.
"""

from pathlib import Path

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

# Not EPS, which would be executed.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "ICO")
BY_SUFFIX = dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM") | {".tga": "TGA", ".dib": "DIB"}
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".apng", ".jfif", ".jpe", ".avif", ".jp2", ".j2k", ".ico", *BY_SUFFIX),
)
UNREAD_SUFFIXES = (  # Pillow needs a plugin or another program, or reads only part of the format
    *(".heic", ".heif", ".hif", ".heics", ".jxl", ".avifs", ".jpx", ".jpf", ".j2c", ".jpc"),
    *(".svg", ".svgz", ".eps", ".ps", ".ai", ".pdf", ".wmf", ".emf", ".psd", ".psb", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".exr", ".hdr", ".pfm"),
    *(".mpo", ".dds", ".qoi", ".pcx", ".sgi", ".xbm", ".xpm", ".cur", ".icns", ".ktx", ".jbig2"),
)
CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000; 42 bytes on: the bits of each channel, less 1


def formats_of(name: object) -> tuple[str, ...]:
    """The formats that a file of this name may have, among those that this Pillow reads."""
    Image.init()
    extra = BY_SUFFIX.get(Path(str(name)).suffix.lower())
    wanted = (*FORMATS, extra) if extra else FORMATS
    return tuple(kind for kind in wanted if kind in Image.OPEN)


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a channel.

    Pillow silently reduces most of these to 8 bits when it decodes them. Before that, only a tag,
    a field or the name of a raw mode gives it away.
    """
    if image.mode.startswith(("I", "F")):
        return True
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
    if not isinstance(image, ImageFile) or not image.tile:  # decoded already
        return False
    if image.format == "PNG":
        return any(";16" in str(tile[3]) for tile in image.tile)
    if image.format == "PPM":  # the largest value, where it is not that of 8 bits
        arguments = image.tile[0][3]
        return isinstance(arguments, tuple) and arguments[-1] > 255
    if image.format == "JPEG2000":
        content = content_of(image)
        bits = content.find(CODESTREAM) + 42
        channels = int.from_bytes(content[bits - 2 : bits])
        return max(content[bits : bits + 3 * channels : 3], default=0) & 0x7F > 7
    if image.format == "AVIF":
        content = content_of(image)
        return bool(content[content.find(b"av1C") + 6] & 0x40)  # the field high_bitdepth
    return False


def content_of(image: ImageFile) -> bytes:
    """The bytes of an image file that is not decoded yet."""
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return content
