"""The part of a linear module in its layer (query, FFN input, …), from the names that model families use."""

import re
from collections.abc import Iterable, Sequence

BLOCK = re.compile(r"(.*?(?:\*|\[[\d,]+\])[^.]*)\.")
"""The name of the layers in front of a module type."""
ROLES = ("key", "value", "attention_output", "ffn_output")

# (part, whether it is inside attention, last names)
PARTS = (
    ("query", True, r"q|query|q_proj|query_proj|q_lin|q_attn"),
    ("key", True, r"k|key|k_proj|key_proj|k_lin"),
    ("value", True, r"v|value|v_proj|value_proj|v_lin"),
    ("query_key_value", True, r"c_attn|in_proj|query_key_value|qkv|qkv_proj|Wqkv"),
    ("attention_output", True, r"o|dense|o_proj|out_proj|out_lin|c_proj|Wo"),
    ("ffn_gate", False, r"gate_proj|wi_0"),
    ("ffn_up", False, r"up_proj|wi_1"),
    ("ffn_gate_up", False, r"gate_up_proj"),
    ("ffn_input", False, r"wi|Wi|fc1|fc_in|c_fc|lin1|ffn|dense_h_to_4h"),
    ("ffn_output", False, r"wo|Wo|fc2|fc_out|c_proj|lin2|ffn_output|dense_4h_to_h|down_proj"),
)

SHORT_NAMES = {
    "query": "Q",
    "key": "K",
    "value": "V",
    "query_key_value": "QKV",
    "attention_output": "attn. out",
    "ffn_gate": "FFN gate",
    "ffn_up": "FFN up",
    "ffn_gate_up": "FFN gate, up",
    "ffn_input": "FFN in",
    "ffn_output": "FFN out",
}


def part_of(path: str) -> str | None:
    """The part of a module, one of `PARTS`, from its path below the layer; None if the name does not show it.

    Modules that attend to another sequence get the prefix ``cross_``. The name of the layers may stand before the path,
    as in ``encoder.block.*.layer.0.SelfAttention.q``.
    """
    path = path_of(path)
    if path in ("intermediate.dense", "output.dense"):  # BERT's; its attention output is called dense too
        return "ffn_input" if path == "intermediate.dense" else "ffn_output"
    *above, last = path.split(".")
    attention = [name.lower() for name in above if re.search("attn|attention", name.lower())]
    cross = any(re.search("cross|encoder|encdec", name) for name in attention)
    for part, inside, names in PARTS:
        if bool(attention) == inside and re.fullmatch(names, last):
            return f"cross_{part}" if cross else part
    return None


def block_of(name: str) -> str:
    """The name of the layers that stands before the path in a module type; empty if there is none."""
    found = BLOCK.match(name)
    return "" if found is None else found[1]


def path_of(name: str) -> str:
    """A module type without the name of the layers."""
    return name[found.end() :] if (found := BLOCK.match(name)) else name


def guess_roles(paths: Iterable[str]) -> dict[str, str]:
    """The module for each of the `ROLES`, if the names show exactly one module for it.

    For instance, a decoder that attends to an encoder has two keys, so that the role ``key`` is left out.
    """
    return {role: found[0] for role, found in all_roles(paths).items() if len(found) == 1}


def all_roles(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """All modules for each of the `ROLES`, as far as the names show them."""
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        part = (part_of(path) or "").removeprefix("cross_")
        if part in ROLES:
            found[part] = (*found.get(part, ()), path)
    return found


def short_names(types: Sequence[str]) -> list[str]:
    """Labels for module types, for pictures and tables.

    A label is the papers' letter (Q, K, V) or a short name where the module's part is known and no other type has the
    same part; otherwise it is the type itself.

    >>> short_names(["attention.self.query", "attention.self.key", "intermediate.dense", "adapter.dense"])
    ['Q', 'K', 'FFN in', 'adapter.dense']

    If there are several blocks, the block is named too.

    >>> short_names(["encoder.layers.*.self_attn.q_proj", "decoder.layers.*.self_attn.q_proj"])
    ['encoder Q', 'decoder Q']
    """
    labels = []
    words = _block_words(types)
    for name in types:
        part = part_of(name) or ""
        cross = "cross " if part.startswith("cross_") else ""
        short = SHORT_NAMES.get(part.removeprefix("cross_"))
        labels.append(f"{words.get(block_of(name), '')}{cross}{short}" if short else name)
    return [label if labels.count(label) == 1 else name for label, name in zip(labels, types, strict=True)]


def _block_words(types: Sequence[str]) -> dict[str, str]:
    """What labels write for each block of layers: its first name if this tells the blocks apart, else all of it."""
    blocks = list(dict.fromkeys(map(block_of, types)))
    if blocks in ([], [""]):
        return {}
    first = [block.partition(".")[0] for block in blocks]
    words = first if len(set(first)) == len(first) else blocks
    return {block: f"{word} " for block, word in zip(blocks, words, strict=True)}
