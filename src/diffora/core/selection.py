"""The Selection: which modules get a LoRA of their own, as a small JSON file that can be read, edited and reused.

Nothing else in core reads or writes files. It is done here because the file holds the fields of the dataclass, and
several rooms above read it (`diffora.loop` to resume, `diffora.methods` for a given selection, `diffora.run`).
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffora.core.certainty import certainty
from diffora.core.counts import above
from diffora.core.grid import Grid, blanked
from diffora.core.parts import short_names
from diffora.core.picture import EVEN, draw_dam, layer_labels, layer_numbers, shares, size_of, start_gate
from diffora.core.selection_file import TABLES, is_number, selection_problems
from diffora.core.targets import exact_pattern, yaml_fragment
from diffora.errors import UserError
from diffora.files import read_json, write_text

HEADS: dict[Any, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT trains and saves by itself for a ``task_type``."""

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from peft import LoraConfig

FORMAT = 1
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
        rounds: rounds that the search took, of an ensemble those of its first member; None if the selection was not
            searched.
        ensemble: number of members whose scores were averaged (``search.ensemble``); 1 for a single search.
        confidence: L x N, the probability that a repeat of the ensemble with other seeds would select the module
            (`diffora.core.ensemble.confidence`), None where a layer has no such module. None for a single search, which
            does not say it, and where all members were the same.
        longer_names: other modules of the model whose names end with a candidate's name, as in a model with the stacks
            ``layers`` and ``encoder.layers``.
        lowest_layer: layers below this one get no adapter, not even a shared one (``method.time_budget``).
        split_hash: sha256 of the two parts of the training rows that the selector used; of an ensemble, its first
            member.
        config: of a run: ``task``, ``model``, ``data_hash`` and the section ``search``. Of the library: ``scope``,
            ``left_out``, and what `search` or `select` was called with.
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
        self._check_types()
        return torch.tensor([[t in row for t in self.types] for row in self.selected], dtype=torch.bool)

    def names(self) -> list[str]:
        """Full names of the selected modules, layer by layer."""
        self._check_types()
        rows = zip(self.modules, self.selected, strict=True)
        pairs = [pair for row, types in rows for pair in zip(row, self.types, strict=True) if pair[1] in types]
        return [name for name, _ in pairs if name is not None]

    def _candidates_and_parents(self) -> list[str]:
        """The full names of all candidates, each after the modules that it is in."""
        names = [name.split(".") for row in self.modules for name in row if name is not None]
        return [".".join(parts[: n + 1]) for parts in names for n in range(len(parts))]

    def _check_types(self) -> None:
        """Refuse an edited selection with a type that its layer does not have: it would be left out silently."""
        for number, (row, names) in enumerate(zip(self.selected, self.modules, strict=True)):
            present = [kind for kind, name in zip(self.types, names, strict=True) if name is not None]
            if unknown := [kind for kind in row if kind not in present]:
                raise UserError(f"selected[{number}] has {unknown[0]!r}, but this layer has {', '.join(present)}")

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
        ``target_modules`` is a regular expression that matches the selected ones only. A warning names modules that the
        search trained and that PEFT would leave frozen.

        Args:
            rank: of every LoRA. None: the selection's own rank, which it has if a budget chose it.
            alpha: updates are scaled by alpha / rank.
            more: other fields of ``LoraConfig``, such as ``task_type``, ``lora_dropout`` or ``modules_to_save``.

        Raises:
            UserError: nothing is selected, rank or alpha is impossible, ``more`` has ``target_modules``, or PEFT would
                take a candidate, or what it is in, for a module of ``modules_to_save``.
        """
        from peft import LoraConfig  # takes seconds, and nothing else in core needs it

        taken = ["target_modules is set by the selection: leave it out"] if "target_modules" in more else []
        taken += [f"{key}=: give {ours}=" for key, ours in (("r", "rank"), ("lora_alpha", "alpha")) if key in more]
        if isinstance(more.get("modules_to_save"), str):  # its letters would be taken as names
            raise UserError(f"modules_to_save={more['modules_to_save']!r} must be a list of names")
        taken += [
            f"modules_to_save: PEFT goes by the ends of names, and would train {alike[0]} whole, too: rename {head!r}"
            for head in more.get("modules_to_save") or ()
            if (alike := [place for place in self._candidates_and_parents() if place.endswith(head)])
        ]
        taken += [
            f"task_type={more['task_type']}: PEFT goes by the ends of names, and would train {alike[0]} whole, too, "
            f"for {head!r}: rename it, or leave task_type out and name the head (modules_to_save)"
            for head in HEADS.get(more.get("task_type"), ())
            if (alike := [place for place in self._candidates_and_parents() if place.endswith(head)])
        ]
        rank, names = self._rank(rank, alpha, taken), self.names()
        if left := self._left_frozen([*(more.get("modules_to_save") or ()), *HEADS.get(more.get("task_type"), ())]):
            warnings.warn(
                f"the search trained {', '.join(left)} too, which PEFT leaves frozen and does not save: give "
                "modules_to_save, or task_type for the head of a transformers model; or train and save them yourself",
                stacklevel=2,
            )
        targets = exact_pattern(names) if self._is_ambiguous else names
        whole = int(alpha) if float(alpha).is_integer() else alpha  # some readers of the file take whole numbers only
        return LoraConfig(r=rank, lora_alpha=whole, target_modules=targets, **more)  # type: ignore[arg-type]

    def _left_frozen(self, saved: Sequence[str]) -> list[str]:
        """The modules that the search trained beside the adapters, without those that these ends of names cover."""
        trained: Any = self.config.get("trained")
        if not isinstance(trained, list):
            return []
        # A parameter of the model itself stands for itself: modules_to_save cannot have it.
        modules = dict.fromkeys(str(name).rpartition(".")[0] or str(name) for name in trained)
        left = [m for m in modules if not any(f".{name}." in f".{m}." or m.endswith(name) for name in saved)]
        return [m for m in left if not any(m.startswith(f"{other}.") for other in left)]

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
        if not is_number(alpha) or alpha <= 0:
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
        path = Path(path).expanduser()
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise UserError(f"no selection file at {path}") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UserError(f"{path} is not a selection file of format {FORMAT}")
        if problems := selection_problems(content, [each.name for each in fields(cls)]):
            raise UserError([f"{path}: {problem}" for problem in problems])
        return cls(**content)

    def check_fits(self, grid: Grid, path: Path | str) -> None:
        """Raise a UserError unless this selection was made for a model with the same grid."""
        if self.modules != [list(row) for row in grid.names]:
            first = next((name for row in self.modules for name in row if name is not None), "nothing")
            raise UserError(
                f"{path} was made for {len(self.modules)} layers x {len(self.types)} modules ({first} …); "
                f"this model has {grid.n_layers} x {grid.n_types} ({grid.modules[0]} …)"
            )
