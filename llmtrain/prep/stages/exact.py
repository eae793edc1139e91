"""`exact_dedup`: documents with the same text, found by 128 bits of hash."""

from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.prep.documents import Document, whole
from llmtrain.prep.stages.config import ExactDedup


def sign(config: ExactDedup, documents: Iterable[Document]) -> dict[str, NDArray[np.uint64]]:
    """Two halves of a hash for each document, uint64 of shape (documents,) each.

    A document may come in parts; with `ignore` they are put together: what is left out decides where it is cut.
    """
    digests = bytearray()
    unfinished = None
    for document in whole(documents) if config.ignore else documents:
        if unfinished is None:
            unfinished = xxhash.xxh3_128()
        unfinished.update(_compared(config, document.text).encode("utf-8", "surrogatepass"))
        if document.part in ("whole", "last"):
            digests += unfinished.digest()
            unfinished = None
    halves = np.frombuffer(bytes(digests), ">u8").astype(np.uint64).reshape(-1, 2)
    return {"high": halves[:, 0].copy(), "low": halves[:, 1].copy()}


def _compared(config: ExactDedup, text: str) -> str:
    if "whitespace" in config.ignore:
        text = " ".join(text.split())
    return text.casefold() if "case" in config.ignore else text
