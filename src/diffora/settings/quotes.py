"""Texts and paths as the values of settings: quoted for Hydra's grammar, and for a shell."""

import re
import shlex


def quoted(value: object) -> str:
    """A text as the value of an override. Hydra reads a backslash as such, except before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), str(value))
    return f"'{escaped}'"


def typed(key: str, value: object) -> str:
    """A setting as it is typed in a shell, with quotes if its value needs them."""
    if re.fullmatch(r"[\w./:@%+-]+", str(value), re.ASCII):
        return f"{key}={value}"
    argument = f"{key}={quoted(value)}"
    return shlex.quote(argument) if re.search(r'["$`\\!]', argument) else f'"{argument}"'
