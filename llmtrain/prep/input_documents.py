"""The documents of a partition."""

from collections.abc import Callable, Iterator
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.prep.documents import Document
from llmtrain.prep.job import Job
from llmtrain.prep.plan import Partition
from llmtrain.prep.readers import BadInput, read_piece

_REPORT_BYTES = 1 << 20


def documents_of(
    job: Job, number: int, bad: BadInput, advance: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """The documents of a partition, or parts of long ones, in their order.

    Args:
        job: planned.
        number: of the partition.
        bad: takes note of what cannot be read.
        advance: is called with bytes of text as they are read.

    Raises:
        UserError: `bad` raises it; or an input has changed since the work was planned.
    """
    partition = job.plan().partitions[number]
    _refuse_changed(partition)
    source = job.recipe.sources[partition.source]
    n_bytes = 0
    for piece in partition.pieces:
        for document in read_piece(source, piece, bad):
            yield document
            n_bytes += document.n_bytes
            if advance is not None and n_bytes >= _REPORT_BYTES:
                advance(n_bytes)
                n_bytes = 0
    _refuse_changed(partition)  # while it was read
    if advance is not None:
        advance(n_bytes)


def _refuse_changed(partition: Partition) -> None:
    """A local file that was touched since the plan was made; its size is looked at by whoever opens it."""
    for piece in partition.pieces:
        for file in piece.files:
            path = Path(file.path)
            if "://" not in file.path and path.is_file() and path.stat().st_mtime_ns != file.mtime:
                raise UserError(
                    f"{path} has changed since the work was planned. Start again from the beginning: --overwrite"
                )
