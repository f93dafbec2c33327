"""Language modelling: what counts in the loss, packing, the loss itself, and runs with the embedded Llama."""

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from diffora.errors import UserError
from diffora.loop.splits import alike_of, count_shared, examples_of, held_out_split, split_search
from diffora.scoring.criteria import counted_tokens
from diffora.tasks.account import Account
from diffora.tasks.base import Split
from diffora.tasks.batches import parts_of
from diffora.tasks.causal_lm import CausalLMTask
from diffora.tasks.chat import conversations, loss, tokens
from diffora.tasks.chat.batches import ChatCollator
from diffora.tasks.chat.loss import token_losses
from diffora.tasks.chat.packing import best_fit, best_fit_of_groups, connected, pack
from diffora.tasks.chat.settings import CausalLMSettings
from diffora.tasks.chat.tokens import encode
from diffora.tasks.ignored import IGNORED

# --- common kinds of tokenizers and templates ---

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|head|>", "<|/head|>", "<|eot|>", "<start>", "<end>"]
ROUNDS = "{% for m in messages %}"
CHATML = (
    ROUNDS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}"
    + ROUNDS
    + "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}" + ROUNDS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
ROLES = (
    "{{ bos_token }}" + ROUNDS + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
MARKED = (
    ROUNDS + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # writes the last answer differently from earlier ones
    ROUNDS + "{{ '<|im_start|>' + m.role + '\n' + ('<think></think>' if loop.last and m.role == 'assistant' else '') }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# template, what an answer ends with
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "headers": (HEADERS, "<|eot|>"),
    "inst": (INST, "</s>"),
    "roles": (ROLES, "<end>"),
    "marked": (MARKED, "<|im_end|>"),
    "plain": (None, "</s>"),
}
TEXT = ["The quick brown fox jumps over the lazy dog. ", "user assistant system INST model\n\n", "Zwölf Boxkämpfer ☃ "]


def byte_level(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer like those of GPT-2, Llama 3 and Qwen."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return wrapped(raw, template)


def metaspace(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer like those of Llama 2, Mistral and Gemma. It adds a begin token itself."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    raw.train_from_iterator(
        TEXT * 20,
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_], show_progress=False),
    )
    tokenizer = wrapped(raw, template)
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def wrapped(raw: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=4096)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "additional_special_tokens": SPECIAL}
    )
    tokenizer.chat_template = template
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace}
CHATS = [
    ["The fox?", "The quick brown fox."],
    ["jumps over", "☃ Zwölf\n\nBoxkämpfer", "again, the\nlazy dog", "dog dog", "and?", "a  b"],
    ["assistant", "user"],
    ["x", ""],
]


def turns_of(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def rows_of(*rows) -> datasets.Dataset:
    """Rows as `Task.load` gives them; a list of texts is a conversation."""
    rows = [{"messages": turns_of(row)} if isinstance(row, list) else {"text": row} for row in rows]
    problems: list[str] = []
    table = conversations.read(enumerate(rows, start=1), "test", problems, Account())
    assert not problems
    return datasets.Dataset(table)


def answers(ids: list[int], counted: list[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of consecutive tokens that count."""
    runs: list[list[int]] = []
    for at, (token, counts) in enumerate(zip(ids, counted, strict=True)):
        if counts:
            if at == 0 or not counted[at - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


# --- what counts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "three", "roles", "empty"])
def test_exactly_the_answers_and_their_ends_count(kind, name, chat):
    template, end = TEMPLATES[name]
    tokenizer = KINDS[kind](template)
    row = encode(rows_of(chat), tokenizer, 512, "completion")[0]
    expected = [f"{text}{end}" for text in chat[1::2]]
    found = answers(row["input_ids"], row["counted"], tokenizer)
    assert [text.strip(" ") for text in found] == [text.strip(" ") for text in expected]
    # The row is exactly the template's output, with at most one begin token.
    text = tokens.render(turns_of(chat), tokenizer)
    assert row["input_ids"] == tokenizer(text, add_special_tokens=template is None)["input_ids"]
    assert row["input_ids"].count(tokenizer.bos_token_id) == (0 if name in ("chatml", "marked") else 1) or (
        name == "plain" and kind == "byte_level"
    )


def test_the_prompt_at_generation_is_the_beginning_of_the_training_text():
    for name in ("chatml", "roles", "plain"):  # not "headers": GPT-2 splits "\n\n" only where a word follows
        tokenizer = byte_level(TEMPLATES[name][0])
        row = encode(rows_of(CHATS[0]), tokenizer, 512, "completion")[0]
        prompt = tokenizer(tokens.render(turns_of(CHATS[0][:1]), tokenizer, add_generation_prompt=True))["input_ids"]
        first = row["counted"].index(1)
        assert row["input_ids"][:first] == prompt


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))), min_size=2, max_size=5),
    st.sampled_from(["chatml", "headers", "roles", "marked"]),
)
def test_answers_are_found_in_any_text(contents, name):
    template, end = TEMPLATES[name]
    tokenizer = TOKENIZERS.setdefault(name, byte_level(template))
    contents = [f"q{text}q" for text in contents]  # without white space at the ends, which templates may trim
    ids, counted, _ = tokens._chat(turns_of(contents), tokenizer, "completion")
    assert answers(ids, counted.tolist(), tokenizer) == [f"{text}{end}" for text in contents[1::2]]


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {}


def test_train_on_all_counts_all_tokens_but_the_first():
    row = encode(rows_of(CHATS[1]), byte_level(CHATML), 512, "all")[0]
    assert row["counted"] == [0] + [1] * (row["length"] - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))), min_size=2, max_size=6))
def test_answers_are_found_where_a_template_writes_the_last_one_differently(contents):
    """As Qwen3's does, whose last answer begins with an empty thought."""
    tokenizer = TOKENIZERS.setdefault("thinking", byte_level(THINKING))
    contents = [f"q{text}q" for text in contents]
    for words in (contents, ["user", "assistant", "a", "think", "im", "", "x", "think>"]):
        _check_thinking(words, tokenizer)


def _check_thinking(contents, tokenizer):
    ids, counted, _ = tokens._chat(turns_of(contents), tokenizer, "completion")
    expected = [f"{text}<|im_end|>" for text in contents[1::2]]
    if len(contents) % 2 == 0:
        expected[-1] = f"<think></think>{expected[-1]}"
    assert answers(ids, counted.tolist(), tokenizer) == expected


@pytest.mark.parametrize("name", ["chatml", "headers", "inst", "roles", "marked", "plain"])
def test_the_heading_of_a_first_answer_does_not_count(name):
    template, end = TEMPLATES[name]
    tokenizer = byte_level(template)
    for first in ("Hello!", "assistant", "s", "e"):  # words that headings and ends have, too
        said = (first, "x", "yes")
        turns = [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(said)]
        ids, counted, _ = tokens._chat(turns, tokenizer, "completion")
        found = [text.strip(" ") for text in answers(ids, counted.tolist(), tokenizer)]
        assert found == [f"{first}{end}", f"yes{end}"]
    ids, counted, _ = tokens._chat([{"role": "assistant", "content": ""}, *turns[1:]], tokenizer, "completion")
    assert f"yes{end}" in answers(ids, counted.tolist(), tokenizer)[-1]


def test_a_template_that_rewrites_what_was_said_is_refused_if_it_matters():
    said = "{{ m.content if loop.last else m.content | upper }}"
    tokenizer = byte_level(CHATML.replace("m.content", f"({said[2:-2]})"))
    with pytest.raises(UserError, match=r"row 2: the template writes turn \d differently .*task\.train_on=all"):
        encode(rows_of(["A", "b"], ["a", "b", "c", "d"]), tokenizer, 512, "completion")
    assert len(encode(rows_of(["A", "b"]), tokenizer, 512, "completion")) == 1
    assert len(encode(rows_of(["a", "b", "c", "d"]), tokenizer, 512, "all")) == 1


def test_a_template_that_refuses_is_quoted_with_the_row():
    table = conversations.read(
        enumerate([{"messages": turns_of(["a", "b"])}, {"messages": turns_of(["a", "b"], "Be kind.")}], 1),
        "x",
        [],
        Account(),
    )
    with pytest.raises(UserError, match=r"row 2: no system turns here"):
        encode(datasets.Dataset(table), byte_level(INST), 512, "completion")


def test_a_slow_tokenizer_and_a_length_beyond_the_model_are_refused():
    with pytest.raises(UserError, match="not a fast tokenizer"):
        encode(rows_of(["a", "b"]), SimpleNamespace(is_fast=False), 64, "all")
    with pytest.raises(UserError, match=r"task\.max_length=5000 must be at most 4096"):
        encode(rows_of(["a", "b"]), byte_level(CHATML), 5000, "all")


# --- length ---


@pytest.mark.parametrize("packing", [False, True])
def test_an_answer_beyond_the_length_is_left_out_and_counted(packing):
    task = task_of(max_length=40, packing=packing)
    rows = rows_of(["short", "answer"], ["long " * 200, "answer"], ["so so", "long " * 200])
    encoded = task.encode(rows, byte_level(CHATML), training=True)
    assert set(encoded["example"]) == {0, 2}
    assert max(encoded["length"]) == 40
    account = task.account("train", Split(rows, encoded))
    assert (account.read, account.used) == (3, 2)
    assert account.dropped == {"nothing to learn within task.max_length=40 (no turn of the assistant)": 1}
    assert account.changed == {"cut at task.max_length=40": 1}


def test_nothing_to_learn_at_all_is_an_error():
    task = task_of(max_length=40)
    with pytest.raises(UserError, match=r"none of the 1 rows .*task\.max_length=40"):
        task.encode(rows_of(["long " * 200, "answer"]), byte_level(CHATML), training=True)


def test_plain_text_becomes_windows_that_hold_all_of_it():
    tokenizer = byte_level(None)
    text = "the lazy dog " * 8000  # over 100,000 characters
    encoded = encode(rows_of("fox", text), tokenizer, 256, "completion")
    mine = [row for row in encoded if row["example"] == 1]
    assert [token for row in mine for token in row["input_ids"]] == [
        *tokenizer(text)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert all(row["length"] == len(row["input_ids"]) <= 256 for row in encoded)
    assert all(row["counted"] == [0] + [1] * (row["length"] - 1) for row in encoded)
    assert encoded["row"] == list(range(len(encoded)))


# --- packing ---


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_puts_each_item_in_one_bin(lengths, capacity):
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in members) for members in bins]
    assert all(load <= capacity for load in loads)
    # A new bin was opened only if its first item fitted into no other bin.
    for i, members in enumerate(bins):
        assert all(load + lengths[members[0]] > capacity for load in loads[:i])


def test_packing_loses_nothing_and_keeps_to_the_length():
    tokenizer = byte_level(CHATML)
    rng = np.random.default_rng(0)
    encoded = encode(rows_of(*(["q" * n, "a" * n] for n in rng.integers(1, 80, 40))), tokenizer, 128, "completion")
    packed = pack(encoded, 128)
    assert max(packed["length"]) <= 128 and len(packed) < len(encoded)
    found = []
    for row in packed:
        assert sum(row["segments"]) == row["length"] == len(row["input_ids"]) == len(row["counted"])
        ends = np.cumsum(row["segments"])
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            assert row["counted"][first] == 0  # nothing is predicted from the conversation before
            found.append((row["input_ids"][first:end], row["counted"][first:end]))
    expected = [(row["input_ids"], row["counted"]) for row in encoded]
    assert sorted(found) == sorted(expected)
    assert pack(encoded, 128).to_dict() == packed.to_dict()


def test_no_text_is_in_both_halves_of_a_split():
    tokenizer = byte_level(None)
    rng = np.random.default_rng(1)
    texts = [chr(200 + i) * n for i, n in enumerate(rng.integers(1, 400, 60))]  # each text has a letter of its own
    encoded = encode(rows_of(*texts), tokenizer, 64, "completion")
    packed = pack(encoded, 64)
    assert len(packed) > 60
    for split in (split_search(examples_of(packed), 0), held_out_split(examples_of(encoded), 0)):
        whole = packed if len(packed) == sum(map(len, split)) else encoded
        letters = [{c for i in part for c in tokenizer.decode(whole[int(i)]["input_ids"])} for part in split]
        assert letters[0] & letters[1] <= set("</s>")
        assert all(map(len, letters))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=60), st.integers(20, 40))
def test_groups_share_a_bin_or_a_number(items, capacity):
    lengths, groups = (np.array(column, dtype=np.int64) for column in zip(*items, strict=True))
    bins = best_fit_of_groups(lengths, groups, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= capacity for members in bins)
    numbers = connected(bins, groups)
    for group in np.unique(groups):
        holders = [i for i, members in enumerate(bins) if group in groups[members]]
        assert len(set(numbers[holders])) == 1
        if lengths[groups == group].sum() <= capacity:
            assert len(holders) == 1
    alone = best_fit_of_groups(lengths, np.arange(len(lengths)), capacity)
    assert [b.tolist() for b in alone] == [b.tolist() for b in best_fit(lengths, capacity)]
    assert len(set(connected(alone, np.arange(len(lengths))))) == len(alone)


def test_packed_rows_with_equal_prompts_stay_in_one_part_of_a_search():
    """Each question has three answers; packed by length alone, they would come into different rows."""
    rng = np.random.default_rng(0)
    chats = [[f"question {n} " * 3, "a" * int(rng.integers(1, 60))] for n in range(20) for _ in range(3)]
    task, tokenizer, rows = task_of(packing=True, max_length=256), byte_level(CHATML), rows_of(*chats)
    encoded = task.encode(rows, tokenizer, training=True)
    assert len(encoded) < len(rows) / 2
    alike = alike_of(Split(rows, encoded), task.row_keys(rows))
    asked = [set(re.findall(r"question \d+", tokenizer.decode(row["input_ids"]))) for row in encoded]
    for split in (split_search(examples_of(encoded), 0, alike=alike), held_out_split(examples_of(encoded), 0, alike)):
        parts = [{question for i in part for question in asked[int(i)]} for part in split]
        assert all(parts) and not parts[0] & parts[1]


def test_a_search_uses_as_many_packed_rows_as_it_may_also_if_many_prompts_are_equal():
    rng = np.random.default_rng(0)
    chats = [[f"question {n} " * 3, "a" * int(rng.integers(1, 60))] for n in range(10) for _ in range(20)]
    task, rows = task_of(packing=True, max_length=256), rows_of(*chats)
    encoded = task.encode(rows, byte_level(CHATML), training=True)
    assert len(set(encoded["example"])) == len(encoded) > 4 * len(set(encoded["together"]))
    alike, examples = alike_of(Split(rows, encoded), task.row_keys(rows)), examples_of(encoded)
    sizes = [len(part) for part in split_search(examples, 0, alike=alike)]
    assert sum(sizes) == len(encoded) and abs(sizes[0] - sizes[1]) <= len(encoded) // 10
    train, valid = split_search(examples, 0, max_rows=20, alike=alike)
    assert len(train) + len(valid) <= 20


SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
DECODERS = {
    "llama": {"model_type": "llama", **GQA},
    "qwen2": {"model_type": "qwen2", **GQA},
    "mistral": {"model_type": "mistral", "sliding_window": 6, **GQA},
    "gemma": {"model_type": "gemma", "head_dim": 8, **GQA},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6, **GQA},
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LEAKY = {
    "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48, **SMALL},
    "bloom": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def decoder(kind: str, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(DECODERS | LEAKY)[kind])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # the default leaves attention all but uniform
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.eval()


def token_rows(lengths: list[int]) -> dict:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 61, n).tolist() for n in lengths]
    counted = [[0, *rng.integers(0, 2, n - 2).tolist(), 1] for n in lengths]
    return {"input_ids": ids, "counted": counted, "length": lengths, "row": list(range(len(lengths)))}


def packed_rows(rows: dict, packs: list[list[int]]) -> dict:
    join = lambda name, members: [value for i in members for value in rows[name][i]]  # noqa: E731
    return {
        "input_ids": [join("input_ids", members) for members in packs],
        "counted": [join("counted", members) for members in packs],
        "segments": [[rows["length"][i] for i in members] for members in packs],
        "length": [sum(rows["length"][i] for i in members) for members in packs],
        "row": list(range(len(packs))),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_conversations_do_not_see_each_other(kind, attention):
    model, task = decoder(kind, attention), task_of()
    rows = token_rows([5, 9, 3, 12, 4])
    packs = [[0, 3], [1, 2, 4]]
    apart, packed = ChatCollator(0)(rows), ChatCollator(0, pad_to_multiple_of=8)(packed_rows(rows, packs))
    with torch.no_grad():
        logits = model(**task.inputs(apart)).logits
        together = model(**task.inputs(packed)).logits
    for at, members in enumerate(packs):
        start = 0
        for i in members:
            n = rows["length"][i]
            torch.testing.assert_close(together[at, start : start + n], logits[i, :n], rtol=1e-4, atol=1e-5)
            start += n
    losses = [task.loss(model(**task.inputs(batch)), batch) for batch in (apart, packed)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert task.weight(apart) == task.weight(packed) == sum(map(sum, rows["counted"]))
    task.check(model)  # does not refuse
    assert not model.training


@pytest.mark.parametrize("kind", LEAKY)
def test_a_model_that_cannot_keep_packed_conversations_apart_is_refused(kind):
    model = decoder(kind, "eager")
    with pytest.raises(UserError, match=r"task\.packing=true: .* lets packed conversations see each other"):
        task_of().check(model)
    task_of(packing=False).check(model)


def test_with_a_cache_packing_would_not_work():
    model = decoder("llama")
    model.config.use_cache = True  # why `config_json.model_config` turns it off
    with pytest.raises(UserError, match="see each other"):
        task_of().check(model)


# --- loss ---


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return F.pad(losses, (0, 1))


@pytest.mark.parametrize("at_once", [1, 3 * 7, 1 << 24])
def test_loss_and_gradient_are_those_of_cross_entropy(at_once, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, IGNORED)
    weights = torch.rand(3, 5)
    grads = []
    for function in (lambda x: token_losses(x, labels)[0], lambda x: reference(x, labels)):
        logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        losses = function(logits)
        (losses * weights).sum().backward()
        grads.append((losses.detach(), logits.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(token_losses(torch.zeros(3, 5, 7), labels)[1][:, :-1], labels[:, 1:] != IGNORED)


def test_loss_is_differentiable_twice():
    labels = torch.tensor([[1, IGNORED, 2, 0]])
    logits = torch.randn(1, 4, 3, dtype=torch.double, requires_grad=True)
    function = lambda x: token_losses(x, labels)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_half_precision_logits_keep_their_gradient_in_half():
    labels = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 6, 50, dtype=torch.bfloat16).requires_grad_()
    losses, _ = token_losses(logits, labels)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    exact = reference(logits.detach().float().requires_grad_(), labels)
    torch.testing.assert_close(losses.detach(), exact.detach())


def test_parts_of_a_batch_give_the_loss_of_the_whole():
    model, task = decoder("llama"), task_of()
    batch = ChatCollator(0)(token_rows([5, 9, 3, 12, 4]))
    with torch.no_grad():
        whole = task.loss(model(**task.inputs(batch)), batch).item()
        shared = [
            (task.loss(model(**task.inputs(part)), part).item(), share) for part, share in parts_of(batch, 3, task)
        ]
    assert sum(loss * share for loss, share in shared) == pytest.approx(whole, rel=1e-5)
    assert sum(share for _, share in shared) == pytest.approx(1)


def test_parts_of_a_batch_in_which_no_token_counts_have_no_share():
    task, batch = task_of(), ChatCollator(0)(token_rows([5, 9]))
    batch["labels"].fill_(IGNORED)
    assert [share for _, share in parts_of(batch, 2, task)] == [0, 0]


def test_scores_and_predictions_count_tokens_not_rows():
    model, task = decoder("llama"), task_of(packing=False)
    rows = token_rows([5, 9, 3, 12, 4])
    example = [0, 2, 2, 3, 4]  # of five rows, the second has no token that counts, the third has two windows
    encoded = datasets.Dataset.from_dict(rows | {"example": example})
    batch = ChatCollator(0)(rows)
    output = model(**task.inputs(batch))
    outputs = task.outputs(output, batch)
    assert {key: tuple(value.shape) for key, value in outputs.items()} == dict.fromkeys(("row", "loss", "tokens"), (5,))
    split = Split(datasets.Dataset.from_dict({"number": [1, 2, 3, 4, 5]}), encoded)
    losses = reference(output.logits.detach(), batch["labels"])
    counted = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    scores = task.score(outputs, split)
    assert scores["loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    some = {key: value[[1, 2]] for key, value in outputs.items()}
    assert task.score(some, split)["loss"] == pytest.approx(losses[1:3][counted[1:3]].mean().item(), rel=1e-5)
    lines = task.predictions(outputs, split)
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[1] == {"row": 1, "number": 2, "tokens": 0, "loss": None, "perplexity": None}
    assert lines[2]["loss"] == pytest.approx(losses[1:3][counted[1:3]].mean().item(), rel=1e-5)
    assert lines[2]["tokens"] == int(counted[1:3].sum())
    assert task.score({"loss": torch.tensor([1e6]), "tokens": torch.tensor([1])}, split)["perplexity"] == math.inf


# --- sources, cache ---


def task_of(**settings) -> CausalLMTask:
    defaults = {
        "name": "chat",
        "hub": "someone/chats",
        "hub_config": None,
        "train_split": "train",
        "validation_split": None,
        "path": None,
        "max_train_rows": None,
        "validation_rows": 5,
        "max_length": 128,
        "packing": True,
        "train_on": "completion",
    }
    return CausalLMTask(CausalLMSettings(**(defaults | settings)))


def write(file: Path, n: int, first: int = 0) -> None:
    rows = ({"prompt": f"q{i}", "completion": f"a{i}"} for i in range(first, first + n))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(rows: datasets.Dataset) -> list[str]:
    return [turns[1]["content"] for turns in rows["messages"]]


def test_files_with_and_without_validation(tmp_path):
    write(tmp_path / "train.jsonl", 30)
    task = task_of(path=str(tmp_path))
    rows = task.load()
    assert (len(rows.train), len(rows.validation["validation"])) == (25, 5)
    assert set(said(rows.train)) | set(said(rows.validation["validation"])) == {f"a{i}" for i in range(30)}
    assert task.load_split("validation").to_dict() == rows.validation["validation"].to_dict()
    assert task.load().data_hash == rows.data_hash
    few = task_of(path=str(tmp_path), max_train_rows=4).load()
    assert len(few.train) == 4 and said(few.validation["validation"]) == said(rows.validation["validation"])

    write(tmp_path / "validation.jsonl", 7, first=100)
    write(tmp_path / "test.jsonl", 3, first=200)
    rows = task.load()
    assert (len(rows.train), said(rows.validation["validation"])[0]) == (30, "a100")
    assert said(task.load_split("test")) == ["a200", "a201", "a202"]
    with pytest.raises(UserError, match="no file for the split 'dev'"):
        task.load_split("dev")
    for action in (lambda task: task.load(), lambda task: task.load_split("test")):
        with pytest.raises(UserError, match=r"task\.path=/no/such does not exist; give the folder that holds train"):
            action(task_of(path="/no/such"))


def test_the_split_train_is_what_a_run_trains_on(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"path": str(tmp_path), "max_train_rows": 20}
    loaded, alone = task_of(**settings).load(), task_of(**settings).load_split("train")
    assert alone.to_dict() == loaded.train.to_dict() and len(alone) == 20
    assert not set(alone["number"]) & set(loaded.validation["validation"]["number"])


def test_validation_rows_are_read_without_training_rows(tmp_path):
    """As `evaluate.py` needs them; their own faults count, those of the training rows do not."""
    write(tmp_path / "validation.jsonl", 7)
    task = task_of(path=str(tmp_path), max_validation_rows=4)
    alone = task.load_split("validation")
    assert len(alone) == 4 and task.accounts["validation"].dropped == {"task.max_validation_rows=4": 3}
    (tmp_path / "train.jsonl").write_text("nonsense\n")
    assert task_of(path=str(tmp_path), max_validation_rows=4).load_split("validation").to_dict() == alone.to_dict()
    write(tmp_path / "train.jsonl", 30)
    task = task_of(path=str(tmp_path), max_validation_rows=4)
    assert task.load().validation["validation"].to_dict() == alone.to_dict()
    (tmp_path / "validation.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"validation\.jsonl, row 1"):
        task.load_split("validation")


def test_faults_of_both_files_come_together(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": 1, "completion": "a"}\n')
    (tmp_path / "validation.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError) as caught:
        task_of(path=str(tmp_path)).load()
    assert [Path(problem.split(",")[0]).name for problem in caught.value.problems] == [
        "train.jsonl",
        "validation.jsonl",
    ]


def test_the_hub_is_asked_for_the_configured_splits(monkeypatch):
    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        rows = [{"messages": turns_of([f"q{i}", f"a{i}"]), "category": "x"} for i in range(20)]
        return datasets.DatasetDict(
            {"train_sft": datasets.Dataset.from_list(rows), "test_sft": datasets.Dataset.from_list(rows[:3])}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("diffora.tasks.sources.hub.why_unreachable", lambda: None)
    task = task_of(train_split="train_sft", validation_split="test_sft", hub_config="default")
    rows = task.load()
    assert asked == [("someone/chats", "default")]
    assert (len(rows.train), len(rows.validation["validation"])) == (20, 3)
    assert len(task_of(train_split="train_sft").load().validation["validation"]) == 5
    assert len(task.load_split("test_sft")) == len(task.load_split("validation")) == 3
    with pytest.raises(UserError, match="has no split 'train'"):
        task_of().load()


def test_tokens_are_cached_by_all_that_they_depend_on():
    rows = rows_of(*CHATS)
    tokenizer = byte_level(CHATML)
    first = encode(rows, tokenizer, 128, "completion")
    assert encode(rows, tokenizer, 128, "completion").cache_files == first.cache_files
    files = {first.cache_files[0]["filename"]}
    tokenizer.chat_template = ROLES
    others = [
        (rows, tokenizer, 128, "completion"),
        (rows, tokenizer, 128, "all"),
        (rows, tokenizer, 64, "all"),
        (rows_of(*CHATS[:3]), tokenizer, 64, "all"),
        (rows, metaspace(ROLES), 64, "all"),
    ]
    files |= {encode(*arguments).cache_files[0]["filename"] for arguments in others}
    assert len(files) == 1 + len(others)


DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_the_date_in_a_template_is_the_same_every_day(template, monkeypatch):
    task, tokenizer, rows = task_of(packing=False, score="generation"), byte_level(DATED + template), rows_of(*CHATS)
    files = set()
    for day in (datetime(2030, 1, 1, tzinfo=UTC), datetime(2031, 2, 2, tzinfo=UTC)):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda day=day: day))
        text = tokenizer.apply_chat_template(turns_of(CHATS[0]), tokenize=False)
        assert text.startswith(f"Today: {day:%d %b %Y}\n<")  # what transformers writes
        encoded = task.encode(rows, tokenizer, training=False)
        for row in encoded:
            assert tokenizer.decode(row["input_ids"]).startswith("Today: 26 Jul 2024\n<|im_start|>user\n")
            assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        files.add(encode(rows, tokenizer, 128, "completion").cache_files[0]["filename"])
    task.count_encoded(account := Account(len(rows)), Split(rows, encoded))
    said = "the chat template writes today's date; here it is always 26 Jul 2024, in training and generation"
    assert account.notes == [said] and len(files) == 1
    monkeypatch.setattr(tokens, "DATE", datetime(2024, 7, 27, tzinfo=UTC))
    files.add(encode(rows, tokenizer, 128, "completion").cache_files[0]["filename"])
    assert len(files) == 2


def test_batches_carry_labels_where_tokens_count():
    rows = token_rows([5, 3])
    batch = ChatCollator(7)(rows)
    assert batch["input_ids"].tolist()[1][3:] == [7, 7]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    for i in range(2):
        expected = [t if c else IGNORED for t, c in zip(rows["input_ids"][i], rows["counted"][i], strict=True)]
        assert batch["labels"][i].tolist() == expected + [IGNORED] * (5 - len(expected))
    packed = ChatCollator(7, pad_to_multiple_of=8)(packed_rows(rows, [[1, 0]]) | {"row": [4]})
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert packed["row"].tolist() == [4] and "attention_mask" not in packed
    wide = ChatCollator(7, pad_to_multiple_of=8)(packed_rows(token_rows([5]), [[0]]) | {"row": [0]})
    assert wide["real"].tolist() == [[1] * 5 + [0] * 3]
    inputs = task_of(packing=True).inputs(wide)
    assert inputs.keys() == {"input_ids", "position_ids"}  # the model does not get it
    assert counted_tokens(torch.zeros(1, 8, 3), wide).tolist() == wide["real"].tolist()


def test_equal_questions_with_other_answers_are_alike(tmp_path):
    def lines(first, n):
        rows = [{"prompt": f"question {i % 6}", "completion": f"answer {first + i}"} for i in range(n)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    for name, first in (("train", 0), ("validation", 100)):
        (tmp_path / f"{name}.jsonl").write_text(lines(first, 12))
    task = task_of(path=str(tmp_path), packing=False)
    rows = task.load()
    assert any("12 of 12 rows are training rows too" in note for note in task.accounts["validation"].notes)
    split = Split(rows.train, task.encode(rows.train, byte_level(CHATML), training=True))
    assert alike_of(split, task.row_keys(rows.train)).tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert alike_of(split).tolist() == list(range(12))
    train, valid = split_search(examples_of(split.encoded), 0, alike=alike_of(split, task.row_keys(rows.train)))
    assert not {i % 6 for i in train} & {i % 6 for i in valid}
    packed = Split(rows.train, pack(split.encoded, 512))
    test = Split(rows.validation["validation"], split.encoded)
    assert count_shared(test, packed, (task.row_keys(test.rows), task.row_keys(packed.rows))) == (12, 12)


@pytest.mark.parametrize(
    "name", ["valid.jsonl", "val-00000-of-00001.parquet", "dev.jsonl", "Validation.jsonl", "eval.json"]
)
def test_a_validation_file_under_another_name_is_not_ignored(cfg, tmp_path, name):
    rows = [json.dumps({"prompt": f"say {i}", "completion": "yes"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"{name} is not read under this name; call it validation.jsonl"):
        CausalLMTask(cfg("task=chat", f"task.path={tmp_path}").task).load()
