"""docs/equations.md: every place exists, names its equation, and every equation of the papers has a row."""

import inspect
import re
from importlib import import_module

import pytest
from conftest import REPO
from omegaconf import OmegaConf

from diffora.places import conf_dir

PAGE = (REPO / "docs" / "equations.md").read_text()
PLACES = re.findall(r"^\| (\[[DR]\] [^|]+?) \|[^|]*\| `([\w.]+):([\w.]+)` \|", PAGE, re.MULTILINE)
COMMANDS = re.findall(r"^\| (\[[DR]\] [^|]+?) \|[^|]*\| `(\w+)` \|", PAGE, re.MULTILINE)


def found(module: str, name: str) -> list[object]:
    """The object at a place, and what contains it: its class, if it has one, and its module."""
    objects: list[object] = [import_module(module)]
    for part in name.split("."):
        objects.append(getattr(objects[-1], part))
    return objects


def names(text: str, reference: str) -> bool:
    """Whether a docstring names an equation, also inside a list or a range: eqs. 8, 9 or eqs. 10 to 13.

    The letter of the other paper in front of it is not a match. Text without letters is about one paper.
    """
    paper, _, rest = reference.partition(" ")
    kind, *numbers = re.findall(r"eq|Algorithm|Theorem|Table|Figure|\d+", rest)
    named: set[str] = set()
    for letter, run in re.findall(rf"(\[[DR]\] )?(?<!\w){kind}s?\.? ((?:\d+(?:, | and | to )?)+)", text, re.IGNORECASE):
        if letter.strip() not in ("", paper):
            continue
        named |= set(re.findall(r"\d+", run))
        for first, last in re.findall(r"(\d+) to (\d+)", run):
            named |= {str(number) for number in range(int(first), int(last) + 1)}
    return set(numbers) <= named


@pytest.mark.parametrize(("reference", "module", "name"), PLACES, ids=lambda value: value.replace(" ", "-"))
def test_a_place_exists_and_its_docstring_names_the_equation(reference, module, name):
    objects = found(module, name)
    texts = [inspect.getdoc(o) or "" for o in objects]
    sources = [inspect.getsource(objects[-1])] if "Figure" in reference else []  # a measure inside a longer function
    assert any(names(text, reference) for text in [*texts, *sources]), texts


@pytest.mark.parametrize(
    "wanted",
    [f"[D] eq. {n}" for n in (4, 5, 10, 11, 13, 14)]
    + ["[D] Algorithm 1", *(f"[D] Theorem {n}" for n in (1, 2, 3))]
    + [f"[R] eq. {n}" for n in (8, 9, 10)]
    + ["[R] Algorithm 1", "[R] Table 5", "[R] Figures 1, 2"],
)
def test_every_equation_has_a_row(wanted):
    assert wanted in {reference for reference, *_ in PLACES}


def test_tables_and_figures_are_experiments_of_that_title():
    titles = {}
    for file in (conf_dir() / "experiment").glob("*.yaml"):
        title = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.title") or ""
        if re.match(r"\[[DR]\] (Table|Figure) \d", title):
            titles[file.stem] = title.partition(":")[0]
    assert {experiment: reference for reference, experiment in COMMANDS} == titles
    assert "recipe=rm_lora" in PAGE and (conf_dir() / "recipe" / "rm_lora.yaml").is_file()  # [R] Table 4


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("[D] eq. 11", "[D] eq. 11", True),
        ("[D] eqs. 10 to 13", "[D] eq. 11", True),
        ("[R] eqs. 8, 9", "[R] eq. 9", True),
        ("[D] eq. 1", "[D] eq. 11", False),
        ("[D] Algorithm 1, line 4", "[D] Algorithm 1", True),
        ("[R] Table 5", "[R] eq. 5", False),
        ("[R] eq. 10", "[D] eq. 10", False),
        ("eq. 10", "[D] eq. 10", True),
    ],
)
def test_names_an_equation(text, reference, expected):
    assert names(text, reference) is expected
