"""Embeddings that grow, when a tokenizer has more tokens than the model that training starts from. Light."""

from typing import TYPE_CHECKING

from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights

MULTIPLE = 128
"""Grown embeddings have a multiple of so many rows: matrix products of the head are fast then, and shards are even."""
TABLES = ("transformer.wte.weight", "lm_head.weight")


def grown_vocab_size(rows: int, tokens: int) -> int:
    """Rows of the embedding for a tokenizer with ids below `tokens`: as many as there are, or the next multiple."""
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


def grow_embeddings(weights: "Weights", vocab_size: int) -> "Weights":
    """Give the embedding (and the head, where it is not tied) `vocab_size` rows.

    New rows are the mean of the old ones: what is known before training of a token that could be any (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). A random row's logit would be as large as a likely
    token's; the mean's is at most the log-mean-exp of the others.

    Args:
        weights: By MPT's names; not changed.
        vocab_size: Rows to have, a multiple of 128 if that is more than there are.

    Raises:
        UserError: fewer rows than there are, or no multiple of 128.
    """
    from llmtrain.checkpoint.grown import Grown

    rows = weights.shape(TABLES[0])[0]
    if vocab_size == rows:
        return weights
    if vocab_size < rows:
        raise UserError(
            f"model.vocab_size: {vocab_size} is less than the {rows} rows of the weights to start from, and rows are "
            f"not thrown away. Set it to {rows} (a smaller tokenizer leaves the last ones unused)."
        )
    if vocab_size % MULTIPLE:
        raise UserError(
            f"model.vocab_size: {vocab_size} rows, grown from {rows}, must be a multiple of {MULTIPLE}. "
            f"Set it to {grown_vocab_size(rows, vocab_size)}."
        )
    return Grown(weights, TABLES, vocab_size)
