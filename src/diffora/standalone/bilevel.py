"""The bi-level search ([D] Algorithm 1, lines 1 to 8) as a plain PyTorch loop over a user's own loaders.

The steps are those of `diffora.scoring.bilevel`, without Lightning, files, several processes or micro-batches.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffora.backbones.precision import HALF
from diffora.core.attach import Calls, attach, detach
from diffora.core.dam import initial_gamma, relax
from diffora.core.grid import Grid
from diffora.core.hypergradient import first_order
from diffora.core.lowrank import Layers, set_gates
from diffora.core.model import device_of
from diffora.core.norms import keep_statistics
from diffora.core.readout import Readout
from diffora.core.split import divided, shared_tables
from diffora.errors import UserError
from diffora.scoring.measures import FLOAT16_SCALE
from diffora.standalone.batches import Loss, checked, endless, in_groups, length_of, moved, some
from diffora.standalone.choice import mask_of
from diffora.standalone.model import seed_torch
from diffora.standalone.progress import bar
from diffora.standalone.settings import SearchSettings


class Bilevel:
    """The two kinds of steps of a search, on a model that has an adapter at every place of the grid.

    Args:
        model: with the adapters; only A, B and the head require gradients.
        layers: the adapters, L x N; None where a layer of the model has no such module.
        head: the parameters that are trained together with A and B.
        loss: the user's.
        settings: of the search.
        choose: from scores, L x N, to the mask of the modules that would be selected; for ``patience``.

    Attributes:
        gamma: Γ, L x N, starts at 0.
        readout: the scores, and whether the search is over early.
        weights: A, B and the head.
        masters: what the optimiser steps: the weights, and a float32 copy of each one in half precision, in which small
            steps would be rounded away.
        scale: the loss is multiplied by this power of 2 before it is differentiated, and gradients are divided by it.
            float16 gradients would underflow otherwise; other precisions give the same values.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        head: Sequence[nn.Parameter],
        loss: Loss,
        settings: SearchSettings,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.loss, self.settings = model, layers, loss, settings
        adapters = [layer for row in layers for layer in row if layer is not None]
        present = torch.tensor([[layer is not None for layer in row] for row in layers])
        self.gamma = initial_gamma(present).to(adapters[0].lora_a).requires_grad_()
        self.weights = [p for layer in adapters for p in (layer.lora_a, layer.lora_bt)] + list(head)
        self.gamma_optimiser = torch.optim.Adam([self.gamma], lr=settings.gamma_lr, betas=(0.5, 0.999))
        self.masters = [w.detach().float() if w.dtype in HALF else w for w in self.weights]
        self.weight_optimiser = torch.optim.AdamW(
            self.masters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self._tables = shared_tables(model)
        self.scale = FLOAT16_SCALE
        self.readout = Readout(settings.readout, settings.head_warmup, settings.patience, choose)

    @property
    def gamma_bar(self) -> Tensor:
        """The relaxed DAM, L x N ([D] eq. 11), without a graph."""
        return relax(self.gamma.detach(), self.settings.relaxation)

    def gamma_gradient(
        self, batch: Any, what: str = "a validation batch", reads: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(loss, dL_valid/dΓ at fixed weights), the second L x N ([D] eq. 13).

        Args:
            what: names the batch in messages.
            reads: whether to give the gradient with respect to the gates to `readout`.
        """

        def attempt() -> tuple[Tensor, list[Tensor | None]]:
            gates = relax(self.gamma, self.settings.relaxation)
            loss = self._loss(batch, gates, what)
            scaled = loss * self.scale
            return loss, list(torch.autograd.grad(scaled, [self.gamma, gates])) if reads else [
                first_order(scaled, self.gamma)
            ]

        # Γ trains alone: activations that only A and B need are not saved. The number of examples has no effect then.
        with divided(self.layers, self._tables, 0, 1):
            try:
                loss, (of_gamma, *of_gates) = self._unscaled(attempt)
            except RuntimeError as error:
                if "not have been used" not in str(error) and "Checkpointing is not compatible" not in str(error):
                    raise
                if getattr(self.model, "is_gradient_checkpointing", False):
                    raise UserError(
                        "this model computes activations again in a way that gives no gradient of Γ: call "
                        'model.gradient_checkpointing_enable({"use_reentrant": False})'
                    ) from error
                raise UserError(
                    "the loss does not depend on any candidate module: loss(model, batch) must call the model that it "
                    "is given, with gradients"
                ) from error
        for gradient in of_gates:
            self.readout.read(gradient)
        return loss.detach(), of_gamma

    def gamma_step(self, batch: Any, what: str = "a validation batch", reads: bool = False) -> float:
        """One step of Γ on the validation loss ([D] Algorithm 1, line 4). Returns that loss."""
        loss, gradient = self.gamma_gradient(batch, what, reads)
        if not gradient.isfinite().all():
            raise UserError(f"the gradient of Γ of {what} is not finite, though the loss is {loss.item():g}")
        self.gamma.grad = gradient
        self.gamma_optimiser.step()
        return loss.item()

    def weight_step(self, batch: Any, what: str = "a training batch") -> float:
        """One step of A, B and the head on the training loss ([D] Algorithm 1, line 6). Returns that loss."""

        def attempt() -> tuple[Tensor, list[Tensor | None]]:
            loss = self._loss(batch, self.gamma_bar, what)
            grads = torch.autograd.grad(loss * self.scale, self.weights, allow_unused=True)
            return loss, [
                torch.zeros_like(master) if grad is None else grad.to(master.dtype)
                for grad, master in zip(grads, self.masters, strict=True)
            ]

        loss, grads = self._unscaled(attempt)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.masters, self.settings.clip)
        self.weight_optimiser.step()
        self.weight_optimiser.zero_grad(set_to_none=True)
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.data.copy_(master)
        return loss.item()

    def _unscaled(self, attempt: Callable[[], tuple[Tensor, list[Tensor | None]]]) -> tuple[Tensor, list[Tensor]]:
        """(loss, its gradients), from an attempt that returns the loss and the gradients of `scale` times the loss.

        After an overflow the scale is reduced, and the attempt is repeated.
        """
        while True:
            loss, scaled = attempt()
            found = [gradient for gradient in scaled if gradient is not None]
            if self.scale == 1 or all(bool(gradient.isfinite().all()) for gradient in found):
                return loss, [gradient / self.scale for gradient in found]
            self.scale = max(1.0, self.scale / 16)

    def _loss(self, batch: Any, gates: Tensor, what: str) -> Tensor:
        set_gates(self.layers, gates)
        return checked(self.loss(self.model, batch), what)


class Found(NamedTuple):
    """Gates and scores at the end of a search, L x N on the CPU, and the rounds that it took."""

    gates: Tensor
    scores: Tensor
    rounds: float


def bilevel_search(
    model: nn.Module,
    grid: Grid,
    head: Sequence[nn.Parameter],
    loaders: tuple[Iterable[Any], Iterable[Any]],
    loss: Loss,
    settings: SearchSettings,
    choice: tuple[int | None, str],
    seed: int,
    progress: bool,
) -> Found:
    """Search once, and remove the adapters that the search adds.

    Args:
        grid: where the candidates are.
        head: the parameters that are trained together with A and B.
        loaders: of training and of validation batches.
        choice: ``k`` and ``scope``, for ``patience``.

    Raises:
        UserError: a loss is not a finite scalar that depends on the candidates, or a loader has no batches.
    """
    model.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    try:
        attached = attach(model, grid.names, everything, settings.rank, None, settings.alpha, freeze=False)
        seed_torch(seed * 1009, device_of(model))  # dropout as in a run's search (`diffora.loop.stage`)
        _match_precision(attached)
        keep_statistics(model.train())
        bilevel = Bilevel(model, attached, head, loss, settings, lambda scores: mask_of(grid, scores, *choice))
        calls = Calls(model)
        rounds = _run_rounds(bilevel, loaders, device_of(model), progress)
        calls.check()
        gates = bilevel.gamma_bar
        return Found(gates.cpu(), bilevel.readout.scores(gates).cpu(), rounds)
    finally:
        detach(model)


def _match_precision(layers: Layers) -> None:
    """A and B of a float64 model become float64; those of all others are float32 already."""
    for row in layers:
        for layer in row:
            if layer is not None and any(p.dtype == torch.float64 for p in layer.base.parameters()):
                layer.lora_a.data, layer.lora_bt.data = layer.lora_a.data.double(), layer.lora_bt.data.double()


def steps_of_round(train_loader: Iterable[Any], train_steps: int) -> int | None:
    """Γ steps of a round; None if the loader has no length."""
    batches = length_of(train_loader)
    return None if batches is None else math.ceil(batches / train_steps)


def _run_rounds(
    bilevel: Bilevel, loaders: tuple[Iterable[Any], Iterable[Any]], device: torch.device, progress: bool
) -> float:
    """One Γ step, then T weight steps, until the training batches of all rounds are used. Returns the rounds done."""
    train_loader, valid_batches = loaders[0], endless(loaders[1], "the loader of validation batches")
    s, readout, step = bilevel.settings, bilevel.readout, 0
    steps = steps_of_round(train_loader, s.train_steps)
    # Without a length, only a number of warm-up steps is allowed (`SearchSettings.step_problems`): no total is needed.
    total = 0 if steps is None else s.rounds * steps
    with bar(progress, "search", "step", total or None) as shown:
        for round_ in range(1, s.rounds + 1):
            for group in in_groups(some(train_loader, "the loader of training batches"), s.train_steps):
                valid_batch, values = next(valid_batches), {}
                if not readout.is_frozen(step, total):
                    of_step, reads = f"the validation batch of step {step + 1}", readout.reads(step, total)
                    values["valid"] = bilevel.gamma_step(moved(valid_batch, device), of_step, reads)
                step += 1
                for batch in group:
                    values["train"] = bilevel.weight_step(moved(batch, device), f"a training batch of step {step}")
                shown.update()
                shown.set_postfix(round=f"{round_}/{s.rounds}", **{name: f"{v:.3f}" for name, v in values.items()})
                if steps is not None and readout.is_settled(bilevel.gamma_bar, step, steps, total):
                    return step / steps
    if steps is None and readout.is_frozen(step - 1, total):
        raise UserError(f"head_warmup={s.head_warmup} must be below {step}, the steps of the search")
    return float(s.rounds)
