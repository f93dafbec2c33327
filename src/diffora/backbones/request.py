"""What a task asks of the model that is loaded for it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelRequest:
    """What a task asks of a backbone and its head.

    Attributes:
        task: the task's name, for messages.
        model_class: the transformers class of backbone and head, e.g. ``AutoModelForSequenceClassification``.
        head: entries of the transformers configuration that make the head fit, e.g. ``num_labels``.
        trains_head: whether every method trains the modules outside the backbone.
        pretrained_head: whether the checkpoint's own head is used, as a language model's is. Otherwise the head is new.
        max_length: the longest input in tokens; None for images.
    """

    task: str
    model_class: str
    head: dict[str, Any] = field(default_factory=dict)
    trains_head: bool = True
    pretrained_head: bool = False
    max_length: int | None = None
