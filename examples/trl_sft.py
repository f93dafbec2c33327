"""TRL's SFTTrainer on conversations: diffora chooses the modules of a language model, PEFT's LoRA adapts them.

python examples/trl_sft.py [--model FOLDER] [--data FILE.jsonl] [--steps 30] [--output FOLDER]
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import diffora

cli = argparse.ArgumentParser()
cli.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
cli.add_argument("--data", default="trl-lib/Capybara")
cli.add_argument("--steps", type=int, default=-1)
cli.add_argument("--output", default="outputs/trl_sft")
given = cli.parse_args()

# --- what a user writes ---
files = {"path": "json", "data_files": given.data} if given.data.endswith(".jsonl") else {"path": given.data}
data = load_dataset(**files, split="train")
gpu = torch.cuda.is_available()
arguments = SFTConfig(
    given.output, learning_rate=2e-4, max_length=512, max_steps=given.steps, bf16=gpu, use_cpu=not gpu
)
model = AutoModelForCausalLM.from_pretrained(given.model)

loader = SFTTrainer(model, arguments, train_dataset=data).get_train_dataloader()
selection = diffora.search(model, loader, rounds=1, k=3)
config = selection.lora_config(rank=16, alpha=32, task_type="CAUSAL_LM")

trainer = SFTTrainer(model, arguments, train_dataset=data, peft_config=config)
trainer.train()
trainer.save_model()
