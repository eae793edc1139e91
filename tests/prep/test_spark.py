import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from llmtrain.errors import UserError
from llmtrain.prep.engines.remote_unit import Mistake, Unit, mistake_in
from llmtrain.prep.engines.spark import SparkEngine
from llmtrain.prep.job import Job
from llmtrain.prep.partition import make_partition
from llmtrain.prep.run import Options
from tests.prep.failures import FailingStage

pytest.importorskip("pyspark", reason="the extra [spark] is not installed")
needs_java = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="Spark needs Java"
)

SPARK = Options(engine="spark", master="local[2]")


@needs_java
@pytest.mark.slow
def test_the_output_is_the_local_engines(corpus, digest):
    """With a stage that needs a pass of its own before."""
    corpus.base["stages"] = [{"name": "exact_dedup"}]
    with corpus.files[3].open("a") as file:
        file.write(corpus.files[0].read_text())
    corpus.make(SPARK)
    assert digest(corpus.out) == corpus.reference()
    assert "nothing to do" in corpus.make(SPARK)[1]


@needs_java
@pytest.mark.slow
def test_a_lost_worker_leaves_no_trace(corpus, digest, monkeypatch):
    stage = FailingStage(corpus, monkeypatch)
    reference = corpus.reference()
    stage.order("kill")
    corpus.make(SPARK)
    assert stage.failed == ["kill"]
    assert digest(corpus.out) == reference


@pytest.mark.long
@needs_java
@pytest.mark.slow
def test_what_fails_each_time_is_the_users_message_and_the_rerun_goes_on(corpus, digest, monkeypatch):
    stage = FailingStage(corpus, monkeypatch)
    reference = corpus.reference()
    stage.order("always")
    with pytest.raises(UserError, match=r"2\.jsonl.*stage function failed: OSError: told to fail"):
        corpus.make(SPARK)
    assert len(stage.failed) == 4
    assert not corpus.out.exists()
    done = corpus.finished_shards()
    stage.counter_order()
    corpus.make(Options(processes=1))  # another engine goes on where Spark stopped
    assert digest(corpus.out) == reference
    assert done
    assert all((corpus.out / name).stat().st_mtime_ns == time for name, time in done.items())


@needs_java
@pytest.mark.slow
@pytest.mark.long
def test_workers_import_llmtrain_prep_alone(corpus, tmp_path):
    """Of the heavy libraries, nothing that a worker did not need to tokenise."""
    (tmp_path / "look.py").write_text(
        "import pathlib, sys\n"
        "def look(number, advance=None):\n"
        "    import llmtrain.prep.partition\n"
        "    heavy = {'torch', 'streaming', 'composer', 'transformers', 'datasets'} & set(sys.modules)\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'seen-{{number}}').write_text(repr(sorted(heavy)))\n"
        "    advance(7)\n"
    )
    code = (
        "import sys; sys.path.insert(0, '.'); import look; from llmtrain.prep.engines.spark import SparkEngine\n"
        "done = []; SparkEngine('local[2]').map(look.look, range(3), done.append); print(sum(done))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "21"
    assert [(tmp_path / f"seen-{number}").read_text() for number in range(3)] == ["[]"] * 3


@needs_java
def test_a_master_that_does_not_answer_or_does_not_exist_is_named(corpus):
    with pytest.raises(UserError, match="--master nonsense"):
        corpus.make(Options(engine="spark", master="nonsense"))
    assert not corpus.partial.exists()


def test_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match=r"Java 17.*no `java` in PATH"):
        SparkEngine(None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no bin/java"):
        SparkEngine(None)


def test_without_pyspark(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[spark\]'"):
        SparkEngine(None)


def test_a_worker_that_does_not_see_the_output_says_so(corpus, tmp_path):
    """As on another machine: the plan was written, but not to this disk."""
    unit = Unit.of(partial(make_partition, Job(corpus.recipe(), str(tmp_path / "not-mounted" / "out"))))
    with pytest.raises(Mistake) as raised:
        unit(0)
    mistake = mistake_in(f"py4j: Traceback ...\n{raised.value}\n\tat org.apache.spark")
    assert "does not see the unfinished output of" in str(mistake)
    assert "not-mounted/out" in str(mistake)


def test_a_message_travels_through_a_traceback():
    message = 'line 1 "quoted" \\ back\nline 2 – ünïcode'
    assert str(mistake_in(f"before {Mistake(message)} after")) == message
    assert mistake_in("org.apache.spark.SparkException: Job aborted") is None
