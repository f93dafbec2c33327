"""A loop of your own with accelerate: pairs of their own for the chosen modules, shared pairs for all others.

accelerate launch examples/accelerate_loop.py [--model FOLDER] [--data FOLDER_OF_PARQUET] [--epochs 1] [--output FOLDER]
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import diffora

cli = argparse.ArgumentParser()
cli.add_argument("--model", default="FacebookAI/roberta-base")
cli.add_argument("--data", nargs="+", default=["nyu-mll/glue", "mrpc"])
cli.add_argument("--epochs", type=int, default=5)
cli.add_argument("--output", default="outputs/accelerate_loop")
given = cli.parse_args()

# --- what a user writes ---
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(given.model)
model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2).to(accelerator.device)
rows = load_dataset(*given.data)["train"].remove_columns("idx")
rows = rows.map(lambda row: tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=128))
rows = rows.remove_columns(["sentence1", "sentence2"])
loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))

selection = diffora.search(model, loader, rounds=1, k=3)  # the same in every process
diffora.attach(model, selection, rank=8, shared_rank=2)
model.classifier.requires_grad_(True)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(given.epochs):
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
if accelerator.is_main_process:
    diffora.save_adapter(accelerator.unwrap_model(model), given.output)
