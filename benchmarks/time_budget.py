"""The step time of a selection within a time budget, beside LoRA on all modules with as many adapter parameters.

    python -m benchmarks.time_budget [--rounds N] [--only minilm_16x64 …] [--bf16] [--threads N] [--output FILE]

For each budget, K = 3 random modules of each layer that the budget allows get a LoRA. Their rank is the largest with
which they have no more parameters than LoRA of rank 2 on all modules. All models of a shape take turns in one process,
and each figure is a ratio to LoRA on all modules in the same round: the median over rounds, with quartiles. The share
of counted operations, which ``method.time_from=model`` uses, stands beside it.

Writes benchmarks/results/time_budget.json. With ``--only`` or ``--bf16``, it writes a file only if ``--output`` names
one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffora
from benchmarks.common import ALPHA, Contender, Shape, fill, interleave, lora, own
from benchmarks.report import RESULTS, header, ratio, spread, write
from diffora.core.attach import attach
from diffora.core.choose import choose
from diffora.core.counts import adapter_parameters
from diffora.core.draws import random_scores
from diffora.core.selection import Selection
from diffora.core.steptime import operations
from diffora.kernels.dropout import use_cheap_dropout

SHAPES = {
    "minilm_16x64": Shape("minilm", 16, 64, rank=2),
    "minilm_32x128": Shape("minilm", 32, 128, rank=2),
    "mpnet_base_16x64": Shape("mpnet_base", 16, 64, rank=2),
}
BUDGETS = (0.6, 0.7, 0.8)
RHO = 0.5


def selection_within(model: nn.Module, shape: Shape, budget: float) -> tuple[Selection, dict[str, Any]]:
    """(selection, facts) of random modules within a budget, as ``method=random`` makes them."""
    grid = shape.grid(model)
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    parameters = adapter_parameters(grid.shapes, everything, shape.rank, None)
    scores = random_scores(grid.n_layers, grid.n_types, 0)
    free = Selection.from_mask(grid, everything, method="", selector="random", rho=RHO, seed=0, scores=scores.tolist())
    head = [name for name, part in model.named_children() if any(p.requires_grad for p in part.parameters())]
    within = diffora.within_time(model, free, shape.batch(), budget, loss=_loss, rank=shape.rank, head=head)
    choice = choose(scores, grid.shapes, "layer", RHO, shape.rank, None, parameters, within.lowest_layer)
    found = Selection.from_mask(
        grid, choice.mask, method="", selector="random", rho=RHO, seed=0, k=choice.k, rank=choice.rank,
        lowest_layer=within.lowest_layer,
    )  # fmt: skip
    assert choice.rank is not None
    used = adapter_parameters(grid.shapes, choice.mask, choice.rank, None)
    facts = {"lowest_layer": within.lowest_layer, "layers": grid.n_layers, "k": choice.k, "rank": choice.rank}
    return found, facts | {"parameters": used, "counted_all_modules": within.config["time_budget"]["share"]}


def selected(model: nn.Module, shape: Shape, selection: Selection) -> Contender:
    """LoRA on the selected modules, adapted as in a run."""
    model = own(model)
    use_cheap_dropout(model)
    assert selection.rank is not None
    attach(model, selection.places(), selection.mask(), selection.rank, None, ALPHA, freeze=False)
    fill(model)
    return Contender(model.to(shape.device), shape)


def measure(shape: Shape, rounds: int, bf16: bool = False, budgets: Sequence[float] = BUDGETS) -> dict[str, Any]:
    """The entry of one shape."""
    backbone, batch = shape.build(), shape.batch()
    contenders = {"lora": lora(backbone, shape)}
    facts: dict[str, dict[str, Any]] = {}
    for budget in budgets:
        try:
            selection, found = selection_within(backbone, shape, budget)
        except diffora.UserError as error:
            print(f"  {budget}: {error}")
            continue
        facts[str(budget)] = found
        contenders[str(budget)] = selected(backbone, shape, selection)
    most = operations(lambda: contenders["lora"].loss(batch).backward())
    for name, found in facts.items():
        found["counted"] = operations(lambda name=name: contenders[name].loss(batch).backward()) / most
    for contender in contenders.values():
        contender.model.zero_grad()

    def step(contender: Contender) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            contender.step(batch)

    steps = {name: partial(step, contender) for name, contender in contenders.items()}
    times = interleave(steps, rounds, cuda=shape.device == "cuda")
    for name, found in facts.items():
        found |= {"measured": ratio(times, name, "lora"), "ms": spread(times[name], 2)}
    return {"shape": asdict(shape), "bf16": bf16, "lora_ms": spread(times["lora"], 2), "budgets": facts}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**{key: value for key, value in batch.items() if key != "row"}).loss
    return loss


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}, LoRA on all modules: {result['lora_ms']['median']:.1f} ms")
    print(f"  {'budget':<8}{'layers':>8}{'rank':>6}{'parameters':>12}{'counted':>9}{'measured':>10}{'quartiles':>16}")
    for budget, found in result["budgets"].items():
        layers = f"{found['layers'] - found['lowest_layer']}/{found['layers']}"
        ours = found["measured"]
        print(
            f"  {budget:<8}{layers:>8}{found['rank']:>6}{found['parameters']:>12,}{found['counted']:>9.3f}"
            f"{ours['median']:>10.3f}{ours['q1']:>9.3f}{ours['q3']:>7.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), help="shapes, in place of all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--threads", type=int, help="in place of torch's choice, a thread for each core")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    result: dict[str, Any] = header() | {"settings": {"rounds": given.rounds, "warmup_rounds": 1}, "shapes": {}}
    for name in given.only or SHAPES:
        result["shapes"][name] = measure(SHAPES[name], given.rounds, given.bf16)
        show(name, result["shapes"][name])
    output = given.output or (None if given.only or given.bf16 else RESULTS / "time_budget.json")
    if output is not None:
        write(output, result)


if __name__ == "__main__":
    main()
