"""The ``config.json`` of a checkpoint: its checks, and the transformers configuration that is made from it."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffora.backbones.messages import loading, trusts_code
from diffora.backbones.request import ModelRequest
from diffora.errors import UserError
from diffora.files import read_json
from diffora.hub import resolve
from diffora.settings.sections import Model

log = logging.getLogger(__name__)

RANGES = {
    r".*(dropout|dropout_prob|dropout_rate|pdrop|drop_rate)": (0, 0.999, "a rate in [0, 1)"),
    r".*(_eps|_epsilon)": (0, 0.1, "a number from 0 to 0.1"),
    r"(num_hidden_layers|num_layers|n_layers?)": (0, 10_000, "a number of layers of at most 10,000"),
}
"""Bounds for entries of ``config.json``. Beyond them, transformers makes a useless model without an error."""


WORDS = {
    "AutoModelForSeq2SeqLM": "an encoder with a decoder, such as T5 or BART",
    "AutoModelForCausalLM": "a decoder, such as GPT-2 or Llama",
    "AutoModelForImageClassification": "a model of images, such as ViT",
}
"""Which models have the head of a transformers class, for messages."""


def model_config(settings: Model, request: ModelRequest, meta: bool) -> Any:
    """The transformers configuration of backbone and head.

    Args:
        settings: the ``model`` section.
        request: whose head it is.
        meta: take the dimensions from ``conf/model``, without the network, unless the model is a local folder.
    """
    from transformers import AutoConfig

    local = resolve(settings.path)[1]
    head = {"problem_type": None} | request.head  # a checkpoint may have the problem type of its own training
    given = settings.config or {}
    if meta and not local and given:
        config = AutoConfig.for_model(**given | head)
    else:
        content_of(settings)
        with loading(settings, "config.json") as source:
            config = AutoConfig.from_pretrained(**source, **head)
        other = [f"model.config.{k}={v!r}" for k, v in given.items() if k in head or getattr(config, k, None) != v]
        if other:
            log.warning(
                f"{', '.join(other)} ignored: model.config describes a model for dry_run=true without its files, and "
                f"the files of model.path={settings.path} say otherwise"
            )
    _check_kind(settings, request, config)
    config.return_dict = True  # outputs are read by name
    if hasattr(config, "use_cache"):
        config.use_cache = False  # only generation needs the cache; with it, decoders miss where packed sequences begin
    return config


def _check_kind(settings: Model, request: ModelRequest, config: Any) -> None:
    """Refuse a model of a family that does not have the head that the task needs."""
    import transformers

    known: Any = getattr(transformers, request.model_class)._model_mapping
    if type(config) in known or request.model_class in (getattr(config, "auto_map", None) or {}):
        return
    wanted = WORDS.get(request.model_class, f"one of the families of transformers.{request.model_class}")
    raise UserError(
        f"model.path={settings.path} is a {config.model_type} model, which has no head for task={request.task}: it "
        f"needs {wanted}"
    )


def content_of(settings: Model) -> dict[str, Any]:
    """The content of a checkpoint's ``config.json``, as written in the file.

    Raises:
        UserError: it cannot be read, is not an object, has impossible numbers, or names code that would be fetched and
            run.
    """
    path, local = resolve(settings.path)
    if local:
        content = read_json(Path(path) / "config.json")
    else:
        from transformers import PreTrainedConfig

        with loading(settings) as source:
            content = PreTrainedConfig.get_config_dict(**source)[0]
    if not isinstance(content, dict):
        raise UserError(
            f"{path}/config.json holds a {type(content).__name__}; it must be an object with the entries of a model"
        )
    if wrong := list(_impossible_numbers(content)):
        raise UserError([f"model.path={settings.path}: in its config.json, {problem}" for problem in wrong])
    _check_quantised(settings, content.get("quantization_config"))
    if not trusts_code(settings):
        for key, value in _hub_implementations(content):
            raise UserError(
                f"model.path={settings.path}: {key}={value!r} in its config.json would fetch a program from the hub "
                "and run it. Remove the entry, or allow it, if you trust the authors: model.trust_remote_code=true"
            )
    return content


def check_config(settings: Model) -> None:
    """Refuse a broken ``config.json`` of a local folder.

    Call this before the tokenizer or image processor is loaded: transformers chooses their classes by this file, and
    would report the error as theirs.
    """
    from transformers import AutoConfig

    if resolve(settings.path)[1]:
        content_of(settings)
        with loading(settings, "config.json") as source:
            AutoConfig.from_pretrained(**source)


def _impossible_numbers(content: Any, key: str = "") -> Iterator[str]:
    """One message for each number that cannot be right, at any level of a ``config.json``."""
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _impossible_numbers(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        if content != content:
            yield f"{key}=NaN is not a number"
        for pattern, (low, high, words) in RANGES.items():
            if re.fullmatch(pattern, key.rpartition(".")[2]) and (content < low or content > high):
                yield f"{key}={content} must be {words}"


def _check_quantised(settings: Model, how: Any) -> None:
    """Refuse a ``quantization_config`` that transformers does not know: it would use the packed weights as numbers."""
    if how is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    method = how.get("quant_method") if isinstance(how, dict) else how
    if not any(str(method) in (name, name.rpartition("_")[0]) for name in KNOWN):
        raise UserError(
            f"model.path={settings.path}: quantization_config in its config.json has quant_method={method!r}, which "
            "transformers does not know: use the model as it was before it was quantised"
        )


def _hub_implementations(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of entries such as ``attn_implementation``, at any level, that name a repository of the hub."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _hub_implementations(value, name if "_implementation" in name or not key else key)
    elif isinstance(content, list):
        for value in content:
            yield from _hub_implementations(value, key)
    elif isinstance(content, str) and "_implementation" in key and "/" in content:
        yield key, content
