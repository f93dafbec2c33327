"""A finished run, used again: metrics, and predictions as files, without training.

  python evaluate.py run=<run directory>                                 the run's task, its validation splits
  python evaluate.py run=<run directory> task.path=<folder>              other rows of the same kind
  python evaluate.py run=<run directory> split=test                      a split without labels: predictions only
  python evaluate.py adapter=<folder> model=minilm task=mrpc             an adapter that lies somewhere else

Also: output=<folder> batch_size=64 split=[a,b] and any task.…=, model.…=, trainer.…= of `python train.py`.
Classes of your own are named anew: task._target_=my_module.MyTask, method._target_=my_module.MyMethod.
Results go to evaluation-<time>/ in the run directory unless output= says otherwise.
"""

import sys

from diffora.cli import command, import_run


def main() -> None:
    """Evaluate as the command line asks."""
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        return
    import_run()
    from diffora.run.evaluate import evaluate, read_request

    evaluate(read_request(sys.argv[1:]))


if __name__ == "__main__":
    command(main)
