"""Loss of answers: a fine-tuning loader's examples one by one, of which the trained tokens are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.batch import IGNORE
from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.data.finetuning.mask_check import check_template
from llmtrain.data.finetuning.prepare import prepare
from llmtrain.data.finetuning.sources import open_sources
from llmtrain.data.finetuning.store import ExampleStore, default_cache_dir
from llmtrain.data.finetuning.tokenize import ExampleTokenizer
from llmtrain.errors import UserError
from llmtrain.tokenizer import with_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Examples of one loader, each a row of its own. Packing them, as training does, gives the same losses."""

    stores: Sequence[ExampleStore]
    """Their tokens and masks, by source."""
    places: Sequence[tuple[int, int]]
    """Of each: source, and number in it."""
    lengths: Sequence[int]
    """Tokens of each."""

    def read(self, number: int) -> tuple[Ids, Ids]:
        """Ids and labels of an example, (tokens,) each; IGNORE where a token is not trained."""
        source, example = self.places[number]
        ids = self.stores[source].ids(example).astype(np.int64)
        return ids, np.where(self.stores[source].trained(example), ids, IGNORE)

    def source_of(self, number: int) -> str:
        """Where an example comes from."""
        return self.stores[self.places[number][0]].report.source

    @property
    def sources(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys(store.report.source for store in self.stores))

    def first(self, n: int | None) -> "Examples":
        """The first n; None is all."""
        return Examples(self.stores, self.places[:n], self.lengths[:n])


def open_examples(cfg: FinetuningLoaderConfig, tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> Examples:
    """Tokenize a loader's examples, or find those of an earlier run (a collective call).

    Raises:
        UserError: the data cannot be read, does not fit the model, or has no answer.
    """
    data = cfg.dataset
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    tokenizer = with_chat_template(tokenizer)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: with ChatML, which conversations need where a tokenizer has no template, it "
            f"has {len(tokenizer):,} tokens, and the model {vocab_size:,} embeddings"
        )
    tokenize = ExampleTokenizer(
        tokenizer,
        max_seq_len=data.max_seq_len,
        target_prompts=data.target_prompts,
        target_responses=data.target_responses,
        long_examples=data.long_examples,
    )
    sources = partial(open_sources, data, cache / "shards")
    check = partial(check_template, tokenizer)
    stores = prepare(sources, tokenize, cache=cache, vocab_size=vocab_size, strict=data.strict, check=check)
    places = [(number, example) for number, store in enumerate(stores) for example in range(len(store))]
    lengths = [int(length) for store in stores for length in store.lengths]
    return Examples(stores, places, lengths)
