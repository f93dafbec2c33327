"""Puts tables and pictures into docs/background/theory.md, from data/theory.json beside it: no figure is typed by hand.

`scripts/theory.py` calls it. A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

import re
from collections.abc import Callable
from pathlib import Path

import theory_pictures as pictures
import theory_tables as tables
from matplotlib.figure import Figure
from theory_tables import Result

TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "estimates": ("estimates", tables.estimates),
    "assumption": ("assumption", tables.assumption),
    "consequences": ("assumption", tables.consequences),
    "convergence": ("convergence", tables.convergence),
    "trained": ("trained", tables.trained),
    "generalisation": ("generalisation", tables.generalisation),
    "ranking": ("generalisation", tables.ranking),
    "linear": ("linear", tables.linear),
    "deep": ("deep", tables.deep),
    "printed_bound": ("printed_bound", tables.printed_bound),
    "regulariser": ("regulariser", tables.regulariser),
}
PICTURES: dict[str, Callable[[Result], Figure]] = {
    "theory_gram": pictures.gram,
    "theory_assumption": pictures.assumption,
    "theory_convergence": pictures.convergence,
    "theory_generalisation": pictures.generalisation,
    "theory_adapters": pictures.adapters,
    "theory_regulariser": pictures.regulariser,
}


def refresh(page: str, content: Result) -> str:
    """The page with all tables updated.

    Raises:
        ValueError: a table has no place in the page, or several.
    """
    texts = {name: make(content[source]) for name, (source, make) in TABLES.items()} | {
        "machine": tables.machine(content)
    }
    for name, text in texts.items():
        escaped = text.replace("\\", r"\\")
        block = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, n = block.subn(rf"\g<1>\n{escaped}\n\n\g<2>", page)
        if n != 1:
            raise ValueError(f"the page has {n} places between <!-- begin {name} --> and <!-- end {name} -->, not one")
    return page


def write(content: Result, page: Path, folder: Path) -> None:
    """Write the tables to a copy of ``page`` in ``folder`` (or to the page itself), pictures to ``folder/images``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(content).savefig(folder / "images" / f"{name}.png", dpi=110)
    (folder / page.name).write_text(refresh(page.read_text(), content))
