"""A finished run on the Hugging Face hub: the adapter or the merged model, with a card (``diffora push``)."""

import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from diffora.adapters.fetch import READ
from diffora.adapters.forms import name_base_model
from diffora.adapters.manifest import ADAPT, CONFIG, MANIFEST, read_manifest
from diffora.adapters.pairs import UNIFORM
from diffora.adapters.published import Published, published_card
from diffora.core.picture import layer_labels
from diffora.core.selection import Selection
from diffora.errors import UserError, called
from diffora.files import read_json
from diffora.hub import hub_failure, is_hub_id, resolve
from diffora.run.arguments import sorted_words, without_config_dirs
from diffora.run.export import FORMS, GGUF, MERGED, ExportRequest, export
from diffora.run.record import WEIGHTS
from diffora.run.trained import finished_run
from diffora.settings.checks import show

log = logging.getLogger(__name__)

OWN = ("private", "form", "method._target_", "base")
OF_MODEL = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
PICTURES = ("dam.png", "gamma.png", "confusion.png")


@dataclass(frozen=True)
class PushRequest:
    """What to publish.

    Attributes:
        name: hub id of the repository, which is made if it does not exist.
        private: whether only its owner can see a new repository.
        export: the run and the form. Its files go to a temporary folder.
        base_model: hub id of the base model, or None.
    """

    name: str
    private: bool
    export: ExportRequest
    base_model: str | None


def read_request(arguments: list[str]) -> PushRequest:
    """Read the command line of ``diffora push``.

    Raises:
        UserError: arguments are wrong (it lists all of them), or the run is not finished.
    """
    arguments, _ = without_config_dirs(arguments)
    places, own, values, problems = sorted_words(arguments, OWN, ("task", "model"))
    if len(places) != 2:
        problems.insert(0, f"give a run directory and a name on the hub: {called('push')} <run> owner/name")
    elif not is_hub_id(places[1]):
        problems.append(f"{places[1]} is no name on the hub: it must be owner/name, of letters, digits, - _ and .")
    form, base = own.get("form", UNIFORM), own.get("base")
    if form not in FORMS or form == GGUF:
        problems.append(f"form={show(form)} must be one of {', '.join(f for f in FORMS if f != GGUF)}")
    if not isinstance(private := own.get("private", False), bool):
        problems.append(f"private={show(private)} must be true or false")
    if base is not None and not is_hub_id(str(base)):
        problems.append(f"base={show(base)} must be the hub id of the base model")
    if problems:
        raise UserError(problems)
    run = Path(places[0]).expanduser()
    cfg, weights, record = finished_run(run, values)
    if weights.name == WEIGHTS[1]:  # a fully fine-tuned model has one form
        form = MERGED
    path, local = resolve(cfg.model.path)
    base = base or (None if local else path)
    own_backbone = "model.path" in values
    ours = ExportRequest(run, form, run, cfg, weights, record, None, own.get("method._target_"), own_backbone)
    return PushRequest(places[1], private, ours, base)


def push(request: PushRequest) -> str:
    """Publish a run.

    Returns:
        The address of the repository.

    Raises:
        UserError: there is no token, the hub refuses, or the run cannot be written in this form. Nothing is published
            then.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    if get_token() is None:
        raise UserError(
            "you are not logged in to the hub: `hf auth login`, or set HF_TOKEN to a token with write access"
        )
    try:
        api.whoami()
    except Exception as error:
        raise UserError(hub_failure(error, request.name)) from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        prepare(request, folder)
        try:
            api.create_repo(request.name, private=request.private or None, exist_ok=True)
            info = api.model_info(request.name)
            if request.private and not info.private:
                raise UserError("private=true, but this repository exists already and is public: choose another name")
            stale = _stale([sibling.rfilename for sibling in info.siblings or ()], folder)
            api.upload_folder(
                repo_id=request.name,
                folder_path=folder,
                commit_message="Upload by diffora push",
                delete_patterns=stale or None,
            )
        except UserError as error:
            raise UserError(f"{request.name} was not published: {error}") from None
        except Exception as error:
            raise UserError(f"{request.name} was not published: {hub_failure(error, request.name)}") from error
    return f"{api.endpoint}/{request.name}"


def _stale(present: Sequence[str], folder: Path) -> list[str]:
    """The files of an earlier push that a new one must delete, so that no file belongs to another run.

    Args:
        present: names of the files in the repository.
        folder: what will be published.

    Raises:
        UserError: the repository has a whole model and this is an adapter, or the other way round. transformers would
            load one of them only, and the other one may be somebody's work.
    """
    adapter, model = (CONFIG, ADAPT), ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    ours, theirs = (adapter, model) if any((folder / name).exists() for name in adapter) else (model, adapter)
    if other := [name for name in theirs if name in present]:
        what = "an adapter" if ours is adapter else "a whole model"
        raise UserError(f"it has {other[0]}, and this is {what}: choose another name, or delete the old files first")
    new = {file.name for file in folder.iterdir()}
    old = [*READ, MANIFEST, *PICTURES, *(OF_MODEL if ours is model else ())]
    return [name for name in present if name not in new and any(fnmatch(name, pattern) for pattern in old)]


def prepare(request: PushRequest, folder: Path) -> None:
    """Write the files to publish: those of `diffora export`, the card and the pictures, without local paths.

    Raises:
        UserError: a file would still have a path of this machine.
    """
    ours = replace(request.export, to=folder)
    export(ours)
    name_base_model(folder, request.base_model)
    manifest: dict[str, Any] | None = None
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        kind = manifest["model"]
    else:
        kind = read_json(folder / "config.json")["architectures"][0]
    pictures = [file for file in PICTURES if (ours.run / file).is_file()]
    for file in pictures:
        shutil.copyfile(ours.run / file, folder / file)
    layers: list[str] = []
    if (selection := ours.run / "selection.json").is_file():
        found = Selection.load(selection)
        layers = layer_labels(found.modules, found.types)
    published = Published(request.name, ours.record, request.base_model, kind, manifest, pictures, layers)
    (folder / "README.md").write_text(published_card(published), encoding="utf-8")
    _check_no_paths(folder, request)


def _check_no_paths(folder: Path, request: PushRequest) -> None:
    """Refuse to publish text with a path of this machine."""
    cfg = request.export.cfg
    settings = [str(cfg[section].get("path") or "") for section in ("task", "model")]
    places = [text for text in settings if Path(text).is_absolute()]
    places += [str(place.resolve()) for place in (Path.home(), request.export.run, Path.cwd())]
    for file in folder.iterdir():
        if file.suffix not in (".json", ".md", ".jinja", ".txt"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for place in (place.rstrip("/") for place in places if len(place) > 1):
            # Not inside another name. In JSON, the n of a line break stands before a path in the next line.
            if re.search(rf"(?:(?<![\w.-])|(?<=\\[nrtbf])){re.escape(place)}(?![\w-])", text):
                raise UserError(f"{file.name} would publish the path {place}: nothing was uploaded")
