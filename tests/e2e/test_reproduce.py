"""docs/results/reproduce.md: every table has a command, and every estimate is for the runs of its block."""

import argparse
import re
import sys

import pytest
from conftest import REPO
from omegaconf import OmegaConf

from diffora.places import conf_dir
from diffora.run.sweep import cells, table_of

sys.path.insert(0, str(REPO / "scripts"))
import costs

PAGE = (REPO / "docs" / "results" / "reproduce.md").read_text()
BLOCKS = re.findall(r"```bash\n([^`]*)```\n\n(Estimate:[^\n]*)", PAGE)


def test_every_table_and_figure_has_a_section_with_commands_and_an_estimate():
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    wanted = [f"[D] Table {n}" for n in (1, 2, 3, 4, 5, 8)] + ["[D] Figure 2"]
    wanted += ["[R] Table 1", "[R] Table 2", "[R] Table 3", "[R] Table 5", "[R] Figure 1", "[R] Figure 2"]
    for name in wanted:
        [content] = [text for title, text in sections.items() if title.startswith(f"{name}:")]
        [experiment] = re.findall(r"^python train\.py -m experiment=(\w+)", content, re.MULTILINE)
        title = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml").hydra.sweeper.title
        assert title.startswith(f"{name}:")
        assert re.search(r"^Estimate: \d+ run", content, re.MULTILINE), name


@pytest.mark.parametrize(("commands", "estimate"), BLOCKS)
def test_estimates_match_the_runs_in_their_block(commands, estimate):
    lines = re.findall(r"python train\.py (.*)", commands)
    assert int(re.match(r"Estimate: ([\d,]+) run", estimate)[1]) == sum(
        len(costs.job_overrides(line)) for line in lines
    )


def test_the_whole_small_set_has_as_many_runs_as_the_page_says():
    [experiments] = re.findall(r"scale=small experiment=(\S+)", PAGE)
    tables = {name: OmegaConf.load(conf_dir() / "experiment" / f"{name}.yaml") for name in experiments.split(",")}
    runs = sum(len(cells([], table_of(t.hydra.sweeper), name, "small")) for name, t in tables.items())
    assert f"\n{runs} runs; " in PAGE


def test_operations_of_a_step_are_counted_exactly(cfg):
    """BERT with 6 layers of width 384: 2 operations for each weight and token, and the products of attention.

    The backward pass of full fine-tuning costs twice its forward pass. Through a frozen backbone it costs the same as
    the forward pass.
    """
    full = costs.step_of(cfg("method=full_ft", "model=minilm", "task=mrpc"), searching=False)
    lora = costs.step_of(cfg("method=lora", "model=minilm", "task=mrpc"), searching=False)
    weights, tokens = 6 * 12 * 384**2, 64
    expected = 2 * weights + 6 * 4 * tokens * 384
    assert full.forward == pytest.approx(expected, rel=0.01)
    assert full.backward == pytest.approx(2 * full.forward, rel=0.02)
    assert lora.backward == pytest.approx(full.forward, rel=0.1)
    assert 500 < lora.kernels < 5000


def test_hours_grow_with_rows_epochs_and_the_search(cfg, monkeypatch):
    step = costs.Step(forward=1e9, backward=2e9, kernels=1000)
    monkeypatch.setattr(costs, "step_of", lambda cfg, searching: step)
    given = argparse.Namespace(teraflops=10.0, microseconds=10.0)
    short = ["task=sst2", "finetune.epochs=1", "finetune.batch_size=1000"]
    search, once = costs.hours(cfg("method=lora", *short), given)
    assert search == 0
    rows, validation, tokens = 67_349, 872, 13
    assert once == pytest.approx((rows * 3e9 + validation * 1e9) * tokens / 1e13 / 3600)
    assert costs.hours(cfg("method=lora", *short, "finetune.epochs=3"), given)[1] == pytest.approx(3 * once)
    searching = costs.hours(cfg("method=diffora", *short, "search.epochs=2"), given)
    assert searching == (pytest.approx(2 * rows * 3e9 * tokens / 1e13 / 3600), pytest.approx(once))
    # with batches of one row, the number of kernel launches decides
    _, small = costs.hours(cfg("method=lora", *short, "finetune.batch_size=1"), given)
    assert small == pytest.approx((rows * 0.01 + validation * 1e9 * tokens / 1e13) / 3600)
