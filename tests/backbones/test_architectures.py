"""Every named architecture, small and with random weights, is loaded from a folder and taken through a whole run.

The run has search, fine-tuning and export; then we and plain PEFT load the adapter. Each model has a suitable head.
"""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from conftest import batch_of
from families import PAD, VOCAB, random_model, save_family, tokenizer_for
from small import small_task
from torch import nn

from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.backbones.compatibility import match_processor
from diffora.backbones.load import load_backbone
from diffora.backbones.meta import meta_backbone
from diffora.backbones.processors import load_tokenizer
from diffora.core.attach import attach
from diffora.core.counts import adapter_parameters
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.loop.predict import predict
from diffora.run.experiment import run
from diffora.scoring.bilevel import SearchModule
from diffora.settings.read import model_of
from diffora.settings.sections import Model, Search
from diffora.tasks.base import Split, get_task


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[..., Path]:
    """Makes a folder of a pretrained model, like those on the hub."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str = "AutoModel") -> Path:
        if (name, kind) not in made:
            made[name, kind] = save_family(tmp_path_factory.mktemp("models") / f"tiny {name}", name, kind)
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
            context += " And so it was." * (i % 3)
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

    # the search gave the modules different scores, and the selected ones were trained
    assert [len(row) for row in selection.modules] == [n_types] * 2
    assert [len(row) for row in selection.selected] == [n_types // 2] * 2
    assert all(max(row) - min(row) > 1e-3 for row in selection.gamma_bar)
    layers = dict(lowrank_layers(model))
    assert layers.keys() == {name for row in selection.modules for name in row}
    assert min(layer.delta().norm().item() for layer in layers.values()) > 1e-3
    task = get_task(composed.task)
    grid = find_grid(load_backbone(model_of(composed.model), task.model_request()).model, composed.model.layer)
    recipe = composed.task.recipe
    assert record["params"]["adapter"] == adapter_parameters(
        grid.shapes, selection.mask(), recipe.rank, recipe.shared_rank
    )
    assert (record["params"]["head"] > 0) == task.trains_head

    # the model from disk gives the outputs of the model in memory
    processor = task.processor(model_of(composed.model))
    rows = task.encode(task.load().validation["validation"], processor, training=False)
    inputs = task.inputs(task.collate(processor, training=False)(rows[[0, 1, 2, 3]]))

    def logits(network: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output = network.eval()(**inputs)
        return [output[key] for key in ("logits", "start_logits", "end_logits") if key in output]

    expected = logits(model)
    ours = load_backbone(model_of(composed.model), task.model_request(), processor)
    load_adapter(ours, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(ours.model), expected, rtol=1e-4, atol=1e-5)
    from peft import PeftModel

    base = getattr(transformers, task.model_class).from_pretrained(folder, dtype=torch.float32, **ours.arguments)
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


# --- batches ---

DECODERS = ["gpt2", "opt", "bloom", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text"]
ENCODERS = ["deberta-v2", "roberta", "bert", "mpnet", "albert", "electra", "distilbert", "modernbert", "t5", "bart"]
BATCHED = [
    *((name, "paraphrase") for name in ENCODERS + DECODERS),
    *((name, "squad") for name in ("deberta-v2", "roberta", "bert", "mpnet", "gpt2", "llama", "t5", "bart")),
    *((name, "dialogue") for name in DECODERS),
    ("vit", "digits"),
]


@pytest.mark.parametrize(("name", "task_name"), BATCHED)
def test_predictions_depend_neither_on_the_batch_nor_on_the_padding_side(name, task_name, cfg, questions, tmp_path):
    """B3: with adapters that are not zero, for tokenizers that pad on either side."""
    folder = save_family(tmp_path / name, name, "AutoModelForCausalLM" if task_name == "dialogue" else "AutoModel")
    composed = cfg(
        f"task={task_name}", "model=hf", f"model.path={folder}", "trainer=cpu", *SIZES[task_name],
        *([f"task.path={questions}"] if task_name == "squad" else []),
        *(["task.max_length=150"] if task_name == "paraphrase" else []),
    )  # fmt: skip
    task = get_task(composed.task)
    rows = task.load().validation["validation"].select(range(8))
    torch.manual_seed(0)
    backbone = load_backbone(model_of(composed.model), task.model_request())
    model = backbone.model
    stack = {"t5": "encoder.block.*", "bart": "encoder.layers.*"}.get(name)
    grid = find_grid(model, stack)
    for row in attach(model, grid.names, torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool), 2, None, alpha=4):
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.3)
    for part in backbone.head:
        for parameter in model.get_submodule(part).parameters():
            nn.init.normal_(parameter, std=0.25)
    found = []
    for side in ("right", "left") if name != "vit" else ("",):
        if side:
            settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": side}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        processor = task.processor(model_of(composed.model))
        match_processor(model, processor)
        split = Split(rows, task.encode(rows, processor, training=False))
        collate = task.collate(processor, training=False)
        found += [predict(model, task, split, collate, size, composed.trainer) for size in (1, 3, 8)]
    assert len(set(split.encoded["length"])) > 1 or name == "vit"
    keys = [key for key in ("logits", "loss", "span_score", "null_score") if key in found[0]]
    for outputs in found:
        for key in keys:
            torch.testing.assert_close(outputs[key], found[0][key], rtol=1e-4, atol=1e-5)
    assert found[0][keys[0]].std(dim=0).max() > 1e-3  # which tells the rows apart


@pytest.mark.parametrize(("kind", "changes"), [
    ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),  # its head reads the last position
    ("fnet", {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}),  # which has no attention mask
])  # fmt: skip
def test_a_model_whose_output_depends_on_padding_is_refused(kind, changes, tmp_path):
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **changes)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer_for("bert").save_pretrained(tmp_path)
    cfg = Model(name=kind, path=str(tmp_path))
    model, tokenizer = load_backbone(cfg, small_task().model_request()).model, load_tokenizer(cfg)
    with pytest.raises(UserError, match="predictions would depend on the batch"):
        match_processor(model, tokenizer)


def test_a_model_with_two_stacks_is_refused_with_the_choices(cfg, folder_of, tmp_path):
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
    backbone = Backbone.of(random_model(name, kind))
    assert list(backbone.head) == expected
    bare = sum(p.numel() for p in random_model(name).parameters())
    assert backbone.n_parameters in (bare, bare - 16 * 17)  # with or without the bare model's pooler


def test_a_language_model_has_no_head_to_train():
    model = random_model("llama", "AutoModelForCausalLM")
    assert Backbone.of(model).freeze().head == ()
    assert not any(p.requires_grad for p in model.parameters())


# --- shipped configurations ---


@pytest.mark.parametrize(
    ("model", "task", "backbone", "adapter"),
    [  # parameters as the hub's pages and papers count them; LoRA with r = 8 on every module of a layer
        ("gpt2", "mrpc", 124_439_808, 12 * 8 * (768 + 2304 + 768 + 768 + 2 * (768 + 3072))),
        ("bert_base", "mrpc", 109_482_240, 12 * 8 * (4 * 1536 + 2 * 3840)),
        ("distilbert_base", "mrpc", 66_362_880, 6 * 8 * (4 * 1536 + 2 * 3840)),
        ("t5_base", "mrpc", 222_903_552, 12 * 8 * (12 * 1536 + 4 * 3840)),  # both stacks
    ],
)
def test_parameter_counts_of_the_shipped_models(model, task, backbone, adapter, cfg, tmp_path):
    params = run(cfg("method=lora", "rank=8", f"model={model}", f"task={task}", "dry_run=true"), tmp_path).record[
        "params"
    ]
    assert (params["backbone"], params["adapter"]) == (backbone, adapter)


@pytest.mark.parametrize("model", ["gpt2", "bert_base", "distilbert_base", "t5_base", "bart_base"])
def test_a_shipped_grid_is_the_one_that_would_be_found(model, cfg):
    composed = cfg(f"model={model}")
    net = meta_backbone(model_of(composed.model), get_task(composed.task).model_request()).model
    given = find_grid(net, composed.model.layer, composed.model.candidates, composed.model.get("roles"))
    assert find_grid(net, composed.model.layer) == given


# --- GPT-2's transposed layers ---


def test_the_second_order_gradient_of_gamma_against_finite_differences():
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = random_model("gpt2", "AutoModelForSequenceClassification", pad_token_id=PAD, **off)
    Backbone.of(model).freeze()
    grid = find_grid(model)
    layers = attach(model, grid.names, torch.ones(2, 4, dtype=torch.bool), 2, None, alpha=4, freeze=False)
    for row in layers:
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.3)
    lr = 0.3
    settings = Search(epochs=1, batch_size=4, rank=2, lr=lr, order=2, clip=None)
    module = SearchModule(model, layers, grid.types, small_task(), settings, seed=0).double()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    train, valid = batch_of(4, seed=1), batch_of(4, seed=2)
    _, (exact,) = module.unrolled_gradient(valid, train)

    def stepped() -> float:
        """The validation loss after one plain step on the training loss."""
        keep = [p.detach().clone() for p in module.weights]
        grads = torch.autograd.grad(module.batch_loss(train, module.gamma.detach()), module.weights)
        with torch.no_grad():
            for parameter, grad in zip(module.weights, grads, strict=True):
                parameter -= lr * grad
            loss = module.batch_loss(valid, module.gamma).item()
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
