"""diffora: learn which modules of a pretrained model to fine-tune.

As a library: `search`, `select`, `within_time`, `find_grid` and `Selection`; `attach`, `detach` and `merge_updates`;
`save_adapter` and `load_adapter`; `UserError`; and callbacks for other trainers: `DifforaCallback` (transformers, TRL)
and `DifforaLightningCallback`. They are imported when they are first used, so that commands start quickly.
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffora.api import (
        Selection,
        attach,
        detach,
        find_grid,
        load_adapter,
        merge_updates,
        save_adapter,
        search,
        select,
        within_time,
    )
    from diffora.errors import UserError
    from diffora.trainers.lightning import DifforaLightningCallback
    from diffora.trainers.trainer import DifforaCallback

__all__ = [
    "DifforaCallback",
    "DifforaLightningCallback",
    "Selection",
    "UserError",
    "attach",
    "detach",
    "find_grid",
    "load_adapter",
    "merge_updates",
    "save_adapter",
    "search",
    "select",
    "within_time",
]

START = time.time()
"""When the package was first imported, which the commands do before all else: the zero of a run's ``startup_s``."""

__version__ = "0.1.0"

_PLACES = {
    "DifforaCallback": "diffora.trainers.trainer",
    "DifforaLightningCallback": "diffora.trainers.lightning",
    "Selection": "diffora.core.selection",
    "UserError": "diffora.errors",
    "attach": "diffora.standalone.attach",
    "detach": "diffora.core.attach",
    "find_grid": "diffora.core.grid",
    "load_adapter": "diffora.api",
    "merge_updates": "diffora.adapters.merge",
    "save_adapter": "diffora.adapters.export",
    "search": "diffora.standalone.search",
    "select": "diffora.standalone.select",
    "within_time": "diffora.standalone.within_time",
}
"""The module of each name in ``__all__``. Only `load_adapter`, `save_adapter` and the callbacks need Lightning."""


def __getattr__(name: str) -> Any:
    """A name of the library, imported now."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffora' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
