"""The parts of a benchmark's result: spreads, ratios, the machine it was measured on, and its file."""

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch

from diffora.run import record

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks" / "results"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(median, digits), "q1": round(q1, digits), "q3": round(q3, digits), "rounds": len(values)}


def ratio(times: Mapping[str, Sequence[float]], top: str, bottom: str) -> dict[str, float | int]:
    """The ratio of two contenders in the same round: its spread over rounds."""
    return spread([a / b for a, b in zip(times[top], times[bottom], strict=True)])


def header() -> dict[str, Any]:
    """When a result was measured, on which machine, and with which versions."""
    packages = record.versions() | {"peft": peft.__version__}
    return {
        "machine": machine(),
        "versions": {name: packages[name] for name in ("python", "torch", "transformers", "peft", "diffora")},
        "commit": record.git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, threads, memory, load before the benchmark, GPU."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(file: Path, result: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {file}")


def read(name: str) -> dict[str, Any] | None:
    """A result of `RESULTS`; None if it has not been measured."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None
