"""Make the `tiny_t5` backbone: a small T5, pretrained on generated text on one CPU core.

    python scripts/pretrain_tiny_t5.py            # into src/diffora/assets/tiny_t5, which the package ships

The text is newly generated for each step. There are three kinds: stories of
`diffora.tasks.embedded.paraphrase.corpus` with missing words, which the target names (T5's span corruption); lists of
random words and sentences, to copy; and sentences to say in other words. There is no request or question of the
`rewrite` task.
"""

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from pretraining import options, pretrain  # noqa: E402

from diffora.tasks.embedded import paraphrase  # noqa: E402
from diffora.tasks.embedded.dialogue import VOCABULARY  # noqa: E402

SPECIAL = ["<pad>", "</s>", "<unk>"]
PAD, EOS, UNK = range(3)
GAPS = 10
MAX_LENGTH = 256
Pair = tuple[list[int], list[int]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with an end token after each text, and T5's tokens for gaps."""
    gaps = [f"<extra_id_{i}>" for i in range(GAPS)]
    tokens = [*SPECIAL, *VOCABULARY, *gaps]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=gaps,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def with_gaps(ids: list[int], rng: random.Random) -> Pair:
    """T5's span corruption: about 15 % of the tokens are in gaps of one to three tokens."""
    first_gap = len(SPECIAL) + len(VOCABULARY)
    source: list[int] = []
    target: list[int] = []
    at = gap = 0
    while at < len(ids):
        if gap < GAPS and rng.random() < 0.085:
            size = rng.choice((1, 2, 3))
            source.append(first_gap + gap)
            target += [first_gap + gap, *ids[at : at + size]]
            gap, at = gap + 1, at + size
        else:
            source.append(ids[at])
            at += 1
    return source, target


def pairs(seed: int) -> Iterator[Pair]:
    """Token ids of endless pairs (source, target), without end tokens."""
    ids = {word: i + len(SPECIAL) for i, word in enumerate(VOCABULARY)}
    rng = random.Random(f"tiny-t5-{seed}")
    stories = paraphrase.corpus(sys.maxsize, seed)

    def words(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    while True:
        kind = rng.random()
        if kind < 0.25:
            source, target = with_gaps([i for sentence in next(stories) for i in words(f"{sentence} .")], rng)
            if target:
                yield source, target
        elif kind < 0.45:
            said = rng.sample(sorted(ids.values()), rng.randint(2, 10))
            yield said, said
        elif kind < 0.6:
            said = words(paraphrase.render(paraphrase.draw(rng), rng))
            yield said, said
        else:
            meaning = paraphrase.draw(rng)
            yield words(paraphrase.render(meaning, rng)), words(paraphrase.render(meaning, rng))


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows)) + 1
    return torch.tensor([[*row, EOS] + [value] * (longest - 1 - len(row)) for row in rows])


def batches(size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless padded batches. Pairs of similar length are in one batch."""
    shuffle = random.Random(seed)
    source = pairs(seed)
    while True:
        rows = sorted(islice(source, 16 * size), key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(rows), size))
        shuffle.shuffle(starts)
        for start in starts:
            chosen = rows[start : start + size]
            ids = padded([given for given, _ in chosen], PAD)
            mask = (ids != PAD).long()
            yield {"input_ids": ids, "attention_mask": mask, "labels": padded([wanted for _, wanted in chosen], -100)}


def loss_of(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of the target's tokens."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def main() -> None:
    args = options(__doc__ or "", "tiny_t5", steps=4000, batch_size=32, layers=3, hidden=72, intermediate=192)
    tokenizer = build_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=args.hidden,
        d_kv=args.hidden // args.heads,
        d_ff=args.intermediate,
        num_layers=args.layers,
        num_decoder_layers=args.layers,
        num_heads=args.heads,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,  # type: ignore[call-arg]
    )
    model = T5ForConditionalGeneration(config).train()
    model.config.dropout_rate = 0.1  # for those who load it; the layers above were made without dropout
    pretrain(model, tokenizer, batches(args.batch_size, args.seed), loss_of, args)


if __name__ == "__main__":
    main()
