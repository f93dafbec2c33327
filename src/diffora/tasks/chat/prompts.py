"""Prompts for which a model writes the last answer of a conversation, and what the answers are compared with."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffora.tasks.chat.answers import extract
from diffora.tasks.chat.forms import Turn
from diffora.tasks.chat.tokens import prompt_ids
from diffora.tasks.messages import more


def shape_problem(table: pa.Table, source: str, prompt: str | None) -> str | None:
    """The message if a row of a table does not suit ``task.prompt``, which writes one question and one answer."""
    if prompt is None:
        return None
    wrong = [
        (number, [turn["role"] for turn in turns])
        for number, turns in _numbered(table)
        if turns and [turn["role"] for turn in turns] != ["user", "assistant"]
    ]
    if not wrong:
        return None
    number, roles = wrong[0]
    return (
        f"{source}, row {number}: its turns are of {', '.join(roles)}{more(len(wrong))}. task.prompt writes one text "
        "of the user and one of the assistant; task.prompt=null takes the tokenizer's chat template"
    )


def reference_problem(table: pa.Table, source: str, pattern: str | None) -> str | None:
    """The message if a row has no answer to compare a generated one with."""
    faults = []
    for number, turns in _numbered(table):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            faults.append((number, "does not end with a turn of the assistant after one of the user"))
        elif extract(turns[-1]["content"], pattern) is None:
            said = turns[-1]["content"]
            shown = repr(said if len(said) <= 60 else f"…{said[-60:]}")
            what = "is empty" if pattern is None else f"has no match of task.generation.answer={pattern!r}"
            faults.append((number, f"its answer {shown} {what}"))
    if not faults:
        return None
    number, reason = faults[0]
    return f"{source}, row {number}: {reason}{more(len(faults))}; task.score=generation needs an answer in each row"


def reference(turns: Sequence[Turn]) -> str:
    """The last answer of a conversation."""
    return turns[-1]["content"]


def with_prompts(
    encoded: datasets.Dataset,
    rows: datasets.Dataset,
    tokenizer: Any,
    prompt: str | None,
    max_length: int,
    chosen: np.ndarray,
) -> datasets.Dataset:
    """Add the columns ``prompt_ids``, ``prompt_cut``, ``prompt_differs`` and ``generated``.

    ``prompt_cut``: it is cut at ``max_length``. ``prompt_differs``: the row does not begin with these tokens, so the
    model answers another prompt than it learnt from. This happens if a token holds the end of the prompt and the start
    of the answer.

    Args:
        encoded: one row for each conversation, with ``example``.
        chosen: positions in ``encoded`` of the rows for which text is generated in a validation.
    """
    messages = rows["messages"][:]
    examples = encoded.data.column("example").to_pylist()
    prompts = [prompt_ids(messages[example], tokenizer, prompt) for example in examples]
    whole = encoded["input_ids"][:]
    differs = [ids[:max_length] != row[: len(ids)] for ids, row in zip(prompts, whole, strict=True)]
    flags = np.zeros(len(encoded), dtype=bool)
    flags[chosen] = True
    table = encoded.data.table
    table = table.append_column("prompt_ids", pa.array([ids[:max_length] for ids in prompts], pa.list_(pa.int32())))
    table = table.append_column("prompt_cut", pa.array([len(ids) > max_length for ids in prompts]))
    table = table.append_column("prompt_differs", pa.array(differs))
    return datasets.Dataset(table.append_column("generated", pa.array(flags)))


def left_padded(lists: Sequence[Any], pad: int) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), long [n, longest], padded on the left: a decoder writes on from the right end."""
    longest = max(map(len, lists))
    ids = np.full((len(lists), longest), pad, dtype=np.int64)
    mask = np.zeros((len(lists), longest), dtype=np.int64)
    for i, row in enumerate(lists):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _numbered(table: pa.Table) -> Any:
    return zip(table.column("number").to_pylist(), table.column("messages").to_pylist(), strict=True)
