"""Splits of datasets on the Hugging Face hub."""

from collections.abc import Sequence

import datasets

from diffora.errors import UserError
from diffora.hub import why_unreachable
from diffora.tasks.messages import first_line


def hub_splits(
    task: str, dataset: str, config: str | None, splits: Sequence[str], files: str
) -> dict[str, datasets.Dataset]:
    """Load splits of a hub dataset, from the hub or from the local cache of an earlier run.

    Args:
        task: the task's name, for the message.
        dataset: the dataset on the hub.
        config: its configuration; None for its only one.
        splits: names of the splits.
        files: what the user can give as ``task.path`` instead, for the message.

    Raises:
        UserError: the dataset cannot be loaded, or has no such split.
    """
    found = hub_dataset(task, dataset, config, files)
    if missing := [name for name in splits if name not in found]:
        where = f"{dataset}/{config}" if config else dataset
        raise UserError(f"{where} has no split {missing[0]!r}; it has {', '.join(found)}.")
    return {name: found[name] for name in splits}


def hub_dataset(task: str, dataset: str, config: str | None, files: str) -> dict[str, datasets.Dataset]:
    """All splits of a hub dataset; arguments as in `hub_splits`.

    Raises:
        UserError: the dataset cannot be loaded.
    """
    was_offline = datasets.config.HF_HUB_OFFLINE
    unreachable = why_unreachable()
    try:
        # Retries on an unreachable hub take half a minute or more. In offline mode `load_dataset` reads the local cache
        # at once.
        datasets.config.HF_HUB_OFFLINE = unreachable is not None
        return dict(datasets.load_dataset(dataset, config))
    except Exception as error:  # connection, proxy, hub and disk errors have no common base class
        reason = f"{unreachable}, and nothing in the local cache" if unreachable else first_line(error)
        if not unreachable and "Config name is missing" in reason:  # the next line has the names
            reason = " ".join(str(error).splitlines()[:2])
        raise UserError(
            f"Cannot load task '{task}' from the Hugging Face hub ({dataset}{f', {config}' if config else ''}): "
            f"{reason}.\n"
            f"  Either use files you have: task.path={files}\n"
            f"  or try the task that needs no download: python train.py experiment=quickstart"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
