"""``diffora export``: each form gives the logits of the run, completely or with one message."""

import copy
import json
import shutil

import pytest
import torch
from conftest import TYPES, logits
from finished_run import run_of
from peft import PeftModel
from safetensors.torch import load_file
from small import small_deberta
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import diffora
from diffora.adapters.export import save_adapter
from diffora.adapters.forms import name_base_model, rewrite
from diffora.adapters.manifest import read_manifest
from diffora.adapters.merge import merge_updates
from diffora.api import load_adapter
from diffora.cli.export import main as export_main
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.norms import keep_statistics
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run import export
from diffora.run.trained import finished_run, load_trained

MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])


def adapted(alpha: float = 5) -> nn.Module:
    """A classifier with shared and own pairs, none of them zero; its head is random."""
    model = small_deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank=3, shared_rank=2, alpha=alpha)
    for parameter in dict.fromkeys(p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)):
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.classifier.weight, std=0.5)
    return model.eval()


def facts_of(model: nn.Module) -> dict:
    """What training goes on with: each module's pair, rank, scale and which modules share a pair."""
    layers, first = dict(lowrank_layers(model)), {}
    return {
        name: (layer.lora_a.tolist(), layer.lora_bt.tolist(), layer.scaling, first.setdefault(id(layer.lora_a), name))
        for name, layer in layers.items()
    }


# --- forms of an adapter ---


@pytest.mark.parametrize("form", ["uniform", "compact"])
@pytest.mark.parametrize("alpha", [8, 5])
def test_a_saved_model_is_loaded_bit_for_bit_with_its_ties(form, alpha, tmp_path):
    model = adapted(alpha)
    save_adapter(model, tmp_path / "a", form=form)
    again = small_deberta()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert facts_of(again) == facts_of(model)


@pytest.mark.parametrize("form", ["uniform", "compact"])
def test_scales_of_any_number_are_kept_bit_for_bit_also_within_a_tie(form, tmp_path):
    model = adapted()
    by_pair = facts_of(model)
    first = next(name for name, (*_, tied) in by_pair.items() if tied != name)
    scales = iter([3.6834072883114812, 1.6772826704475121, 0.7] * len(by_pair))  # times 3, divided by 3 is another one
    for name, layer in lowrank_layers(model):
        layer.scaling = 0.3 if name == first else next(scales)  # also of one of the modules that share a pair
    save_adapter(model, tmp_path, form=form)
    again = small_deberta()
    load_adapter(again, tmp_path)
    found, expected = facts_of(again), facts_of(model)
    assert [fact[:3] for fact in found.values()] == [fact[:3] for fact in expected.values()]
    assert torch.equal(logits(again), logits(model))


def test_peft_takes_ranks_and_scales_of_a_module_whose_name_ends_another_ones(tmp_path):
    """PEFT's patterns apply to all names with that end: `fc` would decide for `blocks.0.fc` too."""

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)])
            self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block["fc"](x))
            return self.out(torch.tanh(self.fc(x)))

    model, x = Ends(), torch.randn(4, 6)
    for name, rank, alpha in (("fc", 1, 5.0), ("blocks.0.fc", 3, 6.0), ("blocks.1.fc", 2, 7.0), ("out", 3, 8.0)):
        attach(model, [[name]], torch.tensor([[True]]), rank, None, alpha, freeze=False)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    save_adapter(model, tmp_path, form="compact")
    theirs = PeftModel.from_pretrained(Ends(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x))


def test_forms_change_into_each_other_without_loss(tmp_path):
    save_adapter(adapted(), tmp_path / "uniform")
    rewrite(tmp_path / "uniform", tmp_path / "compact", "compact")
    rewrite(tmp_path / "compact", tmp_path / "again", "uniform")
    for file in (tmp_path / "uniform").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "compact" / "exact.safetensors").exists()
    config = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert config["r"] == 3 and set(config["rank_pattern"].values()) == {2}


def test_saving_in_another_form_replaces_the_first_adapter(tmp_path):
    save_adapter(adapted(), tmp_path)
    save_adapter(adapted(), tmp_path, form="compact")
    again = small_deberta()
    load_adapter(again, tmp_path)  # no file of the first one is in the way
    assert torch.equal(logits(again), logits(adapted()))


def test_other_trained_modules_are_saved_with_the_head(tmp_path):
    model = adapted()
    norm = model.deberta.embeddings.LayerNorm.requires_grad_(True)
    nn.init.normal_(norm.weight)
    save_adapter(model, tmp_path)
    again = small_deberta()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_the_module_inside_a_wrapper_is_saved_and_filled(wrap, tmp_path):
    model = adapted()
    save_adapter(wrap(model), tmp_path)
    again = small_deberta()
    load_adapter(wrap(again), tmp_path)
    assert torch.equal(logits(again), logits(model))


class Own(nn.Module):
    """A model of which nothing says what its head is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def own_adapted() -> Own:
    model = Own()
    attach(model, find_grid(model).names, torch.tensor([[True, False]] * 2), rank=2, shared_rank=1, alpha=4)
    for parameter in (p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)):
        nn.init.normal_(parameter)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("freeze", [True, False])
def test_the_head_of_an_own_model_survives_loading_and_saving(freeze, tmp_path):
    model, x = own_adapted(), torch.randn(4, 8)
    model.head.requires_grad_(True)
    save_adapter(model, tmp_path / "first")
    load_adapter(again := Own(), tmp_path / "first", freeze=freeze)
    save_adapter(again, tmp_path / "second")
    load_adapter(third := Own(), tmp_path / "second")
    assert torch.equal(third(x), model(x)) and not torch.allclose(Own()(x), model(x))


def test_a_frozen_head_of_an_own_model_is_named_or_warned_about(tmp_path, caplog):
    model, x = own_adapted(), torch.randn(4, 8)
    save_adapter(model, tmp_path)
    assert "only the low-rank layers of this Own are saved" in caplog.text
    caplog.clear()
    save_adapter(model, tmp_path, head=["head"])
    load_adapter(again := Own(), tmp_path)
    assert torch.equal(again(x), model(x)) and not caplog.text
    with pytest.raises(UserError, match="head: tail is not a module of this model"):
        save_adapter(model, tmp_path, head=["tail"])
    with pytest.raises(UserError, match="head='head' must be a list of names"):
        save_adapter(model, tmp_path, head="head")


def test_tied_embeddings_that_were_trained_are_the_same_in_peft(tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()

    model, tokens = fresh(), {"input_ids": torch.arange(12).view(2, 6)}
    attach(model, find_grid(model).names, torch.ones(2, 4, dtype=torch.bool), rank=2, shared_rank=None, alpha=4)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.lm_head.requires_grad_(True).weight, std=0.3)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    load_adapter(again := fresh(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft(**tokens).logits, model(**tokens).logits)
        assert torch.equal(again(**tokens).logits, model(**tokens).logits)


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no low-rank layers"):
        save_adapter(small_deberta(), tmp_path)
    model = adapted()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="has trainable parameters beside its low-rank layers"):
        save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="form='merged' must be uniform or compact"):
        save_adapter(adapted(), tmp_path, form="merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["zip", 3, None])
def test_an_unknown_form_in_a_manifest_is_refused(value, tmp_path):
    from diffora.adapters.manifest import write_manifest

    save_adapter(adapted(), tmp_path)
    manifest = read_manifest(tmp_path)
    files = manifest.pop("files")
    write_manifest(tmp_path, files, manifest | {"form": value})
    with pytest.raises(UserError, match=r"form=.* must be uniform or compact"):
        load_adapter(small_deberta(), tmp_path)


def test_another_name_of_the_base_model_is_no_damage(finished, tmp_path):
    rewrite(finished / "adapter", tmp_path / "a", "uniform")
    name_base_model(tmp_path / "a", "org/base")
    read_manifest(tmp_path / "a")
    text = "".join(file.read_text() for file in (tmp_path / "a").glob("*.json"))
    assert "org/base" in text and str(EMBEDDED) not in text and "embedded" not in text


# --- the backbone that an adapter was made for ---


def test_a_model_from_other_files_than_those_of_the_training_is_named(finished, tmp_path, caplog):
    manifest = read_manifest(finished / "adapter")
    assert manifest["backbone"]["files"]["model.safetensors"]
    shutil.copytree(EMBEDDED, tmp_path / "same")
    shutil.copytree(EMBEDDED, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for name in ("same", "other"):
        caplog.clear()
        labels = {"id2label": dict(enumerate(manifest["labels"]))}
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, num_labels=2, **labels)
        load_adapter(model, finished / "adapter")
        assert ("the backbone's files changed: model.safetensors" in caplog.text) == (name == "other")


# --- merged models ---


def test_a_merged_model_is_a_plain_one_with_the_same_logits():
    model = adapted()
    expected = logits(model)
    merge_updates(model)
    assert not list(lowrank_layers(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    fresh = small_deberta(seed=3)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig"])
def test_layers_of_peft_are_merged_too(kind):
    import peft

    model = small_deberta()
    more = {"use_dora": True} if kind == "LoraConfig" else {}
    config = getattr(peft, kind)(r=2, target_modules=["query_proj", "output.dense"], **more)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "hada_" in name:
            nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.3)
    expected = logits(model)
    assert (expected - logits(small_deberta())).abs().max() > 0.01
    merge_updates(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == small_deberta().state_dict().keys()


def test_a_head_that_peft_trained_as_a_copy_is_the_head_of_the_merged_model():
    import peft

    model = small_deberta()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query_proj"], modules_to_save=["classifier"])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = logits(model)
    merge_updates(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == small_deberta().state_dict().keys()


def test_output_embeddings_that_were_adapted_are_not_tied_any_more(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).eval()
    attach(model, [["lm_head"]], torch.tensor([[True]]), 2, None, alpha=4)
    nn.init.normal_(model.lm_head.lora_bt)
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merge_updates(model)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_weight_and_a_bottleneck_cannot_take_up_an_update():
    class Packed(nn.Parameter):
        """Stands for a quantised weight: a tensor class of its own."""

    model = adapted()
    layer = model.deberta.encoder.layer[0].output.dense
    layer.base.weight = Packed(layer.base.weight.data, requires_grad=False)
    with pytest.raises(UserError, match="is quantised"):
        merge_updates(model)
    from diffora.core.bottleneck import BottleneckLinear

    model = small_deberta()
    dense = model.deberta.encoder.layer[0].output.dense
    model.deberta.encoder.layer[0].output.dense = BottleneckLinear(dense, 2, "gelu", True, 0.1)
    with pytest.raises(UserError, match="cannot be merged"):
        merge_updates(model)


# --- the command ---


def exported(run, *arguments: str):
    request = export.read_request([str(run), *arguments])
    export.export(request)
    return request.to


def of_run(model: nn.Module, tokenizer) -> torch.Tensor:
    texts = ["the cat sat", "a dog ran fast", "no"], ["a cat sat down", "the dog slept", "yes"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokenizer(*texts, padding=True, return_tensors="pt")).logits
    return found


def test_every_form_of_a_run_gives_its_logits(finished, tmp_path, capsys):
    cfg, weights, _ = finished_run(finished, {})

    model, tokenizer = load_trained(cfg, weights)
    expected = of_run(model, tokenizer)
    for form in ("uniform", "compact"):
        base = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2)
        load_adapter(base, exported(finished, f"form={form}", f"to={tmp_path / form}"))
        torch.testing.assert_close(of_run(base, tokenizer), expected, rtol=1e-5, atol=1e-5)
    export_main([str(finished), "form=merged", f"to={tmp_path / 'merged'}"])
    assert str(tmp_path / "merged") in capsys.readouterr().out
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(of_run(whole, theirs), expected, rtol=1e-4, atol=1e-4)
    assert whole.config.id2label == model.config.id2label != {0: "LABEL_0", 1: "LABEL_1"}


def test_mistakes_are_listed_together_and_nothing_is_written(finished, tmp_path):
    with pytest.raises(UserError) as caught:
        export.read_request(["form=zip", "rank=4", "to=", "a", "b"])
    said = "\n".join(caught.value.problems)
    for text in ("give one run directory", "form='zip' must be one of uniform", "unknown key rank", "to="):
        assert text in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        export.read_request([str(finished), f"to={tmp_path / 'full'}"])
    with pytest.raises(UserError, match="is an adapter: give the run directory"):
        export.read_request([str(finished / "adapter")])
    with pytest.raises(UserError, match="is not a folder"):
        export.read_request([str(tmp_path / "no")])


def test_a_run_that_is_not_finished_or_was_changed_is_not_exported(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "changed")
    weights = tmp_path / "changed" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not as the run left it"):
        export.read_request([str(tmp_path / "changed")])
    (tmp_path / "changed" / "run.json").unlink()
    with pytest.raises(UserError, match="is not a finished run"):
        export.read_request([str(tmp_path / "changed")])


def test_a_method_with_one_format_is_copied_and_not_compact(tmp_path):
    run = run_of(tmp_path / "run", "method=bitfit").folder
    present = exported(run)
    base = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2)
    load_adapter(base, present)
    whole = AutoModelForSequenceClassification.from_pretrained(exported(run, "form=merged"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.testing.assert_close(of_run(whole, tokenizer), of_run(base, tokenizer), rtol=1e-5, atol=1e-5)
    for form in ("compact", "gguf"):
        with pytest.raises(UserError, match="has no low-rank pairs"):
            exported(run, f"form={form}")
        assert not (run / f"export-{form}").exists()


# --- llama.cpp ---

CONVERTER = """
import json, pathlib, sys
given = sys.argv[1:]
out = pathlib.Path(given[given.index("--outfile") + 1])
lora = pathlib.Path(given[-1])
if {fails}:
    sys.exit("Model is not supported")
config = json.loads((lora / "adapter_config.json").read_text())
out.write_text(json.dumps([given[:-1], config["r"], config["lora_alpha"], sorted(p.name for p in lora.iterdir())]))
"""


WHOLE_CONVERTER = """
import json, pathlib, sys
given = sys.argv[1:]
model = pathlib.Path(given[-1])
assert json.loads((model / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
assert (model / "tokenizer.json").is_file() and "--base" not in given
assert given[given.index("--outtype") + 1] == "f16"
pathlib.Path(given[given.index("--outfile") + 1]).write_bytes((model / "model.safetensors").read_bytes())
"""
TALKING = ["task=dialogue", "model=tiny_llama", "task.train_rows=16", "task.validation_rows=8"]


def talking(tmp_path, *overrides: str):
    """A finished run of a language model, whose adapter has no head."""
    return run_of(tmp_path / "run", "method=lora", *TALKING, *overrides).folder


def test_gguf_is_written_by_the_converter_of_llama_cpp(finished, tmp_path, monkeypatch):
    run, script = talking(tmp_path), tmp_path / "convert_lora_to_gguf.py"
    with pytest.raises(UserError, match=r"needs llama.cpp's convert_lora_to_gguf.py, but there is no"):
        exported(run, "form=gguf")
    script.write_text(CONVERTER.format(fails=False))
    file = exported(run, "form=gguf", f"converter={script}") / "adapter.gguf"
    given, rank, alpha, files = json.loads(file.read_text())
    assert given[given.index("--base") + 1] == str(EMBEDDED.parent / "tiny_llama")
    assert rank == alpha and "adapter_model.safetensors" in files
    assert [p.name for p in file.parent.iterdir()] == ["adapter.gguf"]
    shutil.rmtree(file.parent)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exported(run, "form=gguf").is_dir()  # found on the PATH
    script.write_text(CONVERTER.format(fails=True))
    with pytest.raises(UserError, match=r"failed \(exit code 1\): Model is not supported"):
        exported(run, "form=gguf", f"to={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"llama.cpp takes no head, and this adapter has"):
        exported(finished, "form=gguf", f"to={tmp_path / 'other'}")


def test_gguf_of_a_fully_fine_tuned_model_has_its_trained_weights(tmp_path):
    done, script = run_of(tmp_path / "run", "method=full_ft", *TALKING), tmp_path / "convert_hf_to_gguf.py"
    with pytest.raises(UserError, match=r"needs llama.cpp's convert_hf_to_gguf.py, but there is no"):
        exported(done.folder, "form=gguf")
    script.write_text(WHOLE_CONVERTER)
    found = load_file(exported(done.folder, "form=gguf", f"converter={script}") / "model.gguf")
    trained, base = done.model.state_dict(), load_file(EMBEDDED.parent / "tiny_llama" / "model.safetensors")
    assert found and all(torch.equal(found[name], trained[name]) for name in found)
    assert not all(torch.equal(found[name], base[name].float()) for name in found)


def test_a_fully_fine_tuned_model_is_whole_already(tmp_path):
    run = run_of(tmp_path / "run", "method=full_ft").folder
    whole = AutoModelForSequenceClassification.from_pretrained(exported(run, "form=merged"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    theirs = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert torch.equal(of_run(whole, tokenizer), of_run(theirs, tokenizer))
    with pytest.raises(UserError, match="is a whole model, not an adapter: copy that folder"):
        exported(run)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("keeps", [False, True])
def test_statistics_that_moved_in_training_are_saved(tmp_path, keeps):
    """A frozen batch norm in training mode replaces its statistics, whether its weights are trained or not."""
    torch.manual_seed(0)
    pretrained, x = Normed(), torch.randn(16, 6) + 3
    model = copy.deepcopy(pretrained)
    layers = attach(model, [["layers.0.0"], ["layers.1.0"]], torch.ones(2, 1, dtype=torch.bool), 2, None, 4)
    for row in layers:
        nn.init.normal_(row[0].lora_bt)
    model.train()
    if keeps:
        keep_statistics(model)
    model(x)
    save_adapter(model, tmp_path, head=["head"])
    saved = [] if keeps else ["layers.0.1", "layers.1.1"]
    assert read_manifest(tmp_path)["heads"] == ["head", *saved]
    again = copy.deepcopy(pretrained)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_the_selection_of_another_adapter_is_refused(tmp_path):
    model, grid = adapted(), find_grid(small_deberta(), "encoder.layer.*", TYPES)
    selection = Selection.from_mask(grid, MASK, method="diffora", selector="search", rho=0.5, seed=0)
    selection.save(tmp_path / "selection.json")
    save_adapter(model, tmp_path)
    assert "selection.json" in read_manifest(tmp_path)["files"]
    Selection.from_mask(grid, ~MASK, method="diffora", selector="search", rho=0.5, seed=0).save(
        tmp_path / "selection.json"
    )
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"selection\.json selects other modules than this adapter has"):
        save_adapter(adapted(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_peft_runs_a_model_of_speech_in_its_own_way(tmp_path):
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WHISPER).eval()
    pretrained = copy.deepcopy(model)
    diffora.attach(model, diffora.select(model, "qv", progress=False), rank=2)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    batch = {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(3, 60, (2, 6))}
    with torch.no_grad():
        found, wanted = PeftModel.from_pretrained(pretrained, tmp_path).eval()(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


WHISPER = WhisperConfig(
    vocab_size=64, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=16, max_source_positions=20,
    max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def test_a_model_that_cannot_be_merged_is_not_merged_in_part():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    attach(model, [[f"{i}.0"] for i in range(3)], torch.ones(3, 1, dtype=torch.bool), 2, None, 1.0)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    nn.utils.parametrizations.weight_norm(model[2][0].base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"weight of 2\.0 is computed from other tensors"):
        merge_updates(model)
    assert len(list(lowrank_layers(model))) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
