"""A whole task from command to metric: `train.py method=lora` and Hugging Face Trainer with PEFT, in turn.

    MRPC=<folder> MINILM=<folder> python -m benchmarks.run [--repetitions 3] [--epochs 1] [--output FILE]

Both sides have the same rows, backbone, rank, batch, learning rate, schedule, epochs, clipping, head and evaluation.
Each run is a new process with its own empty caches; its wall time is measured. The sides take turns to go first.
Without the two folders, both sides get the embedded task and backbone, and the result says so.

``hf_trainer_grouped`` is the peer with rows of similar length in a batch. This is our default but not the peer's, so
it shows how much this alone saves. ``parts`` come from one more run of ours, with a clock in it (`timed_train`).

Writes benchmarks/results/run.json. With other data, ``--epochs`` or ``--only``, it writes a file only if ``--output``
names one.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.report import REPO, RESULTS, header, spread, write

RANK, ALPHA, BATCH, LR, EPOCHS = 4, 16, 32, 1e-3, 1
SHOWN_PACKAGES = 8


class Setting:
    """What both sides are given: data, backbone, and the same settings as arguments of each side."""

    def __init__(self, data: Path, model: str, folder: Path, max_length: int, epochs: int) -> None:
        self.data, self.model, self.folder = data, model, folder
        self.max_length, self.epochs = max_length, epochs
        import pyarrow.parquet

        self.rows = pyarrow.parquet.read_metadata(data / "train.parquet").num_rows
        self.warmup = -(-self.rows // BATCH) * epochs // 10

    @classmethod
    def find(cls, mrpc: str | None, minilm: str | None, scratch: Path, epochs: int) -> "Setting":
        """MRPC and MiniLM if both are given, otherwise the embedded task (written to ``scratch``) and backbone."""
        if mrpc and minilm:
            return cls(Path(mrpc).resolve(), "minilm", Path(minilm).resolve(), 128, epochs)
        write_embedded(scratch)
        return cls(scratch, "tiny", REPO / "src" / "diffora" / "assets" / "tiny", 64, epochs)

    def ours(self, out: Path, seed: int) -> list[str]:
        return [
            "method=lora", f"rank={RANK}", f"method.alpha={ALPHA}", "task=mrpc", f"task.path={self.data}",
            f"task.max_length={self.max_length}", f"model={self.model}", f"model.path={self.folder}", "trainer=cpu",
            "logger=csv", f"finetune.lr={LR}", f"finetune.batch_size={BATCH}", f"finetune.epochs={self.epochs}",
            f"finetune.warmup_steps={self.warmup}", "finetune.dropout=0.0", f"seed={seed}", f"hydra.run.dir={out}",
        ]  # fmt: skip

    def peer(self, seed: int) -> list[str]:
        yaml = OmegaConf.load(REPO / "conf" / "model" / f"{self.model}.yaml")
        # DeBERTa has a pooler of its own on top of the backbone, which both sides train with the classifier.
        head = ["classifier", "pooler"] if self.model == "tiny" else ["classifier"]
        return [
            "--data", str(self.data), "--model", str(self.folder), "--modules", *yaml.candidates, "--head", *head,
            "--seed", str(seed), "--rank", str(RANK), "--alpha", str(ALPHA), "--lr", str(LR),
            "--batch-size", str(BATCH), "--epochs", str(self.epochs), "--warmup-steps", str(self.warmup),
            "--max-length", str(self.max_length),
        ]  # fmt: skip

    def described(self) -> dict[str, Any]:
        given = self.model == "minilm"
        return {
            "data": "MRPC" if given else "the embedded task: MRPC and MINILM were not both given",
            "backbone": "MiniLM" if given else "the embedded tiny DeBERTa",
            "train_rows": self.rows,
            "rank": RANK, "alpha": ALPHA, "batch": BATCH, "lr": LR, "warmup_steps": self.warmup, "epochs": self.epochs,
            "max_length": self.max_length,
        }  # fmt: skip


def write_embedded(folder: Path) -> None:
    """The embedded task as parquet, in MRPC's columns."""
    import pyarrow as pa
    import pyarrow.parquet

    from diffora.tasks.embedded.paraphrase import splits

    for name, columns in splits(train_rows=4000, validation_rows=1000, seed=0).items():
        pa.parquet.write_table(pa.table(columns), folder / f"{name}.parquet")


def process(arguments: list[str], cache: Path | None = None) -> tuple[float, float, str, str]:
    """Run Python with the caches of a folder, or with empty ones. Returns (when it began, seconds, stdout, stderr).

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as empty:
        cache = cache or Path(empty)
        environment = os.environ | {"DIFFORA_CACHE": f"{cache}/ours", "HF_HOME": f"{cache}/hf", "HF_HUB_OFFLINE": "1"}
        began = time.time()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=REPO, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.time() - began
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
    return began, seconds, done.stdout, done.stderr


def result_of(stdout: str) -> Any:
    return json.loads(next(line for line in stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def ours(setting: Setting, seed: int) -> dict[str, Any]:
    """One run of ours; ``first_step_s`` counts from the command."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "run.json"
        began, wall, _, _ = process(["train.py", *setting.ours(file.parent, seed)])
        record, written = json.loads(file.read_text()), file.stat().st_mtime
    times, last = record["time"], record["history"][-1]
    imported = written - times["total_s"]  # run.json counts from the import of diffora to itself
    return {
        "wall_s": round(wall, 2),
        "accuracy": round(last["validation/accuracy"], 4),
        "f1": round(last["validation/f1"], 4),
        "trainable": record["params"]["trainable"],
        "first_step_s": round(imported + times["startup_s"] - began, 2),
        "time": times,
        "peak_rss_mb": record["memory"]["peak_rss_mb"],
    }


def peer(setting: Setting, seed: int, *more: str) -> dict[str, Any]:
    _, wall, stdout, _ = process(["benchmarks/hf_trainer_lora.py", *setting.peer(seed), *more])
    result = result_of(stdout)
    parts = {name: round(seconds, 2) for name, seconds in result["parts"].items()}
    parts["rest"] = round(wall - sum(result["parts"].values()), 2)
    return {
        "wall_s": round(wall, 2),
        "accuracy": round(result["accuracy"][-1], 4),
        "f1": round(result["f1"][-1], 4),
        "trainable": result["trainable"],
        "peak_rss_mb": result["peak_rss_mb"],
        "parts": parts,
    }


SIDES = {
    "diffora": ours,
    "hf_trainer": peer,
    "hf_trainer_grouped": lambda setting, seed: peer(setting, seed, "--group-by-length"),
}


def parts_of_ours(setting: Setting) -> dict[str, float]:
    """The seconds of each part of one run, from the command on. Their sum is the wall time."""
    with tempfile.TemporaryDirectory() as folder:
        began, wall, stdout, _ = process(["benchmarks/timed_train.py", *setting.ours(Path(folder) / "run", 0)])
        times = json.loads((Path(folder) / "run" / "run.json").read_text())["time"]
    clock = result_of(stdout)
    spent = clock["spent"]
    first_step = clock["start"] + times["startup_s"] - began
    parts = {
        "imports and configuration": clock["first"]["reading rows"] - began,
        **{name: spent[name] for name in ("reading rows", "tokenising", "loading weights")},
    }
    parts["startup, rest"] = first_step - sum(parts.values())
    parts |= {"training": times["finetune_s"] - spent["evaluation"], "evaluation": spent["evaluation"]}
    parts["rest"] = wall - sum(parts.values())
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def import_seconds(setting: Setting) -> dict[str, float]:
    """Seconds that a short run takes to import each package, without other packages that it imports; largest first."""
    with tempfile.TemporaryDirectory() as folder:
        short = [*setting.ours(Path(folder) / "run", 0), "task.max_train_rows=64", "finetune.warmup_steps=0"]
        *_, stderr = process(["-X", "importtime", "train.py", *short])
    spent: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", stderr, re.MULTILINE):
        package = name.partition(".")[0]
        spent["Python itself" if package.lstrip("_") in sys.stdlib_module_names else package] += int(own)
    largest = dict(spent.most_common(SHOWN_PACKAGES))
    largest["all others"] = spent.total() - sum(largest.values())
    return {name: round(microseconds / 1e6, 2) for name, microseconds in largest.items()}


def show(name: str, values: Mapping[str, Any]) -> None:
    print(f"{name:<24}" + "  ".join(f"{key} {value}" for key, value in values.items()), flush=True)


def measure(setting: Setting, sides: Sequence[str], repetitions: int) -> dict[str, Any]:
    """The content of run.json."""
    process(["benchmarks/hf_trainer_lora.py", "--help"])  # puts the files of its imports into the page cache
    startup: dict[str, Any] = {"imports_s": import_seconds(setting)}  # and the files of ours
    startup["help_s"] = spread([process(["train.py", "--help"])[1] for _ in range(5)], 2)
    show("startup", startup)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for seed in range(repetitions):
        begin = seed % len(sides)
        for name in [*sides[begin:], *sides[:begin]]:
            runs[name].append(SIDES[name](setting, seed))
            show(name, runs[name][-1])
    if len(trained := {run["trainable"] for found in runs.values() for run in found}) > 1:
        sys.exit(f"the sides do not train the same parameters: {sorted(trained)}")
    result: dict[str, Any] = {
        "settings": setting.described() | {"repetitions": repetitions},
        "startup": startup,
        "runs": runs,
        "wall_s": {name: spread([run["wall_s"] for run in runs[name]], 2) for name in sides},
        "parts": {},
        "ratios": {},
    }
    if "diffora" in sides:
        startup["first_step_s"] = spread([run["first_step_s"] for run in runs["diffora"]], 2)
        result["parts"]["diffora"] = parts_of_ours(setting)
    if "hf_trainer" in sides:
        names = runs["hf_trainer"][0]["parts"]
        middle = {name: statistics.median(run["parts"][name] for run in runs["hf_trainer"]) for name in names}
        result["parts"]["hf_trainer"] = {name: round(value, 2) for name, value in middle.items()}
    if {"diffora", "hf_trainer"} <= set(sides):
        pairs = list(zip(runs["diffora"], runs["hf_trainer"], strict=True))
        result["ratios"]["run/hf_trainer"] = spread([a["wall_s"] / b["wall_s"] for a, b in pairs])
        if grouped := runs.get("hf_trainer_grouped"):
            both = zip(runs["diffora"], grouped, strict=False)
            result["ratios"]["run/hf_trainer_grouped"] = spread([a["wall_s"] / b["wall_s"] for a, b in both])
    for name, values in (result["parts"] | result["ratios"]).items():
        show(name, values)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mrpc", default=os.environ.get("MRPC"), help="folder of MRPC as parquet; default: $MRPC")
    parser.add_argument("--minilm", default=os.environ.get("MINILM"), help="folder of MiniLM; default: $MINILM")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", nargs="+", choices=list(SIDES), help="sides, in place of all")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting.find(given.mrpc, given.minilm, Path(scratch), given.epochs)
        result = header() | measure(setting, given.only or list(SIDES), given.repetitions)
    usual = setting.model == "minilm" and not given.only and given.epochs == EPOCHS
    output = given.output or (RESULTS / "run.json" if usual else None)
    if output is not None:
        write(output, result)


if __name__ == "__main__":
    main()
