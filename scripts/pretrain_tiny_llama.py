"""Make the `tiny_llama` backbone: a small Llama, pretrained on generated text on one CPU core.

    python scripts/pretrain_tiny_llama.py            # into src/diffora/assets/tiny_llama, which the package ships

The text is newly generated for each step. There are three kinds: stories of
`diffora.tasks.embedded.paraphrase.corpus`; lists of random words of the vocabulary, each list twice; and chats in which
the assistant repeats the user's sentence in other words. There is no conversation, request or question of the
`dialogue` task.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

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


def batches(size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless padded batches (size, length). Documents of similar length are in one batch."""
    shuffle = random.Random(seed)
    source = documents(seed)
    while True:
        rows = sorted(islice(source, 16 * size), key=len)
        starts = list(range(0, len(rows), size))
        shuffle.shuffle(starts)
        for start in starts:
            chosen = rows[start : start + size]
            yield torch.tensor([row + [PAD] * (len(chosen[-1]) - len(row)) for row in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "src/diffora/assets/tiny_llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / args.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start, mean = time.perf_counter(), math.log(len(tokenizer))
    for step, ids in enumerate(islice(batches(args.batch_size, args.seed), args.steps), 1):
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * 0.02
        if step % args.log_every == 0 or step == args.steps:
            spent = time.perf_counter() - start
            left = spent / step * (args.steps - step)
            print(f"{step}/{args.steps}  loss {mean:.3f}  {spent:.0f} s spent, {left:.0f} s left", flush=True)
    model.half().save_pretrained(args.output)  # half the size; it is loaded as float32
    (args.output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"loss {mean:.3f}, {time.perf_counter() - start:.0f} s, {size / 2**20:.2f} MiB in {args.output}")


if __name__ == "__main__":
    main()
