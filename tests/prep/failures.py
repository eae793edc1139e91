"""A stage that fails on one document of a corpus, the first time or each time, in whatever process it runs."""

import json
import sys

STAGE = """
import os, pathlib, signal

def careful(text):
    here = pathlib.Path({folder!r})
    order = here / "order"
    if "FAILS" in text and order.exists():
        how = order.read_text()
        if how != "always":
            order.unlink()
        with (here / "failed").open("a") as failed:
            failed.write(how + " ")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("told to fail")
    return True
"""


class FailingStage:
    """The stage, and what it is told: `once`, `always`, or `kill` the process (once)."""

    def __init__(self, corpus, monkeypatch):
        self._folder = corpus.folder
        (corpus.folder / "failing_stage.py").write_text(STAGE.format(folder=str(corpus.folder)))
        with corpus.files[2].open("a") as file:
            file.write(json.dumps({"text": "this document FAILS when it is told to " * 20}) + "\n")
        monkeypatch.chdir(corpus.folder)
        monkeypatch.syspath_prepend(str(corpus.folder))
        sys.modules.pop("failing_stage", None)
        corpus.base["stages"] = [{"name": "function", "function": "failing_stage:careful"}]

    def order(self, how):
        (self._folder / "order").write_text(how)

    def counter_order(self):
        (self._folder / "order").unlink()

    @property
    def failed(self):
        path = self._folder / "failed"
        return path.read_text().split() if path.exists() else []
