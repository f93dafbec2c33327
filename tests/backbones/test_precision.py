"""Half precision, quantised weights and gradient checkpointing do not change how the adapters are trained."""

import pytest
import torch

from diffora.api import load_adapter
from diffora.backbones import quantise
from diffora.backbones.backbone import Backbone
from diffora.backbones.load import load_backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.linear import weight_of
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.settings.sections import Model
from diffora.tasks.base import get_task

RUN = [
    "task=dialogue",
    "model=tiny_llama",
    "trainer=cpu",
    "logger=[csv]",
    "task.train_rows=64",
    "task.validation_rows=16",
    "finetune.epochs=1",
    "finetune.warmup_steps=1",
]


def dialogue(cfg, *overrides):
    composed = cfg(*RUN, *overrides)
    return composed, get_task(composed.task)


def adapted(composed, task):
    """The embedded Llama with adapters whose parameters are all nonzero."""
    torch.manual_seed(0)
    model = load_backbone(model_of(composed.model), task.model_request()).model
    grid = find_grid(model)
    attach(
        model,
        grid.names,
        torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool),
        4,
        None,
        8,
        dropout=0.1,
        freeze=False,
    )
    for _, layer in lowrank_layers(model):
        torch.nn.init.normal_(layer.lora_bt, std=0.05)
    return model.train()


def gradients(model, task) -> dict[str, torch.Tensor]:
    batch = task.dummy(2, model)
    ids = torch.randint(6, 300, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    batch |= {"input_ids": ids, "labels": ids}
    torch.manual_seed(1)  # dropout
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    loss = task.loss(model(**task.inputs(batch)), batch)
    return {"loss": loss.detach()} | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_equal_gradients(cfg, dtype):
    composed, task = dialogue(cfg, f"model.dtype={dtype}")
    model = adapted(composed, task)
    gradients(model, task)  # the layers see here which of them read the same
    once = gradients(model, task)
    Backbone.of(model).checkpoint_activations()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        twice = gradients(model, task)
    assert saved  # the hooks of checkpointing are inner ones: tensors that it does not keep do not come here
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def test_only_frozen_weights_are_in_half_precision(cfg):
    composed, task = dialogue(cfg, "model.dtype=bfloat16")
    model = adapted(composed, task)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    exact = gradients(adapted(*dialogue(cfg)), task)
    rough = gradients(model, task)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert torch.cosine_similarity(rough[name].flatten(), value.flatten(), dim=0) > 0.97, name


def test_a_new_head_on_a_half_precision_backbone_is_trained_in_full(cfg, quick, tmp_path):
    overrides = [o for o in quick if not o.startswith("search.")]
    result = run(cfg(*overrides, "method=lora", "model.dtype=bfloat16", "finetune.epochs=1"), tmp_path)
    assert result.record["status"] == "completed"
    kinds = {p.dtype for p in Backbone.of(result.model).head_parameters()}
    assert kinds == {torch.float32} and result.model.dtype == torch.bfloat16


def test_training_weights_in_half_precision_is_refused(cfg, tmp_path):
    with pytest.raises(UserError, match=r"trains model\.embed_tokens\.weight, which is in torch\.bfloat16: use model"):
        run(cfg(*RUN, "method=full_ft", "model.dtype=bfloat16"), tmp_path / "run")
    with pytest.raises(UserError, match=r"use model\.dtype=float32"):
        run(cfg(*RUN, "method=full_ft", "model.dtype=bfloat16", "dry_run=true"), tmp_path / "dry")


def test_a_backbone_that_cannot_checkpoint_is_refused():
    with pytest.raises(UserError, match=r"trainer\.gradient_checkpointing=true: Linear does not support it"):
        Backbone.of(torch.nn.Linear(2, 2)).checkpoint_activations()


def test_the_second_order_and_checkpointing_are_refused_together(cfg):
    with pytest.raises(UserError, match=r"search\.order=2 .* trainer\.gradient_checkpointing=true"):
        check(cfg(*RUN, "search.order=2", "trainer.gradient_checkpointing=true"))


def test_a_run_computes_the_same_with_checkpointing(cfg, tmp_path):
    runs = [
        run(cfg(*RUN, "search.epochs=1", f"trainer.gradient_checkpointing={flag}"), tmp_path / flag)
        for flag in ("false", "true")
    ]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].selection.gamma_bar == runs[1].selection.gamma_bar


def test_quantising_without_the_package_is_refused(cfg, monkeypatch):
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.quantise=4bit needs bitsandbytes: pip install 'diffora\[quantised\]'"):
        check(cfg(*RUN, "model.quantise=4bit"))
    check(cfg(*RUN, "model.quantise=4bit", "dry_run=true"))  # counts only


@pytest.mark.parametrize("method", ["full_ft", "bitfit"])
def test_methods_that_train_pretrained_weights_refuse_quantised_ones(cfg, method):
    composed = cfg(f"method={method}", "model=tiny_llama", "task=dialogue", "model.quantise=4bit", "dry_run=true")
    with pytest.raises(UserError, match=f"4bit freezes the pretrained weights, and method={method} trains them"):
        check(composed)


@pytest.mark.parametrize("selector", ["gradient", "activation", "plop", "fisher", "kappa", "spectrum"])
def test_selectors_that_read_weights_refuse_quantised_ones(cfg, selector):
    chosen = ["method=diffora", "model=tiny_llama", "task=dialogue", "dry_run=true", f"method.selector={selector}"]
    check(cfg(*chosen))
    with pytest.raises(UserError, match=rf"4bit does not go with method\.selector={selector}, .*: use search,"):
        check(cfg(*chosen, "model.quantise=4bit"))


def test_quantised_layers_compute_in_the_dtype_of_autocast():
    """On a GPU, LayerNorm gives float32 under autocast, and bitsandbytes gives back the dtype that it gets."""

    class Quantised(torch.nn.Linear):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float()).to(x.dtype)

    Quantised.__module__ = "bitsandbytes.nn.modules"
    model = torch.nn.Sequential(Quantised(2, 2), torch.nn.LayerNorm(2))
    x = torch.ones(1, 2)
    quantise.follow_autocast(model)
    assert model[0](x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
    assert not model[1]._forward_pre_hooks


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def test_gradients_pass_a_quantised_backbone(cfg, bnb):
    """Gradients equal those with the dequantised weights, also after an evaluation."""
    composed, task = dialogue(cfg, "model.quantise=4bit")
    model = adapted(composed, task)
    task.check(model)  # in evaluation mode
    found = gradients(model, task)

    reference = adapted(*dialogue(cfg))
    for name, layer in lowrank_layers(reference):
        quantised = model.get_submodule(name).base.weight
        layer.base.weight.data.copy_(bnb.functional.dequantize_4bit(quantised, quantised.quant_state))
    for name, value in gradients(reference, task).items():
        assert torch.cosine_similarity(found[name].flatten(), value.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("quantise", ["4bit", "8bit"])
def test_a_quantised_backbone_is_searched_trained_and_loaded_again(cfg, bnb, tmp_path, quantise):
    overrides = [*RUN, f"model.quantise={quantise}"]
    result = run(cfg(*overrides, "search.epochs=1", "trainer.gradient_checkpointing=true"), tmp_path / "run")
    plain = load_backbone(model_of(cfg(*RUN).model), get_task(cfg(*RUN).task).model_request())
    assert result.record["params"]["backbone"] == plain.n_parameters
    layers = dict(lowrank_layers(result.model))
    assert (
        layers
        and {type(layer.base).__name__ for layer in layers.values()}
        == {
            "4bit": {"Linear4bit"},
            "8bit": {"Linear8bitLt"},
        }[quantise]
    )
    assert type(result.model.lm_head) is torch.nn.Linear
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    for action in (lambda layer: layer.merge(), lambda layer: weight_of(layer.base)):
        with pytest.raises(UserError, match="is quantised and cannot be read or changed"):
            action(next(iter(layers.values())))

    again = load_backbone(model_of(cfg(*overrides).model), get_task(cfg(*overrides).task).model_request()).model
    load_adapter(again, tmp_path / "run" / "adapter")
    ids = torch.randint(6, 300, (2, 12))
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits for model in (result.model, again))
    torch.testing.assert_close(found, expected)


def test_scores_that_read_weights_are_refused_on_quantised_ones(cfg, bnb, tmp_path):
    for selector in ("gradient", "activation"):
        with pytest.raises(UserError, match="is quantised and cannot be read"):
            run(cfg(*RUN, "model.quantise=4bit", f"method.selector={selector}"), tmp_path / selector)


def test_heads_and_poolers_are_not_quantised(bnb, tmp_path):
    from small import small_task
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=30, **shape)).save_pretrained(tmp_path)
    cfg = Model(name="b", path=str(tmp_path), quantise="8bit")
    model = load_backbone(cfg, small_task().model_request()).model
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds["classifier"] == kinds["bert.pooler.dense"] == "Linear"
    assert {kind for name, kind in kinds.items() if "layer." in name} == {"Linear8bitLt"}
    assert model.classifier.weight.requires_grad and model.classifier.weight.dtype == torch.float32
