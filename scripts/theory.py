"""Measure what the theorems of both papers claim: writes docs/background/theory.md, its pictures and its data.

    python scripts/theory.py                          # everything, about five minutes on one core
    python scripts/theory.py --only regulariser       # repeat one experiment, keep the other results
    python scripts/theory.py --quick --output <folder>    # a test in seconds; its numbers mean nothing

Each experiment is a function of its settings. The settings are stored with its results.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import theory_page  # noqa: E402
from theory_adapters import deep, linear, printed_bound, regulariser  # noqa: E402
from theory_draws import Result  # noqa: E402
from theory_gates import assumption, convergence, estimates, generalisation, trained  # noqa: E402

from diffora.files import write_text  # noqa: E402

FULL: dict[str, tuple[Callable[..., Result], dict[str, Any]]] = {
    "estimates": (estimates, {"seed": 0, "n": 10, "d": 5, "samples": [100, 1000, 10_000, 100_000], "repeats": 40}),
    "assumption": (
        assumption,
        {"seed": 0, "draws": 1000, "dims": [4, 16, 64], "sizes": [2, 3, 4, 8, 16], "until": 10.0},
    ),
    "convergence": (
        convergence,
        {"seed": 0, "seeds": 5, "n": 10, "d": 20, "widths": [64, 512, 4096], "steps": 600, "lr": 0.1},
    ),
    "trained": (trained, {"seed": 0, "draws": 100, "n": 4, "d": 16, "width": 1024, "steps": 200, "lr": 0.1}),
    "generalisation": (
        generalisation,
        {
            "seed": 0,
            "seeds": 5,
            "d": 8,
            "sizes": [20, 40, 80, 160],
            "gates": 9,
            "width": 1024,
            "steps": 500,
            "lr": 0.05,
            "tests": 2000,
        },
    ),
    "linear": (
        linear,
        {"seed": 0, "seeds": 5, "d": 16, "depths": [1, 2, 4], "ranks": [1, 2, 3, 4], "steps": 3000, "lr": 0.02},
    ),
    "deep": (
        deep,
        {
            "seed": 0,
            "seeds": 5,
            "d": 16,
            "depths": [2, 4],
            "ranks": [1, 2, 4, 6, 8, 12],
            "steps": 2000,
            "lr": 0.01,
            "rows": 128,
        },
    ),
    "printed_bound": (
        printed_bound,
        {"seed": 0, "dims": [16, 64, 256, 1024], "rank": 1, "steps": 500, "lr": 0.01, "rows": 128},
    ),
    "regulariser": (
        regulariser,
        {
            "seed": 0,
            "seeds": 5,
            "d": 32,
            "rank": 4,
            "scales": [0.3, 1.0, 3.0],
            "weights": [0.0, 0.01, 0.1, 1.0, 10.0],
            "steps": 2000,
            "lr": 0.02,
        },
    ),
}
QUICK: dict[str, dict[str, Any]] = {
    "estimates": {"samples": [100, 1000], "repeats": 4},
    "assumption": {"draws": 20, "dims": [4], "sizes": [2, 4]},
    "convergence": {"seeds": 2, "n": 4, "d": 6, "widths": [16, 64], "steps": 60},
    "trained": {"draws": 6, "width": 64, "steps": 20},
    "generalisation": {"seeds": 1, "sizes": [10, 20], "gates": 2, "width": 64, "steps": 20, "tests": 100},
    "linear": {"seeds": 2, "d": 6, "depths": [1, 2], "ranks": [1, 2], "steps": 50},
    "deep": {"seeds": 2, "d": 6, "ranks": [1, 2], "steps": 20, "rows": 16},
    "printed_bound": {"dims": [16, 64], "steps": 20, "rows": 16},
    "regulariser": {"seeds": 2, "d": 8, "rank": 2, "weights": [0.0, 1.0], "steps": 50},
}


def rounded(value: Any) -> Any:
    """The values with five significant digits. A number that JSON cannot write is None."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def main(given: argparse.Namespace) -> None:
    data = given.output / "data" / "theory.json"
    content: Result = json.loads(data.read_text()) if given.only else {}
    for name in given.only or FULL:
        experiment, settings = FULL[name]
        settings = settings | (QUICK[name] if given.quick else {})
        start = time.process_time()
        content[name] = rounded({"settings": settings, **experiment(**settings)})
        print(f"{name}: {time.process_time() - start:.0f} s of one core", flush=True)
    packages = ("torch", "numpy", "diffora")
    content["versions"] = {"python": platform.python_version()} | {package: version(package) for package in packages}
    content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    data.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in content.items())
    write_text(data, f"{{\n{lines}\n}}\n")
    theory_page.write(content, ROOT / "docs" / "background" / "theory.md", given.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FULL, metavar="EXPERIMENT", help="measure only these")
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds")
    place = ROOT / "docs" / "background"
    parser.add_argument("--output", type=Path, default=place, help="for data/, images/ and theory.md")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output.resolve() == place:
        parser.error("--quick needs another --output, so that it does not replace measured results")
    main(arguments)
