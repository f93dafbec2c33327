"""Backbones: a transformers model with a fresh head, from the hub, a folder, the package, or on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from diffora.errors import UserError
from diffora.hub import why_unreachable

EMBEDDED = Path(__file__).parent / "assets" / "tiny"


def resolve(path: str) -> tuple[str, bool]:
    """(what to give to transformers, whether it is a local folder) for ``model.path``.

    Raises:
        UserError: it looks like a folder and is none, or has no config.json.
    """
    if path == "embedded":
        return str(EMBEDDED), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path} has no config.json: it is not a folder of a transformers model")
        return str(folder), True
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path} is not a folder; give a folder of a transformers model or a hub id")
    return path, False


def classifier_config(cfg: Any, n_labels: int, meta: bool) -> Any:
    """The transformers configuration with a head of ``n_labels`` outputs.

    Args:
        cfg: the ``model`` section.
        meta: take the dimensions from ``conf/model`` unless the model is a local folder: no network.
    """
    from transformers import AutoConfig

    path, local = resolve(cfg.path)
    labels: dict[str, Any] = {"num_labels": n_labels}
    if meta and not local:
        if "config" not in cfg:
            raise UserError(f"conf/model/{cfg.name}.yaml has no 'config', which dry_run=true needs for a hub model")
        shape: Any = OmegaConf.to_container(cfg.config)
        return AutoConfig.for_model(**shape | labels)
    with _readable(cfg.path, local) as where:
        return AutoConfig.from_pretrained(path, **labels, **where)


def load_tokenizer(cfg: Any) -> Any:
    """The fast tokenizer of a backbone."""
    from transformers import AutoTokenizer

    path, local = resolve(cfg.path)
    with _readable(cfg.path, local) as where:
        return AutoTokenizer.from_pretrained(path, **where)


def load_classifier(cfg: Any, n_labels: int) -> nn.Module:
    """Pretrained backbone, frozen, in float32, with a new trainable classification head.

    The new weights are drawn from torch's global generator: seed it first.
    """
    from transformers import AutoModelForSequenceClassification

    path, local = resolve(cfg.path)
    config = classifier_config(cfg, n_labels, meta=False)
    with _readable(cfg.path, local) as where:
        # float32 is said: transformers would otherwise take the dtype of the file, float16 for DeBERTaV3.
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **where
        )
    pooler = f"{model.base_model_prefix}.pooler"
    model.fresh_pooler = pooler if any(key.startswith(f"{pooler}.") for key in info["missing_keys"]) else None
    return freeze_backbone(model)


def meta_classifier(cfg: Any, n_labels: int) -> nn.Module:
    """The same model without memory for its weights."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model: nn.Module = AutoModelForSequenceClassification.from_config(classifier_config(cfg, n_labels, meta=True))
    return freeze_backbone(model)


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Freeze all but the head, in place."""
    model.requires_grad_(False)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def head_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that make up the head, the same for every method: what the task adds to the backbone.

    That is every part outside the backbone. A pooler inside it belongs to the head where the checkpoint did not bring
    one; a pretrained pooler is backbone.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names = [name for name, _ in model.named_children() if name != prefix]
    if isinstance(pooler := getattr(model, "fresh_pooler", None), str):
        names.append(pooler)
    return [name for name in names if any(True for _ in model.get_submodule(name).parameters())]


def backbone_parameters(model: nn.Module) -> int:
    """Parameters of a model besides its head, shared ones once; before a method adds to them."""
    head = {p for name in head_modules(model) for p in model.get_submodule(name).parameters()}
    return sum(p.numel() for p in set(model.parameters()) - head)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``adapter``, ``head`` and ``trainable`` parameters of an adapted model, shared ones once.

    ``adapter`` is what is trained besides the head.
    """
    head = {p for name in head_modules(model) for p in model.get_submodule(name).parameters()}
    trainable = {p for p in model.parameters() if p.requires_grad}
    return {
        "adapter": sum(p.numel() for p in trainable - head),
        "head": sum(p.numel() for p in head),
        "trainable": sum(p.numel() for p in trainable),
    }


@contextmanager
def _readable(path: str, local: bool) -> Iterator[dict[str, bool]]:
    """Turns transformers' many ways to fail at loading into one message; yields arguments for ``from_pretrained``."""
    unreachable = None if local else why_unreachable()
    try:
        yield {"local_files_only": local or unreachable is not None}
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise UserError(f"model.path={path} cannot be read as a transformers model: {reason}") from error
        raise UserError(
            f"cannot get {path} from the model hub: "
            + (f"{unreachable}, and it is not in the local cache" if unreachable else reason)
            + "\n  Either give a folder that you have: model.path=<folder>"
            "\n  or try what needs no network: python train.py experiment=quickstart"
        ) from error
