"""A frozen model and the names of the parts that are not frozen."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffora.backbones.precision import HALF
from diffora.core.grid import Grid, find_grid
from diffora.errors import UserError


@dataclass(frozen=True)
class Backbone:
    """A model with a head, and what is known about its parts. `load_backbone` makes one from a checkpoint.

    A method adapts ``model`` in place. The names of head and fresh modules stay valid.

    Attributes:
        model: the network. Everything but the head is frozen.
        head: full names of the modules that make up the head. Every method trains them whole. They are all parts
            outside the pretrained model, or none where the task keeps a pretrained head (a language model's). A pooler
            inside the pretrained model belongs to the head if the checkpoint had no weights for it.
        fresh: full names of the modules with new weights, which no checkpoint has. With ``task.train_head=false`` they
            are not in ``head``, and no method trains them.
        arguments: what ``from_pretrained`` needs, besides the name, to make the same model.
        n_parameters: parameters besides the head, before a method adds to them. Shared ones count once.
    """

    model: nn.Module
    head: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    n_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        rest = set(self.model.parameters()) - self.head_parameters()
        object.__setattr__(self, "n_parameters", sum(_numel(p) for p in rest))

    @classmethod
    def of(
        cls, model: nn.Module, trains_head: bool | None = None, arguments: dict[str, Any] | None = None
    ) -> "Backbone":
        """The backbone of a model that is loaded already, as it is: nothing is frozen here.

        Args:
            model: a transformers model with a head, or any other module, which then has no head here.
            trains_head: whether the parts outside the pretrained model are the head. None: yes, unless the model has
                output embeddings, as a language model has, whose head is pretrained.
            arguments: what ``from_pretrained`` needs, besides the name, to make the same model.
        """
        if trains_head is None:
            trains_head = not _has_output_embeddings(model)
        return cls(model, tuple(outside_pretrained(model)) if trains_head else (), arguments=arguments or {})

    def freeze(self) -> "Backbone":
        """Freeze everything but the head, in place. A head in half precision changes to float32."""
        self.model.requires_grad_(False)
        for name in self.head:
            head = self.model.get_submodule(name).requires_grad_(True)
            if any(p.dtype in HALF for p in head.parameters()):
                head.float().register_forward_pre_hook(_to_float32)
        return self

    @property
    def untrained(self) -> tuple[str, ...]:
        """Full names of the fresh modules that no method trains: a new head with ``task.train_head=false``."""
        trained = tuple(f"{name}." for name in self.head)
        return tuple(name for name in self.fresh if not f"{name}.".startswith(trained))

    def head_parameters(self) -> set[nn.Parameter]:
        """The parameters of the head."""
        return {p for name in self.head for p in self.model.get_submodule(name).parameters()}

    def count_parameters(self) -> dict[str, int]:
        """The number of ``adapter``, ``head`` and ``trainable`` parameters. Shared ones count once.

        ``adapter`` is everything that is trained besides the head.
        """
        head = self.head_parameters()
        trainable = {p for p in self.model.parameters() if p.requires_grad}
        return {
            "adapter": sum(p.numel() for p in trainable - head),
            "head": sum(p.numel() for p in head),
            "trainable": sum(p.numel() for p in trainable),
        }

    def check_trainable(self) -> None:
        """Refuse to train nothing, or in half precision, where small steps are rounded away.

        Raises:
            UserError: names the first trainable parameter in half precision.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError("there is nothing to train: the method adds nothing, and this task does not train its head")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype in HALF:
                raise UserError(
                    f"this method trains {name}, which is in {parameter.dtype}: use model.dtype=float32, and not "
                    "trainer.precision=auto"
                )

    def find_grid(
        self,
        layer: str | Sequence[str] | None,
        candidates: Sequence[str] | None,
        roles: Mapping[str, str] | None,
    ) -> Grid:
        """The candidate modules, by the settings ``model.layer``, ``model.candidates`` and ``model.roles``.

        Raises:
            UserError: as `diffora.core.grid.find_grid`, or a candidate is part of the head.
        """
        grid = find_grid(self.model, layer, candidates, roles, prefix="model.")
        self.check_outside_head(grid.modules)
        return grid

    def check_outside_head(self, names: Iterable[str]) -> None:
        """Refuse to adapt modules of the head, which is trained whole: no file format holds both.

        Args:
            names: full names of the modules to adapt.

        Raises:
            UserError: names the module and what to set.
        """
        inside = tuple(f"{head}." for head in self.head)
        if both := [name for name in names if f"{name}.".startswith(inside)]:
            raise UserError(
                f"{both[0]} is part of the head, which is trained whole. Either leave it out of the candidates "
                "(candidates, model.candidates), or, in a run, adapt it in place of training the head "
                "(task.train_head=false)"
            )

    def checkpoint_activations(self) -> None:
        """Save only the inputs of each layer, and compute the other activations again in the backward pass.

        This is ``trainer.gradient_checkpointing=true``.

        Raises:
            UserError: the model does not support it.
        """
        model: Any = self.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise UserError(f"trainer.gradient_checkpointing=true: {type(model).__name__} does not support it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name will change in transformers 6
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings require gradients, which only the reentrant kind needs. The backward pass
        # would then not stop below the lowest adapter.
        model.disable_input_require_grads()


def outside_pretrained(model: nn.Module) -> list[str]:
    """Names of the direct children that have weights and are not part of the pretrained model.

    Empty where nothing says which parts are pretrained (`pretrained_children`).
    """
    pretrained = pretrained_children(model)
    children = model.named_children() if pretrained else ()
    return [name for name, part in children if name not in pretrained and any(True for _ in part.parameters())]


def pretrained_children(model: nn.Module) -> set[str]:
    """Names of the direct children that are the pretrained model; empty where nothing says which these are.

    - In most classes of transformers this is one child, named by ``base_model_prefix``.
    - A few of them, such as T5's for questions, have the parts of the pretrained model as children instead, or hold
      whole pretrained models, such as an encoder and a decoder.
    - A class of your own may hold models of transformers under any name.
    """
    if not hasattr(model, "base_model_prefix"):  # models of diffusers have a config too
        return set()
    from transformers import AutoModel, PreTrainedModel

    prefix = getattr(model, "base_model_prefix", "")
    if hasattr(model, prefix):
        return {prefix}
    whole = {name for name, part in model.named_children() if isinstance(part, PreTrainedModel)}
    if type(model).__module__.partition(".")[0] not in ("transformers", "transformers_modules"):
        return whole
    try:
        with torch.device("meta"):
            bare = AutoModel.from_config(model.config, trust_remote_code=model.is_custom_code())  # type: ignore[operator]
    except (ValueError, AttributeError):  # no class for the bare model, as for an encoder with a decoder
        return whole
    return whole | {name for name, _ in bare.named_children()}


def _has_output_embeddings(model: nn.Module) -> bool:
    outputs: Any = getattr(model, "get_output_embeddings", None)
    return outputs is not None and outputs() is not None


def _numel(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter. In 4 bits, one byte holds two of them."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
