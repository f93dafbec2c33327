"""Selectors: each gives every candidate module a score. A module with a high score should get a LoRA of its own.

A selector is a function from a `SearchContext` (model, grid, rows, settings) to a `SearchResult` (scores, L x N).
`SELECTORS` holds those of the package, by the name in ``method.selector``, with what a run must know about each one. A
new one is a module and a line there:

- ``search``: the bi-level search of [D] (`diffora.scoring.bilevel`); its scores are the relaxed DAM,
- ``attribution``: trains all adapters, then divides their effect on the validation loss
  (`diffora.scoring.attribution`),
- ``one_shot``: trains random selections, scores others, and fits an additive model (`diffora.scoring.one_shot`),
- ``gradient``, ``activation``, ``plop``, ``fisher``: one pass over some batches, nothing is trained
  (`diffora.scoring.measures`),
- ``kappa``, ``spectrum``: from the weights alone (`diffora.scoring.spectra`).

(``random`` and the heuristics of `diffora.core.heuristics` are not here. They need neither model nor data, so the
method computes their scores itself.)

Your own selector is a plain function. `from_function` turns it into a selector::

    def my_selector(model, grid, batches, loss):  # in my_module.py
        for batch in batches: ...  # search-train batches; loss(batch) is the task's loss, a scalar
        return scores  # a tensor, grid.n_layers x grid.n_types, high is good

    diffora train method.selector=my_module.my_selector

`diffora.scoring.function` describes the arguments, and what the function must not change.
"""

from diffora.scoring.context import SearchContext, SearchResult, Selector
from diffora.scoring.function import check_signature
from diffora.scoring.one_pass import from_function, from_measure, from_spectrum
from diffora.scoring.one_shot import one_shot
from diffora.scoring.trained import attribution, bilevel
from diffora.trust import function_at

ROWS = frozenset({"batch_size", "max_rows", "valid_fraction"})
ONE_PASS = ROWS | {"accumulate", "score_batches"}
TRAINING = ROWS | {"accumulate", "epochs", "lr", "rank", "train_steps", "weight_decay", "clip"}
OF_GAMMA = frozenset({"gamma_lr", "update", "order", "relaxation", "head_warmup", "readout", "patience"})
"""Settings of the search that are read together."""

SELECTORS: dict[str, Selector] = {
    "search": Selector(bilevel, TRAINING | OF_GAMMA, trains=True, shards=True),
    "attribution": Selector(attribution, TRAINING | {"score_batches"}, trains=True, shards=True),
    "one_shot": Selector(one_shot, TRAINING | {"score_batches", "masks"}, trains=True),
    "gradient": Selector(from_measure("gradient"), ONE_PASS),
    "activation": Selector(from_measure("activation"), ONE_PASS),
    "plop": Selector(from_measure("plop"), ONE_PASS),
    "fisher": Selector(from_measure("fisher"), ROWS | {"score_batches"}),
    "kappa": Selector(from_spectrum("kappa"), frozenset()),
    "spectrum": Selector(from_spectrum("spectrum"), frozenset()),
}


def _not_imported(context: SearchContext) -> SearchResult:
    raise AssertionError("`find_selector` imports a user's function")


OWN = Selector(_not_imported, ROWS | {"score_batches"})
"""Stands for a function of the user's."""


def find_selector(name: str) -> Selector:
    """The selector of a name in `SELECTORS`, or of the dotted path of a function, which is imported.

    Only for a name that the user typed or has in ``conf/``, never for one from a file of somebody else.

    Raises:
        UserError: there is no such function, or it cannot be called as a selector.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    function = function_at(name, "method.selector")
    check_signature(function, f"method.selector={name}")
    return Selector(from_function(function, name), OWN.reads)


def facts_of(name: str) -> Selector:
    """What a run must know about a selector. A user's function is not imported for it."""
    return SELECTORS.get(name, OWN)
