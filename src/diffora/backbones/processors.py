"""Loads the tokenizer or the image processor of a backbone."""

from pathlib import Path
from typing import Any, Literal

from diffora.backbones.config_json import check_config, content_of
from diffora.backbones.messages import loading
from diffora.errors import UserError
from diffora.hub import resolve
from diffora.settings.sections import Model

ProcessorKind = Literal["tokenizer", "image_processor"]

WITHOUT_VOCABULARY = ("tokenizer_config_file", "normalizer_file", "target_vocab_file")
"""Files of tokenizer classes that may be missing, or do not hold the vocabulary."""
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")


def load_processor(settings: Model, kind: ProcessorKind) -> Any:
    """The transformers tokenizer or image processor of a backbone.

    Args:
        settings: the ``model`` section.
        kind: which of them the task needs (`Task.processor_kind`).

    Raises:
        UserError: it is missing or cannot be read, or the backbone reads images instead of text, or text instead of
            images.
    """
    _check_kind(settings, kind)
    return load_tokenizer(settings) if kind == "tokenizer" else load_image_processor(settings)


def _check_kind(settings: Model, kind: ProcessorKind) -> None:
    """Refuse a model of images for a task of texts, and a model of texts for a task of images.

    Families that transformers does not know are not refused.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    family = content_of(settings).get("model_type")
    place = f"model.path={settings.path} is a {family} model, which reads"
    if kind == "tokenizer":
        if family in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and family not in TOKENIZER_MAPPING_NAMES:
            raise UserError(f"{place} images, and the task has texts: choose a model of texts, such as model=minilm")
    elif family in TOKENIZER_MAPPING_NAMES and family not in IMAGE_PROCESSOR_MAPPING_NAMES:
        raise UserError(f"{place} texts, and the task has images: choose a model of images, such as model=vit_base")


def load_tokenizer(settings: Model) -> Any:
    """The tokenizer of a backbone. One without a padding token, like GPT-2's, pads with its end token.

    Raises:
        UserError: it cannot be read, its vocabulary is missing, or it has neither a padding token nor an end token.
    """
    from transformers import AutoTokenizer

    check_config(settings)
    try:
        with loading(settings, "tokenizer") as source:
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except UserError:
        _check_vocabulary(settings, None)
        raise
    _check_vocabulary(settings, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path={settings.path}: its tokenizer has neither a padding token nor an end token. Set pad_token in "
            'its tokenizer_config.json to a token of the vocabulary, e.g. "pad_token": "<pad>"'
        )
    return tokenizer


def load_image_processor(settings: Model) -> Any:
    """The image processor of a vision backbone: image sizes, means and the like. This does not need torchvision.

    Raises:
        UserError: it is missing or cannot be read.
    """
    from transformers import AutoImageProcessor

    check_config(settings)
    path, local = resolve(settings.path)
    if local and not any((Path(path) / name).is_file() for name in IMAGE_PROCESSOR_FILES):
        raise UserError(
            f"model.path={settings.path} has no image processor: preprocessor_config.json is missing. Copy it from the "
            "model that this one was made from: AutoImageProcessor.from_pretrained(<that model>)"
            f".save_pretrained({str(settings.path)!r})"
        )
    with loading(settings, "image processor") as source:
        return AutoImageProcessor.from_pretrained(**source)


def _check_vocabulary(settings: Model, tokenizer: Any) -> None:
    """Refuse a tokenizer without a vocabulary file. transformers would make one of the special tokens alone.

    Args:
        settings: the ``model`` section.
        tokenizer: None if it could not be loaded.
    """
    from transformers.utils.hub import cached_file

    path, _ = resolve(settings.path)

    def exists(name: str) -> bool:
        found = cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return found is not None

    if exists("tokenizer.json"):
        return
    wanted: dict[str, str] = {"tokenizer_file": "tokenizer.json"} if tokenizer is None else tokenizer.vocab_files_names
    given = {} if tokenizer is None else tokenizer.init_kwargs
    names = {key: name for key, name in wanted.items() if key not in (*WITHOUT_VOCABULARY, "tokenizer_file")}
    absent = [name for key, name in names.items() if not (exists(name) or given.get(key))]
    if absent or (wanted and not names):
        either = f" (or {' and '.join(absent)})" if absent else ""
        raise UserError(
            f"model.path={settings.path} has no tokenizer: tokenizer.json{either} is missing. Copy it from the model "
            "that this one was made from: AutoTokenizer.from_pretrained(<that model>)"
            f".save_pretrained({str(settings.path)!r})"
        )
