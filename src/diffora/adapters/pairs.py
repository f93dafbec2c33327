"""Low-rank pairs in files: a LoRA adapter that other programs read, and that can be trained on.

Programs disagree about ranks and scales that differ between modules. vLLM, TensorRT-LLM and diffusers divide
``lora_alpha`` by the ``r`` of the configuration for all modules and ignore patterns. llama.cpp divides by each tensor's
own rank. PEFT knows patterns. So there are two forms. Each module that shares a pair gets a copy in both.

- ``uniform``: every module gets the largest rank, filled up with rows of zeros, and the scale 1: its own scale is
  multiplied into its B. All programs read it in the same way.
- ``compact``: every module has its own rank, and PEFT's patterns say ranks and scales. Only PEFT and this package read
  it.

``manifest.json`` has each module's rank, scale and dropout, and the groups that share. In the form ``uniform``,
dividing by a scale that is a power of two restores B exactly. Any other scale rounds, so ``exact.safetensors`` then has
B itself.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from diffora.adapters.fetch import local_copy
from diffora.adapters.manifest import (
    ADAPT,
    CONFIG,
    EXACT,
    MANIFEST,
    SELECTION,
    TRAINED,
    WEIGHTS,
    read_manifest,
    write_manifest,
)
from diffora.core.linear import FLOATS
from diffora.errors import UserError, first_of
from diffora.files import atomic, write_text

UNIFORM, COMPACT = "uniform", "compact"
PREFIX = "base_model.model."
"""PEFT puts this before the name of every module."""
LOADED_WHOLE = "diffora_loaded_whole"
"""Attribute of a model: names of the modules that an adapter filled. They are saved again with the adapter."""

Kept = Mapping[str, tuple[Tensor, Tensor, float]]
"""(A (rank, in), B^T (rank, out), s) by module, on the CPU."""


def equal_groups(kept: Kept, shared: Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups of two or more modules that share a pair and still have the same update after gates are multiplied in.

    Args:
        kept: the updates, gates multiplied in.
        shared: groups of modules that share a pair. Their gates may differ.
    """
    groups = []
    for names in shared:
        present = [name for name in names if name in kept]
        same = [name for name in present if _same(kept[name], kept[present[0]])]
        groups += [same] if len(same) > 1 else []
    return groups


def _same(one: tuple[Tensor, Tensor, float], other: tuple[Tensor, Tensor, float]) -> bool:
    return one[2] == other[2] and torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def tensors_of(kept: Kept, groups: Sequence[Sequence[str]], form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors for PEFT's file.

    Returns:
        (A and B under PEFT's names; exact B^T by module if B is rounded, which happens in the form ``uniform`` only).
    """
    most = max(len(lora_a) for lora_a, _, _ in kept.values())
    copies = {name for group in groups for name in group[1:]}
    tensors: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, (lora_a, lora_bt, scale) in kept.items():
        uniform = form == UNIFORM
        more, stored = (0, 0, 0, most - len(lora_a) if uniform else 0), lora_bt * scale if uniform else lora_bt
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(lora_a, more).clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(stored, more).T.contiguous().clone()
        if uniform and name not in copies and not torch.equal(stored / scale, lora_bt):
            exact[name] = lora_bt.clone(memory_format=torch.contiguous_format)
    return tensors, exact


def ranks_and_scales(kept: Kept, form: str) -> dict[str, Any]:
    """The entries of PEFT's configuration that say the ranks and scales of all modules."""
    ranks = {name: len(lora_a) for name, (lora_a, _, _) in kept.items()}
    most = max(ranks.values())
    if form == UNIFORM:
        return {"r": most, "lora_alpha": most, "rank_pattern": {}, "alpha_pattern": {}}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in kept.items()}
    alpha = next(alphas[name] for name, rank in ranks.items() if rank == most)
    # PEFT also finds a name at the end of another one, unless it is bound to the start.
    exactly = {name: f"^{re.escape(name)}" for name in kept}
    return {
        "r": most,
        "lora_alpha": alpha,
        "rank_pattern": {exactly[name]: rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {exactly[name]: own for name, own in alphas.items() if own != alpha},
    }


def write_pairs(
    folder: Path,
    kept: Kept,
    groups: Sequence[Sequence[str]],
    dropout: Mapping[str, float],
    whole: Mapping[str, Tensor],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    form: str,
) -> None:
    """Write an adapter of low-rank pairs with its manifest, for PEFT and for this package.

    Args:
        folder: where the files go.
        kept: the updates.
        groups: modules that share a pair (`equal_groups`).
        dropout: rate by module.
        whole: tensors of modules that are saved whole, by PEFT's names.
        config: PEFT's configuration; its ranks and scales are added here.
        facts: further entries of the manifest. Its ``heads`` names the modules that are saved whole.
        form: ``uniform`` or ``compact``.
    """
    tensors, exact = tensors_of(kept, groups, form)
    write_tensors(folder / WEIGHTS, {**tensors, **whole})
    if exact:
        write_tensors(folder / EXACT, exact)
    earlier = [ADAPT, TRAINED] if (folder / ADAPT).is_file() else []
    for name in (*earlier, *([] if exact else [EXACT])):
        (folder / name).unlink(missing_ok=True)  # of an earlier adapter
    write_text(folder / CONFIG, json.dumps({**config, **ranks_and_scales(kept, form)}, indent=1) + "\n")
    modules = {
        name: {"rank": len(lora_a), "scale": scale, "dropout": dropout[name]}
        for name, (lora_a, _, scale) in kept.items()
    }
    files = [CONFIG, WEIGHTS, *([EXACT] if exact else []), *([SELECTION] if (folder / SELECTION).is_file() else [])]
    write_manifest(folder, files, {**facts, "modules": modules, "shared": groups, "form": form})


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, complete or not at all."""
    from safetensors.torch import save_file

    with atomic(file) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # safetensors' own, or the system's
        raise UserError(f"{file} cannot be read as tensors: {error}") from None


@dataclass(frozen=True)
class StoredPairs:
    """Low-rank pairs as they are stored: what ``manifest.json`` says about them, and the tensors.

    Attributes:
        modules: (rank, scale, dropout) by module.
        groups: modules that share a pair.
        heads: modules that are saved whole.
        tensors: by PEFT's names.
        form: ``uniform`` or ``compact``.
        exact: B^T by module, if it is rounded in ``tensors``. A group has one entry, by its first module.
    """

    modules: dict[str, tuple[int, float, float]]
    groups: list[list[str]]
    heads: list[str]
    tensors: dict[str, Tensor]
    exact: dict[str, Tensor]
    form: str = UNIFORM

    @classmethod
    def read(cls, folder: Path, manifest: Mapping[str, Any]) -> "StoredPairs":
        """Read the files, and check what can be checked without the model.

        Raises:
            UserError: files are wrong; it lists all mistakes.
        """
        if problems := [f"{folder / MANIFEST}: {problem}" for problem in _layout_problems(manifest)]:
            raise UserError(problems)
        modules = {name: (m["rank"], m["scale"], m["dropout"]) for name, m in manifest["modules"].items()}
        exact = read_tensors(folder / EXACT) if EXACT in manifest["files"] else {}
        tensors, form = read_tensors(folder / WEIGHTS), manifest.get("form", UNIFORM)
        pairs = cls(modules, manifest["shared"], manifest["heads"], tensors, exact, form)
        if problems := [f"{folder / WEIGHTS}: {problem}" for problem in pairs.problems()]:
            raise UserError(problems)
        return pairs

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B^T) as stored: in the form ``uniform`` with rows of zeros, and the scale multiplied into B^T."""
        place = f"{PREFIX}{name}"
        return self.tensors[f"{place}.lora_A.weight"], self.tensors[f"{place}.lora_B.weight"].T

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B^T) as they were trained."""
        rank, scale, _ = self.modules[name]
        lora_a, lora_bt = self.stored(name)
        if self.form == UNIFORM:
            lora_bt = self.exact[name] if name in self.exact else lora_bt[:rank] / scale
        # Copy them: memory mapped from a file has another alignment, and products with it would round differently.
        form = torch.contiguous_format
        return lora_a[:rank].clone(memory_format=form), lora_bt.clone(memory_format=form)

    def all(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """(A, B^T, scale) as they were trained, by module. Modules of a group get the same tensors."""
        first = {name: group[0] for group in self.groups for name in group}
        found = {name: self.pair(name) for name in self.modules if first.get(name, name) == name}
        return {name: (*found[first.get(name, name)], scale) for name, (_, scale, _) in self.modules.items()}

    def whole(self) -> dict[str, Tensor]:
        """The tensors of modules that are saved whole, by PEFT's names."""
        lora = {f"{PREFIX}{name}.lora_{matrix}.weight" for name in self.modules for matrix in "AB"}
        return {key: value for key, value in self.tensors.items() if key not in lora}

    def problems(self) -> Iterator[str]:
        """One message for each contradiction between tensors and manifest."""
        most = max(rank for rank, _, _ in self.modules.values())
        known = set()
        for name, (rank, scale, _) in self.modules.items():
            places = [f"{PREFIX}{name}.lora_{matrix}.weight" for matrix in "AB"]
            known.update(places)
            if any(place not in self.tensors for place in places):
                yield f"it has no A and B for {name}"
                continue
            lora_a, folded = self.stored(name)
            kinds = {lora_a.dtype, folded.dtype} | ({self.exact[name].dtype} if name in self.exact else set())
            if strange := sorted(map(str, kinds.difference(FLOATS))):
                yield f"A or B of {name} is of type {strange[0]}: it must be float32, float64, bfloat16 or float16"
                continue
            wanted, which = (most, "the largest rank") if self.form == UNIFORM else (rank, "its rank")
            if lora_a.ndim != 2 or folded.ndim != 2 or not len(lora_a) == len(folded) == wanted:
                yield f"A and B of {name} must have {wanted} rows and columns, {which} in {MANIFEST}"
            elif lora_a[rank:].any() or folded[rank:].any():
                yield f"A and B of {name} are not zero beyond its rank {rank}"
            elif name in self.exact and not torch.equal(self.exact[name] * scale, folded[:rank]):
                yield f"B of {name} is another one in {EXACT}"
        for name, tensor in self.tensors.items():
            if tensor.dtype in FLOATS and not tensor.isfinite().all():
                yield f"{name} has numbers that are not finite"
        if not self.exact.keys() <= self.modules.keys():
            yield f"{EXACT} has {min(self.exact.keys() - self.modules.keys())}, which {MANIFEST} does not name"
        inside = tuple(f"{PREFIX}{name}." for name in (*self.modules, *self.heads))
        if strange := [key for key in self.tensors if key not in known and not key.startswith(inside)]:
            yield f"it has {first_of(strange)}, which {MANIFEST} does not name"
        for group in self.groups:
            pairs = [self.stored(name) for name in group if f"{PREFIX}{name}.lora_A.weight" in self.tensors]
            if any(not torch.equal(*both) for pair in pairs for both in zip(pair, pairs[0], strict=True)):
                yield f"{', '.join(group)} share a pair in {MANIFEST}, but their A and B differ"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layout_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """One message for each wrong entry of a manifest about low-rank pairs."""
    modules, groups, heads = manifest.get("modules"), manifest.get("shared"), manifest.get("heads")
    if not isinstance(modules, dict) or not modules:
        yield "modules must be a group of entries by module"
        return
    for name, entry in modules.items():
        entry = entry if isinstance(entry, dict) else {}
        rank, scale, dropout = entry.get("rank"), entry.get("scale"), entry.get("dropout")
        if not (_is_number(rank) and isinstance(rank, int) and rank >= 1):
            yield f"modules.{name}.rank={rank!r} must be a whole number of at least 1"
        if not (_is_number(scale) and 1e-38 < scale < 1e38):  # what float32 holds
            yield f"modules.{name}.scale={scale!r} must be a number above 0"
        if not (_is_number(dropout) and 0 <= dropout < 1):
            yield f"modules.{name}.dropout={dropout!r} must be a rate in [0, 1)"
    if manifest.get("form", UNIFORM) not in (UNIFORM, COMPACT):
        yield f"form={manifest['form']!r} must be {UNIFORM} or {COMPACT}"
    if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
        yield f"heads={heads!r} must be a list of modules"
    if not isinstance(groups, list) or not all(
        isinstance(g, list) and g and set(map(type, g)) == {str} for g in groups
    ):
        yield f"shared={groups!r} must be a list of lists of modules"
        return
    seen: set[str] = set()
    for group in groups:
        for name in group:
            if name not in modules:
                yield f"shared names {name}, which is not in modules"
            if name in seen:
                yield f"shared names {name} twice"
            seen.add(name)
        if len({json.dumps(modules[name], sort_keys=True) for name in group if name in modules}) > 1:
            yield f"{', '.join(group)} share a pair, but not its rank, scale and dropout"


def retie(model: nn.Module, folder: Path | str, adapter: str = "default") -> None:
    """Make the modules that share a pair share it again in a `peft.PeftModel`, in place.

    PEFT gives each module a copy, and the copies drift apart when training goes on. Call this right after
    ``PeftModel.from_pretrained(base, folder, is_trainable=True)`` and before the optimiser is made.
    ``save_pretrained`` works as before, and its copies are equal.

    Args:
        model: the `PeftModel`. A model into which transformers itself loaded the adapter
            (``AutoModel.from_pretrained(folder)``) is refused, because it cannot be saved with shared weights.
        folder: the adapter's, with its ``manifest.json``, or its hub id.
        adapter: PEFT's name for it.

    Raises:
        UserError: the folder does not say which modules share, or its adapter is not on this model.
    """
    folder = local_copy(folder)
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}, which says which modules share a pair") from None
    pairs = StoredPairs.read(folder, manifest)
    layers: dict[str, Any] = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if name.startswith(PREFIX) and adapter in getattr(module, "lora_A", ())
    }
    for group in pairs.groups:
        if missing := [name for name in group if name not in layers]:
            raise UserError(f"this is not a PeftModel with the adapter {adapter} at {missing[0]}: is {folder} loaded?")
        for matrix in ("lora_A", "lora_B"):
            first, *others = (getattr(layers[name], matrix)[adapter] for name in group)
            for name, other in zip(group[1:], others, strict=True):
                if not torch.equal(other.weight, first.weight):
                    raise UserError(
                        f"{matrix} of {name} and of {group[0]} differ already: load {folder} again, then call retie"
                    )
    for group in pairs.groups:
        for matrix in ("lora_A", "lora_B"):
            first, *others = (getattr(layers[name], matrix)[adapter] for name in group)
            for other in others:
                other.weight = first.weight
