"""task=seq2seq: rows, loss, generated text, and whole runs."""

import json
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import random_model, save_family, tokenizer_for
from peft import PeftModel
from stopped_runs import Stopped
from tables import write
from transformers import AutoModelForSeq2SeqLM

from diffora.api import load_adapter
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.tasks.base import Split, get_task
from diffora.tasks.batches import parts_of
from diffora.tasks.pairs.read import LONGEST
from diffora.tasks.pairs.task import PairTask, evenly
from diffora.training.finetune import FineTuneModule

KIND = "AutoModelForSeq2SeqLM"
SIZES = ("task.max_source_length=24", "task.max_target_length=16")
WORDS = ["the", "gardener", "told", "a", "farmer", "in", "the", "market", "what", "somebody", "did"]


def pairs(n: int = 40) -> list[dict]:
    rows = []
    for i in range(n):
        words = [WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(2 + i % 4)]
        rows.append({"source": f"{i} {' '.join(words)}", "target": " ".join(reversed(words)), "id": f"r{i}"})
    return rows


@pytest.fixture
def task(cfg):
    return lambda path, *overrides: get_task(cfg("task=seq2seq", f"task.path='{path}'", *SIZES, *overrides).task)


def problems_of(task) -> str:
    with pytest.raises(UserError) as caught:
        task.load()
    return "\n".join(caught.value.problems)


# --- rows ---


def test_all_formats_give_the_same_rows(task, tmp_path):
    rows = pairs()
    rows[3]["source"] = 'it says "no",\tand closes'
    loaded = [task(write(tmp_path / f"t.{kind}", rows)).load() for kind in ("csv", "tsv", "jsonl", "parquet")]
    assert len({found.data_hash for found in loaded}) == 1
    train, validation = loaded[0].train, loaded[0].validation["validation"]
    assert len(train) == 36 and len(validation) == 4
    by_number = {row["number"]: row for row in [*train, *validation]}
    assert [(by_number[i + 1]["source"], by_number[i + 1]["id"]) for i in range(40)] == [
        (row["source"], row["id"]) for row in rows
    ]


def test_equal_sources_are_not_divided(task, tmp_path):
    rows = [{"source": f"text {i // 4}", "target": f"answer {i}"} for i in range(40)]
    found = task(write(tmp_path / "t.csv", rows), "task.validation_fraction=0.3").load()
    assert not set(found.train["source"]) & set(found.validation["validation"]["source"])


def test_sources_that_differ_in_white_space_or_form_are_equal(task, tmp_path):
    texts = [text for i in range(20) for text in (f"text é{i:02d}", f" text e\u0301{i:02d} ")]
    rows = [{"source": text, "target": f"{i}"} for i, text in enumerate(texts)]
    found = task(write(tmp_path / "t.csv", rows), "task.validation_fraction=0.3").load()
    parts = found.train, found.validation["validation"]
    train, validation = ({text.strip()[-2:] for text in part["source"]} for part in parts)
    assert validation and not train & validation
    made = task(write(tmp_path / "u" / "train.csv", rows[::2]).parent)
    write(tmp_path / "u" / "validation.csv", rows[1::2])
    made.load()
    assert any("20 of 20 rows are training rows too" in note for note in made.accounts["validation"].notes)


def test_a_file_without_rows_is_said_to_have_none(task, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    assert problems_of(task(tmp_path / "a.jsonl")) == f"{tmp_path / 'a.jsonl'}: no rows."


def test_validation_rows_that_were_drawn_are_said_to_be_when_they_are_evaluated(task, tmp_path):
    made = task(write(tmp_path / "t.csv", pairs()))
    assert len(made.load_split("validation")) == 4
    assert any("4 of the training rows, drawn at random" in note for note in made.accounts["validation"].notes)


def test_a_folder_and_columns_of_other_names(task, tmp_path):
    rows = [{"article": row["source"], "summary": row["target"], "date": "x"} for row in pairs()]
    write(tmp_path / "d" / "train.csv", rows), write(tmp_path / "d" / "validation.jsonl", rows[:5])
    write(tmp_path / "d" / "test.csv", [{"article": "to predict"}])
    made = task(tmp_path / "d", "task.source_column=article", "task.target_column=summary")
    found = made.load()
    assert len(found.train) == 40 and len(found.validation["validation"]) == 5 and made.test_splits == ("test",)
    assert any("5 of 5 rows are training rows too" in note for note in made.accounts["validation"].notes)
    assert any("date" in note for note in made.accounts["train"].notes)
    assert made.load_split("test").column_names == ["source", "number"]


def test_files_of_other_names(task, tmp_path):
    write(tmp_path / "d" / "learn.csv", pairs()), write(tmp_path / "d" / "dev.jsonl", pairs(5))
    found = task(tmp_path / "d", "task.train_split=learn", "task.validation_split=dev").load()
    assert len(found.train) == 40 and len(found.validation["validation"]) == 5
    with pytest.raises(UserError, match=r"dev\.jsonl is not read under this name"):
        task(tmp_path / "d", "task.train_split=learn").load()


def test_a_dataset_of_the_hub(task, monkeypatch):
    hub = datasets.DatasetDict({name: datasets.Dataset.from_list(pairs(n)) for name, n in (("train", 30), ("dev", 4))})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append(args) or hub)
    with pytest.raises(UserError, match=r"no split 'validation', but 'dev': task\.validation_split=dev"):
        task("owner/pairs").load()
    assert len(task("owner/pairs", "task.validation_split=dev").load().validation["validation"]) == 4
    asked.clear()
    hub["other"] = hub.pop("dev")
    found = task("owner/pairs", "task.subset=de").load()
    assert asked == [("owner/pairs", "de")] and (len(found.train), len(found.validation["validation"])) == (27, 3)
    hub["validation"] = hub.pop("other")
    assert len(task("owner/pairs").load().validation["validation"]) == 4
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        task("owner/pairs").load_split("test")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a", "target": "b"}], "no column 'source' (task.source_column); it has text, target"),
        ([{"source": "a", "Targets": "b"}], "(task.target_column); it has source, Targets; perhaps task.target_column"),
        ([{"source": "a", "target": "b"}, {"source": "a", "target": " "}], "row 2 (data rows, counted from 1), column"),
        ([{"source": "", "target": "b"}], "column 'source': the source is empty"),
    ],
)
def test_faults_of_the_rows_name_file_row_and_column(task, tmp_path, rows, expected):
    file = write(tmp_path / "rows.csv", rows)
    found = problems_of(task(file))
    assert expected in found and str(file) in found


def test_faults_of_other_formats(task, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"source": "a", "target": 3}])
    assert "line 1, column 'target': 3 is not text" in problems_of(task(file))
    write(tmp_path / "b.parquet", [{"source": "a", "target": None}, {"source": "a", "target": "b"}])
    assert "row 1 (data rows, counted from 1), column 'target': null" in problems_of(task(tmp_path / "b.parquet"))
    pq.write_table(
        pa.table({"source": pa.array([], pa.string()), "target": pa.array([], pa.string())}), tmp_path / "c.parquet"
    )
    assert "no rows" in problems_of(task(tmp_path / "c.parquet"))
    assert "does not exist" in problems_of(task(tmp_path / "d.csv"))
    same = write(tmp_path / "e.csv", [{"source": "a", "target": "b"}] * 3)
    assert "all have the same source" in problems_of(task(same))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.path=null"], "task.path=null: task=seq2seq reads your own rows"),
        (["task.path=rows.xlsx"], "a file of one of the types csv, tsv, jsonl, parquet; save the sheet as CSV UTF-8"),
        (["task.path=xsum"], "task.path=xsum does not exist; it must be a folder, the id of a data set on the hub"),
        (["task.path=a.csv", "task.subset=de"], "only a data set on the hub has subsets"),
        (["task.path=a.csv", "task.validation_split=dev"], "a.csv is one file, which has no splits"),
        (["task.path=a.csv", "task.target_column=source"], "they must be two columns"),
    ],
)
def test_impossible_settings(cfg, overrides, expected):
    with pytest.raises(UserError, match=expected):
        get_task(cfg("task=seq2seq", *overrides).task)


def test_long_texts_are_cut_and_counted(task, tmp_path):
    rows = pairs(30)
    rows[0] |= {"source": "the market " * 20000, "target": "the farmer " * 30}
    made, tokenizer = task(write(tmp_path / "t.jsonl", rows), "task.validation_fraction=0.2"), tokenizer_for("t5")
    found = made.load()
    splits = {"train": found.train, **found.validation}
    counts: dict[str, int] = {}
    for name, part in splits.items():
        encoded = made.encode(part, tokenizer, training=name == "train")
        assert max(map(len, encoded["input_ids"])) <= 24 and max(map(len, encoded["labels"])) <= 16
        assert all(row[-1] == tokenizer.eos_token_id for row in encoded["labels"])  # also where it is cut
        for why, n in made.account(name, Split(part, encoded)).changed.items():
            counts[why] = counts.get(why, 0) + n
        whole = [len(tokenizer(text)["input_ids"]) > 24 for text in part["source"]]
        assert encoded["source_cut"][:] == whole
    assert counts[f"source longer than {LONGEST:,} characters, cut there"] == 1
    assert counts["target cut at task.max_target_length=16"] >= 1


def test_text_is_generated_for_evenly_spaced_rows():
    assert evenly(10, None).tolist() == list(range(10)) == evenly(10, 20).tolist()
    assert evenly(10, 4).tolist() == [0, 3, 6, 9] and evenly(10, 0).tolist() == []


# --- loss and generation ---


@pytest.fixture(params=["t5", "bart"])
def ready(request, task, tmp_path):
    """(task, model, tokenizer, split, collate function)."""
    made = task(write(tmp_path / "t.jsonl", pairs(24)), "task.prefix='say: '", "task.validation_fraction=0.5")
    model, tokenizer = random_model(request.param, KIND).eval(), tokenizer_for(request.param)
    made.check(model)
    rows = made.load().validation["validation"]
    split = Split(rows, made.encode(rows, tokenizer, training=False))
    return made, model, tokenizer, split, made.collate(tokenizer, training=False)


def test_the_loss_is_the_models_own_and_micro_batches_add_up(ready):
    made, model, tokenizer, split, collate = ready
    batch = collate(split.encoded[:])
    assert tokenizer.decode(batch["input_ids"][0]).replace("<s>", "").startswith("say: ")
    output = model(**made.inputs(batch))
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(made.loss(output, batch), own)
    assert made.weight(batch) == (batch["labels"] != -100).sum()
    total = sum(share * made.loss(model(**made.inputs(part)), part) for part, share in parts_of(batch, 5, made))
    torch.testing.assert_close(total, own)


def test_losses_and_texts_do_not_depend_on_batch_or_padding(ready):
    made, model, tokenizer, split, collate = ready
    whole = made.evaluate(model, collate(split.encoded[:]), final=True)
    wide = collate(split.encoded[:])
    wide["input_ids"] = torch.nn.functional.pad(wide["input_ids"], (0, 9), value=tokenizer.pad_token_id)
    wide["attention_mask"] = torch.nn.functional.pad(wide["attention_mask"], (0, 9))
    wide["labels"] = torch.nn.functional.pad(wide["labels"], (0, 7), value=-100)
    others = [made.evaluate(model, collate(split.encoded[i : i + 1]), final=True) for i in range(len(split.rows))]
    single = {key: torch.cat([part[key] for part in others]) for key in whole}
    for other in (single, made.evaluate(model, wide, final=True)):
        torch.testing.assert_close(other["loss"], whole["loss"], rtol=1e-4, atol=1e-4)
        assert other["text"].equal(whole["text"]) and other["tokens"].equal(whole["tokens"])
    assert len({tuple(row) for row in whole["text"].tolist()}) > 3
    for i, row in enumerate(split.encoded["input_ids"]):
        alone = model.generate(torch.tensor([row]), max_new_tokens=16, num_beams=1, do_sample=False)[0, 1:]
        assert whole["text"][i, : len(alone)].equal(alone)


def test_only_chosen_rows_are_generated_and_scored(ready, tmp_path):
    made, model, tokenizer, split, collate = ready
    batch = collate(split.encoded[:])
    batch["generated"] = torch.arange(len(batch["row"])) % 3 == 0
    outputs = made.evaluate(model, batch, final=False)
    whole = made.evaluate(model, batch, final=True)
    assert (outputs["text"][~batch["generated"]] == tokenizer.pad_token_id).all()
    assert outputs["text"][batch["generated"]].equal(whole["text"][batch["generated"]])
    part = {key: value[batch["generated"]] for key, value in whole.items()}
    assert made.score(outputs, split)["rougeL"] == pytest.approx(made.score(part, split)["rougeL"])
    assert made.score(outputs, split)["loss"] == pytest.approx(made.score(whole, split)["loss"])
    perfect = dict(whole)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:16] for text in split.rows["target"]]
    perfect["text"] = torch.tensor([row + [tokenizer.pad_token_id] * (16 - len(row)) for row in ids])
    assert made.score(perfect, split)["exact_match"] == 1
    lines = made.predictions(perfect, split)
    assert [line["prediction"] for line in lines] == [line["target"] for line in lines] == split.rows["target"][:]
    [file] = made.write_predictions(tmp_path, "validation", perfect, split)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["number"] for line in written] == split.rows["number"][:] and lines[0]["id"] == split.rows["id"][0]


def test_the_settings_of_generation_are_ours(ready):
    made, model, _, split, collate = ready
    batch = collate(split.encoded[:4])
    before = made.evaluate(model, batch, final=True)["text"]
    model.generation_config.min_length = 15  # as in bart-large-cnn
    model.generation_config.num_beams = 3
    model.generation_config.no_repeat_ngram_size = 2
    assert made.evaluate(model, batch, final=True)["text"].equal(before)


def test_texts_that_are_longer_than_the_positions_are_refused(task, tmp_path):
    overrides = "task.max_source_length=500", "task.generation.max_new_tokens=300"
    made = task(write(tmp_path / "t.jsonl", pairs()), *overrides)
    with pytest.raises(UserError) as error:
        made.check(random_model("bart", KIND))
    assert error.value.problems == [
        "task.max_source_length=500 is more than the 200 tokens that this backbone reads",
        "task.generation.max_new_tokens=300 is more than the 200 tokens that this backbone reads",
    ]
    made.check(random_model("t5", KIND))  # relative positions: no limit


# --- whole runs ---

SHORT = "model=hf trainer=cpu logger=csv finetune.batch_size=8 finetune.epochs=1"
SEARCH = "method=diffora", "search.batch_size=8", "search.epochs=1"


@pytest.fixture
def composed(cfg, tmp_path):
    file = write(tmp_path / "rows.jsonl", pairs())

    def make(family: str, *overrides: str):
        folder = tmp_path / family
        if not folder.exists():
            save_family(folder, family, KIND)
        own = "task=seq2seq", f"task.path={file}", f"model.path={folder}", *SIZES, *SHORT.split()
        return cfg(*own, "task.validation_fraction=0.2", *overrides)

    return make


def test_an_encoder_alone_is_refused(cfg, tmp_path):
    folder, file = save_family(tmp_path / "bert", "bert"), write(tmp_path / "rows.csv", pairs())
    with pytest.raises(UserError, match="is a bert model, which has no head for task=seq2seq: it needs an encoder"):
        run(cfg("task=seq2seq", f"task.path={file}", f"model.path={folder}", *SHORT.split()), tmp_path / "run")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_run_of_diffora_and_its_adapter(family, composed, tmp_path):
    """Search over both stacks, export, PEFT, our loader, and evaluation of rows without targets."""
    result = run(composed(family, *SEARCH, "finetune.lr=0.05"), tmp_path / "run")
    assert [len(row) for row in result.selection.selected] == [3, 3, 5, 5]
    assert {"validation/rougeL", "validation/exact_match", "validation/loss"} <= result.record["metrics"].keys()
    made = json.loads((tmp_path / "run" / "trajectory.json").read_text())
    assert made["gamma_bar"][0][0][-1] is None and made["gamma_bar"][0][3][0] is None
    batch = {name: torch.randint(5, 300, (3, 8)) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        mine = result.model.eval()(**batch).logits
        folder = tmp_path / "run" / "adapter"
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / family)
        plain = base(**batch).logits
        own = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / family)
        load_adapter(own, folder)
        ours = own.eval()(**batch).logits
        peft = PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(peft(**batch).logits, mine, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(peft.merge_and_unload()(**batch).logits, mine, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours, mine, rtol=1e-5, atol=1e-5)
    assert (plain - mine).abs().max() > 0.01

    new = write(tmp_path / "new.csv", [{"source": row["source"], "id": row["id"]} for row in pairs(5)])
    found = evaluate(read_request([f"run={tmp_path / 'run'}", f"task.path={new}", f"output={tmp_path / 'out'}"]))
    assert found == {"all": {}}
    lines = [json.loads(line) for line in (tmp_path / "out" / "all.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(5)] and "target" not in lines[0]
    again = evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"]))
    assert again["validation"]["rougeL"] == pytest.approx(result.record["metrics"]["validation/rougeL"])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "more",
    [
        "search.update=simultaneous",
        pytest.param("search.order=2", marks=SLOW),
        pytest.param("search.relaxation=sigmoid", marks=SLOW),
        pytest.param("method.scope=global", marks=SLOW),
        "method.budget=6000",
        "method.selector=activation",
        pytest.param("method.selector=attribution", marks=SLOW),
        pytest.param("method.selector=one_shot", marks=SLOW),
        pytest.param("method.warm_start=true", marks=SLOW),
    ],
)
def test_every_kind_of_search_works_on_both_stacks(more, composed, tmp_path):
    overrides = [more] if "warm" not in more else [more, "rank=4", "search.rank=4"]
    result = run(composed("t5", *SEARCH, "task.generation.rows=0", *overrides), tmp_path / "run")
    assert set(result.selection.names()) <= {name for name, _ in lowrank_layers(result.model)}
    assert len(result.selection.names()) == 16 or "budget" in more
    assert result.record["metrics"]["validation/perplexity"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "houlsby", "pfeiffer", "random", "share_only", "adalora", "full_ft"])
def test_methods(method, composed, tmp_path):
    result = run(composed("t5", f"method={method}", "task.generation.rows=0"), tmp_path / "run")
    assert result.record["status"] == "completed"


def test_ia3_scales_the_keys_and_values_of_both_attentions(composed, tmp_path):
    result = run(composed("t5", "method=ia3", "task.generation.rows=0"), tmp_path / "run")
    scaled = {name.partition(".ia3_l")[0] for name, _ in result.model.named_parameters() if "ia3_l" in name}
    assert len(scaled) == 2 * 3 + 2 * 5 and "decoder.block.1.layer.1.EncDecAttention.k" in scaled


def test_a_list_of_modules_and_the_file_of_a_search(composed, tmp_path):
    first = run(composed("t5", "method=diffora", "method.selection=[query,cross_value]"), tmp_path / "a")
    assert [len(row) for row in first.selection.selected] == [1, 1, 2, 2] and first.selection.k is None
    file = tmp_path / "a" / "selection.json"
    again = run(composed("t5", "method=diffora", f"method.selection={file}"), tmp_path / "b")
    assert again.selection.selected == first.selection.selected
    one = composed("t5", "method=diffora", f"method.selection={file}", "model.layer=encoder.block.*")
    with pytest.raises(UserError, match="was made for 4 layers x 16 modules"):
        run(one, tmp_path / "c")


def test_a_dry_run_counts_as_the_run(composed, tmp_path):
    dry = run(composed("t5", *SEARCH, "dry_run=true"), tmp_path / "dry").record
    real = run(composed("t5", *SEARCH, "task.generation.rows=0"), tmp_path / "real").record["params"]
    assert dry["params"]["backbone"] == real["backbone"]
    assert dry["params"]["adapter_min"] <= real["adapter"] <= dry["params"]["adapter_max"]
    assert dry["memory"]["estimate"].keys() == {"search", "finetune"}
    assert dry["memory"]["estimate"]["finetune"]["activations_mb"] > 0


def test_a_resumed_run_is_the_run_that_never_stopped(composed, tmp_path, monkeypatch):
    settings = *SEARCH, "finetune.epochs=2", "task.generation.rows=3"
    whole = run(composed("bart", *settings), tmp_path / "whole")
    step = FineTuneModule.training_step

    def stopping(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            raise Stopped
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneModule, "training_step", stopping)
        with pytest.raises(Stopped):
            run(composed("bart", *settings), tmp_path / "part")
    resumed = run(composed("bart", *settings, "resume=true"), tmp_path / "part")
    assert resumed.record["metrics"] == whole.record["metrics"]
    assert resumed.selection.gamma_bar == whole.selection.gamma_bar


def test_no_rows_give_no_texts():
    task = PairTask.__new__(PairTask)
    task._tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [""])  # as transformers does for no rows
    assert task._texts(torch.zeros(0, 5, dtype=torch.long)) == []
