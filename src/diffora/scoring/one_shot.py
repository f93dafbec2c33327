"""Selector ``one_shot``: train random selections at the scale of fine-tuning, score others, and fit an additive model.

Not in [D]. Weights are shared by all selections as in SPOS (Guo et al., arXiv 1904.00420), and an additive model is
fitted to the scores as in datamodels (Ilyas et al., arXiv 2202.00622):

1. Each weight step draws a selection of the size that the method would choose (``scope``, ``rho``, budget). The gates
   of its modules are 1 and all others 0. The step changes A and B of its modules and the head, nothing else.
2. ``search.masks`` other random selections are scored without training: minus the loss on search-valid rows. All of
   them are scored on the same rows, so that differences between rows do not count.
3. A ridge regression of these scores on the selected modules (`diffora.scoring.additive`) gives each module its score.

The search of [D] trains all modules at once with gates of about 1/N. Here the gates are those of the deployed model.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffora.core.dam import provisional_choice
from diffora.core.grid import laid_out
from diffora.core.norms import keep_statistics
from diffora.core.selection import Selection
from diffora.loop import streams
from diffora.loop.data import SearchData, eval_loader
from diffora.loop.stage import NonFiniteLoss
from diffora.scoring.additive import Additive, fit_additive
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.context import SearchContext, SearchResult
from diffora.scoring.trained import all_adapted, fit_rounds, search_data, searched_weights
from diffora.tasks.base import Batch

log = logging.getLogger(__name__)

CHUNK = 32
"""Selections that are scored between two checkpoints."""
TRUSTED = 0.1
"""Below this leave-one-out R², a warning says that the scores say little."""


@dataclass(frozen=True)
class Draws:
    """Random selections as gates. Each depends on the seed and its numbers only: on no process, and no earlier draw.

    Attributes:
        choose: what the method would select by given scores, L x N. By random scores, every selection of the method's
            size is equally likely.
        shape: (L, N).
        rank: of the candidates' adapters.
        deployed_rank: r of the selected modules in fine-tuning, if no budget chooses it.
        seed: of the run.
    """

    choose: Callable[[Tensor], Selection]
    shape: tuple[int, int]
    rank: int
    deployed_rank: int
    seed: int

    def gates(self, *numbers: int) -> Tensor:
        """L x N: 0 for a module that is not selected, otherwise the gate that makes alpha / rank that of fine-tuning.

        This gate is 1 where candidates and selected modules have the same rank, as they do by default.
        """
        scores = torch.from_numpy(np.random.default_rng((self.seed, *numbers)).random(self.shape))
        with provisional_choice():
            selection = self.choose(scores)
        return selection.mask() * (self.rank / (selection.rank or self.deployed_rank))


class OneShotModule(SearchModule):
    """Trains for some rounds. Then it scores selections without training, `CHUNK` of them in an epoch of Lightning.

    Args:
        of_search: the arguments of `SearchModule`.
        draws: the random selections.
        rounds: of training.
        rows: gives the search-valid batches that each selection is scored on; called once.

    Attributes:
        losses: of the selections that are scored so far.
    """

    def __init__(
        self, *of_search: Any, draws: Draws, rounds: int, rows: Callable[[], Iterable[Mapping[str, Tensor]]]
    ) -> None:
        super().__init__(*of_search)
        nn.init.ones_(self.gamma)
        self.draws, self.rounds, self.rows = draws, rounds, rows
        self.parts = len(chunks(self.settings.masks))
        self.losses: list[float] = []
        self._train_losses: list[Tensor] = []
        self._sums: list[Tensor] = []

    def gates(self, gamma: Tensor) -> Tensor:
        """``gamma`` without a relaxation, because these gates are drawn and not learnt."""
        return gamma

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done >= self.rounds + self.parts

    def progress(self) -> tuple[float, float, int]:
        """Scoring counts as one more round."""
        done, steps = self.current_epoch + 1, int(self.trainer.num_training_batches)
        batches = self.rounds * steps + (self.settings.masks if self._trains else self.parts * steps)
        return min(done, self.rounds) + max(0, done - self.rounds) / self.parts, self.rounds + 1, batches

    @property
    def _trains(self) -> bool:
        return self.current_epoch < self.rounds

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.train(self._trains)  # dropout would add noise to the scores
        keep_statistics(self.model)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if not self._trains:
            self._sums.append(self.score(self.draws.gates(streams.ONE_SHOT_SCORE, int(batch))))
            self.watch(self._sums[-1])
            return
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
        for number, train in enumerate(batch["train"]):
            gates = self.draws.gates(streams.ONE_SHOT_TRAIN, self.current_epoch, batch_idx, number)
            self._train_losses.append(self.selection_step(optimizer, train, gates))
            self._update_scale()
            self.watch(self._train_losses[-1])

    def selection_step(self, optimizer: torch.optim.Optimizer, train: Batch, gates: Tensor) -> Tensor:
        """One step of the head and of A and B of the selected modules. Returns the loss.

        The other modules get no step at all: momentum and weight decay do not move them either.
        """
        flags = zip(self.layers, gates.tolist(), strict=True)
        selected = [x for row, values in flags for x, gate in zip(row, values, strict=True) if x is not None and gate]
        weights = [p for layer in selected for p in (layer.lora_a, layer.lora_bt)] + self.head
        loss, grads = self.gradients(
            train, lambda loss: list(torch.autograd.grad(loss, weights, allow_unused=True)), gates.to(self.device)
        )
        self._take_step(optimizer, weights, self.averaged(weights, grads, train))
        return loss

    @cached_property
    def _batches(self) -> list[Batch]:
        return [{key: value.to(self.device) for key, value in batch.items()} for batch in self.rows()]

    # Not inference mode: models keep tables that they compute in a forward pass, and fine-tuning could not use them.
    @torch.no_grad()
    def score(self, gates: Tensor) -> Tensor:
        """The sum of the losses of this process's rows with these gates, and the number of its terms, (2,)."""
        total = torch.zeros(2, device=self.device)
        for batch in self._batches:
            terms, loss = self.task.weight(batch), self.batch_loss(batch, gates.to(self.device))
            total += torch.stack([loss.float() * terms, torch.full_like(total[0], terms)])
        return total

    def end_round(self) -> None:
        values: dict[str, Any] = {"search/round": self.progress()[0]}
        if self._train_losses:
            loss = torch.stack(self._train_losses).mean()
            values["search/train_loss"] = self.trainer.strategy.reduce(loss, reduce_op="mean")
            self._train_losses = []
        else:
            sums = torch.stack(self._sums)
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(sums)
            losses = (sums[:, 0] / sums[:, 1]).tolist()
            if not np.isfinite(losses).all():
                raise NonFiniteLoss(self.epoch_now)
            self.losses += losses
            self._sums = []
            values["search/valid_loss"] = float(np.mean(losses))
        self.log_dict(values, rank_zero_only=True)

    def fitted(self) -> Additive:
        """The additive model of minus the loss of a selection, over the modules of the grid in row-major order."""
        masks = [self.draws.gates(streams.ONE_SHOT_SCORE, number) > 0 for number in range(self.settings.masks)]
        present = torch.tensor([[layer is not None for layer in row] for row in self.layers])
        return fit_additive(torch.stack(masks)[:, present].numpy(), -np.array(self.losses))

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.losses = [float(loss) for loss in state["losses"]]


def chunks(masks: int) -> list[range]:
    """The numbers of the selections that are scored in each epoch of Lightning after the training."""
    return [range(first, min(first + CHUNK, masks)) for first in range(0, masks, CHUNK)]


class OneShotData(L.LightningDataModule):
    """The batches of the search; after the rounds of training, the numbers of the selections to score.

    The Trainer asks for a loader before each epoch (``reload_dataloaders_every_n_epochs=1``).
    """

    def __init__(self, search: SearchData, rounds: int, masks: int) -> None:
        super().__init__()
        self.search, self.rounds, self.chunks = search, rounds, chunks(masks)
        self.num_workers = search.num_workers

    @cached_property
    def _batches(self) -> DataLoader[Any]:
        return self.search.train_dataloader()

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        if progress.processed < self.rounds:
            return self._batches
        numbers: Any = self.chunks[progress.processed - self.rounds]
        # Without its own generator, a loader advances the global one.
        return DataLoader(numbers, batch_size=None, generator=torch.Generator())


def scored_rows(valid: np.ndarray, n: int, seed: int) -> np.ndarray:
    """At most ``n`` of the search-valid rows, drawn without repetition."""
    order = np.random.default_rng((seed, streams.ONE_SHOT_ROWS)).permutation(len(valid))
    return np.sort(valid[order[:n]])


def one_shot(context: SearchContext) -> SearchResult:
    """Train random selections, score others on search-valid rows, and take the modules' effects on these scores."""
    parts, s = context.parts, context.settings
    seed, size = parts.settings.seed, (parts.grid.n_layers, parts.grid.n_types)
    assert parts.settings.rank is not None, "a method that selects has a rank"
    draws = Draws(context.choose, size, s.rank, parts.settings.rank, seed)
    rows = scored_rows(context.split[1], context.score_batches * s.batch_size, seed)
    encoded, collate = parts.data.train.encoded, parts.data.collate_eval
    loader = partial(eval_loader, encoded, collate, max(1, s.batch_size // s.accumulate), rows)
    with all_adapted(context) as layers:
        arguments = parts.model, layers, parts.grid.types, parts.task, s, seed
        module = OneShotModule(*arguments, draws=draws, rounds=s.epochs, rows=loader)
        data = OneShotData(search_data(context), s.epochs, s.masks)
        shown, rounds = ("search/train_loss", "search/valid_loss"), s.epochs + module.parts
        fit_rounds(context, "one_shot", module, data, shown, rounds, reload_dataloaders_every_n_epochs=1)
        weights = searched_weights(context, torch.ones(size), layers)
    model = module.fitted()
    facts = {"masks": s.masks, "rows": len(rows), "leave_one_out_r2": model.r2, "ridge": model.ridge}
    facts["sd_of_losses"] = float(np.std(module.losses, ddof=1))
    _tell(facts, module.losses)
    scores = laid_out(torch.from_numpy(model.effects), context.grid.names)
    scores = scores.masked_fill(parts.grid.present & ~context.grid.present, 0.0)  # below the lowest layer: not scored
    return SearchResult(scores, module.elapsed, weights=weights, facts=facts)


def _tell(facts: Mapping[str, float], losses: Sequence[float]) -> None:
    """Log how far the additive model can be trusted."""
    r2, sd = facts["leave_one_out_r2"], facts["sd_of_losses"]
    log.info(
        f"one_shot: {len(losses)} random selections scored on {facts['rows']} rows: loss {np.mean(losses):.4f}, "
        f"standard deviation {sd:.4f}; the additive model predicts {100 * max(0.0, r2):.0f} % of their variance "
        "(leave-one-out)"
    )
    if r2 < TRUSTED:
        log.warning(
            f"one_shot: leave-one-out R² is {r2:.2f}: the effects of modules do not add up, or the losses do not "
            "depend on the selection; the scores say little"
        )
