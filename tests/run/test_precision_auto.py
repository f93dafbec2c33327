"""``trainer.precision=auto`` is replaced by what the machine uses, in the hash and in the record too."""

import json

import pytest
import torch

from diffora.backbones.precision import bfloat16_unit, width_multiple
from diffora.errors import UserError
from diffora.run import precision
from diffora.run.experiment import run
from diffora.run.precision import settled
from diffora.settings.identity import config_hash
from diffora.settings.read import model_of
from diffora.tasks.base import get_task

AUTO = ["experiment=quickstart", "method=lora", "trainer=cpu", "trainer.precision=auto"]


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what the processor has."""

    def has(unit):
        monkeypatch.setattr(precision, "bfloat16_unit", lambda device: unit)

    return has


def test_the_hash_is_that_of_the_settings_used(cfg, machine):
    machine("AMX")
    fast, told = settled(cfg(*AUTO))
    assert "AMX" in told and "frozen weights in bfloat16" in told
    explicit = cfg(*AUTO[:-1], "trainer.precision=bf16-mixed", "model.dtype=bfloat16")
    assert config_hash(fast) == config_hash(explicit)
    machine(None)
    slow, told = settled(cfg(*AUTO))
    assert "32-true" in told and "neither AMX nor AVX512-BF16" in told
    assert config_hash(slow) == config_hash(cfg(*AUTO[:-1], "trainer.precision=32-true"))
    assert config_hash(slow) != config_hash(fast)
    named = cfg(*AUTO[:-1])
    assert settled(named) == (named, None)


def test_weights_that_a_method_changes_stay_in_float32(cfg, machine):
    machine("AMX")
    for method in ("full_ft", "bitfit", "pissa"):
        chosen, told = settled(cfg(*AUTO, f"method={method}"))
        assert (chosen.trainer.precision, chosen.model.dtype) == ("bf16-mixed", "float32")
        assert "which" not in told and "because the method changes them" in told


def test_a_run_says_what_it_chose_and_another_machine_may_not_continue_it(cfg, machine, tmp_path, caplog):
    short = ["task.train_rows=32", "task.validation_rows=16", "finetune.epochs=1", "finetune.warmup_steps=0"]
    composed = cfg(*AUTO, *short, "logger=csv")
    machine("AVX512-BF16")
    with caplog.at_level("INFO", "diffora"):
        result = run(composed, tmp_path / "run")
    lines = [line for line in caplog.messages if line.startswith("precision: ")]
    assert len(lines) == 1 and lines[0] in (tmp_path / "run" / "run.log").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"precision: {record['precision']}" == lines[0]
    assert record["settings"]["trainer"]["precision"] == "bf16-mixed"
    types = {name: p.dtype for name, p in result.model.named_parameters()}
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert {types[name] for name in trained} == {torch.float32}
    assert {types[name] for name in types.keys() - trained} == {torch.bfloat16}

    composed.resume = True
    assert run(composed, tmp_path / "run").record["config_hash"] == record["config_hash"]  # complete already
    machine(None)
    with pytest.raises(UserError, match=r"trainer\.precision: \S+ -> \S+"):
        run(composed, tmp_path / "run")


def test_an_impossible_device_is_left_to_the_check_of_the_machine(cfg):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    chosen, told = settled(cfg(*AUTO, "trainer.accelerator=gpu"))
    assert chosen.trainer.precision == "32-true" and "no device for trainer.accelerator=gpu" in told


def test_several_machines_must_name_the_precision(cfg):
    with pytest.raises(UserError, match="could choose differently; name it: bf16-mixed"):
        settled(cfg(*AUTO, "trainer.num_nodes=2"))


def test_the_processor_decides(monkeypatch):
    able = {"amx_bf16": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    cpu = torch.device("cpu")
    assert bfloat16_unit(cpu) == "AMX"
    able["amx_bf16"] = False
    assert bfloat16_unit(cpu) == "AVX512-BF16"
    able.clear()
    assert bfloat16_unit(cpu) is None
    assert bfloat16_unit(torch.device("mps")) is None


def test_torch_2_10_has_other_names_for_what_the_processor_can_do(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for unit, answers in {"AMX": (True, True), "AVX512-BF16": (False, True), None: (False, False)}.items():
        for name, answer in zip(("_is_amx_tile_supported", "_is_avx512_bf16_supported"), answers, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        assert bfloat16_unit(torch.device("cpu")) == unit


def test_widths_are_rounded_in_bfloat16_on_a_cpu_only(cfg):
    cpu = torch.device("cpu")
    assert width_multiple("32-true", cpu, 512) == 1  # as it was, so that results stay the same
    assert width_multiple("bf16-mixed", cpu, None) == width_multiple("bf16-mixed", cpu, 512) == 8
    assert width_multiple("bf16-mixed", cpu, 100) == 4  # 104 would be more than the model reads
    assert width_multiple("bf16-mixed", cpu, 513) == 1
    task = get_task(cfg("task=paraphrase", "model=tiny").task)
    processor = task.processor(model_of(cfg("model=tiny").model))
    task.width_multiple = 8
    widths = [
        task.collate(processor, training=False)({"input_ids": [[5] * n], "labels": [0], "row": [0], "length": [n]})[
            "input_ids"
        ].shape[1]
        for n in (3, 16, 17)
    ]
    assert widths == [8, 16, 24]


def test_weights_in_float16_are_refused_on_every_machine(cfg):
    with pytest.raises(UserError, match=r"trainer\.precision=auto does not go with model\.dtype=float16"):
        settled(cfg("task=mrpc", "trainer.precision=auto", "model.dtype=float16"))
