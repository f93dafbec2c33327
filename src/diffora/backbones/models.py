"""Backbones: a transformers model with a fresh head, from the hub, a folder, the package, or on the meta device.

A backbone is taken whole or refused: weights that the checkpoint lacks, weights that are not numbers, a tokenizer that
is missing or does not fit, inputs that are too long. Code that comes with a checkpoint is not run.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from diffora.backbones.compatibility import (
    check_length,
    check_values,
    config_problems,
    left_over,
    natural,
    reason,
    some,
    weight_problems,
)
from diffora.errors import UserError, out_of_memory
from diffora.files import read_json
from diffora.hub import resolve, why_unreachable
from diffora.kernels.dropout import use_cheap_dropout
from diffora.settings.sections import Model
from diffora.tasks.base import Task

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What ``trainer.precision`` computes in; others compute in the dtype of the weights."""


def model_config(cfg: Any, task: Task, meta: bool) -> Any:
    """The transformers configuration of backbone and head.

    Args:
        cfg: the ``model`` section.
        task: whose head it is.
        meta: take the dimensions from ``conf/model`` unless the model is a local folder: no network.
    """
    from transformers import AutoConfig

    local = resolve(cfg.path)[1]
    head = {"problem_type": None} | task.head()  # not the one that a checkpoint was trained for
    if meta and not local and getattr(cfg, "config", None):
        shape: Any = _plain(cfg.config)
        config = AutoConfig.for_model(**shape | head)
    else:
        config_of_checkpoint(cfg)
        with _readable(cfg, "config.json") as where:
            config = AutoConfig.from_pretrained(**where, **head)
        given: Any = _plain(getattr(cfg, "config", None))
        if other := [f"model.config.{k}={v!r}" for k, v in given.items() if k in head or getattr(config, k, None) != v]:
            log.warning(
                f"{', '.join(other)} not taken: model.config describes a model for dry_run=true without its files, and "
                f"here those of model.path={cfg.path} say otherwise"
            )
    config.return_dict = True  # outputs are read by name
    if hasattr(config, "use_cache"):
        config.use_cache = False  # it is for generating; with a cache, decoders do not see where packed sequences begin
    return config


def config_of_checkpoint(cfg: Any) -> dict[str, Any]:
    """The content of a checkpoint's ``config.json``, as it is written there.

    Raises:
        UserError: it cannot be read, is not an object, or names code that would be fetched and run.
    """
    path, local = resolve(cfg.path)
    if local:
        content = read_json(Path(path) / "config.json")
    else:
        from transformers import PreTrainedConfig

        with _readable(cfg) as where:
            content = PreTrainedConfig.get_config_dict(**where)[0]
    if not isinstance(content, dict):
        raise UserError(
            f"{path}/config.json holds a {type(content).__name__}; it must be an object with the entries of a model"
        )
    if wrong := list(config_problems(content)):
        raise UserError([f"model.path={cfg.path}: in its config.json, {problem}" for problem in wrong])
    _check_quantised(cfg, content.get("quantization_config"))
    if not _trusts(cfg):
        for key, value in _implementations(content):
            raise UserError(
                f"model.path={cfg.path}: {key}={value!r} in its config.json would fetch a program from the hub and run "
                "it. Remove the entry, or allow it, if you trust the authors: model.trust_remote_code=true"
            )
    return content


def _check_quantised(cfg: Any, how: Any) -> None:
    """Refuse a ``quantization_config`` that transformers does not know: it would take packed weights as they are."""
    if how is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    method = how.get("quant_method") if isinstance(how, dict) else how
    if not any(str(method) in (name, name.rpartition("_")[0]) for name in KNOWN):
        raise UserError(
            f"model.path={cfg.path}: quantization_config in its config.json has quant_method={method!r}, which "
            "transformers does not know: use the model as it was before it was quantised"
        )


def _implementations(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Entries such as ``attn_implementation``, at any level, that name a repository of the hub."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _implementations(value, name if "_implementation" in name or not key else key)
    elif isinstance(content, list):
        for value in content:
            yield from _implementations(value, key)
    elif isinstance(content, str) and "_implementation" in key and "/" in content:
        yield key, content


def _check_config(cfg: Any) -> None:
    """Refuse a broken ``config.json`` under its own name: tokenizers and image processors are chosen by it."""
    from transformers import AutoConfig

    if resolve(cfg.path)[1]:
        config_of_checkpoint(cfg)
        with _readable(cfg, "config.json") as where:
            AutoConfig.from_pretrained(**where)


def _trusts(cfg: Any) -> bool:
    """``model.trust_remote_code``; runs of earlier versions do not have it."""
    return getattr(cfg, "trust_remote_code", False) is True


def load_tokenizer(cfg: Any) -> Any:
    """The tokenizer of a backbone; one without a padding token, like GPT-2's, pads with its end token.

    Raises:
        UserError: it cannot be read, its vocabulary is missing, or it has neither a padding token nor an end token.
    """
    from transformers import AutoTokenizer

    _check_config(cfg)
    try:
        with _readable(cfg, "tokenizer") as where:
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except UserError:
        _check_vocabulary(cfg, None)
        raise
    _check_vocabulary(cfg, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path={cfg.path}: its tokenizer has neither a padding token nor an end token. Set pad_token in its "
            'tokenizer_config.json to a token of the vocabulary, e.g. "pad_token": "<pad>"'
        )
    return tokenizer


WITHOUT_VOCABULARY = ("tokenizer_config_file", "normalizer_file", "target_vocab_file")
"""Files of tokenizer classes that may be missing, or are no vocabulary."""


def _check_vocabulary(cfg: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose vocabulary is in no file: transformers then makes one of its special tokens alone.

    Args:
        tokenizer: None if it could not be loaded.
    """
    from transformers.utils.hub import cached_file

    path, _ = resolve(cfg.path)

    def there(name: str) -> bool:
        found = cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return found is not None

    if there("tokenizer.json"):
        return
    wanted: dict[str, str] = {"tokenizer_file": "tokenizer.json"} if tokenizer is None else tokenizer.vocab_files_names
    given = {} if tokenizer is None else tokenizer.init_kwargs
    names = {key: name for key, name in wanted.items() if key not in (*WITHOUT_VOCABULARY, "tokenizer_file")}
    absent = [name for key, name in names.items() if not (there(name) or given.get(key))]
    if absent or (wanted and not names):
        either = f" (or {' and '.join(absent)})" if absent else ""
        raise UserError(
            f"model.path={cfg.path} has no tokenizer: tokenizer.json{either} is missing. Copy it from the model that "
            f"this one was made from: AutoTokenizer.from_pretrained(<that model>).save_pretrained({str(cfg.path)!r})"
        )


def load_image_processor(cfg: Any) -> Any:
    """The image processor of a vision backbone: its sizes, means and the like; nothing here needs torchvision.

    Raises:
        UserError: it cannot be read, or is missing.
    """
    from transformers import AutoImageProcessor

    _check_config(cfg)
    path, local = resolve(cfg.path)
    names = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
    if local and not any((Path(path) / name).is_file() for name in names):
        raise UserError(
            f"model.path={cfg.path} has no image processor: preprocessor_config.json is missing. Copy it from that "
            "which this one was made from: AutoImageProcessor.from_pretrained(<that model>)"
            f".save_pretrained({str(cfg.path)!r})"
        )
    with _readable(cfg, "image processor") as where:
        return AutoImageProcessor.from_pretrained(**where)


def load_model(cfg: Any, task: Task, whole: bool = False) -> nn.Module:
    """Pretrained backbone, frozen, with the head of a task: new and trainable, or pretrained and frozen.

    The head is new, whatever the checkpoint brings, unless the task takes the pretrained one (`Task.pretrained_head`).
    The backbone is in ``model.dtype``, perhaps quantised; a trainable head is in float32. The new weights are drawn
    from torch's global generator: seed it first.

    Args:
        whole: the checkpoint is a model that was trained for the task: its head is kept, and must be there.

    Raises:
        UserError: files that cannot be read; weights of the backbone that are missing, left over, of another shape or
            no numbers; a ``task.max_length`` that is too large for it.
    """
    import transformers

    if problems := list(_file_problems(cfg)):
        raise UserError(problems)
    config = model_config(cfg, task, meta=False)
    # Pass the dtype explicitly: transformers would otherwise take that of the file, float16 for DeBERTaV3.
    how: dict[str, Any] = {"dtype": dtype_of(cfg)}
    if getattr(cfg, "quantise", None):
        how["quantization_config"] = _quantisation(cfg, task)
    before = torch.get_rng_state()
    with _readable(cfg) as where:
        model, info = getattr(transformers, task.model_class).from_pretrained(
            **where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    _take_checkpoint(model, info, cfg, task, whole, before)
    check_values(model, cfg)
    check_length(model, getattr(task.cfg, "max_length", None))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights on a CPU in the first evaluation; no gradient passes them then.
            module.support_avx512bf16_for_cpu = False
    model.trains_head = task.trains_head
    if getattr(cfg, "kernel", "fused") == "fused":
        use_cheap_dropout(model)
    return freeze_backbone(model)


def meta_model(cfg: Any, task: Task) -> nn.Module:
    """The same model without memory for its weights, and not quantised."""
    import transformers

    config = model_config(cfg, task, meta=True)
    with _readable(cfg) as where, torch.device("meta"):
        model: nn.Module = getattr(transformers, task.model_class).from_config(
            config, dtype=dtype_of(cfg), trust_remote_code=where["trust_remote_code"]
        )
    check_length(model, getattr(task.cfg, "max_length", None))
    model.trains_head = task.trains_head  # type: ignore[assignment]
    if getattr(cfg, "kernel", "fused") == "fused":
        use_cheap_dropout(model)
    return freeze_backbone(model)


def _file_problems(cfg: Any) -> Iterator[str]:
    path, local = resolve(cfg.path)
    if local and (Path(path) / "adapter_config.json").is_file():
        yield f"model.path={cfg.path} is an adapter, not a model: give the folder or hub id of its base model"
    elif local and "transformers_weights" not in config_of_checkpoint(cfg):  # which names another file
        yield from weight_problems(Path(path), bool(config_of_checkpoint(cfg).get("quantization_config")))


def _take_checkpoint(
    model: Any, info: dict[str, Any], cfg: Any, task: Task, whole: bool, generator_state: torch.Tensor
) -> None:
    """Refuse a backbone that is not complete, and draw the head anew where the checkpoint brought one.

    Args:
        info: what transformers reports of its loading.
        generator_state: of torch's global generator before the loading, so that the head is drawn as for a checkpoint
            without one.
    """
    own = list(model.state_dict())
    missing = {key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")}
    shapes = {key: (tuple(given), tuple(wanted)) for key, given, wanted in info["mismatched_keys"]}
    keeps_head = whole or task.pretrained_head
    head = () if keeps_head else tuple(f"{name}." for name in _outside_backbone(model))
    pooler = f"{model.base_model_prefix}.pooler"
    of_pooler = [key for key in own if key.startswith(f"{pooler}.")]
    fresh_pooler = bool(of_pooler) and missing.issuperset(of_pooler) and not whole
    new = (*head, f"{pooler}.") if fresh_pooler else head

    def kept(keys: Iterable[str]) -> list[str]:
        return sorted((key for key in keys if not key.startswith(new)), key=natural)

    problems = []
    if absent := kept(missing):
        if whole and (heads := [key for key in absent if key.startswith(tuple(_outside_backbone(model)))]):
            raise UserError(f"{cfg.path} has no {heads[0]}: it was trained for another kind of task")
        total = len(kept(own))
        problems.append(
            f"model.path={cfg.path} lacks {len(absent)} of the {total} weights that its config.json asks for: "
            f"{some(absent)}"
        )
    if wrong := kept(shapes):
        first = f"{wrong[0]} is {list(shapes[wrong[0]][0])} instead of {list(shapes[wrong[0]][1])}"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        problems.append(f"model.path={cfg.path}: weights have other shapes than its config.json says: {first}{more}")
    left, unused = left_over(model, info["unexpected_keys"])
    if left:
        problems.append(
            f"model.path={cfg.path} has {len(left)} weights of layers that its config.json lacks: {some(left)}"
        )
    if problems:
        raise UserError([*problems, "  The weights and config.json must be of the same model."])

    if unused:
        log.warning(
            f"model.path={cfg.path} has {len(unused)} weights in its layers that a {type(model).__name__} "
            f"does not use: {some(unused)}"
        )
    old = [key for key in own if key.startswith(head) and key not in missing] if head else []
    model.fresh_pooler = pooler if fresh_pooler else None
    model.fresh_modules = sorted({key.rpartition(".")[0] for key in missing.union(old) if key.startswith(new)})
    model.resized_head = bool(shapes)
    if old:
        classes = config_of_checkpoint(cfg).get("id2label")
        names = some([str(name) for name in classes.values()]) if isinstance(classes, dict) else some(old)
        log.info(f"model.path={cfg.path} has a head of its own ({names}), which is not used: {task.name} has a new one")
        _draw(model, tuple(f"{name}." for name in model.fresh_modules), generator_state)


def _draw(model: nn.Module, prefixes: tuple[str, ...], generator_state: torch.Tensor) -> None:
    """Draw some weights anew, as transformers draws those that a checkpoint lacks."""
    torch.set_rng_state(generator_state)
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = not name.startswith(prefixes)  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]


def dtype_of(cfg: Any) -> torch.dtype:
    """``model.dtype``, the precision of the frozen weights."""
    dtype: torch.dtype = getattr(torch, getattr(cfg, "dtype", "float32"))
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


def problems(model: Model, dry_run: bool) -> Iterator[str]:
    """What is wrong with the ``model`` section for this machine and the model's own files, before they are loaded."""
    if model.quantise and not dry_run and importlib.util.find_spec("bitsandbytes") is None:
        yield f"model.quantise={model.quantise} needs bitsandbytes: pip install 'diffora[quantised]'"
    try:
        if resolve(model.path)[1]:
            config_of_checkpoint(model)
            if not dry_run:
                yield from _file_problems(model)
    except UserError as error:
        yield from error.problems


def _plain(node: Any) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    return content or {}


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
    if not getattr(model, "trains_head", not _brings_its_head(model)):
        return []
    pooler = getattr(model, "fresh_pooler", None)
    return _outside_backbone(model) + ([pooler] if isinstance(pooler, str) else [])


def _brings_its_head(model: nn.Module) -> bool:
    """Whether a model that `load_model` did not make has the pretrained head, as a language model has."""
    outputs: Any = getattr(model, "get_output_embeddings", None)
    return outputs is not None and outputs() is not None


def _outside_backbone(model: nn.Module) -> list[str]:
    """Names of the parts that are not the backbone, those without weights left out."""
    backbone = _backbone_parts(model)
    return [
        name for name, part in model.named_children() if name not in backbone and any(True for _ in part.parameters())
    ]


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
            bare = AutoModel.from_config(model.config, trust_remote_code=model.is_custom_code())  # type: ignore[operator]
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
def _readable(cfg: Any, what: str = "model") -> Iterator[dict[str, Any]]:
    """Turns transformers' many ways to fail at loading into one message; yields arguments for ``from_pretrained``."""
    path, local = resolve(cfg.path)
    unreachable = None if local else why_unreachable()
    try:
        yield {
            "pretrained_model_name_or_path": path,
            "local_files_only": local or unreachable is not None,
            "trust_remote_code": _trusts(cfg),
        }
    except UserError:
        raise
    except Exception as error:
        if shortage := out_of_memory(error):
            raise UserError(
                f"model.path={cfg.path}: {shortage}; try model.dtype=bfloat16 or a smaller model"
            ) from error
        if "trust_remote_code" in str(error) and not _trusts(cfg):
            raise UserError(
                f"model.path={cfg.path}: its {what} is Python code of its own (auto_map), which is not run. If you "
                "have read it and trust its authors: model.trust_remote_code=true"
            ) from error
        if local:
            for file in sorted(Path(path).glob("*.json")):
                read_json(file)  # a damaged one has its own message
            raise UserError(
                f"model.path={cfg.path}: its {what} cannot be read by transformers: {reason(error)}"
            ) from error
        raise UserError(
            f"cannot get {path} from the model hub: "
            + (f"{unreachable}, and it is not in the local cache" if unreachable else reason(error))
            + "\n  Either give a folder that you have: model.path=<folder>"
            "\n  or try what needs no network: python train.py experiment=quickstart"
        ) from error
