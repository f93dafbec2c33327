"""Every method through a whole run: trained, recorded, exported, loaded again, resumed."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification

from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.hub import EMBEDDED
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.training.optimisers import PARTS_OF_B

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
MORE = {  # so that the special steps of a method occur within four steps
    "sora": ["method.lam=0.2", "method.stages=2"],
    "rm_lora": ["method.mask.target=update"],
    "adalora": ["finetune.lr=0.03"],
    "flora": ["finetune.lr=0.03"],
}


@pytest.fixture
def short(quick):
    return [*quick, "task.train_rows=64", "task.validation_rows=32", "finetune.epochs=2", "search.epochs=1"]


def overrides(short, method):
    kept = [o for o in short if not o.startswith("search.") or method == "diffora"]
    dials = OmegaConf.load(conf_dir() / "method" / f"{method}.yaml").get("finetune", {})
    kept = [o for o in kept if not o.startswith("finetune.dropout") or "dropout" in dials]
    return [*kept, f"method={method}", *MORE.get(method, [])]


def composed_method(composed):
    return check(composed)[0].method


@pytest.mark.parametrize("method", METHODS)
def test_trained_recorded_exported_and_resumed(method, cfg, short, tmp_path):
    torch.set_num_threads(1)
    composed = cfg(*overrides(short, method))
    whole = run(composed, tmp_path / "run")
    record = whole.record
    params = record["params"]
    assert record["status"] == "completed" and record["method"] == method
    assert params["trainable"] == params["adapter"] + params["head"]
    assert params["inference"] <= params["adapter"] * (2 if method == "pissa" else 1)
    assert {"train/accuracy", "generalisation_gap", "validation/accuracy"} <= record["metrics"].keys()
    names = [name.split(".") for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    assert composed_method(composed).trains_b == any(set(PARTS_OF_B) & {*parts} for parts in names)

    # the model from disk gives the outputs of the model in memory
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = whole.model.eval()(input_ids=ids).logits
    path = whole.folder / "model" if method == "full_ft" else EMBEDDED
    fresh = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    heads = tuple(f"{name}." for name in Backbone.of(fresh).head)
    pretrained = {name for name, _ in fresh.named_parameters() if not name.startswith(heads)}
    assert composed_method(composed).trains_pretrained == bool(pretrained.intersection(map(".".join, names)))
    if method != "full_ft":
        for name in Backbone.of(fresh).head:  # with only the trained head, the outputs differ
            fresh.get_submodule(name).load_state_dict(whole.model.get_submodule(name).state_dict())
        with torch.no_grad():
            changed = (fresh(input_ids=ids).logits - logits).abs().max()
        assert (changed > 1e-4) == (method != "head_only")
        folder = shutil.copytree(whole.folder / "adapter", tmp_path / "elsewhere")
        fresh = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        load_adapter(fresh, folder)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)

    # stopped after the first epoch and resumed
    again = tmp_path / "again"
    shutil.copytree(whole.folder, again)
    (last,) = (again / "checkpoints").glob("finetune-0002-*.ckpt")
    last.unlink()
    (again / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    composed.resume = True
    resumed = run(composed, again).record
    for key in ("metrics", "history", "params", "selection"):
        assert resumed[key] == record[key], key


# Every method on the smaller shape; on the larger one the rest is slow.
SHAPES = [
    *((method, "minilm") for method in METHODS),
    *(
        pytest.param(method, "roberta_base", marks=() if method in ("diffora", "full_ft") else pytest.mark.slow)
        for method in METHODS
    ),
]


@pytest.mark.parametrize(("method", "backbone"), SHAPES)
def test_every_method_on_the_true_shape_of_every_backbone(method, backbone, cfg, tmp_path):
    params = run(cfg(f"method={method}", f"model={backbone}", "dry_run=true"), tmp_path).record["params"]
    assert params["trainable"] == params["adapter"] + params["head"] and params["head"] > 0
    assert (params["adapter"] > 0) == (method != "head_only")
    assert params["backbone"] > 20_000_000


def test_r_lora_and_gm_lora_on_the_modules_that_diffora_selected(cfg, short, tmp_path):
    torch.set_num_threads(1)
    plain = run(cfg(*overrides(short, "diffora")), tmp_path / "plain")
    file = f"method.selection={plain.folder / 'selection.json'}"
    histories = [plain.record["history"]]
    for i, more in enumerate((["method.regulariser.weight=0.01"], ["method.mask.rank=1"])):
        other = run(cfg(*overrides(short, "diffora"), file, *more), tmp_path / f"{i}")
        assert other.record["params"] == plain.record["params"]
        assert other.record["history"] not in histories
        histories.append(other.record["history"])
