"""Which process of a run writes files and messages, and what libraries may print."""

import logging
import os
import warnings

import datasets
from lightning.pytorch.utilities import rank_zero_only


def is_main() -> bool:
    """Whether this process writes files and messages, that is whether it has rank 0."""
    return getattr(rank_zero_only, "rank", 0) == 0


def quiet_libraries() -> None:
    """Silence the messages that libraries print at every start, so that the user sees those that matter."""
    import transformers  # takes seconds

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not is_main():
        logging.getLogger("diffora").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")  # PEFT uses old names
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
