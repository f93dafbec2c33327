"""The images of one split as they were found, and checks of their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.account import Account
from diffora.tasks.labels import in_order
from diffora.tasks.messages import more, some

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""The arrow type of the hub's image columns: the encoded bytes, or the path of a file."""


@dataclass(frozen=True)
class Source:
    """The images of one split as they were found.

    Attributes:
        name: name of the split in messages.
        images: column of `IMAGE`.
        where: place of each image, for messages.
        labels: column of whole numbers, or None.
        classes: class names in the order of the labels, or None if the source has no names.
        files: files whose sizes and times show whether the content has changed; empty for images made in memory.
        listed: whether the source declares ``classes``; otherwise they are the names that occur as labels.
        account: what became of the images.
    """

    name: str
    images: pa.ChunkedArray
    where: Sequence[str]
    labels: pa.ChunkedArray | None
    classes: list[str] | None
    files: Sequence[Path] = ()
    listed: bool = True
    account: Account = field(default_factory=Account)


def check_labels(source: Source, n_classes: int, labelled: bool, problems: list[str]) -> Source:
    """Check the labels of a source; append what is wrong to ``problems``.

    Returns:
        The source. Its labels are None if they are not needed and all of them are -1, the mark for "no label".
    """
    labels = source.labels
    if not len(source.images):
        problems.append(f"{source.name}: no images.")
    elif labels is not None:
        if not labelled and pc.all(pc.equal(pc.fill_null(labels, -1), -1)).as_py():
            return replace(source, labels=None)
        outside = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, n_classes)), True)
        if count := pc.sum(outside).as_py():
            i = pc.index(outside, True).as_py()
            value = "null" if labels[i].as_py() is None else labels[i].as_py()
            problems.append(f"{source.where[i]}: its label {value} is not one of 0 to {n_classes - 1}{more(count)}.")
    return source


def renumbered(source: Source, classes: Sequence[str], others: str, problems: list[str]) -> Source:
    """The checked source with its labels numbered as in ``classes``.

    Args:
        others: words that introduce ``classes`` in messages.
        problems: grows by a message if a class of the source is not in ``classes``.
    """
    if source.classes is None or source.classes == list(classes):
        return source
    places = in_order(source.classes, classes, f"{source.name}: its classes are", others, problems)
    if places is None:
        return source
    labels = source.labels
    if labels is not None and places != list(range(len(places))):
        labels = pa.chunked_array([pa.array(places, pa.int64()).take(labels.combine_chunks())])
        if source.listed:  # otherwise the source has names and no numbers of its own
            source.account.change(
                f"label numbers follow the class names, whose order is {some(source.classes)}", len(labels)
            )
    return replace(source, labels=labels, classes=list(classes))


def as_images(content: pa.Array, paths: pa.Array) -> pa.Array:
    """An `IMAGE` array of encoded bytes and paths."""
    return pa.StructArray.from_arrays([content, paths], fields=list(IMAGE))
