import dataclasses
import json

import pytest
import torch
from conftest import TYPES

from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError


@pytest.fixture
def grid(deberta):
    return find_grid(deberta(), "encoder.layer.*", TYPES)


@pytest.fixture
def selection(grid):
    mask = torch.tensor([[True, False, True, False, False, True], [False, True, False, True, True, False]])
    gamma_bar = torch.softmax(torch.randn(2, 6), -1).tolist()
    return Selection.from_mask(grid, mask, method="diffora", k=3, rho=0.5, seed=7, gamma_bar=gamma_bar, split_hash="x")


def test_a_saved_selection_loads_unchanged(selection, tmp_path):
    selection.save(tmp_path / "s.json")
    assert Selection.load(tmp_path / "s.json") == selection


def test_a_path_may_be_text(selection, tmp_path):
    selection.save(f"{tmp_path}/s.json")
    assert Selection.load(f"{tmp_path}/s.json") == selection


def test_printed_it_names_the_modules_of_each_layer(selection):
    empty = dataclasses.replace(selection, selected=[selection.selected[0], []])
    assert str(selection).splitlines() == [
        "6 of 12 modules, selected by unknown",
        "layer 1: Q, V, FFN out",
        "layer 2: K, attn. out, FFN in",
    ]
    assert str(empty).splitlines()[2] == "layer 2: none"


def test_editing_the_file_changes_the_mask(selection, tmp_path):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    content["selected"][0] = [TYPES[1]]
    (tmp_path / "s.json").write_text(json.dumps(content))
    edited = Selection.load(tmp_path / "s.json")
    assert edited.mask()[0].tolist() == [False, True, False, False, False, False]
    assert torch.equal(edited.mask()[1], selection.mask()[1])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no selection file at"):
        Selection.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', ""])
def test_a_file_that_is_not_a_selection_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=r"s\.json"):
        Selection.load(tmp_path / "s.json")


def test_all_faults_of_a_file_come_at_once(selection, tmp_path):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    del content["rho"]
    content["colour"] = "blue"
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Selection.load(tmp_path / "s.json")
    assert "'rho' is missing" in str(error.value) and "unknown key 'colour'" in str(error.value)


def test_an_unknown_module_names_its_layer(selection, tmp_path):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    content["selected"][1] = ["query"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"layer 1 selects 'query', which is none of attention.self.query_proj"):
        Selection.load(tmp_path / "s.json")


@pytest.mark.parametrize("key", ["types", "modules", "selected"])
def test_a_name_that_is_there_twice_is_refused(selection, tmp_path, key):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    row = content[key] if key == "types" else content[key][0]
    if key == "selected":
        row.append(row[0])
    else:
        row[1] = row[0]
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"'{row[0]}' twice"):
        Selection.load(tmp_path / "s.json")


def test_a_selection_of_another_model_does_not_fit(selection, deberta):
    selection.check_fits(find_grid(deberta(), "encoder.layer.*", TYPES), "s.json")
    with pytest.raises(UserError, match="made for 2 layers x 6 modules"):
        selection.check_fits(find_grid(deberta(layers=3), "encoder.layer.*", TYPES), "s.json")


def test_a_global_selection_with_a_rank_and_scores_comes_back(selection, tmp_path):
    scored = dataclasses.replace(selection, selector="gradient", k=None, rank=7, gamma_bar=None, scores=[[0.5] * 6] * 2)
    scored.save(tmp_path / "s.json")
    assert Selection.load(tmp_path / "s.json") == scored


def test_a_file_without_the_optional_keys_loads(selection, tmp_path):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    for key in ("selector", "k", "rank", "scores", "gamma_bar", "split_hash", "config", "ensemble", "confidence"):
        del content[key]
    (tmp_path / "s.json").write_text(json.dumps(content))
    loaded = Selection.load(tmp_path / "s.json")
    assert torch.equal(loaded.mask(), selection.mask()) and (loaded.rank, loaded.k) == (None, None)


@pytest.mark.parametrize("rank", [0, -1, 2.0, "4", True])
def test_an_invalid_rank_is_refused(selection, tmp_path, rank):
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(content | {"rank": rank}))
    with pytest.raises(UserError, match=r"rank=.* must be a whole number of at least 1, or null"):
        Selection.load(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selected": 5}, "selected=5 must be a list of lists, one for each layer, of module types"),
        ({"gamma_bar": [[0.5] * 6]}, "'gamma_bar' must have 2 layers of 6"),
        ({"gamma_bar": [[0.5] * 6, [0.5] * 5]}, "'gamma_bar' must have 2 layers of 6"),
        ({"gamma_bar": [[float("nan")] * 6] * 2}, "must be a list of lists, one for each layer, of finite numbers"),
        ({"scores": 1}, "scores=1 must be"),
        ({"relaxation": "hard"}, "relaxation='hard' must be one of softmax, scaled_softmax, sigmoid, or null"),
        ({"relaxation": [1]}, "relaxation=a list must be one of softmax, scaled_softmax, sigmoid, or null"),
        ({"confidence": [[0.5] * 6]}, "'confidence' must have 2 layers of 6"),
        ({"confidence": [[1.5] * 6] * 2}, "must be a list of lists, one for each layer, of numbers in [0, 1]"),
        ({"confidence": [[None] * 6] * 2}, "'confidence' has null where 'modules' has a name"),
        ({"ensemble": 0}, "ensemble=0 must be a whole number of at least 1"),
        ({"ensemble": None}, "ensemble=None must be a whole number of at least 1"),
        ({"modules": [["a"], ["b"]]}, "'modules' must have 2 layers of 6"),
        ({"types": "query"}, "types='query' must be a list of module types"),
        ({"rho": None}, "rho=None must be a number in [0, 1]"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"config": []}, "config=a list must be a group of settings"),
        ({"selected": [["a"], 3]}, "must be a list of lists"),
    ],
)
def test_values_of_another_type_or_size_are_named(selection, tmp_path, change, words):
    """C: `selection.json` with `selected: 5` or a short `gamma_bar`, and neighbours."""
    selection.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError) as error:
        Selection.load(tmp_path / "s.json")
    assert len(error.value.problems) == 1 and words in str(error.value)


def test_a_file_nested_very_deep_is_refused(tmp_path):
    """C: JSON nested 5,000 levels deep."""
    (tmp_path / "s.json").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(UserError, match=r"s\.json is nested too deeply"):
        Selection.load(tmp_path / "s.json")


def test_modules_below_the_lowest_layer_are_not_counted_as_decided(selection):
    sure = dataclasses.replace(selection, ensemble=5, confidence=[[0.0] * 6, [1.0, 0.5, 0.5, 0.5, 0.5, 0.0]])
    assert sure.certainty.startswith("8 of 12 modules decided")
    assert dataclasses.replace(sure, lowest_layer=1).certainty.startswith("2 of 6 modules decided")


@pytest.mark.parametrize("wrong", ["dwon", "deberta.encoder.layer.0.output.dense"])
def test_a_type_that_the_layer_does_not_have_is_not_left_out_silently(wrong, selection):
    selection.selected[1].append(wrong)
    for read in (selection.names, selection.mask, lambda: selection.lora_config(rank=2)):
        with pytest.raises(UserError, match=rf"selected\[1\] has '{wrong}', but this layer has {TYPES[0]}, "):
            read()
