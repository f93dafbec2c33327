"""From conversations and plain texts to token ids, and which of these tokens the loss counts."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffora.errors import UserError, first_line
from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.chat.conversations import rows_hash
from diffora.tasks.chat.dates import DATE, has_clock, with_fixed_date
from diffora.tasks.chat.forms import Turn
from diffora.tasks.encoding import Faults, write_rows
from diffora.tasks.messages import more

FORMAT_VERSION = 5  # raise it when the content of a cache file changes its meaning
ROWS_AT_ONCE = 1000  # bounds memory


PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""The chat template for a tokenizer that has none: headings, and the end token after each answer."""


PLACE = "{prompt}"
"""Where the user's text stands in ``task.prompt``."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks the assistant's text."""


def encode(
    rows: datasets.Dataset,
    tokenizer: Any,
    max_length: int,
    train_on: str,
    num_proc: int = 1,
    prompt: str | None = None,
) -> datasets.Dataset:
    """Encode rows. Each conversation gives one row, cut at ``max_length``; plain text gives one row per window.

    Rows without a token that counts are left out.

    Args:
        rows: in the form of `conversations.SCHEMA`.
        max_length: the most tokens in a row.
        train_on: "completion" counts the assistant's turns, "all" counts every token.
        num_proc: how many processes tokenise.
        prompt: how the user's text is written, with `PLACE` in it; None: by the tokenizer's chat template.

    Raises:
        UserError: the tokenizer is not a fast one, or its chat template does not suit the conversations.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: it does not know the place of each token in the text"
        )
    if max_length > tokenizer.model_max_length:
        raise UserError(
            f"task.max_length={max_length} must be at most {tokenizer.model_max_length}, the most tokens it can read"
        )
    facts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "rows": rows_hash(rows.data.table),
        **tokenizer_facts(tokenizer),
        "template": tokenizer.chat_template or PLAIN_TEMPLATE,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "max_length": max_length,
        "train_on": train_on,
    }
    if prompt is not None:
        facts["prompt"] = prompt
    elif has_clock(tokenizer):
        facts["date"] = str(DATE)
    how = {"tokenizer": tokenizer, "max_length": max_length, "train_on": train_on, "prompt": prompt}
    return cached("causal_lm", facts, lambda file: _write(file, rows, how, num_proc))


def _write(file: Path, rows: datasets.Dataset, how: dict[str, Any], num_proc: int) -> None:
    lists, number = pa.list_(pa.int32()), pa.int32()
    types = {"input_ids": lists, "counted": pa.list_(pa.int8()), "length": number, "row": number, "example": number}
    types |= {"begun": number, "cut": number, "joint": number}
    ranges = ((start, min(start + ROWS_AT_ONCE, len(rows))) for start in range(0, len(rows), ROWS_AT_ONCE))
    work = partial(_encode, names=list(types), **how)
    try:
        write_rows(file, types, rows, ranges, work, num_proc)
    except Faults as error:
        raise UserError(
            f"the chat template of this model's tokenizer cannot be used for {error.problems[0]}"
            f"{more(len(error.problems))}. Try other data, another model, or task.train_on=all"
        ) from None


def _encode(
    chunk: Mapping[str, list[Any]],
    start: int,
    names: Sequence[str],
    tokenizer: Any,
    max_length: int,
    train_on: str,
    prompt: str | None,
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names if name != "row"}
    faults = []
    for i, (turns, text, number) in enumerate(zip(chunk["messages"], chunk["text"], chunk["number"], strict=True)):
        try:
            ids, counted, joint = _chat(turns, tokenizer, train_on, prompt) if turns else _text(text, tokenizer)
        except Exception as error:  # a template is a program: it can fail in any way
            faults.append(f"row {number}: {first_line(error)}")
            continue
        # The second window of a conversation would lack its beginning; plain text can begin anywhere.
        end = min(len(ids), max_length) if turns else len(ids)
        _append_windows(columns, ids, counted, end, max_length, start + i, joint)
    if faults:
        raise UserError(faults)
    return columns


def _append_windows(
    columns: dict[str, list[Any]],
    ids: list[int],
    counted: np.ndarray,
    end: int,
    max_length: int,
    example: int,
    joint: bool,
) -> None:
    """Append the windows of the tokens up to ``end`` that have a token that counts."""
    is_first = True
    for at in range(0, end, max_length):
        window = counted[at : at + max_length].copy()
        window[0] = 0  # nothing precedes the first token
        if window.any():
            columns["input_ids"].append(ids[at : at + max_length])
            columns["counted"].append(window)
            columns["length"].append(len(window))
            columns["example"].append(example)
            columns["begun"].append(int(is_first))
            columns["cut"].append(int(end < len(ids)))
            columns["joint"].append(int(is_first and joint))
            is_first = False


def _text(text: str, tokenizer: Any) -> tuple[list[int], np.ndarray, bool]:
    """Token ids of plain text, with special tokens and an end token, as `_chat` returns them. All of them count."""
    ids = list(tokenizer(text).input_ids)
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return ids, np.ones(len(ids), dtype=np.int8), False


def _chat(
    turns: list[Turn], tokenizer: Any, train_on: str, prompt: str | None = None
) -> tuple[list[int], np.ndarray, bool]:
    """Token ids of a conversation, which of them count, and whether a token has both prompt and answer in it.

    Such a token counts, because the answer begins in it.
    """
    template = None if prompt is not None else tokenizer.chat_template
    if train_on == "completion" and isinstance(template, str) and GENERATION.search(template):
        # The template itself marks the assistant's text.
        out = tokenizer.apply_chat_template(
            turns, chat_template=with_fixed_date(template), return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), np.array(out["assistant_masks"], dtype=np.int8), False
    text = render(turns, tokenizer, prompt=prompt)
    # A model's own template writes the special tokens. With the plain template or a prompt, the tokenizer adds them.
    out = tokenizer(text, add_special_tokens=template is None, return_offsets_mapping=True)
    ids, offsets = list(out["input_ids"]), np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    if train_on == "all":
        return ids, np.ones(len(ids), dtype=np.int8), False
    counted, joint = np.zeros(len(ids), dtype=np.int8), False
    for first, end in answer_spans(turns, text, tokenizer, prompt):
        inside = (offsets[:, 1] > first) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
        counted[inside] = 1
        joint |= bool((inside & (offsets[:, 0] < first)).any())
    return ids, counted, joint


def prompt_ids(turns: list[Turn], tokenizer: Any, prompt: str | None) -> list[int]:
    """Token ids of a conversation up to its last answer, as a model reads them when it is to write that answer."""
    text = render(turns[:-1], tokenizer, add_generation_prompt=True, prompt=prompt)
    adds = prompt is not None or tokenizer.chat_template is None
    ids = list(tokenizer(text, add_special_tokens=adds)["input_ids"])
    return ids[:-1] if adds and ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text


def render(turns: list[Turn], tokenizer: Any, add_generation_prompt: bool = False, prompt: str | None = None) -> str:
    """A conversation as text, by the tokenizer's chat template or, if it has none, by `PLAIN_TEMPLATE`.

    With a ``prompt``, the text is the prompt with the user's turn in it, then the answer and the end token. A template
    that asks for the date gets the same one every day.
    """
    if prompt is not None:
        before, after = prompt.split(PLACE)
        written = {"user": (before, after), "assistant": ("", tokenizer.eos_token or "")}
        return "".join(turn["content"].join(written[turn["role"]]) for turn in turns)
    text: str = tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=with_fixed_date(tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE,
    )
    return text


def end_of_turn(tokenizer: Any, prompt: str | None) -> int | None:
    """The added token that ends the assistant's turn in the chat template; None if the template has none.

    It need not be the tokenizer's end token: a base model's tokenizer ends texts with another one than its template.
    """
    turns: list[Turn] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = render(turns, tokenizer, prompt=prompt)
        [(first, end)] = answer_spans(turns, text, tokenizer, prompt)
    except Exception:  # a template is a program; `encode` says what is wrong with it
        return None
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    after = text[first:end].strip().removeprefix("b")
    return added.get(max((mark for mark in added if after.endswith(mark)), key=len, default=""))


def answer_spans(turns: list[Turn], text: str, tokenizer: Any, prompt: str | None = None) -> list[tuple[int, int]]:
    """The spans of characters of the assistant's answers in the rendered ``text``, as (first, end).

    An answer starts after the prompt for it. It includes the end token, but no white space after that. To find it, the
    conversation is rendered up to each turn. If this is not the beginning of ``text``, because the template writes a
    turn differently when others follow, the turns are looked for one after the other (`_found_in_order`).

    Raises:
        ValueError: an answer cannot be found.
    """
    found = []
    marks = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        upto = text if i + 1 == len(turns) else render(turns[: i + 1], tokenizer, prompt=prompt)
        if i:
            before = render(turns[:i], tokenizer, add_generation_prompt=True, prompt=prompt)
        else:  # nothing asks for the first turn: its heading ends where what it says begins
            said, body = turn["content"].strip(), upto.rstrip()
            mark = max((mark for mark in marks if body.endswith(mark)), key=len, default="")
            body = body.removesuffix(mark).rstrip()
            before = body.removesuffix(said) if body.endswith(said) else "\0"
        if not (upto.startswith(before) and text.startswith(upto)):
            return _found_in_order(turns, text, tokenizer, prompt, marks)
        end = upto.rstrip()
        found.append((len(before), len(end) if end.endswith(marks) and len(end) > len(before) else len(upto)))
    return found


def _found_in_order(
    turns: list[Turn], text: str, tokenizer: Any, prompt: str | None, marks: tuple[str, ...]
) -> list[tuple[int, int]]:
    """The spans of the answers: what each turn says is looked for after the turn before, an answer after its heading.

    Raises:
        ValueError: it is not there.
    """
    found, at = [], 0

    def after(part: str, i: int, ends: bool = False) -> int:
        place = text.find(part, at)
        while ends and place >= 0 and not text[place + len(part) :].lstrip().startswith(marks):
            place = text.find(part, place + 1)  # what is said may be a part of the heading, too
        if place < 0:
            raise ValueError(
                f"the template writes turn {i + 1} differently when other turns follow or when it asks for the turn, "
                "so the turn cannot be found in the text"
            )
        return place + len(part)

    for i, turn in enumerate(turns):
        said = turn["content"].strip()
        if turn["role"] != "assistant":
            at = after(said, i)
            continue
        asked, plain = (render(turns[:i], tokenizer, add, prompt) for add in (True, False)) if i else ("", "")
        at = first = after(asked.removeprefix(plain) if asked.startswith(plain) else asked, i)
        at = after(said, i, ends=True)
        if i == 0:
            first = at - len(said)
        rest = text[at:].lstrip()
        if mark := next((mark for mark in marks if rest.startswith(mark)), ""):
            at = len(text) - len(rest) + len(mark)
        found.append((first, at))
    return found
