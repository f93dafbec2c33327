"""Predictions of a trained model for a split, without Lightning, in one process on one device."""

from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from diffora.backbones.precision import AUTOCAST
from diffora.errors import UserError, out_of_memory
from diffora.loop.data import whole_loader
from diffora.tasks.base import Collate, Outputs, Split, Task


# Not inference mode: a divided model (FSDP2) keeps the tensors that it collects weights in.
@torch.no_grad()
def predict(model: nn.Module, task: Task, split: Split, collate: Collate, batch_size: int, trainer: Any) -> Outputs:
    """`Task.outputs` for all rows of a split, in their order, on the CPU. The model returns to its device and mode.

    The model is not compiled (``trainer.compile``): compiling takes longer than one pass, and may be impossible on the
    machine that evaluates a run.

    Args:
        model: adapted and trained.
        collate: makes batches of the split's rows, for evaluation.
        batch_size: rows per batch.
        trainer: the ``trainer`` section, for accelerator, precision and workers.

    Raises:
        UserError: memory ran out.
    """
    device = accelerator_device(trainer.accelerator)
    dtype = AUTOCAST.get(trainer.precision)
    home, training = next(model.parameters()).device, model.training
    loader = whole_loader(split.encoded, collate, batch_size, trainer.num_workers)
    found: list[Outputs] = []
    try:
        model.to(device).eval()
        for batch in tqdm(loader, desc="predict", unit="batch", disable=None):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                found.append(task.evaluate(model, batch, final=True))  # kept on the device: no wait for a GPU
    except Exception as error:
        if (shortage := out_of_memory(error)) is None:
            raise
        advice = f" with batches of {batch_size} rows"
        if batch_size > 1:
            advice += f"; try batch_size={batch_size // 2}"
        raise UserError(shortage + (advice if shortage.startswith("out of memory") else "")) from error
    finally:
        model.to(home).train(training)
    outputs = {key: torch.cat([part[key] for part in found]).cpu() for key in found[0]}
    order = outputs["row"].argsort()
    return {key: values[order] for key, values in outputs.items()}


def accelerator_device(accelerator: str) -> torch.device:
    """The device for a value of ``trainer.accelerator``.

    Raises:
        UserError: this machine has no such device.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if accelerator not in ("auto", "cpu"):
        raise UserError(
            f"trainer.accelerator={accelerator}: this machine has no such device; try trainer.accelerator=cpu"
        )
    return torch.device("cpu")
