"""``evaluate``: a finished run, used again."""

import os
import sys

from diffora.cli.environment import prepare
from diffora.errors import called
from diffora.run.imports import import_run

USAGE = """\
A finished run, used again: metrics, and predictions as files, without training.

  {evaluate} run=<run directory>                                 the run's task, its validation splits
  {evaluate} run=<run directory> task.path=<folder>              other rows of the same kind
  {evaluate} run=<run directory> split=test                      a split without labels: predictions only
  {evaluate} adapter=<folder> model=minilm task=mrpc             an adapter that lies somewhere else

Also: output=<folder> batch_size=64 split=[a,b] and any task.…=, model.…=, trainer.…= of `{train}`.
Classes of your own are named anew: task._target_=my_module.MyTask, method._target_=my_module.MyMethod. They and choices
of your own (task=mine) are found with --config-dir <folder>, as in `{train}`.
Results go to evaluation-<time>/ in the run directory unless output= says otherwise."""


def main(arguments: list[str]) -> None:
    """Evaluate as the arguments ask; without any, print the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(evaluate=called("evaluate"), train=called("train")))
        return
    if waiting := prepare(os.environ):
        print(waiting, file=sys.stderr)
    import_run()
    from diffora.run.evaluate import evaluate, read_request

    evaluate(read_request(arguments))
