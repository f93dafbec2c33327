"""Use a finished run again, without training: see `python evaluate.py --help`. The same as `diffora evaluate`."""

import sys

from diffora.cli import command
from diffora.cli.evaluate import main

if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
