"""diffora as a library: functions for your own models and loaders. ``import diffora`` offers the same names."""

from pathlib import Path
from typing import Any

from torch import nn

from diffora.adapters.export import save_adapter
from diffora.adapters.fetch import local_copy
from diffora.adapters.load import load_onto, warn_of_other_backbone
from diffora.adapters.merge import merge_updates
from diffora.adapters.origin import without_wrappers
from diffora.backbones.backbone import Backbone
from diffora.core.attach import detach
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import Method
from diffora.standalone.attach import attach
from diffora.standalone.search import search
from diffora.standalone.select import select
from diffora.standalone.within_time import within_time
from diffora.trust import class_at

__all__ = [
    "Selection",
    "attach",
    "detach",
    "find_grid",
    "load_adapter",
    "merge_updates",
    "save_adapter",
    "search",
    "select",
    "within_time",
]


def load_adapter(
    model: nn.Module | Backbone,
    folder: Path | str,
    method: str | None = None,
    *,
    freeze: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Put an exported adapter on a pretrained model, in place, with ranks, scales and sharing as they were trained.

    What was trained, except for the head, requires gradients afterwards, so training can go on. PEFT's own layers are
    loaded for inference only.

    Args:
        model: the pretrained model with a head, without low-rank layers.
        folder: the ``adapter/`` of a run, an adapter that PEFT wrote, or the hub id of one, such as ``owner/name``. A
            folder of that name has priority.
        method: dotted path of your own `Method`, if the adapter was trained with one that is not in this package. For
            safety, no name in the folder itself is imported from outside the package.
        freeze: freeze everything else, the head too. To train the head, call ``model.classifier.requires_grad_(True)``
            afterwards. False leaves everything else as it is.
        revision: branch, tag or commit on the hub.

    A warning says if the model was loaded from other files than those that the adapter was trained on.

    Returns:
        The same model.

    Raises:
        UserError: missing, damaged or unreadable files, or an adapter of another model.
    """

    def method_of(cfg: Any, file: Path) -> Method:
        target, source = (method, None) if method else (cfg.method.get("_target_"), file)
        kind = class_at(target, Method, "method._target_", source)
        try:
            made: Method = kind.from_config(cfg)
        except UserError as error:
            raise UserError([f"{file}: {problem}" for problem in error.problems]) from None
        return made

    place = local_copy(folder, revision)
    if isinstance(model, Backbone):  # the caller knows where it comes from
        load_onto(model, place, method_of, freeze)
        return model.model
    inner = without_wrappers(model)
    warn_of_other_backbone(inner, place)
    load_onto(Backbone.of(inner), place, method_of, freeze)
    return model
