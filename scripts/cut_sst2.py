"""Cut 4,000 of SST-2's training rows for training and 5,000 others for validation, for experiment=selection_landscape.

    python scripts/cut_sst2.py data/sst2 data/landscape/sst2

The official validation split has 872 rows, too few to see differences of half a point. Both parts are drawn at random
with seed 0, so they are the same every time.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

TRAIN, VALIDATION = 4_000, 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train.parquet, in the hub's columns")
    parser.add_argument("target", type=Path, help="folder to write train.parquet and validation.parquet to")
    given = parser.parse_args()
    rows = load_dataset("parquet", data_files=str(given.source / "train.parquet"), split="train").shuffle(seed=0)
    given.target.mkdir(parents=True, exist_ok=True)
    rows.select(range(TRAIN)).to_parquet(given.target / "train.parquet")
    rows.select(range(TRAIN, TRAIN + VALIDATION)).to_parquet(given.target / "validation.parquet")


if __name__ == "__main__":
    main()
