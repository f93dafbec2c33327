"""The selectors ``gradient``, ``activation``, ``plop`` and ``fisher``: what they sum over batches, and their scores.

A measure is used by a run's stage (`diffora.scoring.one_pass_stages`) and by the library
(`diffora.standalone.select`). The sums can be added over micro-batches, batches and processes. Only the score of
``gradient`` depends on the batches: it is the norm of a mean of batch means. The formulas are in
`diffora.scoring.criteria`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffora.core.grid import Grid, laid_out
from diffora.core.linear import features, weight_of
from diffora.core.split import tables_noted
from diffora.errors import UserError, first_of
from diffora.scoring.criteria import (
    counted_tokens,
    direction_norm,
    gradient_norm,
    mean_of_types,
    mean_square,
    norm_sums,
    reads_targets,
    square_sums,
    weight_times_activation,
)

FLOAT16_SCALE = 1024.0
"""What a loss is multiplied by before float16 gradients of it are measured, which would underflow otherwise."""


class Measure(ABC):
    """One criterion that needs data.

    Args:
        model: in evaluation mode when batches are measured.
        grid: the candidates.
        seed: for measures that draw random numbers.

    Attributes:
        by_row: whether each batch given to `of` must be a single row.
        differentiates: whether `of` needs a loss with a graph; otherwise it only needs the forward pass.
        scale: the loss is multiplied by it before it is differentiated, and gradients are divided by it. float16
            gradients would otherwise underflow.

    Raises:
        UserError: a candidate is quantised; or gradients are measured, and its weight is not a parameter.
    """

    by_row: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False

    def __init__(self, model: nn.Module, grid: Grid, seed: int = 0) -> None:
        self.model, self.grid, self.seed = model, grid, seed
        self.modules = [model.get_submodule(name) for name in grid.modules]
        for module in self.modules:
            weight_of(module)
        self.scale = 1.0

    @abstractmethod
    def of(self, batch: Any, loss: Callable[[Any], Tensor], share: float = 1.0) -> list[Tensor]:
        """What is summed over all batches and processes.

        Args:
            batch: a batch, or a micro-batch.
            loss: calls the model, and returns the mean loss of a batch.
            share: of a micro-batch in the loss of its batch.
        """

    @abstractmethod
    def scores(self, sums: list[Tensor]) -> Tensor:
        """Scores from the sums: L x N on the CPU, NaN where a layer has no such module."""

    def laid_out(self, values: list[Tensor]) -> Tensor:
        """One value for each candidate as L x N on the CPU."""
        return laid_out(torch.stack(values).cpu(), self.grid.names)


class _OfGradients(Measure):
    """Measures of the gradient of the loss by each candidate's weight."""

    differentiates = True

    def __init__(self, model: nn.Module, grid: Grid, seed: int = 0) -> None:
        super().__init__(model, grid, seed)
        if made := [n for n, m in zip(grid.modules, self.modules, strict=True) if "weight" not in m._parameters]:
            raise UserError(
                f"the weight of {first_of(made)} is computed from others in each pass, by "
                "pruning or a parametrisation, so the loss has no gradient by it: make it a parameter (prune.remove or "
                "parametrize.remove_parametrizations of torch.nn.utils), or leave it out of the candidates"
            )

    def gradients(self, batch: Any, loss: Callable[[Any], Tensor], share: float) -> list[Tensor]:
        """Gradients of ``share`` times the loss in float32 or float64; 0 where the loss does not use a weight."""
        weights: list[Any] = [module.weight for module in self.modules]
        before = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            value = loss(batch) * (share * self.scale)
            found = torch.autograd.grad(value, weights, allow_unused=True)
        finally:
            for weight, flag in zip(weights, before, strict=True):
                weight.requires_grad_(flag)
        pairs = zip(found, weights, strict=True)
        return [_at_least_float32(torch.zeros_like(w) if g is None else g) / self.scale for g, w in pairs]


class GradientNorm(_OfGradients):
    """``gradient``: norm of the mean gradient of the loss with respect to each weight."""

    def of(self, batch: Any, loss: Callable[[Any], Tensor], share: float = 1.0) -> list[Tensor]:
        found = self.gradients(batch, loss, share)
        return [*found, found[0].new_tensor(share)]

    def scores(self, sums: list[Tensor]) -> Tensor:
        # The shares of a batch add up to 1, so the last sum is the number of batches.
        return self.laid_out([gradient_norm(total / sums[-1]) for total in sums[:-1]])


class Fisher(_OfGradients):
    """``fisher``: mean square of the entries of the gradient, over rows (diagonal of the empirical Fisher matrix)."""

    by_row = True

    def of(self, batch: Any, loss: Callable[[Any], Tensor], share: float = 1.0) -> list[Tensor]:
        found = self.gradients(batch, loss, 1.0)
        return [*map(mean_square, found), found[0].new_tensor(1.0)]

    def scores(self, sums: list[Tensor]) -> Tensor:
        return self.laid_out([total / sums[-1] for total in sums[:-1]])


class _OfInputs(Measure):
    """Measures of what a candidate reads. `of` returns a sum over tokens of each one, then its number of tokens."""

    @abstractmethod
    def sums_of(self, module: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum, the number of tokens) of one input.

        Args:
            module: a candidate.
            x: its input (..., in).
            mask: one entry for each token of ``x``, 0 for one that does not count.
        """

    @torch.no_grad()
    def of(self, batch: Any, loss: Callable[[Any], Tensor], share: float = 1.0) -> list[Tensor]:
        names = dict(zip(self.modules, self.grid.modules, strict=True))
        targets = {module: reads_targets(name, self.model) for module, name in names.items()}
        fields, config = batch if hasattr(batch, "get") else {}, getattr(self.model, "config", None)
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            if projects_table:  # no tokens: DeBERTa calls query and key again, on its table of positions
                return
            x = args[0] if args else named["input"]
            with torch.autocast(x.device.type, enabled=False):
                new = self.sums_of(module, x, counted_tokens(x, fields, targets[module], config))
            found[module] = new if module not in found else (found[module][0] + new[0], found[module][1] + new[1])

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.modules]
        try:
            with _called_layers(), tables_noted(self.model) as projects_table:
                loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
        sums = [found[module] if module in found else self._nothing(module) for module in self.modules]
        return [each[part] for part in (0, 1) for each in sums]

    def _nothing(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The sums of a module that a batch does not reach, such as an expert without tokens."""
        x = torch.zeros(1, features(module)[0], device=weight_of(module).device)
        return self.sums_of(module, x, x.new_zeros(1))

    def means(self, sums: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(weight (out, in), mean over tokens) of each candidate.

        Raises:
            UserError: no batch reaches a candidate.
        """
        n = len(self.modules)
        for module, name, total, tokens in zip(self.modules, self.grid.modules, sums[:n], sums[n:], strict=True):
            if tokens == 0:
                raise UserError(f"the loss does not call {name} for any token: leave it out of the candidates")
            yield weight_of(module).detach(), total / tokens


class Activation(_OfInputs):
    """``activation``: mean of |weight| times the norm of its input (Wanda's criterion)."""

    def sums_of(self, module: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return square_sums(x, mask)

    def scores(self, sums: list[Tensor]) -> Tensor:
        return self.laid_out([weight_times_activation(weight, mean) for weight, mean in self.means(sums)])


class FeatureNorm(_OfInputs):
    """``plop``: minus the mean NFN of the module's type over its layers."""

    def sums_of(self, module: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return norm_sums(weight_of(module).detach(), x, mask)

    def scores(self, sums: list[Tensor]) -> Tensor:
        values = [mean / direction_norm(weight, self.seed) for weight, mean in self.means(sums)]
        return -mean_of_types(self.laid_out(values))


MEASURES: dict[str, type[Measure]] = {
    "gradient": GradientNorm,
    "activation": Activation,
    "plop": FeatureNorm,
    "fisher": Fisher,
}
"""By the name of the selector."""


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def _called_layers() -> Iterator[None]:
    """Inside this context, `nn.TransformerEncoder` calls its layers, and torch's fused kernel for it is not used."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
