"""The search stage: which rows it uses, and the scores of one selector or of an ensemble of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
import torch

from diffora.backbones.load import draw_fresh
from diffora.core.ensemble import log_gates, member_seed, standardised
from diffora.errors import UserError
from diffora.loop.parts import Parts
from diffora.loop.resume import Earlier, earlier
from diffora.loop.splits import alike_of, examples_of, split_hash, split_search
from diffora.scoring.context import Member, Run, SearchContext, SearchResult
from diffora.scoring.selectors import find_selector
from diffora.tasks.account import Account

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchRows:
    """The training rows that a search uses.

    Attributes:
        train: sorted row numbers for A, B and the head, and for every selector that does not train.
        valid: sorted row numbers for Γ; no row and no example is in both.
        account: how many of the training examples are used.
    """

    train: np.ndarray
    valid: np.ndarray
    account: Account

    @property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        return self.train, self.valid

    @property
    def hash(self) -> str:
        """sha256 of the two parts."""
        return split_hash(self.train, self.valid)


def search_rows(parts: Parts) -> SearchRows:
    """The rows that the search may use: search-train and search-valid.

    ``search.max_rows`` sets how many training rows are used, ``search.valid_fraction`` how many of these are for Γ.

    Raises:
        UserError: there are fewer than two different examples.
    """
    s, examples = parts.settings.search, examples_of(parts.data.train.encoded)
    assert s is not None, "a method with a selector has this section"
    alike = alike_of(parts.data.train, parts.task.row_keys(parts.data.train.rows))
    train, valid = split_search(examples, parts.settings.seed, s.valid_fraction, s.max_rows, alike)
    account = Account(len(np.unique(examples)))
    used = len(np.unique(examples[np.concatenate([train, valid])]))
    account.drop(f"search.max_rows={s.max_rows}", account.read - used)
    return SearchRows(train, valid, account)


def run_search(context: SearchContext, selector: str, scope: str = "layer") -> SearchResult:
    """Score every candidate module. The model is the same before and after.

    Continues from a checkpoint if ``context.parts`` has one of an earlier attempt. With ``search.ensemble`` above 1,
    the selector runs several times (`run_ensemble`).

    Args:
        selector: a name in `diffora.scoring.selectors.SELECTORS`, or the dotted path of a function.
        scope: which modules compete, those of a ``layer`` or of the whole grid (``global``).

    Raises:
        UserError: settings do not suit the rows, a loss or a score is not finite, memory ran out, or a user's function
            breaks a rule for selectors.
    """

    def score(own: SearchContext) -> SearchResult:
        result = find_selector(selector).run(own)
        if not result.scores[own.parts.grid.present].isfinite().all():
            precise = own.parts.settings.trainer.precision == "32-true"
            hint = "" if precise else "; try trainer.precision=32-true"
            raise UserError(f"method.selector={selector}: a score is not finite{hint}")
        return result

    return score(context) if context.settings.ensemble == 1 else run_ensemble(context, score, scope)


def run_ensemble(context: SearchContext, score: Run, scope: str) -> SearchResult:
    """Run a selector ``search.ensemble`` times, and average the standardised scores (`diffora.core.ensemble`).

    A member does what a run with its seed does: it draws a new head (where no checkpoint has one), new A and B, its own
    two parts of the training rows, and their order. So the parts are disjoint within each member, and all members use
    training rows only. The first member has the run's seed and the run's folder, loggers and callbacks. The others keep
    their checkpoints in ``members/<number>``; a run that resumes takes finished members from these.

    Args:
        score: the selector.
        scope: ``layer`` or ``global``.
    """
    parts, count = context.parts, context.settings.ensemble
    results: list[SearchResult] = []
    members: list[Member] = []
    with _fresh_weights_kept(parts):
        for number in range(count):
            told = f" {number + 1} of {count}"
            own = replace(context, member=told) if number == 0 else _of_member(context, number, told)
            spent = sum(result.seconds for result in results)
            left = f", about {spent / number * (count - number):.0f} s left" if number else ""
            log.info(f"ensemble: member{told}, seed {own.parts.settings.seed}{left}")
            results.append(score(own))
            members.append(_member(own, results[-1], scope))
    mean = torch.stack([member.standardised for member in members]).mean(0)
    seconds = sum(member.seconds for member in members)
    facts = {name: sum(result.facts[name] for result in results) / count for name in results[0].facts}
    return replace(results[0], scores=mean, seconds=seconds, weights={}, members=members, facts=facts)


def _of_member(context: SearchContext, number: int, told: str) -> SearchContext:
    """The context of a member after the first one. Draws its head."""
    parts = context.parts
    seed = member_seed(parts.settings.seed, number)
    folder = parts.folder / "members" / str(number + 1)
    before = earlier(folder, parts.made_with) if parts.settings.resume else Earlier()
    own = replace(parts, settings=replace(parts.settings, seed=seed), folder=folder, earlier=before)
    L.seed_everything(seed, verbose=False)
    draw_fresh(parts.backbone)
    return replace(context, parts=own, split=search_rows(own).split, loggers=None, callbacks=(), member=told)


def _member(context: SearchContext, result: SearchResult, scope: str) -> Member:
    grid, scores = context.parts.grid, result.scores
    competing = grid.allowed.present  # not those below the lowest layer of a time budget
    if result.readout == "gamma":
        assert result.relaxation is not None, "the gates of a search"
        scores = log_gates(scores, result.relaxation, grid.sizes)
    seed, rows = context.parts.settings.seed, split_hash(*context.split)
    return Member(seed, result.seconds, rows, result.scores, standardised(scores, competing, scope))


@contextmanager
def _fresh_weights_kept(parts: Parts) -> Iterator[None]:
    """Afterwards, the weights that no checkpoint has are as before."""
    modules = [parts.model.get_submodule(name) for name in parts.backbone.fresh]
    states = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
