"""From the composed configuration to typed settings: every mistake at once, before torch or any weight is loaded."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffora.files import conf_dir
from diffora.settings.checks import TEXT, checks_of, show, strange_value, unknown_key, words_of
from diffora.settings.sections import Settings, TaskSettings

CHOSEN = {"method": "_target_", "task": "_target_", "model": "path"}
"""Groups that come from a file of their own, and a key that each such file has."""


@dataclasses.dataclass
class Reading:
    """A composed configuration in plain containers, and what is found to be wrong with it.

    Attributes:
        values: the resolved values; those that cannot be resolved are left out.
        found: one message for each mistake, by its key.
        sources: the keys that each value is made of, as in ``search.lr: ${finetune.lr}``.
    """

    values: dict[str, Any]
    found: dict[str, str]
    sources: dict[str, list[str]]

    @classmethod
    def of(cls, cfg: DictConfig) -> "Reading":
        """Resolve a composed configuration."""
        reading = cls({}, {}, {})
        reading.values = reading._resolve(cfg, "")
        return reading

    def _resolve(self, node: DictConfig, prefix: str) -> dict[str, Any]:
        as_written: Any = OmegaConf.to_container(node, resolve=False)
        values: dict[str, Any] = {}
        for name in node:
            if not isinstance(name, str):
                text = f"{prefix}{name!r}: the name of a setting must be text, which {name!r} is not"
                self.found[f"{prefix}{name!r}"] = text
                continue
            key = prefix + name
            self.sources[key] = _sources(as_written[name], prefix)
            try:
                value = node[name]
                if isinstance(value, DictConfig):
                    # This finds an interpolation that leads back to its own group.
                    OmegaConf.to_container(value, resolve=isinstance(as_written[name], str))
                    values[name] = self._resolve(value, f"{key}.")
                elif OmegaConf.is_config(value):
                    values[name] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                else:
                    values[name] = value
            except OmegaConfBaseException as error:
                self.found[key] = f"{key}: {str(error).splitlines()[0]}"
        return values

    def own_mistakes(self) -> dict[str, str]:
        """The messages without those about values that are made of another faulty value."""
        faulty = [*self.found, *(group for group in CHOSEN if "name" not in self._group(group))]
        own = {
            key: text
            for key, text in self.found.items()
            if not any(_is_in(source, k) for source in self.sources.get(key, ()) for k in faulty if k != key)
        }
        return own or self.found

    def has_fault(self, *keys: str) -> bool:
        """Whether one of these keys, a group around it, or a key inside it is faulty."""
        return any(_is_in(key, k) or _is_in(k, key) for key in keys for k in self.found)

    def _group(self, name: str) -> Mapping[str, Any]:
        group = self.values.get(name)
        return group if isinstance(group, dict) else {}

    def recipe_for_other_tasks(self) -> str | None:
        """The message if ``recipe=`` has settings by task and none for this one, else None."""
        task = self._group("task").get("name")
        recipe = self._group("task").get("recipe")
        rows = recipe.get("of") if isinstance(recipe, dict) else None
        if not isinstance(rows, dict) or task is None or task in rows:
            return None
        return f"recipe= gives no settings for task={task}: it has them for {', '.join(map(str, rows))}"


def read_sections(reading: Reading) -> dict[str, Any]:
    """Read the sections that are the same for every task and method; those with mistakes are left out.

    The mistakes are added to ``reading.found``. ``method`` and ``task`` are left to their own classes, but for the
    choice of the class.
    """
    hints = typing.get_type_hints(Settings, include_extras=True)
    kept: dict[str, Any] = {}
    choices = ("method", "task")
    for group in choices:
        _check_choice(reading, group)
    if not any(name in reading._group("model") for name in ("name", "path")):
        _missing(reading, "model.path")
    for field in dataclasses.fields(Settings):
        if field.name in (*choices, "composed") or (field.name == "model" and "model.path" in reading.found):
            continue
        given = {field.name: reading.values[field.name]} if field.name in reading.values else {}
        kept |= _read_fields([field], hints, given, "", reading.found)
    known = {field.name for field in dataclasses.fields(Settings)} - {"composed"}
    for name in reading.values.keys() - known:
        reading.found[name] = unknown_key(name, [*known, *known_keys()])
    if "selector" in reading._group("method") and not reading.has_fault("search", "method"):
        if "search" not in reading.values:
            reading.found["search"] = "search is missing"
        elif reading.values["search"] is None:
            reading.found["search"] = _not_a_group("search", None, hints["search"])
    return kept


def _check_choice(reading: Reading, group: str) -> None:
    """Check that a task or method is chosen, and that its class and name are texts."""
    if group in reading.found:
        return
    node = reading.values.get(group)
    if isinstance(node, dict):
        if not any(name in node for name in ("name", "_target_")):
            _missing(reading, f"{group}._target_")
        for name in ("name", "_target_"):
            if name not in node:
                reading.found.setdefault(f"{group}.{name}", f"{group}.{name} is missing")
            elif not TEXT.fits(node[name]):
                reading.found[f"{group}.{name}"] = f"{group}.{name}={show(node[name])} must be {TEXT.words}"
    elif group in reading.values:
        reading.found[group] = f"{group}={show(node)} must be a group of settings"
    else:
        _missing(reading, group)


def _missing(reading: Reading, key: str) -> None:
    if not reading.has_fault(key):
        group = key.partition(".")[0]
        hint = f": choose one with {group}=<name>" if (conf_dir() / group).is_dir() else ""
        reading.found[key] = f"{key} is missing{hint}"


def read_group(
    kind: Any,
    given: Mapping[str, Any],
    prefix: str,
    found: dict[str, str],
    unknown: str | None = None,
) -> Any:
    """Read a group of settings as an instance of its class.

    Args:
        kind: a dataclass whose fields are described as in `diffora.settings.checks`.
        given: the values, in plain containers.
        prefix: the group's key with a dot at its end, as in ``finetune.``; empty for the top level.
        found: a message for each mistake is added here, by its key.
        unknown: who has no such setting, as in ``method=lora``, for keys that are not fields; None: name the nearest.

    Returns:
        The instance, or None if there are mistakes.
    """
    before = len(found)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    names = {field.name for field in fields}
    for name in given:
        if name not in names:
            key = f"{prefix}{name}"
            known = (f"{prefix}{other}" for other in names)
            found[key] = f"{unknown} has no setting {key}" if unknown else unknown_key(key, [*known, *known_keys()])
    hints = typing.get_type_hints(kind, include_extras=True)
    values = _read_fields(fields, hints, given, prefix, found, unknown)
    complete = all(field.name in values or not is_needed(field) or f"{prefix}{field.name}" in found for field in fields)
    faulty = len(found) > before or not complete or any(f"{prefix}{field.name}" in found for field in fields)
    return None if faulty else kind(**values)


def _read_fields(
    fields: Iterable[Any],
    hints: Mapping[str, Any],
    given: Mapping[str, Any],
    prefix: str,
    found: dict[str, str],
    unknown: str | None = None,
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields:
        key = f"{prefix}{field.name}"
        if any(_is_in(key, k) for k in found):
            continue  # it cannot be resolved
        if field.name not in given:
            if is_needed(field) and not any(_is_in(k, key) for k in found):
                found[key] = f"{key} is missing"
            continue
        value, hint = given[field.name], hints[field.name]
        if (section := section_of(hint)) is not None and not (value is None and may_be_null(hint)):
            if not isinstance(value, Mapping):
                found[key] = _not_a_group(key, value, hint)
            elif (inner := read_group(section, value, f"{key}.", found, unknown)) is not None:
                values[field.name] = inner
        elif any(_is_in(k, key) for k in found):
            continue  # a part of it cannot be resolved
        elif section is None and (problem := _problem(key, value, hint)) is not None:
            found[key] = problem
        else:
            values[field.name] = value
    return values


def _problem(key: str, value: Any, hint: Any) -> str | None:
    """The message for a value that does not fit its field, else None."""
    if not any(check.fits(value) for check in checks_of(hint)):
        return f"{key}={show(value)} must be {words_of(hint)}"
    if isinstance(value, Mapping):
        of_texts = any(typing.get_args(member) == (str, str) for member in members_of(hint))
        wrong = {name: item for name, item in value.items() if of_texts and not TEXT.fits(item)}
        for name, item in wrong.items():
            return f"{key}.{name}={show(item)} must be {TEXT.words}"
        return strange_value(key, value)
    return None


def _not_a_group(key: str, value: Any, hint: Any) -> str:
    names = ", ".join(field.name for field in dataclasses.fields(section_of(hint)))
    return f"{key}={show(value)} must be a group of settings: {names}"


def is_needed(field: Any) -> bool:
    """Whether a field has no default, so that it may not be left out."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def members_of(hint: Any) -> Iterator[Any]:
    """The members of a union, without annotations; or the type itself."""
    if typing.get_origin(hint) is Annotated:
        yield from members_of(typing.get_args(hint)[0])
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for member in typing.get_args(hint):
            yield from members_of(member)
    else:
        yield hint


def section_of(hint: Any) -> Any:
    """The settings class of a field that is a group, else None."""
    return next((member for member in members_of(hint) if dataclasses.is_dataclass(member)), None)


def may_be_null(hint: Any) -> bool:
    """Whether null fits a field."""
    return types.NoneType in members_of(hint)


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a settings class in full, groups left out but for their members."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if (section := section_of(hints[field.name])) is not None:
            yield from keys_of(section, f"{prefix}{field.name}.")
        elif field.init and hints[field.name] is not Any and field.name != "composed":
            yield f"{prefix}{field.name}"


def known_keys() -> list[str]:
    """The keys that every run may have, to name the nearest one to a misspelt key."""
    return [*keys_of(Settings), *keys_of(TaskSettings, "task.")]


def _sources(value: Any, prefix: str) -> list[str]:
    """The words in the interpolations of a value, among them the keys that they name."""
    if isinstance(value, dict | list):
        return [s for item in (value.values() if isinstance(value, dict) else value) for s in _sources(item, prefix)]
    if not isinstance(value, str) or "${" not in value or len(value) > 1000:
        return []
    return re.findall(r"[a-zA-Z_][\w.]*\w", value) + [prefix + s for s in re.findall(r"\$\{\.([\w.]*\w)", value)]


def _is_in(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")
