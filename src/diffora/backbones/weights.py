"""Whether the weights of a checkpoint are complete, readable and sensible.

transformers draws random weights for what is missing and ignores what is left over. Here both are refused.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffora.backbones.messages import first_three
from diffora.errors import UserError
from diffora.files import read_json

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, by their names in safetensors, that can be loaded without more information."""


def file_problems(folder: Path, quantised: bool) -> Iterator[str]:
    """What is wrong with the weight files in a model's folder, as far as their headers tell.

    Args:
        folder: the model's.
        quantised: whether config.json says how the weights were quantised. They may then be whole numbers.

    Raises:
        UserError: the index of the files cannot be read.
    """
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
        yield f"model.path={folder} lacks {first_three(absent)}, which {index.name} names"
    problems: list[str] = []
    types = _types_of(files, problems)
    yield from problems
    yield from _type_problems(folder, types, quantised)


def _types_of(files: Iterable[Path], problems: list[str]) -> dict[str, str]:
    """The type of each weight in some safetensors files; a damaged file is added to ``problems``."""
    from safetensors import safe_open

    types: dict[str, str] = {}
    for file in files:
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as content:
                    types |= {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
            except Exception as error:
                problems.append(f"{file} is damaged or incomplete: {error}")
    return types


def _type_problems(folder: Path, types: dict[str, str], quantised: bool) -> Iterator[str]:
    """Weights that are packed numbers without their scales, and weights that are there under two names."""
    others = sorted(
        (name for name, kind in types.items() if name.endswith(".weight") and kind not in FLOATS), key=natural
    )
    if others and not quantised:
        yield (
            f"model.path={folder} has weights that are {types[others[0]]}, not floating-point numbers of 16 bits or "
            "more, and its config.json has no quantization_config that says what they stand for: "
            f"{first_three(others)}"
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


def left_over(model: Any, unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Weights in a checkpoint's layers that the model does not use.

    Args:
        model: the loaded model.
        unexpected: names of weights that were not loaded. Those outside lists of layers, such as old heads, are
            ignored.

    Returns:
        (weights of layers that the model lacks, unused weights of layers that it has).
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
    """A sort key for names with numbers: layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def check_values(model: Any, path: str) -> None:
    """Refuse weights that are not finite, and layers or embeddings that are all zero: the file is damaged.

    Args:
        model: the loaded model.
        path: ``model.path``, for the message.
    """
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
        raise UserError(f"model.path={path} has weights that are not finite numbers: {first_three(broken)}")
    if empty := [place for place, is_zero in zero.items() if is_zero]:
        raise UserError(f"model.path={path} has weights that are all zero: {first_three(empty)}; the file is damaged")
