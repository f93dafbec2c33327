"""Names of selected modules, as PEFT, axolotl and LLaMA-Factory read them."""

import dataclasses
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.core.targets import exact_pattern, longer_names
from diffora.errors import UserError


def stack(n):
    return nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(n))


class TwoStacks(nn.Module):
    """The names of one stack end with those of the other: ``encoder.layers.0.q`` and ``layers.0.q``."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": stack(2)})
        self.layers = stack(2)


def llama():
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def selected(model, layer=None, every=2):
    """Every second module or so, so that no layer has all and no type has all."""
    grid = find_grid(model, layer)
    mask = (torch.arange(grid.n_layers * grid.n_types) % every == 0).view(grid.n_layers, grid.n_types)
    return Selection.from_mask(grid, mask, method="m", selector="search", rho=0.5, seed=0)


def wrapped_by(config, model):
    """Full names of the modules that PEFT gives a LoRA."""
    inner = get_peft_model(model, config).base_model.model
    return {name for name, module in inner.named_modules() if hasattr(module, "lora_A")}


def test_a_list_of_names_is_exact_where_no_other_name_is_longer():
    selection = selected(llama(), every=3)
    config = selection.lora_config(rank=2)
    assert config.target_modules == set(selection.names()) and not selection.longer_names
    assert wrapped_by(config, llama()) == set(selection.names())  # layer 1 is not layers 10 and 11


@pytest.mark.parametrize("place", ["layers.*", "encoder.layers.*"])
def test_a_model_with_two_stacks_gets_its_lora_on_the_selected_one_only(place):
    model = TwoStacks()
    grid = find_grid(model, place)
    assert grid.longer_names == (() if "enc" in place else tuple(f"encoder.layers.{i}.{t}" for i in "01" for t in "qv"))
    mask = torch.tensor([[True, False], [True, False]])
    selection = Selection.from_mask(grid, mask, method="m", rho=0.5, seed=0)
    config = selection.lora_config(rank=2)
    assert wrapped_by(config, model) == set(selection.names()) == {f"{place[:-1]}{i}.q" for i in range(2)}


def test_a_name_that_is_longer_than_an_unselected_one_does_not_matter():
    selection = selected(TwoStacks(), "encoder.layers.*")
    longer = Selection(**{**selection.__dict__, "longer_names": ["deep.encoder.layers.0.v"]})
    assert "encoder.layers.0.v" not in longer.names()
    assert longer.lora_config(rank=2).target_modules == set(longer.names())


def test_longer_names_survive_the_file(tmp_path):
    selection = Selection(**{**selected(llama()).__dict__, "longer_names": ["x.model.layers.0.self_attn.q_proj"]})
    selection.save(tmp_path / "selection.json")
    loaded = Selection.load(tmp_path / "selection.json")
    assert loaded == selection
    assert loaded.lora_config(rank=2).target_modules == exact_pattern(selection.names())


def read_by_axolotl(text):
    """The LoraConfig that axolotl makes of its configuration: names or a pattern are passed on to PEFT."""
    read = yaml.safe_load(text)
    assert read["adapter"] == "lora" and type(read["lora_r"]) is type(read["lora_alpha"]) is int
    return LoraConfig(r=read["lora_r"], lora_alpha=read["lora_alpha"], target_modules=read["lora_target_modules"])


def read_by_llamafactory(text):
    """The LoraConfig that LLaMA-Factory makes of its configuration: names are divided at commas."""
    read = yaml.safe_load(text)
    assert read["finetuning_type"] == "lora" and type(read["lora_rank"]) is type(read["lora_alpha"]) is int
    names = [name.strip() for name in read["lora_target"].split(",")]
    return LoraConfig(r=read["lora_rank"], lora_alpha=read["lora_alpha"], target_modules=names)


READERS = {"axolotl": read_by_axolotl, "llamafactory": read_by_llamafactory}


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize("every", [2, 3, 84])
def test_a_fragment_wraps_exactly_the_selected_modules(program, every):
    selection = selected(llama(), every=every)
    text = selection.to_yaml(program, rank=4, alpha=8)
    config = READERS[program](text)
    assert (config.r, config.lora_alpha) == (4, 8)
    assert wrapped_by(config, llama()) == set(selection.names())
    assert text.startswith(f"# {len(selection.names())} of 84 modules, selected by search")


def test_a_fragment_of_two_stacks_is_a_pattern_for_axolotl_and_refused_for_llamafactory():
    model = TwoStacks()
    names = ["layers.0.q", "layers.1.q"]
    selection = Selection(
        "m", ["q"], [[name] for name in names], [["q"]] * 2, 1.0, 0, longer_names=longer_names(model, names)
    )
    assert wrapped_by(read_by_axolotl(selection.to_yaml("axolotl", rank=2)), model) == set(names)
    with pytest.raises(UserError, match="LLaMA-Factory adapts every module whose name ends with"):
        selection.to_yaml("llamafactory", rank=2)


def test_names_that_look_like_numbers_stay_names():
    selection = Selection("m", ["0", "1"], [["0.0", "0.1"], ["1.0", "1.1"]], [["0"], ["1"]], 0.5, 0)
    for program, read in READERS.items():
        assert read(selection.to_yaml(program, rank=2)).target_modules == {"0.0", "1.1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unsloth", 2), "fragments for axolotl and llamafactory, not for 'unsloth'"),
        (("axolotl", None), "rank=None must be a whole number"),
        (("axolotl", 2, 0), r"alpha=0 must be a finite number above 0"),
        (("axolotl", 2, 2.5), r"alpha=2\.5 must be a whole number"),
    ],
)
def test_a_fragment_that_cannot_be_made_says_why(arguments, message):
    with pytest.raises(UserError, match=message):
        selected(llama()).to_yaml(*arguments)


def test_a_fragment_counts_only_modules_that_are_there():
    selection = Selection("m", ["q", "v"], [["0.q", None], ["1.q", "1.v"]], [["q"], ["v"]], 0.5, 0)
    assert selection.to_yaml("axolotl", rank=2).startswith("# 2 of 3 modules")


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "16"])
def test_a_configuration_with_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(UserError, match=r"alpha=.* must be a finite number above 0"):
        selected(llama()).lora_config(rank=2, alpha=alpha)


def test_a_comma_in_a_name_is_refused_for_llamafactory():
    selection = Selection("m", ["a,b"], [["0.a,b"]], [["a,b"]], 1.0, 0)
    with pytest.raises(UserError, match="divides names at commas"):
        selection.to_yaml("llamafactory", rank=2)
    assert read_by_axolotl(selection.to_yaml("axolotl", rank=2)).target_modules == {"0.a,b"}


def test_nothing_selected_is_refused():
    empty = Selection("m", ["q"], [["0.q"]], [[]], 0.0, 0)
    for call in (lambda: empty.to_yaml("axolotl", rank=2), lambda: empty.lora_config(rank=2)):
        with pytest.raises(UserError, match="selects no module"):
            call()


def test_a_head_whose_name_ends_like_a_layers_is_refused():
    selection = selected(TwoStacks(), "encoder.layers.*")
    with pytest.raises(UserError, match=r"would train encoder\.layers\.0\.q whole, too: rename 'q'"):
        selection.lora_config(rank=2, modules_to_save=["q"])
    with pytest.raises(UserError, match="modules_to_save='head' must be a list of names"):
        selection.lora_config(rank=2, modules_to_save="head")
    assert selection.lora_config(rank=2, modules_to_save=["head"]).modules_to_save == ["head"]


def test_what_the_search_trained_and_peft_would_leave_frozen_is_named():
    found = selected(TwoStacks(), "encoder.layers.*")
    trained = ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight"]
    found = dataclasses.replace(found, config={"trained": trained})
    with pytest.warns(UserWarning, match=r"trained pooler\.dense, classifier too, which PEFT leaves frozen"):
        found.lora_config(rank=2)
    with pytest.warns(UserWarning, match=r"trained pooler\.dense too"):
        found.lora_config(rank=2, task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.lora_config(rank=2, task_type="SEQ_CLS", modules_to_save=["pooler"])
        found.lora_config(rank=2, modules_to_save=["pooler", "classifier"])
        selected(TwoStacks(), "encoder.layers.*").lora_config(rank=2)
