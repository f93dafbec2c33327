"""Image classification: hub datasets, folders of class folders, parquet files.

Pillow decodes and resizes images (torchvision is not needed). Each image is decoded once into a memory-mapped cache of
pixels, with the shorter side at the backbone's size, or for every batch (``task.cache_pixels=false``). Batches then
crop, flip or shift training images.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch.nn.functional as F

from diffora.backbones.processors import ProcessorKind
from diffora.errors import UserError
from diffora.settings.checks import PATH, Help, whole
from diffora.settings.sections import Model, TaskSettings
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Collate, Outputs, Rows, Split, Task
from diffora.tasks.cache import cached
from diffora.tasks.images.batches import Augment, ImageCollate
from diffora.tasks.images.decode import FORMAT_VERSION, pixel_bytes, write_images, write_pixels
from diffora.tasks.images.folders import class_folders, read_folder
from diffora.tasks.images.preprocessing import Preprocessing
from diffora.tasks.images.rows import images_hash, source_rows
from diffora.tasks.images.source import Source, check_labels, renumbered
from diffora.tasks.images.tables import open_parquet, read_table
from diffora.tasks.labels import alike
from diffora.tasks.messages import some
from diffora.tasks.sources.files import check_folder
from diffora.tasks.sources.hub import hub_splits
from diffora.tasks.sources.tables import subset_rows

log = logging.getLogger(__name__)

SAID_FROM_BYTES = 4_000_000_000
_NO_CLASSES = "task.num_labels=null: the data do not name their classes; give their number"


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
    cache_pixels: Annotated[
        bool,
        Help(
            "Decode the images once, into a file of pixels; false: in every epoch, in `trainer.num_workers` processes. "
            "The result is the same."
        ),
    ] = True


class ImageTask(Task):
    """Classify images from the hub, from a folder of class folders, or from parquet files; the metric is accuracy."""

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
        """Class names; None until something is loaded."""
        self.reference: list[str] | None = None
        """Class names that number later splits: those of the model's run, or of the split that was loaded first."""

    # --- before training ---

    def problems(self) -> Iterator[str]:
        if getattr(self.cfg, "validation_split", "validation") is None:
            yield "task.validation_split=null: validation images are not taken from the training split; name a split"
        if self.cfg.path is None and self.cfg.hub is None:
            yield f"task.path=null: task '{self.name}' reads your own images: give the folder that holds {self._wanted}"

    def head(self) -> dict[str, Any]:
        """Number and names of the classes.

        Before anything is loaded, they are those given to `expect`, those of the folders, or those of the YAML.
        """
        classes = self.reference if self.classes is None else self.classes
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
        train, validation = map(source_rows, sources)
        chosen = subset_rows(len(train), self.cfg.max_train_rows, self.accounts["train"])
        if chosen is not None:
            train = train.select(chosen)
        self._note_oddities(train, validation)
        facts = [self.classes, images_hash(train), images_hash(validation)]
        data_hash = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Rows(train, {"validation": validation}, data_hash, self.origin)

    def load_split(self, split: str) -> datasets.Dataset:
        [source] = self._checked((split,), labelled=False)
        self.accounts[split] = source.account
        return source_rows(source)

    def _note_oddities(self, train: datasets.Dataset, validation: datasets.Dataset) -> None:
        """Note what is no fault of the images but makes a result doubtful."""
        assert self.classes is not None
        labels = {"train": set(train["label"][:]), "validation": set(validation["label"][:])}
        for name, found in labels.items():
            if len(found) == 1:
                self.accounts[name].notes.append(f"all images are of the same class: {self.classes[min(found)]}")
        if strange := sorted(labels["validation"] - labels["train"]):  # possible because of task.max_train_rows
            names = some([self.classes[i] for i in strange])
            self.accounts["validation"].notes.append(f"classes that no training row has: {names}")
        keys = {"train": pa.array(train["digest"][:]), "validation": pa.array(validation["digest"][:])}
        note_overlap(self.accounts, keys)

    def expect(self, classes: Sequence[str]) -> None:
        """Number the classes of all splits as the trained model does."""
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
        """What a folder must hold, for messages."""
        return f"train/<class>/ and {self.validation_splits[0]}/<class>/ with images, or these two splits as .parquet"

    def read(self, splits: Sequence[str], labelled: bool, problems: list[str]) -> list[Source | None]:
        """Find the splits. What is wrong is appended to ``problems``.

        Args:
            splits: names of the splits at the source.
            labelled: whether the images must have labels.

        Returns:
            One source for each split; None for a split with faults.
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
                classes = class_folders(folder / "train") if (folder / "train").is_dir() else self.reference
                if classes is None:
                    problems.append(f"{folder}: no folder 'train'; its class folders name and number the classes.")
                    return []
                found.append(read_folder(folder / name, classes, labelled, problems))
            elif (table := open_parquet(folder, name, columns[1], problems)) is not None:
                found.append(read_table(f"{folder}, {name}", table, columns, labelled, problems))
        return found

    def _checked(self, splits: Sequence[str], labelled: bool) -> list[Source]:
        """The splits with checked labels, all numbered by one list of classes. Images are not decoded yet.

        That list is the one given to `expect`, else the one loaded before, else that of the first split that has one.

        Raises:
            UserError: everything that is wrong with the splits.
        """
        problems: list[str] = []
        sources = [source for source in self.read(splits, labelled, problems) if source is not None]
        if problems:
            raise UserError(problems)
        if self.reference is None and "train" not in splits and not all(source.listed for source in sources):
            self._checked(("train",), labelled=True)  # the training split's names define the numbers
        classes, others = self._common_classes(sources, problems)
        before = len(problems)
        sources = [check_labels(source, len(source.classes or classes), labelled, problems) for source in sources]
        if len(problems) == before:
            sources = [renumbered(source, classes, others, problems) for source in sources]
        if labelled and not problems:
            _compare_classes(sources, classes, problems)
            if len(classes) < 2:
                problems.append(f"{sources[0].name}: all images are of the class '{classes[0]}'; two are needed")
        if problems:
            raise UserError(problems)
        if twins := alike(classes):
            sources[0].account.notes.append(
                f"classes whose names differ only in case, white space or invisible characters: {some(twins)}"
            )
        self.classes = classes
        if any(source.classes is not None for source in sources):
            self.reference = classes
        return sources

    def _common_classes(self, sources: Sequence[Source], problems: list[str]) -> tuple[list[str], str]:
        """(the class names that number all of these splits, words that introduce them in messages)

        Raises:
            UserError: nothing says how many classes there are.
        """
        named = [source for source in sources if source.classes is not None]
        unnamed = [source for source in sources if source.classes is None]
        if named and unnamed and not all(source.listed for source in named):
            problems.append(
                f"{named[0].name} has class names as labels, but {unnamed[0].name} has numbers; give names in both."
            )
        elif named or self.reference is not None:
            meant = named[0].name if named else f"the run: {some(self.reference or ())}"
            for source in unnamed:
                if source.labels is not None:
                    source.account.notes.append(
                        f"it does not name its classes: its numbers are taken to mean those of {meant}"
                    )
        classes, others = self.reference, "the run's are"
        if classes is None and named:
            classes, others = named[0].classes, f"{named[0].name} has"
        declared = getattr(self.cfg, "num_labels", None)
        if classes is None:
            if declared is None:
                raise UserError(_NO_CLASSES)
            classes = [str(i) for i in range(declared)]
        elif declared not in (None, len(classes)):
            problems.append(f"task.num_labels={declared}: the data have {len(classes)} classes: {some(classes)}")
        return classes, others

    def processor(self, model: Model) -> Preprocessing:
        return Preprocessing.of(super().processor(model), model.path)

    def encode(self, rows: datasets.Dataset, processor: Preprocessing, training: bool) -> datasets.Dataset:
        facts: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "rows": images_hash(rows),
            "labelled": "label" in rows.column_names,
        }
        if not getattr(self.cfg, "cache_pixels", True):
            if pc.struct_field(rows.data.column("image"), "bytes").null_count:  # images that stay in their files
                facts["files"] = [None if file is None else str(Path(file).resolve()) for file in rows["file"][:]]
            return cached("images", facts, lambda file: write_images(file, rows))
        facts |= {"resize": processor.resize, "resample": processor.resample}

        def write(file: Path) -> None:
            _check_room(file.parent, pixel_bytes(rows, processor), len(rows))
            write_pixels(file, rows, processor)

        return cached("images", facts, write)

    def collate(self, processor: Preprocessing, training: bool) -> Collate:
        return ImageCollate(processor, self.cfg.augment if training else None)

    # --- after a step ---

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy.item()}

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Name, number and probability of the predicted class, and the image's file if it has one."""
        assert self.classes is not None
        probability, label = outputs["logits"].softmax(dim=1).max(dim=1)
        files, found = split.rows["file"][:], []
        for row, i, p in zip(outputs["row"].tolist(), label.tolist(), probability.tolist(), strict=True):
            file = {"file": files[row]} if files[row] is not None else {}
            found.append({"row": row, **file, "prediction": self.classes[i], "class_number": i, "probability": p})
        return found


def _check_room(folder: Path, size: int, n_images: int) -> None:
    """Refuse pixels for which the disk has no room, and say where many gigabytes go.

    Raises:
        UserError: there is not enough room.
    """
    free = shutil.disk_usage(folder).free
    what = f"the pixels of {n_images:,} images need about {size / 1e9:.1f} GB in {folder}"
    advice = "task.cache_pixels=false writes none: workers decode the images (trainer.num_workers)"
    if size > free:
        raise UserError(f"{what}, where {free / 1e9:.1f} GB are free. {advice}")
    if size > SAID_FROM_BYTES:
        log.info(f"{what}. {advice}")


def _compare_classes(sources: Sequence[Source], classes: Sequence[str], problems: list[str]) -> None:
    """Check that each split has no images of classes that the first split lacks, and note the classes it lacks."""
    found = [set(pc.unique(source.labels).to_pylist()) for source in sources]
    for source, labels in zip(sources[1:], found[1:], strict=True):
        if strange := sorted(labels - found[0]):
            names = some([classes[i] for i in strange])
            problems.append(f"{source.name}: images of classes of which {sources[0].name} has none: {names}")
        if missing := sorted(found[0] - labels):
            source.account.notes.append(f"no image of these classes: {some([classes[i] for i in missing])}")
