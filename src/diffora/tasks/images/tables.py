"""Images in tables: a column of images and a column of labels, from the hub or from parquet files."""

import glob
import hashlib
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from diffora.errors import first_line
from diffora.places import default_cache_dir
from diffora.tasks.account import Account, note_ignored
from diffora.tasks.images.rows import identity
from diffora.tasks.images.source import IMAGE, Source, as_images
from diffora.tasks.labels import class_names
from diffora.tasks.messages import some
from diffora.tasks.sources.files import split_files
from diffora.tasks.sources.tables import check_columns


def open_parquet(folder: Path, split: str, label: str, problems: list[str]) -> datasets.Dataset | None:
    """A split from one or several parquet files, as the hub stores them.

    Args:
        label: the column of the labels. All files must declare the same classes, because `datasets` reads those of one
            file only.
        problems: grows by what is wrong.

    Returns:
        None if there are no such files, or if they cannot be read.
    """
    place = folder if any(folder.glob(f"{split}[.-]*parquet")) else folder / "data"
    if place == folder and any((folder / "data").glob(f"{split}[.-]*parquet")):
        problems.append(f"{folder}: the split '{split}' is there as .parquet and in {folder / 'data'} too; keep one.")
        return None
    if not any(place.glob(f"{split}[.-]*parquet")):
        present = sorted(entry.name for entry in folder.iterdir())
        looked = f"looked for {split}/ with a folder for each class, {split}.parquet and {split}-00000-of-0000*.parquet"
        problems.append(f"{folder}: nothing for the split '{split}'; {looked}; found {some(present) or 'nothing'}.")
        return None
    before = len(problems)
    files = [str(file) for file in split_files(place, split, problems, ("parquet",))]
    if len(problems) > before:
        return None
    try:
        _check_same_classes(files, label, problems)
        if len(problems) > before:
            return None
        # `datasets` identifies files by name and time only. A file that replaces another one can have the same.
        known = hashlib.sha256(json.dumps([identity(Path(file)) for file in files]).encode()).hexdigest()
        patterns = [glob.escape(file) for file in files]  # `datasets` takes the [1] in a path for a pattern
        return datasets.Dataset.from_parquet(patterns, cache_dir=str(default_cache_dir() / "parquet" / known))
    except Exception as error:  # the errors of arrow and `datasets` have no common base class
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        problems.append(f"{', '.join(files)} cannot be read as .parquet: {reason}")
        return None


def _check_same_classes(files: list[str], label: str, problems: list[str]) -> None:
    names = {file: class_names(pa.parquet.read_schema(file), label) for file in files}
    for file, classes in names.items():
        if classes != names[files[0]]:
            problems.append(
                f"{file}: column '{label}': its classes are {some(classes or ['without names'])}; {files[0]} has "
                f"{some(names[files[0]] or ['none'])}; all shards must name them in the same order"
            )


def read_table(
    name: str, found: datasets.Dataset, columns: tuple[str, str], labelled: bool, problems: list[str]
) -> Source | None:
    """The images and labels of a split.

    Args:
        name: name of the split in messages.
        found: the split.
        columns: names of the image column and the label column.
        labelled: whether the labels must be there.
        problems: grows by what is wrong.

    Returns:
        None if something is wrong.
    """
    before = len(problems)
    (image, label), present = columns, found.column_names
    check_columns(present, columns if labelled or label in present else columns[:1], name, problems)
    if len(problems) > before:
        return None
    images = found.data.table.column(image)
    if pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type):  # bytes without paths
        parts = [as_images(part.cast(pa.binary()), pa.nulls(len(part), pa.string())) for part in images.chunks]
        images = pa.chunked_array(parts, IMAGE)
    if images.type != IMAGE:
        problems.append(f"{name}: column '{image}' holds {images.type}, expected images ({IMAGE}, or binary).")
    labels, classes, listed = _labels(name, found, label, problems) if label in present else (None, None, False)
    if len(problems) > before:
        return None
    account = Account(len(found))
    note_ignored(account, [column for column in present if column not in columns])
    where = [f"{name}, row {i} (data rows, counted from 1), column '{image}'" for i in range(1, len(found) + 1)]
    files = [Path(entry["filename"]) for entry in found.cache_files]
    if files:
        files += _outside(images)
    return Source(name, images, where, labels, classes, files, listed, account)


def _outside(images: pa.ChunkedArray) -> list[Path]:
    """The files of images of which a table has the path only."""
    content, paths = (pc.struct_field(images, field) for field in ("bytes", "path"))
    names = paths.filter(pc.is_null(content)).drop_null().to_pylist()
    return [file for name in names if (file := Path(name)).is_file()]


def _labels(
    name: str, found: datasets.Dataset, label: str, problems: list[str]
) -> tuple[pa.ChunkedArray, list[str] | None, bool]:
    """(labels as numbers, class names or None, whether the source declares these names)"""
    labels, feature = found.data.table.column(label), found.features[label]
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    listed = classes is not None
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):  # class names as labels
        labels = pc.utf8_trim_whitespace(labels)
        labels = pc.if_else(pc.equal(labels, ""), pa.scalar(None, labels.type), labels)
        classes = sorted(pc.unique(labels).drop_null().to_pylist())
        labels = pc.index_in(labels, pa.array(classes, labels.type)).cast(pa.int64())
    elif not pa.types.is_integer(labels.type):
        problems.append(f"{name}: column '{label}' holds {labels.type}, expected whole numbers from 0 or class names.")
    else:  # unsigned numbers could not be compared with -1, the mark for "no label"
        labels = labels.cast(pa.int64(), safe=False)
    return labels, classes, listed
