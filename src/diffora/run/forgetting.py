"""What fine-tuning makes a model forget: the loss on plain texts before and after it."""

from diffora.loop.parts import Parts
from diffora.loop.predict import predict


def text_loss(parts: Parts) -> float | None:
    """The mean loss over the tokens of the task's plain texts (`Task.texts_split`); None if it has none.

    Batches are as large as the training's, so the measure needs no more memory than a step.
    """
    split = parts.task.texts_split()
    if split is None:
        return None
    f = parts.settings.finetune
    rows = f.batch_size // f.accumulate
    outputs = predict(parts.model, parts.task, split, parts.data.collate_eval, rows, parts.settings.trainer)
    return parts.task.score(outputs, split)["loss"]


def forgetting(parts: Parts, before: float | None) -> dict[str, float]:
    """The metrics ``forgetting/before``, ``forgetting/after`` and ``forgetting/increase``; empty without texts.

    Args:
        before: `text_loss` of the backbone without adapters.
    """
    if before is None or (after := text_loss(parts)) is None:
        return {}
    found = {"before": before, "after": after, "increase": after - before}
    return {f"forgetting/{name}": round(value, 6) for name, value in found.items()}
