"""Decoding images with Pillow: once, into the pixels that are cached, or for every batch."""

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from diffora.errors import UserError, reason
from diffora.tasks.cache import arrow_writer
from diffora.tasks.encoding import cores
from diffora.tasks.images.preprocessing import Preprocessing
from diffora.tasks.images.source import IMAGE

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning
IMAGES_AT_ONCE = 128  # bounds memory
PROGRESS_FROM_IMAGES = 5000
SAMPLED = 64  # images, to estimate the size of all
MOST_FAULTS = 20  # this many are shown one by one
NOT_DECODED = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognises but does not decode itself. For EPS it starts Ghostscript, which executes the file."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in NOT_DECODED)


@cache
def extensions() -> frozenset[str]:
    """File extensions of these formats, in lower case and with the dot."""
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in formats())


def decode(image: Mapping[str, Any] | None) -> Image.Image:
    """Decode an image to RGB, as it is meant to be seen: upright, 16 bits reduced to 8, transparency dropped.

    Returns:
        The picture; ``info["frames left out"]`` says whether the image has more frames than the first.

    Raises:
        ValueError: why the image cannot be used. Pillow raises other exceptions for damaged files.
    """
    content = read_bytes(image)
    if not content:
        raise ValueError("nothing in place of an image")
    opened = Image.open(io.BytesIO(content), formats=formats())
    opened.load()
    several = _has_frames(opened)
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        values = np.asarray(picture)
        if values.max(initial=0) > 0xFFFF or values.min(initial=0) < 0:
            raise ValueError("its pixels have 32 bits; save it with 8 bits a channel")
        if values.max(initial=0) > 0xFF or picture.mode != "I":
            values = values >> 8
        picture = Image.fromarray(values.astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers on no known scale; save it with 8 bits a channel")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")
    picture.info["frames left out"] = several
    return picture


def _has_frames(opened: Image.Image) -> bool:
    """Whether an image has more frames than the first."""
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # a later frame is damaged; the first one is not
        return True


def read_bytes(image: Mapping[str, Any] | None) -> bytes:
    """The encoded bytes of an image; empty if there is none."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        return b""
    content: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return content


def shrink(picture: Image.Image, side: int, resample: int) -> Image.Image:
    """Resize a picture so that its shorter side is ``side``; smaller pictures are not changed."""
    width, height = picture.size
    short = min(width, height)
    if short <= side:
        return picture
    return picture.resize((width * side // short, height * side // short), Image.Resampling(resample))


def _decoded(image: Mapping[str, Any] | None) -> Image.Image | str:
    """The decoded image, or what is wrong with it."""
    try:
        return decode(image)
    except UnidentifiedImageError:
        return "cannot be decoded: it is in no format that Pillow decodes"
    except Image.DecompressionBombError as error:
        return f"is too large ({error}); make it smaller first"
    except Exception as error:  # Pillow's decoders have no common exception for damaged files
        return f"cannot be decoded: {str(error).strip() or type(error).__name__}"


def _to_pixels(image: Mapping[str, Any] | None, side: int, resample: int) -> tuple[int, int, bytes, bool] | str:
    """(height, width, RGB bytes, whether there are more frames), or what is wrong."""
    if isinstance(whole := _decoded(image), str):
        return whole
    picture = shrink(whole, side, resample)
    return picture.height, picture.width, picture.tobytes(), whole.info["frames left out"]


def _as_it_is(image: Mapping[str, Any] | None) -> tuple[dict[str, Any], bool] | str:
    """(the encoded image, whether there are more frames), or what is wrong with it."""
    if isinstance(whole := _decoded(image), str):
        return whole
    assert image is not None
    path = image["path"] if image["bytes"] is not None else str(Path(image["path"]).resolve())
    return {"bytes": image["bytes"], "path": path}, whole.info["frames left out"]


def picture_of(image: Mapping[str, Any], digest: bytes, side: int, resample: int) -> Image.Image:
    """Decode an image that was checked before, as `write_pixels` does.

    Raises:
        UserError: its file is gone or has changed since.
    """
    try:
        content = read_bytes(image)
    except OSError as error:
        raise UserError(f"{image['path']} cannot be read any more: {reason(error)}") from None
    if hashlib.sha256(content).digest() != digest:
        raise UserError(f"{image['path']} has changed since this run began; start the run again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and broken EXIF entries
        return shrink(decode({"bytes": content, "path": None}), side, resample)


def write_pixels(file: Path, rows: datasets.Dataset, preprocessing: Preprocessing) -> None:
    """Decode all images of a split into an arrow file, in several threads.

    Raises:
        UserError: images cannot be decoded; the message lists them.
    """
    types = {"pixels": pa.binary(), "height": pa.int32(), "width": pa.int32()}
    work = partial(_to_pixels, side=preprocessing.resize, resample=preprocessing.resample)

    def columns(found: Sequence[Any], start: int) -> dict[str, Any]:
        height, width, pixels, cut = zip(*found, strict=True)
        return {"height": height, "width": width, "pixels": pixels, "cut": cut}

    _write(file, rows, types, work, columns, "decode")


def write_images(file: Path, rows: datasets.Dataset) -> None:
    """Write the images of a split as they are, encoded, after a check that all can be decoded.

    Images that are files stay where they are; the arrow file has their paths.

    Raises:
        UserError: as in `write_pixels`.
    """
    digests = rows["digest"][:]

    def columns(found: Sequence[Any], start: int) -> dict[str, Any]:
        images, cut = zip(*found, strict=True)
        return {"image": images, "digest": digests[start : start + len(found)], "cut": cut}

    _write(file, rows, {"image": IMAGE, "digest": pa.binary()}, _as_it_is, columns, "check images")


def _write(
    file: Path,
    rows: datasets.Dataset,
    types: dict[str, pa.DataType],
    work: Callable[[Any], Any],
    columns: Callable[[Sequence[Any], int], dict[str, Any]],
    what: str,
) -> None:
    """The common part of `write_pixels` and `write_images`.

    Args:
        types: the columns that ``columns`` makes, but ``cut``.
        work: makes of an image what ``columns`` needs, or says in words what is wrong with it.
        columns: of some results of ``work``, and the position of the first.
        what: the name of the progress bar.
    """
    labels = np.asarray(rows["label"][:]) if "label" in rows.column_names else None
    types = types | ({} if labels is None else {"labels": pa.int64()})
    types |= {"length": pa.int32(), "row": pa.int32(), "cut": pa.bool_()}
    faults: list[str] = []
    formats()  # load Pillow's formats before the threads start
    with (
        arrow_writer(file, pa.schema(types)) as append,
        ThreadPoolExecutor(cores()) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # warnings about large images and broken EXIF entries
        for start in progress(range(0, len(rows), IMAGES_AT_ONCE), len(rows), what):
            chunk = rows[start : start + IMAGES_AT_ONCE]
            found = list(pool.map(work, chunk["image"]))
            named = zip(chunk["where"], found, strict=True)
            faults += [f"{where}: {image}." for where, image in named if isinstance(image, str)]
            if faults:
                continue  # from now on only look for more faults
            place = np.arange(start, start + len(found))
            common = {"length": np.ones_like(place), "row": place}
            append(columns(found, start) | common | ({} if labels is None else {"labels": labels[place]}))
    if more := len(faults[MOST_FAULTS:]):
        faults = [*faults[:MOST_FAULTS], f"… and {more} more such image{'s' if more > 1 else ''}."]
    if faults:
        raise UserError(faults)


def pixel_bytes(rows: datasets.Dataset, preprocessing: Preprocessing) -> int:
    """About how many bytes `write_pixels` writes, from the sizes of up to `SAMPLED` images."""
    places = np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int))
    sizes = []
    for image in rows[places]["image"]:
        with suppress(Exception), warnings.catch_warnings():  # faults are reported when the images are decoded
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(read_bytes(image)), formats=formats()).size  # reads the header only
            short = min(width, height)
            scale = min(1.0, preprocessing.resize / short)
            sizes.append(3 * width * height * scale**2)
    return round(len(rows) * float(np.mean(sizes))) if sizes else 0


def progress(chunks: Sequence[Any], n_images: int, what: str) -> "tqdm[Any]":
    """The chunks, with a progress bar if there are many images."""
    return tqdm(chunks, desc=what, unit=f" x {IMAGES_AT_ONCE}", disable=n_images < PROGRESS_FROM_IMAGES)
