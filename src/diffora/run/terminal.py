"""The tables on the terminal: at the end of a run, of an evaluation, and of a dry run."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffora.core.dam import modules_per_layer
from diffora.core.grid import Grid
from diffora.core.parts import block_of, short_names
from diffora.core.picture import layer_numbers
from diffora.core.selection import Selection
from diffora.errors import called
from diffora.run.classes import print_classes
from diffora.settings.quotes import typed
from diffora.tasks.base import Task


def print_result(record: dict[str, Any], task: Task, folder: Path) -> None:
    """Print metrics, parameters, time, and where the files are."""
    metrics, params, spent, memory = record["metrics"], record["params"], record["time"], record["memory"]
    title = f"{record['method']} on {record['task']} with {record['model']}, seed {record['seed']}"
    table = Table(title=escape(title), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name in task.metrics:
        for key, value in metrics.items():
            if key.startswith(("validation", "test")) and key.endswith(f"/{name}"):
                table.add_row(key, _number(value))
    held_out = f"held_out/{task.main_metric}"
    table.add_row(f"{held_out} (epoch chosen on the other half)", _number(metrics[held_out]))
    table.add_row("best epoch", f"{metrics['best_epoch']:g} of {record['history'][-1]['epoch']:g}")
    if "generalisation_gap" in metrics:
        table.add_row("generalisation gap (training − validation)", _number(metrics["generalisation_gap"]))
    if "forgetting/increase" in metrics:
        changed = " → ".join(_number(metrics[f"forgetting/{when}"]) for when in ("before", "after"))
        table.add_row("loss on the plain texts, before → after", changed)
    if "update/rank" in metrics:
        table.add_row("mean rank of the updates", _number(metrics["update/rank"], 2))
    table.add_section()
    table.add_row("adapter parameters", f"{params['adapter']:,}")
    if params["inference"] != params["adapter"]:
        table.add_row("adapter parameters at inference", f"{params['inference']:,}")
    table.add_row("head parameters", f"{params['head']:,}")
    table.add_row("share of the backbone", f"{params['adapter'] / params['backbone']:.2%}")
    table.add_section()
    if spent["search_s"]:
        table.add_row("search", _duration(spent["search_s"]))
    table.add_row("fine-tuning", _duration(spent["finetune_s"]))
    if record.get("step_time"):
        share = record["step_time"]["selection"]["share"]
        table.add_row(f"step time beside LoRA on all modules ({record['step_time']['from']})", f"{share:.3f}")
    if cached := (record.get("prefix") or {}).get("finetune"):
        which = f"{cached['layers']} of {cached['of']}"
        table.add_row("layers computed once", f"{which}, {_duration(cached['seconds'])}")
    table.add_row("whole run", _duration(spent["total_s"]))
    table.add_row("peak memory", f"{memory['peak_cuda_mb'] or memory['peak_rss_mb']:,.0f} MB")
    console = Console()
    console.print(table)
    if (folder / "classes.csv").is_file():
        print_classes(folder / "classes.csv", console, "validation rows by class, best epoch")
    if record["selection"]:
        pictures = " dam.png gamma.png" if (folder / "gamma.png").is_file() else " dam.png"
        console.print(f"selection: {_counts(record['selection']['selected'])}", highlight=False)
        if sure := record["selection"].get("certainty"):
            console.print(sure, highlight=False)
    else:
        pictures = ""
    pictures += "".join(f" {name}" for name in ("classes.csv", "confusion.png") if (folder / name).is_file())
    weights = "adapter/" if (folder / "adapter").is_dir() else "model/"
    selection = " selection.json" if record["selection"] else ""
    console.print(
        f"{folder}: run.json {weights}{selection}{pictures} logs/ checkpoints/",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def print_selection(record: dict[str, Any], folder: Path) -> None:
    """Print what a run with ``search_only=true`` selected, where its files are, and how to use them."""
    file = folder / "selection.json"
    selection = Selection.load(file)
    title = f"{record['method']} on {record['task']} with {record['model']}, seed {record['seed']}: selected modules"
    table = Table(title=escape(title))
    table.add_column("module of a layer")
    table.add_column("layers", justify="right")
    table.add_column("which", overflow="fold")
    numbers = layer_numbers(selection.modules)
    for j, name in enumerate(selection.types):
        present = sum(row[j] is not None for row in selection.modules)
        layers = [number for number, row in zip(numbers, selection.selected, strict=True) if name in row]
        table.add_row(escape(name), f"{len(layers)}/{present}", " ".join(layers))
    console = Console()
    console.print(table)
    rank = "" if selection.rank is None else f", rank {selection.rank} within the budget"
    spent = f"search {_duration(record['time']['search_s'])}" if record["time"]["search_s"] else "no search"
    lines = [f"{len(selection.names())} of {sum(selection.sizes())} modules selected{rank}; {spent}"]
    lines += [selection.certainty] if selection.certainty else []
    pictures = " ".join(name for name in ("dam.png", "gamma.png", "members.json") if (folder / name).is_file())
    lines.append(f"{folder}: run.json selection.json {pictures}")
    lines += ["", *how_to_use(record, folder)]
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def how_to_use(record: dict[str, Any], folder: Path) -> list[str]:
    """Lines that say what to do with the selection of a run."""
    here = Path(os.path.relpath(folder) if folder.absolute().is_relative_to(Path.cwd()) else folder)
    settings = record["settings"]
    rank = "" if record["selection"]["rank"] else f"rank={settings.get('rank')}, "
    alpha = settings["method"].get("alpha", 16)
    return [
        f"Fine-tune with it: the same arguments with `{called('train')}`, without search_only=true and with",
        f"  resume=true {typed('hydra.run.dir', here)}",
        "or, in other runs,",
        f"  {typed('method.selection', here / 'selection.json')}",
        "With PEFT, in Python:",
        f"  diffora.Selection.load({str(here / 'selection.json')!r}).lora_config({rank}alpha={alpha})",
    ]


def print_evaluation(account: dict[str, Any], files: list[Path]) -> None:
    """Print the metrics of each split, and the written files."""
    table = Table(title=escape(f"{account['task']['name']}, {account['seconds']:.1f} s"))
    table.add_column("")
    for split in account["metrics"]:
        table.add_column(escape(split), justify="right")
    table.add_row("rows", *(f"{n:,}" for n in account["rows"].values()))
    names = list(dict.fromkeys(name for scores in account["metrics"].values() for name in scores))
    for name in names:
        found = (scores.get(name) for scores in account["metrics"].values())
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in found))
    console = Console()
    console.print(table)
    for file in files:
        if file.name.endswith("classes.csv"):
            print_classes(file, console, f"{file.name.removesuffix('_classes.csv')} rows by class")
    if not names:
        console.print("no labels, so predictions only")
    console.print(*files, sep="\n", soft_wrap=True, highlight=False, markup=False)


def print_dry_run(record: dict[str, Any], grid: Grid, selection: Selection | None, method: Any) -> None:
    """Print the grid of candidates and what the method would train."""
    params = record["params"]
    title = f"{record['method']} on {record['model']}: {grid.n_layers} layers x {grid.n_types} candidates"
    table = Table(title=escape(title))
    table.add_column("module of a layer")
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    table.add_column("selected in layers" if selection else "", overflow="fold")
    numbers, selected = layer_numbers(grid.names), selection.selected if selection else []
    for j, name in enumerate(grid.types):
        chosen = " ".join(number for number, row in zip(numbers, selected, strict=False) if name in row)
        shape = next(row[j] for row in grid.shapes if row[j] is not None)
        table.add_row(name, *map(str, shape or ()), chosen)
    console = Console()
    console.print(table)
    n_modules = grid.n_modules
    if selection is not None:
        rank = "" if selection.rank is None else f", rank {selection.rank} within the budget"
        console.print(f"{sum(map(len, selection.selected))} of {n_modules} modules selected{rank}", highlight=False)
    elif "modules_min" in params:
        span = f"{params['modules_min']} to {params['modules_max']}"
        console.print(f"{span} of {n_modules} modules within the budget", highlight=False)
    elif hasattr(method, "scope"):
        size = method.size(grid)
        counts = dict.fromkeys((modules_per_layer(method.rho, n), n) for n in grid.sizes)
        many = f"K = {' or '.join(f'{k} of {n}' for k, n in counts)} modules a layer"
        many = many if method.scope == "layer" else f"{size} of {n_modules} modules"
        console.print(f"rho = {method.rho}: {many}", highlight=False)
    if "rank_min" in params:
        console.print(f"rank {params['rank_min']} to {params['rank_max']} within the budget", highlight=False)
    console.print(f"adapter parameters    {params['adapter']:>13,}", highlight=False)
    if "rank_min" in params or "modules_min" in params:
        console.print("  at most; the number depends on the selected modules", highlight=False)
    if "adapter_min" in params:
        bounds = f"{params['adapter_min']:,} to {params['adapter_max']:,}"
        console.print(f"  expected; from {bounds}, depending on the selected modules", highlight=False)
    for name in ("head", "trainable", "backbone"):
        console.print(f"{name + ' parameters':<22}{params[name]:>13,}", highlight=False)


def print_memory(estimates: dict[str, Any]) -> None:
    """Print the estimated memory of each stage."""
    names = {"search": "search", "finetune": "fine-tuning"}
    for stage, found in estimates.items():
        parts = ", ".join(f"{key} {_size(found[f'{key}_mb'])}" for key in ("weights", "optimiser", "activations"))
        shape = " x ".join(map(str, found["batch"]))
        line = f"memory (estimate)     {_size(found['total_mb']):>13}  {names[stage]} at {shape}: {parts}"
        Console().print(line, highlight=False, soft_wrap=True)


def _counts(selected: list[list[str]]) -> str:
    """In how many layers each module type was selected, as text."""
    names = sorted({name for row in selected for name in row}, key=lambda n: (-sum(n in row for row in selected), n))
    labels = dict(zip(names, short_names(names), strict=True))
    layers = len(selected)
    # A block has fewer layers than the model, and a layer without a selected module does not show its block.
    of = {name: "" if block_of(name) else f"/{layers}" for name in names}
    return ", ".join(f"{labels[n]} in {sum(n in row for row in selected)}{of[n]}" for n in names) or "nothing"


def _size(mb: float) -> str:
    return f"{mb / 1024:.2f} GiB" if mb >= 1024 else f"{mb:.1f} MiB"


def _number(value: float | None, digits: int = 4) -> str:
    """A metric; ``nan`` for one that is not finite, which the record of a run has as null."""
    return "nan" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
