"""`DifforaCallback` in transformers' `Trainer`: equal to the formulas, and exact after a checkpoint."""

import copy
import types

import accelerate
import pytest
import torch
import transformers
from data import MAKERS, attached, bert, fill, pairs, rows, trained, trainer, with_peft
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import diffora
from diffora.adapters.pairs import retie
from diffora.core.masking import draw_rows
from diffora.errors import UserError
from diffora.loop import streams
from diffora.trainers.adapted import adaptation_of
from diffora.trainers.extras import Extras, add_penalty
from diffora.trainers.trainer import DifforaCallback


@pytest.fixture(autouse=True)
def warnings_of_transformers():
    """Let `caplog` see what transformers logs."""
    transformers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()


def batches_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """A list that gets the inputs of every call of a model."""
    seen: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    return seen


def by_hand(model, batches, seed, weight, parts, steps, lr=1e-2, clip=0.5):
    """RM-LoRA written out: [R] eq. 10 in the loss, gradients masked as in [R] Algorithm 1, then clipped; AdamW."""
    adapters = list({id(a): (a, b, transposed) for _, a, b, transposed, _ in pairs(model)}.values())
    ranks = [len(a) for a, _, _ in adapters]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        mine = batches[parts * step : parts * (step + 1)]
        logits = torch.cat([model(input_ids=batch["input_ids"]).logits for batch in mine])
        mean = nn.functional.cross_entropy(logits, torch.cat([batch["labels"] for batch in mine]))
        penalty = torch.zeros((), dtype=torch.float64)
        for a, b, transposed in adapters:
            bt = b if transposed else b.T
            penalty = penalty + sum(((m @ m.T - torch.eye(len(m))) ** 2).sum() for m in (a, bt))
        (mean + weight * penalty).backward()
        for (a, b, transposed), (live_a, live_b) in zip(
            adapters, draw_rows(ranks, "half", False, seed, 5, step), strict=True
        ):
            dead_a = [i for i in range(len(a)) if i not in live_a.tolist()]
            dead_b = [i for i in range(len(a)) if i not in live_b.tolist()]
            a.grad[dead_a] = 0
            if transposed:
                b.grad[dead_b] = 0
            else:
                b.grad[:, dead_b] = 0
        total = torch.sqrt(sum((p.grad**2).sum() for p in weights))
        for parameter in weights:
            parameter.grad *= min(1.0, clip / (total + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("made", MAKERS)
def test_rm_lora_equals_the_formulas_in_float64(made, parts, tmp_path):
    model = MAKERS[made]().double()
    hand = copy.deepcopy(model)
    batches = batches_of(model)
    run = trainer(
        model,
        tmp_path,
        [DifforaCallback(penalty=0.05, mask_rank="half", seed=7)],
        gradient_accumulation_steps=parts,
        lr_scheduler_type="constant",
        save_strategy="no",
        optim="adamw_torch",
    )
    run.train()
    losses = by_hand(hand, copy.deepcopy(batches), 7, 0.05, parts, 6)
    for name, value in trained(hand).items():
        assert torch.allclose(value, trained(model)[name], rtol=1e-9, atol=1e-11), name
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-6)  # the reported loss is without the penalty


def resumed(make, folder, callback, **given):
    """The weights of a training that stops at its third step and resumes, and those of one that never stops."""
    whole = make()
    run = trainer(whole, folder / "whole", [callback()], **given)
    run.train()
    again = make()
    second = trainer(again, folder / "again", [callback()], **given)
    second.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    return run, second


@pytest.mark.parametrize(
    "given", [{"mask_every": "epoch", "mask_independent": True}, {"mask_target": "update"}], ids=str
)
@pytest.mark.parametrize("made", MAKERS)
def test_a_training_resumes_as_if_it_had_never_stopped(made, given, tmp_path, caplog):
    def callback():
        return DifforaCallback(0.05, 1, **given)

    run, again = resumed(MAKERS[made], tmp_path, callback, max_steps=8, dataloader_drop_last=True)
    for name, value in trained(run.model).items():
        assert torch.equal(value, trained(again.model)[name]), name
    log = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["penalty"] for entry in log] == [e["penalty"] for e in again.state.log_history if "loss" in e]
    assert "missing keys" not in caplog.text


@pytest.mark.parametrize("independent", [False, True])
def test_only_the_drawn_entries_move_with_target_update(independent, tmp_path):
    for make in MAKERS.values():
        model = make()
        adapters = list({id(a): (a, b, transposed) for _, a, b, transposed, _ in pairs(model)}.values())
        before = [(a.detach().clone(), b.detach().clone()) for a, b, _ in adapters]
        callback = DifforaCallback(0.05, 1, mask_target="update", mask_independent=independent, seed=7)
        trainer(model, tmp_path, [callback], max_steps=1, save_strategy="no").train()
        drawn = draw_rows([len(a) for a, _, _ in adapters], 1, independent, 7, streams.MASK_STEP, 0)
        assert any(not torch.equal(*live) for live in drawn) == independent
        for (a, b, transposed), (old_a, old_b), live in zip(adapters, before, drawn, strict=True):
            moved = (a != old_a).any(1), (b != old_b).any(1 if transposed else 0)
            assert [m.nonzero().flatten().tolist() for m in moved] == [r.tolist() for r in live]
            assert not a._backward_hooks and not b._backward_hooks


def test_the_best_checkpoint_is_loaded_with_shared_pairs(tmp_path, caplog):
    model = attached()
    run = trainer(
        model,
        tmp_path,
        [DifforaCallback(0.05, "half")],
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
    )
    run.train()
    layers = {name: (a, b) for name, a, b, _, _ in pairs(model)}
    tied = [names for names in layers if sum(layers[names][0] is a for a, _ in layers.values()) > 1]
    assert len(tied) > 1
    best = transformers.modeling_utils.load_state_dict(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert sum(f"{name}.lora_a" in best for name in tied) < len(tied)  # a shared pair is saved once
    assert all(torch.equal(layers[key.rpartition(".")[0]][0], best[key]) for key in best if key.endswith("lora_a"))
    assert "missing keys" not in caplog.text
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


def test_the_evaluation_loss_has_no_penalty(tmp_path):
    model = attached()
    run = trainer(model, tmp_path, [DifforaCallback(1.0)], max_steps=1, save_strategy="no")
    run.train()
    data = rows(8, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(data["input_ids"])).logits
    expected = nn.functional.cross_entropy(logits, torch.tensor(data["labels"])).item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.state.log_history[0]["penalty"] > 50 > run.state.log_history[0]["loss"]


def adalora(**given):
    config = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 8}
    names = ["query", "key", "intermediate.dense"]
    return with_peft(AdaLoraConfig(target_modules=names, task_type="SEQ_CLS", **config | given))


def test_adalora_equals_the_loop_of_pefts_documentation(tmp_path):
    model = adalora()
    hand = copy.deepcopy(model)
    batches = batches_of(model)
    run = trainer(
        model, tmp_path, [DifforaCallback()], max_steps=8, lr_scheduler_type="constant", optim="adamw_torch",
        max_grad_norm=0,
    )  # fmt: skip
    run.train()
    optimizer = torch.optim.AdamW([p for p in hand.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    hand.train()
    for step, batch in enumerate(copy.deepcopy(batches[:8])):
        hand(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()  # with PEFT's penalty
        optimizer.step()
        hand.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    for name, value in trained(hand).items():
        assert torch.allclose(value, trained(model)[name], rtol=1e-4, atol=1e-6), name
    values = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_E" in name])
    assert (values != 0).sum() == 2 * 6  # target_r for each of 3 x 2 modules
    # the evaluation loss is the task's, without PEFT's penalty
    data = rows(8, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(data["input_ids"])).logits
    expected = nn.functional.cross_entropy(logits, torch.tensor(data["labels"])).item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_adalora_resumes_as_if_it_had_never_stopped(tmp_path):
    """Before, at and after the final reduction, which resets the averages."""
    whole = trainer(adalora(), tmp_path, [DifforaCallback()], max_steps=8, save_steps=1)
    whole.train()
    for at in (3, 6, 7):
        again = trainer(adalora(), tmp_path / "again", [DifforaCallback()], max_steps=8, save_steps=8)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        for name, value in trained(whole.model).items():
            assert torch.equal(value, trained(again.model)[name]), (at, name)


def test_a_trained_adalora_is_saved_with_all_it_has(tmp_path):
    model = adalora()
    trainer(model, tmp_path, [DifforaCallback()], max_steps=8).train()
    inputs = torch.tensor(rows(8, 1)["input_ids"])
    with torch.no_grad():
        expected = model.eval()(input_ids=inputs).logits
        for folder in (tmp_path / "checkpoint-8", tmp_path / "saved"):
            model.save_pretrained(tmp_path / "saved")
            loaded = PeftModel.from_pretrained(fill(bert()), folder).eval()
            assert torch.allclose(loaded(input_ids=inputs).logits, expected, atol=1e-5)


def test_adalora_gets_the_number_of_steps(tmp_path, caplog):
    model = adalora(total_step=1000)
    trainer(model, tmp_path, [DifforaCallback()], max_steps=8).train()
    assert model.peft_config["default"].total_step == 8 and "total_step=1000" in caplog.text
    with pytest.raises(UserError, match="tinit=5 and tfinal=3"):
        trainer(adalora(tinit=5, tfinal=3, total_step=9), tmp_path, [DifforaCallback()], max_steps=8).train()


def test_what_cannot_work_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        DifforaCallback(-1.0, 0, penalty_form="cubed", mask_independent="yes")
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "penalty", "penalty_form", "mask_rank", "mask_independent",
    ]  # fmt: skip
    with pytest.raises(UserError, match="mask_target=update needs mask_rank, the directions to train: None is all"):
        DifforaCallback(1e-3, mask_target="update")
    assert "or None" in caught.value.problems[2] and "True or False" in caught.value.problems[3]
    with pytest.raises(UserError, match=r"no low-rank adapters.*diffora.attach"):
        trainer(bert(), tmp_path, [DifforaCallback(1e-3)])
    with pytest.raises(UserError, match="mask_rank=5 must not be above 4"):
        trainer(attached(), tmp_path, [DifforaCallback(1e-3, 5)])
    with pytest.raises(UserError, match="orth_reg_weight"):
        trainer(adalora(), tmp_path, [DifforaCallback(1e-3)])
    with pytest.raises(UserError, match="this is an embedding"):
        trainer(with_peft(LoraConfig(target_modules=["word_embeddings"])), tmp_path, [DifforaCallback(1e-3)])
    plain = nn.Sequential(attached())
    with pytest.raises(UserError, match="save_strategy"):
        trainer(plain, tmp_path, [DifforaCallback(1e-3)])
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="2 GPUs in one process"):
        trainer(attached(), tmp_path, [DifforaCallback(1e-3, "half")])
    monkeypatch.undo()
    sharded = types.SimpleNamespace(distributed_type=accelerate.DistributedType.FSDP)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: sharded)
    with pytest.raises(UserError, match="which FSDP does not keep"):
        DifforaCallback(1e-3).on_init_end(None, None, None, model=attached())


def test_stacked_experts_have_no_masks():
    """Row i of A and column i of B belong to two experts there."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("ti,eio->to", x, self.up)

    lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
    model = get_peft_model(nn.ModuleDict({"experts": Experts()}), lora)
    with pytest.raises(UserError, match=r"experts: penalty and masks are for LoRAs of one layer, and this is of many"):
        adaptation_of(model, Extras(mask_rank=1), 0)


def test_a_callback_without_use_says_so(tmp_path, caplog):
    trainer(with_peft(), tmp_path, [DifforaCallback()])
    assert caplog.text.count("changes nothing here") == 1
    trainer(attached(), tmp_path, [DifforaCallback()])  # takes care of shared pairs
    assert caplog.text.count("changes nothing here") == 1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer(attached(), tmp_path / "with", [DifforaCallback(0.05, 1)]).train()
    trainer(attached(), tmp_path / "without", []).train()
    for callback, folder, problem in (
        (DifforaCallback(0.01, 1), "with", "penalty=0.01 was 0.05 when this checkpoint was made"),
        (DifforaCallback(0.05, 1, seed=3), "with", "seed=3 was 42"),
        (DifforaCallback(0.05, 1), "without", "made without DifforaCallback"),
    ):
        with pytest.raises(UserError, match=problem):
            trainer(attached(), tmp_path, [callback]).train(str(tmp_path / folder / "checkpoint-3"))
    run = trainer(attached(), tmp_path, [DifforaCallback(0.01)], restore_callback_states_from_checkpoint=True)
    run.train(str(tmp_path / "with" / "checkpoint-3"))  # transformers takes the callback of the checkpoint
    assert run.state.stateful_callbacks["DifforaCallback"]["args"]["penalty"] == 0.05


def test_scaled_gradients_get_a_scaled_penalty(tmp_path):
    """As in float16, where accelerate scales the loss."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        arguments = {"max_grad_norm": 0, "save_strategy": "no"}
        run = trainer(attached(), tmp_path, [DifforaCallback(0.05, "half")], **arguments)
        run.accelerator.scaler = scaler
        run.train()
        found.append(trained(run.model))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-4, atol=1e-5), name


def test_an_interrupted_training_leaves_no_mask(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, *_, **__):
            raise KeyboardInterrupt

    for make in MAKERS.values():
        model, untouched = make(), make()
        with pytest.raises(KeyboardInterrupt):
            trainer(model, tmp_path, [DifforaCallback(0.0, 1), Stop()], gradient_accumulation_steps=2).train()
        for each in (model, untouched):
            each.zero_grad()
            trainer(each, tmp_path, [DifforaCallback(0.05)], save_strategy="no").train()
        for name, value in trained(untouched).items():
            assert torch.equal(value, trained(model)[name]), name


@pytest.mark.parametrize("made", MAKERS)
def test_bf16_and_gradient_checkpointing_keep_masks_and_penalty(made, tmp_path):
    model = MAKERS[made]()
    arguments = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1, "save_strategy": "no"}
    before = [a.detach().clone() for _, a, _, _, _ in pairs(model)]
    run = trainer(model, tmp_path, [DifforaCallback(1.0, 1, mask_target="update")], **arguments)
    run.train()
    assert all((a != old).any(1).sum() == 1 for (_, a, _, _, _), old in zip(pairs(model), before, strict=True))
    exact = sum(
        float(((m @ m.T - torch.eye(len(m))) ** 2).sum())
        for m in {id(p): p.detach() if t else p.detach().T for _, _, p, t, _ in pairs(MAKERS[made]())}.values()
    ) + sum(
        float(((a @ a.T - torch.eye(len(a))) ** 2).sum())
        for a in {id(p): p.detach() for _, p, _, _, _ in pairs(MAKERS[made]())}.values()
    )
    assert run.state.log_history[0]["penalty"] == pytest.approx(exact, rel=1e-5)


def test_the_penalty_of_adapters_in_half_precision_is_computed_in_float32():
    model = with_peft().bfloat16()
    matrices = [m.detach().float() for _, a, b, _, _ in pairs(model) for m in (a, b.T)]
    adaptation = adaptation_of(model, Extras(penalty=1.0), 0)
    penalty = add_penalty(adaptation, model)
    exact = sum(((m @ m.T - torch.eye(4)) ** 2).sum().item() for m in matrices)
    assert penalty.item() == pytest.approx(exact, rel=1e-5)
    assert all(a.grad.dtype == torch.bfloat16 and a.grad.any() for _, a, _, _, _ in pairs(model))


def test_a_search_reads_the_loader_of_a_trainer_as_a_plain_one(tmp_path):
    """accelerate has prepared it. The rows, their halves and their order are the same, so the search is."""
    run = trainer(bert(), tmp_path, [])
    plain = DataLoader(rows().with_format("torch"), batch_size=4, shuffle=True)
    found = [diffora.search(bert(), loader, rounds=1).gamma_bar for loader in (run.get_train_dataloader(), plain)]
    assert found[0] == found[1]


def test_an_adapter_of_peft_with_ties_stays_tied(tmp_path):
    """Saved by `save_adapter`, tied again in PEFT, trained by Trainer, resumed from its checkpoint."""
    diffora.save_adapter(attached(), tmp_path / "adapter")

    def make():
        model = PeftModel.from_pretrained(bert(), tmp_path / "adapter", is_trainable=True)
        retie(model, tmp_path / "adapter")
        return model

    whole = trainer(make(), tmp_path, [DifforaCallback(0.05, 1)])
    whole.train()
    tied = {id(p): p for _, p, _, _, _ in pairs(whole.model)}
    assert len(tied) < len(pairs(whole.model))
    again = trainer(make(), tmp_path / "again", [DifforaCallback(0.05, 1)])
    again.train(str(tmp_path / "checkpoint-3"))
    assert len({id(p) for _, p, _, _, _ in pairs(again.model)}) == len(tied)
    assert all(torch.equal(p, trained(again.model)[name]) for name, p in trained(whole.model).items())
    inputs = torch.tensor(rows(8, 1)["input_ids"])
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=inputs).logits
        loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-6").eval()
        assert torch.allclose(loaded(input_ids=inputs).logits, expected, atol=1e-6)
