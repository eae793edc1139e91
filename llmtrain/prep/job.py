"""What a worker needs to know, on whatever machine it runs."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.local_work import LocalWork
from llmtrain.prep.plan import Plan
from llmtrain.prep.storage import is_remote
from llmtrain.prep.work import PLAN, Work


@dataclass(frozen=True)
class Job:
    """A recipe on its way to its output; small, and pickles."""

    recipe: PrepRecipe
    out: str
    """The output: an absolute path, or a URL."""

    def work(self) -> Work:
        """Where the unfinished output lives."""
        if is_remote(self.out):
            from llmtrain.prep.remote_work import RemoteWork

            return RemoteWork(self.out)
        return LocalWork(Path(self.out))

    def plan(self) -> Plan:
        """The plan, which was written before the first unit of work.

        Raises:
            UserError: there is none.
        """
        plan = unfinished_plan(self.work())
        if plan is None:
            raise UserError(f"{self.out}: there is no plan; it has been finished, or discarded, by somebody else")
        return plan


def unfinished_plan(work: Work) -> Plan | None:
    """The plan of unfinished work, if there is any.

    Raises:
        UserError: it is of another version of llmtrain.
    """
    data = work.read(PLAN)
    try:
        return None if data is None else _parsed(data)
    except ValueError as problem:
        raise UserError(
            f"the unfinished work is of another version of llmtrain ({problem}): finish it with that, or delete the "
            "folder .NAME.partial beside the output (.work below it on a remote storage)"
        ) from problem


@lru_cache(maxsize=1)  # a worker asks for each of its units, and the plan of a large corpus is large
def _parsed(data: bytes) -> Plan:
    return Plan.from_json(data)


def job_of(recipe: PrepRecipe) -> Job:
    """The job of a recipe, wherever its workers stand.

    Raises:
        UserError: the output cannot be a folder there.
    """
    if is_remote(recipe.out):
        return Job(recipe, recipe.out)
    out = Path(recipe.out).expanduser().absolute()
    if out.is_symlink() or out.name in {"", ".."}:
        out = out.resolve()  # what lies beside it, and is renamed to it in the end, belongs beside the folder itself
    if out.is_mount():
        raise UserError(f"out: {out} is where a file system is mounted, and nothing can take its place: add a folder")
    return Job(recipe, str(out))
