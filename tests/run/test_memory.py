"""The memory estimate of a dry run, compared with the memory that the allocator gives to a real step of this size."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffora.backbones.backbone import Backbone
from diffora.backbones.load import load_backbone
from diffora.backbones.meta import meta_backbone
from diffora.core.attach import attach
from diffora.core.dam import relax
from diffora.core.grid import find_grid
from diffora.run import dry_run as dryrun
from diffora.run import memory
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search

LLAMA = ["task=dialogue", "model=tiny_llama", "trainer=cpu", "finetune.batch_size=4", "search.batch_size=4"]
CASES = {
    "packed": LLAMA,
    "padded": [*LLAMA, "task.packing=false"],
    "mixed": [*LLAMA, "trainer.precision=bf16-mixed"],
    "half": [*LLAMA, "model.dtype=bfloat16", "trainer.precision=bf16-mixed"],
    "checkpointing": [*LLAMA, "trainer.gradient_checkpointing=true"],
    "pair": ["task=paraphrase", "model=tiny", "trainer=cpu", "finetune.batch_size=4", "search.batch_size=4"],
    "image": ["task=digits", "model=tiny_vit", "trainer=cpu", "finetune.batch_size=8", "search.batch_size=8"],
}


def allocated(step: Callable[[], None]) -> int:
    """Peak of the memory that the CPU allocator has given out during a step, measured by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Stand:
    """A real model and a meta model of the same configuration, both with adapters on all candidate modules."""

    def __init__(self, cfg) -> None:
        torch.set_num_threads(1)
        self.cfg, self.task = check(cfg)
        self.model, self.layers = self.adapted(load_backbone(self.cfg.model, self.task.model_request()))
        self.meta, self.meta_layers = self.adapted(meta_backbone(self.cfg.model, self.task.model_request()))

    def adapted(self, backbone: Backbone):
        model = backbone.model
        if self.cfg.trainer.gradient_checkpointing:
            backbone.checkpoint_activations()
        grid = find_grid(model, self.cfg.model.layer, self.cfg.model.candidates)
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        return model.train(), attach(model, grid.names, everything, 4, None, alpha=8, freeze=False)

    def batch(self) -> dict[str, torch.Tensor]:
        """`Task.dummy`, changed to a usual batch: with several sequences in a row, or with padding."""
        batch = self.task.dummy(self.cfg.finetune.batch_size, self.model)
        if "position_ids" in batch:
            half = batch["position_ids"].shape[1] // 2
            batch["position_ids"] = torch.arange(half).repeat(len(batch["row"]), 2)
        if "attention_mask" in batch:
            batch["attention_mask"] = batch["attention_mask"].clone()
            batch["attention_mask"][:, -1] = 0
        return batch

    def autocast(self) -> torch.autocast:
        dtype = memory.AUTOCAST.get(self.cfg.trainer.precision)
        return torch.autocast("cpu", dtype, enabled=dtype is not None)

    def finetuning_step(self) -> None:
        with self.autocast():
            loss = self.task.loss(self.model(**self.task.inputs(self.inputs)), self.inputs)
        loss.backward()

    def search_step(self) -> None:
        gamma = torch.zeros(len(self.layers), len(self.layers[0]), requires_grad=True)
        for row, gates in zip(self.layers, relax(gamma), strict=True):
            for layer, gate in zip(row, gates.unbind(), strict=True):
                layer.gate = gate
        with self.autocast():
            loss = self.task.loss(self.model(**self.task.inputs(self.inputs)), self.inputs)
        torch.autograd.grad(loss, [gamma, *(p for p in self.model.parameters() if p.requires_grad)], allow_unused=True)

    def joint_step(self) -> None:
        settings = Search(epochs=1, batch_size=8, rank=4, lr=1e-3, gamma_lr=1e-3, clip=None, update="simultaneous")
        module = SearchModule(self.model, self.layers, list(range(len(self.layers[0]))), self.task, settings, seed=0)
        module.trainer = SimpleNamespace(precision_plugin=None)
        module.joint_gradients(self.inputs, self.inputs)

    def measured(self, step: Callable[[], None]) -> int:
        self.inputs = self.batch()
        step()  # makes the tensors that are made only once
        self.model.zero_grad(set_to_none=True)
        return allocated(step)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_of_fine_tuning_agrees_with_the_allocator(cfg, case):
    stand = Stand(cfg(*CASES[case]))
    estimate = memory.of_finetuning(stand.cfg, stand.task, stand.meta)
    assert estimate.activations == pytest.approx(stand.measured(stand.finetuning_step), rel=0.1)
    sizes = [p.numel() * p.element_size() for p in set(stand.model.parameters())]
    assert sum(sizes) <= estimate.weights < sum(sizes) * 1.02  # buffers
    assert estimate.optimiser == 2 * sum(p.numel() * 4 for p in stand.model.parameters() if p.requires_grad)
    assert estimate.shape[0] == stand.cfg.finetune.batch_size


@pytest.mark.parametrize("case", ["packed", "checkpointing", "pair"])
def test_the_estimate_of_the_search_agrees_with_the_allocator(cfg, case):
    stand = Stand(cfg(*CASES[case]))
    estimate = memory.of_search(stand.cfg, stand.task, stand.meta, stand.meta_layers)
    assert estimate.activations == pytest.approx(stand.measured(stand.search_step), rel=0.1)


@pytest.mark.parametrize("case", ["packed", "checkpointing", "pair"])
def test_the_estimate_of_the_simultaneous_search_agrees_with_the_allocator(cfg, case):
    stand = Stand(cfg(*CASES[case], "search.update=simultaneous"))
    estimate = memory.of_search(stand.cfg, stand.task, stand.meta, stand.meta_layers)
    assert estimate.shape[0] == 2 * stand.cfg.search.batch_size
    assert estimate.activations == pytest.approx(stand.measured(stand.joint_step), rel=0.1)


def test_the_second_order_needs_more_and_checkpointing_less(cfg):
    first, second = (Stand(cfg(*LLAMA, f"search.order={order}")) for order in (1, 2))
    of = [memory.of_search(s.cfg, s.task, s.meta, s.meta_layers).activations for s in (first, second)]
    assert of[1] > 1.5 * of[0]
    parts = Stand(cfg(*LLAMA, "search.order=2", "search.accumulate=2"))  # the unrolled step takes the whole batch
    assert memory.of_search(parts.cfg, parts.task, parts.meta, parts.meta_layers).activations == of[1]
    whole, again = (Stand(cfg(*CASES[case])) for case in ("packed", "checkpointing"))
    of = [memory.of_finetuning(s.cfg, s.task, s.meta).activations for s in (whole, again)]
    assert of[1] < 0.6 * of[0]


def test_on_a_gpu_auto_needs_the_memory_of_the_plain_kernel(cfg):
    def activations(*overrides):
        stand = Stand(cfg(*CASES["pair"], *overrides))
        return memory.of_finetuning(stand.cfg, stand.task, stand.meta).activations

    assert activations() == activations("model.kernel=fused")
    on_gpu = activations("trainer.accelerator=gpu")
    assert on_gpu == activations("model.kernel=plain") > activations()


def test_parts_and_devices_share_a_batch(cfg):
    overrides = ["task=mrpc", "finetune.batch_size=12", "finetune.accumulate=3"]
    composed = cfg(*overrides, "trainer=ddp_cpu")
    assert memory.rows_at_a_time(composed, composed.finetune) == 2
    composed = cfg(*overrides)
    assert memory.rows_at_a_time(composed, composed.finetune) == 4


def test_machines_share_a_batch_and_divided_weights_are_counted_once(cfg):
    composed = cfg("task=mrpc", "finetune.batch_size=12", "trainer=ddp_cpu", "trainer.num_nodes=3")
    assert memory.rows_at_a_time(composed, composed.finetune) == 2
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))})
    model.requires_grad_(False)
    model.head = nn.Linear(4, 2)
    places = [f"layers.{number}" for number in range(8)]
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert memory.divided_bytes(model, places, 1) == whole
    matrices = 32 + 8 * 16  # numbers in frozen matrices; of these, a share, the table, and two layers
    assert memory.divided_bytes(model, places, 4) == whole - 4 * matrices + 4 * (matrices // 4 + 32 + 2 * 16)


def test_shared_parameters_stay_shared():
    shared = nn.Linear(4, 4, device="meta")
    model = nn.Sequential(shared, nn.Linear(4, 4, device="meta"), shared, nn.BatchNorm1d(4, device="meta"))
    model[1].weight = shared.weight
    model[1].bias.requires_grad_(False)
    memory.without_memory(model)
    assert model[1].weight is model[0].weight and model[0] is model[2]
    assert not model[1].bias.requires_grad and model[0].weight.requires_grad
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}


@pytest.mark.parametrize("method", ["diffora", "adalora", "full_ft", "houlsby"])
def test_a_dry_run_shows_the_estimate(cfg, tmp_path, method, capsys):
    record = run(cfg("experiment=quickstart", f"method={method}", "dry_run=true"), tmp_path).record
    found = record["memory"]["estimate"]
    assert list(found) == (["search", "finetune"] if method == "diffora" else ["finetune"])
    for estimate in found.values():
        parts = [estimate[f"{part}_mb"] for part in ("weights", "optimiser", "activations")]
        assert all(parts) and estimate["total_mb"] == pytest.approx(sum(parts), abs=0.2)
        assert estimate["batch"] == (32, 64)
    assert "fine-tuning at 32 x 64: weights" in capsys.readouterr().out


def test_a_failed_estimate_does_not_stop_a_dry_run(cfg, tmp_path, monkeypatch, caplog):
    def fail(*_) -> None:
        raise RuntimeError("needs content\nmore")

    monkeypatch.setattr(dryrun.memory, "of_search", fail)
    record = run(cfg("experiment=quickstart", "dry_run=true"), tmp_path).record
    assert list(record["memory"]["estimate"]) == ["finetune"]
    assert "the memory of search cannot be estimated: needs content" in caplog.text
