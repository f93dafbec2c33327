"""Attention in bfloat16 on a CPU: the values of torch's attention, without casts to float32 and back."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from diffora.backbones import attention as module_under_test
from diffora.backbones.attention import NAME, attention, use_bfloat16_attention
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.kernels.dropout import use_cheap_dropout

ROWS, HEADS, TOKENS, FEATURES = 3, 2, 12, 16


def inputs(dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = ROWS, HEADS, TOKENS, FEATURES
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for _ in range(3)]


def masks():
    seen = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool)
    seen[0, :, :, 7:] = False
    added = torch.zeros(ROWS, 1, 1, TOKENS, dtype=torch.bfloat16).masked_fill(~seen[:, :, :1], -1e4)
    return {"none": None, "bool": seen, "added": added}


class NotCausal(nn.Module):
    is_causal = False


def values_and_gradients(function, given):
    found = function(*given)
    return found.detach(), *torch.autograd.grad((found.float() ** 2).sum(), given)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_values_and_gradients_are_as_near_to_float32_as_those_of_torch(kind, monkeypatch):
    mask = masks()[kind]

    def ours(q, k, v):
        return attention(NotCausal(), q, k, v, mask)[0].transpose(1, 2)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def exact(q, k, v):
        number = None if mask is None or mask.dtype == torch.bool else mask.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if number is None else number)

    given = inputs(torch.bfloat16)
    reference = values_and_gradients(exact, [x.detach().float().requires_grad_() for x in given])
    theirs = values_and_gradients(torchs, given)
    called = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", lambda *a, **k: called.append(1)
    )
    mine = values_and_gradients(ours, given)
    assert not called
    for a, b, c in zip(mine, theirs, reference, strict=True):
        assert a.dtype == torch.bfloat16
        scale = c.abs().max()
        assert (a - c).abs().max() / scale < max(0.02, 2 * float((b - c).abs().max() / scale))


def test_dropout_zeroes_weights_and_scales_the_others():
    q, k, _ = inputs(torch.bfloat16)
    identity = torch.eye(TOKENS, dtype=torch.bfloat16).expand(ROWS, HEADS, TOKENS, TOKENS)
    whole = attention(NotCausal(), q, k, identity, None)[0]
    torch.manual_seed(0)
    dropped = attention(NotCausal(), q, k, identity, None, dropout=0.5)[0]
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=0.01, atol=0.0)


def test_frozen_layers_with_dropout_are_computed_here_too(monkeypatch):
    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", None)
    q, k, v = (x.detach() for x in inputs(torch.bfloat16))
    found = attention(NotCausal(), q, k, v, None, dropout=0.1)[0]
    assert found.shape == (ROWS, TOKENS, HEADS, FEATURES) and found.dtype == torch.bfloat16


def test_every_other_case_is_left_to_transformers():
    def torchs(q, k, v, **more):
        return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2)

    single = inputs(torch.float32)
    assert torch.equal(attention(NotCausal(), *single, None)[0], torchs(*single))
    half = inputs(torch.bfloat16)
    assert torch.equal(
        attention(nn.Module(), *half, None)[0], torchs(*half, is_causal=True)
    )  # as transformers takes it
    with torch.no_grad():
        frozen = [x.detach() for x in half]
        assert torch.equal(attention(NotCausal(), *frozen, None)[0], torchs(*frozen))


class Casts(TorchDispatchMode):
    """Counts the casts of activations between float32 and bfloat16."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.numel() >= self.size:
            kinds = {args[0].dtype, out.dtype}
            self.seen[tuple(out.shape)] += kinds == {torch.float32, torch.bfloat16}
        return out


def bert(dtype):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = BertForSequenceClassification(config).to(dtype)
    use_cheap_dropout(model)
    model.requires_grad_(False)
    model.classifier.float().requires_grad_(True)
    grid = find_grid(model)
    attach(model, grid.names, torch.ones(2, grid.n_types, dtype=torch.bool), 4, None, 8, dropout=0.1, freeze=False)
    for _, layer in lowrank_layers(model):
        torch.nn.init.normal_(layer.lora_bt, std=0.05)
    return model.train()


def casts_in_a_step(model):
    rows, width = 8, 16
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[0, 9:] = 0
    batch = {
        "input_ids": torch.randint(5, 90, (rows, width)),
        "attention_mask": mask,
        "labels": torch.ones(rows).long(),
    }
    with Casts(rows * width * 32) as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad and p.grad is not None)
    return casts.seen.total()


def test_a_training_step_casts_no_activation():
    model = bert(torch.bfloat16)
    assert casts_in_a_step(model) > 8  # torch's attention has dropout in float32
    use_bfloat16_attention(model)
    assert casts_in_a_step(model) == 0
    wide = bert(torch.float32)
    use_bfloat16_attention(wide)
    assert casts_in_a_step(wide) > 8  # what frozen weights in bfloat16 are for


def test_a_saved_model_does_not_name_it(tmp_path):
    model = bert(torch.bfloat16)
    use_bfloat16_attention(model)
    assert model.config._attn_implementation == NAME == module_under_test.NAME
    model.config.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = AutoModelForSequenceClassification.from_config(BertConfig.from_pretrained(tmp_path))
    assert again.config._attn_implementation == "sdpa"


def test_a_model_with_attention_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    use_bfloat16_attention(model)
    eager = bert(torch.bfloat16)
    eager.set_attn_implementation("eager")
    use_bfloat16_attention(eager)
    assert eager.config._attn_implementation == "eager"
