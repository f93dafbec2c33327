"""Splits never leak; samplers are pure functions of (seed, stage, epoch), also when a real Trainer uses them."""

import random

import datasets
import lightning.pytorch as L
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from diffora.errors import UserError
from diffora.loop import streams
from diffora.loop.data import (
    BilevelDataset,
    FineTuneData,
    LateLoader,
    LeakError,
    SearchData,
    TrainingDataset,
    eval_loader,
)
from diffora.loop.samplers import BilevelBatchSampler, Drawn, EvalBatchSampler, LengthGroupedBatchSampler
from diffora.loop.splits import alike_of, held_out_split, split_hash, split_search
from diffora.tasks.base import Split
from diffora.tasks.tokenise import Collator

COLLATE = Collator(0), Collator(0)  # for training and for evaluation


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 60, n)


def tokenised(n: int, seed: int = 0) -> datasets.Dataset:
    lengths = lengths_of(n, seed)
    return datasets.Dataset(
        pa.table(
            {
                "input_ids": [list(range(1, length + 1)) for length in lengths],
                "labels": [i % 2 for i in range(n)],
                "length": pa.array(lengths, pa.int32()),
                "row": pa.array(range(n), pa.int32()),
            }
        )
    )


def flat(lists) -> list:
    return [element for part in lists for element in part]


def at_epoch(sampler, epoch: int) -> list:
    sampler.set_epoch(epoch)
    return list(sampler)


# --- splits ---


@given(n=st.integers(2, 500), seed=st.integers(0, 1000), valid=st.floats(0.01, 0.99), most=st.integers(2, 600))
@settings(max_examples=100, deadline=None)
def test_search_splits_are_disjoint_and_sized(n, seed, valid, most):
    train, search_valid = split_search(np.arange(n), seed, valid, most)
    assert len(train) > 0 and len(search_valid) > 0
    both = np.concatenate([train, search_valid])
    assert len(set(both.tolist())) == len(both) == min(n, most)
    assert both.min() >= 0 and both.max() < n
    assert abs(len(search_valid) - len(both) * valid) <= 1
    assert (np.diff(train) > 0).all() and (np.diff(search_valid) > 0).all()


def test_search_split_depends_on_the_seed_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    first = split_search(np.arange(100), 3)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = split_search(np.arange(100), 3), split_search(np.arange(100), 4)
    assert split_hash(*first) == split_hash(*again) != split_hash(*other)
    assert (len(first[0]), len(first[1])) == (50, 50)
    assert split_search(np.arange(100), 0)[0].tolist() != list(range(50))  # seed 0 shuffles as well


@given(copies=st.lists(st.integers(1, 12), min_size=2, max_size=60), seed=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_equal_inputs_are_never_divided(copies, seed):
    examples = np.arange(sum(copies))
    alike = np.repeat(np.cumsum([0, *copies[:-1]]), copies)  # the first row of each group
    most = max(2, len(examples) // 2)
    for parts in (
        split_search(examples, seed, alike=alike),
        split_search(examples, seed, 0.2, most, alike),
        held_out_split(examples, seed, alike),
    ):
        first, second = (set(alike[rows].tolist()) for rows in parts)
        assert first and second and not first & second
        for rows in parts:  # whole groups
            assert np.isin(alike, alike[rows]).sum() == len(rows)
    train, valid = split_search(examples, seed, 0.5, most, alike)
    largest = max(copies)
    assert len(train) + len(valid) <= max(most, 2 * largest)
    assert sorted(np.concatenate(held_out_split(examples, seed, alike)).tolist()) == examples.tolist()


def test_without_equal_inputs_the_parts_are_as_before():
    examples = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    for seed in range(5):
        for plain, grouped in (
            (split_search(examples, seed), split_search(examples, seed, alike=examples)),
            (held_out_split(examples, seed), held_out_split(examples, seed, examples)),
        ):
            assert [rows.tolist() for rows in plain] == [rows.tolist() for rows in grouped]


def test_many_copies_do_not_fill_one_part():
    alike = np.repeat(np.arange(100) * 10, 10)
    train, valid = split_search(np.arange(1000), 0, alike=alike)
    assert (len(train), len(valid)) == (500, 500)


def test_a_large_group_leaves_the_parts_as_even_as_it_can():
    examples = np.arange(200)
    alike = np.where(examples < 120, 0, examples)  # 120 of 200 are equal
    for seed in range(20):
        assert sorted(map(len, held_out_split(examples, seed, alike))) == [80, 120]
        assert sum(map(len, split_search(examples, seed, 0.5, 60, alike))) == 60
    third = np.where(examples < 70, 0, examples)
    assert {len(held_out_split(examples, seed, third)[0]) for seed in range(20)} == {100}


def split_of(columns: dict[str, list], rows: dict[str, list] | None = None) -> Split:
    encoded = datasets.Dataset.from_dict(columns)
    return Split(datasets.Dataset.from_dict(rows or {"text": [""] * len(encoded)}), encoded)


def test_rows_are_alike_if_the_model_reads_the_same():
    texts = split_of({"input_ids": [[1, 2], [1, 2, 3], [1, 2], [3], [1, 2, 3]], "labels": [0, 1, 1, 0, 1]})
    assert alike_of(texts).tolist() == [0, 1, 0, 3, 1]
    part = Split(texts.rows, datasets.concatenate_datasets([texts.encoded, texts.encoded.select(range(1, 3))]))
    assert alike_of(part).tolist() == [0, 1, 0, 3, 1, 1, 0]  # several chunks, one of them a slice
    windows = split_of({"input_ids": [[1], [2], [1], [1], [2]], "example": [0, 0, 4, 7, 7]})
    assert alike_of(windows).tolist() == [0, 0, 4, 0, 0]
    choices = split_of({"input_ids": [[[1], [2, 3]], [[1, 2], [3]], [[1], [2, 4]], [[1], [2, 3]]]})
    assert alike_of(choices).tolist() == [0, 0, 2, 0]  # one sequence after the other; separators tell texts apart
    images = split_of({"row": [0, 1, 2]}, {"digest": ["a", "b", "a"]})
    assert alike_of(images).tolist() == [0, 1, 0]
    assert alike_of(split_of({"row": [0, 1, 2]})).tolist() == [0, 1, 2]


def test_split_hash_depends_on_the_order_of_splits_and_their_border():
    a, b = np.array([1, 2, 3]), np.array([4, 5])
    hashes = {split_hash(a, b), split_hash(b, a), split_hash(np.array([1, 2]), np.array([3, 4, 5]))}
    assert len(hashes) == 3
    assert split_hash(a.astype(np.int32), b) == split_hash(a, b)


def test_impossible_search_splits():
    with pytest.raises(UserError) as caught:
        split_search(np.arange(1), 0, valid_fraction=1.0, max_rows=0)
    assert len(caught.value.problems) == 3
    for valid_fraction, most in ((0.0, None), (1.0, None), (0.5, 1)):
        with pytest.raises(UserError):
            split_search(np.arange(10), 0, valid_fraction, most)


@pytest.mark.parametrize("n", [2, 3, 408])
def test_held_out_halves(n):
    choice, held_out = held_out_split(np.arange(n), 0)
    assert sorted([*choice, *held_out]) == list(range(n)) and len(choice) == n // 2
    assert n < 100 or choice.tolist() != held_out_split(np.arange(n), 1)[0].tolist()


def test_held_out_needs_two_rows():
    with pytest.raises(UserError, match="1 rows"):
        held_out_split(np.arange(1), 0)
    same = held_out_split(np.arange(5), 0, np.zeros(5, dtype=int))
    assert [rows.tolist() for rows in same] == [rows.tolist() for rows in held_out_split(np.arange(5), 0)]
    with pytest.raises(UserError, match="all 5 are alike"):
        split_search(np.arange(5), 0, alike=np.zeros(5, dtype=int))


# --- length-grouped batches ---


@given(n=st.integers(1, 400), per_rank=st.integers(1, 9), world=st.integers(1, 4), epoch=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_batches_partition_the_rows_over_ranks(n, per_rank, world, epoch):
    size, lengths = per_rank * world, lengths_of(n)
    for drop_last in (False, True):
        last = n % size
        left_out = last if drop_last or last < world else 0
        if n == left_out:
            with pytest.raises(UserError, match="make no batch"):
                LengthGroupedBatchSampler(lengths, size, 7, world_size=world, drop_last=drop_last)
            continue
        ranks = [
            LengthGroupedBatchSampler(lengths, size, 7, epoch, rank, world, drop_last=drop_last)
            for rank in range(world)
        ]
        parts = [list(sampler) for sampler in ranks]
        assert [len(part) for part in parts] == [len(sampler) for sampler in ranks]
        assert len(set(map(len, parts))) == 1  # as many steps on every rank
        batches = [sorted(flat(step)) for step in zip(*parts, strict=True)]
        for step in zip(*parts, strict=True):
            assert min(map(len, step)) >= 1 and max(map(len, step)) - min(map(len, step)) <= 1
        rows = flat(batches)
        assert len(rows) == len(set(rows)) == n - left_out and {sampler.left_out for sampler in ranks} == {left_out}
        assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
        if left_out == 0 and not drop_last:
            alone = list(LengthGroupedBatchSampler(lengths, size, 7, epoch))
            assert batches == [sorted(batch) for batch in alone]


def test_union_over_ranks_is_the_batch_of_one_process_in_order():
    lengths = lengths_of(128)
    alone = list(LengthGroupedBatchSampler(lengths, 16, 0))
    ranks = [list(LengthGroupedBatchSampler(lengths, 16, 0, rank=rank, world_size=4)) for rank in range(4)]
    for step, batch in enumerate(alone):
        assert [batch[rank::4] for rank in range(4)] == [part[step] for part in ranks]


def test_order_is_a_pure_function_of_seed_stream_and_epoch():
    lengths = lengths_of(200)
    sampler = LengthGroupedBatchSampler(lengths, 8, seed=0)
    epochs = [at_epoch(sampler, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(5)
    np.random.seed(5)
    assert at_epoch(LengthGroupedBatchSampler(lengths, 8, seed=0), 2) == epochs[2]
    assert list(LengthGroupedBatchSampler(lengths, 8, seed=0, epoch=1)) == epochs[1]
    assert list(LengthGroupedBatchSampler(lengths, 8, seed=1)) != epochs[0]
    assert list(LengthGroupedBatchSampler(lengths, 8, seed=0, stream=3)) != epochs[0]


def test_batches_change_in_composition_between_epochs():
    sampler = LengthGroupedBatchSampler(lengths_of(64), 8, seed=0)
    first, second = ({frozenset(batch) for batch in at_epoch(sampler, epoch)} for epoch in (0, 1))
    assert len(first & second) <= 1


def test_grouping_by_length_saves_padding():
    lengths = lengths_of(2000)

    def padded(batches):
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    batches = list(LengthGroupedBatchSampler(lengths, 16, seed=0))
    plain = np.random.default_rng(0).permutation(2000).reshape(-1, 16).tolist()
    assert padded(batches) < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded(plain)
    longest = np.array([lengths[batch].max() for batch in batches])
    assert 0.3 < (np.diff(longest) > 0).mean() < 0.7  # batches are shuffled: no drift from long to short


def test_indices_restrict_the_rows():
    indices = np.array([3, 50, 51, 99, 7])
    batches = list(LengthGroupedBatchSampler(lengths_of(100), 2, 0, indices=indices))
    assert sorted(flat(batches)) == sorted(indices) and len(batches) == 3
    batches = list(LengthGroupedBatchSampler(lengths_of(100), 2, 0, indices=indices, drop_last=True))
    assert list(map(len, batches)) == [2, 2]


@pytest.mark.parametrize(("size", "world"), [(0, 1), (-4, 1), (6, 4)])
def test_batch_size_must_fit_the_processes(size, world):
    with pytest.raises(UserError, match=f"batch_size={size}"):
        LengthGroupedBatchSampler(lengths_of(20), size, 0, world_size=world)


# --- evaluation ---


@given(n=st.integers(1, 300), size=st.integers(1, 40), world=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_evaluation_sees_every_row_once(n, size, world):
    lengths = lengths_of(n)
    ranks = [EvalBatchSampler(lengths, size, rank, world) for rank in range(world)]
    parts = [list(sampler) for sampler in ranks]
    assert [len(part) for part in parts] == [len(sampler) for sampler in ranks]
    assert sorted(row for part in parts for row in flat(part)) == list(range(n))
    for part in parts:
        own = [lengths[row] for batch in part for row in batch]
        assert own == sorted(own, reverse=True)
        assert all(len(batch) <= max(1, size // world) for batch in part)


@given(n=st.integers(1, 100), size=st.integers(1, 40), world=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_evaluation_in_step_repeats_rows_only_to_keep_step(n, size, world):
    lengths = lengths_of(n)
    plain = [list(EvalBatchSampler(lengths, size, rank, world)) for rank in range(world)]
    parts = [list(EvalBatchSampler(lengths, size, rank, world, in_step=True)) for rank in range(world)]
    assert {len(part) for part in parts} == {max(map(len, plain))}
    for own, padded in zip(plain, parts, strict=True):
        assert padded[: len(own)] == own and all(len(batch) == 1 for batch in padded[len(own) :])


def test_evaluation_of_some_rows():
    indices = np.array([3, 17, 4])
    loader = eval_loader(tokenised(30), Collator(0), 2, indices=indices)
    assert sorted(row for batch in loader for row in batch["row"].tolist()) == [3, 4, 17]
    with pytest.raises(UserError, match="batch_size=0"):
        eval_loader(tokenised(3), Collator(0), 0)


# --- the bi-level sampler ---


def bilevel(n_train, n_valid, size, steps, seed=0, rank=0, world=1):
    lengths = lengths_of(n_train + n_valid)
    train, valid = np.arange(n_train), np.arange(n_train, n_train + n_valid)
    options = {"rank": rank, "world_size": world}
    return BilevelBatchSampler(
        LengthGroupedBatchSampler(lengths, size, seed, indices=train, stream=3, **options),
        LengthGroupedBatchSampler(lengths, size, seed, indices=valid, stream=4, **options),
        steps,
    )


@given(
    n_train=st.integers(2, 120), n_valid=st.integers(2, 120), size=st.integers(1, 8), steps=st.integers(1, 4),
    rounds=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_bilevel_rounds(n_train, n_valid, size, steps, rounds):
    sampler = bilevel(n_train, n_valid, size, steps)
    valid_seen: list[list[int]] = []
    for number in range(rounds):
        items = at_epoch(sampler, number)
        assert len(items) == len(sampler)
        assert all(len(item["train"]) == steps for item in items[:-1]) and 1 <= len(items[-1]["train"]) <= steps
        # One pass over search-train, and nothing of search-valid in it.
        assert sorted(row for item in items for batch in item["train"] for row in batch) == list(range(n_train))
        assert all(row >= n_train for item in items for row in item["valid"])
        valid_seen += [item["valid"] for item in items]
        # A sampler that starts at this round gives the same.
        assert at_epoch(bilevel(n_train, n_valid, size, steps), number) == items
    # Search-valid is cycled: every whole pass over it has each of its rows once.
    per_pass = len(sampler.valid)
    for start in range(0, len(valid_seen) - per_pass + 1, per_pass):
        rows = flat(valid_seen[start : start + per_pass])
        assert sorted(rows) == list(range(n_train, n_train + n_valid))


def test_every_use_of_the_seed_has_random_numbers_of_its_own():
    """Else the order of the search-valid rows, say, would be that of the search-train rows."""
    numbers = [value for name, value in vars(streams).items() if name.isupper()]
    assert len(numbers) > 5 and len(set(numbers)) == len(numbers)


def test_valid_batches_differ_between_passes_and_seeds():
    sampler = bilevel(64, 16, 4, 1)
    items = at_epoch(sampler, 0)
    passes = [[item["valid"] for item in items[start : start + 4]] for start in range(0, 16, 4)]
    assert len({str(one) for one in passes}) == 4
    assert list(bilevel(64, 16, 4, 1, seed=1)) != items


def test_bilevel_ranks_together_are_one_process():
    alone = at_epoch(bilevel(48, 16, 8, 2), 1)
    ranks = [at_epoch(bilevel(48, 16, 8, 2, rank=rank, world=2), 1) for rank in range(2)]
    for step, item in enumerate(alone):
        assert [item["valid"][rank::2] for rank in range(2)] == [part[step]["valid"] for part in ranks]
        for t, batch in enumerate(item["train"]):
            assert [batch[rank::2] for rank in range(2)] == [part[step]["train"][t] for part in ranks]


def test_train_steps_must_be_positive():
    with pytest.raises(UserError, match="train_steps=0"):
        bilevel(8, 8, 2, 0)


def test_dataset_refuses_rows_of_the_other_split():
    data = BilevelDataset(tokenised(10), train_idx=np.arange(5), valid_idx=np.arange(5, 9))
    good = data[{"valid": [5, 8], "train": [[0, 1], [2]]}]
    assert good["valid"]["row"] == [5, 8] and [batch["row"] for batch in good["train"]] == [[0, 1], [2]]
    with pytest.raises(LeakError, match="row 4 is not in the search-valid split"):
        data[{"valid": [5, 4], "train": [[0]]}]
    with pytest.raises(LeakError, match="row 7 is not in the search-train split"):
        data[{"valid": [5], "train": [[0], [7]]}]
    with pytest.raises(LeakError, match="row 9"):  # in neither
        data[{"valid": [9], "train": [[0]]}]
    with pytest.raises(LeakError, match="2 rows are in both"):
        BilevelDataset(tokenised(10), train_idx=np.arange(5), valid_idx=np.arange(3, 9))


# --- loaders ---


@pytest.mark.parametrize("workers", [0, 2])
def test_search_loader_gives_collated_steps_without_leaks(workers):
    data, split = tokenised(60), split_search(np.arange(60), seed=0, valid_fraction=0.3)
    loader = SearchData(data, COLLATE, split, 8, seed=0, train_steps=2, num_workers=workers).train_dataloader()
    items = list(loader)
    assert len(items) == len(loader) == 3  # 42 search-train rows: 5 full batches, the smaller one left out
    assert [len(item["train"]) for item in items] == [2, 2, 1]
    for item in items:
        assert set(item["valid"]["row"].tolist()) <= set(split[1])
        for batch in item["train"]:
            assert set(batch["row"].tolist()) <= set(split[0])
            lengths = torch.tensor(data[batch["row"].tolist()]["length"])
            assert batch["attention_mask"].sum(1).equal(lengths) and batch["input_ids"].shape == (8, lengths.max())


def test_search_on_less_than_a_batch_uses_all_rows():
    split = split_search(np.arange(10), seed=0)
    items = list(SearchData(tokenised(10), COLLATE, split, 64, seed=0).train_dataloader())
    assert len(items) == 1
    assert sorted(items[0]["train"][0]["row"].tolist()) == split[0].tolist()
    assert sorted(items[0]["valid"]["row"].tolist()) == split[1].tolist()


def fine_tune_data(workers=0, seed=0):
    validation = {"validation": tokenised(11, 1), "validation_mismatched": tokenised(5, 2)}
    return FineTuneData(tokenised(30), validation, COLLATE, 8, 4, seed, num_workers=workers)


def test_loaders_do_not_change_the_global_random_state():
    data = fine_tune_data()
    search = SearchData(tokenised(30), COLLATE, split_search(np.arange(30), 0), 4, seed=0)
    before = torch.get_rng_state().clone(), str(np.random.get_state())
    for loader in (data.train_dataloader(), *data.val_dataloader(), search.train_dataloader()):
        for _ in range(2):
            assert sum(1 for _ in loader) == len(loader)
    assert before[0].equal(torch.get_rng_state()) and before[1] == str(np.random.get_state())


def test_workers_give_the_same_batches():
    def rows(loader):
        return [batch["row"].tolist() for batch in loader]

    assert rows(fine_tune_data().train_dataloader()) == rows(fine_tune_data(workers=2).train_dataloader())


def test_loaders_get_rank_and_world_size_from_the_process_group(monkeypatch):
    split = split_search(np.arange(40), 0)

    def seen():
        search = SearchData(tokenised(40), COLLATE, split, 4, seed=0, train_steps=2)
        tune = fine_tune_data()
        steps = [
            batch["row"].tolist() for item in search.train_dataloader() for batch in (item["valid"], *item["train"])
        ]
        evaluated = [row for batch in tune.val_dataloader()[0] for row in batch["row"].tolist()]
        return steps + [batch["row"].tolist() for batch in tune.train_dataloader()], evaluated

    alone, all_rows = seen()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(seen())
    assert parts[0][0] == [batch[0::2] for batch in alone] and parts[1][0] == [batch[1::2] for batch in alone]
    assert sorted(parts[0][1] + parts[1][1]) == sorted(all_rows) == list(range(11))


# --- through a real Trainer ---


class Recorder(L.LightningModule):
    """Learns one number and writes down which rows it saw in which epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list] = {}
        self.evaluated: dict[int, list] = {}

    def training_step(self, batch, _):
        if "row" in batch:
            rows = batch["row"].tolist()
        else:
            rows = {"valid": batch["valid"]["row"].tolist(), "train": [part["row"].tolist() for part in batch["train"]]}
        self.seen.setdefault(self.current_epoch, []).append(rows)
        return self.weight**2

    def validation_step(self, batch, _, dataloader_idx=0):
        self.evaluated.setdefault(dataloader_idx, []).extend(batch["row"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, epochs, resume=None):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def search_data(workers=0):
    # 21 items a round, 4 search-valid batches a pass: rounds start in the middle of a pass.
    return SearchData(tokenised(100), COLLATE, split_search(np.arange(100), 0, 0.16), 4, seed=0, num_workers=workers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [fine_tune_data, search_data], ids=["fine-tune", "search"])
@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_sets_the_epoch_and_resume_replays_the_right_batches(make, workers, tmp_path):
    whole = fit(make(workers), tmp_path / "whole", 3)
    sampler = make().train_dataloader().sampler
    assert whole.seen == {epoch: at_epoch(sampler, epoch) for epoch in range(3)}
    assert whole.seen[0] != whole.seen[1] != whole.seen[2]

    fit(make(workers), tmp_path / "part", 2)
    resumed = fit(make(workers), tmp_path / "part", 3, resume=tmp_path / "part" / "last.ckpt")
    assert resumed.seen == {2: whole.seen[2]}


@pytest.mark.parametrize("make", [fine_tune_data, search_data], ids=["fine-tune", "search"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_order_depends_on_the_epoch_not_on_when_the_iterator_was_made(make, workers):
    """B10: on a resume, Lightning makes the iterator before it has set the epoch."""

    def rows(batch):
        return batch["row"].tolist() if "row" in batch else batch["train"][0]["row"].tolist()

    loader = make(workers).train_dataloader()
    expected = at_epoch(make().train_dataloader().sampler, 2)
    early = iter(loader)
    loader.sampler.set_epoch(2)
    seen = [rows(batch) for batch in early]
    assert seen == [batch if isinstance(batch, list) else batch["train"][0] for batch in expected]
    early = iter(loader)  # the same workers once more
    loader.sampler.set_epoch(3)
    assert [rows(batch) for batch in early] != seen


class Noisy:
    """A task's own collate function that draws from global random states."""

    def __call__(self, rows):
        return torch.tensor([np.random.rand(), random.random(), torch.rand(()).item()])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_random_numbers_depend_on_the_batch_only(workers):
    loader = LateLoader(
        TrainingDataset(tokenised(40)),
        sampler=LengthGroupedBatchSampler(lengths_of(40), 8, 0),
        batch_size=None,
        collate_fn=Noisy(),
        num_workers=workers,
        persistent_workers=True,
    )

    def drawn(epoch):
        loader.sampler.set_epoch(epoch)
        return torch.stack(list(loader))

    first, second = drawn(0), drawn(1)
    assert torch.equal(drawn(1), second) and torch.equal(drawn(0), first)
    assert len(torch.cat([first, second]).unique()) == 2 * 5 * 3


def test_a_worker_draws_other_numbers_for_the_same_rows_in_another_epoch_stage_or_run():
    batches = [Drawn([3, 1], draw, 60) for draw in ((0, 2, 0), (0, 2, 1), (0, 3, 0), (1, 2, 0))]
    loader = LateLoader(
        TrainingDataset(tokenised(8)), sampler=batches, batch_size=None, collate_fn=Noisy(), num_workers=1
    )
    assert len(torch.stack(list(loader)).unique()) == 4 * 3


@pytest.mark.filterwarnings("ignore")
def test_trainer_validates_every_row_of_every_split(tmp_path):
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(module, fine_tune_data(), verbose=False)
    assert {index: sorted(rows) for index, rows in module.evaluated.items()} == {0: list(range(11)), 1: list(range(5))}
