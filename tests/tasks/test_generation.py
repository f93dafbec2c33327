"""task.score=generation: answers do not depend on the batch, are counted by examples, and runs report them."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from diffora.backbones.load import load_backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run.check import check
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.account import Account
from diffora.tasks.base import Split, get_task
from diffora.tasks.chat.conversations import characters, row_keys
from diffora.tasks.chat.held_out import Forgetting, read_texts
from diffora.tasks.chat.prompts import left_padded
from diffora.tasks.chat.tokens import end_of_turn
from diffora.tasks.generation import evenly, generate

LLAMA = EMBEDDED.parent / "tiny_llama"
WORDS = "the baker thanked the king the tall pilot helped the nurse at noon and the monk walked to the barn".split()  # noqa: SIM905


def chats(folder: Path, n: int = 24, **splits: int) -> Path:
    """A folder of questions and answers, of different lengths, with ``n`` training rows."""
    folder.mkdir(exist_ok=True)
    for name, rows in {"train": n, "validation": 10, **splits}.items():
        lines = []
        for i in range(rows):
            asked = " ".join((WORDS * 2)[i % 7 : i % 7 + 2 + i % 9])
            lines.append(json.dumps({"question": f"{asked} {name}{i}", "answer": f"so {asked} . #### {i % 5}"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        "method=lora", "task=chat", f"task.path={folder}", "model=tiny_llama", "trainer=cpu", "logger=[csv]",
        "task.max_length=64", "task.score=generation", "task.generation.max_new_tokens=6",
        r"task.generation.answer='(\w+)\s*$'", "finetune.epochs=1", "finetune.batch_size=8", "finetune.warmup_steps=0",
        "finetune.dropout=0", *more,
    ]  # fmt: skip


def adapted_llama(cfg):
    """The small Llama with random pairs that are not zero, in evaluation, and its tokenizer."""
    composed = cfg("task=dialogue", "model=tiny_llama")
    task = get_task(composed.task)
    tokenizer = task.processor(model_of(composed.model))
    model = load_backbone(model_of(composed.model), task.model_request(), tokenizer).model
    grid = find_grid(model, None, None, None, "model.")
    mask = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    selection = Selection.from_mask(grid, mask, method="lora", selector="none", rho=1.0, seed=0)
    attach(model, selection.places(), mask, 2, None, 8.0, 0.0, freeze=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval(), tokenizer


def random_gpt2(cfg):
    """A small GPT-2, which has absolute positions, with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=304, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval(), AutoTokenizer.from_pretrained(LLAMA)


MODELS = {"llama": adapted_llama, "gpt2": random_gpt2}


# --- generation ---


@pytest.mark.parametrize("kind", MODELS)
def test_texts_do_not_depend_on_batch_padding_or_cache(cfg, kind):
    model, tokenizer = MODELS[kind](cfg)
    prompts = [tokenizer(" ".join(WORDS[i : i + 1 + 2 * i]))["input_ids"] for i in range(6)]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id

    def texts(lists, more=0, **how):
        ids, mask = left_padded(lists, pad)
        ids, mask = F.pad(ids, (more, 0), value=pad), F.pad(mask, (more, 0))
        return generate(model, {"input_ids": ids, "attention_mask": mask}, 8, pad, [end], **how)

    together = texts(prompts)
    assert together.shape == (6, 8) and len({tuple(row) for row in together.tolist()}) > 3
    assert texts(prompts, more=7).equal(together) and texts(prompts, use_cache=False).equal(together)
    assert torch.cat([texts([row]) for row in prompts]).equal(together)
    for row, text in zip(prompts, together, strict=True):  # an independent greedy search: one token at a time
        ids = list(row)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (end, model.generation_config.eos_token_id):
                break
        assert text.tolist() == ids[len(row) :] + [pad] * (8 - len(ids) + len(row))


def test_the_checkpoints_other_settings_do_not_matter(cfg):
    model, _tokenizer = random_gpt2(cfg)
    ids, mask = left_padded([[5, 6, 7]], 0)
    before = generate(model, {"input_ids": ids, "attention_mask": mask}, 6, 0)
    model.generation_config.min_length = 12
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    assert generate(model, {"input_ids": ids, "attention_mask": mask}, 6, 0).equal(before)
    assert model.generation_config.do_sample  # its own settings are back


def test_an_encoder_decoder_never_writes_padding():
    """As Marian's, whose padding token would be the likeliest one; only its own `bad_words_ids` keep it out."""
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    settings = {"vocab_size": 20, "d_model": 16, "pad_token_id": 19, "decoder_start_token_id": 19, **heads, **sizes}
    settings |= {"eos_token_id": 0, "forced_eos_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("marian", **settings)).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 19] = 100.0
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    found = generate(model, inputs, 5, 19)[0].tolist()
    assert 19 not in (found[: found.index(0)] if 0 in found else found)


def test_an_answer_ends_where_the_template_ends_it(cfg, tmp_path):
    """A base model's tokenizer ends texts with another token than its chat template ends a turn."""
    folder = chats(tmp_path / "rows")
    model, tokenizer = random_gpt2(cfg)
    ended = end_of_turn(tokenizer, None)
    assert ended == tokenizer.eos_token_id and tokenizer.decode([ended]) == "<|end|>"
    tokenizer.eos_token = "<s>"
    assert end_of_turn(tokenizer, None) == ended != tokenizer.eos_token_id
    assert end_of_turn(tokenizer, "ask {prompt} . ") == tokenizer.eos_token_id  # no template
    task = get_task(cfg(*overrides(folder, "task.packing=false")).task)
    rows = task.load().validation["validation"]
    encoded = task.encode(rows, tokenizer, False)
    batch = task.collate(tokenizer, False)(encoded[:4])
    with torch.no_grad():  # the end of the turn follows every token
        model.lm_head.weight.copy_(-model.lm_head.weight.abs())
        model.lm_head.weight[ended] = 1
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
    text = task.evaluate(model, batch, final=True)["text"]
    assert text.tolist() == [[ended] + [tokenizer.pad_token_id or 0] * 5] * 4


def test_an_end_that_is_no_special_token_is_not_part_of_the_answer(ready):
    task, model, tokenizer, split, collate = ready
    tokenizer.add_tokens(["[over]"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "[over]\\n")
    over = tokenizer.convert_tokens_to_ids("[over]")
    assert end_of_turn(tokenizer, None) == over and over not in tokenizer.all_special_ids
    outputs = task.evaluate(model, collate(split.encoded[:]), final=True)
    collate = task.collate(tokenizer, False)  # learns the template's end
    outputs["text"] = torch.tensor([tokenizer("the baker [over] the king")["input_ids"][-5:]] * 10)
    assert over in outputs["text"][0]
    assert {line["prediction"] for line in task.predictions(outputs, split)} == {"the baker"}


def test_generating_compiles_nothing(cfg):
    """A compiled model would be compiled again while the cache grows."""
    model, _tokenizer = random_gpt2(cfg)
    ids, mask = left_padded([[5, 6, 7], [8]], 0)
    before = generate(model, {"input_ids": ids, "attention_mask": mask}, 6, 0)
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager")
    counters.clear()
    assert generate(model, {"input_ids": ids, "attention_mask": mask}, 6, 0).equal(before)
    assert not counters["stats"]


@given(st.integers(1, 50), st.integers(1, 60))
def test_rows_are_chosen_evenly(rows, most):
    chosen = evenly(rows, most)
    assert len(chosen) == min(rows, most) and set(chosen) <= set(range(rows))
    steps = np.diff(chosen)
    assert (steps > 0).all() and (len(steps) == 0 or np.ptp(steps) <= 1)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == rows - 1)


# --- rows, prompts and scores ---


@pytest.fixture
def ready(cfg, tmp_path):
    """(task, model, tokenizer, split, collate function)"""
    task = get_task(cfg(*overrides(chats(tmp_path / "rows"))).task)
    model, tokenizer = adapted_llama(cfg)
    rows = task.load().validation["validation"]
    return task, model, tokenizer, Split(rows, task.encode(rows, tokenizer, False)), task.collate(tokenizer, False)


def test_exact_match_counts_examples(ready):
    task, model, _tokenizer, split, collate = ready
    whole = task.evaluate(model, collate(split.encoded[:]), final=True)
    parts = [task.evaluate(model, collate(split.encoded[i : i + 3]), final=True) for i in range(0, len(split.rows), 3)]
    joined = {key: torch.cat([part[key] for part in parts]) for key in whole}
    assert joined["text"].equal(whole["text"]) and task.score(joined, split) == pytest.approx(task.score(whole, split))
    answers = [f"x {i % 5}" if i % 3 else "x nothing" for i in range(10)]  # right unless i is a multiple of 3
    task._tokenizer = type(
        "Reader", (), {"batch_decode": lambda self, ids, **_: [answers[row[0] - 10] for row in ids]}
    )()
    whole["text"] = torch.arange(10, 20)[:, None].expand(-1, 6)  # not the end token
    assert task.score(whole, split)["exact_match"] == 0.6
    whole["generated"] = torch.tensor([i in (0, 1) for i in range(10)])
    assert task.score(whole, split)["exact_match"] == 0.5
    lines = task.predictions(whole, split)
    assert [line["correct"] for line in lines] == [bool(i % 3) for i in range(10)]
    assert lines[4] | {"loss": 0, "perplexity": 0} == {
        "row": 4, "number": 5, "tokens": lines[4]["tokens"], "loss": 0, "perplexity": 0,
        "prediction": "x 4", "answer": "4", "expected": "4", "correct": True,
    }  # fmt: skip


def test_the_model_reads_the_prompt_that_training_has(ready, cfg, tmp_path):
    _task, _, tokenizer, split, collate = ready
    for row in split.encoded:
        n = len(row["prompt_ids"])
        assert row["input_ids"][:n] == row["prompt_ids"] and sum(row["counted"][:n]) == 0 and all(row["counted"][n:])
    batch = collate(split.encoded[:])
    assert batch["prompt_mask"].sum(1).tolist() == [len(row) for row in split.encoded["prompt_ids"]]
    assert all(batch["prompt_mask"][:, -1] == 1)
    more = ["task.prompt='the {prompt} . so '", "task.train_on=all", "task.packing=false"]
    plain = get_task(cfg(*overrides(tmp_path / "rows", *more)).task)
    rows = plain.load().train
    encoded = plain.encode(rows, tokenizer, training=True)
    for row, turns in zip(encoded, rows["messages"], strict=True):
        text = "the {} . so {}".format(*(turn["content"] for turn in turns)) + tokenizer.eos_token
        assert row["input_ids"] == tokenizer(text)["input_ids"] and sum(row["counted"]) == len(row["input_ids"]) - 1


def test_a_prompt_whose_end_joins_the_answer_is_told(cfg, tmp_path):
    folder = chats(tmp_path / "rows")
    _, tokenizer = adapted_llama(cfg)
    for prompt, differing in (("the {prompt} . ", 0), ("the {prompt} .", 10)):  # words are divided at spaces
        task = get_task(cfg(*overrides(folder, f"task.prompt='{prompt}'", "task.packing=false")).task)
        rows = task.load().validation["validation"]
        split = Split(rows, task.encode(rows, tokenizer, False))
        task.count_encoded(account := Account(len(rows)), split)
        said = "10 of 10 prompts have other tokens than in training"
        assert sum(split.encoded["prompt_differs"]) == differing and len(account.notes) == bool(differing)
        assert all(said in note for note in account.notes)
        learned = Split(rows, task.encode(rows, tokenizer, True))
        task.count_encoded(trained := Account(len(rows)), learned)
        assert sum(learned.encoded["joint"]) == differing and len(trained.notes) == bool(differing)
        for row, turns in zip(learned.encoded, rows["messages"], strict=True):  # the whole answer counts
            assert sum(row["counted"]) == len(tokenizer.tokenize(turns[1]["content"])) + 1


def test_long_training_rows_are_left_out_and_counted(cfg, tmp_path):
    folder = chats(tmp_path / "rows")
    task = get_task(cfg(*overrides(folder, "task.max_characters=70", "task.max_validation_rows=4")).task)
    rows = task.load()
    given = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    short = [row for row in given if len(f"{row['question']} {row['answer']}") <= 70]
    assert [turns[0]["content"] for turns in rows.train["messages"]] == [row["question"] for row in short]
    assert 0 < len(short) < len(given) and len(rows.validation["validation"]) == 4
    assert task.accounts["train"].dropped == {"more than task.max_characters=70": len(given) - len(short)}
    table = rows.train.data.table
    lengths = [sum(len(turn["content"]) for turn in turns) + len(turns) - 1 for turns in rows.train["messages"]]
    assert characters(table).tolist() == lengths and len(row_keys(table)) == len(short)
    with pytest.raises(
        UserError, match=r"task\.max_characters=9 leaves out all 24 training rows: the shortest has \d\d"
    ):
        get_task(cfg(*overrides(folder, "task.max_characters=9")).task).load()


def test_training_and_test_come_from_two_hub_data_sets(cfg, monkeypatch):
    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        if name == "some/maths":
            made = {"train": [{"query": f"q{i}", "response": f"The answer is: {i}", "type": "x"} for i in range(9)]}
        else:
            made = {s: [{"question": f"{s}{i}", "answer": f"#### {i}"} for i in range(6)] for s in ("train", "test")}
        return {split: datasets.Dataset.from_list(rows) for split, rows in made.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("diffora.tasks.sources.hub.why_unreachable", lambda: None)
    more = ["task.hub=some/maths", "task.validation_hub=some/problems", "task.max_validation_rows=4"]
    task = get_task(cfg("task=gsm8k", *more, "task.forgetting.path=null").task)
    rows = task.load()
    assert asked == [("some/maths", None), ("some/problems", "main")]
    assert (len(rows.train), len(rows.validation["validation"]), task.test_splits) == (9, 4, ("test",))
    assert [turns[0]["content"] for turns in task.load_split("test")["messages"]] == [f"test{i}" for i in range(6)]


# --- refused ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (r"task.generation.answer='(\w'", "is not a regular expression of Python"),
        ("task.generation.answer='(a)(b)'", "has 2 groups: at most one"),
        ("task.generation.max_new_tokens=0", "task.generation.max_new_tokens=0 must be a whole number of at least 1"),
        ("task.generation.rows=0", "task.generation.rows=0 must be"),
        ("task.prompt='Question:'", "must have {prompt} in it once"),
        ("task.score=rouge", "task.score='rouge' must be"),
    ],
)
def test_impossible_settings_are_refused_before_the_run(cfg, tmp_path, change, words):
    with pytest.raises(UserError) as error:
        check(cfg(*overrides(chats(tmp_path / "rows"), change)))
    assert len(error.value.problems) == 1 and words in error.value.problems[0]


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"text": "no question and no answer"}, [], "row 2: does not end with a turn of the assistant"),
        ({"question": "q", "answer": "so ?"}, [], "row 2: its answer 'so ?' has no match of task.generation.answer="),
        ({"question": "q", "answer": " "}, ["task.generation.answer=null"], "row 2: its answer ' ' is empty"),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]},
            ["task.prompt='x {prompt} '"],
            "row 2: its turns are of user, assistant, user, assistant",
        ),
    ],
)
def test_rows_without_an_answer_are_refused_with_their_number(cfg, tmp_path, row, more, words):
    folder = chats(tmp_path / "rows")
    lines = (folder / "validation.jsonl").read_text().splitlines()
    (folder / "validation.jsonl").write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]))
    with pytest.raises(UserError, match="validation") as error:
        get_task(cfg(*overrides(folder, *more)).task).load()
    assert words in str(error.value)
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], json.dumps(row)] * 3))
    if not any("prompt" in line for line in more):  # training rows need no answer that a pattern finds
        (folder / "validation.jsonl").write_text("\n".join(lines))
        assert len(get_task(cfg(*overrides(folder, *more)).task).load().train) == 9


def test_prompt_and_answer_must_fit_the_model(cfg, tmp_path):
    task = get_task(cfg(*overrides(chats(tmp_path / "rows"), "task.generation.max_new_tokens=300")).task)
    with pytest.raises(UserError, match=r"together more than the 64 tokens that this backbone reads"):
        task.check(random_gpt2(cfg)[0])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("texts.csv", "a", "is not a .txt file"),
        ("texts.jsonl", '{"words": "a"}', "line 1: has no text in column 'text'"),
        ("texts.jsonl", "nonsense", "line 1: is not JSON"),
        ("texts.txt", "\n \n", "has no text"),
        ("absent.txt", None, "is not a .txt file"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"texts|absent") as error:
        read_texts(Forgetting(path=str(tmp_path / name)))
    assert words in str(error.value)


def test_texts_of_all_formats_are_the_same(tmp_path):
    texts = [" ".join(WORDS[i:]) for i in range(6)]
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text, "more": 1}) for text in texts))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "t.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        assert read_texts(Forgetting(path=str(tmp_path / f"t.{suffix}"), rows=4)) == texts[:4]


def test_only_the_end_of_a_line_divides_texts(tmp_path):
    texts = ["a form\x0cfeed", "two\u2028lines of one\x85text", "three", "four"]
    (tmp_path / "t.txt").write_bytes("{}\r\n{}\n{}\r{}\n".format(*texts).encode())
    assert read_texts(Forgetting(path=str(tmp_path / "t.txt"))) == texts


# --- whole runs ---


def text_loss(model, tokenizer, texts: list[str], most: int) -> float:
    """The mean loss over the tokens of texts, one text at a time, by transformers' own loss."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :most]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_a_run_reports_answers_and_forgetting_and_an_evaluation_repeats_them(cfg, tmp_path):
    from peft import PeftModel

    texts = [" ".join((WORDS * 3)[i : 5 + 4 * i]) for i in range(9)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    folder = chats(tmp_path / "rows", test=7)
    more = [f"task.forgetting.path={tmp_path / 'texts.txt'}", "task.forgetting.max_length=24", "predict=true"]
    made = run(cfg(*overrides(folder, *more, "finetune.lr=0.05", "finetune.eval_batch_size=3")), tmp_path / "run")
    metrics = made.record["metrics"]
    assert made.record["main_metric"] == "exact_match" and metrics["validation/exact_match"] <= 1
    assert {"test/exact_match", "test/perplexity", "held_out/exact_match"} <= set(metrics)

    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    base = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    assert metrics["forgetting/before"] == pytest.approx(text_loss(base, tokenizer, texts, 24), abs=1e-4)
    trained = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert metrics["forgetting/after"] == pytest.approx(text_loss(trained, tokenizer, texts, 24), abs=1e-4)
    assert metrics["forgetting/increase"] == pytest.approx(metrics["forgetting/after"] - metrics["forgetting/before"])

    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines()]
    assert sum(line["correct"] for line in lines) / 7 == pytest.approx(metrics["test/exact_match"], abs=1e-6)
    asked = [f"run={tmp_path / 'run'}", "split=test", "batch_size=2", f"output={tmp_path / 'again'}"]
    again = evaluate(read_request(asked))["test"]
    assert again == pytest.approx({key[5:]: value for key, value in metrics.items() if key.startswith("test/")}, 1e-4)
    repeated = [json.loads(line) for line in (tmp_path / "again" / "test.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in repeated] == [line["prediction"] for line in lines]


def test_without_texts_nothing_is_said_of_forgetting(cfg, tmp_path):
    made = run(cfg(*overrides(chats(tmp_path / "rows"), "task.generation.rows=3")), tmp_path / "run")
    assert not any(key.startswith(("forgetting", "test")) for key in made.record["metrics"])
    assert made.record["data"]["validation"]["notes"] == ["after training, answers are generated for 3 of 10 rows"]
