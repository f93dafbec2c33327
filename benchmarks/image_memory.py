"""Bytes on the disk and memory of the data workers, for images that are decoded once or for every batch.

    python -m benchmarks.image_memory [--images 2000] [--workers 2] [--side 224]

Images are generated as JPEG files. Each way, with forked and with spawned workers, is a process of its own, which reads
all batches once. It reports the size of the arrow file and, of each worker, the resident set (RSS), its share of it
(PSS), and what it alone has written (own). A copy of the file would be in ``own``; mapped pages are not, and the system
can drop them. Linux only. Writes nothing.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FIELDS = {"Rss": "rss_mb", "Pss": "pss_mb", "Private_Dirty": "own_mb"}


def write_images(folder: Path, n_images: int, side: int) -> None:
    """Photograph-like images: smooth noise, a third wider than high, in two classes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", n_images), ("validation", 4)):
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            file = folder / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(file, quality=90)


def memory_of(pid: int | str) -> dict[str, float]:
    """RSS, PSS and own written memory of a process in MB."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in FIELDS:
            found[FIELDS[name]] = round(int(value.split()[0]) / 1024, 1)
    return found


def measure(path: str, cache_pixels: bool, how: str, workers: int, side: int) -> dict[str, Any]:
    """One way, in this process."""
    from omegaconf import OmegaConf

    from benchmarks.report import REPO
    from diffora.loop.data import eval_loader
    from diffora.tasks.base import get_task
    from diffora.tasks.images.preprocessing import Preprocessing

    multiprocessing.set_start_method(how)
    cfg: Any = OmegaConf.load(REPO / "conf" / "task" / "imagefolder.yaml")
    task = get_task(OmegaConf.merge(cfg, {"path": path, "cache_pixels": cache_pixels}))  # type: ignore[arg-type]
    preprocessing = Preprocessing(side, side, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    encoded = task.encode(task.load().train, preprocessing, training=True)
    file = Path(encoded.cache_files[0]["filename"])
    batches = iter(eval_loader(encoded, task.collate(preprocessing, False), 32, None, workers))
    next(batches)
    pids = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    found: list[dict[str, float]] = []
    for _ in batches:  # after the last batch the workers are gone
        found = [memory_of(pid) for pid in pids]
    return {
        "cache_pixels": cache_pixels,
        "workers": how,
        "file_mb": round(file.stat().st_size / 2**20, 1),
        "parent": memory_of("self"),
        "each_worker": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        path, cached, how = given.measure
        print("RESULT " + json.dumps(measure(path, cached == "True", how, given.workers, given.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", given.images, given.side)
        for cache_pixels in (True, False):
            for how in ("fork", "spawn"):
                command = [sys.executable, "-m", "benchmarks.image_memory", "--workers", str(given.workers)]
                command += ["--side", str(given.side), "--measure", f"{folder}/images", str(cache_pixels), how]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(next(line for line in out.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


if __name__ == "__main__":
    main()
