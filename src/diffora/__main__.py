"""The command ``diffora``, which is also ``python -m diffora``: finds the program that the user asks for."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from diffora import __version__
from diffora.cli import command
from diffora.errors import UserError

PROGRAMS = {
    "train": ("diffora.cli.train:main", "search the modules of a model and fine-tune them; with -m, a sweep"),
    "select": ("diffora.cli.train:select", "only search and select: selection.json and pictures"),
    "evaluate": ("diffora.cli.evaluate:main", "metrics and predictions of a finished run"),
    "report": ("diffora.cli.report:main", "a page and tables about finished runs"),
    "export": ("diffora.cli.export:main", "write a finished run's adapter in another form"),
    "push": ("diffora.cli.push:main", "publish a finished run's adapter on the Hugging Face hub"),
}
"""The function of each program, which takes the arguments after its name; and what it does."""

EXAMPLES = """
  diffora train experiment=quickstart                  a whole run in a minute, without network or GPU
  diffora train method=diffora task=mrpc
  diffora report outputs

`diffora <program> --help` shows what a program takes. `diffora -sc install=bash` (zsh, fish) prints a script that makes
the shell complete choices and values: eval "$(diffora -sc install=bash)"."""


def main() -> None:
    """Run the program that the command line names."""
    command(lambda: dispatch(sys.argv[1:]))


def dispatch(arguments: list[str]) -> None:
    """Run the program that the first argument names, with the other arguments.

    Raises:
        UserError: there is no such program; names the nearest one.
    """
    name, *others = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in ("-V", "--version", "version"):
        print(f"diffora {__version__}")
    elif name in ("-sc", "--shell-completion"):
        complete(others)
    elif name in PROGRAMS:
        module, _, function = PROGRAMS[name][0].partition(":")
        getattr(import_module(module), function)(others)
    else:
        raise UserError(no_such_program(name, arguments))


def usage() -> str:
    """The text of ``diffora --help``."""
    lines = [f"  {name:<10}{does}" for name, (_, does) in PROGRAMS.items()]
    title = "diffora: learn which modules of a pretrained model to fine-tune."
    return "\n".join([title, "", "  diffora <program> …", "", *lines, EXAMPLES])


def no_such_program(name: str, arguments: list[str]) -> str:
    """The message for a first argument that is no program."""
    if "=" in name or name.startswith("-"):
        return f"{name} comes after the name of a program: diffora train {' '.join(arguments)}"
    near = get_close_matches(name, PROGRAMS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"diffora has no program {name}; {hint}It has {', '.join(PROGRAMS)}"


def complete(arguments: list[str]) -> None:
    """Shell completion: names of programs, and what Hydra completes for ``train`` and ``select``.

    Hydra's script asks ``diffora -sc query=bash`` with the line so far in ``COMP_LINE``.
    """
    from diffora.cli.train import main as train

    if any(argument.startswith("query=") for argument in arguments):
        line = os.environ.get("COMP_LINE", "")
        _, _, typed = line.lstrip().partition(" ")
        name, blank, rest = typed.lstrip().partition(" ")
        if not blank:
            print(" ".join(PROGRAMS))
            return
        if name not in ("train", "select"):
            return  # the shell completes names of files
        os.environ["COMP_LINE"] = f"diffora {rest}"
    sys.argv[0] = "diffora"  # also for python -m diffora: the script is for this name
    train(["-sc", *arguments])


if __name__ == "__main__":
    main()
