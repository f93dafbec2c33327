"""Small models and batches of a user's own, for tests of the library, and what a search must leave as it was."""

import torch
from conftest import batch_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


class Net(nn.Module):
    """A residual stack, with a buffer that each pass in training mode changes, and dropout."""

    def __init__(self, encoder=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Encoder(nn.Module):
    """A classifier on `nn.TransformerEncoder`."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return BertForSequenceClassification(config)


def entropy_loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def pairs(*shape, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, *shape, generator=generator), torch.randint(0, 2, (4,), generator=generator)) for _ in range(n)
    ]


def texts(n=6):
    batches = [batch_of(4, seed=seed) for seed in range(n)]
    return [{key: value for key, value in batch.items() if key != "row"} for batch in batches]


CASES = {"bert": (bert, texts, None), "net": (Net, lambda: pairs(8), entropy_loss)}
CASES["encoder"] = Encoder, lambda: pairs(5, 8), entropy_loss


def state(model):
    """All that a search must leave as it was."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "objects": [id(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for key in ("flags", "objects", "modes", "hooks"):
        assert before[key] == after[key], key
    assert all(before["grads"][name] is grad for name, grad in after["grads"].items())
    assert before["random"].equal(after["random"])
    assert before["values"].keys() == after["values"].keys()
    assert all(value.equal(after["values"][name]) for name, value in before["values"].items())


def part_frozen(model):
    """In evaluation mode but for one module, with one gradient and all but the head frozen."""
    model.eval()
    next(model.children()).train()
    head = getattr(model, "head", None) or model.classifier
    model.requires_grad_(False)
    head.requires_grad_(True)
    head.weight.grad = torch.ones_like(head.weight)
    return model
