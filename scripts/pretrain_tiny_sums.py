"""Make the `tiny_sums` backbone: a small Llama that knows numbers, pretrained on generated text on one CPU core.

    python scripts/pretrain_tiny_sums.py            # into src/diffora/assets/tiny_sums, which the package ships

The text is newly generated for each step. There are four kinds: stories of
`diffora.tasks.embedded.paraphrase.corpus`; sums, such as ``7 + 5 = 12``; accounts that say what somebody has after each
change; and lists of random words, each list twice. There is no question, and no text has both sums and an account: the
`sums` task must teach the model to write the sums of a story.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from pretrain_tiny_llama import batches, loss_of, small_llama  # noqa: E402
from pretraining import options, pretrain  # noqa: E402

from diffora.tasks.embedded import paraphrase, sums  # noqa: E402
from diffora.tasks.embedded.sums import MOST, VOCABULARY  # noqa: E402

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
PAD, UNK, BOS, EOS = range(4)
MAX_LENGTH = 192


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, without a chat template. As Llama's, it writes a begin token before every text."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *VOCABULARY])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def account(rng: random.Random) -> str:
    """A story that says how many things somebody has after each change."""
    told, other = sums.begin(rng)
    for _ in range(rng.randint(1, 3)):
        told.change(other, rng)
        told.told.append(f"now {told.who} has {told.has} {told.what}")
    return " . ".join(told.told) + " ."


def some_sums(rng: random.Random) -> str:
    """Two to eight sums; about half of them go on from the result of the one before."""
    found, has = [], rng.randint(0, MOST)
    for _ in range(rng.randint(2, 8)):
        if rng.random() < 0.5:
            has = rng.randint(0, MOST)
        gains = rng.random() < 0.5
        n = rng.randint(0, MOST - has if gains else has)
        before, has = has, has + (n if gains else -n)
        found.append(f"{before} {'+' if gains else '-'} {n} = {has}")
    return " . ".join(found) + " ."


def documents(seed: int) -> Iterator[list[int]]:
    """Token ids of endless documents."""
    ids = {word: i + len(SPECIAL) for i, word in enumerate(VOCABULARY)}
    rng = random.Random(f"tiny-sums-{seed}")
    stories = paraphrase.corpus(sys.maxsize, seed)
    while True:
        kind = rng.random()
        if kind < 0.25:
            text = " ".join(f"{sentence} ." for sentence in next(stories))
        elif kind < 0.55:
            text = some_sums(rng)
        elif kind < 0.85:
            text = account(rng)
        else:
            said = " ".join(rng.sample(VOCABULARY, rng.randint(3, 10)))
            text = f"{said} . {said} ."
        yield [BOS, *(ids[word] for word in text.split()), EOS]


def main() -> None:
    args = options(__doc__ or "", "tiny_sums", steps=3000, batch_size=48, layers=4, hidden=96, intermediate=256)
    tokenizer = build_tokenizer()
    model = small_llama(args, tokenizer, MAX_LENGTH)
    pretrain(model, tokenizer, batches(documents(args.seed), args.batch_size, args.seed), loss_of, args)


if __name__ == "__main__":
    main()
