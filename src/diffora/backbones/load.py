"""Loads a transformers model with a head, from the hub, a folder or the package.

A checkpoint is used completely or refused: weights that are missing or are not numbers, a tokenizer that is missing or
does not fit, inputs that are too long. Code that comes with a checkpoint is not run.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffora.backbones.backbone import Backbone, outside_pretrained
from diffora.backbones.compatibility import check_length, match_processor
from diffora.backbones.config_json import content_of, model_config
from diffora.backbones.messages import first_three, loading
from diffora.backbones.precision import dtype_of
from diffora.backbones.quantise import follow_autocast, keep_weights_unpacked, quantisation, quantise_problems
from diffora.backbones.request import ModelRequest
from diffora.backbones.weights import check_values, file_problems, left_over, natural
from diffora.errors import UserError
from diffora.hub import resolve
from diffora.kernels.dropout import use_cheap_dropout
from diffora.settings.sections import Model

log = logging.getLogger(__name__)


def model_problems(settings: Model, dry_run: bool) -> Iterator[str]:
    """One message for each problem of a model on this machine, found before it is loaded.

    Args:
        settings: the ``model`` section.
        dry_run: weights are not needed, so they are not checked.
    """
    if not dry_run:
        yield from quantise_problems(settings)
    try:
        if resolve(settings.path)[1]:
            content_of(settings)
            if not dry_run:
                yield from _folder_problems(settings)
    except UserError as error:
        yield from error.problems


def load_backbone(settings: Model, request: ModelRequest, processor: Any = None, finetuned: bool = False) -> Backbone:
    """Load a pretrained model, frozen, with the head that a task asks for.

    The head is new and trainable, also if the checkpoint has one, unless the request is for the pretrained head. New
    weights are drawn from torch's global generator: seed it first. The pretrained weights are in ``model.dtype`` and
    perhaps quantised; a trainable head is in float32.

    Args:
        settings: the ``model`` section.
        request: what the task asks for (`Task.model_request`).
        processor: the tokenizer or image processor that the model is used with. It is checked, and the model's padding
            token is set to the tokenizer's. None for no such check.
        finetuned: the checkpoint was trained for this task. Its head must be there, and is kept.

    Raises:
        UserError: files that cannot be read; weights that are missing, left over, of another shape or not numbers; a
            ``task.max_length`` that is too large; a processor that does not fit.
    """
    import transformers

    if found := list(_folder_problems(settings)):
        raise UserError(found)
    config = model_config(settings, request, meta=False)
    # Pass the dtype explicitly: transformers would otherwise use that of the file, float16 for DeBERTaV3.
    how: dict[str, Any] = {"dtype": dtype_of(settings)}
    if settings.quantise:
        how["quantization_config"] = quantisation(settings, request)
    before = torch.get_rng_state()
    with loading(settings) as source:
        model, info = getattr(transformers, request.model_class).from_pretrained(
            **source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    report = _LoadReport.of(model, info, keeps_head=finetuned or request.pretrained_head, finetuned=finetuned)
    report.check(settings, finetuned)
    fresh = report.draw_head(settings, request, before)
    check_values(model, settings.path)
    check_length(model, request.max_length)
    keep_weights_unpacked(model)
    follow_autocast(model)
    if settings.kernel != "plain":
        use_cheap_dropout(model)
    arguments = request.head | ({"ignore_mismatched_sizes": True} if report.shapes else {})
    if processor is not None:
        arguments |= match_processor(model, processor)
    head = (*report.outside, *report.fresh_pooler) if request.trains_head else ()
    return Backbone(model, head, fresh, arguments).freeze()


def draw_fresh(backbone: Backbone) -> None:
    """Draw the weights that no checkpoint has again, in place, from torch's global generator, as a loading does."""
    _draw(backbone.model, tuple(f"{name}." for name in backbone.fresh), torch.get_rng_state())


def _folder_problems(settings: Model) -> Iterator[str]:
    """What is wrong with a local folder, found before anything is loaded from it."""
    path, local = resolve(settings.path)
    if local and (Path(path) / "adapter_config.json").is_file():
        yield f"model.path={settings.path} is an adapter, not a model: give the folder or hub id of its base model"
    elif local and "transformers_weights" not in content_of(settings):  # this entry names another file
        yield from file_problems(Path(path), bool(content_of(settings).get("quantization_config")))


@dataclass(frozen=True)
class _LoadReport:
    """How the weights of a checkpoint compare with those of the model that was made from it.

    Attributes:
        model: the loaded model.
        outside: names of the model's parts outside the pretrained model.
        fresh_pooler: the name of the pooler inside the pretrained model, if the checkpoint has no weights for it.
        new: prefixes of the weights that are to be new.
        missing: weights that the checkpoint lacks.
        shapes: (shape in the checkpoint, shape in the model) of weights where these differ.
        unexpected: weights of the checkpoint that the model does not have.
    """

    model: Any
    outside: tuple[str, ...]
    fresh_pooler: tuple[str, ...]
    new: tuple[str, ...]
    missing: set[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: list[str]

    @classmethod
    def of(cls, model: Any, info: dict[str, Any], keeps_head: bool, finetuned: bool) -> "_LoadReport":
        """Read what transformers reports of a loading (``output_loading_info=True``)."""
        missing = {key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")}
        outside = tuple(outside_pretrained(model))
        pooler = f"{model.base_model_prefix}.pooler"
        of_pooler = [key for key in model.state_dict() if key.startswith(f"{pooler}.")]
        fresh_pooler = (pooler,) if of_pooler and missing.issuperset(of_pooler) and not finetuned else ()
        new = (() if keeps_head else outside) + fresh_pooler
        return cls(
            model,
            outside,
            fresh_pooler,
            new=tuple(f"{name}." for name in new),
            missing=missing,
            shapes={key: (tuple(given), tuple(wanted)) for key, given, wanted in info["mismatched_keys"]},
            unexpected=list(info["unexpected_keys"]),
        )

    def check(self, settings: Model, finetuned: bool) -> None:
        """Refuse a checkpoint whose pretrained weights are not those of the model.

        Raises:
            UserError: everything that is missing, left over or of another shape.
        """
        place = f"model.path={settings.path}"
        problems = []
        if absent := self._kept(self.missing):
            heads = [key for key in absent if key.startswith(self.outside)]
            if finetuned and heads:
                raise UserError(f"{settings.path} has no {heads[0]}: it was trained for another kind of task")
            total = len(self._kept(self.model.state_dict()))
            problems.append(
                f"{place} lacks {len(absent)} of the {total} weights that its config.json asks for: "
                f"{first_three(absent)}"
            )
        if wrong := self._kept(self.shapes):
            given, wanted = self.shapes[wrong[0]]
            first = f"{wrong[0]} is {list(given)} instead of {list(wanted)}"
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            problems.append(f"{place}: weights have other shapes than its config.json says: {first}{more}")
        beyond, unused = left_over(self.model, self.unexpected)
        if beyond:
            problems.append(
                f"{place} has {len(beyond)} weights of layers that its config.json lacks: {first_three(beyond)}"
            )
        if problems:
            raise UserError([*problems, "  The weights and config.json must be of the same model."])
        if unused:
            log.warning(
                f"{place} has {len(unused)} weights in its layers that a {type(self.model).__name__} does not use: "
                f"{first_three(unused)}"
            )

    def draw_head(self, settings: Model, request: ModelRequest, generator_state: torch.Tensor) -> tuple[str, ...]:
        """Draw the head again where the checkpoint has one that the task does not use.

        Args:
            settings: the ``model`` section.
            request: whose head it is.
            generator_state: the state of torch's global generator before the loading. The head is then drawn as it
                would be for a checkpoint without one.

        Returns:
            Full names of the modules with new weights.
        """
        own = list(self.model.state_dict())
        head = tuple(name for name in self.new if name.removesuffix(".") not in self.fresh_pooler)
        old = [key for key in own if key.startswith(head) and key not in self.missing] if head else []
        fresh = sorted({key.rpartition(".")[0] for key in self.missing.union(old) if key.startswith(self.new)})
        if old:
            classes = content_of(settings).get("id2label")
            names = [str(name) for name in classes.values()] if isinstance(classes, dict) else old
            log.info(
                f"model.path={settings.path} has a head of its own ({first_three(names)}), which is not used: "
                f"{request.task} has a new one"
            )
            _draw(self.model, tuple(f"{name}." for name in fresh), generator_state)
        return tuple(fresh)

    def _kept(self, keys: Iterable[str]) -> list[str]:
        """Those of some weights that must come from the checkpoint, in natural order."""
        return sorted((key for key in keys if not key.startswith(self.new)), key=natural)


def _draw(model: nn.Module, prefixes: tuple[str, ...], generator_state: torch.Tensor) -> None:
    """Draw weights again, in the way in which transformers draws those that a checkpoint lacks."""
    torch.set_rng_state(generator_state)
    # transformers initialises modules without this flag.
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = not name.startswith(prefixes)  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
