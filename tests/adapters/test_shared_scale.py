"""``shared_scale``: shared pairs have their own scale or that of the selected pairs, in memory and in every file."""

import json
import shutil

import pytest
import torch
from conftest import TYPES, logits
from finished_run import run_of
from safetensors.torch import load_file
from small import small_deberta
from torch import nn
from transformers import AutoModelForSequenceClassification

import diffora
from diffora.adapters.manifest import read_manifest
from diffora.adapters.pairs import StoredPairs
from diffora.adapters.published import Published, published_card
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run import export
from diffora.run.trained import finished_run, load_trained

MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])
RANK, SHARED, ALPHA = 3, 2, 5.0
SCALES = {"own": {ALPHA / RANK, ALPHA / SHARED}, "same": {ALPHA / RANK}}


def adapted(shared_scale: str) -> nn.Module:
    """A classifier with shared and own pairs, none of them zero."""
    model = small_deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    selection = diffora.Selection.from_mask(grid, MASK, method="diffora", selector="x", k=3, rho=0.5, seed=0)
    diffora.attach(model, selection, RANK, SHARED, ALPHA, shared_scale=shared_scale)
    torch.manual_seed(1)
    for parameter in dict.fromkeys(p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)):
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.classifier.weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("shared_scale", ["own", "same"])
def test_the_model_adds_each_update_with_the_scale_that_was_asked_for(shared_scale):
    """Equal to the pretrained model with s B A in its weights, where s is written out here."""
    model, plain = adapted(shared_scale), small_deberta()
    plain.classifier.load_state_dict(model.classifier.state_dict())
    for name, layer in lowrank_layers(model):
        s = ALPHA / (SHARED if shared_scale == "own" and layer.rank == SHARED else RANK)
        with torch.no_grad():
            plain.get_submodule(name).weight += s * layer.lora_bt.T @ layer.lora_a
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert {layer.scaling for _, layer in lowrank_layers(model)} == SCALES[shared_scale]


@pytest.mark.parametrize("form", ["uniform", "compact"])
@pytest.mark.parametrize("shared_scale", ["own", "same"])
def test_a_saved_adapter_is_the_model_in_memory_for_us_and_for_peft(form, shared_scale, tmp_path):
    from peft import PeftModel

    model = adapted(shared_scale)
    diffora.save_adapter(model, tmp_path, form=form)
    ours = small_deberta()
    diffora.load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(model))
    assert {layer.scaling for _, layer in lowrank_layers(ours)} == SCALES[shared_scale]
    theirs = PeftModel.from_pretrained(small_deberta(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    other = adapted("own" if shared_scale == "same" else "same")
    assert not torch.allclose(logits(other), logits(model), rtol=1e-2, atol=1e-2)  # so equality above says something


def test_impossible_scales_are_refused_and_the_model_is_unchanged():
    model = small_deberta()
    selection = diffora.Selection.from_mask(
        find_grid(model, "encoder.layer.*", TYPES), MASK, method="x", selector="x", k=3, rho=0.5, seed=0
    )
    with pytest.raises(UserError, match="shared_scale='half' must be one of own, same"):
        diffora.attach(model, selection, 4, 2, shared_scale="half")
    with pytest.raises(UserError, match="shared_scale='same' needs shared_rank="):
        diffora.attach(model, selection, 4, shared_scale="same")
    assert not list(lowrank_layers(model))


# --- a run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The result of a run at one scale, s = 2, with r = 4 and r_s = 1."""
    picked = ("method.selection=[query,ffn_output]", "rank=4", "method.shared_rank=1", "method.alpha=8")
    return run_of(tmp_path_factory.mktemp("run"), "method=diffora", *picked, "method.shared_scale=same")


def of_run(model: nn.Module) -> torch.Tensor:
    batch = torch.tensor([[2, 9, 31, 7, 3], [2, 80, 12, 55, 3]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    return found


def fresh() -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2)
    return model


def test_every_form_of_a_run_has_the_one_scale(finished, tmp_path):
    manifest = read_manifest(finished.folder / "adapter")
    assert {entry["scale"] for entry in manifest["modules"].values()} == {2.0}
    assert {entry["rank"] for entry in manifest["modules"].values()} == {1, 4} and manifest["shared"]
    cfg, weights, _ = finished_run(finished.folder, {})
    expected = of_run(load_trained(cfg, weights)[0])
    plain = fresh()
    diffora.load_adapter(plain, finished.folder / "adapter")
    for _, layer in lowrank_layers(plain):
        layer.scaling = 8 / layer.rank
    assert not torch.allclose(of_run(plain), expected, atol=1e-4)  # the scale of shared pairs matters here
    for form in ("uniform", "compact"):
        request = export.read_request([str(finished.folder), f"form={form}", f"to={tmp_path / form}"])
        lines = export.export(request)
        assert "scale 2" in lines[0]
        again = fresh()
        diffora.load_adapter(again, tmp_path / form)
        torch.testing.assert_close(of_run(again), expected, rtol=1e-5, atol=1e-5)
    export.export(export.read_request([str(finished.folder), "form=merged", f"to={tmp_path / 'merged'}"]))
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(of_run(whole), expected, rtol=1e-4, atol=1e-4)


def test_a_fine_tuning_that_goes_on_keeps_the_scale(finished, tmp_path):
    start = finished.folder / "adapter"
    more = run_of(tmp_path / "more", "method=diffora", f"method.adapter={start}", "method.alpha=100")
    manifest = read_manifest(more.folder / "adapter")
    assert {entry["scale"] for entry in manifest["modules"].values()} == {2.0}
    with pytest.raises(UserError, match=r"method\.shared_scale=same does not go with method\.adapter"):
        run_of(tmp_path / "no", "method=diffora", f"method.adapter={start}", "method.shared_scale=same")
    assert not (tmp_path / "no").exists()


def test_the_scale_is_part_of_the_setting_and_on_the_card(finished, tmp_path):
    own = run_of(
        tmp_path / "own", "method=diffora", "method.selection=[query,ffn_output]", "rank=4", "method.shared_rank=1",
        "method.alpha=8",
    ).record  # fmt: skip
    same = finished.record
    assert own["setting_id"] != same["setting_id"] and own["config_hash"] != same["config_hash"]
    manifest = read_manifest(finished.folder / "adapter")
    card = published_card(
        Published(
            "me/it",
            same,
            None,
            "BertForSequenceClassification",
            manifest,
            (),
            ["layer 1", "layer 2", "layer 3", "layer 4"],
        )
    )
    assert "| layer 1 | " in card and "| layer 4 | " in card and "| warmup_steps | 0 |" in card
    assert "| shared rank | 1 |" in card and "| scale of shared pairs | 2 |" in card


def test_a_resumed_run_has_the_scale_of_the_run(finished, tmp_path):
    """Its adapter and its record are gone; they are made again from its checkpoint, bit for bit."""
    folder = tmp_path / "again"
    shutil.copytree(finished.folder, folder)
    for name in ("adapter", "run.json"):
        present = folder / name
        shutil.rmtree(present) if present.is_dir() else present.unlink()
    picked = ("method.selection=[query,ffn_output]", "rank=4", "method.shared_rank=1", "method.alpha=8")
    run_of(folder, "method=diffora", *picked, "method.shared_scale=same", "resume=true")
    was, now = (json.loads((f / "adapter" / "manifest.json").read_text()) for f in (finished.folder, folder))
    assert now["modules"] == was["modules"] and now["files"] == was["files"]


def test_without_shared_pairs_the_same_scale_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"method\.shared_scale=same needs method\.weight_sharing=true"):
        run_of(tmp_path, "method=random", "method.weight_sharing=false", "method.shared_scale=same")


COPY = """
import pathlib, shutil, sys
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
shutil.copy(pathlib.Path(sys.argv[-1]) / "adapter_model.safetensors", out)
"""


def test_llama_cpp_gets_the_scale_in_b(tmp_path):
    """llama.cpp divides lora_alpha by each tensor's rank, so B itself must have the scale."""
    data = ("task=dialogue", "model=tiny_llama", "task.train_rows=16", "task.validation_rows=8")
    picked = ("method.selection=[query]", "rank=4", "method.shared_rank=1", "method.alpha=12")
    run = run_of(tmp_path / "run", "method=diffora", *data, *picked, "method.shared_scale=same").folder
    script = tmp_path / "convert.py"
    script.write_text(COPY)
    request = export.read_request([str(run), "form=gguf", f"converter={script}", f"to={tmp_path / 'gguf'}"])
    export.export(request)
    manifest = read_manifest(run / "adapter")
    pairs = StoredPairs.read(run / "adapter", manifest).all()
    given = load_file(tmp_path / "gguf" / "adapter.gguf")
    assert {len(lora_a) for lora_a, _, _ in pairs.values()} == {1, 4}
    for name, (lora_a, lora_bt, _) in pairs.items():
        folded = given[f"base_model.model.{name}.lora_B.weight"] @ given[f"base_model.model.{name}.lora_A.weight"]
        torch.testing.assert_close(folded, 3.0 * lora_bt.T @ lora_a)
        assert folded.any()
