"""The benchmark for a GPU, on tiny shapes on the CPU: it stops at a wrong result and in time, and marks its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from benchmarks import gpu, gpu_checks, gpu_page, report  # noqa: E402

from diffora.core import lowrank  # noqa: E402
from diffora.kernels import fused  # noqa: E402

TINY = gpu.Place("cpu", tiny=True)
STEPS = {"shape": {}, "contenders": {
    name: {"ms": report.spread([2.0, 3.0]), "tokens_s": 1000, "step_mb": 5.0} for name in gpu.EAGER
}, "ratios": {"peft/lora": report.spread([1.6]), "lora/floor": report.spread([1.2])}}  # fmt: skip


def gpu_result():
    """An invented result with a part of each kind."""
    run = {"wall_s": 9.0, "training_s": 6.0, "peak_cuda_mb": 100.0, "trainable": 10}
    side = {"ms": 2.0, "tokens_s": 1000}
    return report.header() | {
        "not_a_gpu": False,
        "gpu_before": {"name": "GPU X", "driver_version": "1.2", "clocks.sm": "1500 MHz"},
        "gpu_after": {"clocks.sm": "1400 MHz"},
        "minutes": 12.5,
        "checks": [
            {"what": "fused", "error": 0.001, "most": 0.01, "wrong": False, "note": ""},
            {"what": "4-bit", "error": None, "most": 0.01, "wrong": False, "note": "bitsandbytes is not installed"},
        ],
        "parts": {
            "steps_deberta": STEPS,
            "run_minilm": {"runs": {"lora": [run], "hf_trainer": [run | {"training_s": 9.0}]}},
            "unsloth_llama": {"unsloth": side, "lora": side, "unsloth/lora": 1.1},
        },
        "left_out": {"compiled_llama": "it takes about 120 s, and 3 s were left"},
    }  # fmt: skip


def test_the_section_has_figures_goals_and_what_is_missing():
    text = gpu_page.section(gpu_result())
    assert "GPU X, driver 1.2" in text and "1500 MHz, 1400 MHz" in text
    assert "at least 1.50 | 1.600 | yes" in text and "at most 1.06 | 1.200 | **no**" in text
    assert "| 6.0 | 100 | 1.50 |" in text
    assert "Not checked: 4-bit (bitsandbytes is not installed)" in text
    assert "compiled: it takes about 120 s, and 3 s were left" in text and "Not a GPU" not in text
    assert gpu_page.section(gpu_result() | {"not_a_gpu": True}).startswith("**Not a GPU's figures.**")
    assert gpu_page.TITLES.keys() == gpu.PARTS.keys()


def check(kind, model="minilm"):
    shape = TINY.shape(model, 4, 16)
    return gpu_checks.run([shape], [kind])


def test_what_is_right_passes_and_a_wrong_kernel_does_not(monkeypatch):
    found = check(gpu_checks.against_peft, "llama_1b") + check(gpu_checks.checkpointing)
    assert len(found) == 5 and not any(one.wrong for one in found) and all(one.most < 0.1 for one in found)
    real = fused.LowRankNode.backward

    def wrong(ctx, gradient):
        found = list(real(ctx, gradient))
        found[5] = None if found[5] is None else found[5] * 1.05  # A's
        return tuple(found)

    with monkeypatch.context() as patch:
        patch.setattr(fused.LowRankNode, "backward", staticmethod(wrong))
        assert [one.wrong for one in check(gpu_checks.against_peft)] == [False, False, True, True]
    plain = lowrank.LowRankLinear._plain
    monkeypatch.setattr(lowrank.LowRankLinear, "_plain", lambda self, x: 2 * plain(self, x) - self.base(x))
    assert [one.wrong for one in check(gpu_checks.against_peft)] == [True, True, False, False]


def test_a_version_of_bitsandbytes_that_fails_stops_nothing(monkeypatch):
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    [found] = check(gpu_checks.four_bits)
    assert found.error is None and not found.wrong and found.note.startswith("bitsandbytes failed: ")


def test_a_gradient_that_is_missing_or_not_a_number_is_wrong():
    import torch

    full = {"loss": torch.ones(1), "lora_a": torch.ones(4)}
    assert gpu_checks.difference(full, full) == 0
    for other in (
        {"loss": torch.ones(1)},
        full | {"lora_a": torch.ones(3)},
        full | {"lora_a": torch.full((4,), torch.nan)},
    ):
        assert gpu_checks.Check("x", gpu_checks.difference(other, full), 0.1).wrong


@pytest.fixture
def quick(monkeypatch):
    """Parts with results that are made up, each of four minutes; returns the names of those that ran."""
    ran = []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 240.0 * len(ran))

    def part(arguments, seconds):
        ran.append(arguments[1])
        good = {"checks": [{"what": "fused", "error": 0.5, "most": 1.0, "wrong": False, "note": ""}]}
        return good if arguments[1] == "checks" else "failed with exit code 1" if "llama" in arguments[1] else STEPS

    monkeypatch.setattr(gpu, "in_own_process", part)
    return ran


def test_parts_run_by_importance_and_the_rest_is_named(quick):
    saved = []
    place = gpu.Place("cuda", tiny=False)
    result = gpu.measure(place, list(gpu.PARTS), True, 19, lambda found: saved.append(len(found["parts"])))
    assert quick == ["checks", "steps_deberta", "steps_llama", "steps_minilm", "search_minilm"]  # after 16 minutes
    assert list(result["parts"]) == ["steps_deberta", "steps_minilm", "search_minilm"]
    assert "failed" in result["left_out"]["steps_llama"] and "s were left" in result["left_out"]["run_minilm"]
    assert {*result["parts"], *result["left_out"]} == set(gpu.PARTS) and saved[0] == 1  # written after each part


def test_a_wrong_result_stops_before_anything_is_timed(monkeypatch):
    bad = {"checks": [{"what": "fused and PEFT's", "error": 0.3, "most": 0.1, "wrong": True, "note": ""}]}
    monkeypatch.setattr(gpu, "in_own_process", lambda arguments, seconds: bad)
    with pytest.raises(SystemExit, match=r"fused and PEFT's: 0\.3, at most 0\.1"):
        gpu.measure(TINY, list(gpu.PARTS), True, 1, lambda found: pytest.fail("something was written"))


def test_a_part_says_why_it_is_left_out(monkeypatch):
    monkeypatch.setenv("UNSLOTH_PYTHON", sys.executable)
    reason = gpu.in_own_process(["--part", "unsloth_llama", "--device", "cpu", "--tiny"], 300)
    assert reason == f"Unsloth is not installed for {sys.executable}"


def test_without_time_nothing_begins(quick):
    with pytest.raises(SystemExit, match="start it again"):
        gpu.measure(TINY, list(gpu.PARTS), True, 0, lambda found: None)
    assert quick == []


def test_a_part_that_takes_too_long_is_stopped():
    assert "time was up" in gpu.in_own_process(["--part", "checks", "--device", "cpu", "--tiny"], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "make bench-gpu needs a CUDA GPU"),
        (["--device", "cpu", "--tiny"], "--output must name a file"),
        (["--tiny"], "--output must name a file"),
        (["--device", "cpu", "--output", str(report.RESULTS / "gpu.json")], "may not stand in"),
    ],
)
def test_figures_of_no_gpu_never_stand_among_those_of_one(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


@pytest.mark.slow
def test_the_whole_benchmark_on_tiny_shapes(tmp_path):
    """Checks, steps, compiled steps and whole runs of both sides, all in their own processes."""
    file = tmp_path / "tiny.json"
    parts = ["steps_deberta", "steps_llama", "compiled_minilm", "run_deberta", "run_minilm"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(file)]
    done = subprocess.run([*command, "--only", *parts], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert "not a GPU figure" in done.stdout and result["not_a_gpu"] and result["left_out"] == {}
    assert set(result["parts"]) == set(parts) and not any(check["wrong"] for check in result["checks"])
    runs = result["parts"]["run_deberta"]["runs"]
    assert len({run["trainable"] for side in runs.values() for run in side}) == 1
    assert "Not a GPU's figures" in gpu_page.section(result)
