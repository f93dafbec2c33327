"""``run.json``: what a run was, found and cost, written atomically."""

import contextlib
import hashlib
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any

from omegaconf import DictConfig

from diffora.adapters.manifest import digest_of
from diffora.errors import UserError, reason
from diffora.files import MOST_JSON, parse_json, read_text, write_text
from diffora.settings.identity import config_hash

NAME = "run.json"
WEIGHTS = ("adapter", "model")
"""Folders of a run, one of which holds what was trained."""
PACKAGES = ("diffora", "torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra-core", "numpy")


def new_record(cfg: DictConfig, data_hash: str | None) -> dict[str, Any]:
    """The record of a run that has just begun."""
    return {
        "method": cfg.method.name,
        "task": cfg.task.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "experiment": cfg.cell.experiment,
        "row": cfg.cell.row,
        "column": cfg.cell.column,
        "scale": cfg.scale if cfg.cell.experiment else None,
        "status": "running",
        "metrics": {},
        "params": {},
        "time": {},
        "memory": {},
        "selection": None,
        "config_hash": config_hash(cfg),
        "data_hash": data_hash,
        "git_commit": git_commit(),
        "versions": versions(),
    }


DIGEST = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n\}\n')
"""The end of ``run.json``: the sha256 of all the text before it."""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``run.json``, its digest last. Numbers that JSON does not know (NaN, infinity) become null."""
    text = json.dumps(_clean(record), indent=1).removesuffix("\n}")
    write_text(folder / NAME, f'{text},\n "sha256": "{_sha256(text)}"\n}}\n')


def record_in(file: Path) -> Any:
    """The content of a ``run.json`` without its digest, which is compared where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or is not as it was written.
    """
    text = read_text(file, MOST_JSON)
    record = parse_json(text, file)
    if isinstance(record, dict) and "sha256" in record:
        end = DIGEST.search(text, len(text) - 100)
        if end is None or end[1] != _sha256(text[: end.start()]):
            raise UserError(
                f"{file} is not as the run left it: it is damaged, or was edited. If you changed it on purpose, remove "
                "its entry sha256"
            )
        del record["sha256"]
    return record


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a run directory; None where there is none or a broken one (see `why_broken`)."""
    try:
        return _checked(record_in(folder / NAME))
    except (OSError, UserError):
        return None


def why_broken(folder: Path) -> str | None:
    """Why the ``run.json`` of a folder is no record, with its name; None where it is one, or is not there."""
    try:
        _checked(record_in(folder / NAME))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder / NAME}: {reason(error)}"
    except UserError as error:
        message = str(error)
        return message if str(folder) in message else f"{folder / NAME} is not the record of a run: {message}"
    return None


def _checked(record: Any) -> dict[str, Any]:
    """A record with the fields that resuming, sweeps and the last table rely on.

    Raises:
        UserError: it is none.
    """
    if not isinstance(record, dict):
        raise UserError("it is not a JSON object")
    wanted: dict[str, type | UnionType] = {"status": str}
    if record.get("status") == "completed":
        wanted |= dict.fromkeys(("method", "task", "model", "config_hash"), str)
        wanted |= {"metrics": dict, "params": dict, "time": dict, "memory": dict}
    optional = {"config_hash": str, "error": str, "selection": dict, "classes": list, "files": list, "digests": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(record.get(key), kind)]
    wrong += [key for key, kind in optional.items() if not isinstance(record.get(key), kind | None)]
    if not all(isinstance(name, str) for key in ("classes", "files") for name in record.get(key) or ()):
        wrong.append("classes or files")
    if wrong:
        raise UserError(f"{', '.join(dict.fromkeys(wrong))} is missing or of the wrong kind")
    return record


def result_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The files that a run's result consists of, relative to its folder: settings, selection, weights."""
    weights = [file for name in WEIGHTS for file in sorted((folder / name).glob("*")) if file.name != "README.md"]
    chosen = ["selection.json"] if record.get("selection") else []
    return ["config.yaml", *chosen, *(file.relative_to(folder).as_posix() for file in weights)]


def missing_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What is missing of the result that a record speaks of; empty where all of it is there.

    A record without a list of files, of an earlier version, wants settings and some weights.
    """
    names = record.get("files")
    found = [name for name in names or ["config.yaml"] if not _has_content(folder / name)]
    if names is None and not any(_has_content(file) for name in WEIGHTS for file in (folder / name).glob("*")):
        found.append(" or ".join(f"{name}/" for name in WEIGHTS))
    return found


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of some files of a run, by name."""
    return {name: digest_of(folder / name) for name in names}


def check_as_left(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse settings and weights that are not as the run left them; a record without digests says nothing.

    Raises:
        UserError: names the files.
    """
    digests: Mapping[str, str] = record.get("digests") or {}
    changed = [name for name in digests if name != "selection.json" and _digest(folder / name) != digests[name]]
    if changed:
        raise UserError(
            f"{folder}: {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as the run left it: damaged, "
            "edited, or of another run. Bring it back; or remove it, and the run's own command with resume=true makes "
            "it anew from the last checkpoint. evaluate.py takes other settings on its command line, not from a file"
        )


def _digest(file: Path) -> str | None:
    """None where the file cannot be read."""
    try:
        return digest_of(file)
    except (OSError, UserError):
        return None


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def git_commit() -> str | None:
    """Commit of the source tree, with ``+`` where it has been changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True)
        dirty = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], cwd=here, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if dirty.strip() else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def reset_peaks() -> None:
    """Start counting peak memory anew: several runs of a sweep share one process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float | None]:
    """Peak resident and CUDA memory in MB since `reset_peaks` (where the system allows a reset: Linux)."""
    import resource

    import torch

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text()
        rss = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"peak_rss_mb": round(rss, 1), "peak_cuda_mb": None if cuda is None else round(cuda, 1)}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
