"""Splits of datasets on the Hugging Face hub."""

import re
from collections.abc import Iterable, Sequence

import datasets
import pyarrow as pa

from diffora.errors import UserError, called, first_line
from diffora.hub import why_unreachable


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
    found = hub_dataset(
        f"task '{task}' from the Hugging Face hub",
        dataset,
        config,
        f"\n  Either use files you have: task.path={files}\n"
        f"  or try the task that needs no download: {called('train')} experiment=quickstart",
    )
    if missing := [name for name in splits if name not in found]:
        raise UserError(no_split(dataset, config, missing[0], found))
    return {name: found[name] for name in splits}


def hub_dataset(what: str, dataset: str, config: str | None, advice: str) -> dict[str, datasets.Dataset]:
    """All splits of a hub dataset, from the hub or from the local cache of an earlier run. No code of it is run.

    Args:
        what: what is loaded, for the message.
        dataset: the dataset on the hub.
        config: its configuration; None for its only one.
        advice: what to do instead, for the end of the message.

    Raises:
        UserError: the dataset cannot be loaded.
    """
    was_offline = datasets.config.HF_HUB_OFFLINE
    unreachable = why_unreachable()
    try:
        # Retries on an unreachable hub take half a minute or more. In offline mode `load_dataset` reads the local cache
        # at once.
        datasets.config.HF_HUB_OFFLINE = unreachable is not None
        found: dict[str, datasets.Dataset] = datasets.load_dataset(dataset, config)
    except Exception as error:  # connection, proxy, hub and disk errors have no common base class
        reason = (
            f"{unreachable}, and nothing in the local cache" if unreachable else first_line(error).removesuffix(".")
        )
        if several := re.search(r"available configs: (\[.*?\])", str(error)):
            reason = f"choose one of its subsets {several[1]}"
        place = f"{dataset}{f', {config}' if config else ''}"
        raise UserError(f"Cannot load {what} ({place}): {reason}.{advice}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return found


def no_split(dataset: str, config: str | None, split: str, present: Iterable[str]) -> str:
    """The message that a dataset has no such split."""
    return f"{dataset}{f'/{config}' if config else ''} has no split {split!r}; it has {', '.join(present)}."


def with_features(split: datasets.Dataset) -> pa.Table:
    """A split's table, with the class names in its schema as in the hub's parquet files."""
    return split.data.table.replace_schema_metadata(split.features.arrow_schema.metadata)
