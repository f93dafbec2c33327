"""A grid of blocks: layers of several kinds, such as those of an encoder and a decoder."""

import itertools
import json
import warnings
from fractions import Fraction

import pytest
import torch
from families import random_model
from torch import nn

from diffora import attach, search, select
from diffora.core.attach import detach
from diffora.core.choose import choose
from diffora.core.counts import (
    adapter_parameters,
    expected_adapter_parameters,
    expected_globally,
    extreme_adapter_parameters,
    largest_prefix,
)
from diffora.core.dam import comparable, discretise, discretise_globally, entropy, initial_gamma, relax
from diffora.core.draws import draw_of_same_size
from diffora.core.grid import find_grid, laid_out
from diffora.core.parts import block_of, part_of, path_of, short_names
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.scoring.measures import MEASURES
from diffora.scoring.spectra import SPECTRA

NAN = float("nan")
KIND = "AutoModelForSeq2SeqLM"
BOTH = {"t5": ["encoder.block.*", "decoder.block.*"], "bart": ["encoder.layers.*", "decoder.layers.*"]}
# Two layers with two modules, two with three: columns of their own.
SHAPES = [
    [(3, 2), (3, 4), None, None, None],
    [(3, 2), (3, 4), None, None, None],
    [None, None, (3, 2), (3, 2), (5, 1)],
    [None, None, (3, 2), (3, 2), (5, 1)],
]
THERE = torch.tensor([[shape is not None for shape in row] for row in SHAPES])


def scores(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).masked_fill(~THERE, NAN)


def masks(by_layer: tuple[int, int] | None = None) -> list[torch.Tensor]:
    """All selections of `SHAPES`; or those with so many modules in a layer of each block."""
    places = THERE.nonzero().tolist()
    found = []
    for flags in itertools.product((False, True), repeat=len(places)):
        mask = torch.zeros_like(THERE)
        for (i, j), flag in zip(places, flags, strict=True):
            mask[i, j] = flag
        if by_layer is None or mask.sum(-1).tolist() == [by_layer[0]] * 2 + [by_layer[1]] * 2:
            found.append(mask)
    return found


# --- the grid ---


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_both_stacks_of_a_model_that_generates_are_found(family):
    model = random_model(family, KIND)
    grid = find_grid(model)
    assert grid.sizes == [6, 6, 10, 10] and grid.n_modules == 32 and grid.left_out == ()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(grid.modules) == linear
    assert grid == find_grid(model, BOTH[family])
    assert grid.present.tolist() == [[name is not None for name in row] for row in grid.names]
    for row, shapes in zip(grid.names, grid.shapes, strict=True):
        for kind, name, shape in zip(grid.types, row, shapes, strict=True):
            assert (name is None) == (shape is None)
            if name is not None:
                assert name.endswith(path_of(kind)) and f".{block_of(kind).split('.')[0]}." in f".{name}"
                weight = model.get_submodule(name).weight
                assert shape == (weight.shape[1], weight.shape[0])
    labels = short_names(grid.types)
    assert len(set(labels)) == 16 and {"encoder Q", "decoder Q", "decoder cross Q", "decoder FFN out"} < set(labels)


def test_one_stack_alone_is_the_grid_that_it_was():
    model = random_model("t5", KIND)
    one = find_grid(model, "encoder.block.*")
    assert one == find_grid(model, ["encoder.block.*"])
    assert one.types[0] == "layer.0.SelfAttention.q" and one.present.all() and one.n_modules == 12


def test_a_classifier_with_two_stacks_is_still_asked():
    with pytest.raises(UserError, match="2 stacks of layers; choose"):
        find_grid(random_model("t5", "AutoModelForSequenceClassification"))


def test_a_block_takes_the_candidates_and_roles_that_it_has():
    model = random_model("t5", KIND)
    wanted = ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"]
    for layer in (None, BOTH["t5"]):
        grid = find_grid(model, layer, wanted, {"ffn_output": "layer.1.DenseReluDense.wo"})
        assert [list(map(path_of, grid.types))] == [[wanted[0], *wanted]] and grid.sizes == [1, 1, 2, 2]
        assert grid.having("ffn_output")[1:3] == [
            "encoder.block.1.layer.1.DenseReluDense.wo",
            "decoder.block.0.layer.2.DenseReluDense.wo",  # guessed: the given path is not in this block
        ]
    keys = find_grid(model).having("key")
    assert len(keys) == 6 and keys[-1] == "decoder.block.1.layer.1.EncDecAttention.k"


def test_layers_that_differ_can_be_blocks():
    wide, narrow = nn.ModuleDict({"q": nn.Linear(2, 2), "gate": nn.Linear(2, 2)}), nn.ModuleDict({"q": nn.Linear(2, 2)})
    model = nn.ModuleDict({"layers": nn.ModuleList([narrow, wide, nn.ModuleDict(dict(wide))])})
    model["layers"][2] = nn.ModuleDict({"q": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})
    with pytest.raises(UserError, match="differ"):
        find_grid(model)
    grid = find_grid(model, ["layers.[0]", "layers.[1,2]"])
    assert grid.types == ("layers.[0].q", "layers.[1,2].q", "layers.[1,2].gate") and grid.sizes == [1, 2, 2]
    assert short_names(grid.types) == list(grid.types)


@pytest.mark.parametrize(
    ("layer", "candidates", "roles", "expected"),
    [
        ([], None, {}, "must be one name of layers, or a list"),
        (["encoder.block.*"] * 2, None, {}, "names encoder.block.\\* twice"),
        (["encoder.block.*", "encoder.block.[0]"], None, {}, "encoder.block.0 is in two of the blocks"),
        ([".", "encoder.block.*"], None, {}, "cannot be one of several blocks"),
        (["encoder.block.*", "nowhere.*"], None, {}, "no linear layer matches nowhere"),
        (None, ["layer.0.SelfAttention.q", "nope"], {}, "no linear layer of any block is called nope"),
        (BOTH["t5"], None, {"key": "nope"}, "roles.key=nope: no block has it"),
    ],
)
def test_impossible_blocks(layer, candidates, roles, expected):
    with pytest.raises(UserError, match=expected):
        find_grid(random_model("t5", KIND), layer, candidates, roles)


def test_the_part_of_a_type_does_not_depend_on_its_block():
    for path in ("layer.1.EncDecAttention.k", "output.dense", "self_attn.q_proj", "fc2"):
        for block in ("encoder.block.*.", "decoder.layers.[0,3]."):
            assert part_of(block + path) == part_of(path) is not None
            assert (block_of(block + path), path_of(block + path)) == (block[:-1], path)
        assert (block_of(path), path_of(path)) == ("", path)


# --- equations ---


@pytest.mark.parametrize("relaxation", ["softmax", "sigmoid"])
def test_each_layer_is_relaxed_by_itself(relaxation):
    gamma = initial_gamma(THERE)
    gamma[THERE] += torch.randn(10, generator=torch.Generator().manual_seed(1))
    gamma.requires_grad_()
    gates = relax(gamma, relaxation)
    weights = torch.arange(20.0).view(4, 5)
    (grad,) = torch.autograd.grad((gates * weights).sum(), gamma)
    for row in range(4):
        own = gamma[row, THERE[row]].detach().requires_grad_()
        alone = relax(own, relaxation)
        torch.testing.assert_close(gates[row, THERE[row]], alone)
        torch.testing.assert_close(
            grad[row, THERE[row]], torch.autograd.grad((alone * weights[row, THERE[row]]).sum(), own)[0]
        )
    assert (gates[~THERE] == 0).all() and (grad[~THERE] == 0).all()
    if relaxation == "softmax":
        start = entropy(relax(initial_gamma(THERE)))
        torch.testing.assert_close(start, torch.tensor([2.0, 2.0, 3.0, 3.0]).log())


def test_no_step_of_gamma_reaches_what_is_not_there():
    gamma = initial_gamma(THERE).requires_grad_()
    optimiser = torch.optim.Adam([gamma], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (relax(gamma) * torch.randn(4, 5)).sum().backward()
        optimiser.step()
    assert (gamma[~THERE] == -torch.inf).all() and (gamma[THERE].isfinite() & (gamma[THERE] != 0)).all()


def test_discretise_selects_in_each_layer_among_its_own():
    values = scores()
    mask = discretise(values, [1, 1, 2, 2])
    assert mask.sum(-1).tolist() == [1, 1, 2, 2] and not mask[~THERE].any()
    for row in range(4):
        assert values[row, mask[row]].min() > values[row, THERE[row] & ~mask[row]].max()
    with pytest.raises(ValueError, match="k=3 must lie between 0 and the 2 candidates"):
        discretise(values, 3)
    top = discretise_globally(values, 7)
    assert top.sum() == 7 and values[top].min() > values[THERE & ~top].max()
    with pytest.raises(ValueError, match="and the 10 candidates"):
        discretise_globally(values, 11)
    with pytest.warns(UserWarning, match=r"layer\(s\) 2, 3"):
        discretise(torch.where(THERE[:, :] & (torch.arange(4) > 1)[:, None], 0.5, values), [1, 1, 2, 2])


def test_gates_of_layers_with_different_sizes_are_compared_by_their_distance_from_the_start():
    gates = relax(initial_gamma(THERE))
    assert comparable(gates, [2, 2, 3, 3])[THERE].tolist() == pytest.approx([1.0] * 10)
    for same, sizes in ((scores(), [2, 2, 3, 3]), (relax(torch.randn(4, 5)), [5] * 4)):
        assert comparable(same, sizes) is same
    gates[0, :2], gates[2, 2:] = torch.tensor([0.45, 0.55]), torch.tensor([0.40, 0.31, 0.29])
    first = choose(gates, SHAPES, "global", 0.1, 1, None).mask
    assert first.nonzero().tolist() == [[2, 2]]  # 3 x 0.40 is more than 2 x 0.55
    above = choose(gates, SHAPES, "global", 0.1, 1, None, lowest_layer=1).mask
    unsearched = gates.clone()
    unsearched[0] = 0.2  # a layer that cannot have adapters keeps the equal gates of all five columns
    assert torch.equal(choose(unsearched, SHAPES, "global", 0.1, 1, None, lowest_layer=1).mask, above)
    assert above.nonzero().tolist() == [[2, 2]]


@pytest.mark.parametrize("shared_rank", [None, 2])
def test_counts_against_an_enumeration(shared_rank):
    everything = masks()
    least, most = extreme_adapter_parameters(SHAPES, 3, shared_rank)
    for m in range(11):
        counts = [adapter_parameters(SHAPES, mask, 3, shared_rank) for mask in everything if mask.sum() == m]
        assert (min(counts), max(counts)) == (least[m], most[m])
        assert expected_globally(SHAPES, m, 3, shared_rank) == round(Fraction(sum(counts), len(counts)))
    for k in itertools.product(range(3), range(4)):
        counts = [adapter_parameters(SHAPES, mask, 3, shared_rank) for mask in masks(k)]
        expected = expected_adapter_parameters(SHAPES, [k[0]] * 2 + [k[1]] * 2, 3, shared_rank)
        assert expected == round(Fraction(sum(counts), len(counts)))
    values, budget = scores(), 90
    order = values.masked_fill(~THERE, -1).flatten().argsort(descending=True)
    fits = [
        m
        for m in range(11)
        if adapter_parameters(
            SHAPES, torch.zeros(20, dtype=torch.bool).scatter(0, order[:m], True).view(4, 5), 3, shared_rank
        )
        <= budget
    ]
    assert largest_prefix(SHAPES, values, 3, shared_rank, budget) == max(fits)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_draw_of_the_same_size_stays_inside_the_grid(scope):
    mask = choose(scores(), SHAPES, scope, 0.5, 3, 1).mask
    wanted = adapter_parameters(SHAPES, mask, 3, 1)
    drawn = [draw_of_same_size(SHAPES, mask, scope, 3, 1, seed) for seed in range(8)]
    for other in drawn:
        assert not other[~THERE].any() and not other.equal(mask)
        assert adapter_parameters(SHAPES, other, 3, 1) == wanted
        assert scope == "global" or other.sum(-1).equal(mask.sum(-1))
    assert len({other.numpy().tobytes() for other in drawn}) > 2


def test_half_of_each_layer():
    found = choose(scores(), SHAPES, "layer", 0.5, 3, 1)
    assert found.mask.sum(-1).tolist() == [1, 1, 1, 1] and found.k == 1
    found = choose(scores(), SHAPES, "layer", 0.7, 3, 1)
    assert found.mask.sum(-1).tolist() == [1, 1, 2, 2] and found.k is None
    assert choose(scores(), SHAPES, "global", 0.5, 3, 1).mask.sum() == 5


def test_values_are_laid_out_where_the_modules_are():
    names = [[f"{i}.{j}" if THERE[i, j] else None for j in range(5)] for i in range(4)]
    found = laid_out(torch.arange(10.0), names)
    assert found[THERE].tolist() == list(range(10)) and found[~THERE].isnan().all()
    assert laid_out(torch.arange(6.0), [["a", "b", "c"], ["d", "e", "f"]]).tolist() == [[0, 1, 2], [3, 4, 5]]


# --- on models ---


def batches(n: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, 300, (6, length), generator=generator)

    return [{"input_ids": ids(7), "attention_mask": torch.ones(6, 7), "labels": ids(5)} for _ in range(n)]


@pytest.fixture(scope="module")
def found():
    model = random_model("t5", KIND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return search(model, batches(), batches(seed=1), rounds=2, rank=2, gamma_lr=0.1, progress=False)


def test_the_search_of_the_library_finds_and_searches_both_stacks(found, tmp_path):
    grid = find_grid(random_model("t5", KIND))
    assert [len(row) for row in found.selected] == [3, 3, 5, 5] and found.k is None
    gates = torch.tensor([[NAN if v is None else v for v in row] for row in found.gamma_bar])
    assert (gates.isnan() == ~grid.present).all()
    torch.testing.assert_close(gates.nan_to_num(0).sum(-1), torch.ones(4))
    assert gates[0, :6].std() > 1e-4 and gates[3, 6:].std() > 1e-4  # both blocks learnt
    assert set(found.names()) <= set(grid.modules) and len(found.names()) == 16
    found.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == found
    found.check_fits(grid, "")


@pytest.mark.parametrize("selector", [*MEASURES, *SPECTRA, "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_selectors_of_the_library(selector, scope):
    model = random_model("bart", KIND)
    chosen = select(model, selector, batches(2), scope=scope)
    assert len(chosen.names()) == 16 and set(chosen.names()) <= set(find_grid(model).modules)
    assert [[v is None for v in row] for row in chosen.scores] == (~find_grid(model).present).tolist()


@pytest.mark.parametrize("selector", ["activation", "plop", "fisher"])
def test_padding_does_not_change_the_scores(selector):
    model, rows = random_model("t5", KIND), batches(1)[0]
    wide = {
        "input_ids": torch.cat([rows["input_ids"], torch.zeros(6, 4, dtype=torch.long)], 1),
        "attention_mask": torch.cat([rows["attention_mask"], torch.zeros(6, 4)], 1),
        "labels": torch.cat([rows["labels"], torch.full((6, 6), -100)], 1),
    }
    assert wide["input_ids"].shape == wide["labels"].shape  # equally wide: the shapes do not tell which is which
    one, other = (select(model, selector, [batch]).scores for batch in (rows, wide))
    for a, b in zip(one, other, strict=True):
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=1e-4)


def test_pairs_are_shared_within_a_block_only(found):
    model = random_model("t5", KIND)
    attach(model, found, rank=2, shared_rank=1)
    of: dict[int, list[str]] = {}
    for name in {n for row in found.modules for n in row if n} - set(found.names()):
        of.setdefault(id(model.get_submodule(name).lora_a), []).append(name)
    assert any(len(names) > 1 for names in of.values())
    for names in of.values():
        assert len({(name.split(".")[0], path_of(name.split(".", 3)[3])) for name in names}) == 1
    grid = find_grid(random_model("t5", KIND))
    count = sum(p.numel() for p in {p for p in model.parameters() if p.requires_grad})
    assert count == adapter_parameters(grid.shapes, found.mask(), 2, 1)
    detach(model)


def test_plain_peft_gives_the_same_logits(found):
    from peft import get_peft_model

    ours, theirs = random_model("t5", KIND).eval(), random_model("t5", KIND).eval()
    attach(ours, found, rank=2, alpha=8)
    theirs = get_peft_model(theirs, found.lora_config(rank=2, alpha=8, task_type="SEQ_2_SEQ_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in found.names():
            layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
            for own in (layer.lora_a, layer.lora_bt):
                own.copy_(torch.randn(own.shape, generator=generator))
            other.lora_A["default"].weight.copy_(layer.lora_a)
            other.lora_B["default"].weight.copy_(layer.lora_bt.T)
        batch = batches(1)[0]
        plain = random_model("t5", KIND).eval()(**batch).logits
        mine, peft = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(mine, peft, rtol=1e-4, atol=1e-3)
    assert (mine - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw["selected"].__setitem__(0, [raw["types"][-1]]), "layer 0 selects 'decoder"),
        (lambda raw: raw["gamma_bar"][0].__setitem__(-1, 0.5), "has a number where 'modules' has null"),
        (lambda raw: raw["gamma_bar"][0].__setitem__(0, None), "has null where 'modules' has a name"),
    ],
)
def test_a_selection_file_that_contradicts_its_grid(found, tmp_path, change, expected):
    file = tmp_path / "selection.json"
    found.save(file)
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=expected):
        Selection.load(file)
