"""Lists every reason why overrides do not compose. Hydra itself stops at the first one."""

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig

from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.settings.checks import unknown_key
from diffora.settings.quotes import quoted, typed
from diffora.settings.read import known_keys


def sweeps(given: Sequence[str]) -> list[str]:
    """The overrides that give several values, such as ``rank=1,2``."""
    from diffora.run.sweep import parse

    return [each for each in given if "," in each and parse([each])[0].is_sweep_override()]


def with_sweep_hint(problems: list[str]) -> list[str]:
    """The problems, with a hint about settings that only some runs of a sweep have."""
    if "has no setting" not in "".join(problems):
        return problems
    return [
        *problems,
        "this setting exists only for some of the swept methods or tasks: use ++, as in ++search.epochs=1; the other "
        "runs ignore it",
    ]


def check_added(paths: Sequence[str], primary: Path) -> list[Path]:
    """The folders among the places of configurations that a command adds.

    Args:
        paths: the places, as ``file://…``; others are Hydra's business.
        primary: the folder that they are added to.

    Raises:
        UserError: a folder does not exist, or has a file of a name that ``primary`` has: Hydra would not read it.
    """
    folders = [Path(path.removeprefix("file://")).absolute() for path in paths if path.startswith("file://")]
    problems = [f"--config-dir={folder} is not a folder" for folder in folders if not folder.is_dir()]
    for folder in folders:
        files = [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]
        hidden = [file for file in files if _differs(primary / file.relative_to(folder), file)]
        problems += [
            f"{file} would not be read, because diffora has {file.relative_to(folder)} too: give it another name"
            for file in sorted(hidden)
        ]
    if problems:
        raise UserError(problems)
    return folders


def _differs(ours: Path, theirs: Path) -> bool:
    """Whether a file of ours has the place of a file of the user, and another content."""
    return ours.is_file() and ours.read_bytes() != theirs.read_bytes()


def composition_problems(
    given: list[str], paths: Sequence[str] = (), primary: tuple[Path, str] | None = None
) -> list[str]:
    """Every reason why these overrides do not compose, and every wrong value among those that do.

    Hydra stops at the first mistake, so each override is tried alone: first the choices from ``conf/``, then the
    values, together with the choices that work.

    Args:
        paths: folders with more choices than ``conf/``, as in ``hydra.searchpath``.
        primary: (folder, name) of the configuration that they are added to; None: ``conf/config.yaml``.
    """
    # Imported here: Hydra and torch take seconds, and most commands have nothing to explain.
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from diffora.run.check import check

    home, name = primary or (conf_dir(), "config")
    try:
        folders = check_added(paths, home)
    except UserError as error:
        return error.problems
    GlobalHydra.instance().clear()
    groups = [group for folder in (home, *folders) for group in folder.iterdir() if group.is_dir()]
    given = [o for o in given if not re.match(r"[+~]*hydra\b", o)]
    choices = [o for o in given if o.partition("=")[0].lstrip("+~") in {group.name for group in groups}]
    found: list[str] = []
    kept = [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []
    if problems := list(filter(None, map(unreadable, given))):
        return problems
    with initialize_config_dir(str(home), version_base="1.3"):
        for override in [*choices, *(o for o in given if o not in choices)]:
            right, wrong = _tried(override, name, kept, groups)
            kept += right[:1]
            found += wrong
        try:
            check(compose(name, kept))
        except UserError as error:
            found += error.problems
    return found


def unreadable(override: str) -> str | None:
    """The message for an override whose value Hydra's grammar takes in quotes only, else None."""
    from diffora.run.sweep import parse

    key, given, value = override.partition("=")
    if not given:
        return None
    try:
        parse([override])
    except Exception:
        with suppress(Exception):
            parse([f"{key}={quoted(value)}"])
            return f"{override} cannot be read: write {typed(key, value)}"
    return None


def _tried(override: str, name: str, kept: list[str], groups: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(the values of an override that compose together with those that are kept, the messages for the others)."""
    from hydra import compose

    right, wrong = [], []
    for line in _each_value(override):
        try:
            compose(name, [*kept, line])
            right.append(line)
        except Exception as error:
            if "is not in struct" in str(error) or "Could not override" in str(error):
                wrong.append(_no_such_key(line.partition("=")[0], compose(name, kept)))
                break  # the other values of this key would have the same message
            wrong.append(missing_plugin(error) or _no_such_choice(line, error, groups) or f"{line}: {short(error)}")
    return right, wrong


def _no_such_choice(line: str, error: Exception, groups: Sequence[Path]) -> str | None:
    """The message if an override asks for a choice that does not exist, else None; ``groups`` are its folders."""
    key, _, value = line.partition("=")
    files = [file for group in groups if group.name == key for file in group.glob("*.yaml")]
    if "Got NoneType" in str(error) or ("must be a string" in str(error) and files):
        none = "; logger=[] for none" if key == "logger" else ""
        return f"{line} is not one of: {', '.join(sorted({file.stem for file in files}))}{none}"
    if options := re.search(r"Available options in '([^']*)':((?:\n\t\S+)*)", str(error)):
        inner = re.search(r"Could not (?:find|load) '([^']*)'", str(error))
        if inner and options[1] != key.lstrip("+"):  # the chosen file asks for it in its defaults
            line += f" asks for {inner[1]}, which"
        near = get_close_matches(value, names := options[2].split(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{line} is not one of: {', '.join(names)}{hint}"
    return None


def missing_plugin(error: Exception) -> str | None:
    """What to install if a launcher or sweeper is missing, else None."""
    wanted = re.search(r"Could not find 'hydra/(?:launcher|sweeper)/((joblib|submitit|ray|optuna)\w*)'", str(error))
    return f"{wanted[1]} is not installed: pip install 'diffora[{wanted[2]}]'" if wanted else None


def _each_value(override: str) -> list[str]:
    """One override for each value of a sweep's override; an unreadable one stays as it is."""
    from diffora.run.sweep import parse, values

    try:
        [parsed] = parse([override])
        return [override] if parsed.is_delete() else [f"{parsed.get_key_element()}={v}" for v in values(parsed)]
    except Exception:
        return [override]


def _no_such_key(key: str, cfg: DictConfig) -> str:
    """The message for a key that the composed configuration does not have."""
    of_method = key.split(".")[0] in ("search", "rank", "rho", "method") or key == "finetune.dropout"
    if of_method and isinstance(cfg.get("method"), DictConfig):  # ~method takes it away
        present = [f"method.{name}" for name in cfg.method if name not in ("_target_", "name")]
        present += [name for name in ("rank", "rho", "search") if name in cfg]
        return f"method={cfg.method.name} has no setting {key}" + (f"; it has {', '.join(present)}" if present else "")
    if key.startswith("task.") and isinstance(cfg.get("task"), DictConfig):
        present = [f"task.{name}" for name in cfg.task if name != "_target_"]
        return f"task={cfg.task.name} has no setting {key}; it has {', '.join(present)}"
    for name in ("finetune.optimizer", "finetune.scheduler"):
        if key.startswith(f"{name}."):
            return f"{key}: write {name}='{{_target_: module.Class, <its arguments>}}', or +{key}=…"
    return unknown_key(key, [*known_keys(), *map(str, cfg)])


def short(error: Exception) -> str:
    """The first lines of a message from Hydra, without its advice on how to force a key in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines[:3] if not line.startswith("To append"))
