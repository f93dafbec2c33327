"""The cost of a step: counted operations, and the backward pass that stops below the lowest adapter."""

import itertools

import pytest
import torch
from families import VOCAB, random_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.choose import choose
from diffora.core.counts import above, adapter_parameters
from diffora.core.grid import find_grid
from diffora.core.steptime import lowest_layer, operations

WIDTH, RANK, ROWS = 8, 2, 5
FAMILIES = [
    ("deberta-v2", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForSequenceClassification"),
    ("mpnet", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForCausalLM"),
    ("vit", "AutoModelForImageClassification"),
    ("t5", "AutoModelForSeq2SeqLM"),
]


def adapted(name, kind, lowest, kernel="fused", checkpointing=False):
    """A small model with adapters from one layer on, its grid, and a step's loss."""
    changes = {"pad_token_id": 0} if name == "gpt2" else {}
    backbone = Backbone.of(random_model(name, kind, **changes)).freeze()
    model = backbone.model.train()
    if checkpointing:
        backbone.checkpoint_activations()
    grid = find_grid(model)
    names, everything = above(grid.names, lowest), torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    attach(model, names, everything, RANK, None, 4.0, freeze=False, kernel=kernel)

    def loss():
        if name == "vit":
            return model(pixel_values=torch.randn(2, 3, 8, 8)).logits.pow(2).mean()
        ids = torch.randint(5, VOCAB, (2, 6))
        more = {"labels": ids} if name == "t5" else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.pow(2).mean()

    return model, grid, loss


@pytest.mark.parametrize(("kernel", "checkpointing"), [("fused", False), ("plain", False), ("fused", True)])
@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_the_backward_pass_stops_below_the_lowest_adapter(name, kind, kernel, checkpointing):
    if checkpointing and name == "mpnet":
        pytest.skip("transformers' MPNet has no gradient checkpointing")
    lowest = 2 if name == "t5" else 1  # T5's first decoder layer: nothing goes back to the encoder
    model, grid, loss = adapted(name, kind, lowest, kernel, checkpointing)
    inputs, gradients = {}, set()
    for i, place in enumerate(grid.layers):
        layer = model.get_submodule(place)

        def note(_, args, kwargs, i=i):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            inputs.setdefault(i, any(t.requires_grad for t in given))

        layer.register_forward_pre_hook(note, with_kwargs=True)
        for module in layer.modules():
            if isinstance(module, nn.LayerNorm | nn.Linear):
                module.register_full_backward_hook(lambda *_, i=i: gradients.add(i))
    loss().backward()
    assert inputs == {i: i > lowest for i in range(grid.n_layers)}
    assert gradients == set(range(lowest, grid.n_layers))


@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_operations_are_those_of_torchs_counter(name, kind):
    counts = []
    for lowest in (0, 1):
        _, _, loss = adapted(name, kind, lowest)
        counts.append(operations(lambda loss=loss: loss().backward()))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss().backward()
        assert counts[-1] == counter.get_total_flops()
    assert counts[1] < counts[0]


def test_operations_of_linear_layers_by_hand():
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).requires_grad_(False)
    names = [[str(i)] for i in range(4)]
    product = 2 * ROWS * WIDTH * WIDTH
    pair = 2 * ROWS * RANK * WIDTH
    for lowest in range(4):
        attach(model, above(names, lowest), torch.ones(4, 1, dtype=torch.bool), RANK, None, 1.0, kernel="plain")
        counted = operations(lambda: model(torch.randn(ROWS, WIDTH)).sum().backward())
        own = 4 - lowest
        # Forward: W x of every layer, A x and B (A x). Backward: the gradients of A, of B and of A x for each adapter;
        # the gradient of x through W and through A, except in the lowest adapter.
        assert counted == (4 + own - 1) * product + own * 5 * pair + (own - 1) * pair
        for i in range(lowest, 4):
            model[i] = model[i].base


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_layer_is_the_first_within_the_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 9, (), generator=generator))
    shares = [1.0, *torch.rand(n - 1, generator=generator).sort(descending=True).values.tolist()]
    asked = []

    def share(lowest):
        asked.append(lowest)
        return shares[lowest]

    for budget in (0.1, 0.4, 0.7, 0.99, *shares):
        fits = [lowest for lowest in range(n) if shares[lowest] <= budget]
        asked.clear()
        if fits:
            assert lowest_layer(share, n, budget) == fits[0]
        else:
            with pytest.raises(ValueError, match=f"{shares[-1]:.3f}"):
                lowest_layer(share, n, budget)
        assert len(asked) <= 1 + n.bit_length()


SHAPES = [[(8, 8), (8, 8), (8, 32)], [(8, 8), (8, 8), (8, 32)], [(8, 8), None, (8, 32)], [(8, 8), (8, 8), (8, 32)]]


@pytest.mark.parametrize(
    ("scope", "budget", "shared_rank", "lowest"),
    list(itertools.product(("layer", "global"), (None, 600), (None, 1), (0, 1, 2, 3))),
)
def test_a_choice_above_a_layer_is_the_choice_in_a_model_of_these_layers(scope, budget, shared_rank, lowest):
    scores = torch.rand(4, 3, generator=torch.Generator().manual_seed(lowest))
    found = choose(scores, SHAPES, scope, 0.7, 2, shared_rank, budget, lowest)
    assert not found.mask[:lowest].any()
    if scope == "layer" or budget is not None:  # without a budget, a global selection keeps its number of modules
        alone = choose(scores[lowest:], SHAPES[lowest:], scope, 0.7, 2, shared_rank, budget)
        assert found.mask[lowest:].equal(alone.mask)
        assert (found.k, found.rank, found.rank_at_width) == (alone.k, alone.rank, alone.rank_at_width)
    else:
        left = sum(shape is not None for row in SHAPES[lowest:] for shape in row)
        assert found.mask.sum() == min(7, left)  # floor(0.7 * 11)
    if budget is not None:
        used = adapter_parameters(above(SHAPES, lowest), found.mask, found.rank or 2, shared_rank)
        assert used <= budget


def test_a_budget_of_parameters_is_used_by_the_layers_that_are_left():
    scores, shapes = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), [[(64, 64)] * 3] * 4
    ranks = [choose(scores, shapes, "layer", 0.4, 1, None, 128 * 12, lowest).rank for lowest in range(4)]
    assert ranks == [3, 4, 6, 12]  # one module of each layer that is left, 128 parameters for a rank
