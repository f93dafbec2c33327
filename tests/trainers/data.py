"""Small models with adapters, rows and a `Trainer` for them."""

from pathlib import Path
from typing import Any

import datasets
import torch
from families import random_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers


def rows(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Tokenised rows of one length; the first token says the class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 400, (n, 8), generator=generator)
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def bert(**changes: Any) -> nn.Module:
    """A frozen classifier; its head is trainable. It has no dropout."""
    model = random_model(
        "bert",
        "AutoModelForSequenceClassification",
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )
    # Otherwise Trainer adds up the losses of micro-batches without a mean (huggingface/transformers#47688).
    model.accepts_loss_kwargs = False
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def fill(model: nn.Module) -> nn.Module:
    """Give every A, B and head weight random values, in place, so that all of them matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def attached(shared_rank: int | None = 2) -> nn.Module:
    """A model with own and shared pairs."""
    model = bert()
    grid = find_grid(model)
    selected = torch.zeros(grid.n_layers, grid.n_types, dtype=torch.bool)
    selected[:, :2], selected[0, 4] = True, True
    attach(model, grid.names, selected, 4, shared_rank, 8.0)
    model.classifier.requires_grad_(True)
    return fill(model)


def with_peft(config: Any = None) -> nn.Module:
    """The same model with a LoRA of PEFT."""
    config = config or LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "key", "intermediate.dense"], task_type="SEQ_CLS"
    )
    return fill(get_peft_model(bert(), config))


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], data: Any = None, **given: Any) -> Trainer:
    """A `Trainer` of six steps with checkpoints after each half; ``given`` are arguments."""
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
    }
    arguments = TrainingArguments(str(folder), **defaults | given)
    return Trainer(model, arguments, train_dataset=data or rows(), eval_dataset=rows(8, 1), callbacks=callbacks)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable weights, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def pairs(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter, bool, float]]:
    """(module, A, B, whether B is stored transposed, scale) for each module with adapters, of either library."""
    ours = [(name, m.lora_a, m.lora_bt, True, m.scaling) for name, m in lowrank_layers(model)]
    theirs = [
        (name, m.lora_A["default"].weight, m.lora_B["default"].weight, False, m.scaling["default"])
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    ]
    return ours + theirs


MAKERS = {"attach": attached, "peft": with_peft}
