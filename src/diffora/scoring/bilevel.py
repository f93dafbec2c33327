"""Stage 1 of DiffoRA: the bi-level search of the DAM ([D] eqs. 10 to 13; [D] Algorithm 1, lines 1 to 8).

- [D] eqs. 10, 11: `SearchModule.gates` relaxes Γ, and `SearchModule.batch_loss` puts the gates on the layers.
- [D] eq. 13, upper level (line 4 of [D] Algorithm 1): `SearchModule.gamma_step`.
- [D] eq. 13, lower level (line 6): `SearchModule.weight_step`.
- both levels in one pass, not in [D]: `SearchModule.joint_step`.
- other scores than the gates, and an early end, not in [D]: `diffora.core.readout`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffora.core.dam import entropy, initial_gamma, relax
from diffora.core.hypergradient import added, first_order, simultaneous, unrolled
from diffora.core.lowrank import Layers, set_gates
from diffora.core.readout import Readout
from diffora.core.split import divided, mixed_modules, shared_tables
from diffora.errors import UserError
from diffora.loop.stage import Stage
from diffora.settings.sections import Search
from diffora.tasks.base import Batch, Task
from diffora.tasks.batches import divide_rows, joined, parts_of

POINTS_PER_ROUND = 40
"""Of the trajectory of Γ."""

Grads = Sequence[Tensor | None]
Trajectory = list[tuple[float, list[list[float]]]]
"""(round, relaxed DAM), a few dozen points a round; whole rounds are whole numbers, 0.0 is the start."""


class SearchModule(Stage):
    """[D] Algorithm 1, lines 1 to 8: one Γ step on a search-valid batch, then T weight steps on search-train batches.

    The upper level is Γ, L x N, which starts at 0; the lower level is every A and B and the head. Neither step computes
    or changes a gradient of the other level. Gradients are taken with `torch.autograd.grad` and averaged over processes
    here, because DDP does not see them.

    With ``update="simultaneous"`` the Γ step and the first weight step become one: the same two gradients, both at the
    same point, from one pass over the rows of both batches.

    Args:
        model: the backbone with a low-rank layer at every place of the grid.
        layers: those layers, L x N; None where a layer of the model has no such module.
        types: the N module types, to name metrics.
        task: gives the loss.
        settings: the section ``search``.
        seed: of the run.
        choose: from scores, L x N, to the mask of the modules that would be selected; for ``search.patience``.

    Attributes:
        gamma: Γ, L x N.
        searched: boolean (L,), which layers have adapters.
        trajectory: see `Trajectory`.
        readout: the scores, and whether the search is over early.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        types: Sequence[str],
        task: Task,
        settings: Search,
        seed: int,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, seed)
        self.automatic_optimization = False
        present = torch.tensor([[layer is not None for layer in row] for row in layers])
        # A layer without any adapter is below the lowest one that may have some: its row of Γ stays at 0.
        self.searched = present.any(-1)
        self.gamma = nn.Parameter(initial_gamma(present | ~self.searched.unsqueeze(-1)))
        self.layers, self.types = layers, list(types)
        self.task, self.settings = task, settings
        trained = [p for p in model.parameters() if p.requires_grad]
        adapters = [layer for row in layers for layer in row if layer is not None]
        of_layers = {p for layer in adapters for p in (layer.lora_a, layer.lora_bt)}
        self.pairs = [p for p in trained if p in of_layers]
        self.head = [p for p in trained if p not in of_layers]
        self._tables = shared_tables(model)
        self._checked = False
        self.readout = Readout(settings.readout, settings.head_warmup, settings.patience, choose)
        self._reads = False  # whether the present Γ step gives its gradient with respect to the gates to `readout`
        self.trajectory: Trajectory = [(0.0, self.gates(self.gamma).tolist())]
        self._trace: list[tuple[float, Tensor]] = []
        self._losses: list[tuple[Tensor, Tensor]] = []

    @property
    def weights(self) -> list[nn.Parameter]:
        """The lower level's parameters: A, B and the head."""
        return [*self.pairs, *self.head]

    def gates(self, gamma: Tensor) -> Tensor:
        """The relaxed DAM, L x N ([D] eq. 11, or the relaxation that the settings name)."""
        return relax(gamma, self.settings.relaxation)

    def current_scores(self) -> Tensor:
        """What the modules are scored by now, L x N: the relaxed DAM, or what ``search.readout`` names."""
        return self.readout.scores(self.gates(self.gamma.detach()))

    @property
    def rounds_done(self) -> float:
        """Rounds at the last point of the trajectory; fewer than all after an early end."""
        return self.trajectory[-1][0]

    @property
    def spread_metric(self) -> str:
        """Name of the metric that shows how far the gates are from their start.

        This is the entropy of the softmax. For independent gates it is their sum instead: how many modules of a layer
        are open, N/2 at the start.
        """
        return "search/open_gates" if self.settings.relaxation == "sigmoid" else "search/entropy"

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        s = self.settings
        return [
            torch.optim.Adam([self.gamma], lr=s.gamma_lr, betas=(0.5, 0.999)),
            torch.optim.AdamW(self.weights, lr=s.lr, weight_decay=s.weight_decay, fused=True),
        ]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        gamma_opt, weight_opt = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        valid, (train, *others) = batch["valid"], batch["train"]
        steps, total = self._steps()
        step = self.current_epoch * steps + batch_idx
        self._reads = self.readout.reads(step, total)
        if frozen := self.readout.is_frozen(step, total):
            train_loss = self.weight_step(weight_opt, train)
            valid_loss = torch.full_like(train_loss, torch.nan)
        elif self.settings.update == "simultaneous":
            train_loss, valid_loss = self.joint_step(gamma_opt, weight_opt, valid, train)
        else:
            valid_loss = self.gamma_step(gamma_opt, valid, train)
            train_loss = self.weight_step(weight_opt, train)
        self._update_scale()  # after both steps: one pass for both levels has one loss scale
        for train in others:
            train_loss = self.weight_step(weight_opt, train)
            self._update_scale()
        self.watch(train_loss if frozen else valid_loss + train_loss)
        self._losses.append((train_loss, valid_loss))
        gates = self.gates(self.gamma.detach())
        stops = self.readout.is_settled(gates, step + 1, steps, total)
        if (batch_idx + 1) % max(1, steps // POINTS_PER_ROUND) == 0 or batch_idx + 1 == steps or stops:
            self._trace.append((self.current_epoch + (batch_idx + 1) / steps, gates))
        if stops:
            self.trainer.should_stop = True

    def _steps(self) -> tuple[int, int]:
        """(steps of a round, steps of all rounds)."""
        steps = int(self.trainer.num_training_batches)
        return steps, steps * self.settings.epochs

    def gamma_step(self, optimizer: torch.optim.Optimizer, valid: Batch, train: Batch) -> Tensor:
        """[D] Algorithm 1, line 4: one step of Γ on the validation loss. Returns that loss."""
        grads: Grads
        if self.settings.order == 1:
            # Γ step: do not save activations that only A and B need.
            with divided(self.layers, (), 0, len(valid["row"])):
                loss, grads = self.gradients(valid, self._first_order, self.gamma)
        else:
            loss, grads = self.unrolled_gradient(valid, train)
        self._step_gamma(optimizer, grads, valid)
        return loss

    @property
    def _upper(self) -> list[Tensor]:
        """Γ, and the gates of the last forward pass if their gradient is wanted too."""
        return [self.gamma, self._relaxed] if self._reads else [self.gamma]

    def _first_order(self, loss: Tensor) -> Grads:
        return torch.autograd.grad(loss, self._upper) if self._reads else [first_order(loss, self.gamma)]

    def _step_gamma(self, optimizer: torch.optim.Optimizer, grads: Grads, valid: Batch) -> None:
        """Take the step of Γ, and read the gradient with respect to the gates if it is wanted."""
        of_gamma, *of_gates = self.averaged(self._upper, grads, valid)
        scaler = self._scaler()
        for grad in of_gates:
            self.readout.read(grad if scaler is None else grad / scaler.get_scale())
        self._take_step(optimizer, [self.gamma], [of_gamma])

    def weight_step(self, optimizer: torch.optim.Optimizer, train: Batch) -> Tensor:
        """[D] Algorithm 1, line 6: one step of A, B and the head on the training loss. Returns that loss."""
        weights = self.weights
        loss, grads = self.gradients(
            train, lambda loss: list(torch.autograd.grad(loss, weights, allow_unused=True)), self.gamma.detach()
        )
        self._take_step(optimizer, weights, self.averaged(weights, grads, train))
        return loss

    def joint_step(
        self, gamma_opt: torch.optim.Optimizer, weight_opt: torch.optim.Optimizer, valid: Batch, train: Batch
    ) -> tuple[Tensor, Tensor]:
        """One step of both levels from one pass over the rows of both batches. Returns (training, validation loss).

        Raises:
            UserError: at the first step, if the model mixes the rows of a batch.
        """
        if not self._checked:
            self.check_rows_are_apart(valid, train)
            self._checked = True
        losses, grads = self.joint_gradients(valid, train)
        of_weights, of_upper = grads[: len(self.weights)], grads[len(self.weights) :]
        self._take_step(weight_opt, self.weights, self.averaged(self.weights, of_weights, train))
        self._step_gamma(gamma_opt, of_upper, valid)
        return losses

    def gradients(self, batch: Batch, grad: Callable[[Tensor], Grads], gamma: Tensor) -> tuple[Tensor, Grads]:
        """Mean loss of a batch and its gradients, summed over ``accumulate`` micro-batches."""
        total, sums = torch.zeros((), device=self.device), None
        for part, share in parts_of(batch, self.settings.accumulate, self.task):
            loss = self.batch_loss(part, gamma)
            sums = added(sums, grad(self._scaled(loss) * share))
            total = total + loss.detach() * share
        assert sums is not None
        return total, sums

    def joint_gradients(self, valid: Batch, train: Batch) -> tuple[tuple[Tensor, Tensor], Grads]:
        """(training loss, validation loss), and one list: gradients of the first with respect to all weights, of the
        second with respect to Γ."""
        train_total, valid_total = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        sums, n_parts = None, self.settings.accumulate
        # If one split has less than a batch, it may have fewer micro-batches than the other one.
        for (a, a_share), (b, b_share) in zip_longest(
            parts_of(train, n_parts, self.task), parts_of(valid, n_parts, self.task), fillvalue=(None, 0.0)
        ):
            n_train, n_valid = self._sequences(a, b)
            with divided(self.layers, self._tables, n_train, n_train + n_valid):
                train_loss, valid_loss = self._joint_losses(a, b)
                scaled = self._scaled(train_loss) * a_share, self._scaled(valid_loss) * b_share
                sums = added(sums, simultaneous(*scaled, self.pairs, self.head, *self._upper))
            train_total = train_total + train_loss.detach() * a_share
            valid_total = valid_total + valid_loss.detach() * b_share
        assert sums is not None
        return (train_total, valid_total), sums

    def _sequences(self, train: Batch | None, valid: Batch | None) -> tuple[int, int]:
        """How many sequences the model reads for the rows of each batch, in one pass over both; 0 for None."""
        present = [part for part in (train, valid) if part is not None]
        each = max(self.task.sequences(part) for part in present)  # rows of one pass have the same number
        n_train, n_valid = (0 if part is None else each * len(part["row"]) for part in (train, valid))
        return n_train, n_valid

    def _joint_losses(self, train: Batch | None, valid: Batch | None) -> tuple[Tensor, Tensor]:
        """(training loss, validation loss) from one pass, training rows first; 0 for a batch that is None."""
        self._set_gates(self.gamma)
        present = [part for part in (train, valid) if part is not None]
        config: Any = self.model.config
        padding = max(0, getattr(config, "pad_token_id", None) or 0)
        batch = present[0] if len(present) == 1 else joined(present[0], present[1], self.task, padding)
        sizes = [0 if part is None else len(part["row"]) for part in (train, valid)]
        with self.given(batch):
            outputs = divide_rows(self.model(**self.task.inputs(batch)), sizes)
        losses = [
            self.task.loss(SimpleNamespace(**output), rows) if size else torch.zeros((), device=self.device)
            for output, rows, size in zip(outputs, divide_rows(batch, sizes), sizes, strict=True)
        ]
        return losses[0], losses[1]

    def check_rows_are_apart(self, valid: Batch, train: Batch) -> None:
        """Refuse a model in which the gradients of the two levels would mix. Tested on two rows of each batch."""
        few = [{key: value[:2] for key, value in batch.items()} for batch in (train, valid)]
        n_train, n_valid = self._sequences(*few)
        with (
            torch.compiler.set_stance("force_eager"),  # a compiled pass is one node: it shows no gradients inside
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            divided(self.layers, self._tables, n_train, n_train + n_valid),
        ):
            mixed = mixed_modules(self.model, lambda: self._joint_losses(*few), n_train + n_valid)
        if mixed:
            raise UserError(
                f"search.update=simultaneous: {type(self.model).__name__} does not keep the rows of a batch apart in "
                f"{', '.join(mixed[:3])}{' …' if len(mixed) > 3 else ''}, so that training and validation rows cannot "
                "share a pass; use search.update=alternating"
            )

    def unrolled_gradient(self, valid: Batch, train: Batch) -> tuple[Tensor, Grads]:
        """The hypergradient through one inner step of size ``lr``."""
        parameters = dict(self.model.named_parameters())
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
        seen: list[Tensor] = []

        def loss_at(batch: Batch) -> Callable[[Sequence[Tensor]], Tensor]:
            def loss(weights: Sequence[Tensor]) -> Tensor:
                seen.append(self.batch_loss(batch, self.gamma, dict(zip(names, weights, strict=True))))
                return seen[-1]

            return loss

        weights = [parameters[name] for name in names]
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            means = (lambda grads, rows=rows: self.averaged(grads, grads, rows) for rows in (train, valid))
            grad = unrolled(loss_at(train), loss_at(valid), weights, self.gamma, self.settings.lr, *means)
        return seen[-1].detach(), [grad]

    def batch_loss(self, batch: Batch, gamma: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Loss with the gates of ``gamma`` ([D] eq. 10); at ``weights`` instead of the model's own, if given."""
        self._set_gates(gamma)
        inputs = self.task.inputs(batch)
        with self.given(batch):
            if weights is None:
                output = self.model(**inputs)
            else:
                output = torch.func.functional_call(self.model, weights, kwargs=inputs, tie_weights=True)
        return self.task.loss(output, batch)

    def _set_gates(self, gamma: Tensor) -> None:
        self._relaxed = self.gates(gamma)  # kept, because a read-out may want the gradient with respect to the gates
        set_gates(self.layers, self._relaxed)

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _scaled(self, loss: Tensor) -> Tensor:
        scaler = self._scaler()
        return loss if scaler is None else scaler.scale(loss)

    def _update_scale(self) -> None:
        if (scaler := self._scaler()) is not None:
            scaler.update()

    def averaged(self, parameters: Sequence[Tensor], grads: Grads, batch: Batch) -> list[Tensor]:
        """Gradients averaged over processes, each weighted by `Task.weight` of its batch; 0 for a None."""
        full = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        if self.trainer.world_size > 1:
            flat = torch.cat([g.flatten() for g in full])
            terms = flat.new_tensor([self.task.weight(batch)])
            flat = torch.cat([flat * terms, terms])
            torch.distributed.all_reduce(flat)
            flat = flat[:-1] / flat[-1].clamp(min=1)
            full = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in full]), full, strict=True)]
        return full

    def _take_step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """Clip (weights only), take the step, and clear the gradients."""
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        scaler = self._scaler()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.settings.clip is not None and parameters[0] is not self.gamma:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.end_round()

    def end_round(self) -> None:
        """Add the round to the trajectory and log its metrics."""
        self.trajectory += [(at, gamma_bar.tolist()) for at, gamma_bar in self._trace]
        losses = torch.stack([torch.stack(pair) for pair in self._losses]).nanmean(0)  # NaN: no Γ step
        train, valid = self.trainer.strategy.reduce(losses, reduce_op="mean").tolist()
        self._trace, self._losses = [], []
        gamma_bar, independent = self.gates(self.gamma.detach()), self.settings.relaxation == "sigmoid"
        spread = gamma_bar.sum(-1) if independent else entropy(relax(self.gamma.detach(), "softmax"))
        values = {
            "search/round": self.rounds_done,
            "search/train_loss": train,
            self.spread_metric: spread[self.searched].mean().item(),
        }
        if not math.isnan(valid):
            values["search/valid_loss"] = valid
        for i, row in enumerate(gamma_bar.tolist()):
            gates = zip(self.types, row, self.layers[i], strict=True)
            values |= {f"gamma_bar/layer{i:02d}/{name}": gate for name, gate, layer in gates if layer is not None}
        self.log_dict(values, rank_zero_only=True)

    def state(self) -> dict[str, Any]:
        return {"trajectory": self.trajectory, "readout": self.readout.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.trajectory = [(at, rows) for at, rows in state["trajectory"]]
        self.readout.load_state(state["readout"])

    def over(self, epochs_done: int, epochs: int) -> bool:
        return self.readout.stopped_at is not None or super().over(epochs_done, epochs)

    def close_gates(self) -> None:
        """Remove the gates from the layers."""
        set_gates(self.layers, None)
