"""Make one submission to GLUE's server from the predictions of several runs, one run for each task.

    python train.py task=mrpc predict=true …                                      # writes MRPC.tsv and GLUE.zip
    python scripts/glue_submission.py outputs/run-a outputs/run-b … --output submission.zip

The server expects eleven tables: one for each of the nine tasks, a second one for MNLI, and the diagnostic set. The
MNLI run predicts the diagnostic set. Missing tables are named. With ``--fill-missing`` they are filled with the
majority class, which scores like chance.
"""

import argparse
import sys
from pathlib import Path

from diffora.errors import UserError
from diffora.tasks.glue_submission import bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run directories, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("submission.zip"))
    parser.add_argument("--fill-missing", action="store_true", help="the majority class where there are no predictions")
    given = parser.parse_args()
    try:
        filled = bundle(given.folders, given.output, given.fill_missing)
    except UserError as error:
        sys.exit("\n".join(f"error: {problem}" for problem in error.problems))
    print(f"{given.output}" + (f"; the majority class in {', '.join(filled)}" if filled else ""))


if __name__ == "__main__":
    main()
