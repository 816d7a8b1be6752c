"""The images that records refer to: files of any size, or ``data:`` URIs; their sizes from the header, their pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from m4ov.data.images import ImageError
from m4ov.data.records import NOWHERE, Record, RecordError, Where, short
from m4ov.data.shards import WriteError, image_path, map_images
from m4ov_kernels.vision.pixels_images import check_size

_DATA = "data:"
_ORIENTATION = 0x0112
# Cameras turn the sensor, not the pixels. Of these formats the header says so (TIFF: Pillow turns the image itself).
_TURNED = ("JPEG", "MPO", "WEBP")
_SWAPPED = (5, 6, 7, 8)  # orientations whose sides change places
_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # others: the format's name


def named(reference: str) -> str:
    """An image in a message: its path, or how its URI begins."""
    return short(reference, 40) if reference.startswith(_DATA) else reference[:200]


def image_bytes(reference: str, folder: Path) -> bytes:
    """The file of an image.

    Args:
        reference: a path relative to ``folder``, or a ``data:`` URI in base64.

    Raises:
        ImageError: there is no such file, or it cannot be read; the URI is not base64.
    """
    if reference.startswith(_DATA):
        return _from_uri(reference)
    try:
        return _regular(reference, folder).read_bytes()
    except OSError as error:
        raise ImageError(f"{named(reference)}: cannot be read ({_reason(error)})") from None


def image_header(reference: str, folder: Path) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its header: nothing is decoded.

    Raises:
        ImageError: there is no such file; it is no image; it has no size that an image of :func:`pack_patches` has.
    """
    try:
        source: Path | IO[bytes]
        source = io.BytesIO(_from_uri(reference)) if reference.startswith(_DATA) else _regular(reference, folder)
        with Image.open(source) as image:
            width, height = image.size
            if _orientation(image) in _SWAPPED:
                width, height = height, width
        check_size(height, width, named(reference))
    except ImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise ImageError(f"{named(reference)}: cannot be read ({_reason(error)})") from error
    return height, width


def load_image(reference: str, folder: Path) -> Image.Image:
    """A decoded image as it is shown, in the mode that its file has.

    Raises:
        ImageError: it is missing, truncated, damaged or not an image.
    """
    data = image_bytes(reference, folder)
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image.height, image.width, named(reference))
            image.verify()  # checksums; decoding alone lets a flipped bit through
        image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"{named(reference)}: cannot be decoded ({_reason(error)})") from error


def to_uri(data: bytes) -> str:
    """A ``data:`` URI of an image file. Its kind is told from the file's first bytes."""
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"))
    kind = next((kind for start, kind in kinds if data.startswith(start)), "")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    media = f"image/{kind}" if kind else "application/octet-stream"
    return f"{_DATA}{media};base64,{base64.b64encode(data).decode()}"


def store_images(record: Record, folder: Path, where: Where = NOWHERE) -> Record:
    """The record with its ``data:`` URIs written to ``folder/images``, named by their content, once each.

    Args:
        folder: where the records' file will be: paths are relative to it.

    Raises:
        RecordError: what the URI holds is no image.
        WriteError: a file cannot be written; nothing half-written stays.
    """

    def stored(reference: str) -> str:
        if not reference.startswith(_DATA):
            return reference
        try:
            data = _from_uri(reference)
            with Image.open(io.BytesIO(data)) as image:
                kind = image.format or "image"
        except MemoryError:
            raise
        except Exception as error:
            raise RecordError(where, "images", "image", f"{named(reference)}: {_reason(error)}", record.id) from error
        name = f"images/{hashlib.sha256(data).hexdigest()[:32]}{_SUFFIX.get(kind, '.' + kind.lower())}"
        path = folder / name
        if not path.exists():
            _write(path, data)
        return name

    return map_images(record, stored)


def relative_images(record: Record, source: Path, target: Path) -> Record:
    """The record with paths relative to ``target``, of one whose paths are relative to ``source``."""

    def moved(reference: str) -> str:
        if reference.startswith(_DATA):
            return reference
        return os.path.relpath(image_path(reference, source), target.absolute())

    return map_images(record, moved)


def _from_uri(reference: str) -> bytes:
    head, comma, data = reference.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"{named(reference)}: expected data:…;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{named(reference)}: not base64 ({error})") from None


def _regular(reference: str, folder: Path) -> Path:
    """A plain file: a pipe or a device would be read for ever."""
    if "://" in reference and not reference.startswith("file://"):
        raise ImageError(f"{reference[:100]}: not a file; images of the network are to be fetched first")
    path = image_path(reference, folder)
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise ImageError(f"{named(reference)}: {problem} ({str(path)[:300]})")
    return path


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION, 1) if image.format in _TURNED else 1
    return value if isinstance(value, int) else 1


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("pack_patches: ") or type(error).__name__
