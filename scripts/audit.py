"""Look up the versions in ``requirements/`` in PyPI's list of known vulnerabilities. `make audit` calls this script.

The exit status is 1 if a version has a known vulnerability, or if only some of the versions could be looked up.
It is 0 if the service cannot be reached at all; a line says so. No vulnerability is ignored.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SKIPPED = "audit skipped: the vulnerability service cannot be reached"


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit status and the lines to print, from the dependencies in pip-audit's JSON.

    A mirror or a proxy may not have PyPI's vulnerability service. Then pip-audit reports every package as unknown and
    exits with 0, so this function tells the two cases apart.
    """
    unknown = [f"{d['name']}: {d['skip_reason']}" for d in dependencies if "skip_reason" in d]
    if not dependencies or len(unknown) == len(dependencies):
        return 0, [f"{SKIPPED} ({unknown[0] if unknown else 'no answer'})"]
    lines = [f"not audited: {line}" for line in unknown]
    for found in dependencies:
        for flaw in found.get("vulns", ()):
            fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
            names = ", ".join([flaw["id"], *flaw.get("aliases", ())])
            lines.append(f"vulnerable: {found['name']} {found['version']}: {names}; fixed in {fixed}")
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
            print(done.stderr, file=sys.stderr)  # the audit itself failed; this does not count as skipped
            return 1
    status, lines = verdict(dependencies)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
