"""The command lines of evaluate, export and push: ``name=value``, with values as Hydra reads them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.composition import check_added, unreadable
from diffora.settings.checks import show, unknown_key
from diffora.trust import look_in

CONFIG_DIR = ("--config-dir", "-cd")
"""The option that adds a folder of the user's choices and classes, as Hydra spells it."""


def named_values(arguments: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(word, name, value) of each word; a word of another form becomes a message in ``problems``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import

    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except Exception:
            problems.append(unreadable(argument) or f"{argument} is not of the form name=value")
            continue
        if parsed.is_delete():
            problems.append(f"{argument}: this program cannot remove a setting")
            continue
        if parsed.is_sweep_override():
            problems.append(f"{argument}: this program takes one value of {parsed.key_or_group}")
            continue
        yield argument, parsed.key_or_group, parsed.value()


def without_config_dirs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the arguments without ``--config-dir``, its folders as ``file://…``). Own classes are then found there too.

    Raises:
        UserError: a folder does not exist, or hides a choice of ours.
    """
    kept, paths, waiting = [], [], False
    for argument in arguments:
        option, given, value = argument.partition("=")
        if waiting or (given and option in CONFIG_DIR):
            paths.append(f"file://{os.path.abspath(os.path.expanduser(argument if waiting else value))}")
            waiting = False
        elif argument in CONFIG_DIR:
            waiting = True
        else:
            kept.append(argument)
    if waiting:
        raise UserError("--config-dir needs a folder")
    look_in(check_added(paths, conf_dir()))
    return kept, paths


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


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether a configuration has a key. Its value may be None."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False) if parent else cfg
    return isinstance(node, DictConfig) and name in node
