"""Reading files that may be damaged: limits of size and depth, no aliases or tags, and one message with the file."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffora import files
from diffora.errors import UserError
from diffora.files import parse_yaml, read_json, read_text, read_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_values_are_read_from_json_and_from_yaml(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "value.json"
    file.write_text(json.dumps(value))
    assert read_json(file) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not text in UTF-8"),
        (b"\x00" * 50, "is not JSON"),
        (b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "is nested too deeply"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_json_that_is_damaged_has_one_message(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file} {message}") and "\n" not in str(caught.value)


def test_a_hundred_levels_are_read(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100 + "]" * 100)
    (tmp_path / "x.yaml").write_text("[" * 100 + "]" * 100)
    assert read_json(tmp_path / "x.json") == read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E5", -2e5),
        ("'1e-3'", "1e-3"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("encoder.layer.*", "encoder.layer.*"),
        ("a & b", "a & b"),
        ("", None),
    ],
)
def test_yaml_has_plain_values_and_interpolations_stay_text(tmp_path, text, value):
    assert parse_yaml(text, tmp_path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", "line 2: YAML aliases (*x) are not read"),
        ("<<: *x", "YAML aliases"),
        ("[" * 101 + "]" * 101, "is nested too deeply"),
        ("- " * 101 + "a", "is nested too deeply"),
        ("[" * 500_000, "is nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: !x 1", "is not YAML"),
        ("a: [", "is not YAML"),
        ("a: 2026-13-45", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
        ("---\na: 1\n---\nb: 1", "is not YAML"),
    ],
)
def test_yaml_that_is_damaged_or_hostile_has_one_message(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_regular_files_of_limited_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match=f"{place} is not a regular file"):
            read_json(place)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "nothing")
    (tmp_path / "long").write_text("x" * 11)
    assert read_text(tmp_path / "long", 11) == "x" * 11
    monkeypatch.setattr(files, "MOST_JSON", 2**20)
    (tmp_path / "large.json").write_text("1" * (2**20 + 1))
    with pytest.raises(UserError, match="is too large: at most 1 MB"):
        read_json(tmp_path / "large.json")
