"""PEFT's own methods: what they train, what they export, and AdaLoRA's schedule."""

import io

import numpy as np
import pytest
import torch
from conftest import TYPES, batch_of
from hydra.utils import get_class
from small import rows_of, small_task
from stopped_runs import run_of, stop
from torch import nn

from diffora.adapters.origin import Origin
from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.loop.samplers import LengthGroupedBatchSampler
from diffora.methods.adalora import AVERAGES, AdaLoRA, AdaLoRAAdaptation
from diffora.methods.peft import PEFTAdaptation, inject
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.tasks.tokenise import Collator
from diffora.training.finetune import FineTuneModule
from diffora.training.first_batches import FirstBatches

ROLES = {"key": TYPES[1], "value": TYPES[2], "attention_output": TYPES[3], "ffn_output": TYPES[5]}
RECORD = {"method": "x", "task": "mrpc", "seed": 0, "params": {"adapter": 1, "head": 1}, "metrics": {"a": 0.5}}
# Two layers of four 16 x 16 modules, one 16 -> 32 and one 32 -> 16: 448 parameters a rank, 224 outputs.
SIZES = {
    "peft": 2 * 448,
    "dora": 2 * 448 + 224,
    "rslora": 2 * 448,
    "pissa": 2 * 448,
    "eva": 2 * 448,
    "vera": 12 * 256 + 224,
    "ia3": 2 * (16 + 16 + 32),
    "adalora": 3 * 448 + 12 * 3,
}
FULL = {"peft": 2, "rslora": 2, "pissa": 4, "eva": None, "adalora": 3}  # ranks of the updates that are low-rank
OTHERS = {
    "loha": ["method.config._target_=peft.LoHaConfig", "~method.config.lora_alpha", "~method.config.lora_dropout"],
    "olora": ["+method.config.init_lora_weights=olora"],
    "bias": ["+method.config.bias=lora_only"],
    "all biases": ["+method.config.bias=all"],
    "lora bias": ["+method.config.lora_bias=true"],
}


def inputs(n=6):
    """Rows of different lengths, padded."""
    batch = {key: value for key, value in batch_of(n, length=10).items() if key in ("input_ids", "attention_mask")}
    for row in range(n):
        batch["attention_mask"][row, 10 - row :] = 0
    return batch


def method_of(cfg, *overrides):
    composed = cfg("experiment=quickstart", *overrides)
    return get_class(composed.method._target_).from_config(composed)


def adapted(method, model):
    return method.adapt(model, find_grid(model, "encoder.layer.*", TYPES, ROLES), None, 0)


def step(adaptation, optimizer, at=0):
    logits = adaptation.model(**inputs()).logits
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1, 0, 1])) + (adaptation.penalty() or 0.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    adaptation.after_step(at, 0.0)


def adam(model, lr=0.02):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


@pytest.mark.parametrize("name", [*SIZES, *OTHERS])
def test_trains_adapter_and_head_and_exports_what_plain_peft_loads(name, cfg, deberta, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    method = method_of(cfg, *([f"method={name}"] if name in SIZES else ["method=peft", *OTHERS[name]]))
    model = deberta()
    model.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adaptation = adapted(method, model)
    adaptation.prepare([inputs(), inputs(4)])
    adaptation.begin(4)
    counts, head = Backbone.of(model).count_parameters(), Backbone.of(model).head_parameters()
    assert type(model.classifier) is nn.Linear and all(p.requires_grad for p in head) and len(head) == 4
    trained = {key for key, p in model.named_parameters() if key in before and p.requires_grad and p not in head}
    assert not trained or (name == "all biases" and all(key.endswith("bias") for key in trained))
    if name in SIZES and name != "eva":  # EVA may change ranks
        assert counts["adapter"] == SIZES[name]
        meta = deberta().to("meta")
        adapted(method, meta)
        assert Backbone.of(meta).count_parameters() == counts
    optimizer = adam(model)
    for at in range(2):
        step(adaptation, optimizer, at)
    frozen = [key for key in before if key in (now := model.state_dict()) and "classifier" not in key]
    frozen = [
        key
        for key in frozen
        if not key.startswith("pooler") and not (name.endswith(("bias", "biases")) and key.endswith("bias"))
    ]
    assert frozen and all(torch.equal(before[key], now[key]) for key in frozen)

    model.eval()
    backbone = Backbone.of(model, arguments={"num_labels": 2})
    adaptation.export(tmp_path, Origin(str(tmp_path / "base"), small_task(), RECORD, {}, backbone))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, plain = model(**inputs()).logits, base(**inputs()).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(**inputs()).logits, ours, rtol=1e-4, atol=1e-5)
        loaded.base_model.disable_adapter_layers()  # the head stays: what differs now is the adapter alone
        assert (loaded(**inputs()).logits - ours).abs().max() > 1e-3
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        load_adapter(again, tmp_path / "adapter")
        torch.testing.assert_close(again(**inputs()).logits, ours, rtol=1e-4, atol=1e-5)
    assert (plain - ours).abs().max() > 1e-3

    # the module's output is that of W + s B A, with A and B from `pairs`
    pairs = {key: (a, bt, s) for key, a, bt, s in adaptation.pairs()}
    assert bool(pairs) == (name in FULL or name == "olora")
    for key, (a, bt, s) in pairs.items():
        layer = model.get_submodule(key)
        x = torch.randn(5, a.shape[1])
        delta = layer(x) - nn.functional.linear(x, before[f"{key}.weight"], before[f"{key}.bias"])
        torch.testing.assert_close(delta, s * (x @ a.T) @ bt, rtol=1e-3, atol=1e-4)
        assert FULL.get(name) in (None, len(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_on_weights_in_half_precision_is_warned_about(dtype, cfg, deberta, caplog):
    adapted(method_of(cfg, "method=pissa"), deberta().to(dtype))
    assert ("pissa changes the pretrained weights" in caplog.text) == (dtype == torch.bfloat16)


def test_eva_ignores_padding_and_gives_the_same_directions_every_time(cfg, deberta):
    method = method_of(cfg, "method=eva", "method.config.eva_config.rho=1.0")

    def directions(extra):
        torch.manual_seed(extra)  # other random numbers must not matter
        adaptation = adapted(method, deberta())
        torch.manual_seed(extra)
        batch = inputs()
        padded = {key: nn.functional.pad(value, (0, extra), value=0) for key, value in batch.items()}
        adaptation.prepare([padded])
        assert all(p.requires_grad for name, p in adaptation.model.named_parameters() if "lora_" in name)
        return {name: layer.lora_A["default"].weight.detach() for name, layer in adaptation.plain_layers()}

    plain, wide = directions(0), directions(7)
    assert len(plain) == 12
    for name, matrix in plain.items():
        torch.testing.assert_close(wide[name], matrix, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(2), rtol=0.2, atol=0.2)  # PEFT's SVD is randomised


def test_prepare_gets_the_first_training_batches(cfg, quick, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    shown, trained = [], []

    def prepare(self, batches):
        shown.extend(batches)
        assert len(batches) == len(shown) == len(list(batches))

    training_step = FineTuneModule.training_step

    def spy(self, batch, index):
        trained.append(batch)
        return training_step(self, batch, index)

    monkeypatch.setattr(PEFTAdaptation, "prepare", prepare)
    monkeypatch.setattr(FineTuneModule, "training_step", spy)
    small = ["method=peft", "finetune.epochs=1"]
    run(cfg(*[o for o in quick if not o.startswith(("search", "finetune.e"))], *small), tmp_path)
    assert len(shown) == len(trained) == 3
    for ours, theirs in zip(shown, trained, strict=True):
        assert ours.keys() == theirs.keys() - {"labels", "row"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_first_batches_are_those_of_the_runs_seed():
    train, task = rows_of(24), small_task()
    first = {}
    for seed in (0, 3):
        batches = FirstBatches(train, task, Collator(0), 8, seed, most=2)
        drawn = list(LengthGroupedBatchSampler(np.asarray(train["length"]), 8, seed))[:2]
        first[seed] = [batch["input_ids"] for batch in batches]
        assert len(batches) == len(first[seed]) == 2
        for ids, rows in zip(first[seed], drawn, strict=True):
            assert torch.equal(ids, Collator(0)(train[rows])["input_ids"])
    assert not all(torch.equal(one, other) for one, other in zip(first[0], first[3], strict=True))


@pytest.mark.parametrize("seed", [0, 3])
def test_veras_frozen_matrices_are_those_of_the_runs_seed(seed, cfg, deberta):
    assert adapted(method_of(cfg, "method=vera", f"seed={seed}"), deberta()).config.projection_prng_key == seed


def test_ia3_scales_the_outputs_of_keys_and_values_and_the_inputs_of_the_ffn_output(cfg, deberta):
    plain, model = deberta(), deberta()
    adapted(method_of(cfg, "method=ia3"), model)
    factors = {name: p for name, p in model.named_parameters() if "ia3_l" in name}
    assert {name.partition(".base_layer")[0].rpartition(".ia3_l")[0].split("layer.", 1)[1] for name in factors} == {
        f"{layer}.{ROLES[role]}" for layer in (0, 1) for role in ("key", "value", "ffn_output")
    }
    for name, factor in factors.items():
        nn.init.normal_(factor, mean=1.0, std=0.3)
        place = name.partition(".ia3_l")[0]
        base, scale = plain.get_submodule(place), factor.detach().flatten()
        x = torch.randn(3, base.in_features)
        expected = base(x * scale) if place.endswith(ROLES["ffn_output"]) and ".attention." not in place else None
        expected = base(x) * scale if expected is None else expected
        torch.testing.assert_close(model.get_submodule(place)(x), expected, rtol=1e-4, atol=1e-5)


# --- AdaLoRA ---

SETTINGS = {"rank": 1, "dropout": 0.0, "alpha": 8.0, "init_rank": 3, "initial": 0.1, "final": 0.3, "every": 3}
SETTINGS |= {"beta1": 0.85, "beta2": 0.85, "orthogonality": 0.5}


def rank_left(adaptation):
    return sum(int(layer.lora_E["default"].count_nonzero()) for _, layer in adaptation.layers)


@pytest.mark.parametrize("total", [1, 2, 3, 12, 40])
def test_adalora_reaches_its_budget_also_in_short_runs(deberta, total):
    adaptation = adapted(AdaLoRA(**SETTINGS), deberta())
    adaptation.begin(total)
    optimizer = adam(adaptation.model)
    left = []
    for at in range(total):
        step(adaptation, optimizer, at)
        left.append(rank_left(adaptation))
    assert left[-1] == 12 and left[: adaptation.config.tinit] == [36] * adaptation.config.tinit
    assert left[total - 1 - int(0.3 * total) :] == [12] * (1 + int(0.3 * total))
    if total == 40:
        assert any(12 < rank < 36 for rank in left)  # gradually, not at once
    needed = sum(len(a) * (a.shape[1] + bt.shape[1]) for _, a, bt, _ in adaptation.pairs())
    assert adaptation.inference_parameters() == needed <= Backbone.of(adaptation.model).count_parameters()["adapter"]


def test_adalora_averages_importances_with_the_first_decay_and_their_uncertainty_with_the_second(deberta):
    settings = SETTINGS | {"rank": 1, "alpha": 6.0, "beta1": 0.6, "beta2": 0.9, "every": 7, "orthogonality": 0.25}
    adaptation = adapted(AdaLoRA(**settings), deberta())
    adaptation.begin(40)
    step(adaptation, adam(adaptation.model))
    importance, mean, uncertainty = (adaptation.state()[key] for key in AVERAGES)
    for name, value in importance.items():
        assert torch.allclose(mean[name], 0.4 * value)
        assert torch.allclose(uncertainty[name], 0.1 * 0.6 * value)
    config = adaptation.config
    assert (config.init_r, config.target_r, config.lora_alpha, config.deltaT) == (3, 1, 6.0, 7)
    assert (config.tinit, config.tfinal, config.orth_reg_weight) == (4, 12, 0.25)


def test_adalora_exports_modules_without_any_rank(deberta, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = deberta()
    model.save_pretrained(tmp_path / "base")
    adaptation = adapted(AdaLoRA(**SETTINGS), model)
    with torch.no_grad():
        for i, (_, layer) in enumerate(adaptation.layers):
            layer.lora_E["default"][:, 0] = torch.tensor([0.0, 2.0, 1.0][: i % 3] + [0.0] * (3 - i % 3))
    assert rank_left(adaptation) == 4
    backbone = Backbone.of(model, arguments={"num_labels": 2})
    adaptation.export(tmp_path, Origin(str(tmp_path / "base"), small_task(), RECORD, {}, backbone))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert len(loaded.base_model.targeted_module_names) == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).logits, model.eval()(**inputs()).logits, rtol=1e-4, atol=1e-5)


def test_adalora_penalty_is_pefts(deberta):
    adaptation = adapted(AdaLoRA(**SETTINGS), deberta())
    norms = []
    for _, layer in adaptation.layers:
        for m in (layer.lora_A["default"].double(), layer.lora_B["default"].double().T):
            norms.append((m @ m.T - torch.eye(3, dtype=torch.float64)).square().sum().sqrt().item())
    assert adaptation.penalty().item() == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)
    model, batch = adaptation.model.eval(), inputs()
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    plain = model(**batch, labels=labels).loss
    theirs = adaptation.tuner(**batch, labels=labels).loss
    assert (theirs - plain).item() == pytest.approx(adaptation.penalty().item(), rel=1e-4)


def test_adalora_penalty_is_not_in_the_reported_losses(cfg, quick, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    short = [o for o in quick if not o.startswith(("search", "finetune.epochs"))]
    short = [*short, "finetune.epochs=1", "task.train_rows=64", "method=adalora"]
    without = run(cfg(*short, "method.orthogonality=0"), tmp_path / "without").record
    monkeypatch.setattr(AdaLoRAAdaptation, "penalty", lambda self: torch.tensor(1000.0))
    assert run(cfg(*short), tmp_path / "with").record["history"] == without["history"]


def test_adalora_continues_from_its_saved_averages(deberta):
    def start():
        torch.manual_seed(3)
        adaptation = adapted(AdaLoRA(**SETTINGS), deberta())
        return adaptation, adam(adaptation.model)

    whole, optimizer = start()
    whole.begin(40)
    for at in range(12):
        step(whole, optimizer, at)
    file = io.BytesIO()
    torch.save({"method": whole.state(), "model": whole.model.state_dict(), "adam": optimizer.state_dict()}, file)
    file.seek(0)
    for at in range(12, 20):
        step(whole, optimizer, at)

    kept = torch.load(file, weights_only=True)
    assert all(len(kept["method"][key]) == 36 for key in AVERAGES) and len(kept["method"]["rank_pattern"]) == 12
    resumed, optimizer = start()
    resumed.load_state(kept["method"])
    resumed.begin(40)
    resumed.model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["adam"])
    for at in range(12, 20):
        step(resumed, optimizer, at)
    for key in AVERAGES:
        ours, theirs = resumed.state()[key], whole.state()[key]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.state()["rank_pattern"] == whole.state()["rank_pattern"]


def test_resumed_adalora_gives_the_same_result(quick, tmp_path):
    short = [*(o for o in quick if not o.startswith("search")), "task.train_rows=64"]
    short += ["method=adalora", "method.every=2", "method.final=0"]
    whole = run_of(*short, folder=tmp_path / "whole")
    stop(*short, folder=tmp_path / "part")
    resumed = run_of(*short, "resume=true", folder=tmp_path / "part")
    for key in ("status", "metrics", "history", "params"):
        assert resumed.record[key] == whole.record[key], key
    for epoch, n_averages in ((2, 3 * 24), (3, 0)):  # the last reduction drops them
        files = [next(each.folder.glob(f"checkpoints/finetune-000{epoch}-*.ckpt")) for each in (resumed, whole)]
        again, end = (torch.load(file, weights_only=True) for file in files)
        assert all(torch.equal(again["state_dict"][name], value) for name, value in end["state_dict"].items())
        ours, theirs = (each["diffora"]["state"]["method"] for each in (again, end))
        for key in AVERAGES:
            assert len(theirs[key]) == n_averages
            assert all(torch.equal(ours[key][name], value) for name, value in theirs[key].items())
        assert ours["rank_pattern"] == theirs["rank_pattern"]
    assert sum(map(sum, theirs["rank_pattern"].values())) == 2 * 24


# --- mistakes ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("method.config._target_=peft.DoraConfig", "does not exist in PEFT; did you mean peft.DeloraConfig or peft.Lo"),
        ("method.config._target_=os.system", "must be a configuration class of PEFT"),
        ("method.config._target_=peft.get_peft_model", "is not a configuration class of PEFT"),
        ("method.config._target_=peft.PromptTuningConfig", "learns a prompt"),
        ("method.config._target_=peft.AdaLoraConfig", "which method=adalora does"),
        ("method.config._target_=peft.IA3Config", "has no argument r, lora_alpha, lora_dropout"),
        ("+method.config.use_dra=true", "use_dra (did you mean use_dora?)"),
        ("+method.config.target_modules=[query]", "method.config.target_modules cannot be set: method.places says"),
        ("+method.config.modules_to_save=[classifier]", "the head is trained and saved anyway"),
        ("+method.config.bias=some", "method.config.bias='some' must be one of none, all, lora_only"),
        ("+method.config.init_lora_weights=corda", "needs PEFT's own pass over data"),
        ("+method.config.use_bdlora={_target_:os.system}", "must be a configuration class of PEFT"),
        ("+method.config.layers_pattern=layer", "PEFT refuses method.config (peft.LoraConfig): When `layers_pattern`"),
        ("+method.config.use_rslora=maybe", "method.config.use_rslora='maybe' must be true or false"),
        ("method.config.lora_alpha=-3", "method.config.lora_alpha=-3 must be a number above 0"),
        ("method.config.r=0", "method.config.r=0 must be a whole number of at least 1"),
        ("rank=0", "rank=0 must be a whole number of at least 1"),
        ("finetune.dropout=1", "finetune.dropout=1 must be a number in [0, 1)"),
        ("method.places=[valu]", "method.places: valu is no role and no candidate of model=tiny"),
        ("method.places=[]", "method.places=[] must be a list"),
        ("method=adalora rank=3", "method.init_rank=3 must be above rank=3"),
        ("method=adalora method.initial=0.7", "leave no steps to reduce ranks in"),
        ("method=adalora method.final=1.5", "method.final=1.5 must be a number in [0, 1)"),
        ("method=adalora method.every=0", "method.every=0 must be a whole number of at least 1"),
        ("method=adalora method.beta2=1", "method.beta2=1 must be a number between 0 and 1"),
        ("method=adalora method.orthogonality=-1", "method.orthogonality=-1 must be a number of at least 0"),
    ],
)
def test_a_bad_setting_gives_one_message(cfg, overrides, words):
    choice = [] if overrides.startswith("method=") else ["method=peft"]
    with pytest.raises(UserError) as caught:
        check(cfg("experiment=quickstart", *choice, *overrides.split()))
    (message,) = caught.value.problems
    assert words in message


def test_settings_that_do_not_fit_the_model_give_pefts_message(cfg, deberta):
    without = ["~method.config.lora_alpha", "~method.config.lora_dropout"]
    method = method_of(cfg, "method=peft", "method.config._target_=peft.MissConfig", "rank=64", *without)
    with pytest.raises(UserError, match=r"PEFT cannot put MissConfig on this model: .*64"):
        adapted(method, deberta())


def test_a_stack_whose_names_end_others_is_refused_because_peft_would_adapt_both():
    from peft import LoraConfig

    def two_stacks():
        inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "encoder": inner})

    inject(two_stacks(), LoraConfig(target_modules=["encoder.layers.0"]))
    model = two_stacks()
    with pytest.raises(UserError, match=r"PEFT would adapt encoder\.layers\.0 too"):
        inject(model, LoraConfig(target_modules=["layers.0"]))
    assert not any(hasattr(module, "lora_A") for module in model.modules())
