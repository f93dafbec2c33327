"""Makes the `tiny` backbone: masked language modelling of a small DeBERTa on text of the generated grammar, on CPU.

    python scripts/pretrain_tiny.py            # the shipped folder, src/diffora/assets/tiny

The text is `diffora.tasks.paraphrase.corpus`: stories of one or two sentences, written afresh for every step and free of labels.
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from diffora.tasks.paraphrase import VOCABULARY, corpus  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
MAX_LENGTH = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level; a pair becomes `[CLS] a [SEP] b [SEP]`."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *VOCABULARY])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_config(layers: int, hidden: int, intermediate: int, heads: int) -> DebertaV2Config:
    """DeBERTa-v3 style: relative positions only, shared content and position keys, no segment embeddings."""
    return DebertaV2Config(
        vocab_size=len(SPECIAL) + len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_LENGTH,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=32,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        pooler_hidden_size=hidden,
        pad_token_id=PAD,
        layer_norm_eps=1e-7,
    )


def batches(size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless padded batches (size, length); stories of similar length share one."""
    ids = {w: i + len(SPECIAL) for i, w in enumerate(VOCABULARY)}
    shuffle = random.Random(seed)
    stories = corpus(sys.maxsize, seed)
    while True:
        rows = []
        for story in islice(stories, 16 * size):
            rows.append([CLS] + [i for sentence in story for i in [*(ids[w] for w in sentence.split()), SEP]])
        rows.sort(key=len)
        starts = list(range(0, len(rows), size))
        shuffle.shuffle(starts)
        for start in starts:
            chosen = rows[start : start + size]
            yield torch.tensor([row + [PAD] * (len(chosen[-1]) - len(row)) for row in chosen])


def corrupt(ids: torch.Tensor, rate: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (-100 where nothing is asked), both (rows, length): of the words asked, 70% masked, 20% random, 10% kept."""
    draw = torch.rand(ids.shape, generator=generator)
    asked = (draw < rate) & (ids >= len(SPECIAL))
    targets = ids.masked_fill(~asked, -100)
    how = torch.rand(ids.shape, generator=generator)
    other = torch.randint(len(SPECIAL), len(SPECIAL) + len(VOCABULARY), ids.shape, generator=generator)
    inputs = ids.masked_fill(asked & (how < 0.7), MASK)
    return torch.where(asked & (how >= 0.7) & (how < 0.9), other, inputs), targets


def pretrain(args: argparse.Namespace) -> tuple[DebertaV2ForMaskedLM, float]:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = DebertaV2ForMaskedLM(build_config(args.layers, args.hidden, args.intermediate, args.heads)).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps)))),
    )
    start, mean = time.perf_counter(), math.log(len(VOCABULARY))
    for step, ids in enumerate(islice(batches(args.batch_size, args.seed), args.steps), 1):
        inputs, targets = corrupt(ids, args.mask_rate, generator)
        hidden = model.deberta(inputs, attention_mask=(ids != PAD).long()).last_hidden_state
        asked = targets != -100
        logits = model.cls(hidden[asked])
        loss = torch.nn.functional.cross_entropy(logits, targets[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * 0.02
        if step % args.log_every == 0 or step == args.steps:
            spent = time.perf_counter() - start
            left = spent / step * (args.steps - step)
            print(f"step {step}/{args.steps}  loss {mean:.3f}  {spent:.0f} s spent, {left:.0f} s left", flush=True)
    return model, mean


def save(model: DebertaV2ForMaskedLM, output: Path) -> None:
    """The encoder (no language-modelling head), its config and its tokenizer, ready for `from_pretrained`."""
    model.deberta.save_pretrained(output)
    build_tokenizer().save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "src/diffora/assets/tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--mask-rate", type=float, default=0.2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model, loss = pretrain(args)
    save(model, args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"loss {loss:.3f}, {time.perf_counter() - start:.0f} s, {size / 2**20:.2f} MiB in {args.output}")


if __name__ == "__main__":
    main()
