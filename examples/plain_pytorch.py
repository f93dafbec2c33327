"""A network of your own in plain PyTorch: an nn.TransformerEncoder that reads the eight rows of a handwritten digit.

python examples/plain_pytorch.py [--epochs 10] [--output FOLDER]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffora

cli = argparse.ArgumentParser()
cli.add_argument("--epochs", type=int, default=10)
cli.add_argument("--output", default="outputs/plain_pytorch")
given = cli.parse_args()


class Net(nn.Module):
    """Your network."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 64)
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


# --- what a user writes ---
net = Net()  # load its trained weights here: this example adapts random ones
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
loader = DataLoader(TensorDataset(x.float().view(-1, 8, 8) / 16, y), batch_size=64, shuffle=True)


def loss_of(net, batch):
    """The loss of a batch."""
    x, y = batch
    return nn.functional.cross_entropy(net(x), y)


selection = diffora.search(net, loader, loss=loss_of, rounds=1, k=1)
diffora.attach(net, selection, rank=4, shared_rank=1)
net.head.requires_grad_(True)

optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
for epoch in range(given.epochs):
    for batch in loader:
        loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
diffora.save_adapter(net, given.output)
