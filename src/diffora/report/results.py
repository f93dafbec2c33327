"""Tables of results: rows are methods and settings, columns are tasks, a cell has one run for each seed."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from diffora.records import MetricFacts, facts_of
from diffora.report.runs import Run
from diffora.report.statistics import Spread, spread


@dataclass(frozen=True)
class ResultColumn:
    """A task with its backbone.

    Attributes:
        name: the experiment's name for it, or the task.
        metrics: the metrics that are shown, as keys of a record's ``metrics``.
        percent: whether fractions are shown in per cent.
        facts: unit and direction of each metric, from the records.
    """

    name: str
    metrics: tuple[str, ...]
    percent: bool
    facts: Mapping[str, MetricFacts] = field(compare=False, repr=False)

    @property
    def title(self) -> str:
        """The column's name and its metrics."""
        return f"{self.name}, {'/'.join(map(_short, self.metrics))}"

    @property
    def label(self) -> str:
        """What the values are: ``test`` if rows are compared on a test split, otherwise ``dev_best``."""
        return "test" if self.compared.startswith("test/") else "dev_best"

    @property
    def compared(self) -> str:
        """The metric by which rows are compared: the first one of validation rows, or else the first."""
        return next((key for key in self.metrics if key.startswith("validation")), self.metrics[0])

    @property
    def maximise(self) -> bool:
        """Whether a higher value of the compared metric is better."""
        return facts_of(self.compared, self.facts).maximise

    def factor(self, key: str) -> float:
        """What the values of a metric are multiplied by before they are shown: 100 for a fraction in per cent."""
        return 100.0 if self.percent and facts_of(key, self.facts).unit == "fraction" else 1.0

    def held_out(self) -> tuple[str, ...]:
        """The keys of the same metrics on the held-out rows; there are none for metrics such as ``update/rank``."""
        keys = [key for key in self.metrics if key.startswith("validation/")]
        return tuple(key.replace("validation/", "held_out/", 1) for key in keys)


@dataclass
class ResultCell:
    """The runs of one row in one column, by seed."""

    runs: dict[int, Run]
    _numbers: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def first(self) -> Run:
        return self.runs[min(self.runs)]

    def by_seed(self, key: str, factor: float = 1.0) -> dict[int, float]:
        """The values of a metric by seed, multiplied by ``factor``; runs without a finite value are left out."""
        return {seed: factor * value for seed, value in self._values("metrics", key).items()}

    def seeds_of_other_data(self, other: "ResultCell") -> set[int]:
        """The seeds whose runs in the two cells are known to have used different training or validation rows."""
        hashes = {
            seed: (self.runs[seed].record.data_hash, other.runs[seed].record.data_hash)
            for seed in self.runs
            if seed in other.runs
        }
        return {seed for seed, (a, b) in hashes.items() if a and b and a != b}

    def spread(self, part: str, key: str) -> Spread | None:
        """Mean and standard deviation over the seeds of a number such as ``("params", "adapter")``."""
        return spread(self._values(part, key).values())

    def _values(self, part: str, key: str) -> dict[int, float]:
        if (part, key) not in self._numbers:  # cached: each comparison needs it
            found = {seed: run.value(part, key) for seed, run in sorted(self.runs.items())}
            self._numbers[part, key] = {seed: value for seed, value in found.items() if value is not None}
        return self._numbers[part, key]

    @functools.cached_property
    def size(self) -> float | None:
        """Adapter parameters, the mean over the seeds."""
        found = self.spread("params", "adapter")
        return found.mean if found else None

    def span(self, key: str) -> str:
        """A number of parameters as text: ``1,000``, or ``1,000 to 1,200`` if the seeds differ."""
        values = sorted({int(v) for run in self.runs.values() if (v := run.value("params", key)) is not None})
        return " to ".join(f"{v:,}" for v in dict.fromkeys((values[0], values[-1]))) if values else ""

    @property
    def searched(self) -> bool:
        """Whether this is DiffoRA itself: its search selected the modules."""
        record = self.first.record
        return record.method == "diffora" and record.selection.get("selector", "search") == "search"

    @property
    def selector(self) -> str:
        """What selected the modules; empty if nothing did."""
        return str(self.first.record.selection.get("selector") or "")

    @property
    def reused(self) -> bool:
        """Whether other runs searched or scored the modules, so that these runs have no search time."""
        record = self.first.record
        return "method.selection" in record.sources and record.selection.get("selector") not in ("random", "given")


@dataclass
class ResultTable:
    """Rows (methods and settings) by columns (tasks).

    Attributes:
        name: name of the table's files, without the ending.
        title: heading on the page.
        columns: in the order in which they are shown.
        rows: names of the rows, in the order in which they are shown.
        cells: by (row, column name); only those with runs.
        paper: the paper's figures by row, as text: ``params``, and one for each of the paper's columns.
        notes: what a reader must know, problems with the runs first.
    """

    name: str
    title: str
    columns: list[ResultColumn]
    rows: list[str]
    cells: dict[tuple[str, str], ResultCell]
    paper: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def shown(self) -> Iterator[tuple[tuple[str, str], ResultCell]]:
        """((row, column name), cell) of all cells, column by column."""
        for column in self.columns:
            for row in self.rows:
                if cell := self.cells.get((row, column.name)):
                    yield (row, column.name), cell

    def cells_of(self, row: str) -> list[ResultCell]:
        return [cell for cell in self.across(row) if cell is not None]

    def across(self, row: str) -> list[ResultCell | None]:
        """The cells of a row, one for each column; None where there are no runs."""
        return [self.cells.get((row, column.name)) for column in self.columns]

    def same_seeds(self, column: ResultColumn) -> bool:
        """Whether all rows of a column have values for the same seeds; only then can their means be ranked."""
        here = [cell.by_seed(column.compared) for (_, name), cell in self.cells.items() if name == column.name]
        return len({frozenset(values) for values in here if values}) == 1

    def same_data(self, column: ResultColumn) -> bool:
        """Whether the runs of a column used the same rows, as far as they have the same seed."""
        here = [cell for (_, name), cell in self.cells.items() if name == column.name]
        return not any(a.seeds_of_other_data(b) for a, b in combinations(here, 2))

    @property
    def ours(self) -> list[str]:
        """The rows of the papers' own methods: DiffoRA's, or RM-LoRA's if there are none of DiffoRA."""
        of = {row: cells[0] for row in self.rows if (cells := self.cells_of(row))}
        found = [row for row, cell in of.items() if cell.searched]
        return found or [row for row, cell in of.items() if cell.first.record.method == "rm_lora"]

    @property
    def our_name(self) -> str:
        """The name of the method in `ours`."""
        return "DiffoRA" if any(cell.searched for row in self.ours for cell in self.cells_of(row)) else "RM-LoRA"


def _short(key: str) -> str:
    """A metric without its split; ``forgetting/increase`` is the forgetting."""
    split, _, name = key.partition("/")
    return name if split in ("validation", "test", "update") else split if name == "increase" else key
