"""Checks of the label column, which brings every way of writing labels to the task's own class numbers.

Labels may be the task's numbers, class names, or numbers of a file that numbers the classes in its own order.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.labels import class_names, in_order, known_classes
from diffora.tasks.sources.check_values import TEXT_TYPES, check_utf8, report
from diffora.tasks.sources.readers import NUMBER
from diffora.tasks.spec import SCORE_RANGE, TaskSpec


@dataclass(frozen=True)
class Numbering:
    """How a file numbers its classes.

    Attributes:
        names: class names in the file's order.
        places: the task's class number for each of these names.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]

    @property
    def moves(self) -> bool:
        """Whether the file numbers the classes in another order than the task."""
        return self.places != tuple(range(len(self.places)))

    def __str__(self) -> str:
        return ", ".join(f"{i} is {name}" for i, name in enumerate(self.names))


def numbering_of(spec: TaskSpec, table: pa.Table, file: str, problems: list[str]) -> Numbering | None:
    """How a file numbers the classes; None if it does not say, or if its labels are class names."""
    if "label" not in table.column_names or (names := class_names(table.schema, "label")) is None:
        return None
    if table.column_names.count("label") == 1 and table.num_rows and has_names(spec, table):
        return None
    where = f"{file}: column 'label'"
    if spec.is_regression:
        problems.append(f"{where} holds classes ({', '.join(names[:10])}), expected {spec.expected_label}.")
        return None
    places = in_order(names, spec.label_names, f"{where}: its classes are", "the task's are", problems, or_numbers=True)
    return None if places is None else Numbering(tuple(names), tuple(places))


def has_names(spec: TaskSpec, table: pa.Table) -> bool:
    """Whether the labels of a file are class names, judged by the first row."""
    return str(table.column("label")[0].as_py()).strip() in spec.label_names


def is_unlabelled(table: pa.Table) -> bool:
    """Whether a table has no labels: no such column, or every row is empty or holds GLUE's mark -1."""
    if table.column_names.count("label") != 1:
        return "label" not in table.column_names
    try:
        values = pc.unique(table.column("label").cast(pa.string())).drop_null().to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return False  # the check of the column will report its type
    return all(value.strip() in ("-1", "-1.0", "") for value in values)


def check_label(
    spec: TaskSpec, column: pa.ChunkedArray, file: str, numbering: Numbering | None, problems: list[str]
) -> pa.ChunkedArray:
    """The labels as the task's class numbers (int64), or as scores (float32) for regression.

    Args:
        column: class numbers of the task, class numbers of the file, or class names.
        file: for messages.
        numbering: how the file numbers the classes, from `numbering_of`.
        problems: grows by a message for the first row of each kind of fault.

    Returns:
        The column; its content is meaningless if ``problems`` grew.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, expected = column.type, spec.expected_label
    if numbering is not None:
        expected = "one of " + ", ".join(f"{i} ({label})" for i, label in enumerate(numbering.names))
    if any(test(kind) for test in TEXT_TYPES):  # from CSV, or class names
        before, column = len(problems), check_utf8(column, file, "label", problems)
        if len(problems) > before:
            return column
        column = pc.utf8_trim_whitespace(column)
        is_number = pc.match_substring_regex(column, f"^{NUMBER}$")
        if spec.label_names and pc.any(known := pc.is_in(column, pa.array(spec.label_names))).as_py():
            return _check_names(spec, column, known, is_number, file, problems)
        near = _nearest(spec, column, is_number)
        if report(problems, file, "label", column, pc.invert(is_number), f"is not {expected}{near}"):
            return column
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        problems.append(f"{file}: column 'label' holds {kind}, expected {expected}.")
        return column
    return _check_numbers(spec, column, file, numbering, expected, problems)


def _check_numbers(
    spec: TaskSpec,
    column: pa.ChunkedArray,
    file: str,
    numbering: Numbering | None,
    expected: str,
    problems: list[str],
) -> pa.ChunkedArray:
    """`check_label` for numbers, or texts of numbers."""
    low, high = SCORE_RANGE if spec.is_regression else (0, spec.num_labels - 1)
    if numbering is not None:
        high = len(numbering.names) - 1
    number = column.cast(pa.float64(), safe=False)  # not safe: a label of 2^60 gets a message below, not an exception
    if report(problems, file, "label", column, pc.is_null(number), f"in place of a label, expected {expected}"):
        return column
    unlabelled = pc.equal(number, -1.0)
    hint = "marks an unlabelled row (GLUE's test sets have no public labels); only labelled rows can be used"
    outside = pc.or_(pc.or_(pc.less(number, low), pc.greater(number, high)), pc.is_nan(number))
    if not spec.is_regression:
        outside = pc.or_(outside, pc.not_equal(number, pc.floor(number)))
    found = report(problems, file, "label", column, unlabelled, hint)
    found |= report(problems, file, "label", column, pc.and_not(outside, unlabelled), f"is not {expected}")
    if found:
        return column
    number = number.cast(pa.float32() if spec.is_regression else pa.int64(), safe=False)
    if numbering is not None and numbering.moves:
        number = pa.chunked_array([pa.array(numbering.places, pa.int64()).take(number.combine_chunks())])
    return number


def _check_names(
    spec: TaskSpec,
    column: pa.ChunkedArray,
    known: pa.ChunkedArray,
    is_number: pa.ChunkedArray,
    file: str,
    problems: list[str],
) -> pa.ChunkedArray:
    """`check_label` for class names.

    Args:
        known: which rows hold a class name of the task.
        is_number: which rows hold a number.
    """
    if report(
        problems, file, "label", column, pc.is_null(column), f"in place of a label, expected {spec.expected_label}"
    ):
        return column
    if is_number[0].as_py():
        mixed, what = pc.invert(is_number), "is not a number, but the labels of earlier rows are numbers"
    else:
        mixed, what = is_number, "is a number, but the labels of other rows are names"
    strange = pc.invert(pc.or_(known, is_number))
    found = report(problems, file, "label", column, mixed, what)
    if not is_number[0].as_py():
        near = _nearest(spec, column, pc.or_(known, is_number))
        found |= report(problems, file, "label", column, strange, f"is not {spec.expected_label}{near}")
    return column if found else pc.index_in(column, pa.array(spec.label_names)).cast(pa.int64())


def _nearest(spec: TaskSpec, column: pa.ChunkedArray, right: pa.ChunkedArray) -> str:
    """Text that suggests a class name for the first row that is not ``right``, to append to a message; may be ""."""
    row = pc.index(pc.fill_null(right, True), False).as_py()
    near = known_classes(column[row].as_py(), spec.label_names) if row >= 0 else None
    return f"; perhaps {near} is meant" if near else ""
