"""`minhash_dedup`: signatures of documents, by which near copies are found.

The signatures come from rensa, over hashes of n-grams made here. datatrove's own step, the first choice, makes
0.5 MB/s, as it takes n-grams as Python strings of words from spaCy; datasketch, with strings as well, makes 5.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.prep.documents import Document, whole
from llmtrain.prep.stages.config import MinHashDedup
from llmtrain.prep.stages.words import Hashes, WordHashes, mixed, n_grams, words

_AT_ONCE = 256  # documents
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def bucket_names(config: MinHashDedup) -> list[str]:
    """The names of the arrays of a signature, a bucket each."""
    return [f"bucket{number:03}" for number in range(config.num_buckets)]


def sign(config: MinHashDedup, documents: Iterable[Document]) -> dict[str, NDArray[np.uint64]]:
    """For each bucket a hash of the document's hashes in it, uint64 of shape (documents,); 0 without words.

    Raises:
        UserError: rensa is not installed.
    """
    hashes = WordHashes()
    texts = (document.text for document in whole(documents))
    made = [_buckets(config, [_grams(config, hashes, text) for text in some]) for some in _groups(texts)]
    buckets = np.concatenate([np.empty((0, config.num_buckets), np.uint64), *made])
    return {name: buckets[:, number].copy() for number, name in enumerate(bucket_names(config))}


def _grams(config: MinHashDedup, hashes: WordHashes, text: str) -> Hashes:
    hashed = hashes.of(words(text))
    return n_grams(hashed, min(config.n_grams, max(1, len(hashed))))


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(texts, _AT_ONCE)):
        yield some


def _buckets(config: MinHashDedup, grams: list[Hashes]) -> NDArray[np.uint64]:
    """Hashes of shape (documents, buckets)."""
    try:
        from rensa import RMinHash
    except ImportError as problem:
        raise UserError(f"stage {config.name} needs rensa: pip install 'llmtrain[quality]' ({problem})") from problem
    lengths = np.array([len(each) for each in grams], np.uint64)
    offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths, dtype=np.uint64)])
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(grams), offsets, config.num_buckets * config.hashes_per_bucket, config.seed
    )
    values = np.array(signatures.to_rows(), np.uint64).reshape(len(grams), config.num_buckets, -1)
    made = np.zeros(values.shape[:2], np.uint64)
    for row in range(config.hashes_per_bucket):
        made *= _MULTIPLIER
        made += values[:, :, row] + np.uint64(1)
        made = mixed(made)
    made[made == 0] = 1
    made[lengths == 0] = 0
    return made
