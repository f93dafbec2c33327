"""Finds out which low-rank layers read the same input, so that they are computed together."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Layer = Any  # a LowRankLinear
Compute = Callable[[Sequence[Layer], Tensor], tuple[Tensor, ...]]


class Peers:
    """Sees the calls of a model's low-rank layers and foresees them.

    Layers called one after the other with the very same tensor, as query, key and value are, form a run. A run seen
    once is computed as a whole when its first layer is called the next time, and the others are handed what is ready.
    Whatever is called otherwise than foreseen is computed by itself, so that a wrong guess costs time, never the
    result, and the run is cut down to what was asked for, for good: DeBERTa's query and key read the table of positions
    as well, which the value does not, so that there the value remains alone.

    What is foreseen depends on the calls before, and so do roundings and masks. A run that has to be repeatable to
    the bit calls the model once before the first step (`rehearse`). Inside a checkpoint nothing is learned, since its
    second pass must go as the first one did.
    """

    def __init__(self) -> None:
        self._runs: dict[Layer, list[Layer]] = {}
        self._settled: set[Layer] = set()
        self._start: Layer = None
        self._last: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._x: Tensor | None = None
        self._ready: dict[Layer, Tensor] = {}

    def __call__(self, layer: Layer, x: Tensor, compute: Compute) -> Tensor:
        """The output of ``layer`` for x; ``compute`` gives those of several layers."""
        version = 0 if x.is_inference() else x._version
        same = self._last() is x and version == self._version
        if same and layer in self._ready:
            output = self._ready.pop(layer)
            if not self._ready:
                self._x = None
            return output
        learning = no_saved_tensor_hooks()
        if self._ready:
            if learning:
                self._settled.add(self._start)
                self._runs[self._start] = [peer for peer in self._runs[self._start] if peer not in self._ready]
            self._x, self._ready = None, {}
        if same and learning and layer not in self._runs[self._start] and self._start not in self._settled:
            self._runs[self._start].append(layer)
            return compute([layer], x)[0]
        self._start, self._last, self._version = layer, weakref.ref(x), version
        run = self._runs.setdefault(layer, [layer])
        outputs = compute(run, x)
        if len(run) > 1:
            self._x, self._ready = x, dict(zip(run[1:], outputs[1:], strict=True))
        return outputs[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Peers, ()  # a copy of the model sees for itself


def rehearse(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call a model once, so that its layers' peers are known from the first step on. Draws no random numbers."""
    if not any(getattr(module, "peers", None) for module in model.modules()):
        return
    training = model.training
    model.eval()
    with torch.no_grad():
        model(*args, **kwargs)
    model.train(training)


def no_saved_tensor_hooks() -> bool:
    """Whether tensors are saved for the backward pass as they are: not inside a checkpoint."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: ...)
    return top(False) is None
