"""What a training step costs, in floating-point operations, and which layers may have adapters within a budget.

The forward pass needs every layer. The backward pass needs the layers down to the lowest adapter and no further,
because nothing below it is trained. So the lowest layer with an adapter decides what a step costs, and the rank hardly
matters.

A share is always the cost of a step beside that of a step with LoRA on every candidate module.
"""

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of products and convolutions, by torch's own formulas.

    torch's `FlopCounterMode` uses the same formulas. It is not used because it also counts by module, and takes several
    times as long on tensors without content.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of a step: of matrix products and convolutions, forward and backward.

    Attention is counted as its plain products, because torch has no formula for the fused kernels of CPUs. Operations
    on single elements (activations, norms, dropout, optimiser) are not counted.

    Args:
        step: computes something; on fake or meta tensors, nothing is really computed.

    A linear layer of 8 to 4 features on 2 rows: 2 x 8 x 4 products, each with an addition.

    >>> import torch
    >>> operations(lambda: torch.zeros(2, 8) @ torch.zeros(8, 4))
    128
    """
    with _Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    total: int = counter.total
    return total


def lowest_layer(share: Callable[[int], float], n_layers: int, budget: float) -> int:
    """The lowest layer from which on all layers may have adapters.

    Args:
        share: the share of a step with LoRA on every candidate module of a layer and of all layers above it. It must
            not grow with the layer. It is called for about log2(L) layers, because a call may take seconds.
        n_layers: L.
        budget: the largest share that is allowed.

    Returns:
        The number of the layer, from 0.

    Raises:
        ValueError: adapters on the top layer alone cost more; the message has their share.

    >>> [lowest_layer([1.0, 0.8, 0.6].__getitem__, 3, budget) for budget in (0.6, 0.7, 0.8, 1)]
    [2, 2, 1, 0]
    """
    if budget >= 1:
        return 0
    low, high = 0, n_layers - 1  # layer 0 has the share 1, which is too much
    if (least := share(high)) > budget:
        raise ValueError(f"LoRA on the top layer alone has the share {least:.3f}")
    while high - low > 1:
        middle = (low + high) // 2
        if share(middle) <= budget:
            high = middle
        else:
            low = middle
    return high
