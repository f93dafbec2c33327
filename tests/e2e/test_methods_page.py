"""The worked example of docs/reference/methods.md runs, and the page names every method."""

import importlib
import re
import shutil
import sys

import torch
from conftest import REPO
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import diffora.methods
from diffora.places import conf_dir
from diffora.run.experiment import run

PAGE = (REPO / "docs" / "reference" / "methods.md").read_text()


def block(path: str) -> str:
    match = re.search(rf"<!-- {re.escape(path)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None, path
    return match[1]


def test_the_page_is_about_every_method():
    assert all(f"`{file.stem}`" in PAGE for file in (conf_dir() / "method").glob("*.yaml"))


def test_the_worked_example_runs(tmp_path, quick, monkeypatch):
    code, settings = block("src/diffora/methods/lora_fa.py"), block("conf/method/lora_fa.yaml")
    assert len(code.splitlines()) + len(settings.splitlines()) < 60
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lora_fa.py").write_text(code)
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "method" / "lora_fa.yaml").write_text(settings)
    monkeypatch.setattr(diffora.methods, "__path__", [*diffora.methods.__path__, str(tmp_path / "methods")])
    importlib.invalidate_caches()
    GlobalHydra.instance().clear()
    given = [o for o in quick if not o.startswith("search.")]
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        composed = compose("config", [*given, "method=lora_fa", "method.decay=0.1"])
    torch.set_num_threads(1)
    try:
        result = run(composed, tmp_path / "run")
    finally:
        sys.modules.pop("diffora.methods.lora_fa", None)
    assert result.record["params"]["adapter"] == 4 * sum(
        p.shape[1] for n, p in result.model.named_parameters() if "lora_bt" in n
    )
    assert (result.folder / "adapter" / "adapter_config.json").is_file()
