"""Write docs/reference/configuration.md: every setting, from the settings classes and the files in conf/.

python scripts/reference.py            write the page
python scripts/reference.py --check    fail if the page is not up to date
"""

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from diffora.files import read_yaml, write_text
from diffora.methods.base import DIALS
from diffora.places import conf_dir
from diffora.settings import sections
from diffora.settings.checks import checks_of, help_of, words_of
from diffora.settings.read import NO_KEYS, is_needed, section_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "configuration.md"
INTRO = """# Configuration

Every setting is `key=value` on the command line, as in `python train.py task=cola finetune.lr=1e-3`.
`python train.py --cfg job --resolve` shows every value of a run. A value that is not allowed is refused before anything
is loaded, together with all other mistakes.

"From the recipe" means: from the settings that a paper or a task's author recommends for this task (`task.recipe.*`).
A default such as `finetune.lr` means: the value of that key.

This page is written by `python scripts/reference.py`. Do not edit it.
"""
CHOICES = {
    "method": "How the backbone is adapted.",
    "task": "What it learns.",
    "model": "The backbone.",
    "recipe": "Settings of another paper instead of the task's own.",
    "trainer": "Hardware and precision.",
    "logger": "Where curves are logged, as in `logger=[csv,wandb]`.",
    "experiment": "A table of runs, with `-m`; `quickstart` is a single run.",
    "hparams_search": "A search for hyperparameters, with `-m`.",
    "debug": "Help in finding mistakes.",
}
MANY = 4  # if a key has more different values, they are not listed
Values = dict[str, dict[str, Any]]  # for each key, its value in the file of each choice; "": the value for all choices


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        write_text(PAGE, text)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is not up to date: python scripts/reference.py")


def page() -> str:
    """The page as Markdown."""
    written = {group: values_of(group) for group in ("method", "task", "model", "trainer", "logger", "debug")}
    parts = [INTRO, *choices()]
    run = [f for f in dataclasses.fields(sections.Settings) if section_of(_hint(sections.Settings, f)) is None]
    run = [f for f in run if f.name not in ("method", "task", "composed")]
    parts += [_title("The run", "Settings that do not belong to a section.")]
    parts.append(table(sections.Settings, "", written["method"], run))
    for kind, key, group in (
        (sections.Cell, "cell", "method"),
        (sections.FineTune, "finetune", "method"),
        (sections.Search, "search", "method"),
        (sections.Model, "model", "model"),
        (sections.Trainer, "trainer", "trainer"),
        (sections.Logger, "logger", "logger"),
        (sections.Debug, "debug", "debug"),
        (sections.Recipe, "task.recipe", "task"),
    ):
        parts += [_title(f"`{key}`", kind.__doc__), table(kind, f"{key}.", written[group])]
    parts.append("\n## Tasks\n\nThe settings in `task.*` depend on the task.\n")
    parts += families("task", written["task"])
    names = ", ".join(f"`{key}`" for key in DIALS.values())
    parts.append(f"\n## Methods\n\nThe settings in `method.*` depend on the method. Some methods also have {names}.\n")
    parts += families("method", written["method"])
    return "".join(parts)


def choices() -> Iterator[str]:
    """A table for each group of choices: the names, and what the first lines of their files say."""
    yield "\n## Choices\n"
    for group, about in CHOICES.items():
        yield f"\n### `{group}=`\n\n{about}\n\n| choice | what it is |\n|---|---|\n"
        for file in sorted((conf_dir() / group).glob("*.yaml")):
            yield f"| `{file.stem}` | {_escaped(about_of(file))} |\n"


def about_of(file: Path) -> str:
    """What a file in conf/ says about itself: its title, or else the text of its first comment."""
    content = read_yaml(file)
    title = content.get("hydra", {}).get("sweeper", {}).get("title") if isinstance(content, dict) else None
    if title:
        return str(title)
    comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    comments = [line for line in comments if not line.startswith("@package")]
    if comments and comments[0].startswith("python "):
        return next((part.strip() for part in comments[0].split("   ")[1:] if part.strip()), "")
    return " ".join(comments).partition(" Recipe:")[0].partition("  ")[0]


def values_of(group: str) -> Values:
    """The values of every key as they are written in conf/config.yaml and in the files of a group."""
    found: Values = {}
    _gather(read_yaml(conf_dir() / "config.yaml"), "", "", found)
    prefix = "" if group in ("method", "debug") else f"{group}."
    files = sorted((conf_dir() / group).glob("*.yaml"))
    for file in files:
        name = "" if file.stem == "default" else file.stem
        if group != "trainer" or not name:
            _gather(read_yaml(file) or {}, prefix, name, found)
    return found


def _gather(node: dict[str, Any], prefix: str, name: str, found: Values) -> None:
    for key, value in node.items():
        if key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict) and value:
            _gather(value, f"{prefix}{key}.", name, found)
        found.setdefault(f"{prefix}{key}", {})[name] = value


def families(group: str, written: Values) -> Iterator[str]:
    """A table for each class of tasks or methods, with the choices that use this class."""
    kinds: dict[str, list[str]] = {}
    for name, target in sorted(written[f"{group}._target_"].items()):
        kinds.setdefault(target, []).append(name)
    for target, names in kinds.items():
        module, _, last = target.rpartition(".")
        kind = getattr(import_module(module), last)
        own = {key: {n: v for n, v in by.items() if n in names} for key, by in written.items()}
        settings = kind.settings if group == "task" else kind
        fields = [f for f in dataclasses.fields(settings) if f.name not in ("name", "recipe", *DIALS)]
        yield _title(", ".join(f"`{group}={name}`" for name in names), kind.__doc__, 3)
        text = table(settings, f"{group}.", own, fields)
        yield text if fields else "It has no settings of its own.\n"


def table(kind: Any, prefix: str, written: Values, fields: Any = None) -> str:
    """The settings of a class as a table. A nested group has one row for each of its settings."""
    lines = ["| key | what it may be | default | unit | meaning |\n|---|---|---|---|---|\n"]
    for field in dataclasses.fields(kind) if fields is None else fields:
        lines += rows(kind, field, prefix, written)
    return "".join(lines)


def rows(kind: Any, field: Any, prefix: str, written: Values) -> Iterator[str]:
    """The row of a setting; for a nested group, the rows of its settings."""
    hint, key = _hint(kind, field), f"{prefix}{field.name}"
    if (kind, field.name) in NO_KEYS:
        return
    if (section := section_of(hint)) is not None:
        for inner in dataclasses.fields(section):
            yield from rows(section, inner, f"{key}.", written)
        return
    text, unit = help_of(hint)
    if any(check.words == "anything" for check in checks_of(hint)):
        raise ValueError(f"{key} has no check")
    if not text:
        raise ValueError(f"{key} has no help text")
    cells = (f"`{key}`", words_of(hint), default(field, written.get(key, {})), unit, text)
    yield f"| {' | '.join(map(_escaped, cells))} |\n"


def default(field: Any, written: dict[str, Any]) -> str:
    """The value of a setting in the files of conf/; if choices have different values, the value of each choice."""
    by_text: dict[str, list[str]] = {}
    for name, value in sorted(written.items()):
        by_text.setdefault(_shown(value), []).append(name)
    if not by_text:
        return "" if is_needed(field) or field.default is dataclasses.MISSING else _shown(field.default)
    if len(by_text) == 1:
        return next(iter(by_text))
    if len(by_text) > MANY:
        return "by choice"
    common = next((text for text, names in by_text.items() if "" in names), None)
    others = [f"{text} ({', '.join(filter(None, names))})" for text, names in by_text.items() if text != common]
    return "; ".join([*filter(None, [common]), *others])


def _shown(value: Any) -> str:
    """A value as the page shows it."""
    if isinstance(value, dict):
        return "by choice"
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    if reference := re.fullmatch(r"\$\{([\w.]+)\}", str(value)):
        key = reference[1]
        return f"from the recipe (`{key}`)" if key.startswith("task.recipe.") else f"`{key}`"
    if either := re.fullmatch(r"\$\{oc\.select:([\w.]+),\s*(.+)\}", str(value)):
        return f"from the recipe (`{either[1]}`), else {_shown(either[2])}"
    if isinstance(value, str) and "${" in value:
        keys = dict.fromkeys(re.findall(r"(?:\$\{|:)([a-z_]+\.[a-z_]+)", value))
        return f"made of {', '.join(f'`{key}`' for key in keys)}"
    if isinstance(value, list):
        return "by choice" if any("${" in str(item) for item in value) else f"`[{', '.join(map(str, value))}]`"
    return f"`{text}`"


def _hint(kind: Any, field: Any) -> Any:
    return typing.get_type_hints(kind, include_extras=True)[field.name]


def _title(name: str, doc: str | None, level: int = 2) -> str:
    first = " ".join((doc or "").strip().split("\n\n")[0].split())
    return f"\n{'#' * level} {name}\n\n{first}\n\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
