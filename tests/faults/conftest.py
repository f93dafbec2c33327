"""Fixtures of the campaigns, and the table of counts at the end."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.campaigns import Campaign, lines_of_table, seed, table
from faults.warm import Command, Limits, Outcome


@pytest.fixture
def campaign() -> Iterator[Callable[[str], Campaign]]:
    """Makes a campaign; the test fails at its end if anything was changed or lost in it."""
    made: list[Campaign] = []

    def make(name: str) -> Campaign:
        made.append(Campaign(name))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["faults"] = {name: dict(counts) for name, counts in table.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, counts in getattr(node, "workeroutput", {}).get("faults", {}).items():
        table.setdefault(name, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if table:
        terminalreporter.section(f"faults (FAULTS_SEED={seed()})")
        for line in lines_of_table():
            terminalreporter.write_line(line)


Run = Callable[..., Command]


@pytest.fixture(scope="session", autouse=True)
def _quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
            patch.setenv(name, value)
        patch.setenv("DIFFORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_network_no_threads() -> None:
    """Replaces the fixture of all tests, which gives each test its own cache. Here tests share undisturbed runs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Starts a command of the project. Its output goes to a folder of the session."""
    scratch = tmp_path_factory.mktemp("output")

    def begin(program: str, *arguments: str, **more: Any) -> Command:
        return Command(program, *arguments, scratch=scratch, **more)

    return begin


@pytest.fixture(scope="session")
def undisturbed(start: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """(folder, outcome) of a complete run with the given overrides. Each is made once per session."""
    made: dict[tuple[str, ...], tuple[Path, Outcome]] = {}

    def of(*overrides: str) -> tuple[Path, Outcome]:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            start("train.py", *overrides, f"hydra.run.dir={folder}-first").wait()  # fills the cache
            limits = Limits(below=str(folder.parent))
            outcome = start("train.py", *overrides, f"hydra.run.dir={folder}", limits=limits).wait()
            assert outcome.code == 0, outcome.text
            made[overrides] = folder, outcome
        return made[overrides]

    return of
