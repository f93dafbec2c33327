"""Make the `tiny` backbone: a small DeBERTa, pretrained on a CPU on plain text of the generated grammar.

    python scripts/pretrain_tiny.py            # into src/diffora/assets/tiny, which the package ships

The text is `diffora.tasks.embedded.paraphrase.corpus`: stories of one or two sentences, newly generated
for each step, without labels. Stage one is masked language modelling. Stage two adds DeBERTa-v3's objective: find the
words of the text that were replaced. The model sees no pairs and no label that says "paraphrase".
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from diffora.tasks.embedded.paraphrase import VOCABULARY, corpus  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
MAX_LENGTH = 64


@dataclass(frozen=True)
class Stage:
    """How words are hidden: `rate` is the share to predict; `masked` and `replaced` are shares of these words.

    `nearby` and `confused` say where replacements come from (see `corrupt`). `detect` is the weight of their detection.
    """

    name: str
    steps: int
    lr: float
    rate: float
    masked: float
    replaced: float
    nearby: float = 0.0
    confused: float = 0.0
    detect: float = 0.0


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
    return DebertaV2Config(  # type: ignore[call-arg]  # the stubs lack arguments that transformers accepts
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
    """Endless padded batches (size, length). Stories of similar length are in one batch."""
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


def corrupt(
    ids: torch.Tensor, stage: Stage, confusion: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's inputs, and which words it must predict (both rows, length).

    A word to predict is masked, replaced or kept. `confusion` (words, words) is the running sum of the model's own
    predictions: row w for positions whose true word is w. A replacement is a likely word of the same story (in the
    share `nearby` of cases), a word drawn from row w (`confused`), or any word.
    """
    rand = partial(torch.rand, ids.shape, generator=generator)
    asked = (rand() < stage.rate) & (ids >= len(SPECIAL))
    how = rand()
    other = torch.randint(len(SPECIAL), len(SPECIAL) + len(VOCABULARY), ids.shape, generator=generator)
    if stage.nearby or stage.confused:
        likely = (confusion / confusion.sum(1, keepdim=True))[ids]  # (rows, length, words)
        fitting = likely.gather(2, ids[:, None, :].expand(-1, ids.shape[1], -1)) ** (1 / 3) + 1e-6
        near = ids.gather(1, torch.multinomial(fitting.flatten(0, 1), 1, generator=generator).view_as(ids))
        taken = torch.multinomial(confusion[ids.flatten()], 1, generator=generator).view_as(ids)
        which = rand()
        other = torch.where(which < stage.nearby, near, other)
        other = torch.where((which >= stage.nearby) & (which < stage.nearby + stage.confused), taken, other)
    inputs = ids.masked_fill(asked & (how < stage.masked), MASK)
    return torch.where(asked & (how >= stage.masked) & (how < stage.masked + stage.replaced), other, inputs), asked


def train(whole: DebertaV2ForMaskedLM, stage: Stage, args: argparse.Namespace, seed: int) -> float:
    """One stage; returns the running mean of the masked-language-modelling loss."""
    generator = torch.Generator().manual_seed(seed)
    encoder = whole.train().deberta
    detector = torch.nn.Linear(encoder.config.hidden_size, 1)
    parameters = [*whole.parameters(), *(detector.parameters() if stage.detect else ())]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, stage.steps // 20)
    confusion = torch.full((len(SPECIAL) + len(VOCABULARY),) * 2, 1e-3)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / stage.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start, mean, mean_detect = time.perf_counter(), math.log(len(VOCABULARY)), math.log(2)
    for step, ids in enumerate(islice(batches(args.batch_size, seed), stage.steps), 1):
        inputs, asked = corrupt(ids, stage, confusion, generator)
        hidden = encoder(inputs, attention_mask=(ids != PAD).long()).last_hidden_state
        logits = whole.cls(hidden[asked])
        loss = torch.nn.functional.cross_entropy(logits, ids[asked])
        if stage.confused:
            masked = inputs[asked] == MASK
            confusion.index_add_(0, ids[asked][masked], logits.detach()[masked].softmax(-1))
            confusion.fill_diagonal_(0)[:, : len(SPECIAL)] = 0
        mean += (loss.item() - mean) * 0.02
        if stage.detect:
            seen = (inputs >= len(SPECIAL)).nonzero(as_tuple=True)
            replaced = (inputs != ids)[seen].float()
            detect = torch.nn.functional.binary_cross_entropy_with_logits(detector(hidden[seen]).squeeze(-1), replaced)
            mean_detect += (detect.item() - mean_detect) * 0.02
            loss = loss + stage.detect * detect
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % args.log_every == 0 or step == stage.steps:
            spent = time.perf_counter() - start
            left = spent / step * (stage.steps - step)
            extra = f", replaced words {mean_detect:.3f}" if stage.detect else ""
            line = f"{stage.name} {step}/{stage.steps}  loss {mean:.3f}{extra}  {spent:.0f} s spent, {left:.0f} s left"
            print(line, flush=True)
    return mean


def save(encoder: DebertaV2Model, output: Path) -> None:
    """The encoder (no language-modelling head), its config and its tokenizer, ready for `from_pretrained`."""
    encoder.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    build_tokenizer().save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "src/diffora/assets/tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000, help="of masked language modelling")
    parser.add_argument("--detect-steps", type=int, default=3500, help="then, with replaced words to be found")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--detect-lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="folder of an earlier result to go on from")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    stages = (
        Stage("masked", args.steps, args.lr, rate=0.2, masked=0.7, replaced=0.2),
        Stage(
            "detect", args.detect_steps, args.detect_lr, rate=0.25, masked=0.5, replaced=0.4,
            nearby=0.5, confused=0.3, detect=5.0,
        ),
    )  # fmt: skip
    encoder = DebertaV2Model.from_pretrained(args.start) if args.start else None
    for number, stage in enumerate(stages):
        if not stage.steps:
            continue
        torch.manual_seed(args.seed + number)
        whole = DebertaV2ForMaskedLM(build_config(args.layers, args.hidden, args.intermediate, args.heads))
        if encoder is not None:  # each stage starts with new heads
            whole.deberta.load_state_dict(encoder.state_dict())
        loss = train(whole, stage, args, args.seed + number)
        encoder = whole.deberta
        save(encoder, args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"loss {loss:.3f}, {time.perf_counter() - start:.0f} s, {size / 2**20:.2f} MiB in {args.output}")


if __name__ == "__main__":
    main()
