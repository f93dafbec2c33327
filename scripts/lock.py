"""Write the lists in ``requirements/`` from pyproject.toml. `make lock` calls this script.

  python scripts/lock.py              keep the listed versions where pyproject.toml allows them, add what is new
  python scripts/lock.py --upgrade    take the newest versions

Each version is listed with the hashes of all its files on PyPI: for every platform, and for Python 3.11 and later.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "requirements"
# setuptools-scm builds seqeval, which has no wheel.
BUILD = ("pip", "setuptools", "setuptools-scm", "hatchling", "editables")

# PyPI has torch for Linux with CUDA only. These are hashes of PyTorch's CPU builds, such as 2.13.0+cpu. `make venv`
# prefers such a build if PIP_FIND_LINKS names a folder that holds one.
CPU_BUILDS = {
    "2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"],  # Python 3.11, Linux, x86_64
}

HEADS = {
    "build": "# What builds and installs packages; `make venv` installs it first.\n",
    "dev": "# What the project, its tests and its tools import, except torch.\n",
    "torch": (
        "# torch, and the CUDA packages that its files for Linux on PyPI ask for. `make venv` passes this list as\n"
        "# constraints, so the CUDA packages are installed only where the chosen file of torch asks for them.\n"
    ),
}


def blocks(text: str) -> dict[str, str]:
    """The lines of each package in a list, by name. A package may have a version for each Python."""
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip()):
        if "==" in block:
            name = block.partition("==")[0]
            found[name] = f"{found.get(name, '')}{block}\n"
    return found


def compile_list(output: Path, *sources: str, stdin: str = "") -> dict[str, str]:
    """Resolve the sources with uv: the lines of each package. Versions in ``output`` are kept where they fit."""
    uv = Path(sys.executable).with_name("uv")
    flags = ["--universal", "--python-version=3.11", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    command = [str(uv), "pip", "compile", *sources, *flags, f"--output-file={output}"]
    done = subprocess.run(command, input=stdin, stderr=subprocess.PIPE, text=True, cwd=REPO)
    if done.returncode:
        sys.exit(done.stderr)
    return blocks(output.read_text())


def place(name: str, build: set[str]) -> str:
    """The name of the list that a package belongs to."""
    if re.fullmatch(r"torch|triton|(nvidia|cuda)-.*", name):
        return "torch"
    return "build" if name in build else "dev"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        everything, building = Path(scratch) / "all.txt", Path(scratch) / "build.txt"
        if "--upgrade" not in sys.argv[1:]:
            everything.write_text("".join(file.read_text() for file in FOLDER.glob("*.txt")))
        found = compile_list(everything, "pyproject.toml", "--extra=dev", "-", stdin="\n".join(BUILD))
        build = set(compile_list(building, "-", f"--constraints={everything}", stdin="\n".join(BUILD)))
    version = found["torch"].split()[0].partition("==")[2]
    more = [digest for digest in CPU_BUILDS.get(version, ()) if digest not in found["torch"]]  # uv keeps listed ones
    found["torch"] = found["torch"].rstrip() + "".join(f" \\\n    --hash=sha256:{d}" for d in more) + "\n"
    FOLDER.mkdir(exist_ok=True)
    for kind, head in HEADS.items():
        lines = [found[name] for name in sorted(found) if place(name, build) == kind]
        (FOLDER / f"{kind}.txt").write_text(f"{head}# Made by `make lock`; do not edit.\n{''.join(lines)}")
        print(f"requirements/{kind}.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
