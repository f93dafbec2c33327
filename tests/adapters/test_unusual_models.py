"""Saving, loading and merging on models that are tied, compiled, moved away, or adapted by PEFT in other ways."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import logits
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small import small_deberta
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import diffora
from diffora.adapters.start import Start
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.files import json_digest

IDS = torch.arange(12).reshape(2, 6)
QUERY = "model.layers.0.self_attn.q_proj"
LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
BART = BartConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(LLAMA)).eval()  # merging changes the configuration


@torch.no_grad()
def said(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def adapted(model: nn.Module, name: str = QUERY) -> nn.Module:
    """The model, with a low-rank layer at one place. B is not zero."""
    attach(model, [[name]], torch.tensor([[True]]), 2, None, 4.0)
    torch.manual_seed(1)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    return model


def saved_by_peft(folder: Path, **more) -> torch.Tensor:
    """Save a LoRA of PEFT with random values; returns its logits."""
    torch.manual_seed(2)
    model = get_peft_model(llama(), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **more)).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return said(model)


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- merging ---


def test_merging_an_update_of_tied_output_embeddings_leaves_the_input_embeddings(tmp_path):
    expected = saved_by_peft(tmp_path, target_modules=["q_proj", "lm_head"])
    model = llama()
    before = model.get_input_embeddings().weight.detach().clone()
    diffora.load_adapter(model, tmp_path)
    assert_close(said(model), expected)
    diffora.merge_updates(model)
    assert_close(said(model), expected)
    assert torch.equal(model.get_input_embeddings().weight, before) and not model.config.tie_word_embeddings


def test_tuned_norms_are_merged(tmp_path):
    torch.manual_seed(0)
    peft = get_peft_model(
        small_deberta(), LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["pooler", "classifier"])
    )
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and "LayerNorm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    peft.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = small_deberta()
    plain = logits(model)
    diffora.load_adapter(model, tmp_path)
    expected = logits(model)
    diffora.merge_updates(model)
    torch.testing.assert_close(logits(model), expected)
    assert (expected - plain).abs().max() > 1e-3


def test_a_merged_model_with_several_tied_embeddings_loads_again(tmp_path):
    torch.manual_seed(0)
    model = adapted(BartForConditionalGeneration(copy.deepcopy(BART)).eval(), "lm_head")
    expected = said(model)
    diffora.merge_updates(model)
    assert_close(said(model), expected)
    model.save_pretrained(tmp_path)
    assert_close(said(BartForConditionalGeneration.from_pretrained(tmp_path).eval()), expected)


def test_wrappers_do_not_stop_a_merge():
    model = adapted(llama())
    expected = said(model)
    diffora.merge_updates(torch.compile(model))
    assert_close(said(model), expected)
    assert not list(lowrank_layers(model))
    with pytest.raises(UserError, match="its own merge_and_unload"):
        diffora.merge_updates(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))


class Own(LlamaForCausalLM):
    """A class that needs more than a configuration."""

    def __init__(self, config: LlamaConfig, extra: int) -> None:
        super().__init__(config)
        self.extra = extra


def test_a_model_of_a_class_with_further_arguments_is_merged():
    torch.manual_seed(0)
    model = adapted(Own(copy.deepcopy(LLAMA), 3).eval())
    expected = said(model)
    diffora.merge_updates(model)
    assert_close(said(model), expected)


# --- loading and saving ---


class Two(nn.Module):
    """Two layers to adapt, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.h1, self.h2 = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enc[1](self.enc[0](x).tanh()).tanh()
        return self.h1(x) + self.h2(x)


def test_a_second_adapter_does_not_forget_the_head_of_the_first(tmp_path):
    x = torch.randn(3, 6)
    for number, head in enumerate(("h1", "h2")):
        model = adapted(Two(), f"enc.{number}")
        nn.init.normal_(model.get_submodule(head).requires_grad_(True).weight)
        diffora.save_adapter(model, tmp_path / head)
    both, again = Two(), Two()
    diffora.load_adapter(both, tmp_path / "h1")
    diffora.load_adapter(both, tmp_path / "h2")
    diffora.save_adapter(both, tmp_path / "both")
    diffora.load_adapter(again, tmp_path / "both")
    assert torch.equal(again(x), both(x))


def test_a_model_without_values_takes_no_adapter(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    saved_by_peft(tmp_path, target_modules=["q_proj"])
    model = llama()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UserError, match="has no values on its device"):
        diffora.load_adapter(model, tmp_path)
    model = adapted(llama())
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UserError, match="has no values on its device"):
        diffora.merge_updates(model)


def test_layers_that_are_compiled_one_by_one_are_saved_by_their_own_names(tmp_path):
    model = adapted(llama())
    expected = said(model)
    compiled = model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    diffora.save_adapter(model, tmp_path)
    assert model.model.layers[0] is compiled
    again = llama()
    diffora.load_adapter(again, tmp_path)
    assert_close(said(again), expected)
    assert_close(said(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_compiled_parts_inside_compiled_parts_and_in_two_places(tmp_path):
    model = adapted(llama())
    expected, layers = said(model), model.model.layers
    layers[0].self_attn = torch.compile(layers[0].self_attn, backend="eager")
    layers[0] = torch.compile(layers[0], backend="eager")
    outer, inner = layers[0], layers[0]._orig_mod.self_attn
    diffora.save_adapter(model, tmp_path)
    assert layers[0] is outer and outer._orig_mod.self_attn is inner
    again = llama()
    diffora.load_adapter(again, tmp_path)
    assert_close(said(again), expected)


def test_a_model_of_which_other_parts_are_elsewhere_takes_an_adapter(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    diffora.save_adapter(adapted(llama()), tmp_path / "adapter")
    model = llama()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "disk"))
    diffora.load_adapter(model, tmp_path / "adapter")
    assert_close(said(model), said(adapted(llama())))
    other = "model.layers.1.self_attn.q_proj"
    diffora.save_adapter(adapted(llama(), other), tmp_path / "other")
    with pytest.raises(UserError, match="has no values on its device"):
        diffora.load_adapter(model, tmp_path / "other")


def test_an_adapter_may_replace_one_of_another_method(tmp_path):
    (tmp_path / "diffora.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_bytes(b"of BitFit")
    model, again = adapted(llama()), llama()
    diffora.save_adapter(model, tmp_path)
    diffora.load_adapter(again, tmp_path)
    assert_close(said(again), said(model))


def test_weights_of_modules_that_the_configuration_does_not_name_are_refused(tmp_path):
    saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=r"no place for .*v_proj"):
        diffora.load_adapter(llama(), tmp_path)


# --- going on from an adapter ---


def test_training_does_not_go_on_from_embeddings_that_are_tied_here_and_were_not_there(tmp_path):
    expected = saved_by_peft(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = llama()
    diffora.load_adapter(model, tmp_path)
    assert_close(said(model), expected)
    with pytest.raises(UserError, match=r"has model\.embed_tokens\.weight whole, and in this model lm_head\.weight is"):
        Start.read(str(tmp_path)).put_on(llama().requires_grad_(False), 0.0)
    for saved in (["lm_head"], ["embed_tokens", "lm_head"]):
        saved_by_peft(tmp_path, target_modules=["q_proj"], modules_to_save=saved)
        with pytest.raises(UserError, match="is the same tensor, which has other values with the adapter"):
            Start.read(str(tmp_path)).put_on(llama().requires_grad_(False), 0.0)


def test_training_does_not_take_the_selection_of_another_adapter(tmp_path, finished):
    diffora.save_adapter(adapted(llama()), tmp_path)
    (tmp_path / "selection.json").write_text((finished / "selection.json").read_text())
    grid = find_grid(llama(), "model.layers.*", ["self_attn.q_proj", "self_attn.v_proj"])
    found = Start.read(str(tmp_path)).selection(grid, method="diffora", rho=0.5, seed=0)
    assert found.names() == [QUERY]


# --- files that somebody edited ---


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank_pattern", [1], r"rank_pattern=.* must be numbers above 0"),
        ("rank_pattern", {"((": 3}, r"'\(\(' is no regular expression"),
        ("rank_pattern", {"q_proj": 0}, r"rank_pattern=.* must be numbers above 0"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern=.* must be numbers above 0"),
        ("lora_alpha", float("nan"), r"lora_alpha=nan must be"),
    ],
)
def test_odd_numbers_in_the_configuration_of_peft_are_named(tmp_path, key, value, message):
    saved_by_peft(tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message):
        Start.read(str(tmp_path))
    if key == "lora_alpha":
        with pytest.raises(UserError, match=message):
            diffora.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_pairs_of_another_type_are_refused(tmp_path, dtype):
    saved_by_peft(tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: value.to(dtype) for name, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"A or B of .*q_proj is of type {dtype}"):
        Start.read(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"), [("backbone", "x"), ("model", ["x"]), ("labels", [1, 2]), ("layers", "2"), ("arguments", [])]
)
def test_odd_facts_in_a_manifest_are_named(tmp_path, key, value):
    diffora.save_adapter(adapted(llama()), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {key: value}
    del manifest["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"sha256": json_digest(manifest)}))
    with pytest.raises(UserError, match=f"{key}=.* must be"):
        diffora.load_adapter(llama(), tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match="is not the manifest of an adapter"):
        Start.read(str(tmp_path))
