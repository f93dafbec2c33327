"""The report as a user sees it: the command, and its page in a browser."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO
from made_runs import made_run

USER = """
<script>{
const seen = {};
const heads = table => [...document.querySelectorAll(table + " thead tr:last-child th")];
const head = (table, name) => heads(table).find(th => th.textContent === name);
const cells = (table, i) => [...document.querySelectorAll(table + " tbody tr")].map(row => row.cells[i].textContent);
const at = name => [...head("#runs", name).parentElement.children].indexOf(head("#runs", name));
seen.all = cells("#runs", at("seed")).length;
head("#runs", "dev_best").click();
seen.ascending = cells("#runs", at("dev_best"));
head("#runs", "dev_best").click();
seen.descending = cells("#runs", at("dev_best"));
const filter = document.getElementById("filter");
filter.value = "RANDOM seed3"; filter.dispatchEvent(new Event("input"));
seen.filtered = cells("#runs", at("setting"));
seen.count = document.getElementById("count").textContent;
filter.value = ""; filter.dispatchEvent(new Event("input"));
const status = document.getElementById("status");
status.value = "failed"; status.dispatchEvent(new Event("change"));
seen.failed = cells("#runs", at("status"));
status.value = ""; status.dispatchEvent(new Event("change"));
document.getElementById("more").click();
seen.more = cells("#runs", 0).length;
head("table.sortable", "dev_best").click();
seen.table = cells("table.sortable", 3).map(parseFloat);
for (const name of ["search", "total"]) for (const way of ["up", "down"]) {
  head("table.sortable", name).click();
  const at = heads("table.sortable").indexOf(head("table.sortable", name));
  seen[name + way] = cells("table.sortable", at).slice(0, 6);  // of the first table
}
seen.title = document.querySelector("section h2").textContent;
seen.fits = document.documentElement.scrollWidth <= window.innerWidth;
document.body.dataset.seen = JSON.stringify(seen);
}</script>
"""

SEARCH = {("diffora", 2): 9000.0, ("diffora", 4): 23.0, ("random", 2): 0.0, ("random", 4): 0.0}
SEARCH |= {("lora", 2): 0.0, ("lora", 4): 0.0}
TOTAL = dict(zip(SEARCH, (9060.0, 119.0, 60.0, 1200.0, 45.0, 180.0), strict=True))


def command(*arguments, expect=0):
    done = subprocess.run(
        [sys.executable, "report.py", *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of 126 runs."""
    folder = tmp_path_factory.mktemp("runs")
    for i, method in enumerate(("diffora", "random", "lora")):
        for rank in (2, 4):
            for seed in range(20):
                score = 0.7 + (i * 7 + seed * 3 + rank) % 11 / 100
                time = {"search_s": SEARCH[method, rank], "total_s": TOTAL[method, rank]}
                made_run(
                    folder / f"{method}{rank}-seed{seed}-", method, seed, score, settings={"rank": rank}, time=time
                )
    for seed in range(5):
        made_run(folder / f"failed{seed}", seed=seed, status="failed", error="out of memory </script> <b>")
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text("{")
    out = command(folder, f"output={folder / 'report'}")
    assert "125 runs, 1 unreadable files" in out
    return folder / "report"


def test_the_command_writes_page_and_tables(made):
    assert (made / "index.html").read_text().startswith("<!doctype html>")
    names = {path.name for path in (made / "tables").iterdir()}
    assert {
        f"runs-paraphrase-tiny{end}"
        for end in (".md", ".tex", ".csv", "-agreement.csv", "-cost.csv", "-comparisons.csv")
    } == names
    assert (made / "runs.csv").read_text().count("\n") == 126


def test_a_mistake_gets_one_message(tmp_path):
    assert command(tmp_path, expect=1).startswith(f"error: no run.json below {tmp_path}")
    assert not list(tmp_path.iterdir())


def test_the_page_is_one_file_without_network(made):
    html = (made / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"#]*)"', html)
    assert {link.partition("/")[0] for link in links} <= {"tables", "runs.csv", "data:,"}
    assert "http" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_the_page_sorts_and_filters_in_a_browser(made, tmp_path):
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    page = tmp_path / "page.html"
    page.write_text((made / "index.html").read_text().replace("</body>", USER + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=390,900"
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<body data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[:2000] + done.stderr
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["all"] == 100 and seen["more"] == 125
    values = [float(text) for text in seen["ascending"] if text]
    assert values == sorted(values) and values[0] == 0.7
    values = [float(text) for text in seen["descending"] if text]
    assert values == sorted(values, reverse=True) and values[0] == 0.8
    assert set(seen["filtered"]) == {"random, r = 2", "random, r = 4"} and seen["count"] == "2 of 125 runs"
    assert seen["failed"] == ["failed"] * 5
    means = seen["table"][:6]  # those of the first table
    assert means == sorted(means) and len(set(means)) > 3
    assert seen["searchup"] == ["23 s", "2.5 h", "", "", "", ""]
    assert seen["searchdown"] == ["2.5 h", "23 s", "", "", "", ""]  # empty cells come last in both directions
    assert seen["totalup"] == ["45 s", "60 s", "119 s", "3 min", "20 min", "2.5 h"]
    assert seen["totaldown"] == seen["totalup"][::-1]
    assert seen["title"] == "Which method is better here?"
    assert seen["fits"]  # wide tables scroll within themselves


def test_a_report_imports_nothing_large(made, tmp_path):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "runpy.run_path('report.py', run_name='__main__')\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    made_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", code, "report.py", str(tmp_path), f"output={tmp_path / 'out'}"],
        cwd=REPO, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "diffora" in loaded and not loaded & {"torch", "lightning", "transformers", "matplotlib", "pandas", "wandb"}
