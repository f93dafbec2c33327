"""What the project installs: lower bounds with known vulnerabilities behind them, lists with hashes, the audit."""

import re
import sys
import tomllib
from importlib.metadata import version

import pytest
from conftest import REPO
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


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package in ``requirements/``."""
    found: dict[str, tuple[str, list[str]]] = {}
    for file in (REPO / "requirements").glob("*.txt"):
        for block in re.split(r"\n(?=[a-z0-9])", file.read_text()):
            if match := re.match(r"([a-z0-9.-]+)==(\S+)", block):
                assert match[1] not in found, f"{match[1]} is in two lists"
                found[match[1]] = (match[2], re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block))
    return found


@pytest.mark.parametrize("name", FLOORS)
def test_vulnerable_versions_are_outside_the_range(name):
    floor = Version(FLOORS[name])
    bounds = [Version(s.version) for s in REQUIRED[name].specifier if s.operator == ">="]
    assert bounds and max(bounds) >= floor


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_installed_satisfies_the_range(name):
    assert REQUIRED[name].specifier.contains(version(name), prereleases=True)


def test_every_requirement_is_locked_within_its_range_and_with_hashes():
    versions = locked()
    for name, requirement in (REQUIRED | DEV).items():
        assert requirement.specifier.contains(versions[name][0], prereleases=True), name
    assert [name for name, (_, hashes) in versions.items() if not hashes] == []
    assert {"pip", "setuptools", "hatchling"} <= versions.keys()  # what `make venv` builds with is checked too


def test_torch_is_locked_for_several_pythons_and_systems():
    assert len(locked()["torch"][1]) > 10
    assert not [
        n for n in (REPO / "requirements/dev.txt").read_text().splitlines() if re.match("nvidia|triton|cuda", n)
    ]


@pytest.fixture
def verdict(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPO / "scripts"), *sys.path])
    import audit

    return audit.verdict


def package(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "version": "1.0", "vulns": []} | more


FLAW = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}
UNKNOWN = {"name": "b", "skip_reason": "not found on PyPI"}


def test_the_audit_passes_what_has_no_known_vulnerability(verdict):
    assert verdict([package("a"), package("b")]) == (0, ["2 packages audited, no known vulnerability"])


def test_the_audit_fails_on_a_known_vulnerability_and_names_it(verdict):
    status, lines = verdict([package("a", vulns=[FLAW]), package("b")])
    assert status == 1 and lines == ["vulnerable: a 1.0: PYSEC-2026-1, CVE-2026-1; fixed in 1.1"]


@pytest.mark.parametrize("answer", [[], [UNKNOWN]])
def test_the_audit_says_that_it_was_skipped_where_the_service_is_not_there(verdict, answer):
    status, lines = verdict(answer)
    assert status == 0 and lines[0].startswith("audit skipped: the vulnerability service cannot be reached")


def test_a_package_that_alone_could_not_be_looked_up_fails_the_audit(verdict):
    status, lines = verdict([package("a"), UNKNOWN])
    assert status == 1 and lines == ["not audited: b: not found on PyPI"]
