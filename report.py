"""A report of finished runs: one HTML page, and tables as Markdown, LaTeX and CSV.

  python report.py outputs                                     all runs, into outputs/report
  python report.py outputs/table4_sample_rate-small output=<folder>

It reads every run.json below the folders. Open index.html of the report in any browser; it needs no server and no
network. docs/how-to/report.md explains what is in it.
"""

import sys
import time

from diffora.cli import command


def main() -> None:
    """Write the report that the command line asks for."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    from diffora.report.page import request, write
    from diffora.report.runs import gather

    began = time.time()
    folders, output = request(arguments)
    gathered = gather(folders)
    page, *tables = write(gathered, output, folders)
    count = f"{len(gathered.runs)} runs" + (f", {len(gathered.broken)} unreadable files" if gathered.broken else "")
    print(f"{page}: {count}, {time.time() - began:.1f} s; {len(tables)} files with tables next to it")


if __name__ == "__main__":
    command(main)
