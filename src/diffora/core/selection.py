"""The Selection: which modules get a LoRA of their own, as a small JSON file that can be read, edited and reused.

Nothing else in core reads or writes files. It is done here because the file holds the fields of the dataclass, and
several rooms above read it (`diffora.loop` to resume, `diffora.methods` for a given selection, `diffora.run`).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffora.core.certainty import certainty
from diffora.core.counts import above
from diffora.core.dam import RELAXATIONS
from diffora.core.grid import Grid, Names
from diffora.core.parts import short_names
from diffora.core.picture import EVEN, draw_dam, layer_labels, layer_numbers, shares, size_of, start_gate
from diffora.core.readout import READOUTS
from diffora.core.targets import exact_pattern, yaml_fragment
from diffora.errors import UserError
from diffora.files import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from peft import LoraConfig

FORMAT = 1
TABLES = ("gamma_bar", "scores", "confidence")
"""Fields of a `Selection` with one number for each module, or None."""
STANDALONE = "standalone"
"""`Selection.method` of a selection that no method of a run made, but the library (`diffora.standalone`)."""


@dataclass(frozen=True)
class Selection:
    """The discretised DAM and where it came from.

    Attributes:
        method: which method made it.
        selector: where the scores come from: ``search``, another selector's name, or the dotted path of a user's
            function (`diffora.scoring.selectors`); ``random``, ``given`` (a list of modules), or ``none``.
        types: the N module types.
        modules: L x N full module names, None where a layer has no such module (`diffora.core.grid`).
        selected: for each layer the types that are selected; edit this to change the selection.
        rho: the share of modules to select.
        seed: of the run that made it.
        k: modules per layer that were asked for; None if layers may have different numbers.
        rank: r of the selected modules if a budget chose it; it overrides ``rank=``. None: ``rank=`` applies.
        gamma_bar: L x N relaxed DAM, None where a layer has no such module; None if the selection was not searched.
        relaxation: how the search relaxed Γ (`diffora.core.dam.RELAXATIONS`); None if the selection was not searched.
        scores: L x N scores of any other selector, and of a search with another read-out than its gates; of an
            ensemble, the mean of the members' standardised scores.
        readout: what the scores of the search are: ``gamma`` (the relaxed DAM), or ``early_gradient``
            (`diffora.core.readout`); None if the selection was not searched.
        rounds: of the search, of an ensemble's first member; None if the selection was not searched.
        ensemble: number of members whose scores were averaged (``search.ensemble``); 1 for a single search.
        confidence: L x N, the probability that a repeat of the ensemble with other seeds would select the module
            (`diffora.core.ensemble.confidence`), None where a layer has no such module. None for a single search, which
            does not say it, and where all members were the same.
        longer_names: other modules of the model whose names end with a candidate's name, as in a model with the stacks
            ``layers`` and ``encoder.layers``.
        lowest_layer: layers below this one get no adapter, not even a shared one (``method.time_budget``).
        split_hash: sha256 of the two parts of the training rows that the selector used; of an ensemble, its first
            member.
        config: the settings that it was made with.
        facts: numbers by which the selector says how far its scores can be trusted; most selectors have none. Of an
            ensemble, the means over members.
    """

    method: str
    types: list[str]
    modules: list[list[str | None]]
    selected: list[list[str]]
    rho: float
    seed: int
    selector: str = "unknown"
    k: int | None = None
    rank: int | None = None
    gamma_bar: list[list[float | None]] | None = None
    relaxation: str | None = None
    scores: list[list[float | None]] | None = None
    readout: str | None = None
    rounds: float | None = None
    ensemble: int = 1
    confidence: list[list[float | None]] | None = None
    longer_names: list[str] = field(default_factory=list)
    lowest_layer: int = 0
    split_hash: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_mask(cls, grid: Grid, mask: Tensor, **rest: Any) -> "Selection":
        """A selection from a boolean L x N mask. ``rest`` holds the other fields."""
        for key in TABLES:
            if rest.get(key) is not None:
                rest[key] = blanked(rest[key], grid.names)
        flags = (mask & grid.present).tolist()
        chosen = [[t for t, flag in zip(grid.types, row, strict=True) if flag] for row in flags]
        longer, names = list(grid.longer_names), [list(row) for row in grid.names]
        rest.setdefault("lowest_layer", grid.lowest_layer)
        return cls(types=list(grid.types), modules=names, selected=chosen, longer_names=longer, **rest)

    def read_from(self, readout: str | None) -> "Selection":
        """This selection, made from the values that a search read out: only those of ``gamma`` are a relaxed DAM."""
        if readout in (None, "gamma"):
            return replace(self, readout=readout)
        return replace(self, readout=readout, gamma_bar=None, scores=self.gamma_bar)

    def places(self) -> tuple[tuple[str | None, ...], ...]:
        """L x N names of the modules that get an adapter of their own or a shared one, None for the others."""
        return above(self.modules, self.lowest_layer)

    def sizes(self) -> list[int]:
        """The number of candidates of each layer."""
        return [sum(name is not None for name in row) for row in self.modules]

    def mask(self) -> Tensor:
        """Boolean L x N."""
        return torch.tensor([[t in row for t in self.types] for row in self.selected], dtype=torch.bool)

    def names(self) -> list[str]:
        """Full names of the selected modules, layer by layer."""
        rows = zip(self.modules, self.selected, strict=True)
        pairs = [pair for row, types in rows for pair in zip(row, self.types, strict=True) if pair[1] in types]
        return [name for name, _ in pairs if name is not None]

    def __str__(self) -> str:
        """How many modules are selected, and which ones of each layer, by the labels of `plot`."""
        label = dict(zip(self.types, short_names(self.types), strict=True))
        head = f"{len(self.names())} of {sum(self.sizes())} modules, selected by {self.selector}"
        rows = ([label[kind] for kind in self.types if kind in row] for row in self.selected)
        layers = zip(layer_labels(self.modules, self.types), rows, strict=True)
        sure = [self.certainty] if self.certainty else []
        return "\n".join([head, *sure, *(f"{layer}: {', '.join(row) or 'none'}" for layer, row in layers)])

    def lora_config(self, rank: int | None = None, alpha: float = 16.0, **more: Any) -> "LoraConfig":
        """PEFT's configuration of a LoRA on the selected modules, for ``peft.get_peft_model``.

        Nothing is shared among the other modules, which PEFT cannot do; `diffora.attach` does that. ``target_modules``
        are full names. PEFT also adapts modules whose names end with one of them; if this model has such modules,
        ``target_modules`` is a regular expression that matches the selected ones only.

        Args:
            rank: of every LoRA. None: the selection's own rank, which it has if a budget chose it.
            alpha: updates are scaled by alpha / rank.
            more: other fields of ``LoraConfig``, such as ``task_type``, ``lora_dropout`` or ``modules_to_save``.

        Raises:
            UserError: nothing is selected, rank or alpha is impossible, or ``more`` has ``target_modules``.
        """
        from peft import LoraConfig  # takes seconds, and nothing else in core needs it

        taken = [f"{key} is set by the selection: leave it out" for key in ("target_modules", "r") if key in more]
        rank, names = self._rank(rank, alpha, taken), self.names()
        targets = exact_pattern(names) if self._is_ambiguous else names
        whole = int(alpha) if float(alpha).is_integer() else alpha  # some readers of the file take whole numbers only
        return LoraConfig(r=rank, lora_alpha=whole, target_modules=targets, **more)  # type: ignore[arg-type]

    def to_yaml(self, program: str, rank: int | None = None, alpha: float = 16) -> str:
        """The entries of a trainer's configuration file for a LoRA on the selected modules, to paste into it.

        Args:
            program: ``axolotl`` or ``llamafactory``.
            rank, alpha: as in `lora_config`; alpha is a whole number.

        Raises:
            UserError: nothing is selected, there is no rank, or the program cannot express this selection.
        """
        rank, names = self._rank(rank, alpha), self.names()
        comment = [
            f"{len(names)} of {sum(self.sizes())} modules, selected by {self.selector} (diffora).",
            "The others stay frozen: this format has no pairs that modules share (diffora.attach has them).",
        ]
        return yaml_fragment(program, names, rank, alpha, self._is_ambiguous, comment)

    @property
    def _is_ambiguous(self) -> bool:
        """Whether the name of another module ends with that of a selected one."""
        return any(longer.endswith(f".{name}") for name in self.names() for longer in self.longer_names)

    def _rank(self, rank: int | None, alpha: float, problems: Sequence[str] = ()) -> int:
        """The rank that was asked for, or the selection's own. Raises a UserError with all problems, alpha's too."""
        rank, problems = self.rank if rank is None else rank, list(problems)
        if type(rank) is not int or rank < 1:
            problems.insert(0, f"rank={rank!r} must be a whole number of at least 1")
        if not _is_number(alpha) or alpha <= 0:
            problems.append(f"alpha={alpha!r} must be a finite number above 0")
        if not self.names():
            problems.append("this selection selects no module, so that there is nothing for a LoRA")
        if problems:
            raise UserError(problems)
        assert rank is not None
        return rank

    def plot(self, ax: "Axes | None" = None, title: str | None = None) -> "Axes":
        """Draw the DAM ([D] Figure 2): one column per layer, one row per module type, selected modules framed.

        Colours show the gates that a search found: red was opened and blue was closed, compared with the gate at Γ = 0
        (1/N for ``softmax``, 1/2 for ``sigmoid``). Scores of another selector are shown as shares of their layer, the
        lowest one white; after a global selection the order over all layers is kept. A selection without either shows
        the frames only.

        With an ensemble, colours and numbers show the confidence: in how many of 100 repeats the module would be
        selected. Red and blue modules are decided; pale ones could change, and the frame of such a module is dashed.

        ``selection.plot().figure.savefig("dam.png")`` writes a file.

        Args:
            ax: matplotlib's axes to draw on. None: axes of a new figure, which a notebook shows.
            title: None for one that says what was selected; an empty text for none.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib import pyplot  # takes half a second, and starts a user interface where there is one

            ax = pyplot.subplots(figsize=size_of(len(self.modules), len(self.types)), layout="constrained")[1]
        neutral: float | list[float] | None = None
        values, label = None, ""
        if self.confidence is not None:
            values, neutral, label = self.confidence, EVEN, "share of repeats that select the module"
        elif self.gamma_bar is not None:
            starts = [start_gate(self.relaxation or "softmax", size) for size in self.sizes()]
            neutral = starts[0] if len(set(starts)) == 1 else starts
            values, label = self.gamma_bar, r"$\bar\gamma$"
        elif self.scores is not None:
            by_layer = self.k is not None or len(set(self.sizes())) > 1
            values, label = shares(self.scores, by_layer), self.selector.replace("$", r"\$") + ", normalised"
            if self.readout == "early_gradient":
                label = f"{self.selector}: early gradient, normalised"
        numbers, sure = layer_numbers(self.modules), self.confidence is not None
        draw_dam(ax, values, self.mask().tolist(), self.types, neutral, label, numbers, confident=sure)
        if title is None:
            own, total = sum(map(len, self.selected)), sum(self.sizes())
            size = f"{own} of {total}" if self.k is None else f"K = {self.k}"
            made = "" if self.method == STANDALONE else f"{self.method}, "
            several = f", ensemble of {self.ensemble}" if self.ensemble > 1 else ""
            dashed = "\ndashed frames: a repeat may choose others" if sure else ""
            title = f"{made}selector {self.selector}{several}, {size}\nframed modules get a LoRA of their own{dashed}"
        ax.set_title(title, size=10, parse_math=False)
        return ax

    @property
    def certainty(self) -> str:
        """How many modules are decided, in words; empty without `confidence`.

        Those below ``lowest_layer`` do not count: no seed could select them.
        """
        return "" if self.confidence is None else certainty(self.confidence[self.lowest_layer :], self.ensemble)

    def summary(self) -> dict[str, Any]:
        """The entries of a run's record."""
        sure = {"ensemble": self.ensemble, "certainty": self.certainty} if self.ensemble > 1 else {}
        sure |= {"facts": self.facts} if self.facts else {}
        return {key: getattr(self, key) for key in ("selector", "k", "rank", "lowest_layer", "selected")} | sure

    def save(self, path: Path | str) -> None:
        """Write the selection file atomically."""
        write_text(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Selection":
        """Read and check a selection file.

        Raises:
            UserError: it is missing, not JSON, or not a selection; names every problem.
        """
        path = Path(path)
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raise UserError(f"no selection file at {path}") from None
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise UserError(f"{path} is not a selection file of format {FORMAT}")
        required = {"method", "types", "modules", "selected", "rho", "seed"}
        known = {f.name for f in fields(cls)}
        problems = [f"{path}: key {key!r} is missing" for key in sorted(required - raw.keys())]
        problems += [f"{path}: unknown key {key!r}" for key in sorted(raw.keys() - known)]
        if problems:
            raise UserError(problems)
        problems = [f"{path}: {problem}" for key, value in raw.items() if (problem := _misfit(key, value))]
        if problems:
            raise UserError(problems)
        selection = cls(**raw)
        size = len(selection.modules), len(selection.types)
        if len(selection.selected) != size[0]:
            problems.append(f"{path}: 'selected' has {len(selection.selected)} layers, not {size[0]}")
        for key in ("modules", *TABLES):
            rows = getattr(selection, key)
            if rows is not None and (len(rows) != size[0] or any(len(row) != size[1] for row in rows)):
                problems.append(f"{path}: {key!r} must have {size[0]} layers of {size[1]}, as 'modules' and 'types' do")
        if problems:
            raise UserError(problems)
        for layer, (row, names) in enumerate(zip(selection.selected, selection.modules, strict=True)):
            has = [kind for kind, name in zip(selection.types, names, strict=True) if name is not None]
            problems += [
                f"{path}: layer {layer} selects {name!r}, which is none of {', '.join(has)}"
                for name in row
                if name not in has
            ]
        below = [layer for layer, row in enumerate(selection.selected) if row and layer < selection.lowest_layer]
        if below or selection.lowest_layer >= max(size[0], 1):
            where = f"layer {below[0]} selects modules" if below else f"there are {size[0]} layers"
            problems.append(f"{path}: 'lowest_layer' is {selection.lowest_layer}, but {where}")
        for key in TABLES:
            rows = getattr(selection, key)
            if rows is not None and blanked(rows, selection.modules) != rows:
                problems.append(f"{path}: {key!r} has a number where 'modules' has null")
            elif rows is not None and any(
                value is None and name is not None
                for values, names in zip(rows, selection.modules, strict=True)
                for value, name in zip(values, names, strict=True)
            ):
                problems.append(f"{path}: {key!r} has null where 'modules' has a name")
        if problems:
            raise UserError(problems)
        return selection

    def check_fits(self, grid: Grid, path: Path | str) -> None:
        """Raise a UserError unless this selection was made for a model with the same grid."""
        if self.modules != [list(row) for row in grid.names]:
            first = next((name for row in self.modules for name in row if name is not None), "nothing")
            raise UserError(
                f"{path} was made for {len(self.modules)} layers x {len(self.types)} modules ({first} …); "
                f"this model has {grid.n_layers} x {grid.n_types} ({grid.modules[0]} …)"
            )


def blanked(rows: Sequence[Sequence[float | None]], names: Names) -> list[list[float | None]]:
    """L x N numbers, with None in place of those where a layer has no such module."""
    return [
        [None if name is None else value for value, name in zip(values, row, strict=True)]
        for values, row in zip(rows, names, strict=True)
    ]


def _misfit(key: str, value: Any) -> str | None:
    """What is wrong with the type of a value in a selection file; None if nothing is."""
    table = "a list of lists, one for each layer"
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "types": (_is_list_of(_is_text), "a list of module types"),
        "modules": (_is_list_of(_is_list_of(_or_none(_is_text))), f"{table}, of module names"),
        "selected": (_is_list_of(_is_list_of(_is_text)), f"{table}, of module types"),
        "rho": (_is_share, "a number in [0, 1]"),
        "seed": (lambda v: type(v) is int and 0 <= v < 2**63, "a whole number of at least 0"),
        "rank": (lambda v: v is None or (type(v) is int and 1 <= v <= 10**9), "a whole number of at least 1, or null"),
        "k": (lambda v: v is None or (type(v) is int and 0 <= v <= 10**9), "a whole number of at least 0, or null"),
        "lowest_layer": (lambda v: type(v) is int and 0 <= v <= 10**9, "a whole number of at least 0"),
        "gamma_bar": (_or_none(_is_list_of(_is_list_of(_or_none(_is_number)))), f"{table}, of finite numbers"),
        "relaxation": (lambda v: v in (None, *RELAXATIONS), f"one of {', '.join(RELAXATIONS)}, or null"),
        "scores": (_or_none(_is_list_of(_is_list_of(_or_none(_is_number)))), f"{table}, of finite numbers"),
        "readout": (lambda v: v in (None, *READOUTS), f"one of {', '.join(READOUTS)}, or null"),
        "rounds": (lambda v: v is None or (_is_number(v) and v > 0), "a number above 0, or null"),
        "ensemble": (lambda v: type(v) is int and 1 <= v <= 10**9, "a whole number of at least 1"),
        "confidence": (_or_none(_is_list_of(_is_list_of(_or_none(_is_share)))), f"{table}, of numbers in [0, 1]"),
        "longer_names": (_is_list_of(_is_text), "a list of module names"),
        "split_hash": (lambda v: v is None or _is_text(v), "text, or null"),
        "config": (lambda v: isinstance(v, dict), "a group of settings"),
        "facts": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), "finite numbers by name"),
        "method": (_is_text, "text"),
        "selector": (_is_text, "text"),
    }
    fits, words = wanted[key]
    text = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return None if fits(value) else f"{key}={text[:100]} must be {words}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))
