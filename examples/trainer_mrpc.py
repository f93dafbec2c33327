"""transformers' Trainer on MRPC: diffora chooses the modules, PEFT's LoRA adapts them, RM-LoRA regularises them.

python examples/trainer_mrpc.py [--model FOLDER] [--data FOLDER_OF_PARQUET] [--steps 30] [--output FOLDER]
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import diffora

cli = argparse.ArgumentParser()
cli.add_argument("--model", default="microsoft/deberta-v3-base")
cli.add_argument("--data", nargs="+", default=["nyu-mll/glue", "mrpc"])
cli.add_argument("--steps", type=int, default=-1)
cli.add_argument("--output", default="outputs/trainer_mrpc")
given = cli.parse_args()

# --- what a user writes ---
tokenizer = AutoTokenizer.from_pretrained(given.model)
model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
data = load_dataset(*given.data)
data = data.map(
    lambda row: tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=128), batched=True
)
arguments = TrainingArguments(
    given.output, learning_rate=5e-4, num_train_epochs=5, max_steps=given.steps, per_device_train_batch_size=32
)
parts = {"args": arguments, "train_dataset": data["train"], "eval_dataset": data["validation"]}
parts["processing_class"] = tokenizer
parts["compute_metrics"] = lambda given: {"accuracy": (given.predictions.argmax(-1) == given.label_ids).mean()}

loader = Trainer(model, **parts).get_train_dataloader()
selection = diffora.search(model, loader, rounds=1, k=3)
new = ["pooler", "classifier"] if model.config.model_type == "deberta-v2" else None  # DeBERTa's pooler is new, too
config = selection.lora_config(rank=8, alpha=16, task_type="SEQ_CLS", modules_to_save=new)
model = get_peft_model(model, config)

callback = diffora.DifforaCallback(penalty=1e-3, mask_rank="half")
trainer = Trainer(model, callbacks=[callback], **parts)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
