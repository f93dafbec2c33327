"""A model folder is complete, or refused with one message that names what is wrong. No code in it is run."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import save_family
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from small import small_task
from transformers import AutoModel, NystromformerConfig, OpenAIGPTConfig

from diffora.backbones.backbone import Backbone
from diffora.backbones.compatibility import longest_input, match_processor
from diffora.backbones.load import load_backbone
from diffora.backbones.meta import meta_backbone
from diffora.backbones.processors import load_image_processor, load_processor, load_tokenizer
from diffora.errors import UserError
from diffora.hub import resolve
from diffora.loop.predict import predict
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.settings.sections import Model
from diffora.tasks.base import Split, get_task

CLASSIFIER = "AutoModelForSequenceClassification"
NLI = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
NLI["label2id"] = {name: i for i, name in NLI["id2label"].items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Path]:
    """Makes a family's folder once."""
    done: dict[str, Path] = {}

    def make(name: str, kind: str = "AutoModel", **changes: Any) -> Path:
        key = f"{name}-{kind}-{changes}"
        if key not in done:
            done[key] = save_family(tmp_path_factory.mktemp("made") / name, name, kind, **changes)
        return done[key]

    return make


@pytest.fixture
def copy(made, tmp_path) -> Callable[..., Path]:
    """Makes a copy that may be damaged."""

    def make(name: str = "bert", kind: str = "AutoModel", **changes: Any) -> Path:
        return Path(shutil.copytree(made(name, kind, **changes), tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))

    return make


def section(folder: Path, **more: Any) -> Model:
    return Model(name="x", path=str(folder), **more)


def loaded(folder: Path, task: Any = None, **more: Any) -> Backbone:
    return load_backbone(section(folder, **more), (task or small_task()).model_request())


def refused(folder: Path, *words: str, task: Any = None) -> str:
    with pytest.raises(UserError) as error:
        loaded(folder, task)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def edit(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


# --- weights ---


def test_renamed_weights_are_refused(copy):
    """B1"""
    folder = copy()
    change_weights(folder, lambda tensors: {f"net.{name}": value for name, value in tensors.items()})
    refused(folder, "lacks 37 of the 37 weights", "embeddings.LayerNorm.bias", "(and 34 more)")


def test_a_missing_layer_is_refused(copy):
    """B1"""
    folder = copy()
    change_weights(folder, lambda tensors: {n: v for n, v in tensors.items() if ".layer.1." not in n})
    refused(folder, "lacks 16 of the", "bert.encoder.layer.1.attention.output.LayerNorm.bias")


def test_one_missing_weight_is_refused(copy):
    folder = copy("llama")
    change_weights(folder, lambda tensors: {n: v for n, v in tensors.items() if n != "layers.1.mlp.up_proj.weight"})
    refused(folder, "lacks 1 of the", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"num_hidden_layers": 3}, ("lacks 16 of the", "encoder.layer.2.")),
        ({"num_hidden_layers": 1}, ("has 16 weights of layers", "encoder.layer.1.")),
        ({"num_hidden_layers": 0}, ("has 32 weights of layers", "encoder.layer.0.")),
        ({"hidden_size": 32}, ("other shapes", "is [16] instead of [32]")),
        ({"vocab_size": 300}, ("other shapes", "word_embeddings.weight is [400, 16] instead of [300, 16]")),
        ({"intermediate_size": 64}, ("other shapes", "intermediate.dense.bias is [32] instead of [64]")),
        ({"max_position_embeddings": 1024}, ("other shapes", "position_embeddings.weight")),
        ({"model_type": "llama"}, ("lacks",)),
    ],
    ids=str,
)
def test_a_config_of_another_size_is_refused(copy, entries, words):
    """B1"""
    folder = copy()
    edit(folder / "config.json", **entries)
    refused(folder, *words)


def test_a_shape_for_dry_runs_does_not_replace_the_checkpoints(cfg, caplog):
    """Similar to B19: if the model's files exist, `model.config` is not used."""
    task = cfg("experiment=quickstart", "+model.config.num_hidden_layers=2", "+model.config.hidden_size=128")
    model = load_backbone(model_of(task.model), get_task(task.task).model_request()).model
    assert model.config.num_hidden_layers == 4
    assert "model.config.num_hidden_layers=2 ignored" in caplog.text and "hidden_size" not in caplog.text


def test_other_parts_of_a_checkpoint_than_the_backbone_are_ignored(copy):
    """A masked-language-model head, and buffers of older versions."""
    folder = copy("bert", "AutoModelForMaskedLM")
    old = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    change_weights(folder, lambda tensors: tensors | old)
    assert loaded(folder).head


def test_unused_weights_in_the_layers_give_a_warning(copy, caplog):
    """Qwen2 has biases where Llama has none."""
    folder = copy("qwen2")
    edit(folder / "config.json", model_type="llama")
    with caplog.at_level(logging.WARNING, logger="diffora"):
        loaded(folder)
    [line] = [record.message for record in caplog.records if "does not use" in record.message]
    assert "has 6 weights in its layers" in line and "layers.0.self_attn.k_proj.bias" in line


def test_tied_weights_are_not_missing_and_untied_ones_are(copy, cfg):
    task = get_task(cfg("task=dialogue").task)
    folder = copy("llama", "AutoModelForCausalLM", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded(folder, task)
    edit(folder / "config.json", tie_word_embeddings=False)
    refused(folder, "lacks 1 of the", "lm_head.weight", task=task)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copy, value):
    folder = copy()

    def spoil(tensors):
        tensors["encoder.layer.1.output.dense.weight"][3, 5] = value
        return tensors

    change_weights(folder, spoil)
    refused(folder, "not finite", "bert.encoder.layer.1.output.dense.weight")


@pytest.mark.parametrize("part", ["encoder.layer.0.", "embeddings.word_embeddings."])
def test_weights_that_are_all_zero_are_refused(copy, part):
    folder = copy()
    change_weights(folder, lambda tensors: {n: v * 0 if n.startswith(part) else v for n, v in tensors.items()})
    refused(folder, "all zero", f"bert.{part}"[:-1])


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_packed_weights_without_scales_are_refused(copy, kind):
    """transformers would use the packed numbers as they are, without their scales."""
    folder = copy()
    name = "encoder.layer.1.output.dense.weight"
    change_weights(folder, lambda tensors: tensors | {name: tensors[name].to(kind)})
    refused(folder, "not floating-point numbers", "no quantization_config", name)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_accepted(copy, kind):
    folder = copy()
    change_weights(folder, lambda tensors: {name: value.to(kind) for name, value in tensors.items()})
    assert loaded(folder).model.dtype == torch.float32


def test_a_file_with_two_models_is_refused(copy):
    """transformers would silently load one of the two."""
    folder = copy()
    change_weights(folder, lambda tensors: tensors | {f"bert.{name}": value * 2 for name, value in tensors.items()})
    refused(folder, "two weights for each of 32 places", "bert.encoder.layer.0.attention.output.LayerNorm.bias and enc")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must be a rate in [0, 1)"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob=NaN is not a number"),
        ({"layer_norm_eps": 1e30}, "layer_norm_eps=1e+30 must be a number from 0 to 0.1"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must be a number of layers of at most 10,000"),
        ({"text_config": {"rope_theta": float("nan")}}, "text_config.rope_theta=NaN is not a number"),
        ({"quantization_config": {"quant_method": "mine"}}, "quant_method='mine', which transformers does not know"),
        ({"quantization_config": 4}, "quant_method=4, which transformers does not know"),
    ],
    ids=str,
)
def test_impossible_entries_of_a_config_are_refused(copy, entries, words):
    folder = copy()
    edit(folder / "config.json", **entries)
    refused(folder, words)


def test_a_config_that_asks_for_tuples_changes_nothing(copy):
    """We read the outputs of a model by name."""
    folder = copy()
    edit(folder / "config.json", return_dict=False)
    assert loaded(folder).model.config.return_dict is True


# --- files ---


@pytest.mark.parametrize("size", [4, 300, -100])
def test_a_truncated_file_of_weights_is_named(copy, size):
    file = (folder := copy()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, str(file), "damaged or incomplete")


def test_weights_of_an_older_format_that_are_damaged_are_refused(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights: model.safetensors is missing")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    refused(folder, "cannot be read")


def test_an_adapter_is_not_a_model(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is an adapter, not a model")


def test_missing_shards_are_named(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:20], "c.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    where = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    loaded(folder)
    (folder / "b.safetensors").unlink()
    (folder / "c.safetensors").write_bytes(b"")
    message = refused(folder, "lacks b.safetensors", index.name, "c.safetensors is damaged")
    assert message.count("\n") == 1
    for content in ("[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}'):
        index.write_text(content)
        refused(folder, "has no weight_map")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "is not JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 5000, "nested too deeply"),
        (b"{}", "cannot be read"),
        (b'{"model_type": 5}', "cannot be read"),
        (b'{"model_type": "no-such-model"}', "cannot be read"),
    ],
)
def test_a_broken_config_is_refused_before_anything_is_loaded(cfg, copy, content, words):
    folder = copy()
    (folder / "config.json").write_bytes(content)
    refused(folder, words)
    if words != "cannot be read":
        with pytest.raises(UserError, match=words):
            check(cfg("task=paraphrase", "model=hf", f"model.path={folder}"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 5}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_is_damaged_is_refused(copy, file, content):
    folder = copy()
    (folder / file).write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(section(folder))


# --- heads ---


def test_a_checkpoint_with_another_head_gets_a_new_one(copy, caplog):
    """C: the checkpoint has three labels and the task has two."""
    folder = copy("bert", CLASSIFIER, **NLI)
    with caplog.at_level(logging.INFO, logger="diffora"):
        backbone = loaded(folder)
    assert backbone.model.classifier.out_features == 2 and backbone.head == ("classifier",)
    [line] = [record.message for record in caplog.records if "head" in record.message]
    assert "contradiction, neutral, entailment" in line and "mrpc has a new one" in line
    assert match_processor(backbone.model, load_tokenizer(section(folder))) == {}
    assert backbone.arguments == small_task().head() | {"ignore_mismatched_sizes": True}


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "modernbert", "gpt2", "t5"])
@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_is_drawn_as_if_the_checkpoint_had_none(made, tmp_path, family, labels):
    """B5: for any number of labels in the checkpoint."""
    with_head = made(family, CLASSIFIER, num_labels=labels)
    torch.manual_seed(3)
    backbone = loaded(with_head)
    found = backbone.model
    after = torch.rand(1)
    names = [f"{name}." for name in backbone.head]
    bare = Path(shutil.copytree(with_head, tmp_path / "bare"))
    change_weights(bare, lambda t: {name: value for name, value in t.items() if not name.startswith(tuple(names))})
    torch.manual_seed(3)
    expected = loaded(bare).model
    assert after.equal(torch.rand(1))
    for (name, value), (_, other) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert value.equal(other), name
    kept = load_file(with_head / "model.safetensors")
    drawn = [n for n, p in found.named_parameters() if n.startswith(tuple(names)) and p.ndim == 2]
    assert drawn and not any(kept[name].shape == found.get_parameter(name).shape
                             and kept[name].equal(found.get_parameter(name)) for name in drawn)  # fmt: skip


@pytest.mark.parametrize("name", ["mnli", "mrpc", "stsb"])
def test_class_names_come_from_the_task(copy, name):
    """B5: a checkpoint with the same number of classes in another order, and another kind of problem."""
    folder = copy("bert", CLASSIFIER, **NLI, problem_type="multi_label_classification")
    config = loaded(folder, small_task(name)).model.config
    names = {
        "mnli": ["entailment", "neutral", "contradiction"],
        "mrpc": ["not_equivalent", "equivalent"],
        "stsb": ["LABEL_0"],
    }[name]
    assert list(config.id2label.values()) == names and config.label2id == {n: i for i, n in enumerate(names)}
    assert config.problem_type == ("regression" if name == "stsb" else None)


def test_full_fine_tuning_exports_names_and_a_tokenizer(cfg, copy, quick, tmp_path):
    """B2, B5: transformers' pipeline can use the exported model, and it scores as in training."""
    from diffora.run.evaluate import evaluate, read_request

    torch.set_num_threads(1)
    folder = copy("bert", CLASSIFIER, **NLI)
    overrides = [o for o in quick if not o.startswith("search.") and "dropout" not in o]
    composed = cfg(*overrides, "method=full_ft", "model=hf", f"model.path={folder}", "finetune.epochs=1")
    done = run(composed, tmp_path / "run")
    assert done.record["classes"] == ["not_equivalent", "equivalent"]
    written = tmp_path / "run" / "model"
    pipeline = transformers.pipeline("text-classification", model=str(written), device="cpu")
    assert pipeline("the cook left")[0]["label"] in done.record["classes"]
    assert len(pipeline.tokenizer) == len(transformers.AutoTokenizer.from_pretrained(folder))
    shutil.rmtree(folder)  # the backbone is no longer needed
    found = evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]))
    assert found["validation"]["loss"] == pytest.approx(done.metrics["validation/loss"], abs=2e-6)
    change_weights(written, lambda tensors: {n: v for n, v in tensors.items() if not n.startswith("classifier")})
    with pytest.raises(UserError, match=r"model/model\.safetensors is not as the run left it"):
        evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'changed'}"]))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"has no classifier.*another kind of task"):
        evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"]))


def test_a_whole_vision_model_has_its_image_processor(cfg, tmp_path):
    torch.set_num_threads(1)
    sizes = ["task.max_train_rows=32", "task.validation_rows=16", "finetune.epochs=1", "finetune.batch_size=16"]
    run(cfg("method=full_ft", "task=digits", "model=tiny_vit", "logger=[csv]", "trainer=cpu", *sizes), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    theirs = transformers.AutoImageProcessor.from_pretrained(resolve("embedded:tiny_vit")[0])
    assert processor.to_dict() == theirs.to_dict()


# --- tokenizers ---


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "gpt2", "t5", "llama", "gemma", "modernbert"])
@pytest.mark.parametrize("kept", [("config.json",), ("config.json", "tokenizer_config.json")])
def test_a_folder_without_a_tokenizer_is_refused(copy, family, kept):
    """B2: transformers would make a tokenizer of a few special tokens."""
    folder = copy(family)
    for file in folder.iterdir():
        if file.name not in (*kept, "model.safetensors"):
            file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: tokenizer\.json.* is missing.*save_pretrained"):
        load_tokenizer(section(folder))


def test_half_a_vocabulary_is_refused(copy):
    """Without its merges, GPT-2's tokenizer would know single characters only."""
    folder = copy("gpt2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    with pytest.raises(UserError, match=r"has no tokenizer: tokenizer\.json.* is missing"):
        load_tokenizer(section(folder))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, tokenizer["model"]["merges"])))
    assert len(load_tokenizer(section(folder)).tokenize("the gardener")) < 12


def test_a_folder_without_an_image_processor_is_refused(copy):
    folder = copy("vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no image processor: preprocessor_config\.json is missing"):
        load_image_processor(section(folder))


@pytest.mark.parametrize(
    ("family", "kind", "advice"),
    [
        ("vit", "tokenizer", "is a vit model, which reads images, and the task has texts: choose a model of texts"),
        ("bert", "image_processor", "is a bert model, which reads texts, and the task has images: choose a model of i"),
    ],
)
def test_a_model_of_images_for_texts_is_refused_and_the_other_way_round(copy, family, kind, advice):
    """Even a complete folder: it is not the tokenizer that is missing."""
    with pytest.raises(UserError, match=advice):
        load_processor(section(copy(family)), kind)


def test_an_image_processor_of_another_size_is_refused(copy):
    folder = copy("vit")
    edit(folder / "preprocessor_config.json", size={"height": 16, "width": 16})
    task = get_task(OmegaConf.load(Path(__file__).parents[2] / "conf/task/digits.yaml"))
    model = loaded(folder, task).model
    with pytest.raises(UserError, match="does not take images of three channels and 16 x 16 pixels"):
        match_processor(model, task.processor(section(folder)))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"image_std": [0.5, 0, 0.5]}, r"image_std=\[0\.5, 0, 0\.5\] must hold numbers"),
        ({"image_mean": [float("nan")] * 3}, r"image_mean=\[nan, nan, nan\] must hold numbers"),
        ({"rescale_factor": float("nan")}, r"rescale_factor=\[nan\] must hold numbers"),
        ({"resample": 99}, "resample=99 must be one of Pillow's"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=true is not supported: images are RGB, not BGR"),
    ],
    ids=str,
)
def test_impossible_settings_of_an_image_processor_are_refused(copy, entries, words):
    folder = copy("vit")
    edit(folder / "preprocessor_config.json", **entries)
    task = get_task(OmegaConf.load(Path(__file__).parents[2] / "conf/task/digits.yaml"))
    with pytest.raises(UserError, match=words):
        task.processor(section(folder))


def matched(folder: Path, task: Any = None) -> Any:
    tokenizer = load_tokenizer(section(folder))
    model = loaded(folder, task).model
    match_processor(model, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_larger_than_the_embedding_is_refused(copy, special):
    """C: the first step with one of the new tokens raised an IndexError."""
    folder = copy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(120)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"has {len(tokenizer)} tokens, its embedding 400: '<new.*resize_token"):
        matched(folder)


def test_a_tokenizer_of_another_model_is_refused(copy):
    folder = copy("bert", vocab_size=30522)
    with pytest.raises(UserError, match="its embedding 30522: not of one model"):
        matched(folder)


def test_a_tokenizer_that_fails_at_its_first_text_is_refused(copy):
    folder = copy("gpt2")
    edit(folder / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(UserError, match="its tokenizer does not work: "):
        matched(folder)


def test_a_config_with_contradictory_entries_is_refused(copy):
    folder = copy("deberta-v2")
    edit(folder / "config.json", pooler_hidden_size=24)
    with pytest.raises(UserError, match=r"cannot be called, as its config\.json describes it"):
        matched(folder)


def test_a_placeholder_for_images_needs_no_embedding(copy):
    """Gemma 3's tokenizer has one, its text-only models do not."""
    folder = copy("gemma3_text", vocab_size=len(transformers.AutoTokenizer.from_pretrained(copy("gemma3_text"))))
    edit(folder / "tokenizer_config.json", image_token="<image>", extra_special_tokens={"image_token": "<image>"})
    model, tokenizer = matched(folder)
    assert len(tokenizer) > model.config.vocab_size


def test_a_padding_token_that_is_not_in_the_vocabulary_is_refused(copy):
    folder = copy("llama", vocab_size=len(transformers.AutoTokenizer.from_pretrained(copy("llama"))))
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    with pytest.raises(UserError, match=r"'\[PAD\]' cannot be read"):
        matched(folder)


def test_a_tokenizer_with_neither_padding_nor_end_token_is_refused(copy):
    """C"""
    folder = copy("llama")
    edit(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        load_tokenizer(section(folder))


def test_roberta_without_its_padding_token_is_refused(copy):
    """RoBERTa counts positions by this token. With another one, the exported model would have other positions."""
    folder = copy("roberta")
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match='counts positions by padding token 0: set "pad_token": "<pad>"'):
        matched(folder)


def test_t5_without_a_padding_token_is_refused(copy):
    folder = copy("t5")
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="set pad_token"):
        matched(folder)


def test_the_padding_token_of_the_configuration_is_the_tokenizers(copy):
    folder = copy("llama", CLASSIFIER)
    edit(folder / "config.json", pad_token_id=9)
    model = loaded(folder).model
    assert match_processor(model, load_tokenizer(section(folder))) == {"pad_token_id": 0}
    assert model.config.pad_token_id == model.config.get_text_config().pad_token_id == 0


def test_predictions_of_the_embedded_llama_without_its_padding_token(copy, cfg, tmp_path):
    """B3"""
    folder = Path(shutil.copytree(resolve("embedded:tiny_llama")[0], tmp_path / "llama"))
    edit(folder / "tokenizer_config.json", pad_token=None)
    task = get_task(cfg("task=paraphrase", "task.train_rows=4", "task.validation_rows=24").task)
    model, tokenizer = matched(folder, task)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = task.load().validation["validation"]
    split = Split(rows, task.encode(rows, tokenizer, training=False))
    collate, trainer = task.collate(tokenizer, training=False), cfg("trainer=cpu").trainer
    alone, together = (predict(model, task, split, collate, size, trainer)["logits"] for size in (1, 24))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    model.config.pad_token_id = 0  # as the file says
    wrong = predict(model, task, split, collate, 24, trainer)["logits"]
    assert (wrong - alone).abs().max() > 1e-2


# --- lengths ---


@pytest.mark.parametrize(
    ("family", "changes", "most"),
    [
        ("bert", {"max_position_embeddings": 60}, 60),
        ("roberta", {"max_position_embeddings": 60}, 59),
        ("distilbert", {"max_position_embeddings": 60}, 60),
        ("gpt2", {"n_positions": 60}, 60),
        ("llama", {"max_position_embeddings": 60}, 60),
        ("modernbert", {"max_position_embeddings": 60}, 60),
        ("opt", {"max_position_embeddings": 60}, 60),
        ("mpnet", {"max_position_embeddings": 60}, 58),
        ("deberta-v2", {"max_position_embeddings": 60}, None),
        ("t5", {}, None),
    ],
)
def test_inputs_longer_than_the_backbone_reads_are_refused(cfg, made, tmp_path, family, changes, most):
    """C: also if the tokenizer has no maximum length; both before any weight is loaded, and after."""
    folder = made(family, **changes)
    composed = [f"model.path={folder}", "model=hf", "task=paraphrase", "method=head_only"]
    if family == "t5":
        composed.append("model.layer=encoder.block.*")
    task = get_task(cfg(*composed, "task.max_length=61").task)
    if most is None:
        assert longest_input(loaded(folder, task).model) is None
        return
    message = f"task.max_length=61 is more than the {most} tokens"
    with pytest.raises(UserError, match=message):
        loaded(folder, task)
    with pytest.raises(UserError, match=message):
        run(cfg(*composed, "task.max_length=61", "dry_run=true"), tmp_path)
    fits = get_task(cfg(*composed, f"task.max_length={most}").task)
    assert longest_input(loaded(folder, fits).model) == most


@pytest.mark.parametrize(
    ("config", "most"),
    [(OpenAIGPTConfig(vocab_size=20, n_positions=12, n_embd=8, n_layer=1, n_head=2), 12),
     (NystromformerConfig(vocab_size=20, max_position_embeddings=12, hidden_size=8, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=8, num_landmarks=3, segment_means_seq_len=12), 12)],
)  # fmt: skip
def test_a_model_reads_as_many_tokens_as_its_table_of_positions_has(config, most):
    model = AutoModel.from_config(config).eval()
    assert longest_input(model) == most
    model(input_ids=torch.ones(1, most, dtype=torch.long))
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.ones(1, most + 1, dtype=torch.long))


def test_images_have_no_length(made):
    task = get_task(OmegaConf.load(Path(__file__).parents[2] / "conf/task/digits.yaml"))
    assert longest_input(loaded(made("vit"), task).model) is None


# --- code ---

EVIL = "import pathlib; pathlib.Path(__file__).with_name('was-run').touch()\n"


def with_code(folder: Path, **entries: Any) -> Path:
    """A model whose config names classes in files beside it. Importing these files leaves a trace."""
    source = EVIL + (
        "from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertForSequenceClassification):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "own.py").write_text(source)
    auto = {"AutoConfig": "own.OwnConfig", CLASSIFIER: "own.OwnModel", "AutoModel": "own.OwnModel"}
    edit(folder / "config.json", **{"auto_map": auto, **entries})
    return folder


@pytest.fixture
def no_questions(monkeypatch, tmp_path):
    """Fails the test if transformers asks a question, or if code that came with a model was run."""
    from transformers import dynamic_module_utils

    def ask(*_: Any) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    assert not list(tmp_path.rglob("was-run"))


def test_code_in_a_model_folder_is_not_run(copy, cfg, no_questions, tmp_path):
    """A4"""
    folder = with_code(copy(), model_type="own")
    refused(folder, "auto_map", "model.trust_remote_code=true")
    with pytest.raises(UserError, match="trust_remote_code=true"):
        run(cfg("task=paraphrase", "model=hf", f"model.path={folder}", "dry_run=true"), tmp_path / "run")
    assert not (tmp_path / "modules").exists()


def test_a_known_architecture_is_loaded_without_the_code_beside_it(copy, no_questions, tmp_path):
    """A4"""
    model = loaded(with_code(copy())).model
    assert type(model) is transformers.BertForSequenceClassification
    assert not (tmp_path / "modules").exists()


def test_the_code_of_a_tokenizer_is_not_run(copy, no_questions, tmp_path):
    folder = with_code(copy(), model_type="own")
    edit(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}, tokenizer_class="Own"
    )
    with pytest.raises(UserError, match=r"auto_map.*model\.trust_remote_code=true"):
        load_tokenizer(section(folder))
    assert not (tmp_path / "modules").exists()


def test_the_code_of_an_image_processor_is_not_run(copy, no_questions, tmp_path):
    folder = with_code(copy("vit"), model_type="own")
    own = {"AutoImageProcessor": "own.OwnProcessor"}
    edit(folder / "preprocessor_config.json", auto_map=own, image_processor_type="OwnProcessor")
    with pytest.raises(UserError, match=r"auto_map.*model\.trust_remote_code=true"):
        load_image_processor(section(folder))
    assert not (tmp_path / "modules").exists()


def test_trusted_code_is_run(copy, monkeypatch, tmp_path):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(copy(), model_type="own")
    backbone = loaded(folder, trust_remote_code=True)
    assert type(backbone.model).__name__ == "OwnModel" and backbone.head[0] == "classifier"
    assert list((tmp_path / "modules").rglob("own.py"))
    meta = meta_backbone(section(folder, trust_remote_code=True), small_task().model_request())
    assert type(meta.model).__name__ == "OwnModel"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["evil/kernel", "flash|evil/kernel@main:run", {"": "evil/kernel"}])
def test_a_config_that_names_code_to_fetch_is_refused(copy, key, value):
    """A4"""
    folder = copy()
    edit(folder / "config.json", **{key: value})
    refused(folder, key, "model.trust_remote_code=true")
    edit(folder / "config.json", **{key: None, "text_config": {key: value}})
    refused(folder, key, "model.trust_remote_code=true")


def test_a_run_folder_cannot_allow_code(cfg, copy, no_questions, tmp_path):
    """Only the command line can allow it, because the folder may come from another person."""
    from diffora.run.evaluate import read_request

    (tmp_path / "run" / "adapter").mkdir(parents=True)
    composed = cfg("task=paraphrase", "model=hf", f"model.path={copy()}", "model.trust_remote_code=true")
    OmegaConf.save(composed, tmp_path / "run" / "config.yaml", resolve=True)
    request = [f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    assert read_request(request).cfg.model.trust_remote_code is False
    assert read_request([*request, "model.trust_remote_code=true"]).cfg.model.trust_remote_code is True
