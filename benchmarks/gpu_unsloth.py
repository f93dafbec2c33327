"""Steps of Unsloth's LoRA on Llama's shape, where Unsloth is installed. Ours are timed before and after.

As a script this is Unsloth's side. It runs in a process of its own, because Unsloth changes transformers when it is
imported, so the two sides cannot take turns. Their ratio is one of medians, without pairs. UNSLOTH_PYTHON names the
interpreter that has Unsloth; default: the same one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(shape: Any, rounds: int) -> dict[str, Any]:
    """Medians of both sides in ms, tokens per second, and Unsloth's time over ours.

    Raises:
        SystemExit: Unsloth is not installed or fails.
    """
    from functools import partial

    from benchmarks.common import ALPHA, LR, interleave, lora
    from benchmarks.gpu_runs import save_checkpoint

    python = os.environ.get("UNSLOTH_PYTHON", sys.executable)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('unsloth') is None)"
    if subprocess.run([python, "-c", probe], check=False).returncode:
        sys.exit(f"Unsloth is not installed for {python}")
    model, batch = shape.build(), shape.batch()
    steps = {"lora": partial(lora(model, shape).step, batch)}
    before = interleave(steps, rounds, warmup=3, cuda=True)["lora"]
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, "tiny_llama", Path(folder))
        numbers = {"rows": shape.rows, "length": shape.length, "rank": shape.rank, "alpha": ALPHA, "lr": LR}
        given = [f"--{name}={value}" for name, value in numbers.items()]
        command = [python, __file__, "--model", folder, f"--rounds={rounds}", *given]
        # Without the network, Unsloth's statistics stop it; and it writes what it compiles to the current folder.
        quiet = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": f"{folder}/made"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        sys.exit(f"Unsloth fails with exit code {done.returncode}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    theirs: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    after = interleave(steps, rounds, warmup=3, cuda=True)["lora"]
    ours = statistics.median([*before, *after])
    tokens = 1000 * shape.rows * shape.length
    return {
        "unsloth": theirs | {"tokens_s": round(tokens / theirs["ms"])},
        "lora": {"ms": ours, "tokens_s": round(tokens / ours)},
        "unsloth/lora": round(theirs["ms"] / ours, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    for name in ("rows", "length", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("alpha", "lr"):
        parser.add_argument(f"--{name}", type=float, required=True)
    given = parser.parse_args()

    import torch
    from unsloth import FastLanguageModel  # before transformers, which it changes

    model, _ = FastLanguageModel.from_pretrained(
        model_name=given.model, max_seq_length=given.length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=given.rank, lora_alpha=given.alpha, lora_dropout=0, bias="none", target_modules=MODULES,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.lr, weight_decay=0.0, fused=True)
    ids = torch.randint(5, 400, (given.rows, given.length), generator=torch.Generator().manual_seed(0)).cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for turn in range(given.rounds + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(1000 * (time.perf_counter() - began))
    print("RESULT " + json.dumps({"ms": statistics.median(times)}))


if __name__ == "__main__":
    main()
