"""Is what `benchmarks.gpu` times computed correctly on this device? Losses and gradients beside independent ones.

Each check compares the loss, all gradients of A, all of B and those of the head: the error is the largest |a - b| / |b|
of these four. In bfloat16 all sides round, so the error against float32 may be at most twice that of PEFT's layer, or
for what PEFT has no counterpart of, twice that of the same step without it.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.common import ALPHA, Batch, Shape, fill, lora, peft_lora
from diffora.backbones.backbone import Backbone
from diffora.backbones.load import load_backbone
from diffora.backbones.request import ModelRequest
from diffora.core.attach import attach
from diffora.loop.compiled import compiled
from diffora.settings.read import model_of

EXACT = 1e-3
"""Largest difference in float32, where only the order of sums differs."""
SAME = 0.02
"""Largest difference between two ways to compute the same bfloat16 step; one rounding of a number is up to 0.004."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: the two sides, in words.
        error: relative difference; None if it could not be measured.
        most: the largest error allowed.
        note: why it could not be measured.
    """

    what: str
    error: float | None
    most: float
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.most  # NaN is wrong too

    def __str__(self) -> str:
        if self.error is None:
            return f"  not checked  {self.what}: {self.note}"
        return f"  {'WRONG' if self.wrong else 'ok':<12} {self.what}: {self.error:.2g}, at most {self.most:.2g}"


Gradients = Mapping[str, Tensor]
"""Vectors in float64 by what they are: loss, lora_a, lora_bt, head."""


def gradients(model: nn.Module, batch: Batch, bf16: bool) -> Gradients:
    """Loss and gradients of a step. Those of PEFT's layers get our names and our layout of B."""
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = model(**{key: value for key, value in batch.items() if key != "row"}).loss
    loss.backward()
    found: dict[str, list[tuple[str, Tensor]]] = {"loss": [("", loss.detach())]}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is None:
            continue
        name = name.removeprefix("base_model.model.").replace(".default.weight", "").replace("lora_A", "lora_a")
        if name.endswith("lora_B"):
            name, gradient = name.replace("lora_B", "lora_bt"), gradient.T
        kind = next((kind for kind in ("lora_a", "lora_bt") if name.endswith(kind)), "head")
        found.setdefault(kind, []).append((name, gradient))
    vectors = {
        kind: torch.cat([part.flatten().double().cpu() for _, part in sorted(parts, key=lambda pair: pair[0])])
        for kind, parts in found.items()
    }
    model.zero_grad()
    return vectors


def difference(a: Gradients, b: Gradients) -> float:
    """The largest |a - b| / |b|; infinite if the two do not have the same gradients."""
    if {kind: v.shape for kind, v in a.items()} != {kind: v.shape for kind, v in b.items()}:
        return float("inf")
    errors = [((a[kind] - b[kind]).norm() / b[kind].norm()).item() for kind in b]
    return float("nan") if any(error != error for error in errors) else max(errors)


def against_peft(shape: Shape) -> Iterator[Check]:
    """Both ways to compute a low-rank layer beside PEFT's in float32. What is timed on a GPU is the plain one."""
    model, batch = shape.build().float(), shape.batch()
    theirs = peft_lora(model, shape).model
    exact = gradients(theirs, batch, bf16=False)
    rounded = difference(gradients(theirs, batch, bf16=True), exact)
    for kernel in ("plain", "fused"):
        ours = lora(model, shape, kernel=kernel).model
        what = f"{shape.model}: {kernel} and PEFT's LoRA in float32"
        yield Check(what, difference(gradients(ours, batch, bf16=False), exact), EXACT)
        yield Check(f"{what}, ours in bfloat16", difference(gradients(ours, batch, bf16=True), exact), 2 * rounded)


def checkpointing(shape: Shape) -> Iterator[Check]:
    """Gradient checkpointing beside saved activations, with dropout: it has to repeat the same masks."""
    batch, found = shape.batch(), []
    for checkpointed in (False, True):
        model = shape.build()  # checkpointing is set on the backbone, which contenders share
        if checkpointed:
            Backbone.of(model, trains_head=shape.model != "llama_1b").checkpoint_activations()
        found.append(gradients(lora(model, shape, dropout=0.1).model, batch, bf16=True))
    yield Check(f"{shape.model}: with and without gradient checkpointing, dropout 0.1", difference(*found[::-1]), SAME)


def compilation(shape: Shape) -> Iterator[Check]:
    """`trainer.compile=true` beside the model as it is, at two lengths."""
    model = shape.build()
    plain, fused = lora(model, shape, kernel="plain").model, lora(model, shape).model
    exact = lora(model.float(), shape, kernel="plain").model
    for length in (shape.length, shape.length // 2):
        batch = replace(shape, length=length).batch()
        reference = gradients(exact, batch, bf16=False)
        rounded = difference(gradients(plain, batch, bf16=True), reference)
        what = f"{shape.model}: compiled, length {length}, bfloat16, and plain in float32"
        try:
            with compiled(fused, True):
                error = difference(gradients(fused, batch, bf16=True), reference)
        except Exception as failure:  # no compiler, or a version of Triton that does not fit: the rest can be measured
            yield Check(what, None, SAME, f"torch.compile failed: {first_line(failure)}")
            return
        yield Check(what, error, 2 * rounded + SAME / 2)


def four_bits(shape: Shape) -> Iterator[Check]:
    """LoRA on a 4-bit base beside LoRA on the weights that it stands for, in bfloat16."""
    what = f"{shape.model}: 4-bit base and its dequantised weights, both beside these in float32"
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Check(what, None, SAME, "bitsandbytes is not installed")
        return
    try:
        error, rounded = _errors_in_four_bits(shape)
    except Exception as failure:  # a version of bitsandbytes that does not fit: nothing that is timed needs it
        yield Check(what, None, SAME, f"bitsandbytes failed: {first_line(failure)}")
        return
    yield Check(what, error, 2 * rounded)


def _errors_in_four_bits(shape: Shape) -> tuple[float, float]:
    """Errors beside float32 of a step on (4-bit weights, the dequantised weights in bfloat16)."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    batch = shape.batch()
    causal = shape.model == "llama_1b"
    with tempfile.TemporaryDirectory() as folder:
        shape.build().save_pretrained(folder)
        yaml: Any = OmegaConf.merge(shape.yaml, {"path": folder, "config": None, "dtype": "bfloat16", "kernel": "auto"})
        kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
        request = ModelRequest("bench", kind, {} if causal else {"num_labels": 2}, not causal, True, None)

        def load(quantise: str | None) -> nn.Module:
            settings = OmegaConf.merge(yaml, {"quantise": quantise})
            torch.manual_seed(0)
            return load_backbone(model_of(settings), request).model.to(shape.device).train()

        quantised, whole = load("4bit"), load(None)
    linear = {name: module for name, module in quantised.named_modules() if isinstance(module, Linear4bit)}
    if not linear:
        return float("inf"), 0.0
    for name, module in linear.items():
        weight: Any = module.weight
        values = dequantize_4bit(weight.data, weight.quant_state)
        with torch.no_grad():
            whole.get_submodule(name).weight.copy_(values)  # type: ignore[operator, union-attr]
    found = []
    for model in (quantised, whole):
        grid = shape.grid(model)
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        attach(model, grid.names, everything, shape.rank, None, ALPHA, freeze=False)
        fill(model)
        found.append(gradients(model.to(shape.device), batch, bf16=True))
    exact = gradients(whole.float(), batch, bf16=False)
    error, rounded = (difference(one, exact) for one in found)
    return error, rounded


def first_line(failure: Exception) -> str:
    """The first line of a message, or the kind of an error without one."""
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]


Kind = Callable[[Shape], Iterator[Check]]
KINDS: tuple[Kind, ...] = (against_peft, four_bits, checkpointing, compilation)


def run(shapes: Sequence[Shape], kinds: Sequence[Kind] = KINDS) -> list[Check]:
    """The checks on all shapes. TF32 is off, as it is by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for kind in kinds:
        for shape in shapes:
            for check in kind(shape):
                print(check, flush=True)
                found.append(check)
    return found


def facts(found: Sequence[Check]) -> list[dict[str, Any]]:
    return [asdict(check) | {"wrong": check.wrong} for check in found]
