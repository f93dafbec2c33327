"""The peer of `train.py method=lora task=mrpc`: Hugging Face Trainer with PEFT's LoRA. One run, one line of JSON.

python benchmarks/hf_trainer_lora.py --data <folder with train and validation parquet> --model <folder>
"""

import argparse
import json
import tempfile
import time

START = time.time()

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    transformers.set_seed(args.seed)
    files = {split: f"{args.data}/{split}.parquet" for split in ("train", "validation")}
    rows = datasets.load_dataset("parquet", data_files=files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = rows.map(
        lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=128), batched=True
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=2, dtype=torch.float32
    )
    parts = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [n for n in names if any(n.endswith(f".{i}.{p}") for i in range(64) for p in parts)]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=args.rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    model = peft.get_peft_model(model, config)
    steps = -(-len(rows["train"]) // args.batch_size) * args.epochs

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        guess, gold = np.argmax(prediction.predictions, -1), prediction.label_ids
        hits = int(((guess == 1) & (gold == 1)).sum())
        return {"accuracy": float((guess == gold).mean()), "f1": 2 * hits / int((guess == 1).sum() + (gold == 1).sum())}

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                folder,
                learning_rate=args.lr,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=2 * args.batch_size,
                num_train_epochs=args.epochs,
                warmup_steps=steps // 10,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="epoch",
                report_to=[],
                seed=args.seed,
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=tokenizer,
            compute_metrics=metrics,
        )
        began = time.time()
        trainer.train()
        trained = time.time() - began
        history = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    result = {
        "accuracy": [entry["eval_accuracy"] for entry in history],
        "f1": [entry["eval_f1"] for entry in history],
        "adapter": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "train_s": round(trained, 2),
        "total_s": round(time.time() - START, 2),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
