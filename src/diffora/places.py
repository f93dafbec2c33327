"""Where files are: those of an installed package, and the cache."""

import os
from pathlib import Path


def conf_dir() -> Path:
    """The ``conf/`` folder: the one inside an installed package, else the repository's."""
    package = Path(__file__).resolve().parent
    return installed if (installed := package / "conf").is_dir() else package.parents[1] / "conf"


def default_cache_dir() -> Path:
    """`$DIFFORA_CACHE`, or `~/.cache/diffora`."""
    return Path(os.environ.get("DIFFORA_CACHE") or "~/.cache/diffora").expanduser()
