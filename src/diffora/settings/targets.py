"""Objects that a setting names: ``{_target_: module.Class, <its arguments>}``, or a short name for one."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from diffora.errors import UserError, first_line
from diffora.settings.checks import strange_value
from diffora.trust import function_at


@dataclass(frozen=True)
class Target:
    """A class or function with the arguments that the user gives it.

    Attributes:
        key: of the setting, for messages.
        path: where the class is.
        makes: the class or function itself.
        given: arguments by name.
        first: how many arguments the program gives, before those by name.
    """

    key: str
    path: str
    makes: Any
    given: dict[str, Any]
    first: int = 0

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that may be given by name."""
        return _parameters(self.makes, self.first)

    def fill(self, values: Mapping[str, Any]) -> "Target":
        """The same with arguments of the program, where the class takes them and the user gives none.

        An argument with a default other than None keeps its default.
        """
        empty = (inspect.Parameter.empty, None)
        own = {n: values[n] for n, p in self.parameters.items() if n in values and p.default in empty}
        return Target(self.key, self.path, self.makes, own | self.given, self.first)

    def make(self, *first: Any, **more: Any) -> Any:
        """Call it.

        Raises:
            UserError: an argument is missing, or the class does not accept them.
        """
        given = self.given | more
        needed = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            and name not in given
        ]
        if needed:
            raise UserError(f"{self.key}={self.path} needs {', '.join(needed)}, as in {{_target_: …, {needed[0]}: …}}")
        try:
            return self.makes(*first, **given)
        except ImportError as error:
            raise UserError(
                f"{self.key}={self.path} needs a package that is not installed: {first_line(error)}"
            ) from error
        except Exception as error:  # whatever the class does with its arguments
            raise UserError(f"{self.key}={self.path} does not accept {given}: {first_line(error)}") from error


def target_of(
    value: Any, key: str, fits: Callable[[Any], bool], short: Mapping[str, str] = MappingProxyType({}), first: int = 0
) -> Target:
    """What a setting names. Its module is imported, so only call it for what the user typed or has in ``conf/``.

    Args:
        value: a path, a short name, or a group with ``_target_``.
        key: of the setting.
        fits: whether an object may be meant, to name the nearest one to a misspelt name.
        short: paths by short name.
        first: how many arguments the program gives, before those by name.

    Raises:
        UserError: there is no such class, or it has no such arguments.
    """
    given = {} if isinstance(value, str) else {name: each for name, each in value.items() if name != "_target_"}
    if problem := strange_value(key, given):
        raise UserError(problem)
    named = value if isinstance(value, str) else value["_target_"]
    path = short.get(named, named)
    if short and "." not in path:
        near = get_close_matches(path, short, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key}={path} must be one of {', '.join(short)}, or the dotted path of a class{hint}")
    found = function_at(path, key, "class", fits)
    known = _parameters(found, first)
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        for name in given.keys() - known.keys():
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}" if known else ""
            raise UserError(f"{key}={path} has no argument {name}{hint}")
    return Target(key, path, found, given, first)


def _parameters(makes: Any, first: int) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(makes).parameters
    except (TypeError, ValueError):  # of a built-in
        return {}
    return dict(list(parameters.items())[first:])
