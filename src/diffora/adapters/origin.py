"""Where an adapter comes from, and checks whether a model fits it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffora import digests
from diffora.backbones.backbone import Backbone
from diffora.core.model import inside_wrappers
from diffora.errors import UserError
from diffora.tasks.base import Task


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from, as the files of an export say.

    Attributes:
        base_model: hub id or folder of the pretrained model, for others to load.
        task: the task that the head is for.
        record: of the run (``run.json``).
        config: the run's configuration, as plain containers.
        backbone: the adapted model, with the names of its head.
    """

    base_model: str
    task: Task
    record: dict[str, Any]
    config: dict[str, Any]
    backbone: Backbone


def made_for(backbone: Backbone, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Entries of the manifest that say which models can take the adapter.

    Args:
        backbone: the adapted model.
        identity: digests of the pretrained model's files (`diffora.digests.backbone`); None if they are not known.

    Returns:
        The model's class, its number of layers, what ``from_pretrained`` needs, the class names and the digests.
    """
    model = backbone.model
    arguments = {key: value for key, value in backbone.arguments.items() if key not in ("id2label", "label2id")}
    return {
        "model": type(model).__name__,
        "layers": _layers(model),
        "arguments": arguments,
        "labels": labels_of(backbone.arguments),
        "backbone": identity,
    }


def identity_of(model: nn.Module) -> dict[str, Any] | None:
    """Digests of the files from which a transformers model was loaded; None if they are not on this machine."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not name:
        return None
    try:
        return digests.backbone(str(name))
    except (OSError, UserError):  # it is not there any more
        return None


def other_backbone(model: nn.Module, manifest: Mapping[str, Any]) -> list[str]:
    """What differs between the files of a model and those that an adapter was trained on, one line each.

    Empty also where one of them is not known.
    """
    return digests.changes({"backbone": manifest.get("backbone")}, {"backbone": identity_of(model)})


def check_made_for(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of another class or depth. The adapter might load on it, but would mean nothing.

    Raises:
        UserError: names both models.
    """
    name = manifest.get("model")
    if name is not None and name not in {kind.__name__ for kind in type(model).__mro__}:
        raise UserError(f"{folder} was trained for a {name}, and this model is a {type(model).__name__}")
    check_layers(model, manifest, folder)


def check_layers(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of another depth.

    Raises:
        UserError: names both depths.
    """
    layers = manifest.get("layers")
    if None not in (layers, _layers(model)) and layers != _layers(model):
        raise UserError(f"{folder} was trained on {layers} layers, and this model has {_layers(model)}")


def without_wrappers(model: nn.Module) -> nn.Module:
    """The user's own module, whose names an adapter has, inside `torch.compile`, `nn.DataParallel` and DDP."""
    return inside_wrappers(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def check_heads(backbone: Backbone, saved: Sequence[str], folder: Path) -> None:
    """Refuse an adapter without the model's head, which would keep its random weights.

    Args:
        backbone: the model to load onto.
        saved: names of the modules that the adapter has whole; PEFT allows the ends of names.
        folder: the adapter's.

    Raises:
        UserError: names the first head module that the adapter lacks.
    """
    absent = [head for head in backbone.head if not any(f".{head}".endswith(f".{name}") for name in saved)]
    if absent:
        raise UserError(
            f"{folder} has no {absent[0]}, the head of a {type(backbone.model).__name__}: "
            "it was trained for another kind of task"
        )


def labels_of(arguments: Mapping[str, Any]) -> list[str] | None:
    """The class names among the arguments of ``from_pretrained``, in the order of their numbers; None without names."""
    names = arguments.get("id2label")
    return None if names is None else [str(names[i]) for i in sorted(names)]


def named_classes(model: nn.Module) -> dict[str, Any]:
    """A model's class names as an argument of ``from_pretrained``; empty if it has none, or transformers' own."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or all(name == f"LABEL_{i}" for i, name in names.items()):
        return {}
    return {"id2label": names}


def take_labels(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Give the model's classes the adapter's names, unless it has names of its own.

    Raises:
        UserError: it has other names, or the same names in another order.
    """
    labels, config = manifest.get("labels"), getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    if not labels or not names:
        return

    theirs = [str(names[i]) for i in sorted(names)]
    if theirs == [f"LABEL_{i}" for i in range(len(labels))]:  # transformers' names for classes without names
        config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        config.label2id = {name: i for i, name in enumerate(labels)}  # type: ignore[union-attr]
    elif theirs != labels:
        raise UserError(
            f"{folder} was trained on the classes {', '.join(labels[:10])} ({len(labels)}), in this order; "
            f"the model's are {', '.join(theirs[:10])} ({len(theirs)}): give it the adapter's id2label and label2id"
        )


def _layers(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return found if isinstance(found, int) else None
