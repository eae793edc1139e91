"""`make audit`: known vulnerabilities of the installed packages, by pip-audit; or one line that says why not.

Findings that do not concern llmtrain stand in scripts/audit-ignored.txt, each with the reason. Exit codes: 0 nothing
new, or the service could not be asked (a test machine without a network must not fail for it); 1 a finding.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

IGNORED = Path(__file__).with_name("audit-ignored.txt")
LIMIT = 30.0
"""Seconds for the service to answer."""


def ignored(text: str) -> dict[str, str]:
    """Id -> reason: lines `ID  reason`; others are comments.

    Raises:
        SystemExit: an id has no reason.
    """
    found = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = line.strip().partition(" ")
        if not reason.strip():
            raise SystemExit(f"{IGNORED.name}: {name} has no reason")
        found[name] = reason.strip()
    return found


def findings(report: str, known: dict[str, str]) -> list[str]:
    """One line for each finding of pip-audit's JSON that is not among `known`, by its id or another name of it."""
    lines = []
    for package in json.loads(report)["dependencies"]:
        for each in package.get("vulns", ()):
            if known.keys().isdisjoint([each["id"], *each.get("aliases", ())]):
                fixed = ", ".join(each.get("fix_versions", ())) or "no version"
                lines.append(f"{package['name']} {package['version']}: {each['id']}, fixed in {fixed}")
    return lines


def main() -> int:
    """Asks, prints, returns the exit code."""
    known = ignored(IGNORED.read_text(encoding="utf-8"))
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-m", "pip_audit", "--path", packages, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run([*command, "--timeout", "10"], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"audit       not done: the service did not answer within {LIMIT:.0f} s")
        return 0
    try:
        lines = findings(done.stdout, known)
        asked = json.loads(done.stdout)["dependencies"]
        unknown = sum("skip_reason" in package for package in asked)
    except (ValueError, KeyError):
        reason = (done.stderr.strip() or "no answer").splitlines()[-1]
        print(f"audit       not done: {reason[:200]}")
        return 0
    if unknown == len(asked):
        print(f"audit       not done: the service knows none of the {unknown} packages (a mirror without advisories?)")
        return 0
    for line in lines:
        print(f"audit       {line}")
    about = f"{len(asked) - unknown} of {len(asked)} packages looked up"
    print(f"audit       {about}: {len(lines)} finding(s); {len(known)} known are ignored ({IGNORED.name})")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
