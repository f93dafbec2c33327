"""Every program that reads our adapters computes the same weights: each reader is written here a second time.

What the readers do, from their own sources (November 2026):

- PEFT: the library itself.
- vLLM, ``vllm/lora/peft_helper.py``, ``lora_model.py``, ``lora_weights.py``: one scale for all modules,
  ``lora_alpha / r``, with ``use_rslora`` ``lora_alpha / sqrt(r)``. Patterns are not among the fields that it reads.
  ``modules_to_save`` and DoRA are refused. A and B go into buffers of ``max_lora_rank`` rows; q, k and v (gate and up)
  are parts of one packed weight.
- TensorRT-LLM, ``tensorrt_llm/lora_manager.py``: ``lora_alpha`` by the rows of each A; until 2025 ``lora_alpha / r``,
  with an assertion that each A has r rows.
- diffusers, ``utils/peft_utils.get_peft_kwargs``: ranks from the tensors; without alphas in the file one alpha for all
  modules, the most frequent rank (earlier), or each module's own rank (now).
- llama.cpp, ``convert_lora_to_gguf.py`` and ``llama_adapter_lora_weight::get_scale``: one ``lora_alpha``, divided by
  the rank of each tensor. The converter stops at any tensor but A and B, and transposes updates of GPT-2's layers.
"""

import json
import math
from collections import Counter

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from safetensors.torch import load_file
from small import small_task
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from diffora.adapters.export import save_pairs
from diffora.adapters.forms import rewrite
from diffora.adapters.origin import Origin
from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.methods.lowrank import LowRankAdaptation
from diffora.places import conf_dir

RECORD = {"method": "x", "task": "x", "seed": 0, "params": {"adapter": 1, "head": 0}, "metrics": {"a": 0.5}}
Weights = dict[str, torch.Tensor]


# --- the readers: (configuration, tensors by module) -> update (out, in) by module ---


def pairs_in(tensors: Weights) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    names = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors if ".lora_" in key}
    return {n: tuple(tensors[f"base_model.model.{n}.lora_{m}.weight"].double() for m in "AB") for n in names}


def vllm(config: dict, tensors: Weights, max_lora_rank: int = 16) -> Weights:
    assert not config["modules_to_save"] and not config["use_dora"]
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in tensors)
    assert config["r"] <= max_lora_rank
    rows = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    found: Weights = {}
    for name, (lora_a, lora_b) in pairs_in(tensors).items():
        buffer_a = torch.zeros(max_lora_rank, lora_a.shape[1], dtype=torch.double)
        buffer_b = torch.zeros(lora_b.shape[0], max_lora_rank, dtype=torch.double)
        buffer_a[: len(lora_a)], buffer_b[:, : lora_b.shape[1]] = lora_a, lora_b * (config["lora_alpha"] / rows)
        found[name] = buffer_b @ buffer_a
    return found


def tensorrt_llm(config: dict, tensors: Weights) -> Weights:
    assert not config["use_rslora"]
    return {n: b @ a * (float(config["lora_alpha"]) / len(a)) for n, (a, b) in pairs_in(tensors).items()}


def tensorrt_llm_2024(config: dict, tensors: Weights) -> Weights:
    assert all(len(a) == config["r"] for a, _ in pairs_in(tensors).values())
    return {n: b @ a * float(config["lora_alpha"] / config["r"]) for n, (a, b) in pairs_in(tensors).items()}


def diffusers(config: dict, tensors: Weights) -> Weights:
    return {name: lora_b @ lora_a for name, (lora_a, lora_b) in pairs_in(tensors).items()}


def diffusers_2025(config: dict, tensors: Weights) -> Weights:
    alpha = Counter(len(a) for a, _ in pairs_in(tensors).values()).most_common()[0][0]
    return {name: lora_b @ lora_a * (alpha / len(lora_a)) for name, (lora_a, lora_b) in pairs_in(tensors).items()}


def llama_cpp(config: dict, tensors: Weights) -> Weights:
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in tensors)
    alpha = float(config["lora_alpha"])
    return {n: b @ a * (alpha / b.shape[1] if alpha else 1.0) for n, (a, b) in pairs_in(tensors).items()}


READERS = [vllm, tensorrt_llm, tensorrt_llm_2024, diffusers, diffusers_2025, llama_cpp]


# --- the adapters ---


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )
    return strong(model)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return strong(
        GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    )


def strong(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", ["task=dialogue", "model=tiny_llama", *overrides])


def by_method(*overrides: str, fill):
    """A model adapted by a method of the package, with weights from ``fill``, and the function that writes it."""
    model = llama()
    cfg = composed(*overrides)
    method = get_class(cfg.method._target_).from_config(cfg)
    torch.manual_seed(1)
    adaptation = method.adapt(model, find_grid(model), None, 0)
    with torch.no_grad():
        fill(model)
    return model.eval(), lambda folder: adaptation.export(folder, origin(model))


def origin(model: nn.Module) -> Origin:
    return Origin("org/base", small_task(), RECORD, {}, Backbone.of(model))


def random_b(model: nn.Module) -> None:
    for parameter in {layer.lora_bt for _, layer in lowrank_layers(model)}:
        nn.init.normal_(parameter, std=0.3)


def half_open_gates(model: nn.Module) -> None:
    random_b(model)
    for i, (_, layer) in enumerate(lowrank_layers(model)):
        layer.gate.copy_(torch.tensor([1.5, -0.5, 2.0, 0.7]) * (torch.arange(4) < 1 + i % 4))


def some_singular_values(model: nn.Module) -> None:
    layers = [m for m in model.modules() if hasattr(m, "lora_E")]
    for i, layer in enumerate(layers):
        layer.lora_E["default"].copy_((30 * torch.randn(4) * (torch.arange(4) < i % 5)).reshape(-1, 1))


def peft_b(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)


def own_and_shared(model: nn.Module):
    """Own pairs of rank 3 and shared ones of rank 2, with scales that are no powers of two."""
    grid = find_grid(model)
    torch.manual_seed(1)
    attach(model, grid.names, torch.rand(grid.n_layers, grid.n_types) < 0.4, rank=3, shared_rank=2, alpha=5)
    with torch.no_grad():
        random_b(model)
    return model.eval(), lambda folder: LowRankAdaptation(model).export(folder, origin(model))


CASES = {
    "diffora": lambda: own_and_shared(llama()),
    "conv1d": lambda: own_and_shared(gpt2()),
    "rm_lora": lambda: by_method("method=rm_lora", "rank=6", "method.alpha=16", fill=random_b),
    "sora": lambda: by_method("method=sora", "rank=4", fill=half_open_gates),
    "adalora": lambda: by_method("method=adalora", "rank=2", "method.init_rank=4", fill=some_singular_values),
    "rslora": lambda: by_method("method=rslora", "rank=3", fill=peft_b),
    "pissa": lambda: by_method("method=pissa", "rank=2", fill=peft_b),
}
FRESH = {"conv1d": gpt2}


@pytest.fixture(scope="module", params=CASES)
def adapter(request, tmp_path_factory):
    """(logits of the model in memory, a function that makes the base model, the folder of its adapter)."""
    model, write = CASES[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    write(folder)
    return logits_of(model), FRESH.get(request.param, llama), folder / "adapter"


def logits_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def read_with(reader, model: nn.Module, folder) -> nn.Module:
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, delta in reader(config, load_file(folder / "adapter_model.safetensors")).items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.double() + (delta.T if config["fan_in_fan_out"] else delta)).float()
    return model


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_server_gets_the_logits_of_the_model_in_memory(reader, adapter):
    expected, fresh, folder = adapter
    effect = off_by(logits_of(fresh()), expected)
    assert effect > 0.5
    assert off_by(logits_of(read_with(reader, fresh(), folder)), expected) < 1e-5 * max(1.0, effect)


def test_peft_and_our_loader_get_them_from_both_forms(adapter, tmp_path):
    from peft import PeftModel

    expected, fresh, folder = adapter
    for form in ("uniform", "compact"):
        rewrite(folder, tmp_path / form, form)
        ours = fresh()
        load_adapter(ours, tmp_path / form)
        assert off_by(logits_of(ours.eval()), expected) < 2e-5
        theirs = PeftModel.from_pretrained(fresh(), tmp_path / form).eval()
        assert off_by(logits_of(theirs), expected) < 2e-5


def test_the_compact_form_is_read_wrongly_by_others(tmp_path):
    """This is why it is not the default, and it shows that the tests above can fail."""
    model, write = CASES["diffora"]()
    for _, layer in lowrank_layers(model):
        layer.scaling = 4.0 if layer.rank == 3 else layer.scaling  # another alpha than that of the shared pairs
    write(tmp_path)
    rewrite(tmp_path / "adapter", tmp_path / "compact", "compact")
    for reader in (vllm, tensorrt_llm, diffusers, llama_cpp):
        assert off_by(logits_of(read_with(reader, llama(), tmp_path / "compact")), logits_of(model)) > 0.1


@pytest.mark.parametrize("adapter", [case for case in CASES if case != "conv1d"], indirect=True)
def test_packed_weights_of_vllm(adapter):
    """q, k and v are one weight in vLLM: the parts are written below each other, and a missing one stays zero."""
    expected, fresh, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    updates = vllm(config, load_file(folder / "adapter_model.safetensors"))
    model = fresh()
    for i, layer in enumerate(model.model.layers):
        packed = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
        for block, parts in packed.items():
            modules = [getattr(getattr(layer, block), part) for part in parts]
            deltas = [
                updates.get(f"model.layers.{i}.{block}.{part}", torch.zeros(m.weight.shape, dtype=torch.double))
                for part, m in zip(parts, modules, strict=True)
            ]
            whole = torch.cat([m.weight for m in modules]).double() + torch.cat(deltas)
            for module, rows in zip(modules, whole.split([len(m.weight) for m in modules]), strict=True):
                module.weight.data = rows.float()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            if (delta := updates.get(f"model.layers.{i}.{name}")) is not None:
                layer.get_submodule(name).weight.data += delta.float()
    assert off_by(logits_of(model), expected) < 1e-4


def test_an_update_of_rank_zero_everywhere_is_still_an_adapter(tmp_path):
    from peft import PeftModel

    model = llama()
    pairs = [("model.layers.0.mlp.up_proj", torch.zeros(0, 32), torch.zeros(0, 48), 1.0)]
    save_pairs(tmp_path, Backbone.of(model), pairs)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert off_by(logits_of(loaded), logits_of(model)) == 0
