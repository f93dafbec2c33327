"""Full disks and limits on file sizes give one message. With more space, the same run then ends as usual."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.campaigns import CHANGED, HANDLED, LOST, TINY, chance, difference, share
from faults.warm import Limits

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


class SmallDisk:
    """A file system of a few kilobytes in memory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def mount(self, kilobytes: int) -> Path:
        if self.place.is_mount():
            subprocess.run(["umount", "-l", self.place], check=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", self.place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return self.place

    def enlarge(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=512m", self.place], check=True)

    def unmount(self) -> None:
        if self.place.is_mount():
            subprocess.run(["umount", "-l", self.place], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


def kilobytes(folder: Path) -> int:
    """Size in pages of 4 kB, as a file system in memory counts it."""
    return sum(-(-f.stat().st_size // 4096) * 4 for f in folder.rglob("*") if f.is_file())


def complaint(outcome, words: tuple[str, ...]) -> str | None:
    """What is wrong with the outcome of a run without space. It must fail with a message that says why."""
    if outcome.code == 0:
        return "it succeeded without room"
    if outcome.broken:
        return outcome.broken
    said = " ".join(outcome.errors).lower()
    return None if any(word in said for word in words) else f"the message does not say why: {said[:300]}"


FULL = ("no space left", "disk", "space")
TOO_LARGE = ("file too large", "too large", "ulimit", "limit")


def test_a_run_directory_on_a_full_disk(start, undisturbed, campaign, disk):
    whole, _ = undisturbed(*TINY)
    most, full, random = kilobytes(whole), campaign("full disk under the run"), chance("disk")
    for number in range(share(16)):
        size = max(4, int(most * (number + random.random()) / share(16)))  # of all stages of the run
        folder = disk.mount(size) / "run"
        arguments = (*TINY, f"hydra.run.dir={folder}")
        stopped = start("train.py", *arguments).wait()
        # A run may fit although its final size is larger, because older checkpoints are removed in between.
        wrong = None if stopped.code == 0 else complaint(stopped, FULL)
        disk.enlarge()
        case = f"{size} of {most} kB"
        again = start("train.py", *arguments, "resume=true").wait()
        what = wrong or again.broken or (again.text if again.code else difference(folder, whole))
        full.count(HANDLED if what is None else LOST if wrong or again.code else CHANGED, case, what or "")


def test_a_limit_on_the_size_of_files(start, undisturbed, campaign, tmp_path):
    whole, _ = undisturbed(*TINY)
    sizes = sorted(f.stat().st_size for f in whole.rglob("*") if f.is_file() and f.stat().st_size)
    limits, random = campaign("limit on the size of files"), chance("limit")
    for number in range(share(8)):
        size, folder = random.choice(sizes) - 1, tmp_path / f"run{number}"
        arguments = (*TINY, f"hydra.run.dir={folder}")
        stopped = start("train.py", *arguments, limits=Limits(file_size=size)).wait()
        wrong = None if stopped.code == 0 else complaint(stopped, TOO_LARGE)
        again = start("train.py", *arguments, "resume=true").wait()
        what = wrong or again.broken or (again.text if again.code else difference(folder, whole))
        outcome = HANDLED if what is None else LOST if wrong or again.code else CHANGED
        limits.count(outcome, f"{size} bytes", what or "")


def test_a_cache_on_a_full_disk(start, undisturbed, campaign, disk, tmp_path):
    whole, _ = undisturbed(*TINY)
    cache = tmp_path / "whole-cache"
    start("train.py", *TINY, f"hydra.run.dir={tmp_path / 'first'}", env={"DIFFORA_CACHE": str(cache)}).wait()
    most, full, random = kilobytes(cache), campaign("full disk under the cache"), chance("cache")
    for number in range(share(4)):
        size = max(4, int(most * random.random()) // 4 * 4)
        env = {"DIFFORA_CACHE": str(disk.mount(size) / "cache")}
        folder = tmp_path / f"run{number}"
        arguments = (*TINY, f"hydra.run.dir={folder}")
        stopped = start("train.py", *arguments, env=env).wait()
        wrong = None if stopped.code == 0 else complaint(stopped, FULL)
        disk.enlarge()
        again = start("train.py", *arguments, "resume=true", env=env).wait()
        what = wrong or again.broken or (again.text if again.code else difference(folder, whole))
        outcome = HANDLED if what is None else LOST if wrong or again.code else CHANGED
        full.count(outcome, f"{size} of {most} kB", what or "")


def test_a_report_on_a_full_disk(start, undisturbed, campaign, disk):
    whole, _ = undisturbed(*TINY)
    output = disk.mount(4096) / "report"
    assert start("report.py", str(whole.parent), f"output={output}").wait().code == 0
    most, full, random = kilobytes(output), campaign("full disk under the report"), chance("report")
    for _ in range(share(4)):
        size = max(4, int(most * random.random()) // 4 * 4)
        disk.mount(size)
        stopped = start("report.py", str(whole.parent), f"output={output}").wait()
        wrong = complaint(stopped, FULL)
        disk.enlarge()
        again = start("report.py", str(whole.parent), f"output={output}").wait()
        what = wrong or again.broken or (again.text if again.code else None)
        full.count(HANDLED if what is None else LOST, f"{size} of {most} kB", what or "")
