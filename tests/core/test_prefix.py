"""Layers that return kept states: in every family, outputs and gradients are those of computed layers."""

import pytest
import torch
from conftest import batch_of
from families import CONFIGS, EOS, random_model
from torch import nn
from torch._dynamo.utils import counters

from diffora.core.grid import find_grid
from diffora.core.prefix import Prefix, lowest_trained, put_into, stack_members
from diffora.errors import UserError

LAYERS = 3
TEXT = "AutoModelForSequenceClassification"
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "mpnet", "deberta-v2", "distilbert", "electra", "modernbert"), TEXT),
    **dict.fromkeys(("gpt2", "llama", "qwen3", "bloom", "opt"), "AutoModelForCausalLM"),
    "vit": "AutoModelForImageClassification",
}
LENGTHS = [7, 3, 5]
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
RATES += ("attention_dropout", "hidden_dropout", "seq_classif_dropout")


def deep_model(name, **changes):
    """A model of the family with `LAYERS` layers and no dropout."""
    count = next(key for key in ("num_hidden_layers", "n_layers", "n_layer") if key in CONFIGS[name])
    dropout = dict.fromkeys(RATES, 0.0)
    model = random_model(name, FAMILIES[name], **{count: LAYERS}, **dropout, **changes)
    model.double().requires_grad_(False)
    members = stack_members(model, find_grid(model).layers)
    return model, members


def inputs_of(name, rows=(0, 1, 2), left=False):
    """Inputs of some rows: images, or ragged texts that are padded on one side."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(len(LENGTHS), 3, 8, 8, generator=generator).double()[list(rows)]}
    texts = [torch.randint(5, 300, (length,), generator=generator) for length in LENGTHS]
    width = max(LENGTHS[row] for row in rows)
    ids, mask = torch.full((len(rows), width), 0 if name != "gpt2" else EOS), torch.zeros(len(rows), width).long()
    for place, row in enumerate(rows):
        part = slice(width - LENGTHS[row], None) if left else slice(LENGTHS[row])
        ids[place, part], mask[place, part] = texts[row], 1
    return {"input_ids": ids, "attention_mask": mask}


def real(inputs, prefix, model):
    mask = inputs.get("attention_mask")
    if mask is None:
        shape = prefix.output(lambda: model(**inputs)).shape[:2]
        return torch.ones(shape, dtype=torch.bool)
    return mask.bool()


def kept_states(prefix, model, name):
    """The states of the real tokens, computed for each row alone."""
    alone = []
    for row in range(len(LENGTHS)):
        one = inputs_of(name, [row])
        states = prefix.output(lambda one=one: model(**one))
        alone.append(states[real(one, prefix, model)])
    return torch.cat(alone)


def logits_of(model, inputs):
    """The logits that count: not those of padding, whose states are not kept."""
    logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if logits.ndim == 3 else logits


@pytest.mark.parametrize("lowest", [1, 2, LAYERS])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_computed_layers(name, lowest):
    if name == "gpt2":
        model, members = deep_model(name, pad_token_id=EOS)
    else:
        model, members = deep_model(name)
    for layer in members[lowest:]:
        layer.requires_grad_(True)
    assert lowest_trained(members) == lowest
    prefix, inputs = Prefix(members[:lowest]), inputs_of(name)
    with torch.no_grad():
        states = put_into(real(inputs, prefix, model), kept_states(prefix, model, name))
    names = [key for key, _ in model.named_modules()]
    found = []
    for kept in (False, True):
        model.zero_grad()
        with prefix.installed():
            if kept:
                with prefix.returning(states):
                    logits = logits_of(model, inputs)
            else:
                logits = logits_of(model, inputs)
        if lowest < LAYERS:
            logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > (1 if lowest < LAYERS else 0)
    for plain, replaced in zip(*found, strict=True):
        assert torch.allclose(plain, replaced, rtol=1e-9, atol=1e-10)
    assert [key for key, _ in model.named_modules()] == names
    assert not any("forward" in vars(layer) for layer in members)


def test_layers_return_what_they_are_given_and_nothing_below_is_computed():
    model, members = deep_model("bert")
    prefix, inputs = Prefix(members[:2]), inputs_of("bert")
    kept = prefix.output(lambda: model(**inputs))
    with prefix.installed(), prefix.returning(kept * 2):
        other = model(**inputs).logits
        members[0].register_forward_pre_hook(lambda module, args: None)
        members[1].attention.forward = lambda *args, **kwargs: pytest.fail("computed")
        assert model(**inputs).logits.equal(other)
    del members[1].attention.forward
    assert not torch.allclose(model(**inputs).logits, other, rtol=1e-3)


def test_a_convolution_between_two_layers_is_still_computed():
    """DeBERTa-v2 may have one behind its first layer."""
    model, members = deep_model("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    prefix, inputs = Prefix(members[:1]), inputs_of("deberta-v2", [0])
    kept = prefix.output(lambda: model(**inputs))
    plain = model(**inputs).logits
    with prefix.installed(), prefix.returning(kept):
        assert torch.allclose(model(**inputs).logits, plain, rtol=1e-9)


def test_padding_on_the_left_needs_no_other_states():
    model, members = deep_model("llama")
    prefix, right, left = Prefix(members[:2]), inputs_of("llama"), inputs_of("llama", left=True)
    with torch.no_grad():
        tokens = kept_states(prefix, model, "llama")
        with prefix.installed():
            answers = []
            for inputs in (right, left):
                with prefix.returning(put_into(inputs["attention_mask"].bool(), tokens)):
                    answers.append(logits_of(model, inputs))
    # rotary positions are relative, so the logits are the same on both sides
    assert torch.allclose(*answers, rtol=1e-3, atol=1e-3)


def test_compiled_models_take_states_of_any_width_without_being_compiled_again(deberta):
    model = deberta(layers=3).train()
    members = stack_members(model, find_grid(model).layers)
    members[2].requires_grad_(True)
    prefix = Prefix(members[:2])

    batches = [
        {key: value for key, value in batch_of(rows, length, seed=length).items() if key != "row"}
        for rows, length in ((4, 6), (8, 9), (5, 7), (3, 11))
    ]
    with torch.no_grad():
        states = [prefix.output(lambda batch=batch: model(**batch)) * 1.5 for batch in batches]

    def steps():
        with prefix.installed():
            for batch, given in zip(batches, states, strict=True):
                with prefix.returning(given):
                    loss = model(**batch).loss
                yield loss.detach(), *torch.autograd.grad(loss, list(members[2].parameters()))

    plain = list(steps())
    torch.compiler.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager")  # traced, and nothing is generated
    found = list(steps())
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 2


def test_models_without_one_stack_of_layers_are_refused():
    bart = random_model("bart", "AutoModelForSeq2SeqLM")
    with pytest.raises(UserError, match="not one list of layers"):
        stack_members(bart, find_grid(bart).layers)
    with pytest.raises(UserError, match="not one list of layers"):
        stack_members(nn.Linear(2, 2), [""])
    albert = random_model("albert", TEXT)
    groups = stack_members(albert, find_grid(albert).layers)
    with pytest.raises(UserError, match="once each"):
        Prefix([*groups, nn.Linear(2, 2)]).output(lambda: albert(**inputs_of("albert")))


def test_an_earlier_override_of_a_layer_is_put_back():
    layer = nn.Identity()
    layer.forward = own = lambda x: x + 1
    prefix = Prefix([layer])
    prefix.output(lambda: layer(torch.zeros(1, 1, 1)))
    with prefix.installed(), prefix.returning(torch.ones(1, 1, 1)):
        assert layer(torch.zeros(1, 1, 1)).item() == 1
    assert layer.forward is own
