"""``trainer.compile=true``: the model's forward pass through `torch.compile`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._functorch.config as functorch
from torch import nn

from diffora.errors import UserError, first_line


@contextmanager
def compiled(model: nn.Module, on: bool, keep_graph: bool = False) -> Iterator[None]:
    """Inside, the model's forward pass is compiled, for batches of any size. Afterwards the model is as before.

    Names of parameters, and so checkpoints and exports, do not change. Low-rank layers and dropout then compute their
    plain formulas (`LowRankLinear.kernel`), which the compiler fuses by itself.

    Args:
        model: the model.
        on: False: nothing happens.
        keep_graph: allow two backward passes through one forward pass, for a little more memory.

    Raises:
        UserError: `torch.compile` fails on this model.
    """
    if not on:
        yield
        return
    torch.compiler.reset()  # what earlier stages or runs have compiled counts towards the limit of compilations
    model.forward = torch.compile(model.forward, dynamic=True)  # of the whole width: not again for every length
    try:
        # Donated buffers are memory of the forward pass that the first backward pass writes over.
        with functorch.patch(donated_buffer=functorch.donated_buffer and not keep_graph):
            yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(
                f"trainer.compile=true: torch.compile fails on {type(model).__name__}: {first_line(error)}. Leave it "
                "out, or see TORCH_LOGS=recompiles"
            ) from error
        raise
    finally:
        del model.forward  # the class has the original
