"""Scores of a search other than its gates, and when it stops early. Not in [D].

The search of a run (`diffora.scoring.bilevel`) and of the library (`diffora.standalone.search`) share this.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffora.core.dam import provisional_choice

READOUTS = ("gamma", "early_gradient")
CHECKS = 10
"""Checks in a round. They are spread evenly over its steps; a round of fewer steps has one after each step."""
EARLY = 3
"""``early_gradient`` reads the first 1/EARLY of the Γ steps."""


def steps_of(amount: float | None, total: int) -> int:
    """A number of steps from a number of steps (an int) or a share of ``total`` (a float below 1); 0 for None.

    A share above 0 is at least one step.
    """
    if not amount:
        return 0
    return max(1, round(amount * total)) if amount < 1 else int(amount)


def step_problem(readout: str, warmup: float | None, total: int) -> str | None:
    """Why a search of ``total`` steps cannot be read out in this way; None if it can."""
    frozen = steps_of(warmup, total)
    if frozen >= total and frozen:
        return f"head_warmup={warmup} must be below {total}, the steps of the search: Γ would never move"
    if readout == "early_gradient" and not frozen and total <= EARLY:
        return (
            f"readout=early_gradient needs more than {EARLY} steps, and the search has {total}: in the first one all B "
            "are 0, and so is the gradient of the gates"
        )
    return None


class Readout:
    """Counts the steps of a search and keeps what it reads besides Γ.

    Args:
        readout: a member of `READOUTS`, what modules are scored by.
        warmup: steps before the first Γ step, as `steps_of` reads them.
        patience: checks after which an unchanged selection ends the search; None for never.
        choose: from scores, L x N, to the boolean mask L x N of the modules that would be selected; needed for
            ``patience``.

    Attributes:
        summed: minus the sum of ∂L_valid/∂γ̄ so far, L x N; None before the first Γ step.
        unchanged: how many checks in a row have found the same selection as the check before them.
        stopped_at: the number of steps after which ``patience`` ended the search; None if it did not.
    """

    def __init__(
        self,
        readout: str,
        warmup: float | None,
        patience: int | None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if patience is not None and choose is None:
            raise ValueError("patience needs choose")
        self.readout, self.warmup, self.patience, self.choose = readout, warmup, patience, choose
        self.summed: Tensor | None = None
        self.unchanged = 0
        self.stopped_at: int | None = None
        self._mask: Tensor | None = None

    def is_frozen(self, step: int, total: int) -> bool:
        """Whether Γ stays as it is in a step (from 0) of ``total`` steps."""
        return step < steps_of(self.warmup, total)

    def last_read(self, total: int) -> int:
        """The number of steps after which ``early_gradient`` has all it reads: a third of the Γ steps, rounded up."""
        frozen = steps_of(self.warmup, total)
        return frozen + -(-(total - frozen) // EARLY)

    def reads(self, step: int, total: int) -> bool:
        """Whether the gradient with respect to the gates is wanted in a step (from 0)."""
        return self.readout == "early_gradient" and step < self.last_read(total)

    def read(self, gradient: Tensor) -> None:
        """Subtract ∂L_valid/∂γ̄ of one step. One with a value that is not finite counts as 0."""
        gradient = torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient)).detach()
        self.summed = -gradient if self.summed is None else self.summed.to(gradient.device) - gradient

    def scores(self, gates: Tensor) -> Tensor:
        """What the modules are scored by, L x N: the gates, or the early gradients."""
        if self.readout == "gamma":
            return gates
        return torch.zeros_like(gates) if self.summed is None else self.summed.to(gates.device)

    def is_settled(self, gates: Tensor, done: int, steps: int, total: int) -> bool:
        """Check the selection, if a check is due, and say whether the search may end.

        It may not end before Γ moves, nor, with ``early_gradient``, before all gradients are read.

        Args:
            gates: L x N, after ``done`` steps.
            done: steps so far, of all rounds.
            steps: of a round.
            total: steps of all rounds.
        """
        if self.patience is None or self.is_frozen(done - 1, total):
            return False
        at = (done - 1) % steps
        if (at + 1) * CHECKS // steps == at * CHECKS // steps:
            return False
        assert self.choose is not None
        with provisional_choice():
            mask = self.choose(self.scores(gates).detach().cpu())
        same = self._mask is not None and torch.equal(mask, self._mask)
        self.unchanged = self.unchanged + 1 if same else 0
        self._mask = mask
        if self.unchanged < self.patience or (self.readout == "early_gradient" and done < self.last_read(total)):
            return False
        self.stopped_at = done
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as plain containers."""
        return {
            "summed": None if self.summed is None else self.summed.cpu(),
            "unchanged": self.unchanged,
            "stopped_at": self.stopped_at,
            "mask": self._mask,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.summed, self.unchanged = state["summed"], state["unchanged"]
        self.stopped_at, self._mask = state["stopped_at"], state["mask"]
