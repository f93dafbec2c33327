"""Write a page about finished runs: see `python report.py --help`. The same as `diffora report`."""

import sys

from diffora.cli import command
from diffora.cli.report import main

if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
