"""Windows, spans and answers, compared with the tokenizers, with exhaustive search, and on real questions."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.experiment import run
from diffora.tasks.base import Outputs, Split, get_task
from diffora.tasks.questions import windows as module
from diffora.tasks.questions.answers import best_answers
from diffora.tasks.questions.check import SCHEMA
from diffora.tasks.questions.metrics import NAMES_V2, normalise
from diffora.tasks.squad import SquadTask

TEXT = (
    "In 1858 the Virgin Mary reputedly appeared to Saint Bernadette Soubirous, whose café stood near Zürich. "
    "Füchse 🦊 jumped over 中国 and the naïve “fox” \u2013 24\u201310 \u2013 in the 2010s! Who? Nobody knew; "
)


FULL = {"max_length": 384, "doc_stride": 128, "max_question_length": 64, "max_answer_length": 30}


def task(unanswerable: bool = False, **changes) -> SquadTask:
    cfg = OmegaConf.load(conf_dir() / "task" / ("squad_v2.yaml" if unanswerable else "squad.yaml"))
    OmegaConf.resolve(cfg)
    cfg.update({"max_length": 40, "doc_stride": 8, "max_question_length": 12, "n_best": 5, "max_answer_length": 10})
    cfg.update(changes)
    made = get_task(cfg)
    assert isinstance(made, SquadTask)
    return made


def rows_of(*questions: tuple[str, str, str | None]) -> datasets.Dataset:
    """Rows from (question, context, answer). The answer is at its first occurrence in the context."""
    return datasets.Dataset(
        pa.table(
            {
                "id": [f"id{i}" for i in range(len(questions))],
                "context": [context for _, context, _ in questions],
                "question": [question for question, _, _ in questions],
                "answers": [[answer] if answer is not None else [] for _, _, answer in questions],
                "starts": [[context.index(answer)] if answer is not None else [] for _, context, answer in questions],
            },
            schema=SCHEMA,
        )
    )


# --- small tokenizers of the real kinds ---


def bert() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    return backend


def gpt2(**options) -> PreTrainedTokenizerFast:
    backend = byte_level(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=1024, model_input_names=inputs, **names, **options
    )


def roberta() -> PreTrainedTokenizerFast:
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        bos_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def xlnet() -> PreTrainedTokenizerFast:
    """A tokenizer with [CLS] at the end and padding on the left."""
    backend = byte_level(["<pad>", "<sep>", "<cls>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A <sep> <cls>:2",
        pair="$A <sep> $B:1 <sep>:1 <cls>:2",
        special_tokens=[("<sep>", 1), ("<cls>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<cls>",
        sep_token="<sep>",
        pad_token="<pad>",
        padding_side="left",
        truncation_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def llama() -> PreTrainedTokenizerFast:
    backend = byte_level(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bert": bert,
    "gpt2": gpt2,
    "roberta": roberta,
    "xlnet": xlnet,
    "llama": llama,
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)


# --- outputs of models that do not exist ---


def batches(made: SquadTask, encoded: datasets.Dataset, tokenizer, size: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    collate = made.collate(tokenizer, training=False)
    for start in range(0, len(encoded), size):
        yield collate(encoded[list(range(start, min(start + size, len(encoded))))])


def collect(made: SquadTask, encoded: datasets.Dataset, tokenizer, logits: Callable, size: int = 3) -> Outputs:
    """The outputs that validation collects if ``logits(batch)`` are the start and end logits."""
    parts = []
    for batch in batches(made, encoded, tokenizer, size):
        start, end = logits(batch)
        parts.append(made.outputs(SimpleNamespace(start_logits=start, end_logits=end), batch))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def perfect(batch):
    """Logits of a model that knows all answers."""
    for target in ("start_positions", "end_positions"):
        yield 10.0 * torch.nn.functional.one_hot(batch[target], batch["input_ids"].shape[1])


def noise(batch):
    """Random logits, also for padding. They depend on window and position only, not on the batch."""
    for part in (0, 1):
        yield torch.stack(
            [
                torch.randn(200, generator=torch.Generator().manual_seed(2 * row + part))[: batch["input_ids"].shape[1]]
                for row in batch["row"].tolist()
            ]
        )


def whole(made: SquadTask, rows: datasets.Dataset, tokenizer, logits: Callable) -> tuple[Outputs, Split]:
    encoded = made.encode(rows, tokenizer, training=False)
    return collect(made, encoded, tokenizer, logits), Split(rows, encoded)


# --- rows ---


def test_rows_of_a_folder(tmp_path):
    """Splits, the seeded subset and the hash; also single splits, with and without answers."""
    rows = rows_of(*((f"Who is {i}?", TEXT, "Virgin Mary") for i in range(20)))
    table = [
        {**row, "answers": {"text": row.pop("answers"), "answer_start": row.pop("starts")}} for row in rows.to_list()
    ]
    for name, part in (("train", table), ("dev", table[:4]), ("test", [{**row, "answers": None} for row in table[:3]])):
        lines = ({key: value for key, value in row.items() if value is not None} for row in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    options = {"path": str(tmp_path), "validation_file": "dev.jsonl"}
    loaded = task(**options).load()
    assert loaded.train.to_list() == rows.to_list() and loaded.source == str(tmp_path)
    assert loaded.validation["validation"].to_list() == rows.to_list()[:4]
    few, again = (task(max_train_rows=7, **options).load() for _ in range(2))
    assert few.train.to_list() == again.train.to_list() and few.data_hash == again.data_hash != loaded.data_hash
    assert len(few.train) == 7 and few.train["id"][:] == [name for name in rows["id"] if name in set(few.train["id"])]

    assert task(**options).load_split("validation").to_list() == rows.to_list()[:4]
    unlabelled = task(**options).load_split("test")
    assert unlabelled.column_names == ["id", "context", "question"] and len(unlabelled) == 3
    made, tokenizer = task(**options), TOKENIZERS["bert"]
    assert not made.labelled(Split(unlabelled, made.encode(unlabelled, tokenizer, training=False)))


def test_a_first_question_without_an_answer_may_leave_answers_out(tmp_path):
    questions = [{"id": f"q{i}", "question": f"Who {i}?", "is_impossible": True} for i in range(4)]
    questions[2] |= {"is_impossible": False, "answers": [{"text": "Nobody", "answer_start": TEXT.index("Nobody")}]}
    content = {"data": [{"paragraphs": [{"context": TEXT, "qas": questions}]}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    rows = task(True, path=str(tmp_path), train_file="a.json", validation_file="a.json").load()
    assert [len(answers) for answers in rows.train["answers"]] == [0, 0, 1, 0]


# --- windows ---


@every_kind
def test_one_window_is_the_tokenizers_own_pair(kind):
    tokenizer = TOKENIZERS[kind]
    (window,) = task(max_length=400).encode(rows_of(("  Who appeared?", TEXT, "Virgin Mary")), tokenizer, True)
    alone = tokenizer(["Who appeared?"], [TEXT], padding=False)
    expected = alone["input_ids"][0]
    if kind == "gpt2":  # puts nothing between the two and has no [CLS]
        n = len(tokenizer("Who appeared?")["input_ids"])
        expected = [*expected[:n], *tokenizer("\n")["input_ids"], *expected[n:], tokenizer.eos_token_id]
    if kind == "llama":
        expected = [*expected, tokenizer.eos_token_id]
    assert window["input_ids"] == expected and window["length"] == len(expected)
    if kind in ("bert", "xlnet"):
        assert window["token_type_ids"] == alone["token_type_ids"][0]
    else:
        assert "token_type_ids" not in window
    null = {"bert": 0, "roberta": 0}.get(kind, len(expected) - 1)
    assert window["null_position"] == null
    found = tokenizer.decode(window["input_ids"][window["start_positions"] : window["end_positions"] + 1])
    assert found.strip().lower() == "virgin mary"


@every_kind
def test_windows_cover_the_context_and_overlap(kind):
    tokenizer, made = TOKENIZERS[kind], task()
    rows = rows_of(("Who?", TEXT * 3, None), ("A very, very long question about nothing? " * 3, TEXT, None))
    encoded = made.encode(rows, tokenizer, training=False)
    assert encoded["row"][:] == list(range(len(encoded))) and encoded["example"][:] == sorted(encoded["example"][:])
    for example, row in enumerate(rows):
        windows = [window for window in encoded if window["example"] == example]
        whole = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
        ids, chars = whole["input_ids"], whole["offset_mapping"]
        reached = 0
        for i, window in enumerate(windows):
            low = window["context_start"]
            part = window["input_ids"][low : low + window["context_length"]]
            first = reached - made.cfg.doc_stride if i else 0
            assert part == ids[first : first + len(part)]
            assert list(zip(window["char_start"], window["char_end"], strict=True)) == chars[first : first + len(part)]
            assert len(window["input_ids"]) == window["length"] <= 40
            assert window["length"] == 40 or i == len(windows) - 1
            reached = first + len(part)
        assert reached == len(ids)
        question = tokenizer(row["question"], add_special_tokens=False)["input_ids"][:12]
        assert any(question == windows[0]["input_ids"][i : i + len(question)] for i in range(4))


@every_kind
def test_a_window_without_the_whole_answer_has_the_null_position_as_target(kind):
    rows = rows_of(("Where?", TEXT * 2, "24\u201310 \u2013 in the 2010s"), ("Why?", TEXT, None))
    # An overlap of more tokens than the answer has bytes: some window has the whole answer with any vocabulary.
    encoded = task(max_length=80, doc_stride=32).encode(rows, TOKENIZERS[kind], training=False)
    inside = 0
    for window in encoded:
        at = (window["start_positions"], window["end_positions"])
        if at == (window["null_position"],) * 2:
            continue
        start, end = (position - window["context_start"] for position in at)
        context = rows[window["example"]]["context"]
        assert (
            context[window["char_start"][start] : window["char_end"][end]].strip() == "24\u201310 \u2013 in the 2010s"
        )
        assert window["example"] == 0
        inside += 1
    assert 1 <= inside < len(encoded)


def test_real_answers_are_covered(real_data, minilm):
    from transformers import AutoTokenizer

    made = task(**FULL, path=str(real_data / "squad"))
    made.cfg.update({"train_file": "train_5k.parquet", "validation_file": "validation_1k.parquet"})
    rows = made.load()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    encoded = made.encode(rows.train, tokenizer, training=False)[:]
    golds, contexts = rows.train["answers"][:], rows.train["context"][:]
    equal, covered = set(), set()
    for i, example in enumerate(encoded["example"]):
        if encoded["start_positions"][i] == encoded["null_position"][i]:
            continue
        begin = encoded["char_start"][i][encoded["start_positions"][i] - encoded["context_start"][i]]
        end = encoded["char_end"][i][encoded["end_positions"][i] - encoded["context_start"][i]]
        gold, text = golds[example][0], contexts[example][begin:end]
        covered.add(example)
        if normalise(gold) == normalise(text):
            equal.add(example)
        else:  # 30 of the answers begin or end inside a token, such as "six" in "sixth"
            assert gold in text and abs(len(text) - len(gold)) < 12
    assert covered == set(range(5000)) and len(equal) == 4970

    # Perfect logits reach the best possible score.
    rows_v = rows.validation["validation"]
    outputs, split = whole(made, rows_v, tokenizer, perfect)
    assert made.score(outputs, split)["exact_match"] == pytest.approx(98.4, abs=0.5)


def test_real_unanswerable_questions(real_data, minilm):
    from transformers import AutoTokenizer

    made = task(True, **FULL, path=str(real_data / "squad_v2"))
    made.cfg.validation_file = "validation_1k.parquet"
    rows = made.load_split("validation").select(range(0, 1000, 5)).flatten_indices()
    outputs, split = whole(made, rows, AutoTokenizer.from_pretrained(minilm), perfect)
    scores = made.score(outputs, split)
    assert scores["NoAns_exact"] == 100 and scores["HasAns_f1"] > 97 and scores["best_f1"] >= scores["f1"] > 98
    assert {*scores} == {"loss", *NAMES_V2}


def test_very_long_context(monkeypatch):
    """100,000 characters give many windows. Only a few are in memory at a time."""
    written = []
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 50)
    original = module.arrow_writer

    def spy(file, schema):
        from contextlib import contextmanager

        @contextmanager
        def wrapped():
            with original(file, schema) as append:
                yield lambda columns: (written.append(len(columns["row"])), append(columns))

        return wrapped()

    monkeypatch.setattr(module, "arrow_writer", spy)
    context = (TEXT * 600)[:100_000]
    made, tokenizer = task(**FULL), TOKENIZERS["roberta"]
    rows = rows_of(*[(f"Where, {i}?", context, "Bernadette") for i in range(3)])
    encoded = made.encode(rows, tokenizer, training=True)
    n = len(tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
    question = [len(tokenizer(f"Where, {i}?", add_special_tokens=False)["input_ids"]) for i in range(3)]
    room = [384 - 4 - q for q in question]
    assert len(encoded) == sum(1 + -(-(n - r) // (r - 128)) for r in room)
    assert len(written) == 4 and sum(written) == len(encoded)
    assert "char_start" not in encoded.column_names  # not read back with every training batch


@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
@settings(deadline=None, max_examples=60)
def test_perfect_logits_give_perfect_scores(data, kind, tmp_path_factory):
    """For words of any script, and answers at any place of contexts with several windows."""
    letters = st.characters(categories=["L", "N", "Mn", "So"], exclude_characters="\ufffd")  # BERT drops that one
    words = st.text(letters, min_size=1, max_size=6).filter(lambda word: unicodedata.category(word[0]) != "Mn")
    parts = data.draw(st.lists(words, min_size=1, max_size=60))
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(parts) - 1)))
    context, answer = " ".join(parts), " ".join(parts[first : last + 1])
    start = len(" ".join(parts[:first])) + (first > 0)
    rows = datasets.Dataset(
        pa.table(
            {"id": ["1"], "context": [context], "question": ["Who?"], "answers": [[answer]], "starts": [[start]]},
            SCHEMA,
        )
    )
    made = task(max_length=60, doc_stride=25, max_answer_length=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        outputs, split = whole(made, rows, TOKENIZERS[kind], perfect)
    n_tokens = len(TOKENIZERS[kind](" " + answer, add_special_tokens=False)["input_ids"])
    if n_tokens <= 25:  # so that some window has all of it
        (prediction,) = made.predictions(outputs, split)
        assert prediction["prediction"] == answer


# --- a step ---


@every_kind
def test_loss_and_outputs_do_not_depend_on_the_batch(kind):
    tokenizer, made = TOKENIZERS[kind], task(True)
    rows = rows_of(
        ("Who?", TEXT, "Virgin Mary"), ("When and where was it?", "In 1858.", "1858"), ("Why?", "Nobody", None)
    )
    encoded = made.encode(rows, tokenizer, training=False)
    together = collect(made, encoded, tokenizer, noise, size=100)
    alone = collect(made, encoded, tokenizer, noise, size=1)
    assert set(together) == {"row", "span_score", "span_start", "span_end", "null_score", "loss"}
    for key, values in together.items():
        assert values.shape == alone[key].shape and values.shape[0] == len(encoded)
        assert torch.allclose(values, alone[key]), key
    for batch in batches(made, encoded, tokenizer, size=100):
        start, end = noise(batch)
        loss = made.loss(SimpleNamespace(start_logits=start, end_logits=end), batch)
        assert loss == pytest.approx(together["loss"].mean().item())


@every_kind
def test_loss_is_over_the_possible_positions_only(kind):
    """Compared with a softmax over the context and the null position only."""
    tokenizer, made = TOKENIZERS[kind], task(True)
    encoded = made.encode(rows_of(("Who?", TEXT, "Virgin Mary")), tokenizer, training=False)
    for batch in batches(made, encoded, tokenizer):
        logits = [part.double().requires_grad_() for part in noise(batch)]
        loss = made.loss(SimpleNamespace(start_logits=logits[0], end_logits=logits[1]), batch)
        total, possible = 0.0, torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for i, row in enumerate(batch["row"].tolist()):
            window = encoded[row]
            low = window["context_start"]
            positions = [window["null_position"], *range(low, low + window["context_length"])]
            possible[i, positions] = True
            for part, name in zip(logits, made.targets, strict=True):
                shares = torch.softmax(part[i, positions], dim=0)
                total -= shares[positions.index(window[name])].log().item() / 2
        assert loss.item() == pytest.approx(total / len(batch["row"]), rel=1e-5)
        loss.backward()
        for part in logits:
            assert ((part.grad != 0) == possible).all()


def test_the_model_gets_only_its_own_inputs():
    tokenizer, made = TOKENIZERS["bert"], task()
    encoded = made.encode(rows_of(("Who?", TEXT, "Virgin Mary")), tokenizer, training=True)
    for batch in batches(made, encoded, tokenizer):
        assert set(made.inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}


def test_dummy_batch_is_a_whole_step():
    from transformers import GPT2Config, GPT2ForQuestionAnswering

    made = task()
    model = GPT2ForQuestionAnswering(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    batch = made.dummy(3, model)
    assert batch["input_ids"].shape == (3, 40)
    output = model(**made.inputs(batch))
    assert made.loss(output, batch).isfinite() and made.outputs(output, batch)["span_score"].shape == (3, 5)


def exhaustive(made: SquadTask, split: Split, logits: Callable, tokenizer) -> dict[int, list[tuple[float, str]]]:
    """All spans of all windows of each example, computed one by one, best first."""
    found: dict[int, list[tuple[float, str]]] = {}
    for batch in batches(made, split.encoded, tokenizer, size=1):
        start, end = (part[0].tolist() for part in logits(batch))
        window = split.encoded[batch["row"].item()]
        context = split.rows[window["example"]]["context"]
        low = window["context_start"]
        for i in range(window["context_length"]):
            for j in range(i, min(i + made.cfg.max_answer_length, window["context_length"])):
                text = context[window["char_start"][i] : window["char_end"][j]]
                found.setdefault(window["example"], []).append((start[low + i] + end[low + j], text.strip()))
    return {example: sorted(spans, key=lambda span: -span[0]) for example, spans in found.items()}


@every_kind
@pytest.mark.parametrize("longest", [1, 4])
def test_answers_are_the_best_of_all_spans(kind, longest):
    tokenizer, made = TOKENIZERS[kind], task(True, max_answer_length=longest, n_best=4)
    rows = rows_of(("Who?", TEXT, "Virgin Mary"), ("When?", "1858", "1858"), ("Why?", TEXT[40:], None))
    outputs, split = whole(made, rows, tokenizer, noise)
    expected = exhaustive(made, split, noise, tokenizer)
    null = [outputs["null_score"][np.array(split.encoded["example"][:]) == i].min().item() for i in range(3)]
    for i, (prediction, answer) in enumerate(
        zip(made.predictions(outputs, split), best_answers(outputs, split, made.cfg.n_best), strict=True)
    ):
        score, text = next((score, text) for score, text in expected[i] if text)
        assert answer.text == text and answer.null_odds == pytest.approx(null[i] - score, abs=1e-5)
        refused = null[i] - score > 0
        assert prediction == {"row": i, "id": f"id{i}", "prediction": "" if refused else text}
        assert len(answer.spans) <= 4


def test_equal_scores_take_the_first_and_shortest():
    tokenizer, made = TOKENIZERS["roberta"], task()
    rows = rows_of(("Who?", TEXT, "Virgin Mary"))

    def flat(batch):
        return [torch.zeros(batch["input_ids"].shape)] * 2

    outputs, split = whole(made, rows, tokenizer, flat)
    answer = best_answers(outputs, split, made.cfg.n_best)[0]
    first = split.encoded[0]
    assert answer.text == TEXT[: first["char_end"][0]]
    assert [text for text, _ in answer.spans] == [TEXT[: first["char_end"][i]].strip() for i in range(5)]


def test_few_tokens_and_bad_logits():
    """With fewer spans than n_best, with no token, and with logits that are not finite."""
    tokenizer, made = TOKENIZERS["bert"], task(True, n_best=50, max_answer_length=2)
    rows = rows_of(("Who?", "1858", "1858"), ("Who?", "\u0301", None))
    outputs, split = whole(made, rows, tokenizer, noise)
    assert outputs["span_score"].shape == (2, 50)
    assert made.predictions(outputs, split)[1]["prediction"] == ""
    assert np.isfinite(list(made.score(outputs, split).values())).all()

    def broken(batch):
        return [torch.full(batch["input_ids"].shape, torch.nan)] * 2

    outputs = collect(made, split.encoded, tokenizer, broken)
    assert made.score(outputs, split)["HasAns_exact"] == 0


# --- scores and predictions ---


QUESTIONS = [
    ("Who appeared?", TEXT * 2, "Saint Bernadette Soubirous"),
    ("When?", TEXT, "1858"),
    ("Which country?", TEXT, "中国"),
    ("Why?", TEXT, None),
    ("How many?", "It was 24\u201310.", "24\u201310"),
    ("What else?", "Nothing is known.", None),
]


@every_kind
def test_perfect_logits_are_perfect_with_unanswerable_questions_too(kind):
    made = task(True, max_length=60, doc_stride=30, max_answer_length=30)
    outputs, split = whole(made, rows_of(*QUESTIONS), TOKENIZERS[kind], perfect)
    scores = made.score(outputs, split)
    assert scores.pop("loss") < 0.05
    thresholds = [scores.pop("best_exact_thresh"), scores.pop("best_f1_thresh")]
    assert set(scores.values()) == {100.0} and max(thresholds) < 0


@pytest.mark.parametrize("unanswerable", [False, True])
def test_part_of_the_examples_can_be_scored(unanswerable):
    """A score is a mean over examples, and an example has all its windows."""
    tokenizer, made = TOKENIZERS["gpt2"], task(unanswerable)
    rows = rows_of(*(row for row in QUESTIONS if unanswerable or row[2]))
    outputs, split = whole(made, rows, tokenizer, noise)
    examples = np.array(split.encoded["example"][:])
    halves = [np.flatnonzero(examples % 2 == part) for part in (0, 1)]
    parts = [made.score({key: value[half] for key, value in outputs.items()}, split) for half in halves]
    scores = made.score(outputs, split)
    counts = [len(np.unique(examples[half])) for half in halves]
    for name in ("exact_match", "f1"):
        assert scores[name] == pytest.approx(np.average([part[name] for part in parts], weights=counts))
    loss = np.average([part["loss"] for part in parts], weights=[len(half) for half in halves])
    assert scores["loss"] == pytest.approx(loss)


def test_written_predictions(tmp_path):
    tokenizer, rows = TOKENIZERS["bert"], rows_of(*QUESTIONS)
    outputs, split = whole(task(True), rows, tokenizer, noise)
    threshold = float(np.median([answer.null_odds for answer in best_answers(outputs, split, 5)]))
    made = task(True, null_threshold=threshold)
    files = made.write_predictions(tmp_path, "validation", outputs, split)
    names = ["validation_predictions.json", "validation_null_odds.json", "validation_nbest_predictions.json"]
    assert [file.name for file in files] == names
    texts, odds, best = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert texts == {row["id"]: row["prediction"] for row in made.predictions(outputs, split)}
    assert 0 < list(texts.values()).count("") < len(texts)
    for name in rows["id"]:
        assert texts[name] == ("" if odds[name] > threshold else next(b["text"] for b in best[name] if b["text"]))
        assert sum(b["probability"] for b in best[name]) == pytest.approx(1)
        assert [b["score"] for b in best[name]] == sorted((b["score"] for b in best[name]), reverse=True)

    plain = task()
    unlabelled = rows.remove_columns(["answers", "starts"])
    outputs, split = whole(plain, unlabelled, tokenizer, noise)
    assert "loss" not in outputs
    files = plain.write_predictions(tmp_path, "test", outputs, split)
    assert [file.name for file in files] == ["test_predictions.json", "test_nbest_predictions.json"]
    assert all(json.loads(files[0].read_text(encoding="utf-8")).values())


# --- the cache ---


class Counting:
    """A tokenizer that counts how often it is called for a context."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        self.calls += bool(options.get("return_offsets_mapping"))
        return self.tokenizer(*args, **options)


def test_the_cache_is_reused_and_its_key_depends_on_all_that_matters(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFORA_CACHE", str(tmp_path))
    rows, counting = rows_of(*QUESTIONS), Counting(TOKENIZERS["bert"])
    first = task().encode(rows, counting, training=False)
    assert counting.calls == 4  # different contexts in a row
    assert task(n_best=7, max_answer_length=3).encode(rows, counting, training=False).to_list() == first.to_list()
    assert counting.calls == 4

    def files():
        return len(list((tmp_path / "windows").iterdir()))

    assert files() == 1
    for count, (changes, training, some) in enumerate(
        [
            ({"max_length": 41}, False, rows),
            ({"doc_stride": 9}, False, rows),
            ({"max_question_length": 3}, False, rows),
            ({}, True, rows),
            ({}, False, rows_of(*QUESTIONS[:5])),
            ({}, False, rows.remove_columns(["answers", "starts"])),
        ],
        start=2,
    ):
        task(**changes).encode(some, TOKENIZERS["bert"], training)
        assert files() == count
    task().encode(rows, TOKENIZERS["roberta"], training=False)
    assert files() == 8


@pytest.mark.parametrize("damage", ["garbage", "half", "last chunk"])
def test_damaged_cache_is_remade(tmp_path, monkeypatch, damage, caplog):
    monkeypatch.setenv("DIFFORA_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 1)
    rows = rows_of(*QUESTIONS)
    encoded = task().encode(rows, TOKENIZERS["bert"], training=False)
    expected = encoded.to_list()
    (file,) = (tmp_path / "windows").iterdir()
    content = file.read_bytes()
    if damage == "last chunk":
        with pa.OSFile(str(tmp_path / "short"), "wb") as sink, pa.ipc.open_stream(content) as reader:
            chunks = list(reader)
            with pa.ipc.new_stream(sink, reader.schema) as writer:
                for chunk in [chunk for chunk in chunks if chunk.num_rows][:-1]:
                    writer.write_batch(chunk)
        content = (tmp_path / "short").read_bytes()
    file.unlink()
    file.write_bytes({"garbage": b"\x07" * len(content), "half": content[: len(content) // 2]}.get(damage, content))
    assert task().encode(rows, TOKENIZERS["bert"], training=False).to_list() == expected
    assert "damaged cache file" in caplog.text


# --- refusals ---


def test_impossible_settings():
    with pytest.raises(UserError) as caught:
        task(max_length=20, train_file="train.json")
    assert len(caught.value.problems) == 2
    assert "task.max_length=20 must be more than task.max_question_length=12 plus task.doc_stride=8" in str(
        caught.value
    )
    assert "task.train_file" in caught.value.problems[1]
    cfg = OmegaConf.load(conf_dir() / "task" / "squad.yaml")
    cfg.unanswerable = True
    with pytest.raises(UserError, match=r"needs task\.null_threshold"):
        get_task(cfg)
    with pytest.raises(UserError, match=r"task\.max_length=23 must be at least 24 .* and at most 512"):
        task(max_length=23).encode(rows_of(QUESTIONS[0]), TOKENIZERS["bert"], training=True)
    with pytest.raises(UserError, match=r"task\.max_length=513 must be at least 24 .* and at most 512"):
        task(max_length=513).encode(rows_of(QUESTIONS[0]), TOKENIZERS["bert"], training=True)
    assert max(task(max_length=24).encode(rows_of(QUESTIONS[0]), TOKENIZERS["bert"], training=True)["length"]) <= 24


def test_unsuitable_tokenizers_are_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        task().encode(rows_of(QUESTIONS[0]), slow, training=True)
    bare = byte_level(["<pad>"])
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>")
    with pytest.raises(UserError, match="has neither"):
        task().encode(rows_of(QUESTIONS[0]), bare, training=True)


# --- models ---


def test_a_left_to_right_model_reads_question_and_context_before_the_null_position():
    """GPT-2: the question comes before the context and the null position after it. Padding has no influence."""
    from transformers import GPT2Config, GPT2ForQuestionAnswering

    tokenizer, made = TOKENIZERS["gpt2"], task(True)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2ForQuestionAnswering(config).eval()
    encoded = made.encode(rows_of(QUESTIONS[1], QUESTIONS[4]), tokenizer, training=True)
    for batch in batches(made, encoded, tokenizer):
        vectors = model.transformer.wte(batch["input_ids"]).detach().requires_grad_()
        inputs = {key: value for key, value in made.inputs(batch).items() if key != "input_ids"}
        output = model(inputs_embeds=vectors, **inputs)
        null = output.start_logits.gather(1, batch["null_position"][:, None]).sum()
        (seen,) = torch.autograd.grad(null, vectors, retain_graph=True)
        assert ((seen != 0).any(dim=2) == batch["attention_mask"].bool()).all()
        first = batch["context"].int().argmax(dim=1)
        (seen,) = torch.autograd.grad(output.start_logits.gather(1, first[:, None]).sum(), vectors)
        for i, position in enumerate(first.tolist()):
            assert (seen[i, : position + 1] != 0).any(dim=1).all()


def test_whole_run(cfg, tmp_path, real_data):
    """Search and fine-tuning with the embedded backbone on a few real questions. Some have several windows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, n in (("train_5k", 24), ("validation_1k", 12)):
        table = pa.parquet.read_table(real_data / "squad" / f"{name}.parquet").slice(0, n)
        pa.parquet.write_table(table, folder / f"{name.split('_')[0]}.parquet")
    overrides = ["method=diffora", "task=squad", "model=tiny", "trainer=cpu", "logger=csv", f"task.path={folder}"]
    overrides += ["task.max_length=64", "task.doc_stride=16", "task.max_question_length=16", "task.max_train_rows=16"]
    overrides += ["search.epochs=1", "finetune.epochs=2", "finetune.batch_size=8", "search.batch_size=8"]
    result = run(cfg(*overrides), Path(tmp_path / "run"))
    assert result.metrics is not None
    for key in ("validation/f1", "validation/exact_match", "held_out/f1"):
        assert 0 <= result.metrics[key] <= 100
    assert (tmp_path / "run" / "adapter").is_dir()
