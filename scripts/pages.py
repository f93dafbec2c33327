"""What the scripts share that turn finished runs into a table, a picture and a JSON file of a page."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from diffora.files import write_text
from diffora.report.runs import flat
from diffora.report.statistics import Difference

Run = Mapping[str, Any]


def completed(folder: Path) -> list[dict[str, Any]]:
    """The finished runs below a folder. A line on the screen says so if they are of several versions of the program."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.rglob("run.json"))]
    done = [run for run in runs if run["status"] == "completed"]
    versions = sorted({str(run["git_commit"])[:8] for run in done if run.get("git_commit")})
    if len(versions) > 1:
        print(f"note: runs of {len(versions)} versions of the program: {', '.join(versions)}", file=sys.stderr)
    return done


def checked(runs: Sequence[Run], apart: Sequence[str] | None = None) -> Sequence[Run]:
    """The same runs, if one table may have all of them.

    Args:
        apart: the settings in which the rows of a column may differ; None: in all.

    Raises:
        SystemExit: two runs are of one row, column and seed; the runs of a column have different data; a run has no
            finite main metric; or runs have different settings where they should not. A setting that a run of an older
            version lacks does not count.
    """
    seen: set[tuple[str, str, int]] = set()
    data: dict[str, Any] = {}
    settings: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for run in runs:
        row, column, seed = run.get("row") or "", run.get("column") or "", run["seed"]
        name = f"{column}, {row}, seed {seed}"
        if (row, column, seed) in seen:
            sys.exit(f"error: two runs are {name}: give a folder with one of them")
        seen.add((row, column, seed))
        mains = [f"{split}/{run.get('main_metric')}" for split in ("validation", "test")]
        if lost := [key for key in mains if run.get("metrics", {}).get(key, 0) is None]:
            sys.exit(f"error: {name} has no finite {lost[0]}")
        if data.setdefault(column, run.get("data_hash")) != run.get("data_hash"):
            sys.exit(f"error: {name} has other data than the others")
        for key, value in flat(run.get("settings", {})).items():
            group = (column, "") if apart is not None and key not in apart else (column, row)
            if (other := settings[group].setdefault(key, value)) != value:
                sys.exit(f"error: {name} has {key}={value}, others {key}={other}: give runs of one setting")
    return runs


def merged(first: Any, second: Any, name: str = "") -> Any:
    """The figures of both, level by level. So a table can grow from its JSON file and from new runs.

    Raises:
        SystemExit: both have another value in one place.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        both = dict(first)
        for key, value in second.items():
            both[key] = merged(both[key], value, f"{name}, {key}" if name else str(key)) if key in both else value
        return both
    if first != second:
        sys.exit(f"error: {name} is {first} in one place and {second} in the other: give one of them")
    return first


def settings_of(run: Run, apart: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a run but those in which runs may differ. Figures that keep them can grow (`gathered`)."""
    return {key: value for key, value in flat(run.get("settings", {})).items() if key not in apart}


def gathered(
    paths: Sequence[Path],
    figures_of: Callable[[Sequence[Run]], Any],
    what: str,
    of_file: Callable[[Any], Any] = lambda content: content,
) -> Any:
    """The figures of all finished runs below the folders, and of the JSON files among the paths.

    Raises:
        SystemExit: a folder has no finished run, or there are no figures, or two sources contradict each other.
    """
    files = [path for path in paths if path.suffix == ".json"]
    folders = [path for path in paths if path not in files]
    found = [of_file(json.loads(file.read_text())) for file in files]
    runs = {folder: completed(folder) for folder in folders}
    empty = [folder for folder in folders if not runs[folder]]
    if folders and not empty:
        found.append(figures_of([run for some in runs.values() for run in some]))
    if empty or not all(found):
        sys.exit(f"error: no finished {what} below {', '.join(map(str, empty or paths))}")
    return reduce(merged, found)


def points(found: Difference) -> str:
    """A difference in points with its interval."""
    text = f"{round(100 * found.mean, 3):+.1f}"  # 3 digits as in claims.json, so that both round 22.75 to one figure
    if found.low is not None and found.high is not None:
        text += f" ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return text.replace("-", "−")


def put(page: Path, name: str, text: str) -> None:
    """Put the text between the markers of that name."""
    content = page.read_text()
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in content or end not in content:
        sys.exit(f"error: {page} has no {begin} … {end}")
    before, after = content.partition(begin)[0], content.partition(end)[2]
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def fill(
    words: str | None,
    name: str,
    figures_of: Callable[[Sequence[Run]], Any],
    text_of: Callable[[Any], str],
    picture: Callable[[Any, Path], None] | None = None,
    caption: str = "",
    what: str = "run",
    grows: bool = False,
) -> None:
    """The command line of a script: prints its text; with ``--page`` it also writes text, figures and picture there.

    Args:
        words: the description of the script.
        name: of the markers on the page, of the picture and of the JSON file.
        figures_of: the content of the JSON file, from finished runs.
        text_of: Markdown from that content.
        picture: draws that content into a file; None: the page has no picture.
        caption: of the picture.
        what: what a folder must have, for the message if it has none.
        grows: whether runs may be added to the JSON file, because it has what shows that they belong together.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = "of the runs, or the JSON file that --page wrote from them" + (", or both" if grows else "")
    parser.add_argument("folders", type=Path, nargs="+", help=either)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if not grows and len(given.folders) > 1 and any(path.suffix == ".json" for path in given.folders):
        sys.exit("error: give the JSON file or folders: the file does not say whether other runs belong to its own")
    figures = gathered(given.folders, figures_of, what)
    text = text_of(figures)
    print(text)
    if given.page is not None:
        if picture is not None:
            picture(figures, given.page.parent / "images" / f"{name}.png")
            text += f"\n\n![{caption}](images/{name}.png)"
        write_text(given.page.parent / "data" / f"{name}.json", json.dumps(figures, indent=1) + "\n")
        put(given.page, name, text)
