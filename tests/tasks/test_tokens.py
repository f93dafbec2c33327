"""task=tokens: scores through batches and windows, predictions, whole runs, exports."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from families import save_family
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score

from diffora.backbones.load import load_backbone
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.base import Split, get_task
from diffora.tasks.batches import joined
from diffora.tasks.words.windows import NO_WORD
from diffora.training.criterion import Criterion

SHORT = "model=tiny trainer=cpu logger=csv task.max_length=24 task.doc_stride=4 finetune.batch_size=8"
NAMES = ["Ann", "the farmer", "a teacher"]
PLACES = ["market", "red house"]


def rows(n: int = 40) -> list[dict]:
    """Sentences of different lengths; the entities are in fixed places."""
    found = []
    for i in range(n):
        person, place = NAMES[i % 3].split(), PLACES[i % 2].split()
        tokens = [*person, *["was", "seen"] * (1 + i % 4), "in", "the", *place, f"x{i}"]
        tags = [f"{'BI'[j > 0]}-PER" for j in range(len(person))] + ["O"] * (2 + 2 * (1 + i % 4))
        found.append({"tokens": tokens, "ner_tags": [*tags, *(f"{'BI'[j > 0]}-LOC" for j in range(len(place))), "O"]})
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def made(cfg, file):
    """A task, its tokenizer, and all rows of its file, encoded."""

    def make(*overrides):
        composed = cfg("task=tokens", f"task.path={file}", *SHORT.split(), *overrides)
        task = get_task(composed.task)
        processor = task.processor(model_of(composed.model))
        part = task.load_split("all")
        return task, processor, Split(part, task.encode(part, processor, training=False)), composed

    return make


def outputs_of(task, split, collate, size, logits):
    """The task's outputs for all rows in batches of ``size``; ``logits`` has those of each window."""
    parts = []
    for start in range(0, len(split.encoded), size):
        batch = collate(split.encoded[start : start + size])
        wide = torch.zeros(*batch["input_ids"].shape, len(task.head()["id2label"]))
        for i, row in enumerate(batch["row"].tolist()):
            wide[i, : logits[row].shape[0]] = logits[row]
        parts.append(task.outputs(type("Output", (), {"logits": wide})(), batch))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("length", [24, 10])
def test_scores_are_those_of_seqeval_in_any_batches(made, length):
    task, processor, split, _ = made(f"task.max_length={length}", "task.doc_stride=3")
    assert (len(split.encoded) > len(split.rows)) == (length == 10)  # windows
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, 5, generator=generator) for n in split.encoded["length"]]
    collate = task.collate(processor, training=False)
    found = [outputs_of(task, split, collate, size, logits) for size in (1, 7, 64)]
    scores = [task.score(outputs, split) for outputs in found]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-6)
    names = task.tagging.names
    gold = [[names[tag] for tag in tags] for tags in split.rows["tags"]]
    predicted = [line["prediction"] for line in task.predictions(found[0], split)]
    assert list(map(len, gold)) == list(map(len, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scores[0]["f1"] == pytest.approx(f1_score(gold, predicted), abs=1e-12)
        assert scores[0]["precision"] == pytest.approx(precision_score(gold, predicted), abs=1e-12)
        assert scores[0]["recall"] == pytest.approx(recall_score(gold, predicted), abs=1e-12)
    assert scores[0]["accuracy"] == pytest.approx(accuracy_score(gold, predicted), abs=1e-12)
    assert 0 < scores[0]["accuracy"] < 1
    # the loss is the mean over all words, of the logits at their first tokens
    terms = [
        torch.nn.functional.cross_entropy(logits[w][s], torch.tensor(t)).item()
        for w, (starts, tags) in enumerate(zip(split.encoded["starts"], split.encoded["labels"], strict=True))
        for s, t in zip(starts, tags, strict=True)
    ]
    assert scores[0]["loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    by_type = {row["class"]: row for row in task.class_results(found[1]).rows()}
    report = classification_report(gold, predicted, output_dict=True, zero_division=0)
    for kind in ("LOC", "PER"):
        assert by_type[kind]["support"] == report[kind]["support"] > 0
        assert by_type[kind]["precision"] == pytest.approx(report[kind]["precision"], abs=1e-6)
        assert by_type[kind]["f1"] == pytest.approx(report[kind]["f1-score"], abs=1e-6)


def test_a_word_without_a_token_is_outside_of_all_entities_whatever_number_that_tag_has(made):
    task, *_ = made("task.tags=[B-PER,I-PER,B-LOC,I-LOC,O]")
    batch = {"row": torch.tensor([0]), "example": torch.tensor([0]), "starts": torch.tensor([[1, -1, 2, NO_WORD]])}
    logits = torch.nn.functional.one_hot(torch.tensor([[4, 2, 0, 1]]), 5).float()
    found = task.outputs(type("Output", (), {"logits": logits})(), batch)["predicted"]
    assert found[0, :4].tolist() == [2, 4, 0, -1]


def test_words_that_are_predicted_do_not_depend_on_windows(made):
    """With windows, each word is predicted once, and the tags stand in the order of the words."""
    task, processor, split, _ = made("task.max_length=10", "task.doc_stride=3")
    numbers = [torch.full((n, 5), -9.0) for n in split.encoded["length"]]
    for window, (starts, tags) in enumerate(zip(split.encoded["starts"], split.encoded["labels"], strict=True)):
        for start, tag in zip(starts, tags, strict=True):
            numbers[window][start, tag] = 9.0
    outputs = outputs_of(task, split, task.collate(processor, False), 16, numbers)
    assert task.score(outputs, split) | {"loss": 0} == dict.fromkeys(("f1", "precision", "recall", "accuracy"), 1.0) | {
        "loss": 0
    }
    lines = task.predictions(outputs, split)
    assert [line["tokens"] for line in lines] == [row["tokens"] for row in rows()]
    assert [line["prediction"] for line in lines] == [row["ner_tags"] for row in rows()]
    assert lines[1]["entities"] == [
        {"type": "PER", "text": "the farmer", "start": 0, "end": 2},
        {"type": "LOC", "text": "red house", "start": 8, "end": 10},
    ]
    half = {key: value[split.encoded.data.column("example").to_numpy() % 2 == 0] for key, value in outputs.items()}
    assert task.score(half, split)["f1"] == 1.0


def test_the_model_gives_the_same_for_a_batch_and_for_single_rows(made):
    task, processor, split, composed = made()
    backbone = load_backbone(model_of(composed.model), task.model_request(), processor)
    model = backbone.model.eval()
    with torch.no_grad():
        model.classifier.weight.normal_(std=1.0)
        collate = task.collate(processor, training=False)
        batch = collate(split.encoded[0:8])
        together = task.loss(model(**task.inputs(batch)), batch)
        alone = [collate(split.encoded[i : i + 1]) for i in range(8)]
        losses = torch.stack([task.loss(model(**task.inputs(part)), part) * task.weight(part) for part in alone])
        wide = dict(joined(batch, collate(split.encoded[3:4]), task, 0).items())
        both = task.loss(model(**task.inputs(wide)), wide)
    assert losses.sum() / task.weight(batch) == pytest.approx(together.item(), rel=1e-4)
    expected = (losses.sum() + losses[3]) / (task.weight(batch) + task.weight(alone[3]))
    assert both == pytest.approx(expected.item(), rel=1e-4)


def test_label_smoothing_and_weights_of_tags(made):
    task, processor, split, _ = made()
    batch = task.collate(processor, training=True)(split.encoded[0:6])
    logits = torch.randn(*batch["labels"].shape, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0])
    criterion = Criterion(task, 0.1, weights)
    words = batch["labels"] >= 0
    expected = torch.nn.functional.cross_entropy(logits[words], batch["labels"][words], weights, label_smoothing=0.1)
    output = type("Output", (), {"logits": logits})()
    assert criterion.loss(output, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert criterion.weight(batch) == pytest.approx(weights[batch["labels"][words]].sum().item())
    plain = torch.nn.functional.cross_entropy(logits[words], batch["labels"][words])
    assert Criterion(task).loss(output, batch).item() == pytest.approx(plain.item(), rel=1e-5)


def test_rows_without_words_and_long_words(cfg, tmp_path):
    content = [{"tokens": [], "ner_tags": []}, *rows(12), {"tokens": ["x" * 300], "ner_tags": ["O"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    composed = cfg("task=tokens", f"task.path={tmp_path / 'a.jsonl'}", *SHORT.split())
    task = get_task(composed.task)
    part = task.load_split("all")
    split = Split(part, task.encode(part, task.processor(model_of(composed.model)), training=False))
    assert split.encoded["example"][:] == list(range(1, 14))
    account = task.account("all", split)
    assert account.dropped == {"no words": 1}


def test_a_length_that_the_model_cannot_read(made):
    with pytest.raises(UserError, match=r"task\.max_length=70 must be at least 3 .* and at most 64"):
        made("task.max_length=70")


def test_windows_overlap_by_at_most_half_of_them(made):
    _, _, split, _ = made("task.max_length=8", "task.doc_stride=1000")
    examples = split.encoded["example"][:]
    assert len(set(examples)) == len(rows()) and max(map(examples.count, examples)) <= 6


# --- runs ---


def test_a_run_searches_trains_resumes_exports_and_is_evaluated(cfg, file, tmp_path):
    torch.set_num_threads(1)
    composed = cfg(
        "method=diffora", "task=tokens", f"task.path={file}", *SHORT.split(),
        "search.epochs=1", "search.update=simultaneous", "search.accumulate=2", "finetune.epochs=2", "finetune.lr=0.02",
    )  # fmt: skip
    whole = run(composed, tmp_path / "run")
    record = whole.record
    assert record["status"] == "completed" and record["classes"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert record["metrics"]["validation/f1"] > 0.2 and "train/f1" in record["metrics"]

    assert [line.split(",")[0] for line in (whole.folder / "classes.csv").read_text().splitlines()] == [
        "class",
        "LOC",
        "PER",
    ]

    again = shutil.copytree(whole.folder, tmp_path / "again")
    next((again / "checkpoints").glob("finetune-0002-*.ckpt")).unlink()
    (again / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    composed.resume = True
    resumed = run(composed, again).record
    assert resumed["metrics"] == record["metrics"] and resumed["history"] == record["history"]

    validation = tmp_path / "validation.jsonl"
    task = get_task(composed.task)
    names, chosen = None, task.load().validation["validation"]
    names = task.tagging.names
    lines = [
        {"tokens": w, "ner_tags": [names[t] for t in ts]} for w, ts in zip(chosen["words"], chosen["tags"], strict=True)
    ]
    validation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = read_request([f"run={whole.folder}", f"task.path={validation}", f"output={tmp_path / 'out'}"])
    scores = evaluate(request)["all"]
    for metric in ("f1", "precision", "recall", "accuracy"):
        assert scores[metric] == pytest.approx(record["metrics"][f"validation/{metric}"], abs=1e-6)

    unlabelled = tmp_path / "new.conll"
    unlabelled.write_text("Ann\nwas\nseen\n\nthe\nfarmer\n")
    request = read_request([f"run={whole.folder}", f"task.path={unlabelled}", f"output={tmp_path / 'new'}"])
    assert evaluate(request) == {"all": {}}
    lines = [json.loads(line) for line in (tmp_path / "new" / "all.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [["Ann", "was", "seen"], ["the", "farmer"]]
    assert all(set(line["prediction"]) <= set(record["classes"]) for line in lines)


def pipeline_tags(model, tokenizer, words: list[str]) -> list[str]:
    """The tag that transformers' pipeline gives to the first token of each word."""
    tagger = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    found = {piece["start"]: piece["entity"] for piece in tagger(" ".join(words))}
    places = np.cumsum([0, *(len(word) + 1 for word in words[:-1])]).tolist()
    return [found[place] for place in places]


@pytest.mark.parametrize("method", ["full_ft", "lora"])
def test_the_pipeline_of_a_merged_model_gives_the_same_tags(cfg, file, tmp_path, method):
    torch.set_num_threads(1)
    overrides = ["finetune.epochs=3", "finetune.lr=0.003" if method == "full_ft" else "finetune.lr=0.02"]
    composed = cfg(f"method={method}", "task=tokens", f"task.path={file}", *SHORT.split(), *overrides)
    folder = run(composed, tmp_path / "run").folder
    evaluate(read_request([f"run={folder}", "split=validation", f"output={tmp_path / 'out'}"]))
    lines = [json.loads(line) for line in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    if method == "full_ft":
        model = transformers.AutoModelForTokenClassification.from_pretrained(folder / "model")
    else:
        from peft import PeftModel

        names = json.loads((folder / "run.json").read_text())["classes"]
        base = transformers.AutoModelForTokenClassification.from_pretrained(EMBEDDED, id2label=dict(enumerate(names)))
        model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model" if method == "full_ft" else EMBEDDED)
    found = [pipeline_tags(model, tokenizer, line["tokens"]) for line in lines]
    assert found == [line["prediction"] for line in lines]
    assert len({tag for tags in found for tag in tags}) > 1


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "distilbert", "electra", "llama")]


@pytest.mark.parametrize("name", ["roberta", "mpnet", "gpt2", *SLOW])
def test_every_family_with_a_head_for_tokens(cfg, file, tmp_path, name):
    """The logits of a row do not depend on the batch, and the first tokens are those of the words."""
    place = save_family(tmp_path / name, name)
    composed = cfg("task=tokens", f"task.path={file}", "model=hf", f"model.path={place}", "task.max_length=40")
    task = get_task(composed.task)
    part = task.load_split("all")
    processor = task.processor(model_of(composed.model))
    split = Split(part, task.encode(part, processor, training=False))
    model = load_backbone(model_of(composed.model), task.model_request(), processor).model.eval()
    collate = task.collate(processor, training=False)
    batch, single = collate(split.encoded[0:6]), collate(split.encoded[2:3])
    with torch.no_grad():
        wide, alone = model(**task.inputs(batch)).logits[2], model(**task.inputs(single)).logits[0]
    torch.testing.assert_close(wide[: len(alone)], alone, rtol=1e-4, atol=1e-5)
    for sentence, ids, starts in zip(part["words"], split.encoded["input_ids"], split.encoded["starts"], strict=True):
        texts = [processor.decode([ids[start]]).strip() for start in starts]
        assert all(text and word.startswith(text) for word, text in zip(sentence, texts, strict=False)), texts


def test_a_model_without_a_head_for_tokens(cfg, file, tmp_path):
    place = save_family(tmp_path / "bart", "bart")
    composed = cfg("method=lora", "task=tokens", f"task.path={file}", "model=hf", f"model.path={place}", "trainer=cpu")
    with pytest.raises(UserError) as caught:
        run(composed, tmp_path / "run")
    assert "is a bart model, which has no head for task=tokens: it needs" in str(caught.value)
