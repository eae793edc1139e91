"""A small corpus of real text, with its tokenizer and shards, in about a second: for tests of everything behind it."""

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llmtrain.prep.config import PrepRecipe, PrepTokenizer, SourceConfig, TokenizerTraining
from llmtrain.prep.run import run


@dataclass(frozen=True)
class TinyCorpus:
    """Where things are."""

    tokenizer: Path
    """Folder that `AutoTokenizer.from_pretrained` opens."""
    train: Path
    """Folder of MDS shards."""
    val: Path
    """Folder of MDS shards."""
    vocab_size: int
    """Ids of the tokenizer, special tokens included."""
    eos_token_id: int
    """What the documents end with."""
    tokenizer_fingerprint: str
    """As `llmtrain.tokenizer.fingerprint` gives it."""
    val_unigram_entropy: float
    """Entropy of the tokens of `val`, in nats."""


def tiny_corpus(out: Path, *, seq_len: int = 64, vocab_size: int = 512, max_bytes: int = 300_000) -> TinyCorpus:
    """Prepare Python's language reference (one document a topic, a tenth of them for validation).

    Args:
        out: folder to make; the same call a second time finds it done.
        seq_len: tokens in a row.
        vocab_size: of the byte-level BPE tokenizer that is trained, at least 257.
        max_bytes: text to read; there are about 700,000.
    """
    recipe = PrepRecipe(
        out=str(out),
        max_seq_len=seq_len,
        tokenizer=PrepTokenizer(train=TokenizerTraining(vocab_size=vocab_size, max_bytes=max_bytes)),
        sources=[
            SourceConfig(
                name="python-reference",
                files=["{stdlib}/pydoc_data/topics.py"],
                format="python_literals",
                max_bytes=max_bytes,
            )
        ],
        val_fraction=0.1,
    )
    made = run(recipe, Console(file=io.StringIO()))
    return TinyCorpus(
        tokenizer=out / "tokenizer",
        train=out / "train",
        val=out / "val",
        vocab_size=made["vocab_size"],
        eos_token_id=made["eos_token_id"],
        tokenizer_fingerprint=made["tokenizer_fingerprint"],
        val_unigram_entropy=made["splits"]["val"]["unigram_entropy_nats"],
    )
