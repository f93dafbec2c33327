"""The library's selectors: batches divided in another way, mixed precision, and kinds of batches."""

import copy

import pytest
import torch
from library import CASES, Net, assert_same, bert, entropy_loss, pairs, state, texts
from torch import nn
from transformers import BertConfig, BertForMultipleChoice, OPTConfig, OPTForCausalLM

import diffora
from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.scoring.measures import MEASURES, FeatureNorm
from diffora.standalone.batches import rows_of

SMALL = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def scores(*arguments, **more):
    return torch.tensor(diffora.select(*arguments, progress=False, **more).scores)


@pytest.mark.parametrize("selector", MEASURES)
def test_the_division_into_batches_does_not_change_the_scores(selector):
    torch.manual_seed(0)
    model = bert()
    together = [{key: torch.cat([batch[key] for batch in texts(2)]) for key in texts(1)[0]}]
    together[0]["attention_mask"][1, 4:] = together[0]["attention_mask"][6, 2:] = 0
    single = [{key: value[i : i + 1] for key, value in together[0].items()} for i in range(8)]
    found = scores(model, selector, together)
    torch.testing.assert_close(scores(model, selector, single), found, rtol=1e-4, atol=1e-12)
    assert found.std() > 0 and not torch.equal(found, scores(model, selector, together[:1] + texts(3)[2:]))


@pytest.mark.parametrize("selector", [*MEASURES, "kappa", "spectrum", "qv"])
def test_the_model_stays_as_it_was(selector):
    torch.manual_seed(0)
    model = bert()
    before = state(model)
    diffora.select(model, selector, texts(2), progress=False)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("selector", ["plop", "fisher"])
def test_every_kind_of_model_and_batch(name, selector):
    make, batches, loss = CASES[name]
    torch.manual_seed(0)
    found = scores(make(), selector, batches(), loss=loss)
    assert found.isfinite().all() and found[0].std() > 0


def test_plop_gives_all_layers_the_score_of_their_type():
    torch.manual_seed(0)
    chosen = diffora.select(bert(), "plop", texts(), k=2, progress=False)
    found = torch.tensor(chosen.scores)
    assert torch.equal(found[0], found[1]) and chosen.selected[0] == chosen.selected[1]
    assert [chosen.types[i] for i in sorted(found[0].topk(2).indices.tolist())] == chosen.selected[0]


@pytest.mark.parametrize("selector", ["activation", "plop"])
def test_padding_of_choices_does_not_count(selector):
    torch.manual_seed(0)
    model = BertForMultipleChoice(SMALL)
    ids = torch.randint(1, 50, (4, 3, 6))
    narrow = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    wide = narrow | {key: nn.functional.pad(narrow[key], (0, 10)) for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(scores(model, selector, [wide]), scores(model, selector, [narrow]))


@pytest.mark.parametrize("selector", ["activation", "plop"])
def test_all_tokens_of_a_model_whose_layers_are_called_decoder_count(selector):
    """OPT has no encoder: a decoder reads the prompt, too, for which there are no labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    model = OPTForCausalLM(OPTConfig(vocab_size=50, word_embed_proj_dim=16, max_position_embeddings=32, **sizes))
    ids = torch.randint(3, 50, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    answers = batch["labels"].clone()
    answers[:, :5] = -100
    expected = scores(model, selector, [batch])
    torch.testing.assert_close(scores(model, selector, [batch | {"labels": answers}]), expected)


def test_features_are_measured_in_float32_under_autocast_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleDict({"a": nn.Linear(16, 8)}))
    model.forward = lambda x: model[0]["a"](x)
    measure = FeatureNorm(model, find_grid(model, "*", ["a"]))
    x = torch.randn(4, 16)
    exact = measure.of(x, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert [torch.equal(a, b) for a, b in zip(measure.of(x, model), exact, strict=True)] == [True, True]
    half = copy.deepcopy(model).bfloat16()
    half.forward = lambda x: half[0]["a"](x)
    rounded = FeatureNorm(half, find_grid(half, "*", ["a"])).of(x.bfloat16(), half)
    same = FeatureNorm(half.float(), find_grid(half, "*", ["a"])).of(x.bfloat16().float(), half)
    assert rounded[0].dtype == torch.float32 and torch.equal(rounded[0], same[0])


def test_rows_of_dicts_pairs_and_tensors():
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    assert [row.tolist() for row in rows_of(x, "")] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [[part.tolist() for part in row] for row in rows_of((x, y), "")][2] == [[[4, 5]], [2]]
    assert [list(row) for row in rows_of({"x": x, "y": y}, "")] == [["x", "y"]] * 3
    assert isinstance(next(rows_of([x, y], "")), list)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": torch.randn(4, 8), "y": [0, 1, 1, 0]}, "batch 1 is not a dict or tuple of tensors"),
        ((torch.randn(4, 8), torch.tensor(1)), "batch 1 is not a dict or tuple of tensors"),
        ((torch.randn(4, 8), torch.zeros(3, dtype=torch.long)), r"the tensors of batch 1 have \[3, 4\] rows"),
    ],
)
def test_a_batch_that_has_no_rows_is_refused(batch, words):
    with pytest.raises(UserError, match=f"selector=fisher divides batches into rows, and {words}"):
        diffora.select(Net(), "fisher", [batch], loss=entropy_loss, progress=False)


def test_selectors_without_data_need_no_loader_and_the_others_do():
    for selector in ("kappa", "spectrum", "random"):
        assert diffora.select(Net(), selector).config.keys() == {"scope", "left_out"}
    for selector in MEASURES:
        with pytest.raises(UserError, match=f"selector={selector} needs a loader"):
            diffora.select(Net(), selector)
    assert diffora.select(Net(), "plop", pairs(8), loss=entropy_loss).config["n_batches"] == 16


@pytest.mark.parametrize("selector", ["activation", "plop"])
def test_all_calls_of_a_module_in_a_pass_count(selector):
    """As in a bi-encoder, which reads two texts: their order does not matter, nor whether they are read at once."""
    torch.manual_seed(0)
    net = Net().eval()
    batches = [(torch.randn(4, 8), 5 * torch.randn(4, 8)) for _ in range(2)]

    def apart(model, batch):
        return (model(batch[0]) - model(batch[1])).square().mean()

    def at_once(model, batch):
        return model(torch.cat(batch)).square().mean()

    first = scores(net, selector, batches, loss=apart)
    assert torch.allclose(scores(net, selector, [batch[::-1] for batch in batches], loss=apart), first)
    assert torch.allclose(scores(net, selector, batches, loss=at_once), first)


@pytest.mark.parametrize("selector", ["activation", "plop"])
def test_an_expert_may_have_no_token_in_a_batch_but_not_in_all(selector):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer[int(x[0, 0] > 0)](x) * 0 + x
            return x

    torch.manual_seed(0)
    up, down = torch.randn(4, 8).abs(), -torch.randn(4, 8).abs()
    both = scores(Routed(), selector, [up, down], loss=lambda model, x: model(x).mean(), layer="layers.*")
    assert both.isfinite().all()
    with pytest.raises(UserError, match=r"does not call layers\.0\.0 for any token"):
        scores(Routed(), selector, [up], loss=lambda model, x: model(x).mean(), layer="layers.*")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_function_may_score_a_model_with_buffers_that_torch_cannot_hash(dtype):
    model = Net()
    model.register_buffer("table", torch.ones(3).to(dtype))
    model.register_buffer("single", torch.ones(()).to(dtype))
    assert len(diffora.select(model, lambda model, grid, *_: torch.rand(grid.n_layers, grid.n_types), pairs(2)).names())

    def spoil(model, grid, *_):
        model.table.copy_(torch.full((3,), 2.0).to(dtype))
        return torch.rand(grid.n_layers, grid.n_types)

    with pytest.raises(UserError, match="table"):
        diffora.select(model, spoil, pairs(2))
