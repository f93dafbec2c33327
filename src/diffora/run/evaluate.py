"""Metrics and predictions of a finished run on any split, without training (``diffora evaluate``)."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from diffora.adapters.fetch import local_copy, place_problem
from diffora.adapters.manifest import MANIFEST
from diffora.backbones.compatibility import longest_input
from diffora.backbones.precision import width_multiple
from diffora.errors import UserError
from diffora.files import check_writable, read_json, write_text
from diffora.loop.predict import accelerator_device, predict
from diffora.loop.process import quiet_libraries
from diffora.places import conf_dir
from diffora.records import NAME
from diffora.run import terminal
from diffora.run.arguments import named_values, put, without_config_dirs
from diffora.run.check import section_problems
from diffora.run.classes import write_classes
from diffora.run.precision import settled
from diffora.run.record import WEIGHTS, check_as_left, read_record, why_broken
from diffora.run.trained import SECTIONS, check_backbone, composed, load_trained, manifest_of, override, settings_of_run
from diffora.settings import checks
from diffora.settings.identity import plain
from diffora.tasks.account import lines as account_lines
from diffora.tasks.base import Outputs, Split, Task, get_task
from diffora.tasks.encoding import processes
from diffora.tasks.sources.place import PlaceSettings
from diffora.trust import class_at

log = logging.getLogger(__name__)

TRAINING = {"finetune", "search", "rank", "rho", "seed"}
"""Settings of training outside the groups of ``conf/``."""
OWN = ("run", "adapter", "split", "output", "batch_size", "method._target_")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        cfg: sections ``task``, ``model`` and ``trainer``.
        weights: folder of an adapter, or of a whole model.
        splits: names at the source; None for `Task.default_splits`.
        output: where metrics and predictions go.
        batch_size: rows per batch.
        method: dotted path of the user's own method, if the command line names one.
        own_backbone: whether the command line names the backbone. It may then differ from that of the run.
        other_data: whether the command line gives ``task.path``.
    """

    cfg: DictConfig
    weights: Path
    splits: tuple[str, ...] | None
    output: Path
    batch_size: int
    method: str | None = None
    own_backbone: bool = False
    other_data: bool = False


def read_request(arguments: list[str]) -> EvaluationRequest:
    """Read the command line: our own arguments, and overrides of the run's (or the composed) configuration.

    Raises:
        UserError: arguments are wrong; it lists all of them.
    """
    arguments, paths = without_config_dirs(arguments)
    own, choices, values = _parse(arguments)
    place = Path(str(own["run"] if "run" in own else own["adapter"])).expanduser()
    cfg, weights = settings_of_run(place) if "run" in own else _of_adapter(place, choices, paths)
    before = cfg.task.get("path")
    cfg = override(cfg, choices if "run" in own else [], values, paths)
    if "task.path" in values:
        _suit_place(cfg, values)
        _note_own_rows(before, cfg)
    named = "adapter" in own or "task._target_" in values or any(choice.startswith("task=") for choice in choices)
    class_at(cfg.task.get("_target_"), Task, "task._target_", None if named else place / "config.yaml")
    if problems := section_problems(cfg, SECTIONS):
        raise UserError(problems)
    splits = own.get("split")
    names = None if splits is None else tuple(map(str, splits if isinstance(splits, list) else [splits]))
    cfg, precision = settled(cfg)
    if precision:
        log.warning(f"precision: {precision}")
    own_backbone = "model.path" in values or any(choice.startswith("model=") for choice in choices)
    output = output_of(own, place)
    size, method, other_data = own.get("batch_size", 64), own.get("method._target_"), "task.path" in values
    return EvaluationRequest(cfg, weights, names, output, size, method, own_backbone, other_data)


def _parse(arguments: list[str]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Sort the words of the command line.

    Returns:
        (our own arguments by name; choices of a section, such as ``task=sst2``; values of settings by key).

    Raises:
        UserError: words are wrong; it lists all of them.
    """
    own: dict[str, Any] = {}
    choices: list[str] = []
    values: dict[str, Any] = {}
    problems: list[str] = []
    groups = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    for argument, name, value in named_values(arguments, problems):
        if name in OWN:
            put(own, name, value, problems)
        elif name in SECTIONS:
            choices.append(argument)
        elif name in ("trainer.devices", "trainer.num_nodes") and value != 1:
            problems.append(f"{argument}: evaluation takes one device")
        elif name.split(".")[0] in SECTIONS:
            values[name] = value
        else:
            known = name.split(".")[0] in groups | TRAINING
            hint = ": method and settings of training do not matter here" if known else ""
            problems.append(f"{checks.unknown_key(name, [*OWN, *SECTIONS])}{hint}")
    problems += _own_problems(own)
    if problems:
        raise UserError(problems)
    return own, choices, values


def _own_problems(own: dict[str, Any]) -> Iterator[str]:
    """One message for each of our own arguments that is wrong."""
    if len({"run", "adapter"} & own.keys()) != 1 or not all(own.get(name, "x") for name in ("run", "adapter")):
        yield "give either run=<run directory> or adapter=<folder> with task= and model="
    rows, size, splits = checks.whole(1), own.get("batch_size", 64), own.get("split")
    if not rows.fits(size):
        yield f"batch_size={checks.show(size)} must be {rows.words}"
    if checks.is_int(splits):
        splits = str(splits)
    if not (splits is None or checks.TEXT.fits(splits) or (splits and checks.TEXTS.fits(splits))):
        yield f"split={checks.show(splits)} must be the name of a split, or a list of names"
    if "output" in own and not checks.PATH.fits(own["output"]):
        yield f"output={checks.show(own['output'])} must be {checks.PATH.words}"


def output_of(own: dict[str, Any], place: Path) -> Path:
    """The folder for metrics and predictions: ``output=``, or a new one below the run, the adapter, or here."""
    # Evaluations that start together need different folders, on one machine and on several.
    name = f"evaluation-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    default = (place if place.is_dir() else Path()) / name
    output = Path(str(own["output"])).expanduser() if "output" in own else default
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise UserError(f"output={output} is not an empty folder: choose another one")
    return output


def _of_adapter(folder: Path, choices: list[str], paths: Sequence[str]) -> tuple[DictConfig, Path]:
    """(settings that the command line chooses, the adapter's folder). An adapter on the hub is downloaded."""
    whole = (folder / "config.json").is_file()  # a fully fine-tuned model
    if not whole and (problem := place_problem(folder)):
        raise UserError(f"adapter={folder}: {problem}")
    if missing := [name for name in ("task", "model") if not any(c.startswith(f"{name}=") for c in choices)]:
        raise UserError(f"adapter={folder} needs {' and '.join(f'{name}=<name>' for name in missing)} beside it")
    return composed(choices, paths), folder if whole else local_copy(folder)


def _suit_place(cfg: DictConfig, values: Mapping[str, Any]) -> None:
    """Drop the names of a subset and of splits that suit the rows of the run, but not the file or folder ``task.path``.

    Args:
        values: settings of the command line, which are kept.
    """
    place = Path(str(cfg.task.path)).expanduser()
    names = ("subset", "train_split", "validation_split") if place.is_file() else ("subset",)
    for name in names if place.exists() else ():
        if name in cfg.task and f"task.{name}" not in values:
            cfg.task[name] = getattr(PlaceSettings, name)


def _note_own_rows(before: str | None, cfg: DictConfig) -> None:
    """Say so if ``task.path`` on the command line is the file that the run was trained on."""
    file = Path(str(cfg.task.path)).expanduser()
    old = None if before is None else Path(before).expanduser()
    if old is not None and file.is_file() and old.exists() and file.samefile(old):
        log.warning(f"task.path={file} has the rows that the run was trained on: the score may be too high")


def evaluate(request: EvaluationRequest) -> dict[str, dict[str, float]]:
    """Predict and, where there are labels, score. Writes ``metrics.json`` and the predictions.

    Returns:
        Metrics by split; splits without labels have none.

    Raises:
        UserError: something is wrong with settings, data, model or adapter.
    """
    try:
        return _evaluate(request)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        section = key.partition(".")[0]
        raise UserError(f"the run's settings have no {key}: choose the section again with {section}=<name>") from error


def _evaluate(request: EvaluationRequest) -> dict[str, dict[str, float]]:
    cfg, began = request.cfg, time.time()
    check_writable(request.output)
    quiet_libraries()
    task = get_task(cfg.task)
    task.num_proc = processes(cfg.trainer.get("num_proc", 1))  # earlier runs do not have it
    record = read_record(request.weights.parent) or {}
    if request.weights.name in WEIGHTS:
        if broken := why_broken(request.weights.parent):
            raise UserError(broken)
        if not record and (request.weights.parent / "config.yaml").is_file():
            log.warning(f"{request.weights.parent} has no {NAME}: nothing shows whether its settings are as they were")
        check_as_left(request.weights.parent, record)
    trained, file = record.get("classes"), request.weights.parent / NAME
    if trained is None:
        trained, file = manifest_of(request.weights).get("labels"), request.weights / MANIFEST
    if trained is None:
        trained, file = _classes_in_config(request.weights), request.weights / "config.json"
    if trained is not None:
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            raise UserError(f"{file}: the classes are not a list of names")
        task.expect(trained)
    names = request.splits or task.default_splits(request.other_data)
    if not request.other_data:
        _check_drawn_rows(task, names, record)
    rows = {name: task.load_split(name) for name in names}
    if trained is None and type(task).expect is not Task.expect:  # the rows decide how classes are numbered
        numbered = ", ".join(task.head().get("id2label", {}).values())
        if numbered:
            log.warning(
                f"{request.weights} does not name its classes: they count as {numbered}, in this order. If it was "
                "trained with another order, the scores are wrong"
            )
    model, processor = load_trained(cfg, request.weights, request.method, task)
    check_backbone(cfg, request.weights, request.own_backbone)
    device = accelerator_device(cfg.trainer.accelerator)
    task.width_multiple = width_multiple(cfg.trainer.precision, device, longest_input(model))
    collate = task.collate(processor, training=False)
    splits = {name: Split(r, task.encode(r, processor, training=False)) for name, r in rows.items()}
    data = {name: task.account(name, split).record() for name, split in splits.items()}
    for line in account_lines(data):
        log.warning(line)
    found: dict[str, dict[str, float]] = {}
    files: list[Path] = []
    for name, split in splits.items():
        outputs: Outputs = predict(model, task, split, collate, request.batch_size, cfg.trainer)
        files += task.write_predictions(request.output, name, outputs, split)
        scores: dict[str, float] = {}
        if task.labelled(split):
            scores = task.score(outputs, split)
            files += write_classes(request.output, task.class_results(outputs), f"{name}_")
        found[name] = {key: round(value, 6) for key, value in scores.items()}
    account = {
        "weights": str(request.weights.resolve()),
        "task": plain(cfg)["task"],
        "model": cfg.model.path,
        "rows": {name: len(split.rows) for name, split in splits.items()},
        "data": data,
        "metrics": found,
        "seconds": round(time.time() - began, 3),
    }
    write_text(request.output / "metrics.json", json.dumps(account, indent=1) + "\n")
    terminal.print_evaluation(account, [request.output / "metrics.json", *files])
    return found


def _classes_in_config(weights: Path) -> list[Any] | None:
    """The names of the classes in the ``config.json`` of a whole model; None if it has none, or placeholders."""
    file = weights / "config.json"
    labels = read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(labels, dict) or not all(number.isdecimal() for number in labels):
        return None
    names = [labels[number] for number in sorted(labels, key=int)]
    return None if all(str(name).startswith("LABEL_") for name in names) else names


def _check_drawn_rows(task: Task, names: Sequence[str], record: Mapping[str, Any]) -> None:
    """Refuse validation rows that are drawn from other training rows than the run's, or in another way.

    The model may have been trained on some of them.
    """
    drawn = [name for name in names if task.drawn_from_training(name)]
    if drawn and "data_hash" in record and task.load().data_hash != record["data_hash"]:
        raise UserError(
            f"split={drawn[0]}: these rows are drawn from the training rows, and the data or the settings of the task "
            "are not those of the run. So the model may have been trained on some of them. Bring data and settings "
            "back, or give other rows: task.path=<file>"
        )
