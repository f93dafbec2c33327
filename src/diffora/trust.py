"""Reads files that somebody else may have written: which classes they may name, and their settings.

The user may name any class on the command line or in ``conf/``. A file that may come from others (a run's
``config.yaml``, an adapter's ``diffora.json``) may name classes of this package only, and nothing in it is resolved.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.errors import UserError
from diffora.files import read_json
from diffora.places import conf_dir

PACKAGE = "diffora"
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


# --- classes ---


def class_at(target: Any, base: Any, key: str, file: Path | None = None) -> Any:
    """The subclass of ``base`` at a dotted path.

    Args:
        target: ``module.Class``.
        base: `Task` or `Method`; ``base.required`` names what a subclass must define.
        key: where the path was given, such as ``task._target_``, for messages.
        file: the file that the path comes from, if somebody else may have written it. Then only classes of this
            package are found. None for what the user typed or has in ``conf/``.

    Raises:
        UserError: there is no such class, or it is not a usable subclass.
    """
    kind = base.__name__
    if file is not None:
        found = object_in(PACKAGE, target)
        if not _is_complete(found, base):
            raise UserError(
                f"{file}: {key}={_path(target)} is not a {kind} of this project{_nearest(target, key)}. A file may "
                "not name other code, so nothing was imported. A class that you trust you can name on the command "
                f"line: {key}=<module>.<class>"
            )
        return found
    name, _, attribute = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not (name and attribute and all(name.split("."))):
        raise UserError(f"{key}={_path(target)} must be the dotted path of a {kind}, as in module.Class")
    module = _imported(name, target, key)
    found = getattr(module, attribute, None)
    if found is None:
        present = [n for n, o in vars(module).items() if inspect.isclass(o) and issubclass(o, base) and o is not base]
        hint = f"; it has {', '.join(present)}" if present else ""
        raise UserError(f"{key}={target}: {name} has no {attribute}{hint}{_nearest(target, key)}")
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(
            f"{key}={target} is not a subclass of {base.__module__}.{kind}, which it must be{_nearest(target, key)}"
        )
    if not _is_complete(found, base):
        missing = [member for member in base.required if getattr(found, member) is getattr(base, member)]
        raise UserError(f"{key}={target} does not define {', '.join(missing)}, which every {kind} must")
    return found


def function_at(
    target: str, key: str, what: str = "function", suggested: Callable[[Any], bool] = inspect.isfunction
) -> Any:
    """The function (or other callable) at a dotted path, which is imported.

    Only for a path that the user typed or has in ``conf/``. There is no variant for a path in a file that somebody else
    may have written, such as a run's ``config.yaml``: nothing that reads such files calls a function they name.

    Args:
        target: ``module.function``.
        key: where the path was given, such as ``method.selector``, for messages.
        what: what it must be, for messages.
        suggested: whether an object of the same module may be meant instead.

    Raises:
        UserError: there is no such function.
    """
    if not (isinstance(target, str) and NAME.fullmatch(target)):
        raise UserError(f"{key}={_path(target)} must be the dotted path of a {what}, as in module.{what}")
    name, _, attribute = target.rpartition(".")
    module = _imported(name, target, key)
    found = getattr(module, attribute, None)
    if found is None:
        own = inspect.isfunction is suggested  # a module of the user may import others' functions
        present = [n for n, o in vars(module).items() if suggested(o) and (not own or o.__module__ == name)]
        near = get_close_matches(attribute, present, n=1, cutoff=0.6)
        hint = f"; its {what}s: {', '.join(present[:20])}" if present else ""
        if near:
            hint = f"; did you mean {name}.{near[0]}?"
        raise UserError(f"{key}={target}: {name} has no {attribute}{hint}")
    if not callable(found):
        raise UserError(f"{key}={target} is a {type(found).__name__}, not a {what}")
    return found


def object_in(package: str, target: Any) -> Any:
    """The class or function at a dotted path inside an installed package; None if there is none.

    Nothing outside the package is imported: its files are searched for the module first.
    """
    if not (isinstance(target, str) and NAME.fullmatch(target) and target.startswith(f"{package}.")):
        return None
    name, _, attribute = target.rpartition(".")
    home = Path(str(import_module(package).__file__)).parent
    place = home.joinpath(*name.split(".")[1:])
    files = [place / "__init__.py"] if place == home else [place / "__init__.py", place.with_name(f"{place.name}.py")]
    if not any(file.is_file() for file in files):
        return None
    module = import_module(name)
    if Path(str(module.__file__)) not in files:
        return None
    found = getattr(module, attribute, None)
    return found if str(getattr(found, "__module__", "")).partition(".")[0] == package else None


_folders: list[Path] = []
"""Where modules of the user are looked for, after the current folder."""


def look_in(folders: Iterable[Path]) -> None:
    """Look for modules of the user in folders of configurations that the user gave, and beside these folders."""
    _folders.extend(dict.fromkeys(place for folder in folders for place in (folder, folder.parent)))


def _make_findable(module: str) -> None:
    """Add a folder of the user to Python's path, if a module that the user named is there and nowhere else.

    It comes last on the path, so a file of the user never replaces an installed module.
    """
    top = module.partition(".")[0]
    if top in sys.modules or find_spec(top) is not None:
        return
    for place in (Path.cwd(), *_folders):
        if (place / f"{top}.py").is_file() or (place / top).is_dir():
            sys.path.append(str(place))
            invalidate_caches()
            return


def _imported(name: str, target: str, key: str) -> Any:
    _make_findable(name)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{key}={target}: Python finds no module {error.name}{_nearest(target, key)}. A module of your own "
                "must be in the current folder, in the folder of --config-dir or beside it, or on PYTHONPATH"
            ) from error
        reason: BaseException = error
    except (Exception, SystemExit) as error:  # whatever the user's own module does
        reason = error
    words = " ".join(str(reason).split())
    raise UserError(f"{key}={target}: importing {name} fails with {type(reason).__name__}: {words}") from reason


def _is_complete(found: Any, base: Any) -> bool:
    return (
        inspect.isclass(found)
        and issubclass(found, base)
        and not any(getattr(found, member) is getattr(base, member) for member in base.required)
    )


def _nearest(target: Any, key: str) -> str:
    """A hint with the class of this project whose name is nearest; empty if no name is near."""
    files = (conf_dir() / key.partition(".")[0]).glob("*.yaml")
    texts = "\n".join(file.read_text(encoding="utf-8") for file in files)
    present = dict.fromkeys(re.findall(rf"^ *_target_: ({PACKAGE}\.\S+)$", texts, re.MULTILINE))
    of = {path.rpartition(".")[2]: path for path in sorted(present)}
    near = get_close_matches(str(target).rpartition(".")[2], of, n=1, cutoff=0.7)
    return f" (did you mean {of[near[0]]}?)" if near and of[near[0]] != target else ""


# --- settings ---


def literal(text: str) -> str:
    r"""A text as OmegaConf must be given it to keep it as it is: ``${x}`` becomes ``\${x}``."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def settings(content: Any, file: Path, sections: Sequence[str], values: Sequence[str] = ()) -> DictConfig:
    """A configuration with some keys of a file. All text stays as written: no interpolation is ever resolved.

    Args:
        content: what `read_yaml` or `read_json` found in the file.
        file: for messages.
        sections: groups of settings that must be there.
        values: other keys, which may be missing.

    Raises:
        UserError: every section that is missing or not a group of settings, every value that no setting can have.
    """
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold groups of settings: {', '.join(sections)}")
    problems = []
    for name in sections:
        if name not in content:
            problems.append(f"{file}: the section {name} is missing")
        elif not isinstance(content[name], dict):
            problems.append(f"{file}: {name}={_shown(content[name])} must be a group of settings")
    if problems:
        raise UserError(problems)
    names = [*sections, *(name for name in values if name in content)]
    plain = {name: _literals(content[name], name, file, problems) for name in names}
    if problems:
        raise UserError(problems)
    return OmegaConf.create(plain)


def _literals(value: Any, key: str, file: Path, problems: list[str]) -> Any:
    if isinstance(value, dict):
        if strange := [name for name in value if not isinstance(name, str | int)]:
            problems.append(f"{file}: {key} has the key {_shown(strange[0])}, which must be text")
            return {}
        return {name: _literals(item, f"{key}.{name}", file, problems) for name, item in value.items()}
    if isinstance(value, list):
        return [_literals(item, f"{key}[{i}]", file, problems) for i, item in enumerate(value)]
    if isinstance(value, str) and value != "???":
        return literal(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    problems.append(f"{file}: {key}={_shown(value)} must be text, a number, true, false or null")
    return None


def _path(target: Any) -> str:
    """A dotted path in a message. Characters that only look like ASCII letters are escaped."""
    ordinary = isinstance(target, str) and len(target) <= 80 and target.isascii() and target.isprintable()
    return target if ordinary else _shown(target)


def _shown(value: Any) -> str:
    """A value in a message, cut to 80 characters."""
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# --- adapters of PEFT ---

LOADS_MORE = {
    "XLORA": "it loads other adapters from places that it names",
    "SHADOW": "it loads a second model from a place that it names",
}


def check_peft_adapter(folder: Path) -> None:
    """Refuse a PEFT adapter with which PEFT would import a module, unpickle a file or load from another place.

    Raises:
        UserError: ``adapter_config.json`` cannot be right, or the weights are not in safetensors.
    """
    file = folder / "adapter_config.json"
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(kind := content.get("peft_type"), str):
        raise UserError(f"{file} is not the configuration of an adapter: it must have peft_type, such as LORA")
    if reason := LOADS_MORE.get(kind.upper()):
        raise UserError(f"{file}: peft_type={kind} is not loaded: {reason}")
    if content.get("megatron_config") or content.get("megatron_core") not in (None, "megatron.core"):
        raise UserError(f"{file}: megatron_config and megatron_core name a module to import, which a file may not")
    if not (folder / "adapter_model.safetensors").is_file():
        other = "; adapter_model.bin is a pickle, which can run code" if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{folder} has no adapter_model.safetensors, the only format of weights that is read{other}")
