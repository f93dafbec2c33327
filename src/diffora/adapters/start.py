"""Starts a training from an adapter (``method.adapter``): its modules, ranks, scales, shared pairs, and its head."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffora.adapters.fetch import adapter_digest, local_copy
from diffora.adapters.load import check_fit, place_pairs, states_of
from diffora.adapters.manifest import ADAPT, SELECTION, read_manifest
from diffora.adapters.origin import check_layers, labels_of, other_backbone
from diffora.adapters.pairs import StoredPairs
from diffora.adapters.peft_pairs import read_peft_pairs
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """An adapter to go on from.

    Attributes:
        place: what the user gave, a folder or a hub id.
        folder: where its files are.
        pairs: the pairs and the modules saved whole.
        manifest: facts about its model; empty for an adapter of PEFT.
        digest: of its files.
    """

    place: str
    folder: Path
    pairs: StoredPairs
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def read(cls, place: str) -> "Start":
        """Read an adapter of this package or of PEFT. One on the hub is downloaded.

        Raises:
            UserError: there is none, its files are damaged, or it has no low-rank pairs.
        """
        folder = local_copy(place)
        digest = adapter_digest(place)
        try:
            manifest = read_manifest(folder)
        except FileNotFoundError:
            return cls(place, folder, read_peft_pairs(folder), {}, digest)
        if "modules" not in manifest:
            what = "the format of its method" if (folder / ADAPT).is_file() else "a format of PEFT"
            raise UserError(f"{place} has no low-rank pairs to go on from, but {what}")
        return cls(place, folder, StoredPairs.read(folder, manifest), manifest, digest)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the adapter was not trained on.

        Raises:
            UserError: other modules, widths or layers, or other pretrained weights.
        """
        check_layers(model, self.manifest, self.folder)
        modules = dict(model.named_modules(remove_duplicate=False))
        check_fit(modules, replace(self.pairs, heads=[]), self.folder)
        for change in other_backbone(model, self.manifest):
            if any(f".{kind}" in change for kind in ("safetensors", "bin")):
                raise UserError(f"{self.place} was trained on another backbone: {change}")
            log.warning(f"{self.place} was trained on a backbone that differs: {change}")

    def selection(self, grid: Grid, **made: Any) -> Selection:
        """The adapter's own selection: that of its file, or else all modules that have a pair of their own.

        Args:
            grid: the candidates.
            made: further fields of a new `Selection`.
        """
        file = self.folder / SELECTION
        if SELECTION in (self.manifest.get("files") or ()):  # another one belongs to another adapter
            found = Selection.load(file)
            found.check_fits(grid, file)
            return found
        shared = {name for group in self.pairs.groups for name in group}
        own = self.pairs.modules.keys() - shared
        mask = torch.tensor([[name in own for name in row] for row in grid.names])
        return Selection.from_mask(grid, mask, selector="given", **made)

    def put_on(self, model: nn.Module, dropout: float) -> None:
        """Put the pairs and, where it fits, the head on a model, in place.

        Args:
            model: without low-rank layers. What requires gradients is its head.
            dropout: rate on the input of every A.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        states = states_of(self.pairs)
        if why := self._other_head(model, modules, states):
            log.warning(f"the head of {self.place} is not used: {why}")
        else:
            if not self.manifest:
                _check_untied(model, states, self.place)
            for name, state in states.items():
                modules[name].load_state_dict(state)
        places = {name: (rank, scale, dropout) for name, (rank, scale, _) in self.pairs.modules.items()}
        place_pairs(model, modules, replace(self.pairs, modules=places))
        ranks = sorted({rank for rank, _, _ in places.values()})
        log.info(
            f"going on from {self.place}: {len(places)} modules, rank {' and '.join(map(str, ranks))}; its modules, "
            "ranks, scales and shared pairs replace those of the method"
        )

    def _other_head(
        self, model: nn.Module, modules: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]]
    ) -> str | None:
        """Why the adapter's head does not fit a model; None if it fits, or if there is none on either side."""
        if absent := [name for name in states if name not in modules]:
            return f"this model has no {absent[0]}"
        for name, state in states.items():
            given = {key: tuple(value.shape) for key, value in state.items()}
            if given != {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}:
                return f"{name} has another shape in this model"
        inside = tuple(f"{name}." for name in states)
        if fresh := [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(inside)]:
            return f"it has no {fresh[0].rpartition('.')[0]}" if states else "it has none, and this task trains one"
        named = {"id2label": getattr(getattr(model, "config", None), "id2label", None)}
        theirs, ours = self.manifest.get("labels"), labels_of(named) if states else None
        if theirs is not None and ours is not None and list(theirs) != ours:
            return f"its classes are {', '.join(theirs[:5])}, and those of this task {', '.join(ours[:5])}"
        return None


def _check_untied(model: nn.Module, states: Mapping[str, Any], place: str) -> None:
    """Refuse modules saved whole that share weights with other modules. PEFT would train them apart from these."""
    stored = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    for names in places.values():
        saved = [name for name in names if name in stored]
        others = [n for n in names if n not in stored or not torch.equal(stored[n], stored[saved[0]])] if saved else []
        if others:
            raise UserError(
                f"{place} has {saved[0]} whole, and in this model {others[0]} is the same tensor, which has other "
                "values with the adapter: load the model with tie_word_embeddings=False"
            )
