"""Reads the composed configuration into typed settings. Finds every mistake before torch or a weight is loaded."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from diffora.errors import first_line
from diffora.places import conf_dir
from diffora.settings.checks import TEXT, Check, checks_of, is_int, show, strange_value, unknown_key, words_of
from diffora.settings.sections import Logger, Model, Settings, TaskSettings

NO_KEYS = ((Settings, "composed"), (Logger, "own"))
"""Fields that are no keys of the configuration."""
CHOSEN = {"method": "_target_", "task": "_target_", "model": "path"}
"""Groups that come from a file of their own, and a key that each such file has."""
BY_CLASS = "finetune.class_weights."
"""The group whose keys are names of classes, which may be numbers."""


@dataclasses.dataclass
class Reading:
    """A composed configuration in plain containers, and its mistakes.

    Attributes:
        values: the resolved values, without those that cannot be resolved.
        found: one message for each mistake, by key.
        sources: for each key, the keys in its interpolation, as in ``search.lr: ${finetune.lr}``.
    """

    values: dict[str, Any]
    found: dict[str, str]
    sources: dict[str, list[str]]

    @classmethod
    def of(cls, cfg: DictConfig, prefix: str = "") -> "Reading":
        """Resolve a composed configuration, or the group of one whose key, with a dot at its end, is ``prefix``.

        Numbers that name classes become texts, in ``cfg`` too (see `_name_by_text`).
        """
        reading = cls({}, {}, {})
        reading.values = reading._resolve(cfg, prefix)
        return reading

    def _resolve(self, node: DictConfig, prefix: str) -> dict[str, Any]:
        if prefix == BY_CLASS:
            _name_by_text(node)
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
                    # Raises an error for an interpolation that refers to its own group.
                    OmegaConf.to_container(value, resolve=isinstance(as_written[name], str))
                    values[name] = self._resolve(value, f"{key}.")
                elif OmegaConf.is_config(value):
                    values[name] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                else:
                    values[name] = value
            except OmegaConfBaseException as error:
                self.found[key] = f"{key}: {first_line(error)}"
        return values

    def own_mistakes(self) -> dict[str, str]:
        """The messages, without those for values that are interpolated from a faulty value."""
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


def _name_by_text(group: DictConfig) -> None:
    """Make the whole numbers among a group's keys texts, in place: records and hashes are made from the same group.

    Hydra reads ``{0:1,1:5}`` with numbers as keys, and its command line cannot quote a key. A number whose text is a
    key too stays, and is refused.
    """
    written: Any = OmegaConf.to_container(group, resolve=False)
    with flag_override(group, ["struct", "readonly"], False):
        for name in [name for name in written if is_int(name) and str(name) not in written]:
            del group[name]
            group[str(name)] = written[name]


def read_sections(reading: Reading) -> dict[str, Any]:
    """Read the sections that are the same for every task and method; those with mistakes are left out.

    The mistakes are added to ``reading.found``. Of ``method`` and ``task`` only the class is checked; that class reads
    the settings.
    """
    hints = typing.get_type_hints(Settings, include_extras=True)
    _collect_own_loggers(reading)
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
        kept |= _read_fields({field.name: field.name}, [field], hints, given, reading.found)
    known = {field.name for field in dataclasses.fields(Settings)} - {"composed"}
    for name in reading.values.keys() - known:
        reading.found[name] = unknown_key(name, [*known, *known_keys()])
    _check_search(reading)
    return kept


def _collect_own_loggers(reading: Reading) -> None:
    """Put the loggers that have a ``_target_`` into `Logger.own`."""
    section = reading._group("logger")
    own = {name: each for name, each in section.items() if isinstance(each, Mapping) and "_target_" in each}
    if own:
        others = {name: each for name, each in section.items() if name not in own}
        reading.values["logger"] = others | {"own": own}


def _check_search(reading: Reading) -> None:
    """The section ``search`` is there if, and only if, the method has a selector."""
    method = reading._group("method")
    if "name" in method and "selector" not in method and "search" in reading.values:
        for key in [key for key in reading.found if _is_in(key, "search")]:
            del reading.found[key]
        reading.found["search"] = (
            f"method={method['name']} has no setting search (search.* and recipe=fast are for method=diffora)"
        )
    elif "selector" in method and "search" not in reading.values and not reading.has_fault("search"):
        reading.found["search"] = "search is missing"


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
    who: str | None = None,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Read a group of settings as an instance of its class.

    Args:
        kind: a dataclass whose fields are described as in `diffora.settings.checks`.
        given: the values, in plain containers.
        prefix: the group's key with a dot at its end, as in ``finetune.``; empty for the top level.
        found: a message for each mistake is added here, by its key.
        who: the choice that has these settings, such as ``method=lora``: the message for another key then says so.
            Otherwise it names the nearest key.
        elsewhere: the keys of fields that do not begin with ``prefix``.

    Returns:
        The instance, or None if there are mistakes.
    """
    fields = [field for field in dataclasses.fields(kind) if field.init]
    keys = {field.name: elsewhere.get(field.name, f"{prefix}{field.name}") for field in fields}
    for name in given.keys() - keys.keys():
        key = elsewhere.get(name, f"{prefix}{name}")
        if who:
            found[key] = f"{who} has no {'' if name in elsewhere else 'setting '}{key}"
        else:
            found[key] = unknown_key(key, [*keys.values(), *known_keys()])
    hints = typing.get_type_hints(kind, include_extras=True)
    values = _read_fields(keys, fields, hints, given, found, who)
    complete = all(field.name in values or not is_needed(field) for field in fields)
    faulty = any(_is_in(k, key) or _is_in(k, prefix.rstrip(".")) for k in found for key in keys.values())
    return kind(**values) if complete and not faulty else None


def _read_fields(
    keys: Mapping[str, str],
    fields: Iterable[Any],
    hints: Mapping[str, Any],
    given: Mapping[str, Any],
    found: dict[str, str],
    who: str | None = None,
) -> dict[str, Any]:
    """The values of the fields that fit, by name; ``keys`` are the fields' full keys."""
    values: dict[str, Any] = {}
    for field in fields:
        key = keys[field.name]
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
            elif (inner := read_group(section, value, f"{key}.", found, who)) is not None:
                values[field.name] = inner
        elif any(_is_in(k, key) for k in found):
            continue  # a part of it cannot be resolved
        elif section is None and (problem := value_problem(key, value, hint)) is not None:
            found[key] = problem
        else:
            values[field.name] = value
    return values


def value_problem(key: str, value: Any, hint: Any) -> str | None:
    """The message for a value that does not fit a type hint, else None."""
    if not any(check.fits(value) for check in checks_of(hint)):
        return f"{key}={show(value)} must be {words_of(hint)}"
    members = list(members_of(hint))
    if isinstance(value, Mapping) and any(typing.get_args(member) == (str, str) for member in members):
        wrong = [(name, item) for name, item in value.items() if not TEXT.fits(item)]
        return f"{key}.{wrong[0][0]}={show(wrong[0][1])} must be {TEXT.words}" if wrong else None
    checked = any(isinstance(item, Check) for item in getattr(hint, "__metadata__", ()))
    if Any in members or (isinstance(value, Mapping) and not checked):
        return strange_value(key, value)
    return None


def _not_a_group(key: str, value: Any, hint: Any) -> str:
    names = ", ".join(field.name for field in dataclasses.fields(section_of(hint)))
    return f"{key}={show(value)} must be a group of settings: {names}"


def known_part(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group that its class has a field for, also in the groups inside it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in given:
            value, section = given[field.name], section_of(hints[field.name])
            kept[field.name] = known_part(section, value) if section and isinstance(value, Mapping) else value
    return kept


def model_of(section: Mapping[str, Any] | DictConfig) -> Model:
    """The section ``model`` of an earlier run. Its keys that no longer exist are ignored, new ones have their defaults.

    Args:
        section: in plain containers or OmegaConf's.
    """
    content: Any = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else section
    return Model(**known_part(Model, content))


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
    """The full keys of a settings class. A group is replaced by the keys of its members."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if (section := section_of(hints[field.name])) is not None:
            yield from keys_of(section, f"{prefix}{field.name}.")
        elif field.init and hints[field.name] is not Any and (kind, field.name) not in NO_KEYS:
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
