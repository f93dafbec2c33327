"""Whether a model, its tokenizer or image processor, and the length of a task's inputs fit each other."""

from typing import Any

import torch
from torch import nn

from diffora.backbones.messages import first_three, one_line
from diffora.errors import UserError, first_line

# --- lengths ---

POSITIONS = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe")
"""Names of the table of absolute positions in transformers' models."""


def longest_input(model: Any) -> int | None:
    """The most tokens that a model can read; None where nothing limits them (relative positions, images)."""
    if model.main_input_name != "input_ids":
        return None
    limits: list[Any] = []
    rotary = False
    for name, module in model.named_modules():
        rotary = rotary or "Rotary" in type(module).__name__
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS:
            # RoBERTa's positions begin after the padding token's, OPT's and BART's at 2.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - getattr(module, "offset", before))
            # Nyströmformer's table has two rows more than are ever used.
            beside = model.get_submodule(name.rpartition(".")[0])._buffers.get("position_ids")
            limits += [] if beside is None else [beside.shape[-1]]
    if rotary and not limits:
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    # GPT-J and similar models keep computed tables as buffers.
    limits += [len(table) for name, table in model.named_buffers() if name.rpartition(".")[2] in POSITIONS]
    known = [limit for limit in limits if isinstance(limit, int)]
    return min(known, default=None)


def check_length(model: Any, length: int | None) -> None:
    """Refuse a ``task.max_length`` that is more than the model can read. None (images) always passes."""
    most = longest_input(model)
    if length is not None and most is not None and length > most:
        raise UserError(f"task.max_length={length} is more than the {most} tokens that this backbone reads")


# --- tokenizers ---


def match_processor(model: Any, processor: Any) -> dict[str, Any]:
    """Make the model's configuration agree with its tokenizer or image processor, before anything is encoded.

    Heads find the padding token by the configuration's ``pad_token_id``, so it is set to the tokenizer's.

    Args:
        model: the loaded model.
        processor: a tokenizer, or a task's image preprocessing, with the side of the images in ``crop``.

    Returns:
        What ``from_pretrained`` needs to make the same model: ``pad_token_id``, if it was another one.

    Raises:
        UserError: they cannot be of one model, or predictions would depend on how far a row is padded.
    """
    token = getattr(processor, "pad_token_id", None)
    if token is None:
        if hasattr(processor, "crop"):
            _check_image_size(model, processor.crop)
        return {}
    _check_sizes(model, processor)
    _check_padding_token(model, processor)
    config = model.config
    changed = getattr(config, "pad_token_id", None) != token
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.pad_token_id = token
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = token
    _check_padding(model, processor)
    return {"pad_token_id": token} if changed else {}


def _check_image_size(model: Any, side: int) -> None:
    """Refuse images of a size that the model does not take. The model is called to find out."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, side, side, device=model.device))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{type(model).__name__} does not take images of three channels and {side} x {side} pixels, as its "
            f"preprocessor_config.json asks for: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)


def _check_sizes(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that the embedding lacks, or with less than half as many tokens."""
    known = model.get_input_embeddings().num_embeddings
    # Placeholders for images and the like: Gemma 3's text models have one token less than their tokenizer.
    media = {getattr(tokenizer, f"{name}_token_id", None) for name in ("image", "audio", "video")}
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= known and i not in media)
    place = getattr(tokenizer, "name_or_path", "")
    if beyond:
        raise UserError(
            f"model.path={place}: its tokenizer has {len(tokenizer)} tokens, its embedding {known}: "
            f"{first_three([repr(token) for _, token in beyond])} cannot be read. Use the tokenizer that the model was "
            "made with, or enlarge the model: model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
        )
    if 2 * len(tokenizer) < known:
        raise UserError(
            f"model.path={place}: its tokenizer has {len(tokenizer)} tokens, its embedding {known}: not of one "
            "model. Use the tokenizer that the model was made with"
        )


def _check_padding_token(model: Any, tokenizer: Any) -> None:
    """Refuse a padding token that does not suit the model. Models like RoBERTa count positions by it."""
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
            f"model.path={place}: its tokenizer pads with its end token, and a {type(model).__name__} finds the end of "
            "a text by this token: set pad_token in tokenizer_config.json to another one"
        )


def _check_padding(model: Any, tokenizer: Any) -> None:
    """Refuse a model whose output depends on the padding, and so on the batch. The model is called to find out."""
    try:
        encoded = tokenizer("one two three four")
    except Exception as error:  # damaged files can raise any error
        place = getattr(tokenizer, "name_or_path", "")
        raise UserError(f"model.path={place}: its tokenizer does not work: {one_line(error)}") from error
    ids, pad = list(encoded["input_ids"]), tokenizer.pad_token_id
    most = longest_input(model)
    if not ids or (most is not None and len(ids) + 4 > most):
        return
    device = model.get_input_embeddings().weight.device
    # For other tasks, these models make the decoder's input themselves.
    generates = model.config.is_encoder_decoder and model.can_generate()
    one_choice = type(model).__name__.endswith("ForMultipleChoice")  # it reads rows of choices

    def outputs(padding: int) -> list[torch.Tensor]:
        columns = {"input_ids": ids + [pad] * padding, "attention_mask": [1] * len(ids) + [0] * padding}
        if "token_type_ids" in encoded:
            columns["token_type_ids"] = list(encoded["token_type_ids"]) + [0] * padding
        if generates:
            columns["decoder_input_ids"] = ids
        rows = {name: torch.tensor([values], device=device) for name, values in columns.items()}
        found = model(**{name: values[None] if one_choice else values for name, values in rows.items()})
        # If each token has logits, keep those of the text.
        logits = [found[name] for name in ("logits", "start_logits", "end_logits") if name in found]
        return [(part[:, : len(ids)] if part.shape[1] == len(ids) + padding else part).float() for part in logits]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            pairs = list(zip(outputs(0), outputs(4), strict=True))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # contradictory entries of config.json
        raise UserError(
            f"{type(model).__name__} cannot be called, as its config.json describes it: {one_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if any((a - b).abs().max() > (0.01 if exact else 0.2) * a.abs().max() for a, b in pairs):
        raise UserError(
            f"{type(model).__name__} gives another output for the same text when it is padded: its predictions would "
            "depend on the batch. Use another backbone"
        )
