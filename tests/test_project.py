"""The project's own files agree with each other: Makefile, CI, contributing guide, citation, changelog and wheel."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import REPO
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import diffora

MAKEFILE = (REPO / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
WORKFLOW = REPO / ".github" / "workflows" / "ci.yml"
FORMS = sorted(file for file in (REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config")


def targets_named_in(text: str) -> set[str]:
    """Targets of `make` commands in a text, in backticks or at the start of a line."""
    calls = re.findall(r"(?:`|^\s*)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    return {word for call in calls for word in call.split()}


def test_every_target_has_a_line_of_help_and_is_phony():
    helped = set(re.findall(r"^([a-z][a-z-]*):.*## ", MAKEFILE, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert TARGETS == helped == phony


def test_the_checks_before_a_merge_are_those_of_ci():
    (check,) = re.findall(r"^check: ([a-z ]+) ##", MAKEFILE, re.MULTILINE)
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    ours = set(jobs["static"]["strategy"]["matrix"]["target"])
    for job in jobs.values():
        ours |= targets_named_in("\n".join(step.get("run", "") for step in job["steps"]))
    assert set(check.split()) == ours
    assert {"lint", "audit", "docs", "test"} == targets_named_in((REPO / ".ci" / "run").read_text())


@pytest.mark.parametrize("name", [".ci/run", "CONTRIBUTING.md", "README.md", ".github/pull_request_template.md"])
def test_named_targets_exist(name):
    named = targets_named_in((REPO / name).read_text())
    assert named and named <= TARGETS


def test_ci_uses_pinned_actions_with_the_least_rights_on_supported_pythons():
    content = yaml.safe_load(WORKFLOW.read_text())
    assert content["permissions"] == {"contents": "read"}
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions and [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
    assert all("permissions" not in job for job in content["jobs"].values())
    pythons = content["jobs"]["tests"]["strategy"]["matrix"]["python"]
    supported = SpecifierSet(PROJECT["requires-python"])
    assert len(pythons) >= 2 and all(Version(python) in supported for python in pythons)
    assert any(version in PROJECT["requires-python"] for version in pythons)  # the oldest is among them


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_has_what_github_needs(file):
    form = yaml.safe_load(file.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "checkboxes", "dropdown")
        assert field["attributes"].get("label" if field["type"] != "markdown" else "value")


def test_there_are_forms_for_bugs_features_and_questions():
    assert [file.stem for file in FORMS] == ["bug", "feature", "question"]


def test_the_hooks_use_programs_that_make_lint_uses():
    (repository,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        assert f"$(BIN)/{hook['entry'].split('/')[-1].split()[0]}" in MAKEFILE


def test_the_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == diffora.__version__
    assert citation["license"] == PROJECT["license"]
    titles = [reference["title"] for reference in citation["references"]]
    assert any(title.startswith("DiffoRA") for title in titles) and any("Masked Low-Rank" in title for title in titles)


def test_no_file_of_the_package_is_longer_than_contributing_says():
    lengths = {file: len(file.read_text().splitlines()) for file in (REPO / "src").rglob("*.py")}
    assert len(lengths) > 100 and not {file: n for file, n in lengths.items() if n > 400}


def test_the_changelog_keeps_its_form():
    """Keep a Changelog 1.1: versions from the newest, each with sections of these kinds."""
    text = (REPO / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_wheel_works_outside_the_repository(tmp_path):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(REPO)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    check = [sys.executable, str(REPO / "scripts" / "check_wheel.py"), str(tmp_path)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a dry run works outside the repository" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_program_works_from_wheel_and_sdist(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, timeout=120, cwd=REPO)
    check = [sys.executable, str(REPO / "scripts" / "check_wheel.py"), str(tmp_path), "--all"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installs the same files" in done.stdout


def test_a_wheel_without_its_files_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "diffora-0.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr("diffora/__init__.py", "")
    check = [sys.executable, str(REPO / "scripts" / "check_wheel.py"), str(tmp_path)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "lacks diffora/py.typed" in done.stderr
