"""``report``: a page about finished runs."""

import time

from diffora.errors import called

USAGE = """\
A report of finished runs: one HTML page, and tables as Markdown, LaTeX and CSV.

  {report} outputs                                     all runs, into outputs/report
  {report} outputs/table4_sample_rate-small output=<folder>
  {report} outputs margin=0.3                          differences below 0.3 points do not matter (0.5)

It reads every run.json below the folders. Open index.html of the report in any browser; it needs no server and no
network. docs/how-to/report.md explains what is in it."""


def main(arguments: list[str]) -> None:
    """Write the report that the arguments ask for; without any, print the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(report=called("report")))
        return
    # Imported here because the usage must come at once.
    from diffora.report.page import request, write
    from diffora.report.runs import gather

    began = time.time()
    folders, output, margin = request(arguments)
    gathered = gather(folders)
    page, *tables = write(gathered, output, folders, margin)
    count = f"{len(gathered.runs)} runs" + (f", {len(gathered.broken)} unreadable files" if gathered.broken else "")
    print(f"{page}: {count}, {time.time() - began:.1f} s; {len(tables)} files with tables next to it")
