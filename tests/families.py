"""Small models with random weights of every backbone family that is tested, with fitting tokenizers."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from torch import nn

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCAB, PAD, BOS, EOS = 400, 0, 1, 2
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "deberta-v2": BERT
    | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
    | {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
    "roberta": BERT | {"max_position_embeddings": 200, "type_vocab_size": 1},
    "bert": BERT,
    "mpnet": BERT | {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 200},
    "albert": BERT | {"embedding_size": 8},
    "electra": BERT | {"embedding_size": 8},
    "distilbert": {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": PAD},
    "modernbert": BERT | {"cls_token_id": BOS, "sep_token_id": EOS},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": BOS, "eos_token_id": EOS},
    "opt": BERT | {"ffn_dim": 32, "max_position_embeddings": 200, "word_embed_proj_dim": 16},
    "bloom": {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
    "bart": {
        "vocab_size": VOCAB,
        "d_model": 16,
        "max_position_embeddings": 200,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    | {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    | {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": EOS,
    },
    "t5": {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
    | {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD},
    "vit": {key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    | {"image_size": 8, "patch_size": 4},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "gemma3_text": LLAMA | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}


def random_model(name: str, kind: str = "AutoModel", **changes: Any) -> nn.Module:
    """A small model of a family with random weights, made by the transformers class ``kind``."""
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name] | changes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # with the usual 0.02, attention is nearly uniform
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return model


def tokenizer_for(name: str) -> Any:
    """A byte-level tokenizer with a few merges and the special tokens that the family adds to texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [SPECIAL[1], SPECIAL[0], *SPECIAL[2:]] if name == "mpnet" else SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = "the gardener the teacher a farmer in the market told somebody who did what to whom was not seen by every"
    tokenizer.train_from_iterator([words, words.title()], trainer)
    frame = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}
    if name == "t5":
        frame = {"single": "$A </s>", "pair": "$A </s> $B </s>"}
    if name not in ("gpt2", "bloom", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text"):
        specials = [(token, special.index(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(**frame, special_tokens=specials)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name != "gpt2":  # GPT-2 has no padding token
        tokens["pad_token"] = "<pad>"
    if frame["single"].startswith("<s>") and tokenizer.post_processor is not None:
        tokens |= {"cls_token": "<s>", "sep_token": "</s>"}
    types = ["token_type_ids"] if name in ("bert", "electra", "albert") else []
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=190,
        model_input_names=["input_ids", *types, "attention_mask"],
        **tokens,
    )


def save_family(folder: Path, name: str, kind: str = "AutoModel", **changes: Any) -> Path:
    """Save a model and its tokenizer or image processor in a folder, like a pretrained model."""
    random_model(name, kind, **changes).save_pretrained(folder)
    if name == "vit":
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        tokenizer_for(name).save_pretrained(folder)
    return folder
