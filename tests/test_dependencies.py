"""What the project installs: lower bounds that exclude known vulnerabilities, lists with hashes, and the audit."""

import re
import sys
import tomllib
from importlib.metadata import version
from typing import NamedTuple

import pytest
from conftest import REPO
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
REQUIRED = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
DEV = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}

# The first versions without a published vulnerability that matters here.
FLOORS = {
    "transformers": "5.3",  # CVE-2026-4372: code from a configuration
    "hydra-core": "1.3.6",  # CVE-2026-68508
    "torch": "2.10",  # CVE-2026-24747: weights_only loading runs code
    "sentencepiece": "0.2.1",
    "pillow": "12.2",
    "filelock": "3.20.3",
    "pyarrow": "23.0.1",
    "jinja2": "3.1.6",
    "lightning": "2.6.4",  # 2.6.2 and 2.6.3 were malicious
}


class Pin(NamedTuple):
    file: str
    version: str
    marker: str
    hashes: list[str]


def locked() -> dict[str, list[Pin]]:
    """The lines of ``requirements/`` by package. A package has several only if they are for different Pythons."""
    found: dict[str, list[Pin]] = {}
    for file in (REPO / "requirements").glob("*.txt"):
        for block in re.split(r"\n(?=[a-z0-9])", file.read_text()):
            if match := re.match(r"([a-z0-9.-]+)==(\S+)(?: ; ([^\\]+))?", block):
                hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
                found.setdefault(match[1], []).append(Pin(file.name, match[2], (match[3] or "").strip(), hashes))
    return found


@pytest.mark.parametrize("name", FLOORS)
def test_the_range_excludes_vulnerable_versions(name):
    floor = Version(FLOORS[name])
    bounds = [Version(s.version) for s in REQUIRED[name].specifier if s.operator == ">="]
    assert bounds and max(bounds) >= floor


@pytest.mark.parametrize("name", REQUIRED)
def test_the_installed_version_is_within_the_range(name):
    assert REQUIRED[name].specifier.contains(version(name), prereleases=True)


def test_every_requirement_is_locked_within_its_range_and_with_hashes():
    pins = locked()
    for name, requirement in (REQUIRED | DEV).items():
        assert pins[name]
        for pin in pins[name]:
            assert requirement.specifier.contains(pin.version, prereleases=True), (name, pin.version)
    assert [(name, pin.version) for name, several in pins.items() for pin in several if not pin.hashes] == []
    assert {"pip", "setuptools", "hatchling"} <= pins.keys()  # what `make venv` builds with is checked too


@pytest.mark.parametrize("python", ["3.11.0", "3.11.9", "3.12.4", "3.13.1"])
def test_a_python_gets_one_version_of_each_package(python):
    here = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    for name, several in locked().items():
        assert len({pin.file for pin in several}) == 1, f"{name} is in two lists"
        chosen = [pin for pin in several if not pin.marker or Marker(pin.marker).evaluate(here)]
        assert len(chosen) <= 1, f"{name} has {len(chosen)} versions for Python {python}"


def test_torch_is_locked_for_several_pythons_and_systems():
    assert len(locked()["torch"][0].hashes) > 10
    lines = (REPO / "requirements/dev.txt").read_text().splitlines()
    assert [line for line in lines if re.match("nvidia|triton|cuda", line)] == []


@pytest.fixture
def verdict(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPO / "scripts"), *sys.path])
    import audit

    return audit.verdict


def package(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "version": "1.0", "vulns": []} | more


FLAW = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}
UNKNOWN = {"name": "b", "skip_reason": "not found on PyPI"}


def test_the_audit_passes_packages_without_known_vulnerabilities(verdict):
    assert verdict([package("a"), package("b")]) == (0, ["2 packages audited, no known vulnerability"])


def test_the_audit_fails_on_a_known_vulnerability_and_names_it(verdict):
    status, lines = verdict([package("a", vulns=[FLAW]), package("b")])
    assert status == 1 and lines == ["vulnerable: a 1.0: PYSEC-2026-1, CVE-2026-1; fixed in 1.1"]


@pytest.mark.parametrize("answer", [[], [UNKNOWN]])
def test_the_audit_says_that_it_was_skipped_without_the_service(verdict, answer):
    status, lines = verdict(answer)
    assert status == 0 and lines[0].startswith("audit skipped: the vulnerability service cannot be reached")


def test_the_audit_fails_if_only_some_packages_could_be_looked_up(verdict):
    status, lines = verdict([package("a"), UNKNOWN])
    assert status == 1 and lines == ["not audited: b: not found on PyPI"]
