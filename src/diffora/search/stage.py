"""The search stage of a run: scores for the candidates, the selection made of them, and what is written of both."""

import itertools
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffora.core.dam import relax
from diffora.core.lowrank import LowRankLinear, attach, detach, lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import atomic, write_text
from diffora.loop.checkpoint import write_search
from diffora.loop.data import SearchData, examples_of, split_hash, split_search
from diffora.loop.fit import fit
from diffora.loop.loggers import Loggers
from diffora.loop.parts import Parts
from diffora.loop.process import is_main
from diffora.loop.progress import ProgressBar
from diffora.methods.base import Method
from diffora.methods.selecting import Selecting
from diffora.run import figures
from diffora.search.attribution import AttributionModule
from diffora.search.bilevel import SearchModule, SearchSettings
from diffora.search.score import ScoreModule
from diffora.tasks.account import Account
from diffora.tasks.account import lines as account_lines

log = logging.getLogger(__name__)


def find_selection(parts: Parts, method: Method, selector: str, loggers: Loggers) -> tuple[Selection, float]:
    """Search the DAM, or score the candidates, and select. The model comes out as it went in.

    Args:
        selector: ``search``, ``attribution``, ``gradient`` or ``activation``.

    Returns:
        (selection, seconds).
    """
    cfg, s, folder = parts.cfg, parts.cfg.search, parts.folder
    assert isinstance(method, Selecting)
    file = folder / "selection.json"
    split = split_search(examples_of(parts.data.train.encoded), cfg.seed, s.valid_fraction, s.fraction)
    parts.data.accounts["search"] = _search_account(parts, split).record()
    for line in account_lines({"search": parts.data.accounts["search"]}):
        log.warning(line)
    if parts.earlier.search is not None:
        log.info(f"{selector}: finished already, using {file}")
        return parts.earlier.search

    def selection(scores: Tensor) -> Selection:
        provenance = {"task": cfg.task.name, "model": cfg.model.path, "data_hash": parts.data.hash}
        return method.selection_by(
            parts.grid,
            scores,
            selector,
            cfg.seed,
            split_hash=split_hash(*split),
            config=provenance | {"search": cfg.composed["search"]},
        )

    if selector in ("search", "attribution"):
        scores, elapsed = search(parts, selector, method.alpha, split, selection, loggers)
    else:
        scores, elapsed = score(parts, selector, split)
    found = selection(scores)
    if is_main():
        found.save(file)
        write_search(folder, elapsed, parts.made_with)  # last: says that all of it is there
    return found, elapsed


def _search_account(parts: Parts, split: tuple[np.ndarray, np.ndarray]) -> Account:
    """How many of the training examples the search uses."""
    examples = examples_of(parts.data.train.encoded)
    account = Account(len(np.unique(examples)))
    used = len(np.unique(examples[np.concatenate(split)]))
    account.drop(f"search.fraction={parts.cfg.search.fraction}", account.read - used)
    return account


def search(
    parts: Parts,
    selector: str,
    alpha: float,
    split: tuple[np.ndarray, np.ndarray],
    selection: Callable[[Tensor], Selection],
    loggers: Loggers,
) -> tuple[Tensor, float]:
    """The bi-level search, or the attribution. ``selection`` turns a relaxed DAM into what the loggers picture.

    Returns:
        (relaxed DAM or attributions, L x N on the CPU; seconds).
    """
    cfg, s, grid, model, folder = parts.cfg, parts.cfg.search, parts.grid, parts.model, parts.folder
    if s.train_steps > (batches := max(1, len(split[0]) // s.batch_size)):
        raise UserError(
            f"search.train_steps={s.train_steps} must be at most {batches}, the batches of a round "
            f"({len(split[0])} rows to train on, search.batch_size={s.batch_size})"
        )
    head = {
        name: {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in parts.backbone.head
    }
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    attached = attach(model, grid.names, everything, s.rank, None, alpha, freeze=False)
    layers = [[layer for layer in row if layer is not None] for row in attached]
    settings = SearchSettings(s.lr, s.gamma_lr, s.order, s.weight_decay, s.clip, s.accumulate, s.update)
    arguments = model, layers, grid.types, parts.task, settings, cfg.seed
    bilevel = selector == "search"
    module = SearchModule(*arguments)
    if not bilevel:
        module = AttributionModule(*arguments, rounds=s.epochs, score_batches=cfg.method.score_batches)
    data = SearchData(
        parts.data.train.encoded,
        (parts.data.collate, parts.data.collate_eval),
        split,
        s.batch_size,
        cfg.seed,
        s.train_steps,
        cfg.trainer.num_workers,
        matched=bilevel and s.update == "simultaneous",
    )
    log.info(f"{selector}: {grid.n_layers} layers x {grid.n_types} modules on {len(split[0])} + {len(split[1])} rows")
    stage_loggers = loggers.of_stage("search")
    callbacks: list[L.Callback] = [
        ProgressBar(selector, "round", ("search/train_loss", "search/valid_loss", "search/entropy"))
    ]
    if bilevel:
        callbacks.append(DamPictures(selection, lambda found, step: loggers.dam(found, step, stage_loggers)))
    fit(parts, "search", module, data, callbacks, stage_loggers, max_epochs=s.epochs + (not bilevel))
    module.close_gates()
    gates = module.gates(module.gamma.detach()).cpu()
    if is_main() and bilevel:
        names = list(grid.types)
        rounds, points = [at for at, _ in module.trajectory], [rows for _, rows in module.trajectory]
        write_text(
            folder / "trajectory.json", json.dumps({"types": names, "rounds": rounds, "gamma_bar": points}) + "\n"
        )
        figures.save_png(folder / "gamma.png", figures.gamma_trajectories(module.trajectory, names))
    if is_main() and getattr(cfg.method, "warm_start", False):
        _save_searched(parts, gates, layers)
    detach(model)
    for name, state in head.items():
        model.get_submodule(name).load_state_dict(state)
    return module.scores if isinstance(module, AttributionModule) else gates, module.elapsed


def score(parts: Parts, criterion: str, split: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, float]:
    """Score the candidates on search-train rows.

    Returns:
        (scores, L x N on the CPU; seconds).
    """
    cfg, s = parts.cfg, parts.cfg.search
    module = ScoreModule(parts.model, parts.grid.names, criterion, parts.task, s.accumulate, cfg.seed)
    collate = parts.data.collate_eval, parts.data.collate_eval
    data = SearchData(
        parts.data.train.encoded, collate, split, s.batch_size, cfg.seed, num_workers=cfg.trainer.num_workers
    )
    log.info(f"{criterion}: scoring {parts.grid.n_layers} layers x {parts.grid.n_types} modules")
    training = parts.model.training
    with torch.random.fork_rng():
        fit(parts, "search", module, data, [], [], max_epochs=1, limit_train_batches=cfg.method.score_batches)
    parts.model.train(training)
    return module.scores, module.elapsed


def _save_searched(parts: Parts, gates: Tensor, layers: list[list[LowRankLinear]]) -> None:
    """Keep the searched A and B, the gate folded into B, for ``method.warm_start``."""
    from safetensors.torch import save_file

    tensors = {}
    for names, row, gates_of_row in zip(parts.grid.names, layers, gates, strict=True):
        for name, layer, gate in zip(names, row, gates_of_row, strict=True):
            tensors[f"{name}.lora_a"] = layer.lora_a.detach().cpu().clone()
            tensors[f"{name}.lora_bt"] = layer.lora_bt.detach().cpu() * gate
    with atomic(parts.folder / "selection.safetensors") as scratch:
        save_file(tensors, scratch)


def warm_start(parts: Parts, selection: Selection) -> None:
    """Give the selected modules the A and B that the search ended with, in place."""
    from safetensors.torch import load_file

    given = parts.cfg.method.selection
    file = (Path(given) if given else parts.folder / "selection.json").with_suffix(".safetensors")
    if not file.is_file():
        raise UserError(f"method.warm_start=true needs {file}, which a search with method.warm_start=true leaves")
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors' own has no public base class
        raise UserError(f"method.warm_start=true: {file} is damaged: {error}") from error
    layers = dict(lowrank_layers(parts.model))
    for names, flags in zip(parts.grid.names, selection.mask().tolist(), strict=True):
        for name in itertools.compress(names, flags):
            layer = layers[name]
            for which, own in (("a", layer.lora_a), ("bt", layer.lora_bt)):
                found = tensors.get(f"{name}.lora_{which}")
                if found is None or not found.isfinite().all():
                    raise UserError(f"method.warm_start=true: {file} has no A and B of {name} with finite numbers")
                if found.shape != own.shape:
                    had = f"the search had rank {len(found)} at {name}"
                    raise UserError(f"method.warm_start=true: {had}, rank={layer.rank} does not")
                own.data.copy_(found)


class DamPictures(L.Callback):
    """Sends the picture of the DAM to the loggers after each round of the search."""

    def __init__(self, selection: Callable[[Tensor], Selection], send: Callable[[Selection, int], None]) -> None:
        self.selection, self.send = selection, send

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, SearchModule)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a tie on the way is none of the user's business
                selection = self.selection(relax(pl_module.gamma.detach()).cpu())
            self.send(selection, trainer.current_epoch + 1)
