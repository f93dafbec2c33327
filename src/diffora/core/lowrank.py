"""The low-rank linear layer, h = W x + b + s B (g * A x), the only code on the hot path of every method.

The gate g stands on the rank side. The values are those of eq. 10, ``gamma * B A x``, but what autograd has to keep
for the gate's gradient is r numbers a token, not d.

B is stored transposed, r x out and contiguous: with out x r and a small r the two products of the backward pass run
many times slower on CPUs than their mirror images on A. Exports transpose it back.

``W x + b`` is whatever the pretrained layer computes: it may keep its weight transposed, in half precision or
quantised. The update is computed in the precision of x, or of autocast, from A and B kept in float32.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffora.core.linear import FLOATS, features, is_conv1d, is_linear, is_plain, weight_of
from diffora.core.weights import AdaptedWeight
from diffora.errors import UserError
from diffora.kernels.fused import Member, lowrank_linear
from diffora.kernels.peers import Peers


def add_lowrank(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_bt: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Eq. 10: ``base + scaling * B (gate * A dropout(x))`` with ``base = W x + b``, in plain operations.

    `LowRankLinear` computes the same with less work (`diffora.kernels.fused`). Tests compare the two, and
    torch.compile takes this one.

    Args:
        base: (..., out), the frozen layer's output.
        x: (..., in).
        lora_a: A, (rank, in).
        lora_bt: B transposed, (rank, out).
        scaling: alpha / rank.
        gate: scalar (an entry of the relaxed DAM), (rank,) (SoRA), (rank, rank) (FLoRA's core), or None for 1.
        dropout: rate on the input of A; 0 outside training.

    Returns:
        (..., out), in the precision of ``base``.
    """
    x = F.dropout(x, dropout) if dropout else x
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast:  # which casts by itself, and a shared pair only once
        lora_a, lora_bt = lora_a.to(x.dtype), lora_bt.to(x.dtype)
    hidden = F.linear(x, lora_a)
    if gate is None:
        hidden = hidden * scaling
    elif gate.ndim == 2:
        hidden = F.linear(hidden, (gate * scaling).to(hidden.dtype))
    else:
        hidden = (hidden * (gate * scaling)).to(hidden.dtype)
    return base + (hidden @ lora_bt).to(base.dtype)


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    Args:
        base: the pretrained layer, of any kind that `is_linear` knows; it is called as it is and frozen here.
        lora_a: A, (rank, in). The same parameter may serve several layers (weight sharing, section 4.3).
        lora_bt: B transposed, (rank, out); likewise.
        alpha: the update is scaled by alpha / rank.
        dropout: rate on the input of A while training.

    Attributes:
        gate: an entry of the relaxed DAM, set from outside before each forward pass; or a trained parameter, (rank,)
            for SoRA's gates, (rank, rank) for FLoRA's core; or None.
        rows: the rows of A and of B^T that get a gradient in this step, or None for all ([R] Algorithm 1).
        split: how many leading examples (entries of dim 0 of x) train A and B^T; the later ones train the gate, which
            may be nothing but a scalar then. 0 trains the gate alone. None trains whatever requires a gradient.
        peers: finds the layers of the model that read the same input; None computes this layer by itself.
    """

    gate: Tensor | None
    rows: tuple[Tensor, Tensor] | None
    split: int | None
    peers: Peers | None

    # For transformers' `save_pretrained`: of a tensor that stands under several such names, one copy is saved. A and B
    # may be shared, and the base layer's weight may be an embedding too.
    _tied_weights_keys: ClassVar = {key: key for key in ("lora_a", "lora_bt", "base.weight", "base.bias")}

    def __init__(
        self, base: nn.Module, lora_a: nn.Parameter, lora_bt: nn.Parameter, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        rank = lora_a.shape[0]
        n_in, n_out = features(base)
        expected = (rank, n_in), (rank, n_out)
        if (tuple(lora_a.shape), tuple(lora_bt.shape)) != expected:
            raise ValueError(f"A and B^T are {tuple(lora_a.shape)}, {tuple(lora_bt.shape)}; {base} needs {expected}")
        self.base = base.requires_grad_(False)
        self.lora_a = lora_a
        self.lora_bt = lora_bt
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = dropout
        self.gate = None
        self.rows = None
        self.split = None
        self.peers = None
        self.merged = False
        self.training = base.training  # a model for inference stays one: no dropout
        self._transposed = is_conv1d(base)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        if torch.compiler.is_compiling():  # which fuses by itself
            return self._plain(x)
        if not self.readable:
            return self._together([self], x, self.base(x))[0]
        if self.peers is None:
            return self._together([self], x)[0]
        return self.peers(self, x, self._together)

    def _plain(self, x: Tensor) -> Tensor:
        assert self.rows is None and self.split is None, "masks and the simultaneous search do not compile"
        dropout = self.dropout if self.training else 0.0
        return add_lowrank(self.base(x), x, self.lora_a, self.lora_bt, self.scaling, self.gate, dropout)

    def _together(self, layers: Sequence["LowRankLinear"], x: Tensor, base: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same x. This one says for all how it goes.

        Args:
            base: the output of its base layer, where that is not readable.
        """
        members = [layer._member(base) for layer in layers]
        return lowrank_linear(x, members, self.dropout if self.training else 0.0, self.split)

    def _member(self, output: Tensor | None) -> Member:
        lora_a, lora_bt = self._pair()
        gate: Tensor | None = self.gate
        if gate is not None:
            assert self.rows is None, "masks do not go with a gate, whose gradient would need the masked entries"
            if gate.ndim:  # a vector or a matrix is folded into B
                lora_bt = gate.T @ lora_bt if gate.ndim == 2 else gate.reshape(-1, 1) * lora_bt
                gate = None
        if output is not None:
            return Member(None, None, output, lora_a, lora_bt, gate, self.scaling, self.rows)
        base: Any = self._modules["base"]
        frozen = base._parameters
        weight: Any = frozen["weight"]
        weight = weight.t() if self._transposed else weight
        return Member(weight, frozen["bias"], None, lora_a, lora_bt, gate, self.scaling, self.rows)

    def _pair(self) -> tuple[Any, Any]:
        own = self._parameters  # reading a module's attributes takes as long as a small product
        lora_a, lora_bt = own.get("lora_a"), own.get("lora_bt")
        if lora_a is None or lora_bt is None:  # a replica, shard or parametrisation keeps them otherwise
            return self.lora_a, self.lora_bt
        return lora_a, lora_bt

    def versions(self) -> tuple[int, int]:
        """Numbers that change when A or B is changed in place."""
        lora_a, lora_bt = self._pair()
        return lora_a._version, lora_bt._version

    @property
    def readable(self) -> bool:
        """Whether calling the base layer is nothing but a product with its frozen weight."""
        base: Any = self._modules["base"]
        own = base._parameters
        weight, bias = own.get("weight"), own.get("bias")
        return (
            (type(base) is nn.Linear or self._transposed)
            and is_plain(weight)
            and weight.dtype in FLOATS
            and not weight.requires_grad
            and "bias" in own
            and (bias is None or not bias.requires_grad)
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
        )

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.peers = None  # replicas run in threads beside each other
        return replica

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise UserError(
                "a merged low-rank layer cannot be saved: its update would be added once more after loading; call "
                "unmerge() first"
            )
        super()._save_to_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """W + Delta W as the base layer keeps its weight, for code that reads it instead of calling the layer.

        Values are computed when an operation needs them (`AdaptedWeight`), and gradients reach A and B. Dropout on the
        input of A has no place there. A quantised weight is returned as it is, without Delta W: nothing can be added.
        """
        weight: Any = self.base.weight
        if self.merged or not (is_plain(weight) and weight.dtype in FLOATS):
            found: Tensor = weight
            return found
        return self._whole_weight() if torch.compiler.is_compiling() else AdaptedWeight(weight, self._whole_weight)

    def _whole_weight(self) -> Tensor:
        if self.rows is not None or self.split is not None:
            raise UserError(
                "this model reads the weight of an adapted linear layer and does not call the layer, so that masks and "
                "search.update=simultaneous cannot be applied to it"
            )
        weight: Any = self.base.weight
        delta = self.delta()
        whole: Tensor = weight + (delta.T if self._transposed else delta).to(weight.dtype)
        return whole

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias

    def plain_pair(self) -> tuple[Tensor, Tensor]:
        """(A, B^T) of the same update without a gate, which is folded into B. Delta W = s B A.

        Directions whose trained gate is zero are left out, so that the rank may be smaller, down to 0.
        """
        if self.gate is None:
            return self.lora_a, self.lora_bt
        if isinstance(self.gate, nn.Parameter) and self.gate.ndim == 1:
            open_ = self.gate != 0
            return self.lora_a[open_], self.gate[open_].reshape(-1, 1) * self.lora_bt[open_]
        folded = self.gate.T @ self.lora_bt if self.gate.ndim == 2 else self.gate.reshape(-1, 1) * self.lora_bt
        return self.lora_a, folded

    def delta(self) -> Tensor:
        """Delta W = s B diag(gate) A, or s B gate A, (out, in), in the parameters' dtype."""
        lora_a, lora_bt = self.plain_pair()
        return lora_bt.T @ (lora_a * self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold Delta W into the base weight; a second call changes nothing.

        The base layer gets a new weight: the old one may belong to another module as well, as tied embeddings do.

        Raises:
            UserError: the base weight is quantised, or computed from others (pruned, parametrised).
        """
        if not self.merged:
            self._add_to_base(self.delta())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take Delta W out again. The weight returns to rounding; A and B must not have changed since `merge`."""
        if self.merged:
            self._add_to_base(-self.delta())
            self.merged = False

    def _add_to_base(self, delta: Tensor) -> None:
        weight = weight_of(self.base)
        if "weight" not in self.base._parameters:
            raise UserError("the weight of this linear layer is computed from others and cannot be changed")
        new = (weight + delta).to(weight.dtype)
        self.base.weight = nn.Parameter(new.T.contiguous() if self._transposed else new, requires_grad=False)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def new_pair(base: nn.Module, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh (A, B^T): A Kaiming-uniform as in LoRA, B zero, so that the update starts at zero."""
    n_in, n_out = features(base)
    device: Any = base.weight.device
    lora_a = nn.Parameter(torch.empty(rank, n_in, device=device))
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a, nn.Parameter(torch.zeros(rank, n_out, device=device))


def attach(
    model: nn.Module,
    names: Iterable[Iterable[str]],
    selected: Tensor,
    rank: int,
    shared_rank: int | None,
    alpha: float,
    dropout: float = 0.0,
    *,
    freeze: bool = True,
) -> list[list[LowRankLinear | None]]:
    """Put low-rank layers in the grid's places (Algorithm 1, line 11), in place, and freeze the rest of the model.

    Selected modules get a pair of their own of the given rank. Unselected modules of one type (column) and shape
    share one pair of ``shared_rank`` across layers, or stay as they are where it is None. A module that stands in
    several places of the model is replaced in all of them.

    Args:
        freeze: freeze every parameter but those of low-rank layers. The head too: to train it, call
            ``model.classifier.requires_grad_(True)`` afterwards. False leaves all ``requires_grad`` but those of the
            adapted modules as they are.

    Returns:
        L x N, the new layers, None where a module was left alone.

    Raises:
        UserError: names that are not linear modules of the model, or are adapted already; ``selected`` is not boolean;
            numbers that no update can have. Nothing is changed then.
    """
    rows = [list(row) for row in names]
    if problems := list(_setting_problems(selected, rank, shared_rank, alpha, dropout)):
        raise UserError(problems)
    if selected.shape != (shape := (len(rows), len(rows[0]) if rows else 0)) or any(len(r) != shape[1] for r in rows):
        raise UserError(f"selected is {tuple(selected.shape)}; the names of the modules are {[len(r) for r in rows]}")
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model)
    _check_places([name for row in rows for name in row], modules)
    if freeze:
        freeze_rest(model)
    shared: dict[tuple[int, int, int], tuple[nn.Parameter, nn.Parameter]] = {}
    peers = Peers()
    result: list[list[LowRankLinear | None]] = []
    for row, flags in zip(rows, selected.tolist(), strict=True):
        layers: list[LowRankLinear | None] = []
        for column, (name, flag) in enumerate(zip(row, flags, strict=True)):
            base = modules[name]
            if flag:
                pair = new_pair(base, rank)
            elif shared_rank is not None:
                key = (column, *features(base))
                if key not in shared:
                    shared[key] = new_pair(base, shared_rank)
                pair = shared[key]
            else:
                layers.append(None)
                continue
            layer = LowRankLinear(base, *pair, alpha=alpha, dropout=dropout)
            layer.peers = peers
            for place in places[id(base)]:
                model.set_submodule(place, layer)
            layers.append(layer)
        result.append(layers)
    return result


def _setting_problems(selected: Any, rank: Any, shared_rank: Any, alpha: Any, dropout: Any) -> Iterator[str]:
    """What is wrong with the arguments of `attach` besides the names."""
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool:
        kind = selected.dtype if isinstance(selected, Tensor) else type(selected).__name__
        yield f"selected must be a boolean tensor, as diffora.core.dam.discretise makes of weights; it is {kind}"
    for name, value in (("rank", rank), ("shared_rank", shared_rank)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (name == "shared_rank" and value is None):
            more = ", or None to share nothing" if name == "shared_rank" else ""
            yield f"{name}={value!r} must be a whole number of at least 1{more}"
    if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        yield f"alpha={alpha!r} must be a finite number above 0"
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        yield f"dropout={dropout!r} must be a rate in [0, 1)"


def inside_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is, or stands inside, a low-rank layer of this project or an adapter layer of PEFT."""
    parts = name.split(".")
    above = (modules.get(".".join(parts[:count])) for count in range(1, len(parts) + 1))
    return any(isinstance(module, LowRankLinear) or hasattr(module, "adapter_layer_names") for module in above)


def _check_places(names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse names that no low-rank layer can take the place of."""
    problems: list[str] = []
    seen: dict[int, str] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            problems.append(f"{name} is not a module of this model")
        elif inside_adapter(name, modules):
            problems.append(
                f"{name} has a low-rank layer already: detach(model) takes it out, or unload() where it is PEFT's"
            )
        elif not is_linear(module):
            problems.append(f"{name} is a {type(module).__name__}, not a linear layer that is called")
        elif id(module) in seen:
            problems.append(f"{name} is the same module as {seen[id(module)]}: name it once, both are adapted together")
        else:
            seen[id(module)] = name
    if problems:
        raise UserError(problems)


def freeze_rest(model: nn.Module) -> None:
    """Freeze every parameter of a model but those of low-rank layers themselves (A, B, gates), in place."""
    adapters = {p for _, layer in lowrank_layers(model) for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Every full name of each module of a model, by the module's id. A module may stand in several places."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def set_gates(layers: Sequence[Sequence[LowRankLinear]], gates: Tensor | None) -> None:
    """Set the gate of each layer of an L x N grid to its entry of ``gates``, (L, N), or take the gates off."""
    rows = [[None] * len(row) for row in layers] if gates is None else [row.unbind() for row in gates]
    for row, values in zip(layers, rows, strict=True):
        for layer, gate in zip(row, values, strict=True):
            layer.gate = gate


def set_split(layers: Iterable[Iterable[LowRankLinear]], split: int | None) -> None:
    """Say of each layer of an L x N grid how many leading examples train A and B (`LowRankLinear.split`)."""
    for row in layers:
        for layer in row:
            layer.split = split


def detach(model: nn.Module) -> None:
    """Take every low-rank layer out again and leave the (unmerged) base layers in their places, in place.

    ``requires_grad`` stays as it is: what `attach` froze remains frozen.
    """
    for name, layer in [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)]:
        layer.unmerge()
        model.set_submodule(name, layer.base)


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """(full name, layer) for each low-rank layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module
