"""conf/experiment/: every table composes at both scales, and the papers' numbers in them are right."""

import re

import pytest
from omegaconf import OmegaConf

from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.sweep import Table, cells, parse, table_of

TABLES: dict[str, Table] = {
    file.stem: table_of(content.hydra.sweeper)
    for file in sorted((conf_dir() / "experiment").glob("*.yaml"))
    if "rows" in (content := OmegaConf.load(file)).get("hydra", {}).get("sweeper", {})
}
PAPERS = (
    "table1_glue", "table2_squad", "table3_random", "table4_sample_rate", "table5_weight_sharing", "table8_roberta",
    "figure2_dam", "rm_table1_glue", "rm_table2_squad", "rm_table3_gpt2", "rm_table5_orthogonality",
    "rm_figure1_cifar100", "rm_figure2_food101",
)  # fmt: skip


def test_every_table_and_figure_of_the_papers_has_an_experiment():
    assert set(PAPERS) <= set(TABLES)


def settings(scale: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """One run for each distinct row and each distinct column of all tables, by its overrides."""
    found = {}
    for name in PAPERS:
        table = TABLES[name]
        columns = table.columns[scale]
        jobs = list(cells(parse([]), table, name, scale).values())
        assert len(jobs) == len(table.rows) * len(columns) * len(table.seeds[scale])
        for i in range(max(len(table.rows), len(columns))):
            row, column = i % len(table.rows), i % len(columns)
            of_row = table.rows[row].set if scale == "paper" else table.rows[row].small  # null: as in the paper
            keys = {tuple(of_row or ()), tuple(list(columns.values())[column].set)} - {()}
            if not found.keys() >= keys:
                found |= dict.fromkeys(keys, jobs[row * len(columns) + column])
    return found


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_every_row_and_every_column_is_valid(cfg, scale):
    """Rows and columns are tested separately: Hydra takes a third of a second for each. A sweep composes all cells."""
    for overrides in dict.fromkeys(settings(scale).values()):
        composed = cfg(*(line for line in overrides if not line.startswith("experiment=")))
        check(composed)
        table = TABLES[composed.cell.experiment]
        assert composed.cell.row in {row.name for row in table.rows}
        assert composed.cell.column in table.columns[scale]
        if scale == "small":
            assert composed.model.path.startswith("embedded")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_composes_as_an_experiment(cfg, name):
    """The sweeper accepts all its keys."""
    check(cfg(f"experiment={name}"))


@pytest.mark.parametrize("name", TABLES)
def test_paper_figures_match_a_column_and_have_a_number_for_each_metric(name):
    table = TABLES[name]
    for row in table.rows:
        for column, figure in (row.paper or {}).items():
            if column in ("params", "mean"):
                continue
            present = table.columns["paper"][column]
            figures = str(figure).split("/")
            assert len(figures) == len(present.metrics or [None])
            assert all(re.fullmatch(r"\d+(\.\d+)?( ± \d\.\d+)?", text) for text in figures)
        assert set(row.columns) <= set(table.columns["paper"])


def test_paper_means_equal_the_mean_of_the_columns():
    """To two decimals, as printed. A pair of metrics counts as its mean; [D] does not say how it counts pairs."""
    off = {}
    for name in ("table1_glue", "table8_roberta"):
        for row in TABLES[name].rows:
            if row.paper is not None:
                parts = [str(v).split("/") for k, v in row.paper.items() if k not in ("params", "mean")]
                mean = sum(sum(map(float, p)) / len(p) for p in parts) / len(parts)
                off[name, row.name] = abs(mean - float(row.paper["mean"]))
    assert len(off) == 17 and sorted(off.values())[len(off) // 2] < 0.1 and max(off.values()) < 0.5


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("table")])
def test_every_table_with_diffora_has_control_rows(name):
    methods = [re.search(r"method=(\w+)", " ".join(row.set))[1] for row in TABLES[name].rows]
    assert {"diffora", "random", "lora"} <= set(methods)
    for row in TABLES[name].rows:
        if row.paper is None:
            assert {"method=random", "method=lora"} & set(row.set)


@pytest.mark.parametrize("name", TABLES)
def test_like_names_a_row_with_the_same_selection_settings(name):
    """Both rows have the same rank and sharing. Only the method, its draw, its size and the search differ."""
    present = {row.name: row for row in TABLES[name].rows}
    for row in TABLES[name].rows:
        if row.like is not None:
            mine, pattern = (
                {*r.set, *(r.small or []), *(line for lines in r.columns.values() for line in lines)}
                for r in (row, present[row.like])
            )
            # like fixes the number of parameters, so a budget belongs to the other row only
            own = (
                "method.draw=",
                "method.budget=",
                "method.keep=",
                "method.time_budget=",
                "search.",
                "finetune.epochs=",
            )
            mine, pattern = ({line for line in r if not line.startswith(own)} for r in (mine, pattern))
            pattern -= {"method=diffora", "method=random", "method.weight_sharing=true"}
            assert mine - {"method=random"} == pattern


def test_every_table_of_glue_and_squad_has_random_selections_of_equal_size():
    for name in PAPERS:
        if name.startswith("table"):
            rows = TABLES[name].rows
            assert any(row.like for row in rows) or all(
                "method.budget=1.32M" in r.set for r in rows if "random" in r.name
            )


def test_tables_with_claims_to_test_have_five_seeds_in_small():
    for name in ("table3_random", "table4_sample_rate", "table5_weight_sharing", "rm_table5_orthogonality"):
        assert len(TABLES[name].seeds["small"]) >= 5


def test_every_file_begins_with_its_commands():
    for name in TABLES:
        assert f"python train.py -m experiment={name}" in (conf_dir() / "experiment" / f"{name}.yaml").read_text()


def test_accumulation_is_for_both_stages(cfg):
    assert cfg("method=diffora", "task=mnli", "finetune.accumulate=2").search.accumulate == 2
