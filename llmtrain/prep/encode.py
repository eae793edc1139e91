"""Documents to token ids: through tiktoken's core where it gives the ids of `tokenizers`, else through `tokenizers`."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.fast_bpe import FastBPE, Untranslatable, translate
from llmtrain.json_text import parse_json
from llmtrain.prep.documents import Document
from llmtrain.prep.fragments import Parts
from llmtrain.prep.mds import token_dtype
from llmtrain.tokenizer import load_raw, special_token, tokenizer_json_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Core = Literal["tiktoken", "tokenizers"]

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_SAMPLE = 300_000  # characters of the user's corpus that both cores must agree on
_SAMPLE_OF_ONE = 20_000  # and so many of one document at most


class Encoder:
    """A tokenizer, and what stands around a document.

    Args:
        name: of a tokenizer.
        eos: the token that ends a document, or None.
        bos: the token that begins a document, or None.
        core: which library merges; `choose_core` says whether tiktoken's may be used.
    """

    def __init__(self, name: str, *, eos: str | None, bos: str | None, core: Core) -> None:
        text, spec = _read(name)
        ids = _ids(spec)
        self.eos = None if eos is None else ids.get(eos)
        self.bos = None if bos is None else ids.get(bos)
        self.vocab_size = max(ids.values()) + 1
        """Largest id plus one (ids may have gaps)."""
        self.dtype = token_dtype(self.vocab_size)
        """Of the ids that come out."""
        self._name = name
        self._fast: FastBPE | None = None
        if core == "tiktoken":
            self._fast = translate(text, self.dtype.type, spec=spec, checked=True)
        self._parts = Parts(self._encode_text)

    @property
    def hard_cuts(self) -> int:
        """Cuts in long documents where ids may have changed, because there was no better place far and wide."""
        return self._parts.hard_cuts

    def encode(self, documents: Sequence[Document]) -> list[NDArray[np.unsignedinteger[Any]]]:
        """Ids of each document, (n,), without BOS and EOS.

        The parts of a long document give its ids when they are joined; a part gives none, or its neighbour's, where
        the cut between them has to be moved.
        """
        texts = [document.text if document.part == "whole" else self._part(document) for document in documents]
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self._slow.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    @cached_property
    def _slow(self) -> "Tokenizer":
        return load_raw(self._name)

    def _part(self, document: Document) -> str:
        if document.part == "first":
            self._parts.start()
        return self._parts.add(document.text, last=document.part == "last")

    def _encode_text(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        if self._fast is not None:
            return self._fast.encode(text)
        return np.array(self._slow.encode(text, add_special_tokens=False).ids, self.dtype)


def open_encoder(name: str, *, eos: bool, bos: bool, core: Core = "tokenizers") -> Encoder:
    """Open a tokenizer for encoding.

    Raises:
        UserError: there is no such tokenizer, or it lacks the EOS or BOS that the recipe asks for.
    """
    tokens = {"eos": special_token(name, "eos") if eos else None, "bos": special_token(name, "bos") if bos else None}
    encoder = Encoder(name, **tokens, core=core)
    for role, wanted, found in (("eos", eos, encoder.eos), ("bos", bos, encoder.bos)):
        if wanted and found is None:
            raise UserError(f"tokenizer {name!r} has no {role}_token: choose another one, or set {role}: false")
    return encoder


def file_digest(name: str) -> str:
    """sha256 of a tokenizer's file.

    Raises:
        UserError: there is no such tokenizer.
    """
    return hashlib.sha256(tokenizer_json_path(name).read_bytes()).hexdigest()


def choose_core(name: str, sample: Iterable[str]) -> tuple[Core, str]:
    """The faster core that gives the ids of `tokenizers` for this tokenizer and this text, and why not the other.

    Args:
        name: of a tokenizer.
        sample: texts of the corpus, from all over it; about half a megabyte is taken.

    Raises:
        UserError: there is no such tokenizer.
    """
    path = tokenizer_json_path(name)
    try:
        fast = translate(path.read_text(encoding="utf-8"))
    except Untranslatable as reason:
        _read(name)  # raises if it is no tokenizer at all
        return "tokenizers", str(reason)
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not a tokenizer.json: {problem!r}") from problem
    left = _SAMPLE
    texts = []
    for text in sample:
        texts.append(text[: min(left, _SAMPLE_OF_ONE)])
        left -= len(texts[-1])
        if left <= 0:
            break
    fast.raw.encode_special_tokens = False
    for text in texts:  # each by itself: `tokenizers` takes 130 bytes for a character
        expected = fast.raw.encode(text, add_special_tokens=False).ids
        if not np.array_equal(fast.encode(text), np.array(expected, np.uint32)):
            return "tokenizers", f"the ids of a document that begins with {text[:40]!r} differ"
    return "tiktoken", ""


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


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """A tokenizer's file, and what it says."""
    path = tokenizer_json_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        spec = parse_json(text)
        _ids(spec)
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not a tokenizer.json: {problem!r}") from problem
    return text, spec


def _ids(spec: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, added tokens included; opening the tokenizer takes several times as long."""
    vocab = spec["model"]["vocab"]
    if not isinstance(vocab, dict):  # Unigram: the id is the position
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in spec.get("added_tokens", [])}}
