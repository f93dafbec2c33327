"""Check a wheel of diffora: its files, and a dry run from an environment that has no repository.

  python scripts/check_wheel.py dist              the newest wheel in dist, with the dependencies of this environment
  python scripts/check_wheel.py dist --install    pip installs the wheel and its dependencies from PyPI

`make wheel` builds a wheel and calls this script. The exit status is 1 if something is missing or the dry run fails.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

NEEDED = (
    "diffora/py.typed",
    "diffora/conf/config.yaml",
    "diffora/conf/experiment/quickstart.yaml",
    "diffora/report/report.html.jinja",
    "hydra_plugins/diffora_table.py",
    *(f"diffora/assets/{name}/model.safetensors" for name in ("tiny", "tiny_vit", "tiny_llama")),
)

# What runs inside the environment: a dry run of the quickstart, composed from the wheel's own configuration.
PROGRAM = """
import sys
from pathlib import Path
import diffora
place = Path(diffora.__file__).resolve().parent
assert place.is_relative_to(Path(sys.prefix).resolve()), f"{place} is not in the environment"
from diffora.files import conf_dir
assert conf_dir().is_relative_to(place), f"{conf_dir()} is not in the package"
from hydra import compose, initialize_config_dir
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    cfg = compose("config", ["experiment=quickstart", "dry_run=true"])
from diffora.run.experiment import run
record = run(cfg, Path("run")).record
assert record["status"] == "dry_run" and record["params"]["adapter"] > 0, record
"""


def missing(wheel: Path) -> list[str]:
    """Names of needed files that a wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    return [name for name in NEEDED if name not in names]


def environment(folder: Path, wheel: Path, install: bool) -> Path:
    """Make an environment with the wheel and return its interpreter."""
    venv.create(folder, with_pip=install, symlinks=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if install:
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
        return python
    where = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=where))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Dependencies only: Python does not read the .pth files of a folder that a .pth file names, such as the one that
    # makes this environment import diffora from the repository.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the wheel is")
    parser.add_argument("--install", action="store_true", help="install the dependencies with pip")
    args = parser.parse_args()
    wheels = sorted(args.folder.glob("diffora-*.whl"), key=lambda file: file.stat().st_mtime)
    if not wheels:
        print(f"{args.folder} has no wheel of diffora; `make wheel` builds one", file=sys.stderr)
        return 1
    wheel = wheels[-1].resolve()
    if lacks := missing(wheel):
        print(f"{wheel.name} lacks {', '.join(lacks)}", file=sys.stderr)
        return 1
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(Path(scratch) / "environment", wheel, args.install)
        program = [str(python), "-c", PROGRAM]
        if status := subprocess.run(program, cwd=scratch, env=clean | {"HF_HUB_OFFLINE": "1"}).returncode:
            return status
    print(f"{wheel.name}: all files are there, and a dry run works outside the repository")
    return 0


if __name__ == "__main__":
    sys.exit(main())
