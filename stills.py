"""One picture on disk becomes RGB as it is meant to be seen; one that moves, frames with their times.

    png, jpg, webp, avif, heic, gif, tiff, bmp  --opened-->  Image  --as_rgb-->  (h w 3) uint8

Pillow reads them all. Turned upright by EXIF or XMP, alpha dropped, 16-bit grey scaled. RGB keeps its ICC
profile (`profile`), which belongs to the result, too; what is no RGB is brought to sRGB by its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError

from runtime import UserError, explained, optional

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif",
}  # fmt: skip
MOVING = {"WEBP", "PNG", "GIF", "AVIF"}  # formats of animations; others hold pages, or smaller versions
GIF_FRAME = Fraction(1, 10)  # seconds; what browsers make of a frame without a duration
PIXELS = 178_956_970  # Pillow's own limit, above which it suspects an attack
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # nothing is turned then
Image.MAX_IMAGE_PIXELS = None  # `opened` says it in a line with the size and the way out
# Node editors keep their workflows in PNG's text, compressed: Pillow stops at one megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


class VideoError(UserError):
    """A clip that cannot be read or written. The message is the one line the user sees."""


@contextmanager
def opened(path: Path, name: str) -> Iterator[Image.Image]:
    """The picture, its header read. VideoError, with `name`, for whatever fails inside."""
    with explained(f"{name}: corrupt image or none at all", "Replace it.", VideoError):
        with _identified(path, name) as image:
            w, h = image.size
            if w * h > PIXELS:
                limit = f"more than the {PIXELS / 1e6:.0f} million pixels that are read"
                raise VideoError(f"{name}: {w}x{h} is {limit}. Cut it into tiles, or raise stills.PIXELS.")
            yield image


def _identified(path: Path, name: str) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(8)[4:] != b"ftyp":  # of HEIC and AVIF, whatever the file's suffix
                raise
    try:
        optional("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise VideoError(f"{name}: a HEIC image, which needs: pip install pillow-heif") from error
    return Image.open(path)


def is_moving(image: Image.Image) -> bool:
    return image.format in MOVING and getattr(image, "is_animated", False)


def moves(path: Path) -> bool:
    """Whether the file is an animation; False where it cannot be read."""
    with suppress(VideoError), opened(path, path.name) as image:
        return is_moving(image)
    return False


def animation(image: Image.Image) -> Iterator[tuple[Image.Image, Fraction]]:
    """The frames of an animation and their durations in seconds."""
    for n, frame in enumerate(ImageSequence.Iterator(image)):
        if n or not getattr(image, "default_image", False):  # a PNG's, for programs that know no better
            frame.load()  # before, WebP and AVIF do not know its duration
            milliseconds = Fraction(frame.info.get("duration", 0)).limit_denominator(1000)
            yield frame, milliseconds / 1000 or GIF_FRAME


def upright(stored: Image.Image) -> Image.Image:
    """Turned as EXIF or XMP says; as it is stored where these are broken or say nothing that exists."""
    try:
        return ImageOps.exif_transpose(stored)
    except Exception:  # EXIF is written by everybody, and Pillow raises whatever it meets
        stored.load()  # or the picture itself is at fault
        return stored


def as_rgb(stored: Image.Image) -> np.ndarray:
    """(h w 3) uint8, upright, alpha dropped; in its own profile where that is one of RGB, else in sRGB."""
    image = upright(stored)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    icc = _parsed(stored)
    if icc and icc.profile.xcolor_space.strip() != "RGB":  # CMYK of printers, Lab, calibrated grey
        with suppress(ImageCms.PyCMSError):
            image = ImageCms.profileToProfile(image, icc, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.array(image.convert("RGB"))


def _parsed(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    with suppress(OSError, ImageCms.PyCMSError):
        data = image.info.get("icc_profile")
        return ImageCms.ImageCmsProfile(BytesIO(data)) if data else None
    return None


def profile(image: Image.Image) -> bytes | None:
    """The ICC profile of what `as_rgb` returns, None if that is sRGB as far as anybody knows."""
    icc = _parsed(image)
    return image.info["icc_profile"] if icc and icc.profile.xcolor_space.strip() == "RGB" else None


def to_srgb(rgb: np.ndarray, icc: bytes) -> np.ndarray:
    """(h w 3) uint8 from the profile `icc` to sRGB."""
    source, target = ImageCms.ImageCmsProfile(BytesIO(icc)), ImageCms.createProfile("sRGB")
    return np.array(ImageCms.profileToProfile(Image.fromarray(rgb), source, target))
