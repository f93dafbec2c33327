"""Looks up the versions in ``requirements/`` in PyPI's list of known vulnerabilities; ``make audit`` calls it.

The status is 1 if a version has a known vulnerability, or if some versions could not be looked up while others could.
It is 0, with a line that says so, if the service cannot be reached at all. No vulnerability is ignored.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SKIPPED = "audit skipped: the vulnerability service cannot be reached"


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The status and the lines to print, from the dependencies in pip-audit's JSON.

    Where PyPI's vulnerability service is not served (a mirror, a proxy), pip-audit reports every package as unknown,
    and by itself calls that a success.
    """
    unknown = [f"{d['name']}: {d['skip_reason']}" for d in dependencies if "skip_reason" in d]
    if not dependencies or len(unknown) == len(dependencies):
        return 0, [f"{SKIPPED} ({unknown[0] if unknown else 'no answer'})"]
    lines = [f"not audited: {line}" for line in unknown]
    for found in dependencies:
        for flaw in found.get("vulns", ()):
            mended = ", ".join(flaw["fix_versions"]) or "no version yet"
            names = ", ".join([flaw["id"], *flaw.get("aliases", ())])
            lines.append(f"vulnerable: {found['name']} {found['version']}: {names}; mended in {mended}")
    return (1, lines) if lines else (0, [f"{len(dependencies)} packages audited, no known vulnerability"])


def main() -> int:
    lists = [f"--requirement={file}" for file in sorted((REPO / "requirements").glob("*.txt"))]
    flags = ["--disable-pip", "--require-hashes", "--format=json", "--progress-spinner=off", "--timeout=15"]
    done = subprocess.run([sys.executable, "-m", "pip_audit", *lists, *flags], capture_output=True, text=True)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if "ConnectionError" in done.stderr or "ServiceError" in done.stderr or "Timeout" in done.stderr:
            dependencies = []
        else:
            print(done.stderr, file=sys.stderr)  # a fault of the audit itself is no skip
            return 1
    status, lines = verdict(dependencies)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
