"""Tries every method under DDP, FSDP, 4-bit weights, gradient checkpointing and torch.compile, and notes the result.

Every run is a small one on the embedded encoder, and its losses are compared with those of one process without any
of these. The results are in ``docs/reference/data/support.json``,
and the table in docs/reference/support.md is made of them.

    python scripts/support.py                      all of it: about an hour on two cores
    python scripts/support.py --kinds fsdp --methods lora sora
    python scripts/support.py --kinds              nothing is run: the page from the results
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/reference/data/support.json"
PAGE = ROOT / "docs/reference/support.md"
TABLE = "<!-- the table -->"
KINDS = {
    "ddp": ["trainer=ddp_cpu"],
    "fsdp": ["trainer=ddp_cpu", "trainer.strategy=fsdp"],
    "4bit": ["trainer=cpu", "model.quantise=4bit"],
    "checkpointing": ["trainer=cpu", "trainer.gradient_checkpointing=true"],
    "compile": ["trainer=cpu", "trainer.compile=true"],
}
HEADS = {
    "DDP": "ddp",
    "FSDP": "fsdp",
    "4-bit weights": "4bit",
    "gradient checkpointing": "checkpointing",
    "`torch.compile`": "compile",
}
PLAIN = "plain"
SMALL = [
    "task=paraphrase",
    "task.train_rows=48",
    "task.validation_rows=17",  # an odd number, and fewer than a batch
    "model=tiny",
    "logger=none",
    "finetune.batch_size=16",
    "finetune.epochs=1",
    "finetune.warmup_steps=0",
]
SEARCH = ["search.epochs=1", "search.batch_size=8"]
WAIT = 600
"""Seconds that a run may take."""
LOSSES = ("train/loss", "validation/loss")


def variants() -> dict[str, list[str]]:
    """The overrides of each row of the table."""
    names = sorted(file.stem for file in (ROOT / "conf/method").glob("*.yaml"))
    found = {name: [f"method={name}"] for name in names if name != "peft"}
    found["diffora"] = [*SEARCH, "method=diffora"]
    found["diffora, simultaneous"] = [*SEARCH, "method=diffora", "search.update=simultaneous"]
    found["diffora, ensemble"] = [*SEARCH, "method=diffora", "search.ensemble=2"]
    found["diffora, order 2"] = [*SEARCH, "method=diffora", "search.order=2"]
    for selector in ("attribution", "one_shot", "gradient", "activation", "plop", "fisher", "kappa", "spectrum"):
        more = ["search.masks=10"] if selector == "one_shot" else []
        found[f"diffora, {selector}"] = [*SEARCH, "method=diffora", f"method.selector={selector}", *more]
    return found


def one(overrides: list[str], folder: Path) -> dict[str, Any]:
    """What a run gave: its losses, or why it was refused."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from diffora.errors import UserError
    from diffora.places import conf_dir
    from diffora.run.experiment import run

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides)
    try:
        result = run(cfg, folder)
    except UserError as error:
        return {"refused": " ".join(error.problems)}
    return {"losses": {name: result.metrics[name] for name in LOSSES}, "selected": selected(folder)}


def selected(folder: Path) -> Any:
    """The modules that a run selected; None if it selects none."""
    file = folder / "selection.json"
    return json.loads(file.read_text())["selected"] if file.is_file() else None


def worker(kind: str, names: list[str], out: Path) -> None:
    """Do the runs of one kind, in this process and those that torchrun started beside it."""
    import torch

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            overrides = [*SMALL, *KINDS.get(kind, ["trainer=cpu"]), *variants()[name]]
            found = one([*overrides, *no_dropout(name)], Path(scratch) / str(number))
            if rank == 0:
                with out.open("a") as file:
                    file.write(json.dumps([name, found]) + "\n")


def no_dropout(name: str) -> list[str]:
    """Each process draws its own dropout masks, so losses are compared without dropout."""
    text = (ROOT / f"conf/method/{name.split(',')[0]}.yaml").read_text()
    return ["finetune.dropout=0"] if "dropout" in text else []


def tried(kind: str, names: list[str]) -> dict[str, Any]:
    """The results of one kind by row. A row that ended the process has the end of its message."""
    found: dict[str, Any] = {}
    while left := [name for name in names if name not in found]:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            out.touch()
            start = [sys.executable]
            if kind in ("ddp", "fsdp"):
                start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*start, __file__, "--worker", kind, str(out), "--methods", *left]
            code, errors = ended(command, out)
            new = dict(json.loads(line) for line in out.read_text().splitlines())
        found |= new
        if code != 0 and (rest := [name for name in left if name not in new]):
            lines = [line for line in errors.splitlines() if "Error" in line and "Traceback" not in line]
            found[rest[0]] = {"failed": (lines or errors.splitlines() or ["no message"])[0][-300:]}
            print(errors[-3000:], file=sys.stderr)
    return found


def ended(command: list[str], out: Path) -> tuple[int, str]:
    """(exit code, stderr) of a command. It is ended if ``out`` does not grow any more: its processes wait for ever."""
    with tempfile.TemporaryFile("w+") as errors:
        process, size = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors), -1
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(WAIT)
                break
            if size == (size := out.stat().st_size):
                process.terminate()  # torchrun then ends its processes
                process.wait()
                return 1, f"Error: no run ended in {WAIT} seconds"
        errors.seek(0)
        return code, errors.read()


def verdict(found: dict[str, Any], plain: dict[str, Any], kind: str) -> str:
    """One cell: ``works``, ``refused: …``, ``differs …`` or ``failed: …``."""
    for word in ("refused", "failed"):
        if word in found:
            return f"{word}: {found[word]}"
    pairs = [(found["losses"][name], plain["losses"][name]) for name in LOSSES]
    if kind == "4bit":  # other weights, so other losses, but near
        same = all(math.isfinite(a) and abs(a - b) < 0.3 for a, b in pairs)
    else:
        same = all(abs(a - b) <= 2e-3 * abs(b) for a, b in pairs) and found["selected"] == plain["selected"]
    return "works" if same else f"differs: {pairs}"


def table(results: dict[str, dict[str, str]]) -> str:
    """The table of the page, and the reasons of the refusals below it."""
    reasons: list[str] = []
    lines = [f"| `method=` | {' | '.join(HEADS)} |", "|---" * (len(HEADS) + 1) + "|"]
    for name in variants():
        cells = [shown(results.get(name, {}).get(kind, "not run"), reasons) for kind in HEADS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", "Refused, with this message:", "", *notes])


def shown(cell: str, reasons: list[str]) -> str:
    """A cell as the page shows it. The reason of a refusal is added to ``reasons``, once."""
    word, _, reason = cell.partition(": ")
    if word != "refused":
        return word
    reason = re.sub(r"method\.selector=\w+", "method.selector=…", reason)
    if reason not in reasons:
        reasons.append(reason)
    return f"refused ({reasons.index(reason) + 1})"


def write_page(results: dict[str, dict[str, str]]) -> None:
    before, _, rest = PAGE.read_text().partition(TABLE)
    after = rest.partition(TABLE)[2]
    PAGE.write_text(f"{before}{TABLE}\n\n{table(results)}\n\n{TABLE}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", default=list(variants()), help="rows of the table")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker[0], given.methods, Path(given.worker[1]))
    plain = tried(PLAIN, given.methods) if given.kinds else {}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for kind in given.kinds:
        for name, found in tried(kind, given.methods).items():
            cell = verdict(found, plain[name], kind) if "losses" in plain[name] else f"failed: plain: {plain[name]}"
            results.setdefault(name, {})[kind] = cell
            print(f"{name} · {kind}: {cell}", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_page(results)
    return None


if __name__ == "__main__":
    main()
