"""Images in folders: a folder for each class within the folder of a split."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from diffora.tasks.account import Account
from diffora.tasks.images.decode import extensions
from diffora.tasks.images.source import Source, as_images
from diffora.tasks.labels import known_classes
from diffora.tasks.messages import some


def class_folders(folder: Path) -> list[str]:
    """Class names in the order of the labels: the sorted names of the folders in the folder of a split."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_folder(folder: Path, classes: Sequence[str], labelled: bool, problems: list[str]) -> Source:
    """The images in the class folders of a split.

    The files of a class may be in folders within the class folder. Hidden files, and files without the extension of an
    image, are counted and left out.

    Args:
        folder: the folder of the split.
        classes: class names of the training images, in the order of the labels.
        labelled: whether the images need labels. Otherwise they may also be in ``folder`` itself.
        problems: grows by what is wrong.
    """
    account = Account()
    files: list[Path] = []
    labels: list[int] = []
    named = class_folders(folder)
    for name in named:
        entries = list(_files_below(folder / name))
        found = _images_among(entries, folder, account, problems)
        if name not in classes:
            close = known_classes(name, classes)
            hint = f"; is it {close}?" if close else ""
            problems.append(
                f"{folder / name}: '{name}' is not a class of the training images, which have {some(classes)}{hint}"
            )
            continue
        if not found:
            present = some(sorted(file.name for file in entries)) or "nothing"
            problems.append(
                f"{folder / name}: no file has the extension of an image that Pillow can read; found {present}."
            )
        files += found
        labels += [classes.index(name)] * len(found)
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name.startswith("."):
            _images_among(_files_below(entry), folder, account, problems)  # counts these files as hidden
    beside = _images_among((entry for entry in folder.iterdir() if not entry.is_dir()), folder, account, problems)
    if named and beside:
        shown = some([file.name for file in beside])
        problems.append(f"{folder}: images beside the class folders, where they have no class: {shown}.")
    elif not named:
        files = beside
        if labelled or not files:
            problems.append(f"{folder}: no class folders; images must be in {folder}/<class>/.")
    paths = [str(file) for file in files]
    images = as_images(pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string()))
    numbers = pa.chunked_array([pa.array(labels, pa.int64())]) if named else None
    return Source(str(folder), pa.chunked_array([images]), paths, numbers, list(classes), files, account=account)


def _images_among(files: Iterable[Path], folder: Path, account: Account, problems: list[str]) -> list[Path]:
    """The files that are images by their extension, sorted; the account counts all files and those left out."""
    found = []
    for file in sorted(files):
        account.read += 1
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            account.drop("hidden files", 1)
        elif file.suffix.lower() in extensions():
            found.append(file)
            if not file.is_file():
                what = "a link to a file that does not exist" if file.is_symlink() else "not a regular file"
                problems.append(f"{file}: {what}.")
        else:
            account.drop(f"no image: {file.suffix.lower() or file.name}", 1)
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, also through links. A link to a folder that contains it is not followed."""
    inside: dict[str, frozenset[str]] = {}  # for each path of a folder: the real paths of itself and of its parents
    for place, folders, files in os.walk(folder, followlinks=True):
        above = inside.get(os.path.dirname(place), frozenset())
        inside[place] = above | {os.path.realpath(place)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in inside[place]]
        yield from (Path(place, name) for name in files)
