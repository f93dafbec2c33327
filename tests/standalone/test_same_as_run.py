"""`diffora.search` and a run of `train.py` find the same relaxed DAM for the same seed and batches."""

import copy

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import diffora
from diffora.hub import EMBEDDED
from diffora.kernels.dropout import use_cheap_dropout
from diffora.run.experiment import run
from diffora.scoring import trained
from diffora.scoring.bilevel import SearchModule

SEED = 3


class Rounds:
    """A loader whose passes give the batches of a run's rounds."""

    def __init__(self, rounds):
        self.rounds, self.steps = iter(rounds), len(rounds[0])

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter(next(self.rounds))


def searched_by_a_run(cfg, folder, monkeypatch, *overrides):
    """(result, alpha, training batches by round, validation batches) of a run.

    A run draws the first A after its other random numbers. Here it draws them from the seed, as the library does.
    """
    alphas, rounds, valid = [], [], []
    attach, step, start = trained.attach, SearchModule.training_step, SearchModule.on_train_epoch_start

    def attach_from_seed(*arguments, **more):
        alphas.append(arguments[5])
        torch.manual_seed(SEED)
        return attach(*arguments, **more)

    def noted(self, batch, batch_idx):
        taken = copy.deepcopy(batch)
        rounds[-1].extend(self.task.inputs(part) | {"labels": part["labels"]} for part in taken["train"])
        valid.append(self.task.inputs(taken["valid"]) | {"labels": taken["valid"]["labels"]})
        return step(self, batch, batch_idx)

    def new_round(self):
        rounds.append([])
        return start(self)

    monkeypatch.setattr(trained, "attach", attach_from_seed)
    monkeypatch.setattr(SearchModule, "training_step", noted)
    monkeypatch.setattr(SearchModule, "on_train_epoch_start", new_round)
    more = [
        f"seed={SEED}",
        "method=diffora",
        "search.epochs=2",
        "search.gamma_lr=0.05",
        "finetune.epochs=1",
        "finetune.warmup_steps=0",
    ]
    result = run(cfg(*overrides, *more, "logger=csv", "trainer=cpu"), folder)
    return result, alphas[0], rounds, valid


def assert_the_library_agrees(result, alpha, rounds, valid, path):
    """A user's own code: load the model, give the same batches, leave the loss to the model."""
    L.seed_everything(SEED, verbose=False)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype="float32")
    use_cheap_dropout(model)  # a run draws its dropout masks in this way
    config = result.selection.config["search"]
    found = diffora.search(
        model,
        Rounds(rounds),
        valid,
        rounds=2,
        k=result.selection.k,
        candidates=result.selection.types,
        rank=config["rank"],
        alpha=alpha,
        lr=config["lr"],
        gamma_lr=config["gamma_lr"],
        weight_decay=config["weight_decay"],
        clip=config["clip"],
        train_steps=config["train_steps"],
        **{name: config[name] for name in ("relaxation", "head_warmup", "readout", "patience")},
        seed=SEED,
        progress=False,
    )
    assert (found.readout, found.rounds) == (result.selection.readout, result.selection.rounds)
    kept = "gamma_bar" if found.readout == "gamma" else "scores"
    ours, theirs = torch.tensor(getattr(found, kept)), torch.tensor(getattr(result.selection, kept))
    assert theirs.std() > 1e-3
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert found.selected == result.selection.selected and found.modules == result.selection.modules


def test_on_the_embedded_paraphrase_task(cfg, tmp_path, monkeypatch):
    overrides = ["task=paraphrase", "model=tiny", "task.train_rows=96", "task.validation_rows=16"]
    found = searched_by_a_run(cfg, tmp_path / "run", monkeypatch, *overrides)
    assert [len(batches) for batches in found[2]] == [len(found[3]) // 2] * 2
    assert_the_library_agrees(*found, EMBEDDED)


@pytest.mark.parametrize(
    "options",
    [
        ["search.relaxation=scaled_softmax", "search.head_warmup=0.25"],
        ["search.readout=early_gradient", "search.patience=3"],
    ],
)
def test_with_other_gates_and_read_outs(cfg, tmp_path, monkeypatch, options):
    overrides = ["task=paraphrase", "model=tiny", "task.train_rows=96", "task.validation_rows=16", *options]
    assert_the_library_agrees(*searched_by_a_run(cfg, tmp_path / "run", monkeypatch, *overrides), EMBEDDED)


@pytest.mark.slow
def test_on_mrpc_with_minilm(cfg, real_data, minilm, tmp_path, monkeypatch):
    overrides = ["task=mrpc", f"task.path={real_data / 'mrpc'}", "model=minilm", f"model.path={minilm}"]
    found = searched_by_a_run(cfg, tmp_path / "run", monkeypatch, *overrides, "task.max_train_rows=256")
    assert_the_library_agrees(*found, minilm)
