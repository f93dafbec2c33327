"""Backbones: a transformers model with a fresh head, from the hub, a folder, the package, or on the meta device."""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from diffora.core.dropout import use_cheap_dropout
from diffora.errors import UserError, out_of_memory
from diffora.hub import why_unreachable
from diffora.tasks.base import Task

HALF = (torch.float16, torch.bfloat16)
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What ``trainer.precision`` computes in; others compute in the dtype of the weights."""
EMBEDDED = Path(__file__).parent / "assets" / "tiny"


def resolve(path: str) -> tuple[str, bool]:
    """(what to give to transformers, whether it is a local folder) for ``model.path``.

    Raises:
        UserError: it looks like a folder and is none, or has no config.json.
    """
    if path == "embedded":
        return str(EMBEDDED), True
    if path.startswith("embedded:"):
        folder = EMBEDDED.parent / path.removeprefix("embedded:")
        if not (folder / "config.json").is_file():
            there = ", ".join(sorted(f"embedded:{file.parent.name}" for file in EMBEDDED.parent.glob("*/config.json")))
            raise UserError(f"model.path={path} does not come with this project; these do: {there}")
        return str(folder), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path} has no config.json: it is not a folder of a transformers model")
        return str(folder), True
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path} is not a folder; give a folder of a transformers model or a hub id")
    return path, False


def model_config(cfg: Any, task: Task, meta: bool) -> Any:
    """The transformers configuration of backbone and head.

    Args:
        cfg: the ``model`` section.
        task: whose head it is.
        meta: take the dimensions from ``conf/model`` unless the model is a local folder: no network.
    """
    from transformers import AutoConfig

    path, local = resolve(cfg.path)
    if meta and not local and "config" in cfg:
        shape: Any = OmegaConf.to_container(cfg.config)
        config = AutoConfig.for_model(**shape | task.head())
    else:
        with _readable(cfg.path, local) as where:
            config = AutoConfig.from_pretrained(path, **task.head(), **where)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # it is for generating; with a cache, decoders do not see where packed sequences begin
    return config


def load_tokenizer(cfg: Any) -> Any:
    """The fast tokenizer of a backbone; one without a padding token, like GPT-2's, pads with its end token."""
    from transformers import AutoTokenizer

    path, local = resolve(cfg.path)
    with _readable(cfg.path, local) as where:
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(cfg: Any) -> Any:
    """The image processor of a vision backbone: its sizes, means and the like; nothing here needs torchvision."""
    from transformers import AutoImageProcessor

    path, local = resolve(cfg.path)
    with _readable(cfg.path, local) as where:
        return AutoImageProcessor.from_pretrained(path, **where)


def load_model(cfg: Any, task: Task) -> nn.Module:
    """Pretrained backbone, frozen, with the head of a task: new and trainable, or pretrained and frozen.

    The backbone is in ``model.dtype``, perhaps quantised; a trainable head is in float32. The new weights are drawn
    from torch's global generator: seed it first.
    """
    import transformers

    path, local = resolve(cfg.path)
    config = model_config(cfg, task, meta=False)
    # The precision is said: transformers would otherwise take that of the file, float16 for DeBERTaV3.
    how: dict[str, Any] = {"dtype": dtype_of(cfg)}
    if cfg.get("quantise"):
        how["quantization_config"] = _quantisation(cfg, task)
    with _readable(cfg.path, local) as where:
        model, info = getattr(transformers, task.model_class).from_pretrained(
            path, config=config, output_loading_info=True, **how, **where
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights on a CPU in the first evaluation; no gradient passes them then.
            module.support_avx512bf16_for_cpu = False
    pooler = f"{model.base_model_prefix}.pooler"
    model.fresh_pooler = pooler if any(key.startswith(f"{pooler}.") for key in info["missing_keys"]) else None
    model.fresh_modules = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    model.trains_head = task.trains_head
    use_cheap_dropout(model)
    return freeze_backbone(model)


def meta_model(cfg: Any, task: Task) -> nn.Module:
    """The same model without memory for its weights, and not quantised."""
    import transformers

    config = model_config(cfg, task, meta=True)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, task.model_class).from_config(config, dtype=dtype_of(cfg))
    model.trains_head = task.trains_head  # type: ignore[assignment]
    use_cheap_dropout(model)
    return freeze_backbone(model)


def dtype_of(cfg: Any) -> torch.dtype:
    """``model.dtype``, the precision of the frozen weights."""
    dtype: torch.dtype = getattr(torch, cfg.get("dtype", "float32"))
    return dtype


def _quantisation(cfg: Any, task: Task) -> Any:
    """What transformers is to quantise, and how: all linear modules but the head, by bitsandbytes."""
    from transformers import BitsAndBytesConfig

    if cfg.quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_not_quantised(cfg, task))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if cfg.dtype == "float16" else torch.bfloat16,
        llm_int8_skip_modules=_not_quantised(cfg, task),
    )


def _not_quantised(cfg: Any, task: Task) -> list[str]:
    """Full names of the linear modules outside the repeated layers: heads, output embeddings, poolers."""
    from diffora.core.stacks import find_stacks

    model = meta_model(cfg, task)
    layers = tuple(f"{place}." for stack in find_stacks(model) for place in stack.layers)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(layers)]


def problems(cfg: Any, task: Task) -> Iterator[str]:
    """What of the configuration cannot be right for the backbone, found before it is loaded."""
    quantise = cfg.model.get("quantise")
    if quantise and not cfg.get("dry_run") and importlib.util.find_spec("bitsandbytes") is None:
        yield f"model.quantise={quantise} needs bitsandbytes: pip install 'diffora[quantised]'"


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only what goes into each layer, and compute the rest anew in the backward pass (``gradient_checkpointing``).

    Raises:
        UserError: the backbone cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"trainer.gradient_checkpointing=true: {type(model).__name__} does not support it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name will change in transformers 6
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # transformers lets the embeddings require gradients, which only the other kind of checkpoint needs: the backward
    # pass would no longer stop below the lowest adapter.
    model.disable_input_require_grads()  # type: ignore[operator]


def check_trainable(model: nn.Module) -> None:
    """Refuse to train nothing, or in half precision, where small steps are rounded away.

    Raises:
        UserError: names a parameter of the backbone that the method trains.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("there is nothing to train: the method adds nothing, and this task's head stays as it is")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            raise UserError(f"this method trains {name}, which is in {parameter.dtype}: use model.dtype=float32")


def set_padding(model: nn.Module, processor: Any) -> dict[str, int]:
    """Tell a backbone without a padding token which one its tokenizer pads with; classification heads look for it.

    Returns:
        The entry of the configuration that was added, if any.
    """
    config: Any = model.config
    token = getattr(processor, "pad_token_id", None)
    if token is None or getattr(config, "pad_token_id", token) is not None:
        return {}
    config.pad_token_id = token
    return {"pad_token_id": token}


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Freeze all but the head, in place; a head in half precision goes over to float32."""
    model.requires_grad_(False)
    for name in head_modules(model):
        head = model.get_submodule(name).requires_grad_(True)
        if any(p.dtype in HALF for p in head.parameters()):
            head.float().register_forward_pre_hook(_to_float32)
    return model


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)


def head_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that make up the head, the same for every method: what the task adds to the backbone.

    That is every part outside the backbone, unless the task takes the pretrained one (a language model's). A pooler
    inside it belongs to the head where the checkpoint did not bring one; a pretrained pooler is backbone.
    """
    if not getattr(model, "trains_head", True):
        return []
    backbone = _backbone_parts(model)
    names = [name for name, _ in model.named_children() if name not in backbone]
    if isinstance(pooler := getattr(model, "fresh_pooler", None), str):
        names.append(pooler)
    return [name for name in names if any(True for _ in model.get_submodule(name).parameters())]


def check_outside_head(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to adapt the head's modules where the head is trained whole: no file format holds both.

    Raises:
        UserError: names the module and what to set.
    """
    inside = tuple(f"{head}." for head in head_modules(model))
    if both := [name for name in names if f"{name}.".startswith(inside)]:
        raise UserError(
            f"{both[0]} is part of the head, which is trained whole: leave it out of model.candidates, or adapt it in "
            "place of training it, task.train_head=false"
        )


def drawn_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that no checkpoint has and no method trains: a head with ``task.train_head=false``."""
    trained = tuple(f"{name}." for name in head_modules(model))
    fresh: Any = getattr(model, "fresh_modules", ())
    return [name for name in fresh if not f"{name}.".startswith(trained)]


def _backbone_parts(model: nn.Module) -> set[str]:
    """Names of the children that are the backbone: one, or, as in T5's model for questions, all that a bare one has."""
    prefix = getattr(model, "base_model_prefix", "")
    if hasattr(model, prefix) or not hasattr(model, "config"):
        return {prefix}
    if not hasattr(model, "backbone_parts"):
        from transformers import AutoModel

        with torch.device("meta"):
            bare = AutoModel.from_config(model.config)
        model.backbone_parts = {name for name, _ in bare.named_children()}  # type: ignore[assignment]
    parts: Any = model.backbone_parts
    return set(parts)


def backbone_parameters(model: nn.Module) -> int:
    """Parameters of a model besides its head, shared ones once; before a method adds to them."""
    head = {p for name in head_modules(model) for p in model.get_submodule(name).parameters()}
    return sum(_numel(p) for p in set(model.parameters()) - head)


def _numel(parameter: nn.Parameter) -> int:
    """How many weights a parameter is; in 4 bits two of them are kept as one byte."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


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
        if shortage := out_of_memory(error):
            raise UserError(f"model.path={path}: {shortage}; try model.dtype=bfloat16 or a smaller model") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise UserError(f"model.path={path} cannot be read as a transformers model: {reason}") from error
        raise UserError(
            f"cannot get {path} from the model hub: "
            + (f"{unreachable}, and it is not in the local cache" if unreachable else reason)
            + "\n  Either give a folder that you have: model.path=<folder>"
            "\n  or try what needs no network: python train.py experiment=quickstart"
        ) from error
