"""The Selection: which modules get a LoRA of their own, as a small JSON file that can be read, edited and reused."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffora.core.grid import Grid
from diffora.errors import UserError
from diffora.files import write_text

FORMAT = 1


@dataclass(frozen=True)
class Selection:
    """The discretised DAM and where it came from.

    Attributes:
        method: which method made it.
        types: the N module types.
        modules: L x N full module names.
        selected: for each layer the types that were selected; edit this to change the selection.
        k: modules per layer that were asked for.
        rho: the sampling ratio behind k.
        seed: of the run that made it.
        gamma_bar: L x N relaxed DAM, None where the selection was not searched.
        split_hash: of the two parts of the training set that the search used, None likewise.
        config: the settings that it was made with.
    """

    method: str
    types: list[str]
    modules: list[list[str]]
    selected: list[list[str]]
    k: int
    rho: float
    seed: int
    gamma_bar: list[list[float]] | None = None
    split_hash: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mask(cls, grid: Grid, mask: Tensor, **rest: Any) -> "Selection":
        """From a boolean L x N mask."""
        chosen = [[t for t, flag in zip(grid.types, row, strict=True) if flag] for row in mask.tolist()]
        return cls(types=list(grid.types), modules=[list(row) for row in grid.names], selected=chosen, **rest)

    def mask(self) -> Tensor:
        """Boolean L x N."""
        return torch.tensor([[t in row for t in self.types] for row in self.selected], dtype=torch.bool)

    def save(self, path: Path) -> None:
        """Write atomically."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Selection":
        """Read and check a selection file.

        Raises:
            UserError: missing, not JSON, or not a selection; every problem is named.
        """
        try:
            raw = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"no selection file at {path}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not a readable JSON file: {error}") from None
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise UserError(f"{path} is not a selection file of format {FORMAT}")
        required = {"method", "types", "modules", "selected", "k", "rho", "seed"}
        known = required | {"gamma_bar", "split_hash", "config"}
        problems = [f"{path}: key {key!r} is missing" for key in sorted(required - raw.keys())]
        problems += [f"{path}: unknown key {key!r}" for key in sorted(raw.keys() - known)]
        if problems:
            raise UserError(problems)
        selection = cls(**raw)
        if len(selection.selected) != len(selection.modules):
            problems.append(f"{path}: 'selected' has {len(selection.selected)} layers, not {len(selection.modules)}")
        for layer, row in enumerate(selection.selected):
            problems += [
                f"{path}: layer {layer} selects {name!r}, which is none of {', '.join(selection.types)}"
                for name in row
                if name not in selection.types
            ]
        if problems:
            raise UserError(problems)
        return selection

    def check_fits(self, grid: Grid, path: Path | str) -> None:
        """Raise a UserError unless this selection was made for a model with the same grid."""
        if self.modules != [list(row) for row in grid.names]:
            first = self.modules[0][0] if self.modules and self.modules[0] else "nothing"
            raise UserError(
                f"{path} was made for {len(self.modules)} layers x {len(self.types)} modules ({first} …); "
                f"this model has {grid.n_layers} x {grid.n_types} ({grid.names[0][0]} …)"
            )
