"""python train.py method=diffora task=mrpc: search, select, fine-tune, evaluate. See `python train.py --help`.

The same as `diffora train`. Hydra's shell completion looks for these words in this file: @hydra.main
"""

import sys

from diffora.cli import command
from diffora.cli.train import main

if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
