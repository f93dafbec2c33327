"""Which loaders and batches the library takes, and what it says of those that it cannot use."""

from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import pytest
import torch
from library import Net, bert, entropy_loss, pairs, texts
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler
from transformers import AutoTokenizer, BatchEncoding, DataCollatorWithPadding

import diffora
from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.standalone.batches import moved


def search(model, *loaders, loss=None, **more):
    torch.manual_seed(0)
    return diffora.search(model, *loaders, loss=loss, **{"rounds": 1, "gamma_lr": 0.1, "progress": False} | more)


class Stream(IterableDataset):
    """Rows of unknown number."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def small_net():
    """Without dropout: a loader draws a random number at each pass, so that masks would differ from those of a list."""
    torch.manual_seed(0)
    model = Net()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def small_bert():
    torch.manual_seed(0)
    return bert()


def rows(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, generator=generator), torch.randint(0, 2, (), generator=generator)) for _ in range(n)]


def test_lists_loaders_and_streams_of_the_same_batches_give_the_same_gates():
    train, valid = rows(seed=1), rows(seed=2)
    wanted = search(small_net(), DataLoader(train, 4), DataLoader(valid, 4), loss=entropy_loss, rounds=2)
    assert torch.tensor(wanted.gamma_bar).std() > 0.01
    as_lists = [list(DataLoader(part, 4)) for part in (train, valid)]
    streams = [DataLoader(Stream(part), batch_size=4) for part in (train, valid)]
    for loaders in (as_lists, streams, [tuple(part) for part in as_lists]):
        assert search(small_net(), *loaders, loss=entropy_loss, rounds=2).gamma_bar == wanted.gamma_bar
    once = (iter(part) for part in as_lists)  # one pass is all that one round needs
    assert (
        search(small_net(), *once, loss=entropy_loss).gamma_bar
        == search(small_net(), *as_lists, loss=entropy_loss).gamma_bar
    )


def test_the_bar_of_a_stream_has_no_end(capsys, monkeypatch):
    monkeypatch.setattr("diffora.standalone.progress.is_watched", lambda: True)
    loaders = [DataLoader(Stream(rows()), batch_size=4) for _ in range(2)]
    search(small_net(), *loaders, loss=entropy_loss, progress=True)
    shown = capsys.readouterr().err
    assert "6step" in shown and "6/6" not in shown


def test_a_selector_shows_progress_too_unless_told_not_to(capsys, monkeypatch):
    monkeypatch.setattr("diffora.standalone.progress.is_watched", lambda: True)
    for progress in (True, False):
        diffora.select(small_net(), "gradient", pairs(8), loss=entropy_loss, progress=progress)
        assert ("6/6" in capsys.readouterr().err) is progress


def test_a_dataset_of_hugging_face_with_its_collator():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    texts = [
        f"the {word} is {'good' if i % 2 else 'bad'}" for i, word in enumerate(["cat", "red dog", "old house"] * 6)
    ]
    data = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(18)]})
    data = data.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    assert isinstance(next(iter(loader)), BatchEncoding) and "labels" in next(iter(loader))
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2)
    found = search(model, loader)
    assert found.config["division"].startswith("divided 18 rows at random: 9 for the weights")
    assert torch.tensor(found.gamma_bar).std() > 0
    assert torch.tensor(diffora.select(model, "gradient", loader).scores).min() > 0


def test_a_batch_may_be_a_dict_a_pair_or_one_tensor():
    batches = pairs(8, n=6)

    def of_dict(model, batch):
        return entropy_loss(model, (batch["x"], batch["y"]))

    def of_tensor(model, batch):
        assert isinstance(batch, torch.Tensor)
        return nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8].long())

    wanted = search(small_net(), batches[:3], batches[3:], loss=entropy_loss).gamma_bar
    forms = [
        ([{"x": x, "y": y} for x, y in batches], of_dict),
        ([{"x": x, "y": y, "id": "a"} for x, y in batches], of_dict),
        ([torch.cat([x, y[:, None]], 1) for x, y in batches], of_tensor),
        ([[x, y] for x, y in batches], entropy_loss),
    ]
    for form, loss in forms:
        found = search(small_net(), form[:3], form[3:], loss=loss).gamma_bar
        assert torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=1e-5)


@pytest.mark.parametrize("attribute", ["loader", "dataset"])
def test_the_same_rows_for_both_levels_are_refused(attribute):
    data = TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))
    first = DataLoader(data, 4, shuffle=True)
    second = first if attribute == "loader" else DataLoader(data, 2)
    with pytest.raises(UserError, match=r"give the same rows.*give one loader, which is divided"):
        search(small_net(), first, second, loss=entropy_loss)


def unlabelled():
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in texts()]


@pytest.mark.parametrize(
    ("make", "loaders", "more", "message"),
    [
        (
            small_bert,
            (unlabelled(), texts()[:1]),
            {"rounds": 1},
            r"returned a SequenceClassifierOutput without loss for a",
        ),
        (small_bert, (texts()[:1],), {}, r"1 batches cannot be divided: it needs at least 2"),
        (
            small_net,
            (TensorDataset(torch.randn(8, 8)),),
            {},
            r"is a TensorDataset, which gives rows: put it into a torch",
        ),
        (
            small_bert,
            (datasets.Dataset.from_dict({"labels": [1]}),),
            {},
            r"is a Dataset, which gives rows: put it into",
        ),
        (small_bert, (5,), {}, r"train_loader is a int: it must give batches"),
        (small_bert, (texts(), 5), {"k": 99}, r"k=99 must be .*\n.*valid_loader is a int: it must give batches"),
        (small_net, (pairs(8), iter(pairs(8, n=2))), {}, r"loader of validation batches has no batches.*only once"),
        (small_net, (pairs(8),), {"loss": lambda m, b: m(b[0])}, r"validation batch of step 1 has the shape \(4, 2\)"),
        (small_net, (pairs(8),), {"loss": lambda m, b: entropy_loss(m, b) / 0}, r"validation batch of step 1 is inf"),
    ],
)
def test_a_loader_or_loss_that_cannot_be_used_is_named(make, loaders, more, message):
    loss = more.pop("loss", entropy_loss if make is small_net else None)
    with pytest.raises(UserError, match=f"(?s){message}"):
        search(make(), *loaders, loss=loss, **more)


class Labelled(Net):
    """Returns its own loss, as transformers' models do, and takes nothing else."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return SimpleNamespace(loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def test_a_model_that_is_not_from_transformers_may_have_its_own_loss():
    batches = [{"x": x, "labels": y} for x, y in pairs(8)]
    assert torch.tensor(search(Labelled(), batches).gamma_bar).std() > 0
    with pytest.raises(UserError, match=r"Labelled takes x, labels, and not idx: leave that out of the batches"):
        search(Labelled(), [{**batch, "idx": 1} for batch in batches])
    with pytest.raises(
        UserError, match=r"Labelled returned a SimpleNamespace without loss for a batch with x: add labels"
    ):
        search(Labelled(), [{"x": batch["x"]} for batch in batches])


def test_the_loss_may_compute_in_mixed_precision():
    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return entropy_loss(model, batch)

    batches = pairs(8)
    plain, found = (
        torch.tensor(search(small_net(), batches[:3], batches[3:], loss=loss).gamma_bar)
        for loss in (entropy_loss, mixed)
    )
    assert not found.equal(plain) and torch.allclose(found, plain, atol=0.1)


def test_a_loader_with_its_own_sampler_is_not_divided_but_two_of_them_are_used():
    data = TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))
    loader = DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 8, 8))
    some_rows = DataLoader(data, 4, sampler=RandomSampler(data, num_samples=4))  # the limit would be lost
    for one in (loader, some_rows, DataLoader(Stream(rows()), batch_size=4)):
        with pytest.raises(UserError, match=r"cannot be divided.*give two loaders, search\(model, train_loader"):
            search(small_net(), one, loss=entropy_loss)
    search(small_net(), loader, pairs(8), loss=entropy_loss)


class Normalised(DataLoader):
    """A loader that changes its batches."""

    def __iter__(self):
        return ((x / 100, y) for x, y in super().__iter__())


def test_a_loader_with_an_iteration_of_its_own_is_not_divided():
    loader = Normalised(TensorDataset(torch.randn(24, 8), torch.randint(0, 2, (24,))), batch_size=4)
    with pytest.raises(UserError, match="a Normalised of this kind cannot be divided"):
        search(small_net(), loader, loss=entropy_loss)
    assert search(small_net(), loader, loader_of(12), loss=entropy_loss).rounds == 1


def loader_of(n):
    return DataLoader(TensorDataset(torch.randn(n, 8), torch.randint(0, 2, (n,))), batch_size=4)


class Fields(dict):
    """A batch whose entries are attributes, too."""

    __getattr__ = dict.__getitem__


@dataclass(frozen=True)
class Example:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("made", [lambda x, y: Fields(x=x, y=y), Example])
def test_a_batch_with_attributes_reaches_the_loss_as_it_is(made):
    def loss(model, batch):
        return entropy_loss(model, (batch.x, batch.y))

    batches = [made(x, y) for x, y in pairs(8)]
    assert search(small_net(), batches, loss=loss) == search(small_net(), pairs(8), loss=entropy_loss)
    there = moved(batches[0], torch.device("meta"))
    assert type(there) is type(batches[0]) and there.x.is_meta and not batches[0].x.is_meta


class WithLoss(Net):
    """A model as for transformers' Trainer, which returns a dict."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_loss_in_a_dict_is_found():
    torch.manual_seed(0)
    model = WithLoss()
    batches = [{"x": x, "labels": y} for x, y in pairs(8)]
    assert search(model, batches) == search(model, batches, loss=lambda model, batch: model(**batch)["loss"])
    with pytest.raises(UserError, match="WithLoss returned a dict without loss for a batch with x: add labels"):
        search(model, [{"x": x} for x, _ in pairs(8)])
