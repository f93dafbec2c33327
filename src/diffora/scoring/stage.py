"""The search stage: which rows it uses, and the scores of one selector."""

import logging
from dataclasses import dataclass

import numpy as np

from diffora.loop.parts import Parts
from diffora.loop.splits import examples_of, split_hash, split_search
from diffora.scoring.context import SearchContext, SearchResult
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

    ``search.fraction`` sets how many training rows are used, ``search.valid_fraction`` how many of these are for Γ.

    Raises:
        UserError: there are fewer than two examples.
    """
    s, examples = parts.settings.search, examples_of(parts.data.train.encoded)
    assert s is not None, "a method with a selector has this section"
    train, valid = split_search(examples, parts.settings.seed, s.valid_fraction, s.fraction)
    account = Account(len(np.unique(examples)))
    used = len(np.unique(examples[np.concatenate([train, valid])]))
    account.drop(f"search.fraction={s.fraction}", account.read - used)
    return SearchRows(train, valid, account)


def run_search(context: SearchContext, selector: str) -> SearchResult:
    """Score every candidate module. The model is the same before and after.

    Continues from a checkpoint if ``context.parts`` has one of an earlier attempt.

    Args:
        selector: a name in `diffora.scoring.selectors.SELECTORS`, or the dotted path of a function.

    Raises:
        UserError: settings do not suit the rows, the loss is not finite, memory ran out, or a user's function breaks a
            rule for selectors.
    """
    return find_selector(selector).run(context)
