"""Folders made by an attacker: nothing in them is executed, and each is refused soon with a message."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffora.records import write_record
from diffora.run.record import read_record
from faults.campaigns import HANDLED, LOST, TINY, chance, share
from faults.warm import Limits, Outcome

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

ASSETS = Path(__file__).parents[2] / "src" / "diffora" / "assets"
PATIENCE = 60  # seconds that a refusal may take at most, beside other work
MEMORY = 12 * 2**30  # bytes that a process may map, so that an endless file cannot use all memory of the machine


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that exists only if something in a hostile folder was executed."""
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def good(undisturbed, start, tmp_path_factory) -> dict[str, Path]:
    """Complete runs: one with an adapter in PEFT's format, and one with our own file beside it."""
    bitfit = [o for o in TINY if not o.startswith(("search.", "finetune.dropout"))]
    return {"run": undisturbed(*TINY)[0], "own": undisturbed(*bitfit, "method=bitfit")[0]}


def replaced(file: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by something else."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    write(file)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


THINGS: dict[str, Callable[[Path], object]] = {
    "a directory": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a sparse file of a terabyte": sparse,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "no permission": lambda path: (path.write_text("{}"), path.chmod(0)),
    "ten thousand brackets": lambda path: path.write_text("[" * 10_000),
    "ten thousand opened keys": lambda path: path.write_text('{"a":' * 10_000 + "1" + "}" * 10_000),
    "aliases of aliases": lambda path: path.write_text(
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    ),
    "a pickle that runs a program": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch CANARY'\ntR."),
    "a YAML tag that runs a program": lambda path: path.write_text(
        "task: !!python/object/apply:os.system ['touch CANARY']\n"
    ),
    "a number of a million digits": lambda path: path.write_text('{"a": ' + "9" * 1_000_000 + "}"),
    "not a number": lambda path: path.write_text('{"seed": NaN, "rank": Infinity, "r": -1e999}'),
    "zero bytes": lambda path: path.write_bytes(bytes(4096)),
    "half of a surrogate pair": lambda path: path.write_text('{"status": "\\ud800", "selected": ["\\ud800"]}'),
}

PLACES = {  # the replaced file, and the command that reads it
    "run.json": "evaluate report resume",
    "config.yaml": "evaluate report resume",
    "selection.json": "selection report resume",
    "search.json": "resume",
    "trajectory.json": "report",
    "adapter/adapter_config.json": "evaluate adapter",
    "adapter/adapter_model.safetensors": "evaluate adapter",
    "checkpoints/finetune-0009-0123456789ab.ckpt": "resume",
    ".lock": "resume",
}


class Commands:
    """The commands that a user may run on a received folder."""

    def __init__(self, start: Callable, tmp_path: Path, canary: Path) -> None:
        self.start, self.tmp_path, self.canary = start, tmp_path, canary

    def use(self, how: str, run: Path) -> Outcome:
        out = self.tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        arguments = {
            "evaluate": ("evaluate.py", f"run={run}", f"output={out}"),
            "adapter": ("evaluate.py", f"adapter={run}/adapter", "model=tiny", "task=paraphrase", f"output={out}"),
            "report": ("report.py", str(run.parent), f"output={out}"),
            "resume": ("train.py", *TINY, f"hydra.run.dir={run}", "resume=true"),
            "selection": ("train.py", *TINY, f"method.selection={run}/selection.json", f"hydra.run.dir={out}"),
            "model": ("train.py", *MODEL, f"model.path={run}", f"hydra.run.dir={out}"),
        }[how]
        environment = {"PATH": f"{self.tmp_path}:{os.environ['PATH']}"}
        return self.start(*arguments, cwd=self.tmp_path, env=environment, limits=Limits(memory=MEMORY)).wait(PATIENCE)

    def judge(self, campaign, how: str, run: Path, case: str, refused: bool = False) -> None:
        outcome = self.use(how, run)
        left = (os.path.join(place, "CANARY") for place, _, names in os.walk(self.tmp_path) if "CANARY" in names)
        ran = [str(file) for file in (self.canary, *left) if os.path.exists(file)]
        if ran:
            campaign.count(LOST, case, f"code was executed: {ran}")
            for file in ran:
                Path(file).unlink()
        elif outcome.broken:
            campaign.count(LOST, case, outcome.broken)
        elif refused and outcome.code == 0:
            campaign.count(LOST, case, "accepted")
        else:
            campaign.count(HANDLED, case)


MODEL = [o for o in TINY if not o.startswith(("search.", "finetune.dropout"))]
MODEL += ["method=lora", "model=hf", "finetune.epochs=1"]


@pytest.fixture
def commands(start, tmp_path, canary) -> Commands:
    return Commands(start, tmp_path, canary)


@pytest.fixture
def copy(good, tmp_path) -> Callable[..., Path]:
    def make(which: str = "run") -> Path:
        folder = tmp_path / "arrived" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good[which], folder)
        return folder

    return make


@pytest.mark.parametrize("place", PLACES)
def test_other_things_in_place_of_a_file(place, commands, copy, campaign):
    counts = campaign(f"hostile: in the place of {place.partition('-')[0]}")
    for how in PLACES[place].split():
        for thing in chance(place, how).sample(list(THINGS), share(len(THINGS))):
            write = THINGS[thing]
            folder = copy()
            if how == "resume" and place not in ("run.json", "config.yaml"):
                write_record(folder, (read_record(folder) or {}) | {"status": "running"})
            replaced(folder / place, write)
            commands.judge(counts, how, folder, f"{how} with {thing} in the place of {place}")


def targets(canary: Path) -> dict[str, dict[str, object]]:
    """Sections that name functions which must not be called."""
    return {
        "a program": {"_target_": "subprocess.Popen", "args": ["touch", str(canary)]},
        "a shell": {"_target_": "os.system", "command": f"touch {canary}"},
        "a class of the folder": {"_target_": "evil.Evil"},
        "a function of this package": {"_target_": "diffora.files.write_text", "path": str(canary), "text": ""},
        "a module of this package with a program in it": {"_target_": "diffora.run.record.subprocess.Popen"},
        "a nested target": {"_target_": "diffora.tasks.glue.GlueTask", "x": {"_target_": "os.system", "c": "touch"}},
        "a number": {"_target_": 5},
        "a list": {"_target_": ["os", "system"]},
        "hydra itself": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", "_args_": ["touch"]}},
    }


def evil(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    (folder / "evil.sh").write_text(f"#!/bin/sh\n: > '{canary}'\n")
    (folder / "evil.sh").chmod(0o755)
    (folder / "__init__.py").write_text((folder / "evil.py").read_text())


def test_targets_in_files_are_not_called(commands, copy, canary, tmp_path, campaign):
    import yaml

    counts = campaign("hostile: _target_ in files")
    for section in ("task", "method"):
        for name, target in targets(canary).items():
            folder = copy()
            evil(folder, canary), evil(tmp_path, canary)
            cfg = yaml.safe_load((folder / "config.yaml").read_text())
            # Popen takes a mapping's keys as the command line, so the first one is a program.
            cfg[section] = {
                str(folder / "evil.sh"): 1,
                **target,
                **{k: v for k, v in cfg[section].items() if k not in target},
            }
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
            for how in ("evaluate", "report"):
                commands.judge(counts, how, folder, f"{how}, {section}._target_ is {name}")
    for name, target in targets(canary).items():
        folder = copy("own")
        evil(folder / "adapter", canary), evil(tmp_path, canary)
        side = folder / "adapter" / "diffora.json"
        content = json.loads(side.read_text())

        def put(node: object, value: object = target) -> object:
            if isinstance(node, dict):
                return {k: put(v) for k, v in node.items()} | (value if "_target_" in node else {})
            return [put(v) for v in node] if isinstance(node, list) else node

        side.write_text(json.dumps(put(content)))
        for how in ("evaluate", "adapter"):
            commands.judge(counts, how, folder, f"{how}, diffora.json's _target_ is {name}", refused=True)


MAY_BE_USED = ("auto_map in config.json", "auto_map of the tokenizer", "a tokenizer class of its own")


def test_models_that_bring_code(commands, canary, tmp_path, campaign):
    counts = campaign("hostile: model folders")

    def model(name: str) -> Path:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ASSETS / "tiny", folder)
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        return folder

    def changed(folder: Path, file: str, **changes: object) -> Path:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))
        return folder

    auto = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil", "AutoModel": "evil.Evil"}
    cases = {
        "auto_map in config.json": changed(model("m1"), "config.json", auto_map=auto),
        "auto_map and an unknown type": changed(model("m2"), "config.json", auto_map=auto, model_type="evil"),
        "auto_map of the tokenizer": changed(
            model("m3"), "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}
        ),
        "a tokenizer class of its own": changed(model("m4"), "tokenizer_config.json", tokenizer_class="evil.Evil"),
        "an unknown type": changed(model("m5"), "config.json", model_type="evil"),
        "no type": changed(model("m6"), "config.json", model_type=None),
        "a negative size": changed(model("m7"), "config.json", hidden_size=-1),
        "a huge size": changed(model("m8"), "config.json", vocab_size=10**12),
    }
    pickled = model("m9")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    cases["a pickle for weights"] = pickled
    index = model("m10")
    (index / "model.safetensors").unlink()
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../../etc/passwd"}}))
    cases["an index that points elsewhere"] = index
    for name, folder in cases.items():
        # A folder may be used if transformers has its type and its code is not run. The same holds for tokenizer.json.
        commands.judge(counts, "model", folder, f"{name} ({folder.name})", refused=name not in MAY_BE_USED)


NAMES = ["a\nb", "a\tb", "=1+1", "-x", "--help", "é\u202e", "\udcff", "a'b\"c", "${oc.env:HOME}", "a" * 200, " "]


def test_confusing_file_names(commands, good, tmp_path, campaign):
    counts = campaign("hostile: names of folders")
    for name in NAMES:
        folder = tmp_path / "arrived" / name / "run"
        shutil.rmtree(tmp_path / "arrived", ignore_errors=True)
        shutil.copytree(good["run"], folder)
        for how in ("evaluate", "report"):
            commands.judge(counts, how, folder, f"{how} of {name!r}")


def test_an_adapter_of_strange_shapes(commands, copy, campaign):
    import torch

    counts = campaign("hostile: adapters")
    for name, tensors in {
        "no tensors": {},
        "other names": {"x": torch.zeros(1)},
        "a huge rank": {"base_model.model.x.lora_A.weight": torch.zeros(100_000, 1)},
    }.items():
        folder = copy()
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
        commands.judge(counts, "evaluate", folder, name, refused=True)
    for name, change in {
        "an unknown type": {"peft_type": "EVIL"},
        "a rank of text": {"r": "x"},
        "a negative rank": {"r": -1},
        "a rank pattern that takes forever": {"rank_pattern": {"(a+)+$": 4}, "target_modules": "(a|aa)+$"},
        "a path that leads out": {"base_model_name_or_path": "../../../../etc"},
    }.items():
        folder = copy()
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        for how in ("evaluate", "adapter"):
            commands.judge(counts, how, folder, f"{how}, {name}")


def test_folders_that_are_too_deep_or_link_to_themselves(commands, good, tmp_path, campaign):
    counts = campaign("hostile: nested and linked folders")
    folder = tmp_path / "arrived"
    shutil.copytree(good["run"], folder / "run")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "root").symlink_to("/proc", target_is_directory=True)
    commands.judge(counts, "report", folder / "run", "links to parents and to /proc")
    here = os.open(folder, os.O_RDONLY)
    for _ in range(25):  # 5,000 characters; a path may have 4,096
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    commands.judge(counts, "report", folder / "run", "folders nested deeper than a path may be long")
    shutil.rmtree(folder, ignore_errors=True)
