"""What a selector gets and what it returns. The list of them is in `diffora.scoring.selectors`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import lightning as L
import numpy as np
from torch import Tensor

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.loop.loggers import Loggers
from diffora.loop.parts import Parts
from diffora.scoring.bilevel import Trajectory
from diffora.settings.sections import Search


@dataclass(frozen=True)
class SearchContext:
    """What a selector works on.

    Attributes:
        parts: backbone, grid, task and training rows; settings of the sections ``search`` and ``trainer``.
        split: (search-train, search-valid) row numbers.
        alpha: the updates of the candidates' adapters are scaled by alpha / rank.
        score_batches: how many batches a selector other than ``search`` takes.
        choose: what the method would select by given scores, L x N.
        loggers: where a selector with rounds sends its metrics; None for nowhere.
        callbacks: of Lightning, called in the rounds of ``search`` only.
        member: which member of an ensemble this is, for the progress bar; empty for none.
    """

    parts: Parts
    split: tuple[np.ndarray, np.ndarray]
    alpha: float
    score_batches: int
    choose: Callable[[Tensor], Selection]
    loggers: Loggers | None = None
    callbacks: Sequence[L.Callback] = ()
    member: str = ""

    @property
    def grid(self) -> Grid:
        """The candidates that are scored: all; with a cached prefix only those that may be selected."""
        return self.parts.grid.allowed if self.parts.settings.trainer.cache_prefix else self.parts.grid

    @property
    def settings(self) -> Search:
        """The section ``search``."""
        assert self.parts.settings.search is not None, "a method with a selector has this section"
        return self.parts.settings.search


@dataclass(frozen=True)
class Member:
    """One member of an ensemble (``search.ensemble``).

    Attributes:
        seed: the member's; the first one has the run's seed.
        seconds: of its training and scoring.
        split_hash: sha256 of the two parts of the training rows that it used.
        scores: L x N, as `SearchResult.scores`.
        standardised: L x N in float64, what is averaged (`diffora.core.ensemble.standardised`).
    """

    seed: int
    seconds: float
    split_hash: str
    scores: Tensor
    standardised: Tensor


@dataclass(frozen=True)
class SearchResult:
    """What a selector found.

    Attributes:
        scores: L x N on the CPU, high is good; for ``search`` the relaxed DAM, or what ``search.readout`` names. Of an
            ensemble, the mean of the members' standardised scores.
        seconds: of training and scoring, without loading; of all members together.
        trajectory: (round, relaxed DAM), a few dozen points a round; empty except for ``search``. Of an ensemble, that
            of the first member.
        relaxation: how ``search`` relaxed Γ, a key of `diffora.core.dam.RELAXATIONS`; None for other selectors.
        weights: the trained A and B of every candidate, B times its gate, as ``<module>.lora_a`` (rank, in) and
            ``<module>.lora_bt`` (rank, out), and their scale as ``<module>.scaling``, on the CPU; empty if the selector
            trains none.
        readout: what ``search`` read the scores from, as in ``search.readout``; None for other selectors.
        rounds: of ``search``; fewer than ``search.epochs`` if ``search.patience`` ended it. None for other selectors.
            Of an ensemble, those of the first member.
        facts: numbers that say how far the scores can be trusted, by name; `Selection.facts` keeps them.
        members: of an ensemble; empty otherwise.
    """

    scores: Tensor
    seconds: float
    trajectory: Trajectory = field(default_factory=list)
    relaxation: str | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    readout: str | None = None
    rounds: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)


Run = Callable[[SearchContext], SearchResult]


@dataclass(frozen=True)
class Selector:
    """One way to score the candidates.

    Attributes:
        run: computes the scores. The model is the same before and after.
        reads: names of the settings that it reads: fields of the section ``search``, and ``score_batches``.
        trains: whether it trains A and B of every candidate, with rank ``search.rank``.
        shards: whether it runs on a model that is divided among processes (``trainer.strategy=fsdp``).
    """

    run: Run
    reads: frozenset[str]
    trains: bool = False
    shards: bool = False

    @property
    def reads_rows(self) -> bool:
        """Whether it computes on training rows, and not on the weights alone."""
        return "max_rows" in self.reads
