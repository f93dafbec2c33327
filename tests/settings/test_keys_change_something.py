"""Every setting changes something: a result, a record, a file or a refusal. The tests do not compare messages.

A fast test checks that each key of each settings class has a case below. The slow tests run each case twice, as it is
and with the key changed. The outcomes must differ.
"""

import hashlib
import json
import shutil

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_config import keys_of_class

from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.loop.loggers import Loggers
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.tasks.base import get_task

CPU = "trainer=cpu logger=[csv]"
SHORT = "finetune.epochs=1 finetune.warmup_steps=0 finetune.batch_size=8"
TINY = f"experiment=quickstart task.train_rows=32 task.validation_rows=16 {SHORT}"
SEARCH = f"{TINY} search.epochs=1"
LORA = f"{TINY} method=lora"
FIVE = f"{LORA} finetune.epochs=5"
CHAT = f"method=lora task=chat model=tiny_llama {CPU} {SHORT} task.max_length=64 task.path=chat"
SQUAD = f"method=lora task=squad_v2 model=tiny {CPU} {SHORT} predict=true task.path=squad_v2 task.max_length=32"
SQUAD += " task.doc_stride=4 task.max_question_length=8"
IMAGES = f"method=lora task=imagefolder model=tiny_vit {CPU} {SHORT} task.path=imagefolder"
DIGITS = f"method=lora task=digits model=tiny_vit {CPU} {SHORT} task.max_train_rows=32 task.validation_rows=800"
TEXT = f"method=lora task=text model=tiny {CPU} {SHORT} task.path=text/rows.csv task.max_length=64"
PAIRS = f"method=lora task=seq2seq model=tiny_t5 {CPU} {SHORT} task.path=pairs/rows.csv task.max_source_length=32"
PAIRS += " task.max_target_length=16 task.validation_fraction=0.4"
REWRITE = f"method=lora task=rewrite model=tiny_t5 {CPU} {SHORT} task.train_rows=32 task.validation_rows=8"
WORDS = (
    f"method=lora task=tokens model=tiny {CPU} {SHORT} task.path=tokens/rows.jsonl task.max_length=9 task.doc_stride=1"
)
CHOICE = f"method=lora task=choice model=tiny {CPU} {SHORT} task.path=choice/rows.jsonl task.max_length=32"
TALK = f"method=lora task=dialogue model=tiny_llama {CPU} {SHORT} task.train_rows=32 task.validation_rows=8"
SUMS = f"method=lora task=sums model=tiny_sums {CPU} {SHORT} task.train_rows=32 task.validation_rows=8 task.test_rows=6"
SUMS += " predict=true"
MASK = "method.mask={rank: 1, every: step, independent: false, target: gradient, start: 0, head: false}"
SIZES = "model=bert_base task=mrpc method=lora dry_run=true"
# (overrides, {key: another value}) for each settings class. "" is for the sections that all runs have.
CASES: dict[str, list[tuple[str, dict[str, str]]]] = {
    "": [
        (SEARCH, {
            "seed": "1", "rank": "2", "rho": "0.9", "predict": "true", "dry_run": "true", "cell.row": "x",
            "search_only": "true",
            "cell.column": "x", "cell.experiment": "x", "model.name": "x", "model.path": "embedded:tiny_vit",
            "model.layer": "nowhere.*", "model.candidates": "[output.dense]", "model.dtype": "bfloat16",
            "model.quantise": "4bit", "search.epochs": "2", "search.batch_size": "4", "search.lr": "0.1",
            "search.rank": "2", "search.gamma_lr": "0.5", "search.order": "2",
            "search.train_steps": "2", "search.max_rows": "8", "search.valid_fraction": "0.25",
            "search.weight_decay": "0.9", "search.clip": "1e-4", "search.accumulate": "2",
            "search.relaxation": "sigmoid", "search.head_warmup": "1", "search.readout": "early_gradient",
            "search.ensemble": "2", "model.kernel": "plain",
            "task.recipe.rank": "2", "task.recipe.rho": "0.9", "task.recipe.shared_rank": "1",
            "task.recipe.alpha": "2", "task.recipe.dropout": "0.5", "task.recipe.lr": "0.1",
        }),
        (f"{TINY} search.epochs=3", {"search.update": "simultaneous", "search.patience": "1"}),
        (f"{SEARCH} method.selector=one_shot search.masks=10", {"search.masks": "12"}),
        (f"{SEARCH} cell.experiment=x", {"scale": "small"}),
        (f"{TINY} search.epochs=1 finetune.epochs=2", {"resume": "true"}),  # in a folder with a complete run
        (f"{TINY} method=houlsby", {"model.roles.ffn_output": "intermediate.dense"}),
        (f"{TINY} method=full_ft", {"model.full_ft_lr": "0.1", "task.recipe.full_ft_lr": "0.1"}),
        (f"{LORA} model=hf model.path=coded", {"model.trust_remote_code": "true"}),
        (SIZES, {"model.config.intermediate_size": "64"}),
        (FIVE, {
            "finetune.epochs": "2", "finetune.batch_size": "4", "finetune.lr": "0.1", "finetune.warmup_steps": "8",
            "finetune.weight_decay": "0.9", "finetune.clip": "1e-4", "finetune.accumulate": "2",
            "finetune.eval_batch_size": "3", "finetune.dropout": "0.5", "finetune.max_steps": "3",
            "finetune.eval_every": "2",
            "finetune.optimizer": "sgd", "finetune.scheduler": "cosine", "finetune.lora_plus_ratio": "16",
            "finetune.label_smoothing": "0.5", "finetune.class_weights": "[1,9]", "trainer.compile": "true",
            "trainer.callbacks": "[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: x}]",
        }),
        (f"{FIVE} finetune.lr=1e-12", {"finetune.early_stop": "1"}),
        ("experiment=quickstart task.train_rows=32 task.validation_rows=16 task.recipe.epochs=1"
         " task.recipe.batch_size=8 task.recipe.warmup_steps=0 task.recipe.search_epochs=1", {
            "task.recipe.epochs": "2", "task.recipe.batch_size": "4", "task.recipe.warmup_steps": "2",
            "task.recipe.search_epochs": "2",
        }),
        ("experiment=quickstart method=lora task.train_rows=32 task.validation_rows=16 finetune.lr=1e-12"
         " task.recipe.epochs=4 task.recipe.warmup_steps=0", {"task.recipe.early_stop": "1"}),
        (f"{TINY} method=sora", {"task.recipe.sora_lambda": "0.5"}),
        (f"{TINY} method=sora recipe=rm_lora '+task.recipe.of.paraphrase={{epochs: 1, sora_lambda: 0.5}}'",
         {"task.recipe.of.paraphrase.sora_lambda": "0.001"}),
        (LORA, {
            "trainer.accelerator": "mps", "trainer.devices": "100000", "trainer.strategy": "ddp",
            "trainer.precision": "bf16-mixed", "trainer.deterministic": "true", "trainer.num_workers": "1",
            "trainer.num_proc": "2",
            "trainer.gradient_checkpointing": "true", "logger.csv": "false", "++logger.tensorboard": "true",
        }),
        (LORA, {"trainer.num_nodes": "2"}),
        # without dropout, results differ in rounding and in the rows of a pass; a limit that is too low is refused
        (f"{LORA} \"model.layer='encoder.layer.[2,3]'\"", {"trainer.cache_prefix": "true"}),
        (f"{LORA} trainer.cache_prefix=true", {"trainer.cache_prefix_limit": "1e-9"}),
        (f"{LORA} debug=default", {"debug.detect_anomaly": "true"}),
        (f"{LORA} logger=[wandb]", {
            "logger.wandb.project": "x", "logger.wandb.entity": "x", "logger.wandb.group": "x",
            "logger.wandb.tags": "[x]",
        }),
    ],
    "GlueTask": [
        (LORA, {"task.name": "x", "task.max_length": "8", "task.train_rows": "24", "task.validation_rows": "24",
                "task.max_train_rows": "16"}),
        (f"method=lora task=mrpc model=tiny {CPU} {SHORT} task.path=mrpc", {"task.path": "elsewhere"}),
    ],
    "TextTask": [
        (TEXT, {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "text/other.csv", "task.kind": "regression",
            "task.text_columns": "[text,more]", "task.label_column": "other", "task.validation_fraction": "0.5",
            "task.split_seed": "1", "task.max_length": "8", "task.subset": "x", "task.train_split": "x",
            "task.validation_split": "x",
        }),
        (f"{TEXT} task.kind=multilabel task.label_column=mixed", {
            "task.label_columns": "[one,two]", "task.label_separator": "|",
        }),
    ],
    "TokensTask": [
        (f"{WORDS} finetune.epochs=2 finetune.lr=0.02", {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "elsewhere", "task.tokens_column": "more",
            "task.tags_column": "other", "task.tags": "[B-X,I-X,O,B-Y]", "task.validation_fraction": "0.5",
            "task.split_seed": "1", "task.max_length": "24", "task.doc_stride": "4", "task.strict": "true",
            "task.train_split": "x", "task.validation_split": "x",
        }),
        ("task=tokens task.path=some/words", {"task.subset": "x"}),
    ],
    "ChoiceTask": [
        (CHOICE, {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "elsewhere", "task.context_columns": "[more]",
            "task.start_column": "more", "task.choices_column": "others", "task.choice_columns": "[a,b]",
            "task.label_column": "other", "task.label_kind": "letter", "task.first_label": "1",
            "task.validation_fraction": "0.5", "task.split_seed": "1", "task.max_length": "6",
            "task.train_split": "x", "task.validation_split": "x",
        }),
        ("task=choice task.path=some/choices", {"task.subset": "x"}),
    ],
    "Seq2SeqTask": [
        (PAIRS, {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "pairs/other.csv", "task.prefix": "'so : '",
            "task.source_column": "target", "task.target_column": "source", "task.validation_fraction": "0.5",
            "task.split_seed": "1", "task.max_source_length": "4", "task.max_target_length": "3",
            "task.generation.rows": "2", "task.generation.max_new_tokens": "2", "task.generation.num_beams": "3",
        }),
        ("task=seq2seq task.path=owner/pairs task.source_column=prompt task.target_column=completion", {
            "task.subset": "x", "task.train_split": "x", "task.validation_split": "x",
        }),
    ],
    "RewriteTask": [
        (REWRITE, {
            "task.name": "x", "task.max_train_rows": "16", "task.prefix": "'so : '", "task.max_source_length": "4",
            "task.max_target_length": "3", "task.train_rows": "24", "task.validation_rows": "6",
            "task.generation.rows": "2", "task.generation.max_new_tokens": "2", "task.generation.num_beams": "3",
        }),
    ],
    "SquadTask": [
        (SQUAD, {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "elsewhere", "task.train_file": "x.jsonl",
            "task.validation_file": "x.jsonl", "task.unanswerable": "false", "task.null_threshold": "-1000",
            "task.max_length": "8", "task.doc_stride": "1000", "task.max_question_length": "1", "task.n_best": "1",
            "task.max_answer_length": "1",
        }),
        ("task=squad", {"task.hub": "x"}),
    ],
    "CausalLMTask": [
        (CHAT, {"task.name": "x", "task.max_train_rows": "8", "task.path": "elsewhere", "task.max_length": "16",
                "task.packing": "false", "task.train_on": "all", "task.score": "generation",
                "task.prompt": "'say {prompt} so '", "task.max_characters": "16", "task.max_validation_rows": "4",
                "task.forgetting.path": "texts/texts.txt"}),
        (f"{CHAT} task.score=generation task.generation.max_new_tokens=4 predict=true", {
            "task.generation.max_new_tokens": "6", "task.generation.answer": "'(is|it)'", "task.generation.rows": "2",
        }),
        (f"{CHAT} task.forgetting.path=texts/texts.txt", {
            "task.forgetting.rows": "2", "task.forgetting.max_length": "4",
        }),
        ("task=alpaca task.validation_rows=4", {
            "task.hub": "x", "task.hub_config": "x", "task.train_split": "test", "task.validation_split": "test",
            "task.validation_rows": "2",
        }),
        ("task=alpaca task.validation_split=test ++task.validation_hub=owner/pairs", {
            "task.validation_hub": "x", "task.validation_hub_config": "x",
        }),
        (f"method=lora task=chat model=tiny_llama {CPU} {SHORT} task.hub=x predict=true task.max_length=64", {
            "task.test_split": "test",
        }),
        ("task=chat task.hub=x ++task.forgetting.path=owner/texts", {
            "task.forgetting.subset": "x", "task.forgetting.split": "test",
        }),
    ],
    "DialogueTask": [
        (TALK, {"task.name": "x", "task.max_train_rows": "16", "task.max_length": "16", "task.packing": "false",
                "task.train_on": "all", "task.train_rows": "24", "task.validation_rows": "6",
                "task.score": "generation", "task.prompt": "'the {prompt} so '",
                "task.forgetting.path": "texts/texts.txt"}),
        (f"{TALK} ++task.score=generation ++task.generation.max_new_tokens=2", {
            "task.generation.max_new_tokens": "1000", "task.generation.answer": "'(the)'", "task.generation.rows": "2",
        }),
        (f"{TALK} ++task.forgetting.path=texts/texts.txt", {
            "task.forgetting.rows": "2", "task.forgetting.max_length": "4",
        }),
        ("task=dialogue ++task.forgetting.path=owner/texts", {
            "task.forgetting.subset": "x", "task.forgetting.split": "test",
        }),
    ],
    "SumsTask": [
        (SUMS, {"task.name": "x", "task.max_train_rows": "16", "task.max_length": "16", "task.packing": "true",
                "task.train_on": "all", "task.train_rows": "24", "task.validation_rows": "6", "task.test_rows": "4",
                "task.level": "3", "task.score": "loss", "task.prompt": "'the {prompt} so '",
                "task.generation.max_new_tokens": "3", "task.generation.answer": "'(\\w+)$'",
                "task.generation.rows": "2", "task.forgetting.path": "texts/texts.txt", "task.forgetting.rows": "2",
                "task.forgetting.max_length": "4"}),
        ("task=sums ++task.forgetting.path=owner/texts", {
            "task.forgetting.subset": "x", "task.forgetting.split": "test",
        }),
    ],
    "ImageTask": [
        (IMAGES, {
            "task.name": "x", "task.max_train_rows": "8", "task.path": "elsewhere", "task.validation_split": "dev",
            "task.num_labels": "3", "task.train_head": "false", "task.augment.crop_area": "0.9",
            "task.augment.flip": "false", "task.augment.shift": "0.4", "task.cache_pixels": "false",
        }),
        (f"{IMAGES} task.path=table", {"task.image_column": "x", "task.label_column": "x"}),
        ("task=cifar100", {"task.hub": "x"}),
    ],
    "DigitsTask": [
        (DIGITS, {
            "task.name": "x", "task.max_train_rows": "24", "task.validation_rows": "700", "task.train_head": "false",
            "task.augment.crop_area": "0.5", "task.augment.flip": "true", "task.augment.shift": "0.4",
        }),
    ],
    "DiffoRA": [
        (SEARCH, {
            "method.alpha": "2", "method.weight_sharing": "false", "method.shared_rank": "1",
            "method.selector": "random", "method.scope": "global", "method.shared_scale": "same",
            "method.budget": "30k", "method.selection": "[key]", "method.warm_start": "true",
            "method.regulariser.weight": "0.1", "method.mask.rank": "1", "method.adapter": "a/b/c",
        }),
        (f"{SEARCH} method.regulariser.weight=0.1", {"method.regulariser.form": "mean_norm"}),
        (f"{SEARCH} '{MASK}'", {
            "method.mask.every": "epoch", "method.mask.independent": "true", "method.mask.target": "update",
            "method.mask.start": "1", "method.mask.head": "true",
        }),
        (f"{SEARCH} method.selector=gradient", {"method.score_batches": "1"}),
        (SEARCH, {"method.time_budget": "0.6"}),
        (f"{SEARCH} method.time_budget=0.6", {"method.time_from": "measured"}),
    ],
    "Random": [
        (f"{TINY} method=random", {
            "method.alpha": "2", "method.weight_sharing": "false", "method.shared_rank": "1", "method.scope": "global",
            "method.budget": "30k", "method.regulariser.weight": "0.1", "method.mask.rank": "1", "method.draw": "5",
            "method.like": "conf", "method.adapter": "a/b/c", "method.shared_scale": "same",
        }),
        (f"{TINY} method=random method.scope=global", {"method.keep": "types"}),
        (f"{TINY} method=random", {"method.time_budget": "0.6"}),
        (f"{TINY} method=random method.time_budget=0.6", {"method.time_from": "measured"}),
        (f"{TINY} method=random method.regulariser.weight=0.1", {"method.regulariser.form": "mean_norm"}),
        (f"{TINY} method=random '{MASK}'", {
            "method.mask.every": "epoch", "method.mask.independent": "true", "method.mask.target": "update",
            "method.mask.start": "1", "method.mask.head": "true",
        }),
    ],
    "ShareOnly": [(f"{TINY} method=share_only", {"method.alpha": "2", "method.shared_rank": "1"})],
    "LoRA": [(LORA, {"method.alpha": "2", "method.adapter": "a/b/c"})],
    "FLoRA": [(f"{TINY} method=flora", {"method.alpha": "2"})],
    "RLoRA": [(f"{TINY} method=r_lora", {
        "method.adapter": "a/b/c", "method.alpha": "2",
        "method.regulariser.weight": "1", "method.regulariser.form": "mean_norm",
    })],
    "GMLoRA": [(f"{TINY} method=gm_lora", {
        "method.adapter": "a/b/c", "method.alpha": "2",
        "method.mask.rank": "1", "method.mask.every": "epoch", "method.mask.independent": "true",
        "method.mask.target": "update", "method.mask.start": "1", "method.mask.head": "true",
    })],
    "RMLoRA": [(f"{TINY} method=rm_lora", {
        "method.adapter": "a/b/c", "method.alpha": "2",
        "method.regulariser.weight": "1", "method.regulariser.form": "mean_norm",
        "method.mask.rank": "1", "method.mask.every": "epoch", "method.mask.independent": "true",
        "method.mask.target": "update", "method.mask.start": "1", "method.mask.head": "true",
    })],
    "SoRA": [
        (f"{TINY} method=sora method.lam=0.1 finetune.epochs=2", {
            "method.alpha": "2", "method.lam": "0.5", "method.times_lr": "true", "method.stages": "2",
        }),
        (f"{TINY} method=sora method.lam=0.1 method.stages=2", {"method.lam_start": "0.1"}),
    ],
    "AdaLoRA": [(f"{FIVE} method=adalora finetune.lr=0.03", {
        "method.alpha": "2", "method.init_rank": "5", "method.initial": "0.4", "method.final": "0.6",
        "method.every": "1", "method.beta1": "0.1", "method.beta2": "0.1", "method.orthogonality": "0",
    })],
    "Houlsby": [(f"{TINY} method=houlsby", {
        "method.size": "4", "method.activation": "tanh", "method.skip": "false", "method.init_std": "0.1",
    })],
    "Pfeiffer": [(f"{TINY} method=pfeiffer", {
        "method.size": "4", "method.activation": "tanh", "method.skip": "false", "method.init_std": "0.1",
    })],
    "PEFT": [(f"{TINY} method=dora", {"method.config.lora_alpha": "2", "method.places": "[key]"})],
}  # fmt: skip
FLAT = [
    (where, base, key, value) for where, given in CASES.items() for base, keys in given for key, value in keys.items()
]


def classes() -> dict[str, str]:
    """The classes of tasks and methods in conf/, by their names."""
    targets = {
        OmegaConf.select(OmegaConf.load(file), key)
        for group, key in (("task", "_target_"), ("method", "method._target_"))
        for file in (conf_dir() / group).glob("*.yaml")
    }
    return {target.rpartition(".")[2]: target for target in targets}


def test_every_key_has_a_case():
    for name, target in {"": "", **classes()}.items():
        cases = {key.lstrip("+") for where, _, key, _ in FLAT if where == name}
        missing = [k for k in keys_of_class(target) if not any(c == k or c.startswith(f"{k}.") for c in cases)]
        assert [key for key in missing if key != "task.name"] == [], name


@pytest.fixture
def folders(tmp_path):
    """Data of every kind of task that reads files, by the task's name."""
    kinds = ("mrpc", "squad_v2", "chat", "imagefolder", "text", "tokens", "choice", "pairs", "texts")
    places = {name: tmp_path / name for name in kinds}
    rng = np.random.default_rng(0)
    for split, n in (("train", 16), ("validation", 8)):
        for place in places.values():
            place.mkdir(exist_ok=True)
        rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2, "idx": i} for i in range(n)]
        context, starts = "the cat sat on the mat near the door", [4, 19]
        answers = [{"text": [("cat", "mat")[i % 2]], "answer_start": [starts[i % 2]]} for i in range(n)]
        questions = [{"id": f"{split}{i}", "question": "who ?", "context": context} for i in range(n)]
        chats = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(n)]
        squad = [q | {"title": "", "answers": a} for q, a in zip(questions, answers, strict=True)]
        if split == "validation":
            (places["chat"] / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
            (places["texts"] / "texts.txt").write_text("the king thanked the baker at noon\n" * 3 + "the monk walked\n")
        for name, table in (("mrpc", rows), ("squad_v2", squad), ("chat", chats)):
            (places[name] / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        for label in ("cat", "dog"):
            folder = places["imagefolder"] / split / label
            folder.mkdir(parents=True)
            for i in range(n // 2):
                Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    people = ("baker", "king", "teacher", "farmer")
    told = [(f"the {a} thanked the {b}", f"the {b} was thanked by the {a}") for a in people for b in people if a != b]
    pairs = "".join(f"{active},{passive}\n" for active, passive in told)
    (places["pairs"] / "rows.csv").write_text("source,target\n" + pairs)
    (places["pairs"] / "other.csv").write_text("source,target\n" + pairs.replace("thanked", "helped"))
    words = [
        {
            "tokens": ["the", "cat", f"x{i}", *["sat", "near"] * (i % 4)],
            "ner_tags": ["B-X", "I-X", "O", *["O", "I-X"] * (i % 4)],
        }
        for i in range(24)
    ]
    words = [row | {"more": row["tokens"][::-1], "other": row["ner_tags"][::-1]} for row in words]
    choices = [
        {"context": f"who sat {i}", "more": f"where {i}", "choices": ["the cat", "a dog"], "others": ["a dog", "a cow"]}
        | {"a": "a", "b": "b", "label": i % 2, "other": i // 2 % 2}
        for i in range(24)
    ]
    for name, table in (("tokens", words), ("choice", choices)):
        (places[name] / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    names, flags = "text,more,label,other,mixed,one,two\n", ("0,1", "1,0", "1,1")
    rows = [
        f"the cat sat near the door {i},more {i},{'ab'[i % 2]},{'cd'[i // 2 % 2]},"
        f"{('x;y', 'x')[i % 2]},{flags[i % 3]}\n"
        for i in range(24)
    ]
    (places["text"] / "rows.csv").write_text(names + "".join(rows))
    (places["text"] / "other.csv").write_text(names + "".join(reversed(rows[:16])))
    return places


@pytest.fixture
def outcome(cfg, folders, tmp_path, monkeypatch):
    """Runs a configuration and returns its outcome."""
    import pyarrow.parquet as pq

    torch.set_num_threads(1)
    monkeypatch.setattr("diffora.tasks.chat.held_out.why_unreachable", lambda: None)
    monkeypatch.chdir(folders["mrpc"].parent)
    (tmp_path / "table").mkdir()
    images = sorted(folders["imagefolder"].glob("train/*/*.png"))
    for split in ("train", "validation"):
        rows = [{"image": {"bytes": f.read_bytes(), "path": None}, "label": f.parent.name} for f in images]
        pq.write_table(datasets.Dataset.from_list(rows).data.table, tmp_path / "table" / f"{split}.parquet")
    shutil.copytree(EMBEDDED, tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "absent.X"}}))
    asked = {}
    monkeypatch.setattr("wandb.init", lambda **given: asked.update({k: str(v) for k, v in given.items()}))
    monkeypatch.setattr("wandb.define_metric", lambda *args, **given: None)

    def load_dataset(name, config=None, split=None, streaming=False):
        if name == "owner/texts":
            return [{"text": f"{config} {split} text"}]
        if name == "some/words":
            table = [{"tokens": ["cat", f"{config}{i}"], "ner_tags": ["B-X", "O"]} for i in range(8)]
            return {"train": datasets.Dataset.from_list(table)}
        if name == "some/choices":
            table = [{"context": f"{config}{i}", "choices": ["a", "b"], "label": i % 2} for i in range(8)]
            return {"train": datasets.Dataset.from_list(table)}
        if name not in ("yahma/alpaca-cleaned", "owner/pairs", "x"):
            raise OSError("no such data")
        made = {
            split: [{"prompt": f"{name} {config} {split} {i}", "completion": "yes"} for i in range(8)]
            for split in ("train", "test")
        }
        return {split: datasets.Dataset.from_list(rows) for split, rows in made.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    facts, rows, fit = [], [], L.Trainer.fit
    encoded = {}  # by how many processes, and to which columns
    monkeypatch.setattr("diffora.loop.parts.processes", lambda wanted: encoded.update(processes=wanted) or 1)

    def watched(trainer, module, datamodule=None, **given):
        det = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        encoded["columns"] = datamodule.train.column_names
        facts.append([type(trainer.strategy).__name__, trainer.precision, trainer._detect_anomaly, det])
        facts[-1] += [datamodule.num_workers, getattr(module.model, "is_gradient_checkpointing", None)]
        if facts[-1] != watched.usual:
            raise UserError(f"as the trainer is set up: {facts[-1]}")
        hook = module.model.register_forward_pre_hook(count_rows, with_kwargs=True)
        fit(trainer, module, datamodule=datamodule, **given)
        hook.remove()

    def count_rows(model, args, inputs):
        rows.append(max(len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim))

    watched.usual = ["SingleDeviceStrategy", "32-true", False, (True, True), 0, False]
    monkeypatch.setattr(L.Trainer, "fit", watched)

    def of(base: str, *more: str, again: bool = False):
        import shlex

        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        rows.clear()
        try:
            composed = cfg(*shlex.split(base), *more)
            if base.startswith("task="):
                return get_task(composed.task).load().data_hash
            if "wandb" in base:
                asked.clear()
                Loggers(check(composed)[0].logger, folder, {})
                return {key: asked[key] for key in ("project", "entity", "group", "tags")}
            if again:
                run(cfg(*shlex.split(base)), folder)
            record = run(composed, folder).record
        except UserError as error:
            return error.problems
        finally:
            torch.use_deterministic_algorithms(False)
        kept = ("method", "task", "model", "experiment", "row", "column", "scale", "status", "params", "metrics")
        files = sorted(file for file in folder.rglob("*") if file.is_file() and "checkpoints" not in file.parts)
        written = {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.suffix in (".safetensors", ".jsonl") or "predictions" in file.parts
        }
        names = [file.relative_to(folder).parts[:2] for file in files]
        if (folder / "selection.json").is_file():  # without the settings that it holds
            selection = json.loads((folder / "selection.json").read_text())
            written["scores"] = [selection.get(key) for key in ("selected", "gamma_bar", "scores")]
        found = {key: record.get(key) for key in kept} | {"history": record.get("history"), "names": names} | written
        found |= encoded
        return found | {"rows of micro-batches": sorted(set(rows))}

    yield of
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.slow
def test_equal_settings_have_equal_outcomes(outcome):
    """Only then do differences mean something."""
    for base in (SEARCH, CHAT, IMAGES):
        assert outcome(base) == outcome(base)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "base", "key", "value"), FLAT, ids=[f"{w}-{k}" for w, _, k, _ in FLAT])
def test_a_changed_key_changes_something(outcome, where, base, key, value):
    written = key if key.startswith("+") else f"++{key}"
    again = key == "resume"
    if (base, again) not in BASELINES:
        BASELINES[base, again] = outcome(base, again=again)
    assert BASELINES[base, again] != outcome(base, f"{written}={value}", again=again)


BASELINES: dict[tuple[str, bool], object] = {}
