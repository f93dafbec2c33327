"""``trainer.cache_prefix=true`` in runs: the same results as without it, fewer computed layers, and refusals."""

import json
import pkgutil
import shutil

import pytest
import torch
from families import save_family
from safetensors.torch import load_file

from diffora.errors import UserError
from diffora.files import _host
from diffora.loop import prefix as loop_prefix
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.tasks.base import get_task

SHORT = ["trainer=cpu", "logger=none", "finetune.warmup_steps=0", "finetune.batch_size=8", "finetune.epochs=2"]
TINY = [*SHORT, "experiment=quickstart", "task.train_rows=24", "task.validation_rows=12", "task.max_length=24"]
TOP = "model.layer='encoder.layer.[2,3]'"
CACHED = "trainer.cache_prefix=true"
SLOW = pytest.mark.slow  # as the fast cases, for more settings


def weights(folder):
    return load_file(next((folder / "adapter").rglob("adapter_model.safetensors")))


def assert_same(one, other, exactly=False):
    """Equal metrics and adapters: bit for bit, or up to rounding."""
    close = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-3, "atol": 2e-5}
    for a, b in zip(one.record["history"], other.record["history"], strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=close["rtol"], abs=close["atol"])
    first, second = weights(one.folder), weights(other.folder)
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **close)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "prefix").glob("*.arrow"))


@pytest.fixture
def both(cfg, tmp_path):
    """Runs a configuration without and with a cached prefix, compares them, and returns the second result."""

    def of(*overrides, layers=2):
        plain = run(cfg(*overrides), tmp_path / "plain")
        found = run(cfg(*overrides, CACHED), tmp_path / "cached")
        assert_same(plain, found)
        facts = found.record["prefix"]["finetune"]
        assert facts["layers"] == layers and facts["bytes"] > 0
        assert not any("forward" in vars(module) for module in found.model.modules())
        assert plain.record["config_hash"] != found.record["config_hash"] and plain.record["prefix"] == {}
        return found

    return of


def test_the_result_is_that_of_computed_layers_and_other_runs_use_the_files(both, cfg, tmp_path):
    both(*TINY, "method=lora", TOP)
    written = {file: file.stat().st_mtime_ns for file in files(tmp_path)}
    assert len(written) == 2  # training and validation rows
    others = [*TINY, TOP, CACHED]
    run(cfg(*others, "method=random", "seed=1"), tmp_path / "seed")
    workers = ["finetune.batch_size=4", "finetune.accumulate=2", "trainer.num_workers=1"]
    run(cfg(*others, "method=lora", *workers), tmp_path / "workers")
    assert {file: file.stat().st_mtime_ns for file in files(tmp_path)} == written
    run(cfg(*others, "method=lora", "trainer.precision=bf16-mixed", "finetune.epochs=1"), tmp_path / "bf16")
    assert len(files(tmp_path)) == 4
    sizes = sorted(file.stat().st_size for file in files(tmp_path))
    assert sizes[3] > 1.8 * sizes[2]  # half the bytes


def test_batches_of_any_size_give_the_same_result(both, cfg, tmp_path, monkeypatch):
    more = [*TINY, "method=lora", TOP, "finetune.batch_size=6", "finetune.accumulate=2", "trainer.num_workers=1"]
    found = both(*more)
    monkeypatch.setattr("diffora.loop.states.TOKENS", 1)  # every row alone
    shutil.rmtree(tmp_path / "cache" / "prefix")
    assert_same(found, run(cfg(*more, CACHED), tmp_path / "alone"))


def test_the_prefix_is_not_computed_again(cfg, tmp_path, monkeypatch):
    run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "first")
    calls = []
    original = loop_prefix._check_rows_are_apart

    def checked(parts, *arguments):
        original(parts, *arguments)
        parts.model.get_submodule("deberta.encoder.layer.1.attention").register_forward_hook(
            lambda *args: calls.append(1)
        )

    monkeypatch.setattr(loop_prefix, "_check_rows_are_apart", checked)
    run(cfg(*TINY, "method=lora", TOP, CACHED, "seed=3"), tmp_path / "second")
    assert len(calls) == 4  # one row, to see what they depend on and what they are, and a few rows of each file


@pytest.fixture
def rows(tmp_path):
    """Files of questions with long contexts, and of choices, by the task's name."""
    context = "the cat sat on the mat near the door of a house, " * 3
    answers = {"text": ["mat"], "answer_start": [context.index("mat")]}
    squad = [
        {"id": f"{i}", "title": "", "question": "where ?" + " now ?" * (i % 3), "context": context, "answers": answers}
        for i in range(6)
    ]
    (tmp_path / "squad_v2").mkdir()
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row | {"id": split + row["id"]}) + "\n" for row in squad)
        (tmp_path / "squad_v2" / f"{split}.jsonl").write_text(lines)
    choices = [
        {
            "context": f"who sat {'there ' * (i % 3)}",
            "choices": ["a cat", "a dog", "a cow"][: 2 + i % 2],
            "label": i % 2,
        }
        for i in range(16)
    ]
    (tmp_path / "choice").mkdir()
    (tmp_path / "choice" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return tmp_path


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=dialogue", "model=tiny_llama", "task.train_rows=32", "task.validation_rows=8"],
        ["task=dialogue", "model=tiny_llama", "task.train_rows=32", "task.validation_rows=8", "task.packing=false"],
        ["task=digits", "model=tiny_vit", "task.max_train_rows=16", "task.validation_rows=20", "task.augment.shift=0"],
        [
            "task=squad_v2",
            "model=tiny",
            "task.path={rows}/squad_v2",
            "task.max_length=32",
            "task.doc_stride=8",
            "task.max_question_length=12",
        ],
        ["task=choice", "model=tiny", "task.path={rows}/choice/rows.jsonl", "task.max_length=24"],
    ],
    ids=["packed", "decoder", "images", "windows", "choices"],
)
def test_every_kind_of_rows(both, rows, overrides):
    with_numbers = {"tiny_llama": "'layers.[2,3]'", "tiny_vit": "'layers.[2,3]'", "tiny": "'encoder.layer.[2,3]'"}
    model = next(o for o in overrides if o.startswith("model=")).removeprefix("model=")
    both(*SHORT, "method=lora", f"model.layer={with_numbers[model]}", *(o.format(rows=rows) for o in overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["search.update=simultaneous"],
        ["search.update=alternating", "search.accumulate=2", "search.train_steps=2"],
        pytest.param(["search.order=2"], marks=SLOW),
        pytest.param(["method.selector=attribution", "method.warm_start=true"], marks=SLOW),
        pytest.param(["method.selector=one_shot", "search.masks=10"], marks=SLOW),
    ],
)
def test_a_search_of_upper_layers_finds_the_same(cfg, tmp_path, overrides):
    more = [*TINY, "method=diffora", TOP, "search.epochs=2", "search.batch_size=4", *overrides]
    plain = run(cfg(*more), tmp_path / "plain")
    found = run(cfg(*more, CACHED), tmp_path / "cached")
    assert found.record["prefix"]["search"]["layers"] == 2
    for kind in ("gamma_bar", "scores"):
        one, other = (getattr(result.selection, kind) for result in (plain, found))
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=1e-4)
    assert plain.selection.selected == found.selection.selected
    assert_same(plain, found)


@pytest.mark.parametrize(
    "selector", ["search", pytest.param("one_shot", marks=SLOW), pytest.param("fisher", marks=SLOW)]
)
def test_a_time_budget_limits_the_search_to_the_layers_that_it_allows(cfg, tmp_path, selector):
    more = ["method=diffora", "method.time_budget=0.75", f"method.selector={selector}", "search.epochs=1"]
    more += ["search.ensemble=2"] if selector == "search" else ["search.masks=10"] if selector == "one_shot" else []
    found = run(cfg(*TINY, *more, "search.batch_size=4", CACHED), tmp_path / "run")
    assert found.record["prefix"]["finetune"]["layers"] == found.selection.lowest_layer == 2
    saved = json.loads((tmp_path / "run" / "selection.json").read_text())
    scores = torch.tensor(saved["scores"] or saved["gamma_bar"])
    assert scores.isfinite().all() and scores[2:].std(1).min() > 0
    if selector != "fisher":  # which trains nothing, and so reads all layers in its one pass
        assert found.record["prefix"]["search"]["layers"] == 2
        assert scores[:2].std() == 0  # not searched


@pytest.mark.parametrize(
    "place",
    [
        "diffora.run.select.write_search",
        "diffora.run.figures.save_png",
        "diffora.training.finetune.FineTuneModule.on_save_checkpoint",
        "diffora.run.experiment.write_classes",
    ],
)
def test_a_killed_run_continues_to_the_same_result(cfg, tmp_path, place):
    """Killed at the end of the search, right after it, in the second checkpoint of fine-tuning, and after it."""
    more = [*TINY, "method=diffora", "search.epochs=1", "search.batch_size=4"]
    more += ["method.time_budget=0.75", "finetune.epochs=3", CACHED]
    whole = run(cfg(*more), tmp_path / "whole")
    function, times = pkgutil.resolve_name(place), 2 if "FineTune" in place or "save_png" in place else 1

    def stop(*given):
        nonlocal times
        times -= 1
        if times == 0:
            raise KeyboardInterrupt
        return function(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, stop)
        patch.setattr("diffora.run.directory._record_failure", lambda *_: None)  # a killed process writes nothing
        with pytest.raises((KeyboardInterrupt, UserError)):
            run(cfg(*more), tmp_path / "run")
    shutil.rmtree(tmp_path / "cache" / "prefix")
    resumed = run(cfg(*more, "resume=true"), tmp_path / "run")
    assert_same(whole, resumed, exactly=True)
    for stage in ("search", "finetune"):
        one, other = (result.record["prefix"][stage] for result in (whole, resumed))
        assert one["layers"] == other["layers"] == 2 and one["bytes"] == other["bytes"]


def test_damaged_files_are_written_again(cfg, tmp_path, caplog):
    first = run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "first")
    for file in files(tmp_path):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    again = run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "again")
    assert caplog.text.count("damaged cache file") == 2
    assert_same(first, again, exactly=True)


def scale_layers(monkeypatch, factor):
    """Let every layer of DeBERTa multiply its output by a factor, which no file's name knows of."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

    original = DebertaV2Layer.forward

    def scaled(self, *args, **kwargs):
        states, attention = original(self, *args, **kwargs)
        return states * factor, attention

    monkeypatch.setattr(DebertaV2Layer, "forward", scaled)


def test_a_file_that_is_not_what_the_layers_give_now_is_written_again(both, cfg, tmp_path, monkeypatch, caplog):
    run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "first")
    scale_layers(monkeypatch, 1.1)
    both(*TINY, "method=lora", TOP)
    assert caplog.text.count("writing it again") == 2 == len(files(tmp_path))


def test_a_trained_module_between_two_layers_gets_its_gradient(cfg, tmp_path, monkeypatch, caplog):
    from diffora.methods.head_only import HeadOnly

    path = save_family(
        tmp_path / "model", "deberta-v2", num_hidden_layers=3, conv_kernel_size=3, conv_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    adapt = HeadOnly.adapt

    def with_convolution(method, model, *arguments):
        model.deberta.encoder.conv.requires_grad_(True)
        return adapt(method, model, *arguments)

    monkeypatch.setattr(HeadOnly, "adapt", with_convolution)
    more = [*TINY, "method=head_only", "model=hf", f"model.path={path}", "finetune.lr=0.01"]
    plain = run(cfg(*more), tmp_path / "plain")
    found = run(cfg(*more, CACHED), tmp_path / "cached")
    assert found.record["history"] == plain.record["history"] and found.record["prefix"] == {}
    assert "saves nothing: what the frozen layers give depends on trained parameters" in caplog.text


def test_dropout_below_is_off_and_dropout_above_is_on(cfg, tmp_path):
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    path = save_family(tmp_path / "bert", "bert", num_hidden_layers=3, **dropout)
    more = [*TINY, "method=lora", "model=hf", f"model.path={path}", "model.layer='encoder.layer.[1,2]'"]
    found = run(cfg(*more, CACHED), tmp_path / "cached")
    again = run(cfg(*more, CACHED), tmp_path / "again")
    other = run(cfg(*more), tmp_path / "plain")
    assert found.record["prefix"]["finetune"]["layers"] == 1
    assert_same(found, again, exactly=True)
    assert found.record["history"] != other.record["history"]
    layers = found.model.get_submodule("bert.encoder.layer")
    assert all(layer.attention.self.dropout.p == 0.3 for layer in layers)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=full_ft"], "the lowest layer is trained"),
        pytest.param(["method=bitfit"], "the lowest layer is trained", marks=SLOW),
        pytest.param(["method=lora"], "layer.0", marks=SLOW),
    ],
)
def test_a_method_that_trains_the_lowest_layer_is_told_that_nothing_is_saved(cfg, tmp_path, caplog, overrides, words):
    more = [*TINY, *overrides, "finetune.epochs=1"]
    plain = run(cfg(*more), tmp_path / "plain")
    found = run(cfg(*more, CACHED), tmp_path / "cached")
    assert found.record["history"] == plain.record["history"] and found.record["prefix"] == {}
    assert "saves nothing" in caplog.text and words in caplog.text and not files(tmp_path)


def test_the_head_alone_needs_no_layer(cfg, tmp_path):
    plain = run(cfg(*TINY, "method=head_only"), tmp_path / "plain")
    found = run(cfg(*TINY, "method=head_only", CACHED), tmp_path / "cached")
    assert found.record["prefix"]["finetune"]["layers"] == 4
    for one, other in zip(plain.record["history"], found.record["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.cache_prefix_limit=1e-6"], r"takes 0\.\d MB .*more than trainer.cache_prefix_limit=1e-06 GB"),
        (["task=digits", "model=tiny_vit", "task.max_train_rows=16"], "other inputs for the same row"),
        (["task=rewrite", "model=tiny_t5", "task.max_length=null"], "not one list of layers"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_training(cfg, tmp_path, overrides, words):
    base = [o for o in TINY if not (o.startswith(("task.", "experiment")) and "task=" in str(overrides))]
    overrides = [o for o in overrides if o != "task.max_length=null"]
    with pytest.raises(UserError, match=words):
        run(cfg(*base, "method=lora", CACHED, *overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists() and not files(tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_prefix.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(UserError, match=r"has 0\.0 MB free.*DIFFORA_CACHE"):
        run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "run")


def test_a_model_that_mixes_rows_is_refused(cfg, tmp_path, monkeypatch):
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

    original = DebertaV2Layer.forward

    def mixing(self, *args, **kwargs):
        states, attention = original(self, *args, **kwargs)
        return states - 0.1 * states.mean(0, keepdim=True), attention

    monkeypatch.setattr(DebertaV2Layer, "forward", mixing)
    with pytest.raises(UserError, match="does not keep the rows of a batch apart"):
        run(cfg(*TINY, "method=lora", TOP, CACHED), tmp_path / "run")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_whose_layers_pass_on_more_than_their_states_is_refused(cfg, tmp_path, monkeypatch, precision):
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

    original = DebertaV2Layer.forward

    def adding(self, hidden_states, *args, **kwargs):
        states, attention = original(self, hidden_states, *args, **kwargs)
        if (below := getattr(hidden_states, "below", None)) is not None:
            states = states + 0.03 * below
        states.below = hidden_states
        return states, attention

    monkeypatch.setattr(DebertaV2Layer, "forward", adding)
    with pytest.raises(UserError, match="uses what its lower layers give in other places"):
        run(cfg(*TINY, "method=lora", TOP, CACHED, f"trainer.precision={precision}"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["drawn in training", "other in training"])
def test_rows_whose_inputs_are_not_always_the_same_are_refused(cfg, tmp_path, monkeypatch, kind):
    composed = cfg(*TINY, "method=lora", TOP, CACHED)
    task = type(get_task(composed.task))
    original = task.collate

    def collate(self, processor, training):
        plain = original(self, processor, training)

        def varied(rows):
            batch = plain(rows)
            if training:
                drawn = torch.rand(batch["input_ids"].shape) < 0.3 if kind == "drawn in training" else True
                batch["input_ids"] = batch["input_ids"].masked_fill(torch.as_tensor(drawn), 5)
            return batch

        return varied

    monkeypatch.setattr(task, "collate", collate)
    with pytest.raises(UserError, match="other inputs for the same row in each epoch, or in training"):
        run(composed, tmp_path / "run")


def test_what_a_killed_run_has_left_takes_no_space(cfg, tmp_path):
    folder = tmp_path / "cache" / "prefix"
    folder.mkdir(parents=True)
    left = folder / f".{'a' * 64}.arrow.{2**22 + 1}-{_host()}.part"  # no process has this number
    left.write_bytes(bytes(1000))
    with pytest.raises(UserError, match="cache_prefix_limit"):
        run(cfg(*TINY, "method=lora", TOP, CACHED, "trainer.cache_prefix_limit=1e-6"), tmp_path / "run")
    assert not left.exists()


@pytest.mark.parametrize("more", [["trainer=ddp_cpu"], ["trainer.num_nodes=2"]])
def test_several_devices_or_machines_are_refused_at_once(cfg, more):
    with pytest.raises(UserError, match=r"cache_prefix=true .*trainer.(devices|num_nodes)=2"):
        check(cfg(*TINY, "method=lora", CACHED, *more))


@pytest.mark.parametrize(
    "more", ["trainer.gradient_checkpointing=true", pytest.param("trainer.compile=true", marks=SLOW)]
)
def test_other_settings_of_the_trainer_give_the_same(both, more):
    both(*TINY, "method=lora", TOP, more)
