"""A setting that nothing reads is a dead option. What is read is seen by running, not by looking for words.

Short runs of every kind of task, and every method's steps on a small model, note which keys of their configuration and
which fields of their method are asked for. Checks, hashes and written copies do not count: they take every key.
"""

import dataclasses
import json

import pytest
import torch
from conftest import TYPES, batch_of
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_config import GROUPS, leaves

from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.loop import loggers
from diffora.methods import lowrank
from diffora.run.experiment import run
from diffora.settings import config
from diffora.tasks.base import get_task

HANDED_OVER = ("model.config.", "method.config.", "task.recipe.of.")  # whole, to a library or to other keys
SHORT = ("task.recipe.epochs=1", "task.recipe.batch_size=8", "task.recipe.search_epochs=1")


class Reads:
    """Which keys of configurations, and which fields of dataclasses, are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        self.paused = 0
        node_of = DictConfig._get_node

        def get_node(node, key, *args, **kwargs):
            if not self.paused and isinstance(key, str):
                self.paused += 1
                self.keys.add(node._get_full_key(key))
                self.paused -= 1
            return node_of(node, key, *args, **kwargs)

        monkeypatch.setattr(DictConfig, "_get_node", get_node)
        for owner, name in ((config, "faults"), (config, "problems"), (config, "plain"), (OmegaConf, "to_yaml")):
            monkeypatch.setattr(owner, name, self.quiet(getattr(owner, name)))
        to_container = self.quiet(OmegaConf.to_container)
        monkeypatch.setattr(OmegaConf, "to_container", staticmethod(to_container))

    def quiet(self, function):
        def quietly(*args, **kwargs):
            self.paused += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.paused -= 1

        return quietly


@pytest.fixture
def folders(tmp_path):
    """Data of every kind of task that reads files, by the task's name."""
    places = {name: tmp_path / name for name in ("mrpc", "squad_v2", "chat", "imagefolder")}
    for split, n in (("train", 16), ("validation", 8)):
        for place in places.values():
            place.mkdir(exist_ok=True)
        rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2, "idx": i} for i in range(n)]
        context, starts = "the cat sat on the mat near the door", [4, 19]
        answers = [{"text": [("cat", "mat")[i % 2]], "answer_start": [starts[i % 2]]} for i in range(n)]
        questions = [{"id": f"{split}{i}", "question": "who ?", "context": context} for i in range(n)]
        chats = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(n)]
        squad = [q | {"title": "", "answers": a} for q, a in zip(questions, answers, strict=True)]
        for name, table in (("mrpc", rows), ("squad_v2", squad), ("chat", chats)):
            (places[name] / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        for label in ("cat", "dog"):
            folder = places["imagefolder"] / split / label
            folder.mkdir(parents=True)
            for i in range(n // 2):
                Image.new("RGB", (9, 9), (20 * i, 100, len(label + split))).save(folder / f"{i}.png")
    return places


@pytest.mark.slow
def test_every_key_is_read(cfg, folders, tmp_path, monkeypatch):
    """B19: each key of every choice in conf/ is read by a run that has it."""
    torch.set_num_threads(1)
    shipped = set()
    for group, names in GROUPS.items():
        for name in names:
            shipped |= set(leaves(config.plain(cfg(f"{group}={name}"))))
    reads = Reads(monkeypatch)

    def start(*overrides: str, **more: str) -> None:
        composed = cfg("trainer=cpu", "logger=[csv]", *SHORT, *overrides)
        run(composed, tmp_path / f"run{len(list(tmp_path.iterdir()))}")

    quick = ("experiment=quickstart", "task.train_rows=48", "task.validation_rows=16", "cell.experiment=x")
    start(*quick, "debug=default", "method.warm_start=true")
    start(*quick, "method.selector=gradient", "method.score_batches=1")
    start(*quick, "dry_run=true")
    start("method=lora", "task=squad_v2", "model=tiny", f"task.path={folders['squad_v2']}", "task.max_length=64",
          "task.doc_stride=16", "task.max_question_length=8")  # fmt: skip
    start("method=lora", "task=chat", "model=tiny_llama", f"task.path={folders['chat']}", "task.max_length=128")
    start("method=lora", "task=imagefolder", "model=tiny_vit", f"task.path={folders['imagefolder']}")
    start("method=full_ft", "task=dialogue", "model=tiny_llama", "task.train_rows=32", "task.validation_rows=8")
    start("method=bitfit", "task=digits", "model=tiny_vit", "task.max_train_rows=32", "task.validation_rows=300")
    for name in ("mrpc", "alpaca", "cifar100"):  # from the hub, which is not there
        task = get_task(cfg(f"task={name}").task)
        with pytest.raises(UserError):
            task.load()
        task.head()
    for name in GROUPS["method"]:
        method_of(cfg(f"method={name}"))
    # W&B's own settings
    monkeypatch.setattr("wandb.init", lambda **settings: None)
    monkeypatch.setattr("wandb.define_metric", lambda *args, **settings: None)
    loggers.Loggers(cfg("logger=[wandb,tensorboard]").logger, tmp_path / "wandb", {}).of_stage("finetune")

    unread = {key for key in shipped - reads.keys if not key.startswith(HANDED_OVER)}
    assert unread == set()


def method_of(cfg):
    from hydra.utils import get_class

    return get_class(cfg.method._target_).from_config(cfg)


OWN = [name for name in GROUPS["method"] if name not in ("dora", "eva", "ia3", "peft", "pissa", "rslora", "vera")]


@pytest.mark.parametrize("name", OWN)
def test_every_field_of_a_method_is_read(cfg, deberta, monkeypatch, name):
    """B19: by its steps on a small model; what a field is checked for does not count."""
    method = method_of(cfg(f"method={name}", "task=mrpc", *(["rank=2"] if name not in NO_RANK else [])))
    asked: set[tuple[str, str]] = set()
    parts = [method, *(v for v in vars(method).values() if dataclasses.is_dataclass(v))]

    def watch(kind):
        plain = kind.__getattribute__

        def ask(instance, field):
            asked.add((type(instance).__name__, field))
            return plain(instance, field)

        monkeypatch.setattr(kind, "__getattribute__", ask, raising=False)

    for kind in {*map(type, parts)}:
        watch(kind)
    for part in parts:  # with every part at work
        if isinstance(part, lowrank.Mask):
            object.__setattr__(part, "rank", 1)
            object.__setattr__(part, "start", 1)
            object.__setattr__(part, "head", True)
        elif isinstance(part, lowrank.Regulariser):
            object.__setattr__(part, "weight", 0.1)
    model = deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES, {"attention_output": TYPES[3], "ffn_output": TYPES[5]})
    asked.clear()

    method.check(model, grid)
    scores = torch.rand(grid.n_layers, grid.n_types) if method.selector_to_run else None
    adaptation = method.adapt(model, grid, method.choose(grid, scores, 0), 0)
    adaptation.begin(4)
    for step in range(2):
        adaptation.before_step(step, 0)
        batch = batch_of(4)
        loss = model(**{key: value for key, value in batch.items() if key != "row"}).loss
        penalty = adaptation.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adaptation.after_backward()
        adaptation.after_step(step, 1e-3)
    fields = {(type(part).__name__, field.name) for part in parts for field in dataclasses.fields(part)}
    # These two are read by the harness: where the search is, and from where its A and B are taken.
    by_harness = {("DiffoRA", "score_batches"), ("DiffoRA", "warm_start")}
    assert fields - asked <= by_harness


NO_RANK = ("bitfit", "full_ft", "head_only", "houlsby", "pfeiffer", "share_only", "adalora")
