"""Whole runs on a GPU, command to metric: `train.py method=lora` and Hugging Face Trainer with PEFT, in turn.

Both sides get a checkpoint with random weights of the true shape, and generated rows: pairs of texts about as long as
MRPC's, or conversations that fill the length. So the metrics mean nothing; the times and the memory do. Both group rows
by length, evaluate once, and save. Ours does not ask for deterministic operations, as the peer does not.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from benchmarks.common import ALPHA, LR, Shape
from benchmarks.report import REPO
from benchmarks.run import process, result_of
from benchmarks.tokenise_rows import write_rows

STEPS, VALIDATION_STEPS, REPETITIONS = 200, 20, 2


def save_checkpoint(model: nn.Module, tokenizer: str, folder: Path) -> None:
    """Write a model's weights, and one of the package's tokenizers beside them.

    The tokenizer gets words that no text has, up to the size of the model's vocabulary, and 512 tokens as its limit.
    """
    saved: Any = model
    saved.save_pretrained(folder)
    for file in (REPO / "src" / "diffora" / "assets" / tokenizer).iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), saved.config.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 512}))


def write_pairs(folder: Path, rows: int, validation_rows: int) -> None:
    """``train.parquet`` and ``validation.parquet`` in MRPC's columns."""
    for name, n_rows in (("validation", validation_rows), ("train", rows)):
        write_rows(folder / name, n_rows)
        os.replace(folder / name / "train.parquet", folder / f"{name}.parquet")
        (folder / name).rmdir()


def write_conversations(folder: Path, rows: int, validation_rows: int, length: int) -> None:
    """``train.jsonl`` and ``validation.jsonl``: conversations that are all longer than ``length`` tokens."""
    random = Random(0)
    for name, n_rows in (("validation", validation_rows), ("train", rows)):
        lines = []
        for _ in range(n_rows):
            words = " ".join(random.choices(("the", "tea", "is", "in", "a", "cup", "on", "my", "desk"), k=length))
            turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": words}]
            lines.append(json.dumps({"messages": turns}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def is_causal(shape: Shape) -> bool:
    return shape.entries["model_type"] == "llama"


def ours(shape: Shape, data: Path, model: Path, compiles: bool, seed: int) -> list[str]:
    """The command of our side, without its folder."""
    task = ["task=chat", "task.train_on=all", "task.packing=false"] if is_causal(shape) else ["task=mrpc"]
    return [
        "train.py", "method=lora", f"rank={shape.rank}", f"method.alpha={ALPHA}", *task, f"task.path={data}",
        f"task.max_length={shape.length}", f"model={shape.model}", f"model.path={model}",
        f"trainer={'gpu' if shape.device == 'cuda' else 'cpu'}", "trainer.precision=bf16-mixed",
        "trainer.deterministic=false",
        f"trainer.compile={str(compiles).lower()}", f"finetune.lr={LR}", f"finetune.batch_size={shape.rows}",
        "finetune.epochs=1", "finetune.warmup_steps=0", "finetune.dropout=0.0", f"seed={seed}", "logger=none",
    ]  # fmt: skip


def peer(shape: Shape, data: Path, model: Path, compiles: bool, seed: int) -> list[str]:
    """The command of Trainer's side."""
    kind = ["--causal"]
    if not is_causal(shape):
        modules = OmegaConf.load(REPO / "conf" / "model" / f"{shape.model}.yaml").candidates
        # DeBERTa has a pooler of its own on top of the backbone, which both sides train with the classifier.
        head = ["classifier", "pooler"] if shape.model.startswith("deberta") else ["classifier"]
        kind = ["--modules", *modules, "--head", *head, "--group-by-length"]
    return [
        "benchmarks/hf_trainer_lora.py", "--data", str(data), "--model", str(model), *kind, "--seed", str(seed),
        "--rank", str(shape.rank), "--alpha", str(ALPHA), "--lr", str(LR), "--batch-size", str(shape.rows),
        "--epochs", "1", "--warmup-steps", "0", "--max-length", str(shape.length), "--bf16",
        *(["--compile"] if compiles else []), *(["--cpu"] if shape.device == "cpu" else []),
    ]  # fmt: skip


def one_of_ours(command: list[str], cache: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _, seconds, _, _ = process([*command, f"hydra.run.dir={folder}/run"], cache)
        record = json.loads((Path(folder) / "run" / "run.json").read_text())
    return {
        "wall_s": round(seconds, 2),
        "training_s": record["time"]["finetune_s"],
        "peak_cuda_mb": record["memory"]["peak_cuda_mb"],
        "trainable": record["params"]["trainable"],
    }


def one_of_the_peer(command: list[str], cache: Path) -> dict[str, Any]:
    _, seconds, stdout, _ = process(command, cache)
    found = result_of(stdout)
    return {
        "wall_s": round(seconds, 2),
        "training_s": round(found["parts"]["training"] + found["parts"]["evaluation"], 2),
        "peak_cuda_mb": found["peak_cuda_mb"],
        "trainable": found["trainable"],
    }


def measure(shape: Shape, compiles: bool) -> dict[str, Any]:
    """Each repetition's runs, and the ratios peer / ours of their times. The sides take turns to go first."""
    tiny = shape.entries["vocab_size"] < 10_000
    steps, evaluated = (4, 4) if tiny else (STEPS, VALIDATION_STEPS)
    rows, validation_rows = steps * shape.rows, evaluated * shape.rows
    repetitions = 1 if tiny else REPETITIONS
    with tempfile.TemporaryDirectory() as scratch:
        data, model, cache = Path(scratch) / "data", Path(scratch) / "model", Path(scratch) / "cache"
        data.mkdir()
        if is_causal(shape):
            write_conversations(data, rows, validation_rows, shape.length)
        else:
            write_pairs(data, rows, validation_rows)
        save_checkpoint(shape.build(), "tiny_llama" if is_causal(shape) else "tiny", model)
        runs: dict[str, list[dict[str, Any]]] = {"lora": [], "hf_trainer": []}
        for seed in range(repetitions):
            sides: list[tuple[str, Callable[[list[str], Path], dict[str, Any]], list[str]]] = [
                ("lora", one_of_ours, ours(shape, data, model, compiles, seed)),
                ("hf_trainer", one_of_the_peer, peer(shape, data, model, compiles, seed)),
            ]
            for name, one, command in sides[:: -1 if seed % 2 else 1]:
                runs[name].append(one(command, cache))
                print(f"  {name:<12} {runs[name][-1]}", flush=True)
    pairs = list(zip(runs["hf_trainer"], runs["lora"], strict=True))
    if len(trained := {run["trainable"] for pair in pairs for run in pair}) > 1:
        sys.exit(f"the two sides do not train the same parameters: {sorted(trained)}")
    settings = {"rows": rows, "validation_rows": validation_rows, "batch": shape.rows, "repetitions": repetitions}
    return {"settings": settings, "compiled": compiles, "runs": runs}
