"""The record of the best checkpoint, and the link."""

from pathlib import Path

import pytest

from llmtrain.checkpoint.best import Best, forget_best, mend_link, read_best, write_best


def best(name: str, value: float = 1.0) -> Best:
    return Best(checkpoint=name, step=5, monitor="LanguageCrossEntropy", dataloader_label="eval", value=value)


def test_a_run_that_was_killed_between_record_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_best(tmp_path, best("ep0-ba5"), tmp_path / "staging")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_best(tmp_path, best("ep0-ba9"), tmp_path / "staging")
    known = read_best(tmp_path)
    assert known is not None
    assert (known.checkpoint, (tmp_path / "best").readlink()) == ("ep0-ba9", Path("ep0-ba5"))
    mend_link(tmp_path, known)
    assert (tmp_path / "best").readlink() == Path("ep0-ba9")
    forget_best(tmp_path)
    mend_link(tmp_path, known)  # the link alone was lost, in a copy of the run for example
    assert {path.name for path in tmp_path.iterdir()} == {"best", "staging"}
