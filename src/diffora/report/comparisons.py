"""Comparisons between the rows of a table, paired over seeds, and curves over rho and rank."""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations

from diffora.records import facts_of
from diffora.report.results import ResultCell, ResultColumn, ResultTable
from diffora.report.statistics import Difference, Spread, finite, holm, paired, spread, verdict

MARGIN = 0.5
"""Differences below this many points do not matter, unless the user gives another margin."""
EQUAL = 0.10  # adapters whose sizes differ by at most this share count as about equal in size


@dataclass(frozen=True)
class Comparison:
    """One of our rows against a baseline in one column, paired over seeds; a positive difference: ours is better.

    Attributes:
        dev_best: difference at the best epoch on validation rows, as papers report it.
        held_out: difference at an epoch that was chosen on other rows; None if there are no held-out values.
        ratio: our adapter parameters divided by the baseline's.
        variant: whether the baseline is another setting of our own method.
        margin: largest difference that does not matter, in the unit of the differences; None for a metric that is no
            fraction, because a margin in points says nothing about it.
        p_holm: p of `dev_best`, adjusted for the number of comparisons with baselines in the table.
    """

    column: ResultColumn
    ours: str
    baseline: str
    dev_best: Difference
    held_out: Difference | None
    ratio: float | None
    variant: bool
    margin: float | None
    p_holm: float | None = None

    @property
    def fair(self) -> bool:
        """Whether both adapters have about the same number of parameters."""
        return self.ratio is not None and 1 - EQUAL <= self.ratio <= 1 / (1 - EQUAL)

    @property
    def verdict(self) -> str:
        """What `dev_best` shows: a word of `diffora.report.statistics.verdict`."""
        return verdict(self.dev_best, self.margin)

    @property
    def held_out_verdict(self) -> str:
        """What `held_out` shows."""
        return verdict(self.held_out, self.margin)

    def told(self, word: str) -> str:
        """A verdict as text, with the margin where it matters: ``equivalent within ±0.5``."""
        return f"{word} within ±{self.margin:g}" if word == "equivalent" else word


def compare(
    table: ResultTable,
    column: ResultColumn,
    ours: str,
    baseline: str,
    variant: bool = False,
    margin: float = MARGIN,
) -> Comparison | None:
    """The comparison of two rows in a column, over the seeds that both have with the same data; None without one.

    The margin is in points.
    """
    a, b = table.cells.get((ours, column.name)), table.cells.get((baseline, column.name))
    if a is None or b is None:
        return None
    sign = 1.0 if column.maximise else -1.0

    apart = a.seeds_of_other_data(b)

    def difference(key: str) -> Difference | None:
        factor = sign * column.factor(key)
        theirs = {seed: value for seed, value in b.by_seed(key, factor).items() if seed not in apart}
        return paired(a.by_seed(key, factor), theirs)

    key = column.compared
    if (dev_best := difference(key)) is None:
        return None
    held_out = difference(key.replace("validation/", "held_out/", 1)) if key.startswith("validation/") else None
    ratio = a.size / b.size if a.size is not None and b.size else None
    points = {"fraction": column.factor(key) / 100, "percent": 1.0}.get(facts_of(key, column.facts).unit)
    return Comparison(
        column, ours, baseline, dev_best, held_out, ratio, variant, None if points is None else margin * points
    )


def comparisons_of(table: ResultTable, margin: float = MARGIN) -> list[Comparison]:
    """For each column: each of our rows against each baseline, then our rows against each other.

    Args:
        margin: largest difference that does not matter, in points (hundredths of a fraction).
    """
    ours = table.ours
    baselines = [row for row in table.rows if row not in ours]
    against = [(a, b, False) for a in ours for b in baselines] + [(a, b, True) for a, b in combinations(ours, 2)]
    pairs = [(column, *pair) for column in table.columns for pair in against]
    found = [c for pair in pairs if (c := compare(table, *pair, margin=margin)) is not None]
    tested = [i for i, c in enumerate(found) if not c.variant and c.dev_best.p is not None]
    adjusted = dict(zip(tested, holm([found[i].dev_best.p or 0.0 for i in tested]), strict=True))
    return [replace(c, p_holm=adjusted[i]) if i in adjusted else c for i, c in enumerate(found)]


@dataclass(frozen=True)
class Curve:
    """A metric over rho or over the rank, for settings that differ in nothing else.

    Attributes:
        dial: ``rho`` or ``rank``.
        name: the method, and the value of the other dial.
        points: (value of the dial, spread over seeds).
    """

    dial: str
    column: ResultColumn
    name: str
    points: list[tuple[float, Spread]]


def curves_of(table: ResultTable) -> list[Curve]:
    """All curves of a table that have at least two points."""
    found = []
    for column in table.columns:
        cells = [cell for row in table.rows if (cell := table.cells.get((row, column.name)))]
        for dial, other in (("rho", "rank"), ("rank", "rho")):
            groups: dict[str, list[ResultCell]] = defaultdict(list)
            for cell in cells:
                config = cell.first.config
                if finite(config.get(dial)) is not None:
                    same = {dial, f"search.{dial}"} if config.get(f"search.{dial}") == config[dial] else {dial}
                    # random rows take their size from another selection at each value of a dial
                    alike = {k: v if k != "method.like" else v is not None for k, v in config.items() if k not in same}
                    groups[repr(sorted((k, repr(v)) for k, v in alike.items()))].append(cell)
            for members in groups.values():
                values = {float(cell.first.config[dial]): cell for cell in members}
                if len(values) < len(members):  # two selections of one size, of which neither is the curve's
                    continue
                key = column.compared
                spreads = {x: spread(values[x].by_seed(key, column.factor(key)).values()) for x in sorted(values)}
                points = [(x, s) for x, s in spreads.items() if s is not None]
                if len(points) > 1:
                    first = members[0].first
                    rest = f", {other} = {first.config[other]}" if first.config.get(other) is not None else ""
                    found.append(Curve(dial, column, f"{first.record.method}{rest}", points))
    return found
