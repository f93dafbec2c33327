"""Loads adapters that PEFT has no format for. ``diffora.json`` says how to adapt, and a file has the weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from diffora.adapters.manifest import ADAPT, MANIFEST, TRAINED
from diffora.adapters.origin import take_labels
from diffora.adapters.pairs import read_tensors
from diffora.backbones.backbone import Backbone
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError, first_of
from diffora.files import read_json
from diffora.trust import settings


class Adapts(Protocol):
    """Adapts a model, in place: a `diffora.methods.base.Method`."""

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Any: ...


MethodOf = Callable[[DictConfig, Path], Adapts]
"""Makes the method that some settings describe. The path is the file that they come from. Methods stand above this
room, so the function is handed in (`diffora.api.load_adapter`)."""


def load_weights(backbone: Backbone, folder: Path, manifest: Mapping[str, Any] | None, method_of: MethodOf) -> None:
    """Adapt a model as the run did, and load the trained weights into it.

    Args:
        backbone: the pretrained model, which is frozen first.
        folder: the adapter's.
        manifest: its manifest; None if it has none.
        method_of: makes the method.

    Raises:
        UserError: settings are wrong, or the adapter was made for another model.
    """
    cfg = _how_to_adapt(folder / ADAPT)
    method = method_of(cfg, folder / ADAPT)
    if manifest is None:
        raise UserError(
            f"{folder} has no {MANIFEST}: copy the whole folder from the run. Adapters of earlier versions, which had "
            "none, are not read any more: make the run again"
        )
    tensors = read_tensors(folder / TRAINED)
    model = backbone.model
    grid = backbone.find_grid(cfg.model.layer, cfg.model.candidates, cfg.model.get("roles"))
    selection = None if cfg.selection is None else Selection.load(folder / cfg.selection)
    backbone.freeze()
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # as in the run: what a method draws and never trains is not in the file
        method.adapt(model, grid, selection, cfg.seed)
    _fill(model, tensors, folder)
    take_labels(model, manifest, folder)
    if absent := [name for name, p in model.named_parameters() if p.requires_grad and name not in tensors]:
        raise UserError(f"{folder} does not fit this model: it has no {first_of(absent)}")


def _how_to_adapt(file: Path) -> DictConfig:
    """The settings in ``diffora.json``. The file may come from somebody else.

    Raises:
        UserError: the file is wrong; it lists all mistakes, except in the method's own settings.
    """
    cfg = settings(read_json(file), file, ("method", "model"), ("rank", "rho", "finetune", "seed", "selection"))
    problems = []
    if not isinstance(cfg.get("finetune", {}), Mapping | DictConfig):
        problems.append(f"finetune={cfg.finetune!r} must be a group of settings")
    if not isinstance(seed := cfg.get("seed"), int) or not 0 <= seed < 2**63:
        problems.append(f"seed={seed!r} must be a whole number of at least 0")
    name = cfg.get("selection")
    if name is not None and not (isinstance(name, str) and Path(name).name == name):
        problems.append(f"selection={name!r} must be the name of a file beside it, or null")
    if not isinstance(cfg.method.get("name"), str):
        problems.append("method.name must be text")
    problems += _model_problems(cfg.model)
    if problems:
        raise UserError([f"{file}: {problem}" for problem in problems])
    return cfg


def _model_problems(model: DictConfig) -> list[str]:
    """The mistakes in the ``model`` section of ``diffora.json``."""
    problems = []
    for key, fits in (("name", str), ("layer", str | ListConfig | None), ("candidates", ListConfig | None)):
        if key not in model or not isinstance(model[key], fits):
            problems.append(f"model.{key}={model.get(key)!r} must be {'a list' if key == 'candidates' else 'text'}")
    if not isinstance(roles := model.get("roles"), DictConfig | None):
        problems.append(f"model.roles={roles!r} must be a group of settings")
    texts = [] if problems else [*(model.candidates or ()), *(roles or {}).values()]
    texts += model.layer if not problems and isinstance(model.layer, ListConfig) else []
    if strange := [text for text in texts if not isinstance(text, str)]:
        problems.append(f"model.layer, candidates and roles must hold names of modules, not {strange[0]!r}")
    return problems


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load some of a module's tensors."""
    try:
        strange = module.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes
        raise UserError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from None
    if strange:
        raise UserError(f"{folder} does not fit this model, which has no {first_of(strange)}")
