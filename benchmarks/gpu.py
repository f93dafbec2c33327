"""Ours beside PEFT on one GPU, in at most 20 minutes: correctness first, then steps, then whole runs, in bfloat16.

    python -m benchmarks.gpu [--minutes 19] [--no-compile] [--only … --output FILE]
    python -m benchmarks.gpu --device cpu --tiny --output FILE      all of it on tiny shapes; not a GPU's figures

1. Losses and gradients are compared (`benchmarks.gpu_checks`). If one is wrong, nothing is timed, and the exit code is
   1: a fast wrong step is worth nothing.
2. Steps: the contenders of a group take turns, as in `benchmarks.step`. Each figure is a ratio within a round.
3. Whole runs: `train.py method=lora` and Hugging Face Trainer with PEFT in turn (`benchmarks.gpu_runs`).

Weights are random, of the true shapes, so nothing is downloaded. Each part runs in a process of its own, the most
important one first. A part for which no time is left is left out; the last lines and the result name it. Writes
benchmarks/results/gpu.json after each part, and the section of the page at the end.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_runs, gpu_unsloth
from benchmarks.common import CONTENDERS, Shape, allocated, interleave
from benchmarks.report import REPO, RESULTS, header, ratio, spread

EAGER = ("floor", "lora", "fused", "peft", "lora_dropout", "peft_dropout")
SEARCH = ("floor", "two_floors", "simultaneous", "alternating")
COMPILED = ("floor", "lora", "compiled", "peft", "compiled_peft")
PAIRS = {
    "peft/lora": "speed over PEFT's",
    "peft_dropout/lora_dropout": "speed over PEFT's, dropout 0.1",
    "compiled_peft/compiled": "speed over PEFT's, both compiled",
    "peft/compiled": "speed over PEFT's, only ours compiled",
    "fused/lora": "the fused node over PyTorch's nodes",
    "compiled/lora": "a compiled step over one that is not",
    "simultaneous/two_floors": "bi-level step over two floors, simultaneous",
    "alternating/two_floors": "bi-level step over two floors, alternating",
}
"""Ratios of step times, reported beside those to the floor. A ratio of times the other way round is one of speeds."""

LEAST = 30
"""Seconds that the checks need at least."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
TINY_OF = {"llama_1b": {"num_key_value_heads": 1, "head_dim": 16}, "deberta_v3_base": {"pooler_hidden_size": 32}}


@dataclass(frozen=True)
class Place:
    """Where the benchmark runs: the true shapes on a GPU, or tiny ones to try it out."""

    device: str
    tiny: bool

    def shape(self, model: str, rows: int, length: int, **changes: Any) -> Shape:
        if self.tiny:
            rows, length, changes = 4, 16, changes | TINY | TINY_OF.get(model, {}) | {"vocab_size": 4096}
        return Shape(model, rows, length, device=self.device, bf16=True, changes=changes)

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 30


SHAPES = {
    "deberta": ("deberta_v3_base", 32, 128),
    "llama": ("llama_1b", 4, 512),
    "minilm": ("minilm", 32, 128),
}


# --- parts, each in a process of its own ---


def checks(place: Place, compiles: bool) -> dict[str, Any]:
    """True widths and two layers: what can be wrong is in a layer."""
    shapes = [place.shape(model, 4, min(length, 256), num_hidden_layers=2) for model, _, length in SHAPES.values()]
    kinds = [kind for kind in gpu_checks.KINDS if compiles or kind is not gpu_checks.compilation]
    return {"checks": gpu_checks.facts(gpu_checks.run(shapes, kinds))}


def steps(place: Place, name: str, contenders: Sequence[str]) -> dict[str, Any]:
    """Times, tokens per second and memory of each contender, and the ratios of `PAIRS`."""
    cuda = place.device == "cuda"
    shape = place.shape(*SHAPES[name])
    model, batch = shape.build(), shape.batch()
    made = {contender: CONTENDERS[contender](model, shape) for contender in contenders}
    run = {contender: partial(value.step, batch) for contender, value in made.items()}
    times = interleave(run, place.rounds, warmup=3, cuda=cuda)
    memory = {contender: round(allocated(step, cuda=cuda) / 2**20, 1) for contender, step in run.items()}
    tokens = shape.rows * shape.length
    result = {
        contender: {
            "ms": spread(values, 3),
            "tokens_s": round(1000 * tokens / spread(values)["median"]),
            "step_mb": memory[contender],
        }
        for contender, values in times.items()
    }
    pairs = {pair: pair.split("/") for pair in (*PAIRS, *(f"{name}/floor" for name in times if name != "floor"))}
    ratios = {pair: ratio(times, *sides) for pair, sides in pairs.items() if times.keys() >= set(sides)}
    return {"shape": asdict(shape), "contenders": result, "ratios": ratios}


def runs(place: Place, name: str, compiles: bool) -> dict[str, Any]:
    return gpu_runs.measure(place.shape(*SHAPES[name]), compiles)


def with_unsloth(place: Place) -> dict[str, Any]:
    return gpu_unsloth.measure(place.shape(*SHAPES["llama"]), place.rounds)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        what: the part in words.
        make: returns its result.
        seconds: about how long it takes on a GPU. It is not begun if less time is left.
        compiles: whether it is about `torch.compile`.
    """

    what: str
    make: Callable[[Place], dict[str, Any]]
    seconds: int
    compiles: bool = False


PARTS = {
    "steps_deberta": Part("steps of DeBERTaV3-base, 32x128", lambda p: steps(p, "deberta", EAGER), 50),
    "steps_llama": Part("steps of Llama 3.2 1B, 4x512", lambda p: steps(p, "llama", EAGER), 60),
    "steps_minilm": Part("steps of MiniLM, 32x128", lambda p: steps(p, "minilm", EAGER), 40),
    "search_minilm": Part("bi-level steps of MiniLM, 32x128", lambda p: steps(p, "minilm", SEARCH), 50),
    "run_deberta": Part("whole runs of DeBERTaV3-base", lambda p: runs(p, "deberta", False), 180),
    "compiled_minilm": Part("compiled steps of MiniLM", lambda p: steps(p, "minilm", COMPILED), 280, True),
    "run_llama": Part("whole runs of Llama", lambda p: runs(p, "llama", False), 200),
    "run_minilm": Part("whole runs of MiniLM", lambda p: runs(p, "minilm", False), 150),
    "unsloth_llama": Part("steps of Llama with Unsloth", with_unsloth, 90),
    "compiled_llama": Part("compiled steps of Llama", lambda p: steps(p, "llama", COMPILED), 450, True),
    "compiled_deberta": Part("compiled steps of DeBERTaV3-base", lambda p: steps(p, "deberta", COMPILED), 450, True),
    "compiled_run_minilm": Part("whole runs of MiniLM, compiled", lambda p: runs(p, "minilm", True), 300, True),
    "compiled_run_deberta": Part(
        "whole runs of DeBERTaV3-base, compiled", lambda p: runs(p, "deberta", True), 500, True
    ),
    "compiled_run_llama": Part("whole runs of Llama, compiled", lambda p: runs(p, "llama", True), 500, True),
}
"""By name, the most important first."""


def in_own_process(arguments: Sequence[str], seconds: float) -> dict[str, Any] | str:
    """The result of one part, or why there is none. Its own output goes to the screen."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--part-to", str(file)]
        process = subprocess.Popen(command, cwd=REPO, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s, because the time was up"
        finally:  # whole runs are processes of the part's process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code or not file.is_file():
            return f"failed with exit code {code}"
        found: dict[str, Any] | str = json.loads(file.read_text())
        return found


# --- facts about the machine ---

QUERY = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit",
         "temperature.gpu")  # fmt: skip


def gpu_facts() -> dict[str, str] | None:
    """What nvidia-smi says of the first visible GPU, clocks included; None without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.split(',')[0]}")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(QUERY, [value.strip() for value in out.splitlines()[0].split(",")], strict=False))
    return None


def versions() -> dict[str, str | None]:
    """CUDA's version, and those of packages that only a GPU needs."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for package in ("triton", "bitsandbytes", "unsloth"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- the whole ---


def measure(place: Place, names: Sequence[str], compiles: bool, minutes: float, save: Callable[[Any], None]) -> Any:
    """The content of gpu.json. ``save`` is called with it after each part.

    Raises:
        SystemExit: a check failed.
    """
    began = time.monotonic()
    same = ["--device", place.device, *(["--tiny"] if place.tiny else []), *([] if compiles else ["--no-compile"])]

    def left() -> float:
        return 60 * minutes - (time.monotonic() - began)

    if left() < LEAST:
        sys.exit(f"{minutes:g} minutes are left, which is too little. The environment is made now: start it again")
    print("Correctness first", flush=True)
    result: dict[str, Any] = header()
    result["versions"] |= {name: value for name, value in versions().items() if value}
    result |= {"not_a_gpu": place.device != "cuda", "tiny": place.tiny, "gpu_before": gpu_facts()}
    checked = in_own_process(["--part", "checks", *same], left())
    if isinstance(checked, str):
        sys.exit(f"The checks did not end ({checked}). Nothing was timed.")
    result |= checked
    if wrong := [check for check in result["checks"] if check["wrong"]]:
        listed = "\n".join(f"  {c['what']}: {c['error']:.2g}, at most {c['most']:.2g}" for c in wrong)
        sys.exit(f"Wrong on this device, so nothing was timed and nothing was written:\n{listed}")
    result |= {"parts": {}, "left_out": dict.fromkeys(names, "not reached: the benchmark was interrupted")}
    for name in names:
        part = PARTS[name]
        if part.compiles and not compiles:
            result["left_out"][name] = "--no-compile"
        elif not place.tiny and left() < part.seconds:
            result["left_out"][name] = f"it takes about {part.seconds} s, and {max(0, left()):.0f} s were left"
        else:
            print(f"\n{part.what}", flush=True)
            found = in_own_process(["--part", name, *same], max(1, left()))
            if isinstance(found, str):
                result["left_out"][name] = found
            else:
                del result["left_out"][name]
                result["parts"][name] = found | {key: header()[key] for key in ("commit", "date")}
                show(found)
        save(result)
    result["gpu_after"] = gpu_facts()
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    save(result)
    return result


def show(found: Mapping[str, Any]) -> None:
    for name, value in found.get("contenders", {}).items():
        ms = value["ms"]
        print(
            f"  {name:<16}{ms['median']:>9.2f} ms ({ms['q1']:.2f}, {ms['q3']:.2f}){value['tokens_s']:>12,} tokens/s"
            f"{value['step_mb']:>10.1f} MB"
        )
    for name, value in found.get("ratios", {}).items():
        print(f"  {name:<28}{value['median']:>7.3f} ({value['q1']:.3f}, {value['q3']:.3f})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=19, help="stop in time for this; default: 19")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts, in place of all; the checks always run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and short runs, to try the benchmark out")
    parser.add_argument("--output", type=Path, help="in place of benchmarks/results/gpu.json")
    parser.add_argument("--part", choices=["checks", *PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--part-to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    true = given.device == "cuda" and not given.tiny
    if given.only and given.output is None and given.part is None:
        parser.error("with --only, --output must name a file: gpu.json has all parts")
    if not true and given.output is None and given.part is None:
        parser.error("with --device cpu or --tiny, --output must name a file: these are not a GPU's figures")
    if not true and given.output is not None and given.output.resolve().is_relative_to(RESULTS):
        parser.error(f"--output={given.output}: figures of --device cpu or --tiny may not stand in {RESULTS}")
    return given


def main() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would take all, and PEFT's runs with them
    given = arguments()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "make bench-gpu needs a CUDA GPU, and torch sees none (to try it out: python -m benchmarks.gpu --help)"
        )
    place = Place(given.device, given.tiny)
    if given.part:
        part = partial(checks, compiles=not given.no_compile) if given.part == "checks" else PARTS[given.part].make
        try:
            found: Any = part(place)
        except SystemExit as stopped:  # a program that the part runs failed, or is not installed
            print(stopped, file=sys.stderr)
            found = str(stopped).strip().splitlines()[-1][:300]
        given.part_to.write_text(json.dumps(found))
        return
    output = given.output or RESULTS / "gpu.json"

    def save(result: Any) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")

    names = [name for name in PARTS if not given.only or name in given.only]
    result = measure(place, names, not given.no_compile, given.minutes, save)
    print(f"\nwritten: {output}, after {result['minutes']} minutes")
    if result["not_a_gpu"]:
        print("not a GPU figure: this ran on the CPU")
    for name, why in result["left_out"].items():
        print(f"left out: {PARTS[name].what}: {why}")


if __name__ == "__main__":
    main()
