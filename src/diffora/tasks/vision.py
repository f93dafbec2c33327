"""Image classification: hub datasets, folders of class folders, parquet; decoded once into a memory-mapped cache.

Pillow decodes and resizes (no torchvision): once for the cache, where images wait as bytes with the shorter side at
the backbone's size, and once more when a batch is put together, where training images are cropped, flipped or shifted.
What a training image looks like is a function of (seed, stage, epoch, row).
"""

import hashlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from diffora.backbones.processors import ProcessorKind
from diffora.errors import UserError
from diffora.files import atomic
from diffora.settings.checks import PATH, Help, number, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account, note_ignored, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task
from diffora.tasks.cache import SEAL, arrow_writer, cached, default_cache_dir, is_sealed, seal
from diffora.tasks.labels import alike, class_names, in_order, known_classes, some
from diffora.tasks.sources import SUBSET_SEED, check_columns, check_folder, first_line, hub_splits, split_files

log = logging.getLogger(__name__)

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning
IMAGES_AT_ONCE = 128  # bounds memory
PROGRESS_FROM_IMAGES = 5000
MOST_FAULTS = 20  # shown one by one
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # the type of the hub's image columns


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone's image processor says of its pixels.

    Attributes:
        resize: the shorter side of an image is brought to so many pixels,
        crop: and so many are cut out of the centre, in both directions: what the model sees.
        resample: Pillow's number for the interpolation.
        scale: of a byte; then
        mean, std: of the red, green and blue channel are subtracted and divided by.
    """

    resize: int
    crop: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, path: str) -> "Preprocessing":
        """From a transformers image processor.

        Raises:
            UserError: its images are not square, or not of three channels.
        """
        size = _side(processor.size, f"{path}: size")
        crop = _side(processor.crop_size, f"{path}: crop_size") if getattr(processor, "do_center_crop", None) else size
        normalise = processor.do_normalize
        mean = tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0)
        std = tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0)
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"model.path={path}: its images have {len(mean)} channels; images here have three, RGB")
        resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        numbers = {"image_mean": mean, "image_std": std, "rescale_factor": (scale,)}
        for key, values in numbers.items():
            low = 0 if key == "image_mean" else 1e-6
            if not all(isinstance(value, int | float) and low <= value <= 1000 for value in values):
                raise UserError(f"model.path={path}: {key}={list(values)} must hold numbers from {low} to 1000")
        if getattr(processor, "do_flip_channel_order", False):
            raise UserError(f"model.path={path}: do_flip_channel_order=true: images here are RGB, not BGR")
        if resample not in list(Image.Resampling):
            raise UserError(f"model.path={path}: resample={resample!r} is none of Pillow's {list(range(6))}")
        return cls(
            resize=max(size, crop),
            crop=crop,
            resample=int(resample),
            scale=scale,
            mean=mean,
            std=std,
        )


def _side(size: Any, where: str) -> int:
    """The side of a square, from the forms in which image processors give sizes."""
    if isinstance(size, int):
        return size
    sides = {int(size[key]) for key in ("height", "width", "shortest_edge") if size.get(key)}
    if len(sides) != 1:
        raise UserError(f"model.path={where}={dict(size)} is not that of a square image")
    return sides.pop()


# --- what there is ---


@dataclass(frozen=True)
class Source:
    """One split as it was found.

    Attributes:
        name: of the split, in messages.
        images: column of `IMAGE`.
        where: of each image, in messages.
        labels: column of whole numbers, or None.
        classes: their names in the order of the labels, or None where the source has no names.
        files: whose sizes and times tell whether the content has changed; none for images made in memory.
        listed: whether ``classes`` is a list that the source declares, and not only the names that occur in it.
        account: what became of what was found.
    """

    name: str
    images: pa.ChunkedArray
    where: Sequence[str]
    labels: pa.ChunkedArray | None
    classes: list[str] | None
    files: Sequence[Path] = ()
    listed: bool = True
    account: Account = field(default_factory=Account)


# Pillow recognises these but cannot decode them itself: for EPS it starts Ghostscript, a program for programs.
NOT_DECODED = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in NOT_DECODED)


@cache
def extensions() -> frozenset[str]:
    """Of files in these formats."""
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in formats())


def class_folders(folder: Path) -> list[str]:
    """Names of the classes in the folder of a split: its folders, in the order of the labels."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_folder(folder: Path, classes: Sequence[str], labelled: bool, problems: list[str]) -> Source:
    """The images in the class folders of a split; where they need no labels, they may lie in the folder itself.

    Files of a class folder may lie in folders within it. Those that are no images by their extension, and hidden ones,
    are counted and left out.
    """
    account = Account()

    def images_among(files: Iterable[Path]) -> list[Path]:
        found = []
        for file in sorted(files):
            account.read += 1
            if any(part.startswith(".") for part in file.relative_to(folder).parts):
                account.drop("hidden files", 1)
            elif file.suffix.lower() in extensions():
                found.append(file)
                if not file.is_file():
                    what = "a link to a file that is not there" if file.is_symlink() else "not a regular file"
                    problems.append(f"{file}: {what}.")
            else:
                account.drop(f"no image: {file.suffix.lower() or file.name}", 1)
        return found

    files: list[Path] = []
    labels: list[int] = []
    named = class_folders(folder)
    for name in named:
        there = list(_files_below(folder / name))
        found = images_among(there)
        if name not in classes:
            close = known_classes(name, classes)
            hint = f"; is it {close}?" if close else ""
            problems.append(
                f"{folder / name}: '{name}' is no class of the training split, which has {some(classes)}{hint}"
            )
            continue
        if not found:
            present = some(sorted(file.name for file in there)) or "nothing"
            problems.append(f"{folder / name}: no image that Pillow can read by its extension; found {present}.")
        files += found
        labels += [classes.index(name)] * len(found)
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name.startswith("."):
            images_among(_files_below(entry))  # counted as hidden
    beside = images_among(entry for entry in folder.iterdir() if not entry.is_dir())
    if named and beside:
        shown = some([file.name for file in beside])
        problems.append(f"{folder}: images beside the class folders, where they have no class: {shown}.")
    elif not named:
        files = beside
        if labelled or not files:
            problems.append(f"{folder}: no class folders; images are looked for in {folder}/<class>/.")
    paths = [str(file) for file in files]
    images = _as_images(pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string()))
    numbers = pa.chunked_array([pa.array(labels, pa.int64())]) if named else None
    return Source(str(folder), pa.chunked_array([images]), paths, numbers, list(classes), files, account=account)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links too; a link to a folder that it lies in is not followed in circles."""
    inside: dict[str, frozenset[str]] = {}  # a folder's path: the true paths of those it lies in, and its own
    for place, folders, files in os.walk(folder, followlinks=True):
        above = inside.get(os.path.dirname(place), frozenset())
        inside[place] = above | {os.path.realpath(place)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in inside[place]]
        yield from (Path(place, name) for name in files)


def open_parquet(folder: Path, split: str, label: str, problems: list[str]) -> datasets.Dataset | None:
    """A split in one file or several, as the hub stores them; None where there is none, or it cannot be read.

    Args:
        label: the column of the labels, whose classes must be the same in all files: the library reads those of one.
    """
    place = folder if any(folder.glob(f"{split}[.-]*parquet")) else folder / "data"
    if place == folder and any((folder / "data").glob(f"{split}[.-]*parquet")):
        problems.append(f"{folder}: the split '{split}' is there as .parquet and in {folder / 'data'} too; keep one.")
        return None
    if not any(place.glob(f"{split}[.-]*parquet")):
        there = sorted(entry.name for entry in folder.iterdir())
        looked = f"looked for {split}/ with a folder for each class, {split}.parquet and {split}-00000-of-0000*.parquet"
        problems.append(f"{folder}: nothing for the split '{split}'; {looked}; found {some(there) or 'nothing'}.")
        return None
    before = len(problems)
    files = [str(file) for file in split_files(place, split, problems, ("parquet",))]
    if len(problems) > before:
        return None
    try:
        names = {file: class_names(pa.parquet.read_schema(file), label) for file in files}
        for file, classes in names.items():
            if classes != names[files[0]]:
                problems.append(
                    f"{file}: column '{label}': its classes are {some(classes or ['without names'])}; {files[0]} has "
                    f"{some(names[files[0]] or ['none'])}; all shards must name them in the same order"
                )
        if len(problems) > before:
            return None
        # The library knows files by their names and times alone, which a file that replaces another may have too.
        known = hashlib.sha256(json.dumps([_identity(Path(file)) for file in files]).encode()).hexdigest()
        return datasets.Dataset.from_parquet(files, cache_dir=str(default_cache_dir() / "parquet" / known))
    except Exception as error:  # arrow's and the library's errors have no common base class
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        problems.append(f"{', '.join(files)} cannot be read as .parquet: {reason}")
        return None


def read_table(
    name: str, found: datasets.Dataset, columns: tuple[str, str], labelled: bool, problems: list[str]
) -> Source | None:
    """Two columns of a split from the hub or from parquet, images and labels; None where there is something wrong."""
    before = len(problems)
    (image, label), there = columns, found.column_names
    check_columns(there, columns if labelled or label in there else columns[:1], name, problems)
    if len(problems) > before:
        return None
    images, labels = found.data.table.column(image), found.data.table.column(label) if label in there else None
    if pa.types.is_binary(images.type):  # bytes alone
        parts = [_as_images(part, pa.nulls(len(part), pa.string())) for part in images.chunks]
        images = pa.chunked_array(parts, IMAGE)
    if images.type != IMAGE:
        problems.append(f"{name}: column '{image}' holds {images.type}, expected images ({IMAGE}, or binary).")
    feature = found.features.get(label)
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    listed = classes is not None
    if labels is not None and pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if labels is not None and (pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)):
        labels = pc.utf8_trim_whitespace(labels)  # names of the classes
        labels = pc.if_else(pc.equal(labels, ""), pa.scalar(None, labels.type), labels)
        classes = sorted(pc.unique(labels).drop_null().to_pylist())
        labels = pc.index_in(labels, pa.array(classes, labels.type)).cast(pa.int64())
    elif labels is not None and not pa.types.is_integer(labels.type):
        problems.append(f"{name}: column '{label}' holds {labels.type}, expected whole numbers from 0 or class names.")
    if len(problems) > before:
        return None
    account = Account(len(found))
    note_ignored(account, [column for column in there if column not in columns])
    where = [f"{name}, row {i} (data rows, counted from 1), column '{image}'" for i in range(1, len(found) + 1)]
    files = [Path(entry["filename"]) for entry in found.cache_files]
    return Source(name, images, where, labels, classes, files, listed, account)


def _as_images(content: pa.Array, paths: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([content, paths], fields=list(IMAGE))


def check(source: Source, n_classes: int, labelled: bool, problems: list[str]) -> Source:
    """The source, less labels that only say that there are none (-1); what is wrong is added to ``problems``."""
    labels = source.labels
    if not len(source.images):
        problems.append(f"{source.name}: no images.")
    elif labels is not None:
        if not labelled and pc.all(pc.equal(pc.fill_null(labels, -1), -1)).as_py():
            return replace(source, labels=None)
        outside = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, n_classes)), True)
        if count := pc.sum(outside).as_py():
            i = pc.index(outside, True).as_py()
            more = f" (and {count - 1} more such row{'s' if count > 2 else ''})" if count > 1 else ""
            value = "null" if labels[i].as_py() is None else labels[i].as_py()
            problems.append(f"{source.where[i]}: its label {value} is not one of 0 to {n_classes - 1}{more}.")
    return source


def renumbered(source: Source, classes: Sequence[str], others: str, problems: list[str]) -> Source:
    """The checked source with its labels numbered as in ``classes``; one of its classes that is not there is a problem.

    Args:
        others: where ``classes`` are from, for the message.
    """
    if source.classes is None or source.classes == list(classes):
        return source
    places = in_order(source.classes, classes, f"{source.name}: its classes are", others, problems)
    if places is None:
        return source
    labels = source.labels
    if labels is not None and places != list(range(len(places))):
        labels = pa.chunked_array([pa.array(places, pa.int64()).take(labels.combine_chunks())])
        if source.listed:  # otherwise the numbers were ours
            source.account.change(
                f"label numbers follow the class names, whose order is {some(source.classes)}", len(labels)
            )
    return replace(source, labels=labels, classes=list(classes))


# --- rows: an image each, as bytes or path ---


def to_rows(source: Source) -> datasets.Dataset:
    """Columns ``image`` (bytes or path), ``label`` where there are labels, ``digest``, ``where`` and ``file``."""
    columns: dict[str, Any] = {"image": source.images}
    if source.labels is not None:
        columns["label"] = source.labels.cast(pa.int64())
    columns["digest"] = pa.array(digests(source), pa.binary())
    columns["where"] = pa.array(source.where, pa.string())
    columns["file"] = pc.struct_field(source.images, "path")
    return datasets.Dataset(pa.table(columns))


def digests(source: Source) -> list[bytes]:
    """sha256 of each encoded image; remembered for as long as the source's files keep their sizes and times."""
    n = len(source.images)
    known: Path | None = None
    if source.files:
        stats = [_identity(file) for file in source.files]
        key = hashlib.sha256(json.dumps([FORMAT_VERSION, n, stats]).encode()).hexdigest()
        known = default_cache_dir() / "images" / f"{key}.sha256"
        if known.is_file():
            if known.stat().st_size == 32 * n + SEAL and is_sealed(known):
                content = known.read_bytes()
                return [content[start : start + 32] for start in range(0, 32 * n, 32)]
            log.warning("making the damaged cache file %s anew", known)
    found: list[bytes] = []
    chunks = pa.table({"image": source.images}).to_batches(max_chunksize=IMAGES_AT_ONCE)
    with ThreadPoolExecutor(_threads()) as pool:
        for chunk in _progress(chunks, n, "read images"):
            found += pool.map(_digest, chunk.column(0).to_pylist())
    if known is not None:
        try:
            with atomic(known) as scratch:
                scratch.write_bytes(b"".join(found))
                seal(scratch, known)
        except OSError as error:
            raise UserError(
                f"Cannot write the cache file {known}: {error.strerror or error}. "
                "Choose another folder with the environment variable DIFFORA_CACHE."
            ) from error
    return found


def _identity(file: Path) -> tuple[Any, ...]:
    """What is not the same when a file was written to or replaced; nobody can set a change time back."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def content_hash(rows: datasets.Dataset) -> str:
    """sha256 of images and labels, in order."""
    columns = rows.select_columns([name for name in ("digest", "label") if name in rows.column_names])[:]
    digest = hashlib.sha256(b"".join(columns["digest"]))
    digest.update(np.asarray(columns.get("label", ()), "<i8").tobytes())
    return digest.hexdigest()


def _digest(image: Mapping[str, Any] | None) -> bytes:
    try:
        return hashlib.sha256(_content(image)).digest()
    except OSError:
        return bytes(32)  # comes up again, with its reason, when it is to be decoded


def _content(image: Mapping[str, Any] | None) -> bytes:
    if image is None or (image["bytes"] is None and image["path"] is None):
        return b""
    content: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return content


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(chunks: Sequence[Any], n_images: int, what: str) -> Iterable[Any]:
    return tqdm(chunks, desc=what, unit=f" x {IMAGES_AT_ONCE}", disable=n_images < PROGRESS_FROM_IMAGES)


# --- from files to pixels ---


def decode(image: Mapping[str, Any] | None) -> Image.Image:
    """An image as it is meant to be seen, in RGB: upright, 16 bits brought to 8, transparency dropped.

    Raises:
        ValueError: in words, why it cannot be used; whatever else Pillow raises on damaged files.
    """
    content = _content(image)
    if not content:
        raise ValueError("nothing in place of an image")
    opened = Image.open(io.BytesIO(content), formats=formats())
    opened.load()
    several = _has_frames(opened)
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):  # greys of 16 bits; Pillow's own conversion clips them at 255
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
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # the first frame is whole, what follows is not
        return True


def shrink(picture: Image.Image, side: int, resample: int) -> Image.Image:
    """Bring the shorter side down to ``side``; smaller pictures stay as they are."""
    width, height = picture.size
    short = min(width, height)
    if short <= side:
        return picture
    return picture.resize((width * side // short, height * side // short), Image.Resampling(resample))


def _to_pixels(image: Mapping[str, Any] | None, side: int, resample: int) -> tuple[int, int, bytes, bool] | str:
    """(height, width, RGB bytes, whether there are further frames), or what is wrong."""
    try:
        whole = decode(image)
        picture = shrink(whole, side, resample)
    except Image.UnidentifiedImageError:
        return "cannot be decoded: it is in no format that Pillow decodes"
    except Image.DecompressionBombError as error:
        return f"is too large ({error}); make it smaller first"
    except Exception as error:  # Pillow's decoders have no common error for damaged files
        return f"cannot be decoded: {str(error).strip() or type(error).__name__}"
    return picture.height, picture.width, picture.tobytes(), whole.info["frames left out"]


def write_pixels(file: Path, rows: datasets.Dataset, preprocessing: Preprocessing) -> None:
    """Decode all images of a split into an arrow file, several at a time.

    Raises:
        UserError: the images that cannot be decoded.
    """
    labels = np.asarray(rows["label"][:]) if "label" in rows.column_names else None
    types = {"pixels": pa.binary(), "height": pa.int32(), "width": pa.int32()}
    types |= ({} if labels is None else {"labels": pa.int64()}) | {
        "length": pa.int32(),
        "row": pa.int32(),
        "cut": pa.bool_(),
    }
    work = partial(_to_pixels, side=preprocessing.resize, resample=preprocessing.resample)
    faults: list[str] = []
    formats()  # or the threads would load Pillow's formats at the same time
    with (
        arrow_writer(file, pa.schema(types)) as append,
        ThreadPoolExecutor(_threads()) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # large but not too large, or with broken EXIF entries
        for start in _progress(range(0, len(rows), IMAGES_AT_ONCE), len(rows), "decode"):
            chunk = rows[start : start + IMAGES_AT_ONCE]
            found = list(pool.map(work, chunk["image"]))
            named = zip(chunk["where"], found, strict=True)
            faults += [f"{where}: {image}." for where, image in named if isinstance(image, str)]
            if faults:
                continue  # the others are only looked through
            height, width, pixels, cut = zip(*found, strict=True)
            place = np.arange(start, start + len(found))
            columns = {"pixels": pixels, "height": height, "width": width, "length": np.ones_like(place), "row": place}
            columns["cut"] = cut
            append(columns | ({} if labels is None else {"labels": labels[place]}))
    if more := len(faults[MOST_FAULTS:]):
        faults = [*faults[:MOST_FAULTS], f"… and {more} more such image{'s' if more > 1 else ''}."]
    if faults:
        raise UserError(faults)


# --- from pixels to batches ---

AREA = number(lambda v: 0 < v <= 1, "a number in (0, 1]: a share of the area")
SHIFT = number(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5: a share of the side")


@dataclass(frozen=True)
class Augment:
    """How training images are varied."""

    crop_area: Annotated[
        Annotated[float, AREA] | None,
        Help("Least share of the area in random resized crops, of aspect 3:4 to 4:3; null: no crops."),
    ]
    flip: Annotated[bool, Help("Exchange left and right in half of the cases.")]
    shift: Annotated[
        float, SHIFT, Help("Shift by up to this share of the side in both directions; the rest becomes black.")
    ]


class ImageCollate:
    """Puts cached images together: crop or centre, resize, augment where asked to, normalise.

    Args:
        preprocessing: of the backbone.
        augment: None for evaluation. Otherwise rows come with ``draw``, the numbers that with ``row`` make the seed.
    """

    def __init__(self, preprocessing: Preprocessing, augment: Augment | None) -> None:
        self.preprocessing, self.augment = preprocessing, augment
        std = torch.tensor(preprocessing.std)
        self._factor = (preprocessing.scale / std).view(1, 3, 1, 1)
        self._offset = (-torch.tensor(preprocessing.mean) / std).view(1, 3, 1, 1)

    def __call__(self, rows: Mapping[str, Any]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            pixel_values: float32 [n, 3, side, side]; row and, when given, labels: long [n].
        """
        images = [
            Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
            for pixels, height, width in zip(rows["pixels"], rows["height"], rows["width"], strict=True)
        ]
        if self.augment is None:
            p = self.preprocessing
            views = [_cut(image, centre(image.height, image.width, p), p) for image in images]
        else:
            views = [self._vary(image, (*rows["draw"], row)) for image, row in zip(images, rows["row"], strict=True)]
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float().contiguous()
        batch = {"pixel_values": pixels.mul_(self._factor).add_(self._offset)}
        return batch | {name: torch.tensor(rows[name]) for name in ("labels", "row") if name in rows}

    def _vary(self, image: Image.Image, seed: tuple[int, ...]) -> np.ndarray:
        p, a, rng = self.preprocessing, self.augment, np.random.default_rng(seed)
        assert a is not None
        height, width = image.height, image.width
        box = centre(height, width, p) if a.crop_area is None else random_box(height, width, a.crop_area, rng)
        seen = _cut(image, box, p)
        if a.flip and rng.random() < 0.5:
            seen = seen[:, ::-1]
        if most := round(a.shift * p.crop):
            seen = shifted(seen, *rng.integers(-most, most, size=2, endpoint=True).tolist())
        return seen


Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


def _cut(image: Image.Image, box: Box, preprocessing: Preprocessing) -> np.ndarray:
    """What is in a box, brought to the model's size: uint8 [side, side, 3]."""
    size = preprocessing.crop, preprocessing.crop
    return np.asarray(image.resize(size, Image.Resampling(preprocessing.resample), box))


def centre(height: int, width: int, preprocessing: Preprocessing) -> Box:
    """The box that evaluation looks at: as if the shorter side were resized, and the centre then cut out."""
    short = min(height, width)
    side = short * preprocessing.crop / preprocessing.resize
    left, top = (width - side) / 2, (height - side) / 2
    if short == preprocessing.resize:  # nothing is resized: whole pixels
        left, top = int(left), int(top)
    return left, top, left + side, top + side


def random_box(height: int, width: int, least: float, rng: np.random.Generator) -> Box:
    """A random resized crop (Szegedy et al. 2015): a share of the area from ``least`` to 1, an aspect from 3:4 to 4:3.

    Of ten draws the first that fits is taken; otherwise the largest centred box of an allowed aspect.
    """
    area = height * width * rng.uniform(least, 1, size=10)
    aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), size=10))
    where = rng.random(2)
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = np.flatnonzero((w <= width) & (h <= height))
    if len(fits):
        box_w, box_h = float(w[fits[0]]), float(h[fits[0]])
        left, top = float(where[0]) * (width - box_w), float(where[1]) * (height - box_h)
    else:
        box_w, box_h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        left, top = (width - box_w) / 2, (height - box_h) / 2
    return left, top, min(left + box_w, width), min(top + box_h, height)


def shifted(image: np.ndarray, right: int, down: int) -> np.ndarray:
    """An image [height, width, 3] moved by whole pixels; what becomes free is black."""
    moved = np.zeros_like(image)
    h, w = image.shape[:2]
    moved[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = image[
        max(-down, 0) : h - max(down, 0), max(-right, 0) : w - max(right, 0)
    ]
    return moved


# --- the task ---


@dataclass(frozen=True, kw_only=True)
class VisionSettings(TaskSettings):
    """What every image task has."""

    train_head: Annotated[bool, Help("Train the head; false: only the adapters on it.")]
    augment: Annotated[Augment, Help("How training images are varied.")]


@dataclass(frozen=True, kw_only=True)
class ImageSettings(VisionSettings):
    """The settings of `ImageTask`."""

    hub: Annotated[str | None, Help("Data set on the hub; null: `path` must be given.")] = None
    path: Annotated[
        Annotated[str, PATH] | None,
        Help("Folder with a folder of images for each class, or with .parquet files; null: the hub."),
    ] = None
    validation_split: Annotated[str | None, Help("Split to validate on, by its name at the source.")] = "validation"
    image_column: Annotated[str, Help("Column of the images in .parquet files and on the hub.")] = "image"
    label_column: Annotated[str, Help("Column of the labels in .parquet files and on the hub.")] = "label"
    num_labels: Annotated[
        Annotated[int, whole(2, 10**6)] | None, Help("Number of classes, if the data do not name them.", "classes")
    ] = None


class ImageTask(Task):
    """Images of one class each, from the hub, a folder of class folders, or parquet files; accuracy."""

    settings: ClassVar[type[TaskSettings]] = ImageSettings
    model_class: ClassVar[str] = "AutoModelForImageClassification"
    processor_kind: ClassVar[ProcessorKind] = "image_processor"
    peft_type: ClassVar[str | None] = None

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.metrics, self.main_metric = ("accuracy",), "accuracy"
        self.trains_head = cfg.train_head
        self.validation_splits = (getattr(cfg, "validation_split", "validation"),)
        self.classes: list[str] | None = None
        """Names of the classes, once anything is loaded."""
        self.reference: list[str] | None = None
        """Names that later splits are numbered by: of the run whose model is used, or of what was loaded first."""

    # --- before training ---

    def problems(self) -> Iterator[str]:
        if self.validation_splits == (None,):
            yield "task.validation_split=null: images have no validation rows cut for them; give the split's name"
        if self.cfg.path is None and self.cfg.hub is None:
            yield f"task.path=null: task '{self.name}' reads your own images: give the folder that holds {self._wanted}"

    def head(self) -> dict[str, Any]:
        """Number and names of the classes; before anything is loaded, as far as YAML and folder names tell."""
        classes = self.classes
        if classes is None and self.cfg.path is not None:
            train = Path(self.cfg.path) / "train"
            classes = class_folders(train) if train.is_dir() else None
        if classes is None:
            if self.cfg.num_labels is None:
                raise UserError(_NO_CLASSES)
            return {"num_labels": self.cfg.num_labels}
        names = dict(enumerate(classes))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def load(self) -> Rows:
        sources = self._checked(("train", *self.validation_splits), labelled=True)
        self.accounts |= {name: source.account for name, source in zip(("train", "validation"), sources, strict=True)}
        train, validation = map(to_rows, sources)
        most = self.cfg.max_train_rows
        if most is not None and most < len(train):
            self.accounts["train"].drop(f"task.max_train_rows={most}", len(train) - most)
            train = train.select(np.sort(np.random.default_rng(SUBSET_SEED).permutation(len(train))[:most]))
        self._note_oddities(train, validation)
        facts = [self.classes, content_hash(train), content_hash(validation)]
        data_hash = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Rows(train, {"validation": validation}, data_hash, self.origin)

    def load_split(self, split: str) -> datasets.Dataset:
        [source] = self._checked((split,), labelled=False)
        self.accounts[split] = source.account
        return to_rows(source)

    def _note_oddities(self, train: datasets.Dataset, validation: datasets.Dataset) -> None:
        """Say what makes a result doubtful, though nothing about the rows is wrong."""
        assert self.classes is not None
        labels = {"train": set(train["label"][:]), "validation": set(validation["label"][:])}
        for name, found in labels.items():
            if len(found) == 1:
                self.accounts[name].notes.append(f"all images are of the same class: {self.classes[min(found)]}")
        if strange := sorted(labels["validation"] - labels["train"]):  # after task.max_train_rows
            names = some([self.classes[i] for i in strange])
            self.accounts["validation"].notes.append(f"classes that no training row has: {names}")
        keys = {"train": pa.array(train["digest"][:]), "validation": pa.array(validation["digest"][:])}
        note_overlap(self.accounts, keys)

    def expect(self, classes: Sequence[str]) -> None:
        """Number the classes of all that is loaded as the trained model does."""
        self.reference = list(classes)

    def count_encoded(self, account: Account, split: Split) -> None:
        several = pc.sum(split.encoded.data.column("cut")).as_py() or 0
        account.change("the first of several frames is used", several)

    @property
    def origin(self) -> str:
        """Where the images come from, in words."""
        return str(self.cfg.path or self.cfg.hub)

    @property
    def _wanted(self) -> str:
        return f"train/<class>/ and {self.validation_splits[0]}/<class>/ with images, or these two as .parquet"

    def read(self, splits: Sequence[str], labelled: bool, problems: list[str]) -> list[Source | None]:
        """The splits as they are found, or None; what is wrong is added to ``problems``.

        Args:
            splits: their names at the source.
            labelled: whether they must have labels.
        """
        cfg, columns = self.cfg, (self.cfg.image_column, self.cfg.label_column)
        if cfg.path is None:
            hub = hub_splits(self.name, cfg.hub, None, splits, f"<folder with {self._wanted}>")
            return [read_table(f"{cfg.hub}, {name}", hub[name], columns, labelled, problems) for name in splits]
        folder = Path(cfg.path)
        check_folder(folder, self._wanted)
        found: list[Source | None] = []
        for name in splits:
            if (folder / name).is_dir() and any(folder.glob(f"{name}[.-]*parquet")):
                problems.append(f"{folder}: the split '{name}' is there as a folder and as .parquet; keep one.")
            elif (folder / name).is_dir():
                if not (folder / "train").is_dir():
                    problems.append(f"{folder}: no folder 'train', whose class folders name and number the classes.")
                    return []
                found.append(read_folder(folder / name, class_folders(folder / "train"), labelled, problems))
            elif (table := open_parquet(folder, name, columns[1], problems)) is not None:
                found.append(read_table(f"{folder}, {name}", table, columns, labelled, problems))
        return found

    def _checked(self, splits: Sequence[str], labelled: bool) -> list[Source]:
        """The splits, checked but for what shows only when images are decoded, numbered by one list of classes.

        That is the list that `expect` was given or that was loaded before, else that of the first split that has one.

        Raises:
            UserError: everything that is wrong with them.
        """
        problems: list[str] = []
        sources = [source for source in self.read(splits, labelled, problems) if source is not None]
        if problems:
            raise UserError(problems)
        if self.reference is None and "train" not in splits and not all(source.listed for source in sources):
            self._checked(("train",), labelled=True)  # whose names are numbered first
        named = [source for source in sources if source.classes is not None]
        unnamed = [source for source in sources if source.classes is None]
        declared = getattr(self.cfg, "num_labels", None)
        classes, others = self.reference, "the run's are"
        if classes is None and named:
            classes, others = named[0].classes, f"{named[0].name} has"
        if named and unnamed and not all(source.listed for source in named):
            problems.append(
                f"{named[0].name} has names of classes as labels, {unnamed[0].name} has numbers; give names."
            )
        elif named or self.reference is not None:
            meant = named[0].name if named else f"the run: {some(self.reference or ())}"
            for source in unnamed:
                if source.labels is not None:
                    source.account.notes.append(f"it does not name its classes: its numbers are taken as in {meant}")
        if classes is None:
            if declared is None:
                raise UserError(_NO_CLASSES)
            classes = [str(i) for i in range(declared)]
        elif declared not in (None, len(classes)):
            problems.append(f"task.num_labels={declared}: the data have {len(classes)} classes: {some(classes)}")
        before = len(problems)
        sources = [check(source, len(source.classes or classes), labelled, problems) for source in sources]
        if len(problems) == before:
            sources = [renumbered(source, classes, others, problems) for source in sources]
        if labelled and not problems:
            found = [set(pc.unique(source.labels).to_pylist()) for source in sources]
            for source, labels in zip(sources[1:], found[1:], strict=True):
                if strange := sorted(labels - found[0]):
                    names = some([classes[i] for i in strange])
                    problems.append(f"{source.name}: images of classes that {sources[0].name} has none of: {names}")
                if missing := sorted(found[0] - labels):
                    source.account.notes.append(f"no image of these classes: {some([classes[i] for i in missing])}")
        if problems:
            raise UserError(problems)
        if twins := alike(classes):
            sources[0].account.notes.append(f"classes whose names differ in case or white space only: {some(twins)}")
        self.classes = classes
        if named:
            self.reference = classes
        return sources

    def processor(self, model: Any) -> Preprocessing:
        return Preprocessing.of(super().processor(model), model.path)

    def encode(self, rows: datasets.Dataset, processor: Preprocessing, training: bool) -> datasets.Dataset:
        facts = {
            "format": FORMAT_VERSION,
            "rows": content_hash(rows),
            "labelled": "label" in rows.column_names,
            "resize": processor.resize,
            "resample": processor.resample,
        }
        return cached("images", facts, lambda file: write_pixels(file, rows, processor))

    def collate(self, processor: Preprocessing, training: bool) -> Collate:
        return ImageCollate(processor, self.cfg.augment if training else None)

    # --- after a step ---

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy.item()}

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """With the class's name and number, its probability, and the image's file where it is one."""
        assert self.classes is not None
        probability, label = outputs["logits"].softmax(dim=1).max(dim=1)
        files, found = split.rows["file"][:], []
        for row, i, p in zip(outputs["row"].tolist(), label.tolist(), probability.tolist(), strict=True):
            file = {"file": files[row]} if files[row] is not None else {}
            found.append({"row": row, **file, "prediction": self.classes[i], "label": i, "probability": p})
        return found


_NO_CLASSES = "task.num_labels=null: the data do not name their classes; say how many there are"
