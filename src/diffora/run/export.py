"""The trained weights of a finished run for other programs (``diffora export``)."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffora.adapters.export import save_model
from diffora.adapters.forms import read_pairs, rewrite
from diffora.adapters.manifest import CONFIG
from diffora.adapters.merge import merge_all
from diffora.adapters.pairs import COMPACT, UNIFORM
from diffora.backbones.processors import load_processor
from diffora.errors import UserError, called
from diffora.files import atomic_folder, check_writable, read_json
from diffora.hub import resolve
from diffora.loop.process import quiet_libraries
from diffora.run.arguments import sorted_words, without_config_dirs
from diffora.run.record import WEIGHTS
from diffora.run.trained import check_backbone, finished_run, load_trained
from diffora.settings.checks import show
from diffora.settings.read import model_of
from diffora.tasks.base import get_task

log = logging.getLogger(__name__)

MERGED, GGUF = "merged", "gguf"
FORMS = (UNIFORM, COMPACT, MERGED, GGUF)
OWN = ("form", "to", "converter", "method._target_")
READERS = {
    UNIFORM: "PEFT, vLLM, TensorRT-LLM, diffusers, llama.cpp's converter and diffora read it alike",
    COMPACT: "PEFT and diffora read it; other programs would use wrong scales",
    MERGED: "transformers and every server of transformers models load it like any other model",
    GGUF: "llama.cpp loads it beside the base model with --lora",
}


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        run: the run directory.
        form: one of `FORMS`.
        to: where the files go.
        cfg: sections ``task`` and ``model`` of the run, with the overrides of the command line.
        weights: the run's ``adapter`` or ``model`` folder.
        record: of the run.
        converter: llama.cpp's script, if the command line names it.
        method: dotted path of the user's own method, if the command line names one.
        own_backbone: whether the command line names the backbone.
    """

    run: Path
    form: str
    to: Path
    cfg: DictConfig
    weights: Path
    record: dict[str, Any] = field(default_factory=dict)
    converter: Path | None = None
    method: str | None = None
    own_backbone: bool = False


def read_request(arguments: Sequence[str]) -> ExportRequest:
    """Read the command line of ``diffora export``.

    Raises:
        UserError: arguments are wrong (it lists all of them), or the run is not finished.
    """
    arguments, _ = without_config_dirs(arguments)
    places, own, values, problems = sorted_words(arguments, OWN, ("task", "model"))
    if len(places) != 1:
        problems.insert(0, f"give one run directory: {called('export')} <run>")
    form = own.get("form", UNIFORM)
    if form not in FORMS:
        problems.append(f"form={show(form)} must be one of {', '.join(FORMS)}")
    if "converter" in own and form != GGUF:
        problems.append(f"converter= is for form={GGUF} only")
    if "to" in own and not (isinstance(own["to"], str) and own["to"]):
        problems.append(f"to={show(own['to'])} must be a folder")
    if problems:
        raise UserError(problems)
    run = Path(places[0]).expanduser()
    to = Path(own["to"]).expanduser() if "to" in own else run / f"export-{form}"
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UserError(f"to={to} is not an empty folder: choose another one")
    cfg, weights, record = finished_run(run, values)
    converter = Path(str(own["converter"])).expanduser() if "converter" in own else None
    own_backbone = "model.path" in values
    return ExportRequest(run, form, to, cfg, weights, record, converter, own.get("method._target_"), own_backbone)


def export(request: ExportRequest) -> list[str]:
    """Write the files.

    Returns:
        Lines that say what was written and who reads it.

    Raises:
        UserError: the run cannot be written in this form.
    """
    check_writable(request.to)
    whole = request.weights.name == WEIGHTS[1]
    if request.form == MERGED:
        lines = _merged(request)
    elif request.form == GGUF:
        lines = _gguf(request, whole)
    elif whole:
        raise UserError(
            f"{request.weights} is a whole model, not an adapter: copy that folder, or export form={MERGED} or {GGUF}"
        )
    else:
        lines = list(_adapter_lines(request, rewrite(request.weights, request.to, request.form)))
    return [*lines, READERS[request.form]]


def _adapter_lines(request: ExportRequest, manifest: dict[str, Any]) -> Iterator[str]:
    """What an adapter holds, and what some programs refuse in it."""
    modules = manifest.get("modules")
    if modules is None:
        yield "the format of its method, which has one form only: diffora.load_adapter reads it"
        return
    ranks = sorted({entry["rank"] for entry in modules.values()})
    text = f"rank {ranks[-1]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if request.form == UNIFORM and len(ranks) > 1:
        text += f", all filled up to {ranks[-1]}"
    scales = ", ".join(f"{scale:g}" for scale in sorted({entry["scale"] for entry in modules.values()}))
    yield f"{len(modules)} modules, {text}, scale {scales}"
    if manifest["heads"]:
        yield f"with the head {', '.join(manifest['heads'])}: vLLM and llama.cpp take no head, use form={MERGED} there"


def _merged(request: ExportRequest) -> list[str]:
    """Write a whole model, with its tokenizer or image processor."""
    quiet_libraries()
    task = get_task(request.cfg.task)
    if (classes := request.record.get("classes")) is not None:
        task.expect(classes)
    check_backbone(request.cfg, request.weights, request.own_backbone)
    model: Any
    model, _ = load_trained(request.cfg, request.weights, request.method, task)
    if request.weights.name != WEIGHTS[1]:
        merge_all(model)
    # Load it again: the one of the task keeps settings of its last call, such as the truncation.
    processor = load_processor(model_of(request.cfg.model), task.processor_kind)
    with atomic_folder(request.to) as scratch:
        save_model(model, scratch)
        processor.save_pretrained(scratch)
    lines = [f"{type(model).__name__}, {model.dtype}".replace("torch.", "")]
    if task.processor_kind == "image_processor" and not getattr(processor, "do_center_crop", False):
        lines.append(
            "images that are not square: cut out the centre first, as in training; the processor squeezes them"
        )
    return lines


def _gguf(request: ExportRequest, whole: bool) -> list[str]:
    """Let llama.cpp's converter write the file."""
    name = "convert_hf_to_gguf.py" if whole else "convert_lora_to_gguf.py"
    _check_for_llama(request, whole)
    script = request.converter or next((Path(p) for n in (name, name[:-3]) if (p := shutil.which(n))), None)
    if script is None or not script.is_file():
        where = f"converter={script} is not a file" if script else f"there is no {name} on the PATH"
        raise UserError(
            f"form={GGUF} needs llama.cpp's {name}, but {where}: git clone https://github.com/ggml-org/llama.cpp, "
            f"pip install gguf, and give converter=<llama.cpp>/{name}"
        )
    file = "model.gguf" if whole else "adapter.gguf"
    path, local = resolve(request.cfg.model.path)
    base = [] if whole else ["--base" if local else "--base-model-id", path]
    with atomic_folder(request.to) as scratch:
        outfile = ["--outfile", str((scratch / file).absolute()), "--outtype", "f16" if whole else "f32"]
        source = request.weights if whole else scratch / "source"
        if not whole:
            rewrite(request.weights, source, UNIFORM)
        command = [sys.executable, str(script), *outfile, *base, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        shutil.rmtree(scratch / "source", ignore_errors=True)
        if done.returncode or not (scratch / file).is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
            raise UserError(f"{script} failed (exit code {done.returncode}): {' / '.join(said)}")
    return [file]


def _check_for_llama(request: ExportRequest, whole: bool) -> None:
    """Refuse adapters that llama.cpp's converter refuses, or reads wrongly.

    It takes nothing but A and B. It transposes the updates of GPT-2, whose PEFT adapters are not transposed.
    """
    if whole:
        return
    manifest, pairs = read_pairs(request.weights)
    merge = f"export form={MERGED} and convert that model with convert_hf_to_gguf.py"
    if pairs is None:
        raise UserError(f"form={GGUF}: the adapter has no low-rank pairs, which is all that llama.cpp reads: {merge}")
    if manifest["heads"]:
        raise UserError(f"form={GGUF}: llama.cpp takes no head, and this adapter has {manifest['heads'][0]}: {merge}")
    if read_json(request.weights / CONFIG).get("fan_in_fan_out"):
        raise UserError(f"form={GGUF}: llama.cpp would transpose the updates of this model's layers (Conv1D): {merge}")
