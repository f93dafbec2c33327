"""Make the `tiny_vit` backbone: a small ViT, pretrained on a CPU on the handwritten digits 0 to 4, in about a minute.

    python scripts/pretrain_tiny_vit.py            # into src/diffora/assets/tiny_vit, which the package ships

It learns to classify the five digits in images that are moved, turned and scaled a little. The classifier is not kept.
The digits 5 to 9 are the embedded task (`diffora.tasks.embedded.digits`); this script does not use them.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from diffora.tasks.embedded.digits import PRETRAINED, digits  # noqa: E402

SIZE = 8


def build_config(layers: int, hidden: int, intermediate: int, heads: int) -> ViTConfig:
    """A configuration with 17 tokens: 4 x 4 patches of 2 x 2 pixels, and one for the class."""
    return ViTConfig(  # type: ignore[call-arg]  # the stubs lack num_labels
        image_size=SIZE,
        patch_size=2,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(PRETRAINED),
    )


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (n, 3, side, side) in [-1, 1], each turned, scaled and moved at random. Uncovered pixels are black."""
    n = len(images)
    draw = torch.rand(n, 4, generator=generator) * 2 - 1
    angle, scale = draw[:, 0] * math.radians(15), 1 + draw[:, 1] * 0.15
    cos, sin, move = angle.cos() / scale, angle.sin() / scale, draw[:, 2:] * (2 / SIZE)
    theta = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(model: ViTForImageClassification, args: argparse.Namespace) -> None:
    """Supervised, AdamW, warm-up and cosine decay."""
    images, targets = digits(PRETRAINED)
    pixels = (torch.from_numpy(images).float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(targets)
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * -(-len(labels) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    start, step = time.perf_counter(), 0
    for epoch in range(1, args.epochs + 1):
        right = 0
        for rows in torch.randperm(len(labels), generator=generator).split(args.batch_size):
            logits = model(vary(pixels[rows], generator)).logits
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=args.smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            right += int((logits.argmax(-1) == labels[rows]).sum())
        if epoch % 10 == 0 or epoch == args.epochs:
            spent = time.perf_counter() - start
            line = f"epoch {epoch}/{args.epochs}  right {right / len(labels):.3f}  loss {loss.item():.3f}"
            print(f"{line}  {spent:.0f} s spent, {spent / step * (steps - step):.0f} s left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "src/diffora/assets/tiny_vit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small, and sums keep one order
    torch.manual_seed(args.seed)
    model = ViTForImageClassification(build_config(args.layers, args.hidden, args.intermediate, args.heads))
    train(model, args)
    model.vit.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{size / 2**20:.2f} MiB in {args.output}")


if __name__ == "__main__":
    main()
