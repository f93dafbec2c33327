"""An exported adapter gives the outputs of the model in memory. The adapters of the tests are not zero."""

import copy
import json
import random
import re
import shutil

import pytest
import torch
from conftest import TYPES, batch_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from safetensors.torch import load_file, save_file
from small import small_deberta, small_task
from torch import nn
from transformers import AutoModelForSequenceClassification

import diffora
from diffora.adapters.load import load_onto
from diffora.adapters.manifest import write_manifest
from diffora.adapters.origin import Origin
from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.backbones.load import load_backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.linear import is_linear
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.methods.lowrank import LowRankAdaptation
from diffora.places import conf_dir
from diffora.settings.identity import plain
from diffora.settings.read import model_of
from diffora.tasks.base import get_task


def compose_cfg(*overrides: str):
    """Like the fixture ``cfg``, for fixtures of module scope."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


LAYER = "deberta.encoder.layer"
MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])
RECORD = {"method": "diffora", "task": "mrpc", "seed": 0, "params": {"adapter": 1, "head": 1}, "metrics": {"a": 0.5}}


def origin_of(model: nn.Module, base_model: str = "base", config: dict | None = None, **record) -> Origin:
    backbone = Backbone.of(model, arguments={"num_labels": 2})
    return Origin(base_model, small_task(), RECORD | record, config or {}, backbone)


def inputs():
    return {key: value for key, value in batch_of(5).items() if key in ("input_ids", "attention_mask")}


@pytest.fixture
def trained(deberta, tmp_path):
    """A base model saved to disk, and the same model with shared and own pairs, none of them zero."""
    model = deberta()
    model.save_pretrained(tmp_path / "base")
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, MASK, rank=3, shared_rank=2, alpha=8, dropout=0.1)
    for parameter in {p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)}:
        nn.init.normal_(parameter, std=0.5)
    for parameter in (*model.classifier.parameters(), *model.pooler.parameters()):
        nn.init.normal_(parameter, std=0.5)
    origin = origin_of(model, str(tmp_path / "base"))
    LowRankAdaptation(model).export(tmp_path, origin)
    return model.eval(), tmp_path


def test_peft_loads_the_adapter_with_the_same_logits(trained):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, folder = trained
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base.eval()(**inputs()).logits
        loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
        expected = model(**inputs()).logits
        assert (expected - plain).abs().max() > 0.5
        torch.testing.assert_close(loaded(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


# --- B6: programs that read rank and scale in different ways ---

READERS = {
    "vLLM, TensorRT-LLM, diffusers": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
    "PEFT": lambda config, rank: config["lora_alpha"] / config["r"],  # without patterns, which are checked to be empty
}


def read_as(scale, model: nn.Module, folder) -> nn.Module:
    """Merge an adapter in the way of a program with its own rule for the scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["r"] == config["lora_alpha"] and isinstance(config["r"], int)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in config["target_modules"]:
        lora_a, lora_b = (tensors.pop(f"base_model.model.{name}.lora_{m}.weight") for m in "AB")
        assert lora_a.shape[0] == lora_b.shape[1] == config["r"]  # one rank, as a server's buffers want it
        weight = model.get_submodule(name).weight
        weight.data += scale(config, lora_a.shape[0]) * lora_b @ lora_a
    names = {key.removeprefix("base_model.model.") for key in tensors}
    assert all(name.startswith(tuple(config["modules_to_save"] or ())) for name in names)
    model.load_state_dict({key.removeprefix("base_model.model."): t for key, t in tensors.items()}, strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def dialogue_adapter(tmp_path_factory):
    """Case B6: ranks 3 and 2 with scales 8/3 and 4 on the embedded Llama, for dialogue. No head is trained."""
    folder = tmp_path_factory.mktemp("dialogue")
    composed = compose_cfg("method=diffora", "task=dialogue", "model=tiny_llama")
    task = get_task(composed.task)
    load = lambda: load_backbone(model_of(composed.model), task.model_request())  # noqa: E731
    backbone = load()
    model = backbone.model
    grid = find_grid(model)
    torch.manual_seed(0)
    selected = torch.rand(grid.n_layers, grid.n_types) < 0.4
    attach(model, grid.names, selected, rank=3, shared_rank=2, alpha=8, freeze=False)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt, std=0.1)
    LowRankAdaptation(model).export(folder, Origin("some/model", task, RECORD, {}, backbone))
    return model.eval(), lambda: load().model.eval(), folder / "adapter"


def logits_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("reader", READERS)
def test_every_program_reads_the_same_adapter(reader, dialogue_adapter):
    """B6: logits were wrong by 2.66; the whole effect of the adapter is 9.38."""
    model, fresh, folder = dialogue_adapter
    expected = logits_of(model)
    assert (logits_of(fresh()) - expected).abs().max() > 1
    torch.testing.assert_close(logits_of(read_as(READERS[reader], fresh(), folder)), expected, rtol=1e-3, atol=1e-3)


def test_peft_and_our_own_loader_read_it_too(dialogue_adapter):
    from peft import PeftModel

    model, fresh, folder = dialogue_adapter
    ours = fresh()
    load_adapter(ours, folder)
    torch.testing.assert_close(logits_of(ours.eval()), logits_of(model), rtol=1e-4, atol=1e-4)
    theirs = PeftModel.from_pretrained(fresh(), folder)
    torch.testing.assert_close(logits_of(theirs.eval()), logits_of(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reader", READERS)
def test_adapters_with_a_head_and_closed_gates_are_read_alike(reader, deberta, tmp_path):
    model, base = deberta(), deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank=3, shared_rank=None, alpha=5)
    for i, (_, layer) in enumerate(lowrank_layers(model)):
        nn.init.normal_(layer.lora_bt, std=0.5)
        layer.gate = nn.Parameter(torch.tensor([0.0, 1.5, -0.5]) * (i > 1) + torch.tensor([0.0, 0.0, 2.0]) * (i == 1))
    nn.init.normal_(model.classifier.weight, std=0.5)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    read = read_as(READERS[reader], base, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        torch.testing.assert_close(read(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


# --- our own loader ---


def steps(model: nn.Module, n: int = 3) -> None:
    """Training steps with dropout, the same for every model."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(n):
        batch = {key: value for key, value in batch_of(6, seed=seed).items() if key != "row"}
        model.train()(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("alpha", [8, 6.5, 12])
def test_training_from_a_loaded_adapter_continues_bit_for_bit(alpha, deberta, tmp_path):
    """Scales 8/3, 13/6, 4, 3.25 and 6 are multiplied into B for other programs. Our loader must restore B exactly."""
    model = deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, 3, shared_rank=2, alpha=alpha, dropout=0.1)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt, std=0.5)
    steps(model)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    again = deberta()
    load_adapter(again, tmp_path / "adapter")
    for turn in range(2):
        layers, loaded = dict(lowrank_layers(model)), dict(lowrank_layers(again))
        assert layers.keys() == loaded.keys()
        for name, layer in layers.items():
            other = loaded[name]
            assert torch.equal(layer.lora_a, other.lora_a) and torch.equal(layer.lora_bt, other.lora_bt)
            assert (layer.rank, layer.scaling, layer.dropout) == (other.rank, other.scaling, other.dropout)
        steps(model)
        steps(again)
        assert turn or not torch.equal(layer.lora_bt, torch.zeros_like(layer.lora_bt))


@pytest.mark.parametrize(("rank", "alpha", "rounds"), [(4, 8, False), (4, 2, False), (3, 8, True)])
def test_a_second_copy_of_b_is_written_only_if_scaling_rounds(rank, alpha, rounds, deberta, tmp_path):
    model = deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank, shared_rank=2, alpha=alpha)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    assert (tmp_path / "adapter" / "exact.safetensors").is_file() == rounds


def test_only_the_adapter_of_a_loaded_model_is_trainable(trained, deberta):
    """B16"""
    _, folder = trained
    for freeze in (True, False):
        fresh = deberta()  # with a trainable head
        load_adapter(fresh, folder / "adapter", freeze=freeze)
        rest = {name.split(".")[0] for name, p in fresh.named_parameters() if p.requires_grad and "lora_" not in name}
        assert rest == (set() if freeze else {"pooler", "classifier"})
        assert all(p.requires_grad for _, layer in lowrank_layers(fresh) for p in (layer.lora_a, layer.lora_bt))


def test_our_loader_restores_the_logits_and_the_sharing(trained, deberta):
    model, folder = trained
    fresh = deberta()
    load_adapter(fresh, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(**inputs()).logits, model(**inputs()).logits, rtol=1e-5, atol=1e-5)
    layers = dict(lowrank_layers(model))
    tied = {frozenset(a for a in layers if layers[a].lora_a is layers[b].lora_a) for b in layers}
    again = dict(lowrank_layers(fresh))
    assert {frozenset(a for a in again if again[a].lora_a is again[b].lora_a) for b in again} == tied
    assert sorted(len(group) for group in tied) == [1] * 8 + [2] * 2


def test_trained_biases_of_adapted_modules_are_refused(tmp_path):
    """No reader would find them: PEFT would pass over them without a word."""
    from library import bert, texts

    model = bert()
    selection = diffora.search(model, texts()[:2], texts()[2:], rounds=1, progress=False)
    diffora.attach(model, selection, rank=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("query.base.bias"))
    with pytest.raises(UserError, match=r"query.* has trainable parameters beside its low-rank layers"):
        diffora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_another_model_is_refused(trained, deberta):
    _, folder = trained
    with pytest.raises(UserError, match="was trained on 2 layers, and this model has 1"):
        load_adapter(deberta(layers=1), folder / "adapter")


def test_a_module_in_two_places_is_loaded_into_both_and_a_warning_names_both(deberta, tmp_path, caplog):
    def shared() -> nn.Module:
        model = deberta()
        first, second = model.deberta.encoder.layer
        second.output.dense = first.output.dense
        return model

    model, again = shared(), shared()
    attach(model, [[f"{LAYER}.0.output.dense"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    nn.init.normal_(model.get_submodule(f"{LAYER}.1.output.dense").lora_bt)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    assert f"{LAYER}.0.output.dense stands at {LAYER}.1.output.dense too" in caplog.text
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        torch.testing.assert_close(again.eval()(**inputs()).logits, expected)
        assert (shared().eval()(**inputs()).logits - expected).abs().max() > 0.1


def test_the_class_names_of_a_users_own_model_are_saved_and_compared(deberta, tmp_path):
    model, other = deberta(), deberta()
    model.config.id2label, other.config.id2label = {0: "a", 1: "b"}, {0: "b", 1: "a"}
    diffora.attach(model, diffora.select(model, "random", k=1), rank=2)
    diffora.save_adapter(model, tmp_path)
    with pytest.raises(UserError, match=r"was trained on the classes a, b \(2\), in this order; the model's are b, a"):
        load_adapter(other, tmp_path)
    unnamed = deberta()
    load_adapter(unnamed, tmp_path)
    assert unnamed.config.id2label == {0: "a", 1: "b"}


class ReadsWeight(nn.Module):
    """Computes with the weight of a layer, as WavLM and nn.TransformerEncoderLayer do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Called(ReadsWeight):
    def forward(self, x):
        return x + self.fc(x)


def test_a_warning_names_what_peft_would_read_in_another_way(tmp_path, caplog):
    def saved(name, *blocks, **parts):
        model = nn.ModuleDict({"blocks": nn.Sequential(*blocks), **parts})
        names = [n for n, part in model["blocks"].named_modules(prefix="blocks") if is_linear(part)][:1]
        attach(model, [names], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
        for part in parts.values():
            part.requires_grad_(True)
        model["blocks"](torch.ones(1, 3, 4))
        caplog.clear()
        diffora.save_adapter(model, tmp_path / name)
        return caplog.text

    assert "PEFT" not in saved("called", Called(), head=nn.Linear(4, 2))
    assert "reads the weight of blocks.0.fc instead of calling it" in saved("read", ReadsWeight())
    assert "takes blocks.0.fc for fc, which is saved whole" in saved("ends", Called(), Called(), fc=nn.Linear(4, 2))
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    assert "fast path for nn.TransformerEncoderLayer reads the weight of blocks.0.linear1" in saved("fast", encoder)


class Own(nn.Module):
    """A module that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def test_a_users_own_module_can_load_an_adapter(tmp_path):
    """It has no head, so the adapter has none either."""
    model, x = Own(), torch.randn(4, 6)
    assert Backbone.of(model).head == ()
    plain = model(x)
    attach(model, find_grid(model, ".", ["layers.0", "layers.2"]).names, torch.tensor([[True, True]]), 2, None, alpha=4)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    again = Own()
    load_adapter(again, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
        assert (again(x) - plain).abs().max() > 0.01
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        f"layers.{i}.{part}" for i in (0, 2) for part in ("lora_a", "lora_bt")
    }


# --- damaged and strange files ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Adapters of the three formats: low-rank pairs, trained weights, and PEFT's own."""
    from diffora.methods.bitfit import BitFit

    folders = {}
    for kind in ("pairs", "weights", "peft"):
        model, folder = small_deberta(), tmp_path_factory.mktemp(kind)
        grid = find_grid(model, "encoder.layer.*", TYPES)
        composed = compose_cfg(f"method={'vera' if kind == 'peft' else 'bitfit'}", "task=mrpc", "model=deberta_v3_base")
        origin = origin_of(model, config=plain(composed), selection=None)
        if kind == "pairs":
            attach(model, grid.names, MASK, rank=3, shared_rank=2, alpha=8, freeze=False)
            for _, layer in lowrank_layers(model):
                nn.init.normal_(layer.lora_bt)
            LowRankAdaptation(model).export(folder, origin)
        else:
            method = BitFit() if kind == "weights" else get_class(composed.method._target_).from_config(composed)
            method.adapt(model, grid, None, 0).export(folder, origin)
        folders[kind] = folder / "adapter"
        load_adapter(small_deberta(), folders[kind])
    return folders


FILES = {
    "pairs": ["adapter_config.json", "adapter_model.safetensors", "exact.safetensors", "manifest.json"],
    "weights": ["diffora.json", "weights.safetensors", "manifest.json"],
    "peft": ["adapter_config.json", "adapter_model.safetensors", "manifest.json"],
}


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 1 << (at % 7)


def zero(content: bytearray, at: int) -> None:
    content[at : at + 40] = bytes(len(content[at : at + 40]))


def cut(content: bytearray, at: int) -> None:
    del content[at:]


@pytest.mark.parametrize("damage", [flip, zero, cut])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_damage_in_any_file_gives_one_message(kind, name, damage, exported, tmp_path):
    """Before, one flipped bit in a weight, a scale or a name was loaded, and other damage gave a traceback."""
    folder = shutil.copytree(exported[kind], tmp_path / "a")
    whole = (folder / name).read_bytes()
    generator = random.Random(f"{kind}{name}{damage.__name__}")
    undamaged = small_deberta()
    load_adapter(undamaged, folder)
    for at in [0, len(whole) - 3, *(generator.randrange(len(whole)) for _ in range(6))]:
        content = bytearray(whole)
        damage(content, at)
        if content == whole:
            continue
        (folder / name).write_bytes(content)
        model = small_deberta()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if _relevant(content) is not None and _relevant(content) == _relevant(whole):
            load_adapter(model, folder)  # white space, or the name of the base model, which may be changed
            continue
        with pytest.raises(UserError) as error:
            load_adapter(model, folder)
        assert len(error.value.problems) == 1 and name in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _relevant(content: bytes) -> dict | None:
    """The content of a JSON file that matters; None for other files."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return {key: value for key, value in found.items() if key not in ("base_model_name_or_path", "base_model")}


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, names in FILES.items() for n in names if n != "manifest.json"]
)
def test_a_missing_file_is_named(kind, name, exported, tmp_path):
    folder = shutil.copytree(exported[kind], tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(UserError) as error:
        load_adapter(small_deberta(), folder)
    assert name in str(error.value)


def test_the_base_model_may_be_renamed(exported, tmp_path):
    """Users who publish an adapter must do this."""
    for kind, name in (("pairs", "adapter_config.json"), ("weights", "diffora.json"), ("peft", "adapter_config.json")):
        folder = shutil.copytree(exported[kind], tmp_path / kind)
        content = json.loads((folder / name).read_text())
        key = "base_model" if kind == "weights" else "base_model_name_or_path"
        assert key in content
        (folder / name).write_text(json.dumps(content | {key: "org/other"}))
        load_adapter(small_deberta(), folder)


@pytest.mark.parametrize("kind", ["pairs", "weights", "peft"])
def test_what_is_trained_besides_an_adapter_stays_as_it_was_without_freeze(kind, exported):
    model = small_deberta()
    model.classifier.requires_grad_(False)
    embeddings = model.deberta.embeddings.word_embeddings.weight.requires_grad_(True)
    bias = model.deberta.encoder.layer[0].output.dense.bias.requires_grad_(False)
    load_adapter(model, exported[kind], freeze=False)
    assert embeddings.requires_grad and not any(p.requires_grad for p in model.classifier.parameters())
    headed = small_deberta()
    load_adapter(headed, exported[kind], freeze=False)
    head = {name for name, p in headed.named_parameters() if p.requires_grad and "classifier" in name}
    assert head and not any("original_module" in name for name in head)  # PEFT keeps the old head, which is not used
    assert bias.requires_grad == (kind == "weights")  # BitFit's adapter is the biases
    frozen = small_deberta()
    load_adapter(frozen, exported[kind])
    assert not frozen.deberta.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("kind", ["pairs", "weights", "peft"])
def test_everything_but_the_adapter_is_frozen_even_if_it_was_trainable(kind, exported):
    model = small_deberta().requires_grad_(True)
    load_adapter(model, exported[kind])
    ends = {"pairs": ("lora_a", "lora_bt"), "weights": ("bias",), "peft": ()}[kind]  # PEFT loads it for inference
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert bool(trainable) == bool(ends) and all(name.startswith("deberta.") for name in trainable)
    assert {name.rpartition(".")[2] for name in trainable} == set(ends)


def test_a_method_draws_the_same_numbers_when_its_adapter_is_loaded_as_in_the_run(exported):
    """What it draws and never trains is not in the file."""
    from diffora.methods.bitfit import BitFit

    drawn, seeds = [], []

    class Draws(BitFit):
        def adapt(self, model, grid, selection, seed):
            drawn.append(torch.rand(3))
            return super().adapt(model, grid, selection, seed)

    def method_of(cfg, file):
        seeds.append(cfg.seed)
        return Draws()

    for before in (5, 6):
        model = small_deberta()
        torch.manual_seed(before)
        load_onto(Backbone.of(model), exported["weights"], method_of)
    torch.manual_seed(seeds[0])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], torch.rand(3))


@pytest.mark.parametrize("kind", ["pairs", "weights"])
def test_loading_leaves_the_random_numbers_of_the_caller(kind, exported):
    drawn = []
    for loads in (False, True):
        model = small_deberta()
        torch.manual_seed(5)
        if loads:
            load_adapter(model, exported[kind])
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


OWN, SHARED, OTHER = (f"{LAYER}.{place}" for place in ("0.output.dense", f"0.{TYPES[1]}", "1.intermediate.dense"))


def changed(content: dict, path: str, value) -> None:
    *above, last = path.split("/")
    for key in above:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modules", [1], "modules must be"),
        ("modules", {}, "modules must be"),
        (f"modules/{OWN}", 3, "rank=None must be a whole number"),
        (f"modules/{OWN}/rank", None, "rank=None must be a whole number"),
        (f"modules/{OWN}/rank", 0, "rank=0 must be"),
        (f"modules/{OWN}/rank", True, "rank=True must be"),
        (f"modules/{OWN}/rank", 10**12, "must have 1000000000000 rows"),
        (f"modules/{OWN}/rank", 1, "not zero beyond its rank 1"),
        (f"modules/{OWN}/scale", 0, "scale=0 must be a number above 0"),
        (f"modules/{OWN}/scale", -1.0, "scale=-1.0 must be"),
        (f"modules/{OWN}/scale", "8", "scale='8' must be"),
        (f"modules/{OWN}/scale", float("nan"), "scale=nan must be"),
        (f"modules/{OWN}/scale", 3.0, "is another one in exact.safetensors"),
        (f"modules/{OWN}/dropout", 1, "dropout=1 must be a rate"),
        (f"modules/{OWN}", None, "lora_A.weight (and 1 more), which manifest.json does not name"),
        ("modules/nope", {"rank": 3, "scale": 1.0, "dropout": 0.0}, "no A and B for nope"),
        ("shared", None, "shared=None must be a list"),
        ("shared", ["ab"], "must be a list of lists"),
        ("shared", [[]], "must be a list of lists"),
        ("shared", [["nope", OWN]], "shared names nope, which is not in modules"),
        ("shared", [[SHARED, OTHER], [OTHER]], "twice"),
        ("shared", [[OWN, SHARED]], "share a pair, but not its rank"),
        ("shared", [[f"{LAYER}.0.{TYPES[0]}", OWN]], "share a pair in manifest.json, but their A and B differ"),
        ("heads", "classifier", "heads='classifier' must be a list"),
        ("heads", ["pooler"], "it has base_model.model.classifier"),
        ("heads", ["pooler", "classifier", "deberta.embeddings"], "embeddings.LayerNorm.bias is missing in the file"),
        (f"modules/{OWN}/scale", 10**400, "must be a number above 0"),
        (f"modules/{OWN}/scale", 1e-300, "must be a number above 0"),
        ("labels", "ab", "labels='ab' must be a list"),
        ("files", {"a\0.b": "0"}, "no digests of files beside it"),
        ("heads", ["pooler", "classifier", "nope"], "does not fit this model, which has no nope"),
        ("files", {"../../x": "0"}, "no digests of files beside it"),
        ("files", [], "no digests of files beside it"),
        ("labels", ["b", "a", "c"], "was trained on the classes b, a, c"),
    ],
)  # fmt: skip
def test_impossible_values_in_a_manifest_are_refused(path, value, said, exported, tmp_path):
    """The digests are right, as in a manifest that was forged carefully."""
    folder = shutil.copytree(exported["pairs"], tmp_path / "a")
    content = json.loads((folder / "manifest.json").read_text())
    files = content.pop("files")
    del content["sha256"]
    if path == "files":
        content = content | {"files": value}
        (folder / "manifest.json").write_text(json.dumps(content))
    else:
        changed(content, path, value)
        write_manifest(folder, files, content)
    model = small_deberta()
    model.config.id2label = {0: "a", 1: "b"}
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    assert said in str(error.value)
    assert not list(lowrank_layers(model))


def test_a_head_of_another_size_is_refused_and_nothing_is_changed(exported):
    """MRPC's adapter on a model for three classes. Its pooler would fit and must not be loaded either."""
    model = small_deberta()
    model.classifier = nn.Linear(16, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"classifier\.weight is \(2, 16\) in the file and \(3, 16\) in the model"):
        load_adapter(model, str(exported["pairs"]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not list(lowrank_layers(model))


def test_a_second_adapter_on_the_same_model_is_refused(exported):
    model = small_deberta()
    load_adapter(model, exported["pairs"])
    with pytest.raises(UserError, match="has low-rank layers already"):
        load_adapter(model, exported["pairs"])


def test_adapters_of_earlier_versions_are_named_as_such(exported, tmp_path):
    for kind, said in (
        ("pairs", r"earlier version of this project \(sharing\.json\)"),
        ("weights", "earlier versions"),
    ):
        folder = shutil.copytree(exported[kind], tmp_path / kind)
        (folder / "manifest.json").unlink()
        (folder / "sharing.json").write_text("[]")
        with pytest.raises(UserError, match=said):
            load_adapter(small_deberta(), folder)


# --- what plain PEFT wrote ---


@pytest.fixture
def plain_peft(deberta, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        target_modules=["query_proj", "output.dense"],
        modules_to_save=["pooler", "classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(deberta(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


def test_an_adapter_without_a_manifest_counts_as_one_of_peft(plain_peft, deberta):
    model, folder = plain_peft
    assert not (folder / "manifest.json").exists()
    again = deberta()
    load_adapter(again, folder)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs()).logits, model.eval()(**inputs()).logits)


def test_missing_tensors_that_peft_would_ignore_are_refused(plain_peft, deberta):
    """PEFT gives a warning for the first tensor and none for the second."""
    _, folder = plain_peft
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(key for key in tensors if "lora_A" in key)
    save_file({key: t for key, t in tensors.items() if key != first}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"does not fit this model: no {re.escape(first)}"):
        load_adapter(deberta(), folder)
    more = {key.replace("layer.1", "layer.7"): t.clone() for key, t in tensors.items()}
    save_file(tensors | more, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"no place for .*layer\.7"):
        load_adapter(deberta(), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_alpha", 0), ("lora_alpha", -8), ("r", 0), ("r", "x"), ("peft_type", "NOPE"), ("target_modules", ["q"])],
)
def test_a_configuration_that_cannot_be_right_is_one_message(key, value, plain_peft, deberta):
    _, folder = plain_peft
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError) as error:
        load_adapter(deberta(), folder)
    assert len(error.value.problems) == 1 and str(folder) in str(error.value)


# --- names of classes ---


@pytest.fixture
def named(tmp_path):
    """An adapter for three classes with names, and the folder of its backbone, with its tokenizer."""
    names = ["no", 'may"be', "yes"]
    head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    composed = compose_cfg("method=lora", "task=paraphrase", "model=tiny")
    model = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, **head, dtype=torch.float32)
    backbone = Backbone.of(model, arguments={"num_labels": 3, **head}).freeze()
    grid = find_grid(model)
    attach(model, grid.names, torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool), 2, None, 4, freeze=False)
    model.classifier.bias.data = torch.tensor([0.0, 5.0, 0.0])
    task = get_task(composed.task)
    LowRankAdaptation(model).export(tmp_path, Origin(str(EMBEDDED), task, RECORD, {}, backbone))
    return model, names, tmp_path / "adapter"


def test_pipelines_print_the_names_of_the_card(named):
    """transformers uses the base model's configuration for an adapter, so the class names must be passed to it."""
    from transformers import AutoTokenizer, pipeline

    _, names, folder = named
    code = (folder / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    present: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), present)
    assert present["model"].config.id2label == dict(enumerate(names))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    (found,) = pipeline("text-classification", model=present["model"], tokenizer=tokenizer)("hello")
    assert found["label"] == names[1]
    given = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (found,) = pipeline("text-classification", model=str(folder), tokenizer=tokenizer, model_kwargs=given)("hello")
    assert found["label"] == names[1]


def test_our_loader_names_the_classes_or_refuses_others(named):
    _, names, folder = named
    fresh = lambda **head: AutoModelForSequenceClassification.from_pretrained(EMBEDDED, **head)  # noqa: E731
    model = fresh(num_labels=3)
    load_adapter(model, folder)
    assert model.config.id2label == dict(enumerate(names)) and model.config.label2id[names[2]] == 2
    other = dict(enumerate(reversed(names)))
    with pytest.raises(
        UserError, match=r"was trained on the classes no, may\"be, yes \(3\), in this order; the model's are y"
    ):
        load_adapter(fresh(id2label=other, label2id={name: i for i, name in other.items()}), folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path, deberta):
    with pytest.raises(UserError, match="is not an adapter"):
        load_adapter(deberta(), tmp_path)


def test_the_card_says_how_to_load_it(trained):
    _, folder = trained
    card = (folder / "adapter" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and "num_labels=2" in card


def test_gates_are_folded_in_and_pruned_directions_left_out(deberta, tmp_path):
    from peft import PeftModel

    model, base = deberta(), deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), rank=3, shared_rank=None, alpha=8)
    for i, (_, layer) in enumerate(lowrank_layers(model)):
        nn.init.normal_(layer.lora_bt, std=0.5)
        layer.gate = nn.Parameter(torch.tensor([0.0, 1.5, -0.5]) if i else torch.zeros(3))
    origin = origin_of(model)
    LowRankAdaptation(model).export(tmp_path, origin)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ranks = [m.r["default"] for _, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert ranks == [2] * 11  # one module has no direction left
    again = deberta()
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        for other in (loaded, again.eval()):
            torch.testing.assert_close(other(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_every_gate_closed_still_loads(deberta, tmp_path):
    from peft import PeftModel

    model, base = deberta(), deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), rank=2, shared_rank=None, alpha=8)
    for _, layer in lowrank_layers(model):
        layer.gate = nn.Parameter(torch.zeros(2))
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).logits, model.eval()(**inputs()).logits)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_a_language_models_adapter_needs_a_model_with_that_head(kind, dialogue_adapter):
    """A language model's head is pretrained, so it is not part of the adapter."""
    import transformers

    model, _, folder = dialogue_adapter
    fresh = getattr(transformers, kind).from_pretrained(EMBEDDED.parent / "tiny_llama", dtype="float32").eval()
    if kind == "LlamaForSequenceClassification":
        with pytest.raises(UserError, match="trained for a LlamaForCausalLM, and this model is a LlamaForSequence"):
            load_adapter(fresh, folder)
        return
    load_adapter(fresh, folder)
    ids = torch.arange(5, 17).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in fresh.modules())


def test_models_of_another_class_or_depth_are_refused(trained, deberta):
    from transformers import DebertaV2ForTokenClassification

    _, folder = trained
    with pytest.raises(UserError, match="was trained on 2 layers, and this model has 3"):
        load_adapter(deberta(layers=3), folder / "adapter")
    with pytest.raises(UserError, match=r"for a DebertaV2ForSequenceClassification, and .* a DebertaV2ForTok"):
        load_adapter(DebertaV2ForTokenClassification(deberta().config), folder / "adapter")


def test_loaded_pairs_are_aligned_in_memory(trained, deberta):
    """With the file's own alignment, products round differently, and training would not continue bit for bit."""
    _, folder = trained
    model = deberta()
    load_adapter(model, folder / "adapter")
    assert all(p.data_ptr() % 64 == 0 for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt))


def test_only_regular_files_that_the_manifest_lists_are_read(trained, deberta, tmp_path):
    import os

    _, folder = trained
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        copied = shutil.copytree(folder / "adapter", tmp_path / f"pipe-{name}")
        (copied / name).unlink()
        os.mkfifo(copied / name)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            load_adapter(deberta(), copied)
    copied = shutil.copytree(folder / "adapter", tmp_path / "more")
    (copied / "diffora.json").write_text("{}")
    with pytest.raises(UserError, match=r"diffora\.json is not listed in manifest\.json"):
        load_adapter(deberta(), copied)
