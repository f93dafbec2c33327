"""How much longer does a run take beside other busy processes, with threads that wait passively and that spin?

    python -m benchmarks.contention [--rounds N] [--busy N] [--output FILE] [-- OVERRIDES]

In each round, the quickstart (or the run of the overrides) goes alone, beside as many busy processes as there are cores
(``--busy``) as a user would start it, and beside them with threads that spin, which is torch's own setting. The order
changes from round to round. Each figure is a ratio of whole runs, from the command to its end, in the same round.

``--busy 0`` starts no busy processes and measures no run alone: for a machine that is busy already. Only the ratio
``passive/spinning`` is then measured.

Writes benchmarks/results/contention.json after each round; with ``--busy`` or overrides only the file of ``--output``.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import REPO, RESULTS, header, ratio, spread, write
from diffora.cli.environment import WAITING

QUICKSTART = ["experiment=quickstart", "logger=csv"]
PASSIVE = "wait passively"
SPIN = {"KMP_BLOCKTIME": "200"}
"""The program leaves the threads alone if the user has set this variable, which the OpenMP of torch ignores."""


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Some processes, each of which keeps one core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(overrides: Sequence[str], variables: Mapping[str, str], passive: bool) -> float:
    """The wall time of a run.

    Args:
        passive: whether the threads should wait passively. Anything else is an error.
    """
    kept = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}/run"]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=REPO, env=kept | variables, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stderr}")
    if (PASSIVE in done.stdout) != passive:
        raise SystemExit(f"the run {'did not say' if passive else 'said'} that threads wait passively")
    return wall


def measure(overrides: Sequence[str], rounds: int, number: int) -> Iterator[dict[str, Any]]:
    """The content of contention.json, after each round."""
    sides = ["alone", "passive", "spinning"] if number else ["passive", "spinning"]
    pairs = [(side, "alone") for side in sides[1:] if number] + [("passive", "spinning")]
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            with busy(0 if side == "alone" else number):
                variables = SPIN if side == "spinning" else {}
                times[side].append(seconds(overrides, variables, passive=side == "passive"))
            print(f"{side:<10}{times[side][-1]:8.1f} s", flush=True)
        yield {
            "overrides": list(overrides),
            "busy": number,
            "seconds": {side: spread(values, 2) for side, values in times.items()},
            "ratios": {f"{top}/{bottom}": ratio(times, top, bottom) for top, bottom in pairs},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, help="busy processes; default: as many as there are cores")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the run; default: " + " ".join(QUICKSTART))
    given = parser.parse_args()
    number = os.cpu_count() or 1 if given.busy is None else given.busy
    usual = given.busy is None and not given.overrides
    output = given.output or (RESULTS / "contention.json" if usual else None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the busy processes end, too
    start, result = header(), dict[str, Any]()
    for result in measure(given.overrides or QUICKSTART, given.rounds, number):
        if output is not None:
            write(output, start | result)
    for name, value in result["ratios"].items():
        print(f"{name:<20}{value}")


if __name__ == "__main__":
    main()
