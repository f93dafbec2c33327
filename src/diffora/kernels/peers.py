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
    second pass must go as the first one did, and nothing computed in one is handed out in another.

    An output is handed out only where its layer would compute the same: x and the layer's parameters are unchanged, and
    gradients, autocast, dropout and the like are as they were. In inference mode tensors do not tell whether they were
    changed, so that there each layer computes by itself. All calls come from one thread; replicas for other threads
    have no peers.
    """

    def __init__(self) -> None:
        self._runs: dict[Layer, list[Layer]] = {}
        self._settled: set[Layer] = set()
        self._start: Layer = None
        self._last: Callable[[], Tensor | None] = lambda: None
        self._mode: tuple[Any, ...] = ()
        self._ready: dict[Layer, tuple[Tensor, Tensor | None, tuple[int, int]]] = {}

    def __call__(self, layer: Layer, x: Tensor, compute: Compute) -> Tensor:
        """The output of ``layer`` for x; ``compute`` gives those of several layers."""
        if torch.is_inference_mode_enabled() or x.is_inference():
            return compute([layer], x)[0]
        device, hooks = x.device.type, saved_tensor_hooks()
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        checkpoint = None if hooks is None else weakref.ref(hooks[0])  # each has hooks of its own
        grad = torch.is_grad_enabled()
        mode = x._version, grad, autocast, checkpoint, layer.training, layer.dropout, layer.split
        same = self._last() is x and mode == self._mode
        if same and layer in self._ready:
            output, gate, versions = self._ready.pop(layer)
            if gate is layer.gate and versions == layer.versions():
                return output
        if self._ready:
            if hooks is None:
                self._settled.add(self._start)
                self._runs[self._start] = [peer for peer in self._runs[self._start] if peer not in self._ready]
            self._ready = {}
        if same and hooks is None and layer not in self._runs[self._start] and self._start not in self._settled:
            self._runs[self._start].append(layer)
            return compute([layer], x)[0]
        self._start, self._last, self._mode = layer, weakref.ref(x), mode
        run = self._runs.setdefault(layer, [layer])
        if len(run) == 1:
            return compute(run, x)[0]
        # The base layers of others are called, which hooks would notice.
        run = [peer for peer in run if peer is layer or peer.readable]
        outputs = compute(run, x)
        for peer, output in zip(run[1:], outputs[1:], strict=True):
            self._ready[peer] = output, peer.gate, peer.versions()
        return outputs[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Peers, ()  # a copy of the model sees for itself


def rehearse(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call a model once, so that its layers' peers are known from the first step on. Draws no random numbers."""
    if not any(getattr(module, "peers", None) for module in model.modules()):
        return
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for module, flag in training:
            module.training = flag


def _unknown_hooks(ignore_tracing: bool) -> tuple[Any, Any]:
    return _unknown_hooks, _unknown_hooks  # what holds inside a checkpoint holds everywhere


_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", _unknown_hooks)


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """What tensors saved for the backward pass go through, as inside a checkpoint, or None."""
    hooks: tuple[Any, Any] | None = _top_hooks(False)
    return hooks
