"""scripts/audit.py: findings are told, known ones are not, and a reason is asked for."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

REPORT = {
    "dependencies": [
        {"name": "a", "version": "1.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}]},
        {"name": "b", "version": "2.0", "vulns": [{"id": "GHSA-2", "aliases": ["CVE-2"], "fix_versions": []}]},
        {"name": "c", "skip_reason": "not on the index"},
    ]
}


@pytest.fixture
def audit(repository: Path) -> Any:
    spec = importlib.util.spec_from_file_location("audit", repository / "scripts" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_findings_but_for_the_known_ones(audit: Any) -> None:
    assert audit.findings(json.dumps(REPORT), {}) == [
        "a 1.0: PYSEC-1, fixed in 1.1",
        "b 2.0: GHSA-2, fixed in no version",
    ]
    known = audit.ignored("# why\nCVE-1  not reached by us\n")
    assert audit.findings(json.dumps(REPORT), known) == ["b 2.0: GHSA-2, fixed in no version"]


def test_each_known_finding_has_a_reason(audit: Any) -> None:
    with pytest.raises(SystemExit, match="CVE-1 has no reason"):
        audit.ignored("CVE-1\n")
    audit.ignored(audit.IGNORED.read_text())


def test_a_service_that_does_not_answer_is_one_line(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit.sys, "executable", "/bin/false")
    assert audit.main() == 0
    assert capsys.readouterr().out == "audit       not done: no answer\n"


def test_a_service_that_knows_nothing_is_no_clean_bill(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = json.dumps({"dependencies": [{"name": "c", "skip_reason": "not on the index"}]})

    class Done:
        stdout, stderr = skipped, ""

    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **kwargs: Done)
    assert audit.main() == 0
    assert "not done: the service knows none of the 1 packages" in capsys.readouterr().out
    Done.stdout = json.dumps(REPORT)
    assert audit.main() == 1
    assert "2 of 3 packages looked up: 2 finding(s)" in capsys.readouterr().out
