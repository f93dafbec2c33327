"""B15: code that reads the weight of an adapted layer, instead of calling the layer, also gets the update."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from diffora.core.attach import attach
from diffora.core.bottleneck import BottleneckLinear
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.weights import AdaptedWeight
from diffora.errors import UserError

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def filled(model: nn.Module, names: list[list[str]], alpha: float = 4.0) -> nn.Module:
    attach(model, names, torch.ones(len(names), len(names[0]), dtype=torch.bool), 2, None, alpha)
    for i, (_, layer) in enumerate(lowrank_layers(model)):
        torch.manual_seed(i)
        nn.init.normal_(layer.lora_bt)
    return model


def encoder(**settings) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 3)


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # torch's warning about its own fast path
def test_torchs_fused_encoder_includes_the_update(settings, mask):
    """B15: it crashed because of a missing bias. With a bias, the fused kernel would use only the frozen weights."""
    plain = encoder(**settings)
    model = filled(copy.deepcopy(plain), find_grid(plain).names)
    real = slice(None) if mask is None else ~mask
    expected = model.train()(X, src_key_padding_mask=mask)[real].detach()  # no dropout: as in eval
    model.eval()
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(model(X, src_key_padding_mask=mask)[real], expected, rtol=1e-4, atol=1e-5)
    assert (plain(X, src_key_padding_mask=mask)[real] - expected).abs().max() > 0.1


def test_torchs_fused_encoder_includes_a_bottleneck():
    model = encoder()
    for layer in model.layers:
        layer.linear2 = BottleneckLinear(layer.linear2, 3, std=0.5)
    expected = model(X)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), expected)
    with pytest.raises(UserError, match="would leave the bottleneck out"):
        F.linear(X, model.layers[0].linear1.weight) @ model.layers[0].linear2.weight.T


class Reads(nn.Module):
    """A module that reads the weight of its linear layer and does not call the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(16, 3)

    def forward(self, x):
        return F.linear(x, self.lin.weight, self.lin.bias)


def test_reading_the_weight_includes_the_update_and_its_gradients():
    model = filled(Reads(), [["lin"]])
    called = model.lin(X)
    torch.testing.assert_close(model(X), called)
    matrices = [model.lin.lora_a, model.lin.lora_bt]
    for ours, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), matrices) for y in (model(X), called)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    weight = model.lin.weight
    for values in (weight.T.T, weight.detach(), weight + 0, weight.clone(), weight.data, torch.stack([weight])[0]):
        torch.testing.assert_close(X @ values.T + model.lin.bias, called)
    model.lin.merge()
    torch.testing.assert_close(model(X), called)


def test_reading_dtype_or_shape_computes_no_product(monkeypatch):
    model = filled(Reads(), [["lin"]])
    monkeypatch.setattr(model.lin, "_whole_weight", lambda: pytest.fail("it was computed"))
    weight = model.lin.weight
    assert (weight.dtype, weight.shape, weight.ndim, weight.device) == (torch.float32, (3, 16), 2, torch.device("cpu"))
    assert weight.size(0) == 3 and weight.numel() == 48 and weight.is_floating_point() and not weight.is_meta


def test_the_output_projection_of_attention_includes_the_update():
    """`nn.MultiheadAttention` passes its weight to a function, so it is not a candidate. Here it is replaced."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    with pytest.raises(UserError, match="out_proj is a NonDynamicallyQuantizableLinear, not a linear layer"):
        filled(attention, [["out_proj"]])
    linear = nn.Linear(16, 16)
    linear.load_state_dict(attention.out_proj.state_dict())
    attention.out_proj = linear
    plain = attention(X, X, X)[0]
    filled(attention, [["out_proj"]])
    update = (plain - attention(X, X, X)[0]).detach()
    with torch.no_grad():
        torch.testing.assert_close(attention.eval()(X, X, X)[0], plain - update, rtol=1e-4, atol=1e-5)
    assert update.abs().max() > 0.05


def test_a_parametrised_weight_includes_the_update_and_cannot_be_merged():
    model = Reads()
    parametrize.register_parametrization(model.lin, "weight", nn.Tanh())
    filled(model, [["lin"]])
    torch.testing.assert_close(model(X), model.lin(X))
    with pytest.raises(UserError, match="computed from other tensors and cannot be changed"):
        model.lin.merge()
    assert not model.lin.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_weight_keeps_its_dtype(dtype):
    model = filled(Reads(), [["lin"]])
    expected = model(X)
    model.lin.base.to(dtype)
    y = model(X.to(dtype))
    assert y.dtype == dtype and model.lin.weight.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_masks_and_the_simultaneous_search_refuse_a_model_that_reads_weights():
    for name, value in (("split", 1), ("rows", (torch.tensor([1]), torch.tensor([0])))):
        model = filled(Reads(), [["lin"]])
        setattr(model.lin, name, value)
        with pytest.raises(UserError, match="reads the weight of an adapted linear layer"):
            model(X)
        assert model.lin.weight.dtype == torch.float32  # looking is allowed


def test_compiled_models_include_the_update():
    model = filled(Reads(), [["lin"]])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), model.lin(X))
    assert isinstance(model.lin.weight, AdaptedWeight)


def test_a_change_in_place_is_refused():
    model = filled(Reads(), [["lin"]])
    with pytest.raises(UserError, match="zero_ on the weight of an adapted layer would be lost"):
        nn.init.zeros_(model.lin.weight)
