"""The front of a metric over its cost."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from made_runs import made_run

from diffora.report import charts, page
from diffora.report.pareto import Point, front, fronts, time_charts
from diffora.report.runs import gather
from diffora.report.statistics import Spread
from diffora.report.tables import tables_of

VALUES = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12)


def points(values):
    return [Point(str(i), float(cost), Spread(float(metric), None, 1)) for i, (cost, metric) in enumerate(values)]


@given(VALUES, st.booleans())
def test_the_front_is_what_no_row_beats(values, maximise):
    found = {point.row for point in front(points(values), maximise)}
    sign = 1 if maximise else -1
    for i, (cost, metric) in enumerate(values):
        beaten = any(c <= cost and sign * m >= sign * metric and (c, m) != (cost, metric) for c, m in values)
        assert (str(i) in found) == (not beaten)


def test_the_charts_name_the_rows_on_the_front(tmp_path):
    rows = {"lora": (0.8, 1000, 60.0, 500.0), "diffora": (0.9, 2000, 90.0, 450.0), "random": (0.7, 90_000, 95.0, 600.0)}
    for method, (score, size, seconds, memory) in rows.items():
        for seed in (0, 1):
            time = {"search_s": 30.0 if method == "diffora" else 0.0, "finetune_s": seconds, "total_s": 120.0}
            more = {"adapter": size, "time": time, "memory": {"peak_rss_mb": memory, "peak_cuda_mb": None}}
            made_run(tmp_path / f"{method}{seed}", method, seed, score, ("own", method, "a"), **more)
    gathered = gather([tmp_path])
    [table] = tables_of(gathered.runs)
    found = fronts(table)
    titles = [title.partition(" over ")[2] for title, _ in found.charts]
    assert titles == ["adapter parameters", "peak memory, MB", "search and fine-tuning, s"]
    assert [row for _, row in found.key] == ["diffora", "lora"] and [name for _, name in found.colours] == sorted(rows)
    size, memory, time = (chart for _, chart in found.charts)
    assert size.count("<polyline") == 4 and "random: 90000, 0.7" in size
    assert "diffora: 120, 0.9" in time  # search and fine-tuning together
    text = page.write(gathered, tmp_path / "out", [tmp_path])[0].read_text()
    assert "What is worth its cost" in text and "<span>2 lora</span>" in text


def test_a_row_whose_search_other_runs_did_has_no_time(tmp_path):
    search = made_run(tmp_path / "elsewhere" / "search", "diffora", 0)
    for i, method in enumerate(("lora", "sora", "random", "diffora")):
        time = {"search_s": 0.0, "finetune_s": 30.0 * (4 - i), "total_s": 200.0}
        settings = {"method": {"selection": str(search / "selection.json")}} if method == "diffora" else None
        made_run(tmp_path / "runs" / method, method, cell=("own", method, "a"), time=time, settings=settings)
    [table] = tables_of(gather([tmp_path / "runs"]).runs)
    ((title, chart),) = fronts(table).charts
    assert title.endswith("search and fine-tuning, s") and "lora: 120, " in chart and "diffora: " not in chart


def test_costs_that_hardly_differ_are_not_compared(tmp_path):
    for i, method in enumerate(("lora", "diffora", "random", "sora")):
        more = {"adapter": 1000 * 2**i, "memory": {"peak_rss_mb": 700.0 + 20 * i, "peak_cuda_mb": None}}
        made_run(tmp_path / method, method, 0, 0.8 + i / 100, ("own", method, "a"), **more)
    [table] = tables_of(gather([tmp_path]).runs)
    titles = [title.partition(" over ")[2] for title, _ in fronts(table).charts]
    assert "adapter parameters" in titles and not any("memory" in title for title in titles)


def test_a_wide_range_of_costs_has_a_logarithmic_axis():
    lines = [charts.Line("a", 0, [(10.0**k, float(k))]) for k in range(5)]
    chart = charts.line_chart(lines, "x", "y", marks=True, log_x=True)
    xs = [float(part.partition('"')[0]) for part in chart.split('cx="')[1:]]
    steps = {round(b - a) for a, b in itertools.pairwise(xs)}
    assert len(steps) == 1
    assert charts.log_ticks(1, 10_000) == [1, 10, 100, 1000, 10_000]
    assert charts.log_ticks(20, 800) == [30, 100, 300] and charts.log_ticks(3, 40) == [3, 10, 30]


def test_rows_with_other_seeds_are_compared_on_the_common_ones(tmp_path):
    for method, size, seeds in (("lora", 1000, range(5)), ("random", 5000, range(5)), ("bitfit", 90_000, [4])):
        for seed in seeds:
            score = 0.7 + seed / 20 + (0.01 if method == "random" else 0)  # seed 4 is the highest for all
            made_run(tmp_path / f"{method}{seed}", method, seed, score, ("own", method, "a"), adapter=size)
    [table] = tables_of(gather([tmp_path]).runs)
    assert [name for _, name in fronts(table).key] == [
        "lora",
        "random",
    ]  # with seed 4 only, bitfit is as good as lora
    made_run(tmp_path / "ia3", "ia3", 9, 0.9, ("own", "ia3", "a"), adapter=10)
    [table] = tables_of(gather([tmp_path]).runs)
    assert not fronts(table).charts  # no seed is in all rows


def test_settings_that_a_chart_of_times_leaves_out_are_counted(tmp_path):
    for i in range(charts.LINES + 3):
        time = {"finetune_s": 60.0, "total_s": 90.0, "step_s": 0.1 * (i + 1)}
        made_run(tmp_path / str(i), "lora", cell=("own", f"row {i:02d}", "a"), time=time)
    [table] = tables_of(gather([tmp_path]).runs)
    assert time_charts(table)[2] == "3 more settings not drawn"
