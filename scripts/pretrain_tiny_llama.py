"""Make the `tiny_llama` backbone: a small Llama, pretrained on generated text on one CPU core.

    python scripts/pretrain_tiny_llama.py            # into src/diffora/assets/tiny_llama, which the package ships

The text is newly generated for each step. There are three kinds: stories of
`diffora.tasks.embedded.paraphrase.corpus`; lists of random words of the vocabulary, each list twice; and chats in which
the assistant repeats the user's sentence in other words. There is no conversation, request or question of the
`dialogue` task.
"""

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from pretraining import options, pretrain  # noqa: E402

from diffora.tasks.embedded import paraphrase  # noqa: E402
from diffora.tasks.embedded.dialogue import VOCABULARY  # noqa: E402

SPECIAL = ["<pad>", "<unk>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, UNK, BOS, USER, ASSISTANT, END = range(6)
MAX_LENGTH = 256
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with a chat template."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *VOCABULARY])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def documents(seed: int) -> Iterator[list[int]]:
    """Token ids of endless documents: one half are stories, the other half lists and chats."""
    ids = {word: i + len(SPECIAL) for i, word in enumerate(VOCABULARY)}
    rng = random.Random(f"tiny-llama-{seed}")
    stories = paraphrase.corpus(sys.maxsize, seed)

    def words(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    while True:
        kind = rng.random()
        if kind < 0.5:
            yield [BOS, *(i for sentence in next(stories) for i in words(f"{sentence} .")), END]
        elif kind < 0.7:
            said = rng.sample(sorted(ids.values()), rng.randint(3, 10))
            yield [BOS, *said, ids["."], *said, ids["."], END]
        else:
            turns = []
            for _ in range(rng.choice((1, 1, 2))):
                meaning = paraphrase.draw(rng)
                turns += [USER, *words(paraphrase.render(meaning, rng)), END]
                turns += [ASSISTANT, *words(paraphrase.render(meaning, rng)), END]
            yield [BOS, *turns]


def batches(source: Iterator[list[int]], size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless padded batches (size, length) of documents. Those of similar length are in one batch."""
    shuffle = random.Random(seed)
    while True:
        rows = sorted(islice(source, 16 * size), key=len)
        starts = list(range(0, len(rows), size))
        shuffle.shuffle(starts)
        for start in starts:
            chosen = rows[start : start + size]
            yield torch.tensor([row + [PAD] * (len(chosen[-1]) - len(row)) for row in chosen])


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token. Padding does not count."""
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)


def small_llama(args: Any, tokenizer: PreTrainedTokenizerFast, max_length: int) -> LlamaForCausalLM:
    """A Llama of the given size, with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).train()


def main() -> None:
    args = options(__doc__ or "", "tiny_llama", steps=2500, batch_size=48, layers=4, hidden=96, intermediate=256)
    tokenizer = build_tokenizer()
    model = small_llama(args, tokenizer, MAX_LENGTH)
    pretrain(model, tokenizer, batches(documents(args.seed), args.batch_size, args.seed), loss_of, args)


if __name__ == "__main__":
    main()
