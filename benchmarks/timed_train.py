"""`train.py` with a clock at a few places; prints one line of JSON. `benchmarks.run` breaks a run down with it.

python benchmarks/timed_train.py method=lora task=mrpc …

Times are seconds since the epoch, so the caller can count from the moment at which it gave the command.
"""

import json
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import diffora

SPENT: dict[str, float] = defaultdict(float)
FIRST: dict[str, float] = {}


def clock(owner: Any, name: str, part: str) -> None:
    """Add the time of each call of ``owner.name`` to ``part``, and note the time of its first call."""
    inner = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        FIRST.setdefault(part, began)
        try:
            return inner(*args, **kwargs)
        finally:
            SPENT[part] += time.time() - began

    setattr(owner, name, timed)


def main() -> None:
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

    from diffora.loop import parts
    from diffora.tasks.glue import GlueTask

    clock(GlueTask, "load", "reading rows")
    clock(GlueTask, "encode", "tokenising")
    clock(parts, "load_backbone", "loading weights")
    clock(_EvaluationLoop, "run", "evaluation")
    script = Path(__file__).parents[1] / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
    print("RESULT " + json.dumps({"start": diffora.START, "spent": SPENT, "first": FIRST}))


if __name__ == "__main__":
    main()
