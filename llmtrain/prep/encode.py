"""Documents to token ids, in batches that the tokenizer's threads share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.prep.sources import Document
from llmtrain.tokenizer import load_raw, special_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what stands around a document."""

    tokenizer: "Tokenizer"
    eos: int | None
    bos: int | None

    @property
    def vocab_size(self) -> int:
        """Largest id plus one (ids may have gaps)."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, batch: list[Document]) -> list[NDArray[np.uint32]]:
        """Ids of each document, without BOS and EOS."""
        encodings = self.tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def frame(self, documents: Sequence[NDArray[Any]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Documents joined into one array, (n,), each between BOS and EOS (where there are any), and their lengths."""
        before = np.array([] if self.bos is None else [self.bos], np.uint32)
        after = np.array([] if self.eos is None else [self.eos], np.uint32)
        parts = chain.from_iterable((before, ids, after) for ids in documents)
        lengths = np.array([len(ids) for ids in documents], np.int64) + len(before) + len(after)
        return np.concatenate([np.empty(0, np.uint32), *parts]), lengths


def open_encoder(name: str, *, eos: bool, bos: bool) -> Encoder:
    """Open a tokenizer for encoding.

    Raises:
        UserError: there is no such tokenizer, or it lacks the EOS or BOS that the recipe asks for.
    """
    tokenizer = load_raw(name)
    ids: dict[str, int | None] = {"eos": None, "bos": None}
    for role, wanted in (("eos", eos), ("bos", bos)):
        if wanted:
            text = special_token(name, role)  # type: ignore[arg-type]
            ids[role] = None if text is None else tokenizer.token_to_id(text)
            if ids[role] is None:
                raise UserError(f"tokenizer {name!r} has no {role}_token: choose another one, or set {role}: false")
    return Encoder(tokenizer, eos=ids["eos"], bos=ids["bos"])


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about a megabyte."""
    batch: list[Document] = []
    n_bytes = 0
    for document in documents:
        batch.append(document)
        n_bytes += document.n_bytes
        if n_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
