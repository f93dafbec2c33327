"""The frozen layers at the bottom of a stack: what they give, and how to give it back instead of computing it.

Where no parameter below layer l is trained, the output of layer l - 1 depends on the input only. It can be computed
once and kept. Later, the first l layers return the kept states. Everything around them still runs: the model computes
its attention masks, position biases and rotary tables by itself, so no family of models needs code of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffora.errors import UserError


def stack_members(model: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """All layers of the stack that some layers belong to, in their order.

    Args:
        model: the model.
        layers: full names of layers, as in `diffora.core.grid.Grid.layers`.

    Raises:
        UserError: the layers are not members of one list of layers that run one after the other.
    """
    lists = {name.rpartition(".")[0] for name in layers}
    stack = model.get_submodule(next(iter(lists))) if len(lists) == 1 and "" not in layers else None
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not isinstance(stack, nn.ModuleList | nn.Sequential):
        raise UserError(
            f"the layers of {type(model).__name__} are not one list of layers, each after the one before it: "
            + ", ".join(sorted(lists)[:3] or ["the model itself"])
        )
    return list(stack)


def lowest_trained(members: Sequence[nn.Module]) -> int:
    """The index of the lowest layer with a trainable parameter; the number of layers if there is none."""
    trained = (i for i, layer in enumerate(members) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(members))


class _Reached(Exception):
    """Ends a forward pass behind the prefix."""


class Prefix:
    """The first layers of a stack, which can return given states instead of computing them.

    Args:
        layers: the first l layers, l at least 1.

    Attributes:
        states: what all of them return at present, (sequences, tokens, width); None: they compute.
    """

    states: Tensor | None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.states = None
        # How many things each layer returns beside the states; None where it returns no tuple.
        self._more: list[int | None] = [None] * len(self.layers)

    def output(self, forward: Callable[[], object]) -> Tensor:
        """What the last of the layers returns in a forward pass, which ends there.

        Args:
            forward: runs the model.

        Raises:
            UserError: the layers do not run once each, in their order, or return something else than states.
        """
        returned: list[tuple[int, Any]] = []

        def note(number: int, module: nn.Module, args: Any, output: Any) -> None:
            returned.append((number, output))
            if number == len(self.layers) - 1:
                raise _Reached

        hooks = [layer.register_forward_hook(partial(note, i)) for i, layer in enumerate(self.layers)]
        try:
            forward()
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if [number for number, _ in returned] != list(range(len(self.layers))):
            raise UserError("its layers do not run once each, in their order")
        self._more = [None if isinstance(output, Tensor) else len(output) - 1 for _, output in returned]
        states = returned[-1][1]
        states = states if isinstance(states, Tensor) else states[0]
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise UserError("its layers return no hidden states of sequences x tokens x width")
        return states

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the layers return `states` where these are set. Call `output` before. Names do not change.

        What a layer returns beside states, such as the attention that it computed, is None then.
        """
        own = [vars(layer).get("forward") for layer in self.layers]
        for layer, more in zip(self.layers, self._more, strict=True):
            layer.forward = partial(self._forward, layer.forward, more)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward  # the class has the original
                else:
                    layer.forward = forward

    def _forward(self, compute: Callable[..., Any], more: int | None, *args: Any, **kwargs: Any) -> Any:
        if self.states is None:
            return compute(*args, **kwargs)
        return self.states if more is None else (self.states, *(None,) * more)

    @contextmanager
    def returning(self, states: Tensor) -> Iterator[None]:
        """Inside, the installed layers return these states."""
        self.states = states
        try:
            yield
        finally:
            self.states = None


def put_into(mask: Tensor, tokens: Tensor) -> Tensor:
    """The states of real tokens in their places, 0 at padding.

    Args:
        mask: boolean (sequences, tokens), which tokens are real.
        tokens: (real tokens, width), in the order of the mask.

    Returns:
        (sequences, tokens, width).

    >>> import torch
    >>> put_into(torch.tensor([[True, False], [True, True]]), torch.tensor([[1.0], [2.0], [3.0]])).squeeze(-1)
    tensor([[1., 0.],
            [2., 3.]])
    """
    if mask.all():
        return tokens.view(*mask.shape, -1)
    states = tokens.new_zeros(mask.numel(), tokens.shape[-1])
    states.index_copy_(0, mask.flatten().nonzero().squeeze(-1), tokens)
    return states.view(*mask.shape, -1)
