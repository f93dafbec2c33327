"""Batches of pixels: crop, resize, vary training images, normalise.

How a training image is varied depends only on (seed, stage, epoch, row).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from diffora.settings.checks import Help, number
from diffora.tasks.base import Batch
from diffora.tasks.images.decode import picture_of
from diffora.tasks.images.preprocessing import Preprocessing

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


AREA = number(lambda v: 0 < v <= 1, "a number in (0, 1]: a share of the area")
SHIFT = number(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5: a share of the side")


@dataclass(frozen=True)
class Augment:
    """How training images are augmented."""

    crop_area: Annotated[
        Annotated[float, AREA] | None,
        Help("Least share of the area in random resized crops, of aspect 3:4 to 4:3; null: no crops."),
    ]
    flip: Annotated[bool, Help("Exchange left and right in half of the cases.")]
    shift: Annotated[
        float, SHIFT, Help("Shift by up to this share of the side in both directions; the rest becomes black.")
    ]


class ImageCollate:
    """Makes one batch of images, from cached pixels (`decode.write_pixels`) or encoded ones (`decode.write_images`).

    Args:
        preprocessing: of the backbone.
        augment: how to vary the images; None for evaluation. With it, rows must come with ``draw``: numbers that
            together with ``row`` are the random seed.
    """

    def __init__(self, preprocessing: Preprocessing, augment: Augment | None) -> None:
        self.preprocessing, self.augment = preprocessing, augment
        std = torch.tensor(preprocessing.std)
        self._factor = (preprocessing.scale / std).view(1, 3, 1, 1)
        self._offset = (-torch.tensor(preprocessing.mean) / std).view(1, 3, 1, 1)

    def __call__(self, rows: Mapping[str, Any]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            pixel_values: float32 [n, 3, side, side]; row and, if the rows have them, labels: long [n].
        """
        images = self._pictures(rows)
        if self.augment is None:
            p = self.preprocessing
            views = [_view(image, centre(image.height, image.width, p), p) for image in images]
        else:
            views = [self._vary(image, (*rows["draw"], row)) for image, row in zip(images, rows["row"], strict=True)]
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float().contiguous()
        batch = {"pixel_values": pixels.mul_(self._factor).add_(self._offset)}
        return batch | {name: torch.tensor(rows[name]) for name in ("labels", "row") if name in rows}

    def _pictures(self, rows: Mapping[str, Any]) -> list[Image.Image]:
        """The pictures from their cached pixels, or decoded from the encoded images."""
        if "pixels" not in rows:
            p = self.preprocessing
            pairs = zip(rows["image"], rows["digest"], strict=True)
            return [picture_of(image, digest, p.resize, p.resample) for image, digest in pairs]
        return [
            Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
            for pixels, height, width in zip(rows["pixels"], rows["height"], rows["width"], strict=True)
        ]

    def _vary(self, image: Image.Image, seed: tuple[int, ...]) -> np.ndarray:
        """A varied view: uint8 [side, side, 3]."""
        p, a, rng = self.preprocessing, self.augment, np.random.default_rng(seed)
        assert a is not None
        height, width = image.height, image.width
        box = centre(height, width, p) if a.crop_area is None else random_box(height, width, a.crop_area, rng)
        seen = _view(image, box, p)
        if a.flip and rng.random() < 0.5:
            seen = seen[:, ::-1]
        if most := round(a.shift * p.crop):
            seen = shifted(seen, *rng.integers(-most, most, size=2, endpoint=True).tolist())
        return seen


def _view(image: Image.Image, box: Box, preprocessing: Preprocessing) -> np.ndarray:
    """The content of a box, resized to the model's size: uint8 [side, side, 3]."""
    size = preprocessing.crop, preprocessing.crop
    return np.asarray(image.resize(size, Image.Resampling(preprocessing.resample), box))


def centre(height: int, width: int, preprocessing: Preprocessing) -> Box:
    """The box for evaluation. It equals resizing the shorter side and then cutting out the centre."""
    short = min(height, width)
    side = short * preprocessing.crop / preprocessing.resize
    left, top = (width - side) / 2, (height - side) / 2
    if short == preprocessing.resize:  # no resizing, so use whole pixels
        left, top = int(left), int(top)
    return left, top, left + side, top + side


def random_box(height: int, width: int, least: float, rng: np.random.Generator) -> Box:
    """A random resized crop (Szegedy et al. 2015): a share of the area from ``least`` to 1, an aspect from 3:4 to 4:3.

    It is the first of ten draws that fits into the image; if none fits, the largest centred box of an allowed aspect.
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
    """An image [height, width, 3] moved by whole pixels; the free area is black."""
    moved = np.zeros_like(image)
    h, w = image.shape[:2]
    moved[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = image[
        max(-down, 0) : h - max(down, 0), max(-right, 0) : w - max(right, 0)
    ]
    return moved
