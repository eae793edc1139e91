"""Apache Spark as engine: it says which executor does which unit of work, and tries those again that fail."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.prep.engines import Task
from llmtrain.prep.engines.remote_unit import Unit, mistake_in
from llmtrain.prep.engines.watch import watched

_TRIES = 4  # Spark's own number on a cluster; on one machine it would try once


class SparkEngine:
    """Runs units of work as the tasks of one Spark job.

    Spark may run a unit twice (a lost executor, a speculative copy): it is idempotent, so that does no harm. Executors
    import `llmtrain.prep`, so llmtrain is installed on each of them, in the Python that PYSPARK_PYTHON names; by
    default that is the path of this very interpreter.

    Args:
        master: `local[2]`, `spark://HOST:7077`, `yarn`, ...; by default what spark-defaults.conf says, or `local[*]`.

    Raises:
        UserError: pyspark or Java is not installed.
    """

    def __init__(self, master: str | None) -> None:
        # It concerns its data frames, which nothing here uses.
        warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
        try:
            import pyspark  # noqa: F401
        except ImportError as problem:
            raise UserError(
                f"--engine spark needs PySpark ({problem}), in the cluster's version: pip install 'llmtrain[spark]'"
            ) from problem
        _require_java()
        self._master = master

    def map(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """See `Engine`. `advance` learns of bytes when a unit is done.

        Raises:
            UserError: a unit raised it each time it was tried, or Spark cannot be started or reached.
            RuntimeError: a unit raised another exception; with Spark's account of it.
        """
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        try:
            with _context(self._master) as context:
                done = context.accumulator(0)
                units = context.parallelize(numbers, len(numbers))
                with watched(lambda: int(done.value), advance):
                    units.foreachPartition(_Tasks(Unit.of(task), done))
        except (Py4JError, PySparkException) as problem:
            mistake = mistake_in(str(problem))
            if mistake is not None:
                raise mistake from problem
            raise RuntimeError(f"Spark gave up:\n{problem}") from problem


class _Tasks:
    """What an executor does with the units of one Spark task."""

    def __init__(self, unit: Unit, done: Any) -> None:
        self._unit = unit
        self._done = done

    def __call__(self, numbers: Iterable[int]) -> Iterator[None]:
        for number in numbers:
            self._done.add(self._unit(number))
        return iter(())


@contextmanager
def _context(master: str | None) -> Iterator[Any]:
    """A Spark context, or the one that this process has (in a notebook), which then stays."""
    from pyspark import SparkConf, SparkContext

    if SparkContext._active_spark_context is not None:
        yield SparkContext._active_spark_context
        return
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setIfMissing("spark.app.name", "llmtrain prep")
    conf.setIfMissing("spark.ui.showConsoleProgress", "false").setIfMissing("spark.log.level", "ERROR")
    if master is not None and master.startswith("local"):
        master = _with_tries(master)
        # Nothing outside has to reach it, and the machine's name need not resolve.
        conf.setIfMissing("spark.driver.host", "127.0.0.1").setIfMissing("spark.driver.bindAddress", "127.0.0.1")
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        conf.setIfMissing("spark.ui.enabled", "false")
    if master is not None:
        conf.setMaster(master)
    try:
        context = SparkContext(conf=conf)
    except Exception as problem:  # Java's and Py4J's, of many kinds
        first = next((line for line in str(problem).splitlines() if "xception" in line), str(problem).split("\n")[0])
        raise UserError(
            f"Spark cannot be started{f' with --master {master}' * (master is not None)}: {first.strip()}"
        ) from problem
    try:
        yield context
    finally:
        context.stop()


def _with_tries(master: str) -> str:
    """`local[2]` as `local[2,4]`: two cores, and four tries for each task, as on a cluster."""
    cores = master.removeprefix("local").strip("[]") or "1"
    return master if "," in cores or "cluster" in cores else f"local[{cores},{_TRIES}]"


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if home is not None and (Path(home) / "bin" / "java").is_file():
        return
    if home is None and shutil.which("java") is not None:
        return
    where = f"JAVA_HOME is {home}, which has no bin/java" if home is not None else "there is no `java` in PATH"
    raise UserError(f"--engine spark needs Java 17 or newer, and {where} (Debian, Ubuntu: openjdk-17-jre-headless)")
