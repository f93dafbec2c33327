"""Reads conversations from the hub or from files, as checked tables by split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from diffora.errors import UserError
from diffora.tasks.account import Account, Accounts
from diffora.tasks.chat.conversations import read, read_file
from diffora.tasks.chat.settings import CausalLMSettings
from diffora.tasks.sources.files import find_file
from diffora.tasks.sources.hub import hub_splits


def hub_tables(settings: CausalLMSettings, names: Mapping[str, str], accounts: Accounts) -> dict[str, pa.Table]:
    """Tables of splits on the hub, by our names.

    Args:
        settings: say which data sets: validation and test rows may be of another one.
        names: the source's name of each split, by ours.
        accounts: get a new account for each split.

    Raises:
        UserError: names every row that is no conversation.
    """
    files = "<folder with train and validation as .jsonl or .parquet>"
    problems: list[str] = []
    tables = {}
    other = settings.validation_hub
    apart = [] if other is None else [ours for ours in names if ours != "train"]
    for hub, config, some in (
        (settings.hub, settings.hub_config, [ours for ours in names if ours not in apart]),
        (other or settings.hub, settings.validation_hub_config, apart),
    ):
        found = hub_splits(settings.name, hub, config, [names[ours] for ours in some], files) if some else {}
        for ours in some:
            rows, accounts[ours] = enumerate(found[names[ours]], start=1), Account()
            tables[ours] = read(rows, f"{hub} {names[ours]}", problems, accounts[ours])
    if problems:
        raise UserError(problems)
    return tables


def file_tables(folder: Path, splits: Sequence[str], accounts: Accounts) -> dict[str, pa.Table]:
    """Tables of splits that are files of a folder.

    Args:
        accounts: get a new account for each split.

    Raises:
        UserError: names every file that is missing, and every row that is no conversation.
    """
    problems: list[str] = []
    tables: dict[str, pa.Table] = {}
    for split in splits:
        names = [f"{split}.jsonl", f"{split}.parquet", f"{split}-00000-of-00001.parquet"]
        if (file := find_file(folder, split, names, problems)) is not None:
            accounts[split] = Account()
            tables[split] = read_file(file, problems, accounts[split])
    if problems:
        raise UserError(problems)
    return tables
