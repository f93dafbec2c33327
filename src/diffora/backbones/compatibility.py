"""Whether the parts of a model fit each other: weights, configuration, tokenizer and the task's settings.

What does not fit is refused before training: transformers would go on with random weights or wrong tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffora.errors import UserError
from diffora.files import read_json

# --- weights ---


FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of weights that can be taken as they are."""


def weight_problems(folder: Path, quantised: bool) -> Iterator[str]:
    """What is wrong with the files of weights in a model's folder, as far as their headers tell.

    Args:
        quantised: whether config.json says how the weights were quantised: they may be whole numbers then.

    Raises:
        UserError: the list of the files cannot be read.
    """
    from safetensors import safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.is_file():
        if not index.is_file():
            if not any((folder / f"pytorch_model.bin{end}").is_file() for end in ("", ".index.json")):
                yield f"model.path={folder} has no weights: model.safetensors is missing"
            return
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
            yield f"{index} has no weight_map, which says for each weight in which file it is"
            return
        files = [folder / name for name in sorted(set(shards.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        yield f"model.path={folder} lacks {some(absent)}, which {index.name} names"
    types: dict[str, str] = {}
    for file in files:
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as content:
                    types |= {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
            except Exception as error:
                yield f"{file} is damaged or incomplete: {error}"
    others = sorted(
        (name for name, kind in types.items() if name.endswith(".weight") and kind not in FLOATS), key=natural
    )
    if others and not quantised:
        yield (
            f"model.path={folder} has weights that are {types[others[0]]}, not floating-point numbers of 16 bits or "
            f"more, and its config.json has no quantization_config that says what they stand for: {some(others)}"
        )
    twice = [
        name
        for name in sorted(types, key=natural)
        if re.search(r"\.\d+\.", rest := name.partition(".")[2]) and rest in types
    ]
    if twice:
        yield (
            f"model.path={folder} has two weights for each of {len(twice)} places, such as {twice[0]} and "
            f"{twice[0].partition('.')[2]}: save one model alone"
        )


RANGES = {
    r".*(dropout|dropout_prob|dropout_rate|pdrop|drop_rate)": (0, 0.999, "a rate in [0, 1)"),
    r".*(_eps|_epsilon)": (0, 0.1, "a number from 0 to 0.1"),
    r"(num_hidden_layers|num_layers|n_layers?)": (0, 10_000, "a number of layers of at most 10,000"),
}
"""Entries of ``config.json`` with which transformers makes a model of no use, without a word."""


def config_problems(content: Any, key: str = "") -> Iterator[str]:
    """Which numbers in a ``config.json``, at any level, cannot be right."""
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from config_problems(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        if content != content:
            yield f"{key}=NaN is not a number"
        for pattern, (low, high, words) in RANGES.items():
            if re.fullmatch(pattern, key.rpartition(".")[2]) and (content < low or content > high):
                yield f"{key}={content} must be {words}"


def left_over(model: Any, unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Weights of a checkpoint that belong to layers which the backbone does not have, or to layers which it has.

    Args:
        unexpected: names of weights that were not loaded. Those outside lists of layers are no concern: old heads.
    """
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            lists[name.removeprefix(f"{model.base_model_prefix}.")] = len(module)
    beyond, within = [], []
    for key in sorted(unexpected, key=natural):
        parts = key.removeprefix(f"{model.base_model_prefix}.").split(".")
        numbers = [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdigit()]
        known = [(number, lists[place]) for place, number in numbers if place in lists]
        if any(number >= length for number, length in known):
            beyond.append(key)
        elif known:
            within.append(key)
    return beyond, within


def natural(key: str) -> list[Any]:
    """A sorting key that orders the numbers within a dotted name by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def reason(error: Exception) -> str:
    """What an exception of a library says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def some(names: Sequence[str]) -> str:
    """The first three names and how many there are besides."""
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")


def check_values(model: Any, cfg: Any) -> None:
    """Refuse weights that are not finite, and layers or embeddings that are all zero: a damaged file."""
    broken: list[str] = []
    zero: dict[str, bool] = {}
    words = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        if parameter.dtype.itemsize == 1:  # 8-bit floats, which torch cannot compare
            continue
        low, high = torch.aminmax(parameter.detach())
        if not (low.isfinite() and high.isfinite()):
            broken.append(name)
        if parameter.ndim >= 2:
            layer = re.match(r".*?\.\d+(?=\.)", name)
            place = name if words is not None and parameter is words.weight else layer and layer[0]
            if place:
                zero[place] = zero.get(place, True) and bool(low == high == 0)
    if broken:
        raise UserError(f"model.path={cfg.path} has weights that are not finite numbers: {some(broken)}")
    if empty := [place for place, is_zero in zero.items() if is_zero]:
        raise UserError(f"model.path={cfg.path} has weights that are all zero: {some(empty)}; the file is damaged")


# --- lengths ---

POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""What transformers' models call the table of absolute positions."""


def longest_input(model: Any) -> int | None:
    """How many tokens a backbone can read; None where nothing limits it (relative positions, images)."""
    if model.main_input_name != "input_ids":
        return None
    limits: list[Any] = []
    rotary = False
    for name, module in model.named_modules():
        rotary = rotary or "Rotary" in type(module).__name__
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS:
            # RoBERTa's positions begin after that of the padding token, OPT's and BART's at 2.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - getattr(module, "offset", before))
    if rotary and not limits:
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    # GPT-J and its like compute their tables beforehand.
    limits += [len(table) for name, table in model.named_buffers() if name.rpartition(".")[2] in POSITIONS]
    known = [limit for limit in limits if isinstance(limit, int)]
    return min(known, default=None)


def check_length(model: Any, length: int | None) -> None:
    """Refuse a ``task.max_length`` (None for images) that is beyond the backbone."""
    most = longest_input(model)
    if length is not None and most is not None and length > most:
        raise UserError(f"task.max_length={length} is more than the {most} tokens that this backbone reads")


# --- tokenizers ---


def match_processor(model: Any, processor: Any) -> dict[str, Any]:
    """Make the backbone's configuration agree with its tokenizer or image processor, before anything is encoded.

    Heads look for the padding token by the configuration's ``pad_token_id``: it must be the tokenizer's.

    Returns:
        What `from_pretrained` must be given for the same model, besides its name and `Task.head`.

    Raises:
        UserError: they cannot be of one model, or predictions would depend on what a row is padded with.
    """
    arguments: dict[str, Any] = {"ignore_mismatched_sizes": True} if getattr(model, "resized_head", False) else {}
    token = getattr(processor, "pad_token_id", None)
    if token is None:
        if hasattr(processor, "crop"):
            _check_image_size(model, processor.crop)
        return arguments
    _check_sizes(model, processor)
    _check_padding_token(model, processor)
    config = model.config
    if getattr(config, "pad_token_id", None) != token:
        arguments["pad_token_id"] = token
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.pad_token_id = token
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = token
    _check_padding(model, processor)
    return arguments


def _check_image_size(model: Any, side: int) -> None:
    """Refuse images of another size than the backbone takes. It is asked."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, side, side, device=model.device))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{type(model).__name__} does not take images of three channels and {side} x {side} pixels, as its "
            f"preprocessor_config.json asks for: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(was_training)


def _check_sizes(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that the embedding does not have, or with less than half of them."""
    known = model.get_input_embeddings().num_embeddings
    # Placeholders for images and the like: Gemma 3's text models have one token less than their tokenizer.
    media = {getattr(tokenizer, f"{name}_token_id", None) for name in ("image", "audio", "video")}
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= known and i not in media)
    place = getattr(tokenizer, "name_or_path", "")
    if beyond:
        raise UserError(
            f"model.path={place}: its tokenizer has {len(tokenizer)} tokens, its embedding {known}: "
            f"{some([repr(token) for _, token in beyond])} cannot be read. Use the tokenizer that the model was made "
            "with, or enlarge the model: model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
        )
    if 2 * len(tokenizer) < known:
        raise UserError(
            f"model.path={place}: its tokenizer has {len(tokenizer)} tokens, its embedding {known}: not of one "
            "model. Use the tokenizer that the model was made with"
        )


def _check_padding_token(model: Any, tokenizer: Any) -> None:
    """Refuse a padding token that such models as RoBERTa, which count positions by it, do not have."""
    place = getattr(tokenizer, "name_or_path", "")
    for module in model.modules():
        table = next((part for name, part in module.named_children() if name in POSITIONS), None)
        counts_by = getattr(module, "padding_idx", None)
        if table is None or not isinstance(counts_by, int) or getattr(table, "padding_idx", None) != counts_by:
            continue
        if counts_by != tokenizer.pad_token_id:
            right = tokenizer.convert_ids_to_tokens(counts_by) if counts_by < len(tokenizer) else None
            raise UserError(
                f"model.path={place}: its tokenizer pads with {tokenizer.pad_token!r} ({tokenizer.pad_token_id}), but "
                f"this {type(model).__name__} counts positions by padding token {counts_by}: set "
                f'"pad_token": "{right}" in tokenizer_config.json'
            )
    if model.config.is_encoder_decoder and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"model.path={place}: its tokenizer has no padding token besides its end token, by which a "
            f"{type(model).__name__} finds the end of a text: set pad_token in tokenizer_config.json"
        )


def _check_padding(model: Any, tokenizer: Any) -> None:
    """Refuse a model whose output for a text depends on how far it is padded, that is, on its batch. It is asked."""
    try:
        encoded = tokenizer("one two three four")
    except Exception as error:  # its files may say anything
        place = getattr(tokenizer, "name_or_path", "")
        raise UserError(f"model.path={place}: its tokenizer does not work: {reason(error)}") from error
    ids, pad = list(encoded["input_ids"]), tokenizer.pad_token_id
    most = longest_input(model)
    if not ids or (most is not None and len(ids) + 4 > most):
        return
    device = model.get_input_embeddings().weight.device

    def outputs(padding: int) -> list[torch.Tensor]:
        columns = {"input_ids": ids + [pad] * padding, "attention_mask": [1] * len(ids) + [0] * padding}
        if "token_type_ids" in encoded:
            columns["token_type_ids"] = list(encoded["token_type_ids"]) + [0] * padding
        found = model(**{name: torch.tensor([values], device=device) for name, values in columns.items()})
        # Logits of each token are those of the text; others have no such dimension.
        logits = [found[name] for name in ("logits", "start_logits", "end_logits") if name in found]
        return [(part[:, : len(ids)] if part.shape[1] == len(ids) + padding else part).float() for part in logits]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            pairs = list(zip(outputs(0), outputs(4), strict=True))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # entries of config.json that do not go together
        raise UserError(
            f"{type(model).__name__} cannot be called, as its config.json describes it: {reason(error)}"
        ) from error
    finally:
        model.train(was_training)
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if any((a - b).abs().max() > (0.01 if exact else 0.2) * a.abs().max() for a, b in pairs):
        raise UserError(
            f"{type(model).__name__} gives a text another output when it is padded: its predictions would depend on "
            "the batch. Use another backbone"
        )
