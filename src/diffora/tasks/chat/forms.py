"""Instruction, chat and plain-text rows: brought from the forms they come in into one form, and checked.

=======================================  ===================================================================
columns of a row                         meaning
=======================================  ===================================================================
``messages``                             turns ``{"role": …, "content": …}``
``conversations``                        turns ``{"from": …, "value": …}`` (ShareGPT), from ``human`` and ``gpt``
``prompt``, ``completion``               a text of the user and one of the assistant, or two lists of turns
``instruction``, ``input``, ``output``   the same, with an optional input below the instruction (Alpaca)
``text``                                 plain text without turns
``question``, ``answer``                 a text of the user and one of the assistant (GSM8K)
``query``, ``response``                  the same (MetaMathQA)
=======================================  ===================================================================

If a row has the columns of several forms, the first form in this table is used.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Turn = dict[str, str]
"""A turn of a conversation: {"role": …, "content": …}."""

SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""For each accepted name of a speaker, the role."""


_FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output", "input"), ("text",),
    ("question", "answer"), ("query", "response"),
)  # fmt: skip
_TURN = ("role", "from", "content", "value")
FORMS = (
    "messages, conversations, prompt and completion, instruction and output, text, question and answer, or query and "
    "response"
)


class Fault(ValueError):
    """What is wrong with one row: its column, the offending value and the reason."""

    def __init__(self, column: str, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.column, self.value, self.reason = column, value, reason


def form_of(row: Any) -> tuple[str, ...]:
    """The columns of a row that are read.

    Raises:
        Fault: the row has none of the known forms.
    """
    if not isinstance(row, Mapping):
        raise Fault("", row, "is not an object with columns")
    present = {key for key, value in row.items() if value is not None}  # columns of other rows are None here
    form = next((form for form in _FORMS if present.issuperset(form[:2])), None)
    if form is None:
        raise Fault("", sorted(present), f"are its columns; expected {FORMS}")
    return form


def conversation(row: Mapping[str, Any], form: tuple[str, ...], ignored: dict[str, None]) -> list[Turn] | str:
    """The turns of a row, or its plain text.

    Args:
        form: the columns to read, from `form_of`.
        ignored: gets the names of other columns, and of parts of turns, that hold something.

    Raises:
        Fault: what is wrong with the row.
    """
    row = {key: value for key, value in row.items() if value is not None}
    ignored.update(dict.fromkeys(name for name in row if name not in form))
    if form[0] in ("messages", "conversations"):
        return _turns(row[form[0]], form[0], ignored)
    if form[0] == "prompt":
        said = _said(row["prompt"], "prompt", "user", ignored)
        return [*said, *_said(row["completion"], "completion", "assistant", ignored)]
    if form[0] == "instruction":
        asked = _text(row["instruction"], "instruction")
        if added := _text(row.get("input", ""), "input"):
            asked = f"{asked}\n\n{added}"
        return [_turn("user", asked), _turn("assistant", _text(row["output"], "output"))]
    if len(form) == 2:
        asked, answered = (_text(row[name], name) for name in form)
        return [_turn("user", asked), _turn("assistant", answered)]
    text = _text(row["text"], "text")
    return text if text.strip() else ""


def _turns(value: Any, column: str, ignored: dict[str, None]) -> list[Turn]:
    if not isinstance(value, list | np.ndarray):
        raise Fault(column, value, "is not a list of turns")
    if not len(value):
        raise Fault(column, [], "has no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise Fault(column, turn, 'is not a turn such as {"role": "user", "content": "…"}')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise Fault(column, role, f"is not a role; known are {', '.join(SPEAKERS)}")
        turns.append(_turn(SPEAKERS[role], _text(content, column)))
        ignored.update(dict.fromkeys(f"{key} (in {column})" for key, part in turn.items() if key not in _TURN and part))
    return turns


def _said(value: Any, column: str, role: str, ignored: dict[str, None]) -> list[Turn]:
    """The turns of a column that holds a text or a list of turns."""
    return _turns(value, column, ignored) if isinstance(value, list) else [_turn(role, _text(value, column))]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _text(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise Fault(column, value, "is a list of parts; images, sound and the like are not supported: give text")
    if not isinstance(value, str):
        raise Fault(column, value, "is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise Fault(column, ascii(value), "is not valid Unicode") from None
    return value
