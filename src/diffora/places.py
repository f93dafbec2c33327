"""Where the files of an installed package are."""

from pathlib import Path


def conf_dir() -> Path:
    """The ``conf/`` folder: the one inside an installed package, else the repository's."""
    package = Path(__file__).resolve().parent
    return installed if (installed := package / "conf").is_dir() else package.parents[1] / "conf"
