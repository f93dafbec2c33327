"""Whole runs with LoRA in the upper layers and a cached prefix, beside LoRA on all layers with as many parameters.

    python -m benchmarks.prefix --data <MRPC> --model <MiniLM> [--seeds 0 1 2] [--epochs 14] [--arms …] [--output FILE]
    python -m benchmarks.prefix … --seeds 3 --add      # adds a seed to the output file

The arms: LoRA of rank 2 on all candidate modules of all layers (`all`), of the top half and of the top third of the
layers with the rank that gives as many parameters, and the same with ``trainer.cache_prefix=true``. For each seed,
every arm is a run of `train.py` in a new process with its own empty caches, so a cached arm computes its files too. The
arms take turns to go first. Times are ratios to `all` with the same seed: the median over seeds, with quartiles.
Metrics come from run.json, with the difference to the arm without a cache, paired by seed.

Without ``--data`` and ``--model``, the embedded task and backbone are used, and the result says so.
Writes benchmarks/results/prefix.json after each run, and prints a table. With other settings than those above, it
writes a file only if ``--output`` names one.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import complete, measure, metric, times_to, trained
from benchmarks.report import REPO, RESULTS, header, write
from benchmarks.run import write_embedded

RANK = 2
"""Of LoRA on all layers."""
NAME, EPOCHS = "minilm", 14
SHARES = {"all": 1.0, "half": 1 / 2, "third": 1 / 3}
CACHED = " cached"
UPPER = [f"{name}{cached}" for name in SHARES if name != "all" for cached in ("", CACHED)]
EMBEDDED = REPO / "src" / "diffora" / "assets" / "tiny"


def arms(n_layers: int) -> dict[str, list[str]]:
    """The overrides of each arm. All have as many parameters, up to the rounding of the rank.

    >>> arms(6)["third"]
    ["model.layer='encoder.layer.[4,5]'", 'rank=6']
    """
    found = {}
    for name, share in SHARES.items():
        n = max(1, round(share * n_layers))
        layers = ",".join(map(str, range(n_layers - n, n_layers)))
        upper = [f"model.layer='encoder.layer.[{layers}]'", f"rank={round(RANK * n_layers / n)}"]
        found[name] = [f"rank={RANK}"] if n == n_layers else upper
        if n < n_layers:
            found[name + CACHED] = [*upper, "trainer.cache_prefix=true"]
    return found


def one_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The facts of one run in a new process."""
    facts, record = trained(overrides)
    metrics = {name: record["metrics"][f"validation/{name}"] for name in ("accuracy", "f1")}
    return facts | {"parameters": record["params"]["adapter"], "prefix": record["prefix"].get("finetune"), **metrics}


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Ratios to the arm `all`, and metrics, of the seeds that all arms have."""
    runs = complete(runs)
    found = {}
    for name, times in times_to("all", runs).items():
        own = runs[name]
        facts: dict[str, Any] = {"parameters": own[0]["parameters"], "prefix": own[0]["prefix"], **times}
        for key in ("accuracy", "f1"):
            facts[key] = metric([run[key] for run in own])
            if name.endswith(CACHED) and name.removesuffix(CACHED) in runs:
                plain = [run[key] for run in runs[name.removesuffix(CACHED)]]
                less = [a - b for a, b in zip(facts[key]["values"], plain, strict=True)]
                facts[key]["minus_uncached"] = [round(value, 4) for value in less]
        found[name] = facts
    return found


def check_addable(earlier: Mapping[str, Any], result: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Exit unless runs of these seeds can be added to an earlier result: same settings and processor, other seeds."""
    known = {run["seed"] for own in earlier["runs"].values() for run in own}
    same = earlier["settings"] == result["settings"] and earlier["machine"]["cpu"] == result["machine"]["cpu"]
    if not same or known & set(seeds):
        sys.exit("error: --add needs other seeds, with the same settings and processor as the runs in the output file")


def added(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier result with the runs of a later one, and when and at which load these were measured."""
    runs = {name: [*own, *later["runs"][name]] for name, own in earlier["runs"].items()}
    facts = {"seeds": sorted({run["seed"] for own in later["runs"].values() for run in own})}
    facts |= {key: later[key] for key in ("commit", "date")} | {"load_before": later["machine"]["load_before"]}
    return {**earlier, "arms": summary(runs), "runs": runs, "added": [*earlier.get("added", []), facts]}


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    heads = f"{'run / all':>11}{'quartiles':>15}{'tuning / all':>14}{'accuracy':>17}{'F1':>8}"
    print(f"\n{'arm':<14}{'parameters':>11}{heads}")
    for name, facts in found.items():
        whole, tuning = facts["wall_s"]["to_all"], facts["finetune_s"]["to_all"]
        sd = f" ± {facts['accuracy']['sd']:.4f}" if "sd" in facts["accuracy"] else ""
        print(
            f"{name:<14}{facts['parameters']:>11,}{whole['median']:>11.3f}{whole['q1']:>8.3f}{whole['q3']:>7.3f}"
            f"{tuning['median']:>14.3f}{facts['accuracy']['mean']:>8.4f}{sd:>9}{facts['f1']['mean']:>8.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MRPC")
    parser.add_argument("--model", type=Path, help="folder of the backbone")
    parser.add_argument("--name", default=NAME, help="its name in conf/model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--arms", nargs="+", choices=UPPER, default=UPPER, help="beside `all`; default: all of them")
    parser.add_argument("--more", nargs="*", default=[], help="more overrides for all runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--add", action="store_true", help="add to the runs that the output file has")
    given = parser.parse_args()
    real = given.data is not None and given.model is not None
    usual = real and given.name == NAME and given.epochs == EPOCHS and given.arms == UPPER and not given.more
    output = given.output or (RESULTS / "prefix.json" if usual or given.add else None)
    if given.add and not output.is_file():
        parser.error(f"--add: there are no runs in {output}; leave --add out, or name their file with --output")
    with tempfile.TemporaryDirectory() as scratch:
        if not real:
            write_embedded(Path(scratch))
        data, model = (given.data.resolve(), given.model.resolve()) if real else (Path(scratch), EMBEDDED)
        n_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        common = ["task=mrpc", f"task.path={data}", f"model={given.name if real else 'tiny'}", f"model.path={model}"]
        common += ["trainer=cpu", "logger=csv", f"finetune.epochs={given.epochs}"]
        common += [*([] if real else ["task.max_length=64"]), *given.more]
        chosen = {name: value for name, value in arms(n_layers).items() if name in ("all", *given.arms)}
        settings = {
            "data": "MRPC" if real else "the embedded task: --data and --model were not both given",
            "backbone": given.name if real else "the embedded tiny DeBERTa",
            "layers": n_layers,
            "epochs": given.epochs,
            "more": given.more,
            "arms": chosen,
        }
        result: dict[str, Any] = header() | {"settings": settings}

        earlier = json.loads(output.read_text()) if given.add else None
        if earlier is not None:
            check_addable(earlier, result, given.seeds)

        def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
            later = result | {"arms": summary(runs), "runs": runs}
            if output is not None:
                write(output, later if earlier is None else added(earlier, later))

        runs = measure(common, chosen, given.seeds, one_run, keep)
    show(summary(runs) if earlier is None else json.loads(output.read_text())["arms"])


if __name__ == "__main__":
    main()
