"""The scoring stage on a small DeBERTa: right values, an unchanged model, and the same scores for divided work."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ddp_score import TYPES, scored, uneven_task
from small import rows_of, small_deberta, small_task
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2ForSequenceClassification

from diffora.backbones.backbone import Backbone
from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.loop.data import SearchData
from diffora.loop.splits import split_search
from diffora.scoring.measures import MEASURES
from diffora.scoring.stage import run_search
from diffora.tasks.tokenise import Collator

ON_PATH = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
WITH_TESTS = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, ON_PATH))}
WORKER = Path(__file__).with_name("ddp_score.py")
EACH = pytest.mark.parametrize("criterion", MEASURES)

COLLATE = Collator(0), Collator(0)  # for training and for evaluation


def batches_of(count):
    """The search-train batches that the stage sees."""
    data = SearchData(rows_of(), COLLATE, split_search(np.arange(48), seed=0), batch_size=8, seed=0)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return [item["train"][0] for item, _ in zip(loader, range(count), strict=False)]


def mean_loss(model, batches):
    losses = []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        losses.append(F.cross_entropy(model(**inputs).logits, batch["labels"]))
    return torch.stack(losses).mean()


def test_gradient_scores_against_finite_differences_in_float64():
    """For every entry of two matrices. One of them is Q, which DeBERTa also applies to its table of positions."""
    scores = scored("gradient", small_deberta(dtype=torch.float64), precision="64-true").scores
    model = small_deberta(dtype=torch.float64).eval()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    for i, j in ((0, 0), (1, 3)):
        flat = model.get_parameter(f"{names[i][j]}.weight").detach().view(-1)
        total = 0.0
        with torch.no_grad():
            for at in range(len(flat)):
                keep = flat[at].item()
                flat[at] = keep + 1e-5
                up = mean_loss(model, batches_of_2)
                flat[at] = keep - 1e-5
                total += ((up - mean_loss(model, batches_of_2)).item() / 2e-5) ** 2
                flat[at] = keep
        assert scores[i, j].item() == pytest.approx(total**0.5, rel=1e-5)
        assert total > 1e-8


batches_of_2 = batches_of(2)


def test_gradient_scores_against_one_backward_pass_of_the_mean_loss():
    model = small_deberta().eval()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for row in names for name in row]
    grads = torch.autograd.grad(mean_loss(model, batches_of_2), weights)
    expected = torch.tensor([grad.square().sum().sqrt() for grad in grads]).view(2, 4)
    torch.testing.assert_close(scored("gradient").scores, expected, rtol=1e-4, atol=1e-7)


def test_activation_scores_against_a_plain_loop():
    """The input of Q and V is the hidden state, which the model returns."""
    scores = scored("activation").scores
    model = small_deberta().eval()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    tokens = [[], []]
    with torch.no_grad():
        for batch in batches_of_2:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            for layer in range(2):
                for x, mask in zip(hidden[layer], batch["attention_mask"], strict=True):
                    tokens[layer] += [x[t] for t in range(len(mask)) if mask[t]]
    assert len(tokens[0]) < sum(batch["input_ids"].numel() for batch in batches_of_2)  # there was padding
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = model.get_parameter(f"{names[i][j]}.weight").detach()
        norms = [sum(token[c].item() ** 2 for token in tokens[i]) / len(tokens[i]) for c in range(16)]
        expected = sum(abs(weight[a, c].item()) * norms[c] ** 0.5 for a in range(16) for c in range(16)) / 256
        assert scores[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_plop_scores_against_a_plain_loop_in_float64():
    """The input of Q and V is the hidden state, which the model returns. The directions are drawn once more here."""
    scores = scored("plop", small_deberta(dtype=torch.float64), precision="64-true").scores
    model = small_deberta(dtype=torch.float64).eval()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    tokens = [[], []]
    with torch.no_grad():
        for batch in batches_of_2:
            hidden = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
            for layer in range(2):
                for x, mask in zip(hidden.hidden_states[layer], batch["attention_mask"], strict=True):
                    tokens[layer] += [x[t].numpy() for t in range(len(mask)) if mask[t]]
    u = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    norm = np.linalg.norm
    for j in (0, 1):
        of_layers = []
        for i in (0, 1):
            weight = model.get_parameter(f"{names[i][j]}.weight").detach().numpy()
            weight = weight / np.sqrt((weight**2).mean())
            by_data = np.mean([norm(weight @ z) / norm(z) for z in tokens[i]])
            of_layers.append(by_data / np.mean([norm(weight @ z) / norm(z) for z in u]))
        assert scores[:, j].tolist() == pytest.approx([-np.mean(of_layers)] * 2, rel=1e-10)
    assert scores[0].std() > 1e-3


def test_fisher_scores_against_gradients_of_single_rows_in_float64():
    scores = scored("fisher", small_deberta(dtype=torch.float64), precision="64-true").scores
    model = small_deberta(dtype=torch.float64).eval()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for row in names for name in row]
    total, n = [0.0] * len(weights), 0
    for batch in batches_of_2:
        for i in range(len(batch["row"])):
            length = int(batch["attention_mask"][i].sum())
            row = {k: v[i : i + 1, :length] if v.dim() == 2 else v[i : i + 1] for k, v in batch.items()}  # no padding
            grads = torch.autograd.grad(mean_loss(model, [row]), weights)
            total = [t + (g.numpy() ** 2).mean() for t, g in zip(total, grads, strict=True)]
            n += 1
    assert n == 16
    assert scores.flatten().tolist() == pytest.approx([t / n for t in total], rel=1e-9)


@EACH
def test_weights_in_bfloat16_are_computed_with_in_float32(criterion):
    """The scores of a model in bfloat16 are those of the same values in float32, up to the model's own rounding."""
    model = small_deberta(dtype=torch.bfloat16)
    same = copy.deepcopy(model).float()
    found = scored(criterion, model, precision="bf16-mixed").scores
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scored(criterion, same).scores, rtol=0.1, atol=1e-4)


@EACH
def test_gpt2s_transposed_weights_score_like_usual_ones(criterion):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    model = Backbone.of(GPT2ForSequenceClassification(config)).freeze().model
    usual, types = copy.deepcopy(model), find_grid(model).types
    for name in (name for row in find_grid(model).names for name in row):
        layer = usual.get_submodule(name)
        linear = torch.nn.Linear(*layer.weight.shape)
        linear.weight.data, linear.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
        usual.set_submodule(name, linear.requires_grad_(False))
    scores = scored(criterion, model, types=types).scores
    torch.testing.assert_close(scores, scored(criterion, usual, types=types).scores)
    assert scores.shape == (2, 4) and scores.std() > 0


@EACH
def test_quantised_weights_are_refused(criterion):
    model = small_deberta()
    linear = model.get_submodule("deberta.encoder.layer.1.output.dense")
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="the weight of a Linear is quantised"):
        scored(criterion, model)


@EACH
def test_weights_head_and_modes_are_untouched(criterion):
    model = small_deberta(dropout=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    scored(criterion, model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@EACH
def test_dropout_is_off(criterion):
    assert torch.equal(scored(criterion, small_deberta(dropout=0.5)).scores, scored(criterion).scores)


@EACH
def test_the_given_number_of_batches_comes_from_search_train_rows_only(criterion, monkeypatch):
    from diffora.scoring.one_pass_stages import MeasureStage

    seen = []
    step = MeasureStage.training_step
    monkeypatch.setattr(
        MeasureStage,
        "training_step",
        lambda self, batch, i: seen.append(batch["train"][0]["row"]) or step(self, batch, i),
    )
    one, two = scored(criterion, batches=1), scored(criterion, batches=2)
    assert [len(rows) for rows in seen] == [8, 8, 8] and not torch.equal(one.scores, two.scores)
    assert set(torch.cat(seen).tolist()) <= set(split_search(np.arange(48), seed=0)[0].tolist())
    seen.clear()
    scored(criterion, batches=99)
    assert sorted(torch.cat(seen).tolist()) == split_search(np.arange(48), seed=0)[0].tolist()  # one pass, not more


@EACH
def test_dividing_a_batch_into_parts_does_not_change_the_scores(criterion):
    whole, parts = scored(criterion), scored(criterion, accumulate=3)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-5, atol=1e-8)


def counting(labels):
    """A task in whose loss only the rows of one class count."""

    def weight(batch):
        return float((batch["labels"] == labels).sum())

    def loss(output, batch):
        losses = F.cross_entropy(output.logits, batch["labels"], reduction="none")
        return (losses * (batch["labels"] == labels)).sum() / max(weight(batch), 1.0)

    task = small_task()
    task.weight, task.loss = weight, loss
    return task


@EACH
def test_rows_that_do_not_count_for_the_loss_weigh_the_same_however_they_are_divided(criterion):
    whole, single = (scored(criterion, accumulate=n, task=counting(1)) for n in (1, 8))
    torch.testing.assert_close(single.scores, whole.scores, rtol=1e-5, atol=1e-8)
    same = torch.allclose(whole.scores, scored(criterion).scores, rtol=1e-6, atol=0)
    assert same == (criterion in ("activation", "plop"))  # they need no labels


@pytest.mark.parametrize("criterion", ["gradient", "fisher"])
def test_a_weight_that_is_computed_in_each_pass_has_no_gradient_and_is_refused(criterion):
    model = small_deberta()
    prune.random_unstructured(model.get_submodule("deberta.encoder.layer.1.output.dense"), "weight", 0.5)
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense is computed from others"):
        scored(criterion, model)
    scored("activation", model)


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=300, env=WITH_TESTS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    by_function, uneven = torch.tensor(first.pop("function")), torch.tensor(first.pop("uneven"))
    assert (by_function.floor() == 16).all() and by_function.std() > 0  # both processes see all rows of two batches
    for criterion, found in first.items():
        torch.testing.assert_close(torch.tensor(found), scored(criterion).scores, rtol=1e-4, atol=1e-7)
    alone = scored("gradient", task=uneven_task()).scores
    torch.testing.assert_close(uneven, alone, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(alone, scored("gradient").scores, rtol=0.01)


@EACH
def test_bfloat16_scores_are_close(criterion):
    exact, rough = scored(criterion).scores, scored(criterion, precision="bf16-mixed").scores
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize(("precision", "hint"), [("16-mixed", "; try trainer.precision=32-true"), ("32-true", "")])
def test_a_score_that_is_not_finite_stops_the_run(monkeypatch, precision, hint):
    grid = find_grid(small_deberta(), candidates=TYPES)
    scores = torch.zeros(grid.n_layers, grid.n_types)
    selector = SimpleNamespace(run=lambda context: SimpleNamespace(scores=scores))
    monkeypatch.setattr("diffora.scoring.stage.find_selector", lambda name: selector)
    settings = SimpleNamespace(trainer=SimpleNamespace(precision=precision))
    context = SimpleNamespace(settings=SimpleNamespace(ensemble=1), parts=SimpleNamespace(grid=grid, settings=settings))
    assert run_search(context, "attribution").scores is scores
    scores[1, 2] = float("nan")
    with pytest.raises(UserError) as error:
        run_search(context, "attribution")
    assert error.value.problems == [f"method.selector=attribution: a score is not finite{hint}"]
