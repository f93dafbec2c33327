"""The command lines of evaluate, export and push: ``name=value``, with values as Hydra reads them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffora.settings.checks import show, unknown_key


def named_values(arguments: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(word, name, value) of each word; a word of another form becomes a message in ``problems``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import

    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except Exception:
            problems.append(f"{argument} is not of the form name=value")
            continue
        yield argument, parsed.key_or_group, parsed.value()


def put(group: dict[str, Any], name: str, value: Any, problems: list[str]) -> None:
    """Add a value to a group; if the name has another value there, add a message to ``problems``."""
    if group.setdefault(name, value) != value:
        problems.append(f"{name}= is given twice: {show(group[name])} and {show(value)}")


def sorted_words(
    arguments: Sequence[str], own: Sequence[str], sections: Sequence[str]
) -> tuple[list[str], dict[str, Any], dict[str, Any], list[str]]:
    """Sort the words of a command line that begins with a folder.

    Args:
        arguments: the words.
        own: names of the command's own arguments.
        sections: sections of the configuration whose values may be given, as ``model.path=…``.

    Returns:
        (words without ``=``; own arguments by name; settings by key; one message for each wrong word).
    """
    places = [word for word in arguments if "=" not in word or Path(word).expanduser().exists()]
    found: dict[str, Any] = {}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for _, name, value in named_values([word for word in arguments if word not in places], problems):
        if name in own:
            put(found, name, value, problems)
        elif name.partition(".")[0] in sections and name not in sections:
            put(values, name, value, problems)
        else:
            problems.append(unknown_key(name, list(own)))
    return places, found, values, problems
