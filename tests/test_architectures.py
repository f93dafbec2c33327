"""Every architecture that is named, small and with random weights, from a folder through a whole run.

Search, fine-tuning, export, and the adapter loaded again by us and by plain PEFT; each with a head of its kind.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tokenizers
import torch
import transformers
from conftest import batch_of
from small import small_task
from tokenizers import decoders, pre_tokenizers, processors, trainers
from torch import nn

from diffora import compatibility, models
from diffora.core.dam import adapter_parameters
from diffora.core.grid import find_grid
from diffora.core.lowrank import attach, lowrank_layers
from diffora.errors import UserError
from diffora.experiment import run
from diffora.export import load_adapter
from diffora.tasks.base import get_task
from diffora.training.search import SearchModule, SearchSettings

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
    "electra": BERT | {"embedding_size": 8},
    "distilbert": {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": PAD},
    "modernbert": BERT | {"cls_token_id": BOS, "sep_token_id": EOS},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": BOS, "eos_token_id": EOS},
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
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name] | changes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 leaves attention all but uniform
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return model


def tokenizer_for(name: str) -> Any:
    """Bytes, with a few merges, and the frame of special tokens that the family puts around texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    words = "the gardener the teacher a farmer in the market told somebody who did what to whom was not seen by every"
    tokenizer.train_from_iterator([words, words.title()], trainer)
    frame = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}
    if name == "t5":
        frame = {"single": "$A </s>", "pair": "$A </s> $B </s>"}
    if name not in ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text"):
        specials = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(**frame, special_tokens=specials)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name != "gpt2":  # which has no token for padding
        tokens["pad_token"] = "<pad>"
    if frame["single"].startswith("<s>") and tokenizer.post_processor is not None:
        tokens |= {"cls_token": "<s>", "sep_token": "</s>"}
    types = ["token_type_ids"] if name in ("bert", "electra") else []
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=190,
        model_input_names=["input_ids", *types, "attention_mask"],
        **tokens,
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[..., Path]:
    """Makes the folder of a pretrained model as others would find it."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str = "AutoModel") -> Path:
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny {name}"
            random_model(name, kind).save_pretrained(folder)
            if name == "vit":
                transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
            else:
                tokenizer_for(name).save_pretrained(folder)
            made[name, kind] = folder
        return made[name, kind]

    return make


@pytest.fixture
def questions(tmp_path) -> Path:
    folder = tmp_path / "questions"
    folder.mkdir()
    for split, size in (("train", 24), ("validation", 8)):
        rows = []
        for i in range(size):
            context = (
                f"In {1900 + i} the farmer told {'a teacher' if i % 2 else 'the gardener'} what was in the market."
            )
            answer = str(1900 + i)
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            rows.append({"id": f"{split}{i}", "context": context, "question": "When was it told?", "answers": answers})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SIZES = {
    "paraphrase": ["task.train_rows=32", "task.validation_rows=16", "task.max_length=64"],
    "squad": ["task.max_length=64", "task.doc_stride=8", "task.max_question_length=16"],
    "digits": ["task.max_train_rows=32", "task.validation_rows=16"],
    "dialogue": ["task.train_rows=32", "task.validation_rows=8"],
}
RUNS = [
    ("deberta-v2", "paraphrase", 6),
    ("deberta-v2", "squad", 6),
    ("roberta", "squad", 6),
    ("bert", "paraphrase", 6),
    ("electra", "paraphrase", 6),
    ("distilbert", "paraphrase", 6),
    ("modernbert", "paraphrase", 4),
    ("gpt2", "paraphrase", 4),
    ("gpt2", "squad", 4),
    ("vit", "digits", 6),
    ("llama", "dialogue", 7),
    ("qwen2", "dialogue", 7),
    ("qwen3", "dialogue", 7),
    ("mistral", "dialogue", 7),
    ("gemma", "dialogue", 7),
    ("gemma3_text", "dialogue", 7),
    ("t5 encoder", "paraphrase", 6),
    ("t5 decoder", "squad", 10),
]


@pytest.mark.parametrize(("name", "task_name", "n_types"), RUNS, ids=lambda value: str(value))
def test_searched_tuned_exported_and_loaded_again(name, task_name, n_types, cfg, folder_of, questions, tmp_path):
    torch.set_num_threads(1)
    family, _, stack = name.partition(" ")
    folder = folder_of(family, "AutoModelForCausalLM" if task_name == "dialogue" else "AutoModel")
    composed = cfg(
        "method=diffora", f"task={task_name}", "model=hf", f"model.path='{folder}'", "trainer=cpu", "logger=[csv]",
        *SIZES[task_name], *([f"task.path={questions}"] if task_name == "squad" else []),
        *([f"model.layer={stack}.block.*"] if stack else []),
        "search.epochs=1", "search.batch_size=4", "search.gamma_lr=0.1", "finetune.batch_size=8",
        "finetune.epochs=1", "finetune.lr=0.05", "finetune.warmup_steps=0", "finetune.early_stop=null",
    )  # fmt: skip
    result = run(composed, tmp_path / "run")
    model, selection, record = result.model.eval(), result.selection, result.record
    assert record["model"] == f"tiny-{family}" and record["status"] == "completed"

    # the search told the modules apart, and what it chose was trained
    assert [len(row) for row in selection.modules] == [n_types] * 2
    assert [len(row) for row in selection.selected] == [n_types // 2] * 2
    assert all(max(row) - min(row) > 1e-3 for row in selection.gamma_bar)
    layers = dict(lowrank_layers(model))
    assert layers.keys() == {name for row in selection.modules for name in row}
    assert min(layer.delta().norm().item() for layer in layers.values()) > 1e-3
    task = get_task(composed.task)
    grid = find_grid(models.load_model(composed.model, task), composed.model.layer)
    recipe = composed.task.recipe
    assert record["params"]["adapter"] == adapter_parameters(
        grid.shapes, selection.mask(), recipe.rank, recipe.shared_rank
    )
    assert (record["params"]["head"] > 0) == task.trains_head

    # what is on disk is the model in memory
    processor = task.processor(composed.model)
    rows = task.encode(task.load().validation["validation"], processor, training=False)
    inputs = task.inputs(task.collate(processor, training=False)(rows[[0, 1, 2, 3]]))

    def logits(network: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output = network.eval()(**inputs)
        return [output[key] for key in ("logits", "start_logits", "end_logits") if key in output]

    expected = logits(model)
    ours = models.load_model(composed.model, task)
    arguments = task.head() | compatibility.match_processor(ours, processor)
    load_adapter(ours, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    from peft import PeftModel

    base = getattr(transformers, task.model_class).from_pretrained(folder, dtype=torch.float32, **arguments)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)

    # folded into the weights it is the same model, without the adapters another
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for layer in layers.values():
        layer.unmerge()
        nn.init.zeros_(layer.lora_bt)
    assert max((a - b).abs().max().item() for a, b in zip(logits(model), expected, strict=True)) > 1e-3


def test_the_run_of_a_model_with_two_stacks_ends_with_the_choice(cfg, folder_of, tmp_path):
    composed = cfg("task=paraphrase", "model=hf", f"model.path='{folder_of('t5')}'", "dry_run=true")
    with pytest.raises(UserError) as error:
        run(composed, tmp_path)
    choices = [line.split("'")[1] for line in str(error.value).splitlines()[1:]]
    assert choices == ["model.layer=encoder.block.*", "model.layer=decoder.block.*"]
    assert not list(tmp_path.iterdir())


# --- heads ---

HEADS = [
    ("deberta-v2", "AutoModelForSequenceClassification", ["pooler", "classifier"]),
    ("roberta", "AutoModelForSequenceClassification", ["classifier"]),
    ("bert", "AutoModelForSequenceClassification", ["classifier"]),
    ("electra", "AutoModelForSequenceClassification", ["classifier"]),
    ("distilbert", "AutoModelForSequenceClassification", ["pre_classifier", "classifier"]),
    ("modernbert", "AutoModelForSequenceClassification", ["head", "classifier"]),
    ("gpt2", "AutoModelForSequenceClassification", ["score"]),
    ("llama", "AutoModelForSequenceClassification", ["score"]),
    ("t5", "AutoModelForSequenceClassification", ["classification_head"]),
    ("bert", "AutoModelForQuestionAnswering", ["qa_outputs"]),
    ("gpt2", "AutoModelForQuestionAnswering", ["qa_outputs"]),
    ("llama", "AutoModelForQuestionAnswering", ["qa_outputs"]),
    ("t5", "AutoModelForQuestionAnswering", ["qa_outputs"]),
    ("vit", "AutoModelForImageClassification", ["classifier"]),
]


@pytest.mark.parametrize(("name", "kind", "expected"), HEADS)
def test_the_head_is_what_the_task_adds(name, kind, expected):
    model = random_model(name, kind)
    assert models.head_modules(model) == expected
    bare = sum(p.numel() for p in random_model(name).parameters())
    assert models.backbone_parameters(model) in (bare, bare - 16 * 17)  # with or without the bare model's pooler


def test_a_language_model_has_no_head_to_train():
    model = random_model("llama", "AutoModelForCausalLM")
    model.trains_head = False
    assert models.head_modules(models.freeze_backbone(model)) == []
    assert not any(p.requires_grad for p in model.parameters())


# --- shipped configurations ---


@pytest.mark.parametrize(
    ("model", "task", "backbone", "adapter"),
    [  # parameters as the hub's pages and papers count them; LoRA with r = 8 on every module of a layer
        ("gpt2", "mrpc", 124_439_808, 12 * 8 * (768 + 2304 + 768 + 768 + 2 * (768 + 3072))),
        ("bert_base", "mrpc", 109_482_240, 12 * 8 * (4 * 1536 + 2 * 3840)),
        ("distilbert_base", "mrpc", 66_362_880, 6 * 8 * (4 * 1536 + 2 * 3840)),
        ("t5_base", "mrpc", 222_903_552, 12 * 8 * (4 * 1536 + 2 * 3840)),
    ],
)
def test_the_true_sizes(model, task, backbone, adapter, cfg, tmp_path):
    params = run(cfg("method=lora", "rank=8", f"model={model}", f"task={task}", "dry_run=true"), tmp_path).record[
        "params"
    ]
    assert (params["backbone"], params["adapter"]) == (backbone, adapter)


@pytest.mark.parametrize("model", ["gpt2", "bert_base", "distilbert_base", "t5_base"])
def test_a_shipped_grid_is_the_one_that_would_be_found(model, cfg):
    composed = cfg(f"model={model}")
    net = models.meta_model(composed.model, get_task(composed.task))
    given = find_grid(net, composed.model.layer, composed.model.candidates, composed.model.roles)
    assert find_grid(net, composed.model.layer) == given


# --- GPT-2's transposed layers ---


def test_the_second_order_gradient_of_gamma_against_finite_differences():
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = random_model("gpt2", "AutoModelForSequenceClassification", pad_token_id=PAD, **off)
    models.freeze_backbone(model)
    grid = find_grid(model)
    layers = attach(model, grid.names, torch.ones(2, 4, dtype=torch.bool), 2, None, alpha=4)
    for row in layers:
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.3)
    lr = 0.3
    settings = SearchSettings(lr=lr, gamma_lr=0.01, order=2, weight_decay=0.0, clip=None, accumulate=1)
    module = SearchModule(model, layers, grid.types, small_task(), settings, seed=0).double()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    train, valid = batch_of(4, seed=1), batch_of(4, seed=2)
    _, (exact,) = module._unrolled_gradient(valid, train)

    def stepped() -> float:
        """The validation loss after one plain step on the training loss."""
        keep = [p.detach().clone() for p in module.weights]
        grads = torch.autograd.grad(module._loss(train, module.gamma.detach()), module.weights)
        with torch.no_grad():
            for parameter, grad in zip(module.weights, grads, strict=True):
                parameter -= lr * grad
            loss = module._loss(valid, module.gamma).item()
            for parameter, value in zip(module.weights, keep, strict=True):
                parameter.copy_(value)
        return loss

    flat, eps = module.gamma.data.view(-1), 1e-5
    for i in range(len(flat)):
        flat[i] = eps
        up = stepped()
        flat[i] = -eps
        difference = (up - stepped()) / (2 * eps)
        flat[i] = 0.0
        assert exact.view(-1)[i].item() == pytest.approx(difference, rel=1e-4, abs=1e-8)
    assert exact.abs().max() > 1e-3
