"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512), as in PEFT: training divides the rank among the modules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from diffora.adapters.export import export_adapter
from diffora.adapters.origin import Origin
from diffora.core.grid import Grid
from diffora.core.orthogonality import orthogonality
from diffora.core.selection import Selection
from diffora.methods.base import Adaptation, Alpha, Method, Rank, Rate, check_ranks
from diffora.methods.peft import ADAPTER, Pair, inject
from diffora.settings.checks import FRACTION, NOT_NEGATIVE, RANK, Help, number, whole

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
SHARE_OF_STEPS = number(lambda v: 0 <= v < 1, "a number in [0, 1): it is a share of all steps")


@dataclass(frozen=True)
class AdaLoRA(Method):
    """dW = alpha / init_rank B diag(E) A. The least important entries of E are set to 0 until the modules have, on
    average, rank ``rank``."""

    name: ClassVar[str] = "adalora"
    rank: Rank
    dropout: Rate
    alpha: Alpha
    init_rank: Annotated[int, RANK, Help("Rank of every module at the start.", "directions")]
    initial: Annotated[float, SHARE_OF_STEPS, Help("Share of all optimiser steps before ranks are reduced.")]
    final: Annotated[float, SHARE_OF_STEPS, Help("Share of all optimiser steps after ranks are reduced.")]
    every: Annotated[int, whole(1), Help("Steps between two reductions.", "steps")]
    beta1: Annotated[float, FRACTION, Help("Decay of the average of importance.")]
    beta2: Annotated[float, FRACTION, Help("Decay of the average of the importance's uncertainty.")]
    orthogonality: Annotated[float, NOT_NEGATIVE, Help("Weight of the penalty that keeps A and B orthonormal.")]

    def problems(self) -> Iterator[str]:
        if self.init_rank <= self.rank:
            yield f"method.init_rank={self.init_rank} must be above rank={self.rank}, to which it is reduced"
        if self.initial + self.final >= 1:
            yield f"method.initial={self.initial} and method.final={self.final} leave no steps to reduce ranks in"

    def check(self, model: nn.Module, grid: Grid) -> None:
        check_ranks(grid, {"method.init_rank": self.init_rank})

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> "AdaLoRAAdaptation":
        from peft import AdaLoraConfig

        config = AdaLoraConfig(
            target_modules=grid.modules,
            init_r=self.init_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            deltaT=self.every,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orthogonality,
            total_step=1,  # not known yet, see `begin`
        )
        return AdaLoRAAdaptation(model, inject(model, config).base_model, initial=self.initial, final=self.final)


class AdaLoRAAdaptation(Adaptation):
    """PEFT's layers and its rank allocator, called from our training loop.

    Args:
        tuner: PEFT's `AdaLoraModel` around ``model``.
        adapter: PEFT's name of the adapter.
        initial, final: shares of all steps before and after ranks are reduced.
    """

    def __init__(
        self, model: nn.Module, tuner: Any, adapter: str = ADAPTER, initial: float = 0.0, final: float = 0.0
    ) -> None:
        super().__init__(model)
        self.tuner, self.adapter, self.initial, self.final = tuner, adapter, initial, final
        self.config, self.allocator = tuner.peft_config[adapter], tuner.rankallocator
        self.layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_E")]
        for _, layer in self.layers:
            layer.ranknum.requires_grad_(False)  # PEFT omits this if it moves ranknum to the weights' device

    def begin(self, total_steps: int) -> None:
        """Convert the shares of all steps into numbers of steps. At least one step is left to reduce ranks."""
        final = min(int(self.final * total_steps), total_steps - 1)
        self.config.total_step, self.config.tfinal = total_steps, final
        self.config.tinit = min(int(self.initial * total_steps), total_steps - final - 1)
        self._place()

    def penalty(self) -> Tensor | None:
        """The weighted mean of ||A A^T - I||_F and ||B^T B - I||_F over every A and B, as in PEFT; None at weight 0."""
        weight: float = self.config.orth_reg_weight
        if weight == 0:
            return None
        matrices = [m for _, layer in self.layers for m in (layer.lora_A[self.adapter], layer.lora_B[self.adapter].T)]
        return weight * orthogonality(matrices, "mean_norm")

    def after_step(self, step: int, lr: float) -> None:
        """Update the importances and reduce the ranks.

        PEFT gets the number of steps taken, ``step + 1``. The last ``step`` is one below the total, so with ``step``
        itself the final reduction, at ``total - final``, might never happen.
        """
        for name, parameter in self.model.named_parameters():
            if "lora_" in name and parameter.grad is not None:
                # In float16 a step with overflowing gradients is skipped. Its NaN must not stay in the averages.
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        if step == 0 and self.config.total_step - self.config.tfinal == 1:
            self.allocator.update_ipt(self.model)  # the final reduction needs importances, which PEFT expects to exist
        self.tuner.update_and_allocate(step + 1)

    def state(self) -> dict[str, Any]:
        averages = {key: {n: t.detach().cpu() for n, t in getattr(self.allocator, key).items()} for key in AVERAGES}
        return {**averages, "rank_pattern": self.config.rank_pattern}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for key in AVERAGES:
            setattr(self.allocator, key, dict(state[key]))
        self.config.rank_pattern = state["rank_pattern"]
        self._place()

    def _place(self) -> None:
        """Move the averages to the devices of their parameters. From a checkpoint they come on the CPU."""
        parameters = dict(self.model.named_parameters())
        for key in AVERAGES:
            moved = {name: t.to(parameters[name].device) for name, t in getattr(self.allocator, key).items()}
            setattr(self.allocator, key, moved)

    def pairs(self) -> Iterator[Pair]:
        """Yields the updates with E multiplied into A. Directions with E = 0 are left out, so a rank may be 0."""
        for name, layer in self.layers:
            lora_e = layer.lora_E[self.adapter]
            kept = lora_e.detach()[:, 0] != 0
            # As PEFT's layer computes it.
            scaling = layer.scaling[self.adapter] / (layer.ranknum[self.adapter].item() + 1e-5)
            yield name, (layer.lora_A[self.adapter] * lora_e)[kept], layer.lora_B[self.adapter].T[kept], scaling

    def inference_parameters(self) -> int:
        """The parameters of the remaining ranks, with E multiplied into A."""
        return sum(
            int(layer.lora_E[self.adapter].count_nonzero()) * (layer.in_features + layer.out_features)
            for _, layer in self.layers
        )

    def export(self, folder: Path, origin: Origin) -> None:
        """Export plain LoRA, with the ranks that the present weights have.

        PEFT's own format would use the ranks of the final reduction. The weights of the best epoch may be older.
        """
        export_adapter(folder / "adapter", origin, self.pairs())
