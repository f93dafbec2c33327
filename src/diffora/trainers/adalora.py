"""AdaLoRA of PEFT in somebody else's trainer: PEFT's calls at the right moment, and a state that can be saved."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffora.errors import UserError
from diffora.methods.adalora import AVERAGES, AdaLoRAAdaptation

log = logging.getLogger(__name__)


def tuner_in(model: nn.Module) -> Any:
    """PEFT's `AdaLoraModel` in a model; None if it has none."""
    return next((module for module in model.modules() if hasattr(module, "rankallocator")), None)


class TrainedAdaLoRA(AdaLoRAAdaptation):
    """An AdaLoRA of the user, whose `AdaLoraConfig` says everything but the number of steps.

    PEFT adds the penalty to every loss of the model, in evaluation too, and not to a loss that is computed from the
    logits. So it is taken out of the model's loss here, and `penalty` returns it for the gradient.

    Args:
        tuner: PEFT's `AdaLoraModel`.
    """

    def __init__(self, tuner: Any) -> None:
        super().__init__(tuner.model, tuner, tuner.trainable_adapter_name)
        self._ranks: dict[str, list[bool]] | None = None

    def begin(self, total_steps: int) -> None:
        """Set the number of optimiser steps in PEFT's configuration.

        Raises:
            UserError: there are too few steps for ``tinit`` and ``tfinal``.
        """
        config = self.config
        if config.tinit + config.tfinal >= total_steps:
            raise UserError(
                f"AdaLoraConfig has tinit={config.tinit} and tfinal={config.tfinal}, which leave none of the "
                f"{total_steps} steps of this training to reduce ranks in"
            )
        if config.target_r >= config.init_r:
            raise UserError(
                f"AdaLoraConfig has target_r={config.target_r}, which must be below init_r={config.init_r}: ranks are "
                "reduced from the one to the other"
            )
        if config.total_step != total_steps:
            log.warning(
                f"AdaLoraConfig has total_step={config.total_step}; this training has {total_steps}, so it is set"
            )
            config.total_step = total_steps
        self.tuner.forward = self.tuner.model.forward
        self._place()

    def after_step(self, step: int, lr: float) -> None:
        """Update the importances and reduce the ranks.

        The configuration has the ranks only during the call. Otherwise PEFT would cut A, B and E to these ranks when it
        saves a checkpoint, and training could not go on from there.
        """
        self.config.rank_pattern = self._ranks
        super().after_step(step, lr)
        self._ranks, self.config.rank_pattern = self.config.rank_pattern, None

    def state(self) -> dict[str, Any]:
        """The ranks, for JSON. The averages are in the state of the optimiser (`keep_averages`)."""
        return {"rank_pattern": self._ranks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._ranks = state["rank_pattern"]

    def keep_averages(self, optimizer: Any) -> None:
        """Put the averages of importance into the state of the optimiser, which every trainer saves.

        They have the shapes of the parameters, and optimisers keep further entries.
        """
        parameters = dict(self.model.named_parameters())
        for key in AVERAGES:
            values = getattr(self.allocator, key)
            for name, parameter in parameters.items():
                if name in values:
                    optimizer.state[parameter][f"adalora_{key}"] = values[name]
                elif parameter in optimizer.state:  # the final reduction has reset them
                    optimizer.state[parameter].pop(f"adalora_{key}", None)

    def recall_averages(self, optimizer: Any) -> None:
        """Take the averages from the state of the optimiser."""
        for key in AVERAGES:
            found = {
                name: optimizer.state[parameter][f"adalora_{key}"]
                for name, parameter in self.model.named_parameters()
                if parameter in optimizer.state and f"adalora_{key}" in optimizer.state[parameter]
            }
            setattr(self.allocator, key, found)
