"""A backbone on torch's meta device: shapes without memory for weights, for dry runs."""

import torch

from diffora.backbones.backbone import Backbone, outside_pretrained
from diffora.backbones.compatibility import check_length
from diffora.backbones.config_json import model_config
from diffora.backbones.messages import loading
from diffora.backbones.precision import dtype_of
from diffora.backbones.request import ModelRequest
from diffora.kernels.dropout import use_cheap_dropout
from diffora.settings.sections import Model


def meta_backbone(settings: Model, request: ModelRequest) -> Backbone:
    """The backbone that `load_backbone` would make, without memory for its weights, and not quantised.

    Its pooler, if it has one, counts as pretrained, since no checkpoint says otherwise.

    Args:
        settings: the ``model`` section.
        request: what the task asks for.

    Raises:
        UserError: files that cannot be read, or a ``task.max_length`` that is too large.
    """
    import transformers

    config = model_config(settings, request, meta=True)
    with loading(settings) as source, torch.device("meta"):
        model = getattr(transformers, request.model_class).from_config(
            config, dtype=dtype_of(settings), trust_remote_code=source["trust_remote_code"]
        )
    check_length(model, request.max_length)
    if settings.kernel != "plain":
        use_cheap_dropout(model)
    return Backbone(model, tuple(outside_pretrained(model)) if request.trains_head else ()).freeze()
