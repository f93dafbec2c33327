"""The embedded image task: handwritten digits of 8x8 pixels, without those that the tiny ViT was pretrained on.

scikit-learn includes the images (1797, from the test set of UCI's "Optical Recognition of Handwritten Digits"), so
nothing is downloaded or shipped. The tiny ViT was pretrained on the digits 0 to 4 (`scripts/pretrain_tiny_vit.py`);
this task is to classify the digits 5 to 9. No two of the 1797 images are equal. The same 13 people wrote all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from diffora.errors import UserError
from diffora.settings.checks import ROWS, Help, whole
from diffora.tasks.account import Account
from diffora.tasks.images.source import IMAGE, Source
from diffora.tasks.vision import ImageTask, VisionSettings

PRETRAINED, ASKED = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
SPLIT_SEED = 0  # the same split in every run, for any seed of the run


def digits(which: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(images: uint8 [n, 8, 8] from 0 (paper) to 255; digits: [n]) for the given digits.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("task=digits needs the images in scikit-learn: pip install scikit-learn") from None
    found: Any = load_digits()
    wanted = np.isin(found.target, which)
    return np.rint(found.images[wanted] * (255 / 16)).astype(np.uint8), found.target[wanted]


@dataclass(frozen=True, kw_only=True)
class DigitsSettings(VisionSettings):
    """The settings of `DigitsTask`."""

    validation_rows: Annotated[int, whole(2, ROWS), Help("Images to validate on, of the 896.", "rows")]


class DigitsTask(ImageTask):
    """Tell the digits 5 to 9 apart."""

    settings = DigitsSettings
    test_splits = ()

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.classes = [str(digit) for digit in ASKED]

    @property
    def origin(self) -> str:
        return "embedded:digits"

    def problems(self) -> Iterator[str]:
        return iter(())

    def read(self, splits: Sequence[str], labelled: bool, problems: list[str]) -> list[Source | None]:
        images, targets = digits(ASKED)
        order, n = np.random.default_rng(SPLIT_SEED).permutation(len(targets)), self.cfg.validation_rows
        if n >= len(order):
            problems.append(
                f"task.validation_rows={n} must be less than {len(order)}, the number of images: training needs some."
            )
        rows = {"train": np.sort(order[n:]), "validation": np.sort(order[:n])}
        if missing := [name for name in splits if name not in rows]:
            problems.append(f"split={missing[0]}: task '{self.name}' has the splits {', '.join(rows)}.")
        return [self._source(name, images[rows[name]], targets[rows[name]]) for name in splits if name in rows]

    def _source(self, name: str, images: np.ndarray, targets: np.ndarray) -> Source:
        # PGM is a header followed by the grey values, so the bytes do not depend on an encoder's version.
        files = [{"bytes": b"P5 8 8 255\n" + image.tobytes(), "path": None} for image in images]
        labels = pa.chunked_array([pa.array(targets - ASKED[0], pa.int64())])
        where = [f"digits, {name}, row {i}" for i in range(1, len(files) + 1)]
        column = pa.chunked_array([pa.array(files, IMAGE)])
        return Source(name, column, where, labels, self.classes, account=Account(len(files)))
