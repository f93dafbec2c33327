"""The peer of `train.py method=lora task=mrpc`: Hugging Face Trainer with PEFT's LoRA. One run, one line of JSON.

    python benchmarks/hf_trainer_lora.py --data <folder with train and validation parquet> --model <folder>

The script follows the libraries' own examples. Rows are padded to the longest of their batch, the optimiser is
Trainer's default (fused AdamW), each epoch ends with an evaluation, and the adapter is saved at the end.
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

START = time.time()

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]


def classifier(args: argparse.Namespace) -> dict[str, Any]:
    """Rows, model and the Trainer's further arguments for pairs of texts and a class."""
    files = {split: f"{args.data}/{split}.parquet" for split in ("train", "validation")}
    rows = datasets.load_dataset("parquet", data_files=files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    began = time.time()
    rows = rows.map(
        lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=args.max_length),
        batched=True,
    )
    tokenised = time.time() - began
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=2, dtype=torch.float32
    )
    modules = "|".join(name.replace(".", r"\.") for name in args.modules)
    target = rf".*\.layer\.\d+\.({modules})"
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=target, modules_to_save=args.head, **lora(args))

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        guess, gold = np.argmax(prediction.predictions, -1), prediction.label_ids
        hits = int(((guess == 1) & (gold == 1)).sum())
        return {"accuracy": float((guess == gold).mean()), "f1": 2 * hits / int((guess == 1).sum() + (gold == 1).sum())}

    more = {"compute_metrics": metrics, "processing_class": tokenizer}
    return {"rows": rows, "model": peft.get_peft_model(model, config), "tokenised": tokenised, "more": more}


def language_model(args: argparse.Namespace) -> dict[str, Any]:
    """The same for conversations, whose tokens all count. Frozen weights are in bfloat16."""
    files = {split: f"{args.data}/{split}.jsonl" for split in ("train", "validation")}
    rows = datasets.load_dataset("json", data_files=files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    began = time.time()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in batch["messages"]]
        ids = tokenizer(texts, truncation=True, max_length=args.max_length, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "labels": ids}

    rows = rows.map(encode, batched=True, remove_columns=["messages"])
    tokenised = time.time() - began
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora(args))
    more = {"data_collator": transformers.DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer}
    return {"rows": rows, "model": peft.get_peft_model(model, config), "tokenised": tokenised, "more": more}


def lora(args: argparse.Namespace) -> dict[str, Any]:
    return {"r": args.rank, "lora_alpha": args.alpha, "lora_dropout": 0.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--causal", action="store_true", help="a language model on conversations in .jsonl")
    parser.add_argument("--modules", nargs="+", default=BERT, help="adapted modules of each layer of a classifier")
    parser.add_argument("--head", nargs="+", default=["classifier"], help="modules outside its backbone to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, help="default: a tenth of all steps")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--group-by-length", action="store_true", help="rows of like length in a batch")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--cpu", action="store_true", help="not the GPU")
    return parser.parse_args()


def main() -> None:
    imported = time.time()
    args = arguments()
    transformers.set_seed(args.seed)
    made = language_model(args) if args.causal else classifier(args)
    rows, model = made["rows"], made["model"]
    steps = -(-len(rows["train"]) // args.batch_size) * args.epochs
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                folder,
                learning_rate=args.lr,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=2 * args.batch_size,
                num_train_epochs=args.epochs,
                warmup_steps=steps // 10 if args.warmup_steps is None else args.warmup_steps,
                train_sampling_strategy="group_by_length" if args.group_by_length else "random",
                eval_strategy="epoch",
                prediction_loss_only=args.causal,
                save_strategy="no",
                logging_strategy="epoch",
                report_to=[],
                bf16=args.bf16,
                torch_compile=args.compile,
                use_cpu=args.cpu,
                seed=args.seed,
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            **made["more"],
        )
        began_training = time.time()
        trainer.train()
        trained = time.time() - began_training
        trainer.save_model()
        history = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    evaluated = sum(entry["eval_runtime"] for entry in history)
    result = {
        **{name: [entry[f"eval_{name}"] for entry in history] for name in ([] if args.causal else ["accuracy", "f1"])},
        "adapter": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),  # Linux counts in kB
        "peak_cuda_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None,
        "parts": {
            "imports and configuration": imported - START,
            "tokenising": made["tokenised"],
            "startup, rest": began_training - imported - made["tokenised"],
            "training": trained - evaluated,
            "evaluation": evaluated,
        },
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
