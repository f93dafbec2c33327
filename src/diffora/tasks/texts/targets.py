"""From labels as text to what the model learns: class numbers, or numbers for regression."""

import re
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.labels import known_classes
from diffora.tasks.messages import some
from diffora.tasks.sources.check_values import report
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.readers import NUMBER
from diffora.tasks.texts.several import SEPARATORS, names_in, written_list

WHOLE = r"[-+]?\d+"
ABSENT = ("nan", "none", "null", "n/a", "na", "<na>")
"""What other programs write in place of a missing label, in lower case."""


def find_classes(part: Part, column: str, problems: list[str]) -> list[str]:
    """The classes of a split, sorted: by number if all of them are whole numbers, else by name.

    Args:
        column: name of the label column, for messages.
        problems: grows by a message if these cannot be classes.
    """
    labels = part.table.column("label")
    several = pa.types.is_list(labels.type)
    classes: list[str] = pc.unique(pc.list_flatten(labels) if several else labels).to_pylist()
    numbers = all(re.fullmatch(WHOLE, name) for name in classes)
    # `int` refuses thousands of digits.
    classes.sort(key=lambda name: (Decimal(name), name) if numbers else name)
    where = f"{part.where}: column '{column}'"
    if not classes:
        problems.append(f"{where}: no row has a class, so there is nothing to learn.")
    elif len(classes) == 1 and several:
        problems.append(f"{where}: the rows have no class but '{classes[0]}'; at least two classes are needed.")
    elif len(classes) == 1:
        problems.append(f"{where}: all rows have the same label '{classes[0]}'; at least two classes are needed.")
    elif not several and _are_numbers(classes):
        whole = all(float(name).is_integer() for name in classes)
        hint = ", or write whole numbers (1 in place of 1.0) if they are classes" if whole else ""
        problems.append(
            f"{where} holds numbers such as {some(classes[:3])}; use task.kind=regression to predict them{hint}."
        )
    elif len(classes) > max(10, part.table.num_rows / 2):
        rows = part.table.num_rows
        part.account.notes.append(
            f"column '{column}' has {len(classes):,} different labels in {rows:,} rows: are they classes?"
        )
    if not several and (written := written_list(classes)) is not None:
        part.account.notes.append(
            f"column '{column}' has labels written as lists, such as {written}: are they classes?"
        )
    if not several and (joint := [name for name in classes if _is_joint(name, set(classes))]):
        part.account.notes.append(
            f"column '{column}' has labels made of others, such as '{joint[0]}': task.kind=multilabel learns them "
            "as several classes"
        )
    if absent := [name for name in classes if name.lower() in ABSENT]:
        part.account.notes.append(
            f"column '{column}' has the class {some(absent)}: if this means that there is no label, remove these rows"
        )
    return classes


def _are_numbers(classes: list[str]) -> bool:
    """Whether labels are numbers, and not all of them whole. Infinity beside others counts."""
    found = [name for name in classes if name.lower().lstrip("+-") not in ("inf", "infinity")]
    return all(re.fullmatch(NUMBER, name) for name in found) and not all(re.fullmatch(WHOLE, name) for name in found)


def _is_joint(name: str, classes: set[str]) -> bool:
    """Whether a label is made of other labels with a separator in between."""
    return any(sign in name and classes.issuperset(names_in(name, sign)) for sign in SEPARATORS)


def class_numbers(part: Part, classes: list[str], whose: str, column: str, problems: list[str]) -> pa.Table:
    """The table of a split with class numbers (int64) as labels. A label that is no class is a problem.

    Args:
        whose: who has these classes, for messages.
        column: name of the label column, for messages.
    """
    labels = part.table.column("label")
    known = pc.is_in(labels, pa.array(classes, pa.string()))
    strange = labels.filter(pc.invert(known))
    near = known_classes(strange[0].as_py(), classes) if len(strange) else None
    hint = f"; perhaps {near} is meant" if near else ""
    report(problems, part.where, column, labels, pc.invert(known), f"is not a class of {whose}: {some(classes)}{hint}")
    numbers = pc.index_in(labels, pa.array(classes, pa.string())).cast(pa.int64())
    return part.table.set_column(part.table.column_names.index("label"), "label", numbers)


def scores(part: Part, column: str, problems: list[str]) -> pa.Table:
    """The table of a split with numbers (float32) as labels. A label that is no finite number is a problem."""
    labels = part.table.column("label")
    wrong = pc.invert(pc.match_substring_regex(labels, f"^{NUMBER}$"))
    hint = "is not a number such as 3 or -0.5 (with a decimal point); task.kind=classification takes other labels"
    if report(problems, part.where, column, labels, wrong, hint):
        return part.table
    numbers = labels.cast(pa.float64()).cast(pa.float32())
    if report(problems, part.where, column, labels, pc.invert(pc.is_finite(numbers)), "is too large a number"):
        return part.table
    if len(pc.unique(numbers)) < (different := len(pc.unique(labels.cast(pa.float64())))):
        part.account.notes.append(
            f"the {different:,} different numbers in column '{column}' are {len(pc.unique(numbers)):,} in float32, "
            "which keeps 7 digits: take off what they have in common"
        )
    mean, spread = pc.mean(numbers).as_py(), pc.stddev(numbers).as_py()
    if spread > 10 or abs(mean) > 10:
        part.account.notes.append(
            f"the numbers in column '{column}' have mean {mean:.4g} and standard deviation {spread:.4g}; training is "
            "easier if you rescale them to about mean 0 and standard deviation 1"
        )
    return part.table.set_column(part.table.column_names.index("label"), "label", numbers)
