"""What a backbone's image processor does to pixels, as plain numbers."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffora.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How images become the input of a backbone.

    Attributes:
        resize: number of pixels to which the shorter side of an image is resized.
        crop: side, in pixels, of the square that is then cut out of the centre; the model sees this square.
        resample: Pillow's number for the interpolation.
        scale: factor for the value of a byte.
        mean, std: after scaling, subtract the mean and divide by std, for each channel (red, green, blue).
    """

    resize: int
    crop: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, path: str) -> "Preprocessing":
        """Take the numbers from a transformers image processor.

        Args:
            path: ``model.path``, for messages.

        Raises:
            UserError: its images are not square or do not have three channels, or one of its numbers is not usable.
        """
        size = _side(processor.size, f"{path}: size")
        crop = _side(processor.crop_size, f"{path}: crop_size") if getattr(processor, "do_center_crop", None) else size
        resize = max(_resize_of(processor, size), crop)
        normalise = processor.do_normalize
        mean = tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0)
        std = tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0)
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"model.path={path}: its images have {len(mean)} channels; images must have three, RGB")
        resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        numbers = {"image_mean": mean, "image_std": std, "rescale_factor": (scale,)}
        for key, values in numbers.items():
            low = 0 if key == "image_mean" else 1e-6
            if not all(isinstance(value, int | float) and low <= value <= 1000 for value in values):
                raise UserError(f"model.path={path}: {key}={list(values)} must hold numbers from {low} to 1000")
        if getattr(processor, "do_flip_channel_order", False):
            raise UserError(f"model.path={path}: do_flip_channel_order=true is not supported: images are RGB, not BGR")
        if resample not in list(Image.Resampling):
            raise UserError(f"model.path={path}: resample={resample!r} must be one of Pillow's {list(range(6))}")
        return cls(
            resize=resize,
            crop=crop,
            resample=int(resample),
            scale=scale,
            mean=mean,
            std=std,
        )


def _resize_of(processor: Any, size: int) -> int:
    """To how many pixels the shorter side is resized: more than the model sees if the processor cuts off a margin."""
    share, kind = getattr(processor, "crop_pct", None), type(processor).__name__
    if kind.startswith("Levit"):
        return int(size * 256 / 224)
    if share is None or (kind.startswith("ConvNext") and size >= 384):
        return size
    return int(size / share)


def _side(size: Any, where: str) -> int:
    """The side of a square, from any form in which image processors give sizes."""
    if isinstance(size, int):
        return size
    sides = {int(size[key]) for key in ("height", "width", "shortest_edge") if size.get(key)}
    if len(sides) != 1:
        raise UserError(f"model.path={where}={dict(size)} must be the size of a square image")
    return sides.pop()
