"""Check what a user installs: the files of diffora's wheel, and its command in an environment without the repository.

  python scripts/check_wheel.py dist              the newest wheel in dist, with the dependencies of this environment
  python scripts/check_wheel.py dist --all        also the sdist, and every program: a quickstart, a sweep, a report, …
  python scripts/check_wheel.py dist --install    pip installs the wheel and its dependencies from PyPI

`make wheel` builds both and calls this script with --all. The exit status is 1 if something is missing or fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

NEEDED = (
    "diffora/py.typed",
    "diffora/__main__.py",
    "diffora/conf/config.yaml",
    "diffora/conf/experiment/quickstart.yaml",
    "diffora/report/report.html.jinja",
    "hydra_plugins/diffora_table.py",
    *(f"diffora/assets/{name}/model.safetensors" for name in ("tiny", "tiny_vit", "tiny_llama", "tiny_sums")),
)
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"),
    *("conf/config.yaml", "src/diffora/py.typed", "train.py"),
)
"""What an sdist must have, besides what its wheel needs."""
TOP = {"src", "conf", "PKG-INFO", ".gitignore", "CITATION.cff", "evaluate.py", "report.py"} | {
    name.partition("/")[0] for name in SOURCES
}
"""All that an sdist may have at its top: no outputs, notebooks or environments."""

PLACE = """
import sys
from pathlib import Path
import diffora
from diffora.places import conf_dir
place = Path(diffora.__file__).resolve().parent
assert place.is_relative_to(Path(sys.prefix).resolve()), f"{place} is not in the environment"
assert conf_dir().is_relative_to(place), f"{conf_dir()} is not in the package"
"""
SHORT = (
    *("experiment=quickstart", "task.train_rows=96", "task.validation_rows=48"),
    *("search.epochs=1", "finetune.epochs=1", "finetune.warmup_steps=2"),
)
OWN_TASK = """
from diffora.tasks.glue import GlueTask

class Mine(GlueTask):
    pass
"""
Run = Callable[..., str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the wheel is")
    parser.add_argument("--all", action="store_true", help="the sdist too, and every program")
    parser.add_argument("--install", action="store_true", help="install the dependencies with pip")
    args = parser.parse_args()
    wheel = newest(args.folder, "diffora-*.whl")
    problems = missing(wheel)
    sdist = newest(args.folder, "diffora-*.tar.gz") if args.all else None
    if sdist is not None:
        problems += wrong_in_sdist(sdist)
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        bin_folder = environment(Path(scratch) / "environment", wheel, args.install)
        quick(command_in(bin_folder, Path(scratch) / "first"))
        if args.all:
            every_program(command_in(bin_folder, Path(scratch) / "a folder, é"), Path(scratch) / "a folder, é")
        if sdist is not None:
            other = environment(Path(scratch) / "from sdist", sdist, install=False)
            if differing := different(bin_folder, other):
                print(f"{sdist.name} installs other files than {wheel.name}: {', '.join(differing)}", file=sys.stderr)
                return 1
            quick(command_in(other, Path(scratch) / "second"))
    print(f"{wheel.name}: all files are there, and a dry run works outside the repository")
    if sdist is not None:
        print(f"{sdist.name} installs the same files; every program works from a folder with spaces in its name")
    return 0


def newest(folder: Path, pattern: str) -> Path:
    """The newest file of a pattern in a folder."""
    files = sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime)
    if not files:
        sys.exit(f"{folder} has no {pattern}; `make wheel` builds it")
    return files[-1].resolve()


def missing(wheel: Path) -> list[str]:
    """What a wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = [archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt")]
    lacks = [name for name in NEEDED if name not in names]
    lacks += [] if any(name.endswith("licenses/LICENSE") for name in names) else ["LICENSE"]
    lacks += [] if any("diffora = diffora.__main__:main" in text for text in scripts) else ["the command diffora"]
    return [f"{wheel.name} lacks {', '.join(lacks)}"] if lacks else []


def wrong_in_sdist(sdist: Path) -> list[str]:
    """What an sdist lacks, and what should not be in it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    problems = [f"{sdist.name} lacks {name}" for name in SOURCES if name not in names]
    junk = sorted(name for name in names if name and (name.split("/")[0] not in TOP or "__pycache__" in name))
    return problems + [f"{sdist.name} should not have {name}" for name in junk[:5]]


def environment(folder: Path, package: Path, install: bool) -> Path:
    """Make an environment with a wheel or an sdist, and return its folder of programs.

    Args:
        install: install the dependencies as well. Otherwise those of this environment are used, offline.
    """
    venv.create(folder, symlinks=True)
    where = {"base": str(folder), "platbase": str(folder)}
    programs = Path(sysconfig.get_path("scripts", "venv", vars=where))
    site = Path(sysconfig.get_path("purelib", "venv", vars=where))
    if not install:
        # Python does not read the .pth files of a folder that a .pth file names, such as the one that makes this
        # environment import diffora from the repository.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = [] if install else ["--no-deps", "--no-index", "--no-build-isolation"]
    python = str(programs / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *offline, str(package)], check=True, env=clean())
    subprocess.run([python, "-c", PLACE], check=True, env=clean(), cwd=folder)
    return programs


def clean() -> dict[str, str]:
    """The environment variables of a user without a home, a hub and the repository."""
    left_out = ("HOME", "VIRTUAL_ENV", "XDG_CACHE_HOME")
    kept = {key: text for key, text in os.environ.items() if not key.startswith("PYTHON") and key not in left_out}
    return kept | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def command_in(programs: Path, folder: Path) -> Run:
    """A function that runs ``diffora`` in a folder and returns what it printed; ``status`` is what it should return."""
    folder.mkdir()

    def run(*arguments: str, status: int = 0) -> str:
        print("  diffora", *arguments, flush=True)
        command = [str(programs / "diffora"), *arguments]
        done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=1800)
        if done.returncode != status or "Traceback" in done.stderr:
            sys.exit(f"diffora {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout if status == 0 else done.stderr

    return run


def quick(run: Run) -> None:
    """The version, and a dry run."""
    assert run("--version").startswith("diffora ")
    assert "memory (estimate)" in run("train", "experiment=quickstart", "dry_run=true")


def every_program(run: Run, folder: Path) -> None:
    """What a user does: a run, its evaluation and export, a selection, a sweep, own choices and classes, a report."""
    run("train", "experiment=quickstart", "hydra.run.dir=quickstart")
    record = json.loads((folder / "quickstart/run.json").read_text())
    run("evaluate", "run=quickstart", "output=evaluated")
    again = json.loads((folder / "evaluated/metrics.json").read_text())["metrics"]["validation"]["accuracy"]
    assert math.isclose(again, record["metrics"]["validation/accuracy"], abs_tol=1e-5), (again, record["metrics"])

    run("export", "quickstart", "form=merged", "to=merged")
    assert (folder / "merged/config.json").is_file()
    assert "not logged in" in run("push", "quickstart", "somebody/something", status=1)

    assert "modules selected" in run("select", *SHORT, "hydra.run.dir=selected")
    run("train", *SHORT[:3], "finetune.epochs=1", "method.selection=selected/selection.json", "hydra.run.dir=used")
    assert "all 2 runs are complete" in run("train", "-m", *SHORT, "seed=0,1")

    (folder / "conf/task").mkdir(parents=True)
    (folder / "my_task.py").write_text(OWN_TASK)
    (folder / "conf/task/mine.yaml").write_text("defaults: [paraphrase]\n_target_: my_task.Mine\n")
    run("train", "--config-dir", "conf", *SHORT, "task=mine", "hydra.run.dir=mine")
    assert "mine" in run("train", "--config-dir", "conf", "--help")
    assert "did you mean mine?" in run("train", "--config-dir", "conf", "task=min", status=1)

    assert "6 runs" in run("report", ".", "output=report")
    assert (folder / "report/index.html").is_file()
    assert "did you mean train?" in run("trian", status=1)
    assert "experiment=quickstart" in run("train", "task=mrpc", status=1)


def different(programs: Path, others: Path) -> list[str]:
    """Files of the package that two environments do not have in common, or that differ."""
    found = []
    for folder in (programs.parent, others.parent):
        site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
        files = [file for name in ("diffora", "hydra_plugins") for file in (site / name).rglob("*") if file.is_file()]
        found.append({str(f.relative_to(site)): f.read_bytes() for f in files if f.suffix != ".pyc"})
    first, second = found
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


if __name__ == "__main__":
    sys.exit(main())
