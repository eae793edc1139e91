"""MPT: a decoder-only transformer with ALiBi (or learned or rotary positions) and, mostly, tied embeddings.

Parameter names are those of llm-foundry's checkpoints, of the released MPT weights and of transformers' MptForCausalLM.
There are no buffers: positions and biases are computed in each forward.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.errors import UserError
from llmtrain.model import alibi
from llmtrain.model.block import Block
from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.documents import PADDING, causality_is_enough, documents_of, positions_in
from llmtrain.model.init import init_module
from llmtrain.model.kernels.interface import Attention, Visibility
from llmtrain.model.kernels.select import Choice, select
from llmtrain.model.loss import IGNORED, chunked_cross_entropy, shift, soft_cap
from llmtrain.model.norm import build_norm
from llmtrain.model.rotary import Rotation, rotation
from llmtrain.model.sequence_parallel import ParallelAttention, SequenceParallel

log = logging.getLogger(__name__)


class MPTOutput(NamedTuple):
    """What a forward returns (a NamedTuple, because FSDP2 looks for tensors in pytrees only)."""

    logits: Tensor | None = None
    """(batch, T, vocab_size), without labels only."""
    loss: Tensor | None = None
    """Mean over the targets, 0 if there are none; with labels only, as all that follow."""
    loss_sum: Tensor | None = None
    """Sum over the targets."""
    n_targets: Tensor | None = None
    """Number of targets, int64."""
    n_correct: Tensor | None = None
    """Number of targets that have the largest logit, int64; in evaluation mode only."""
    token_losses: Tensor | None = None
    """(batch, T), when asked for: at t the loss of predicting token t + 1, 0 where ignored; not differentiable. Whole
    under sequence parallelism as well, where the sums are of this rank's slice."""
    token_correct: Tensor | None = None
    """(batch, T) bool, beside `token_losses` in evaluation mode: at t whether token t + 1 had the largest logit, False
    where ignored. None under sequence parallelism."""


class LMHead(nn.Linear):
    """An untied head; a module of its own, so that FSDP gathers its weight when it is called."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None, *, softcap: float | None = None, token_losses: bool = False
    ) -> MPTOutput:
        """Logits or loss of (batch, T, d_model) hidden states."""
        return logits_or_loss(
            hidden, self.weight, targets, count_correct=not self.training, softcap=softcap, token_losses=token_losses
        )


def logits_or_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    count_correct: bool,
    softcap: float | None = None,
    token_losses: bool = False,
) -> MPTOutput:
    """The logits, or with targets (-100 where ignored) the loss, without ever holding all logits."""
    if targets is None:
        logits = F.linear(hidden, weight)
        return MPTOutput(logits=logits if softcap is None else soft_cap(logits, softcap))
    sums = chunked_cross_entropy(
        hidden, weight, targets, count_correct=count_correct, per_token=token_losses, softcap=softcap
    )
    return MPTOutput(None, sums.loss_sum / sums.n_targets.clamp(min=1), *sums)


class Transformer(nn.Module):
    """Token ids (batch, T) -> hidden states (batch, T, d_model) after the last norm."""

    def __init__(self, config: MPTConfig, device: Any = None) -> None:
        super().__init__()
        self.config = config
        d, attn = config.d_model, config.attn_config
        self.slopes = tuple(alibi.slopes(config.n_heads, attn.alibi_bias_max)) if attn.alibi else None
        self.window = attn.sliding_window_size if attn.sliding_window_size > 0 else None
        self.choice: Choice | None = None
        self.wte = nn.Embedding(config.vocab_size, d, device=device)
        if config.uses_learned_positions:
            self.wpe = nn.Embedding(config.max_seq_len, d, device=device)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer, device) for layer in range(config.n_layers))
        self.norm_f = build_norm(config.norm_type, d, eps=config.norm_eps, bias=not config.no_bias, device=device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        ranks: SequenceParallel | None = None,
    ) -> Tensor:
        """See MPT.forward; `documents` (batch, T) are numbers of packed documents, -1 at padding.

        With `ranks` the inputs are whole sequences and the result is this rank's slice.
        """
        past = cache.length if cache is not None else 0
        padding = None if attention_mask is None or documents is not None else attention_mask.bool()
        # Padding on the right only: causality hides it, and it moves no positions.
        if padding is not None and bool((padding[:, 1:] <= padding[:, :-1]).all()):
            padding = None
        x = self.wte(input_ids if ranks is None else ranks.part(input_ids, 0))
        own, positions = slice(None), None
        if self.config.uses_learned_positions or self.config.attn_config.rope:
            positions = _positions(input_ids, padding, past, documents)
            if ranks is not None:
                own, positions = ranks.tokens(input_ids.shape[1]), ranks.positions(positions)
        if positions is not None and self.config.uses_learned_positions:
            self._check_learned_positions(past + input_ids.shape[1])
            x = x + self.wpe(positions[..., own])
        fraction = self.config.embedding_fraction
        if fraction != 1.0:
            x = x * fraction + x.detach() * (1.0 - fraction)
        x = self.emb_drop(x)
        turn = None
        if positions is not None and self.config.attn_config.rope:
            coming = 0 if cache is None else cache.coming
            turn = rotation(self.config, positions, x.dtype, coming).part(own)
        attend = self._attention(x, padding, documents, turn, cache, ranks)
        for block in self.blocks:
            x = block(x, attend, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm_f(x)  # type: ignore[no-any-return]

    def _attention(
        self,
        x: Tensor,
        padding: Tensor | None,
        documents: Tensor | None,
        turn: Rotation | None,
        cache: KVCache | None,
        ranks: SequenceParallel | None,
    ) -> Attention:
        """The kernel with its bias, and the rotation of queries and keys, once for all layers."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        n_queries, slopes = x.shape[1], self.slopes
        if ranks is not None:
            n_queries, slopes = n_queries * ranks.degree, ranks.slopes(slopes, self.config.kv_heads)
            padding = None if padding is None else ranks.padded(padding, False)
            documents = None if documents is None else ranks.padded(documents, PADDING)
        n_keys = n_queries if cache is None else cache.n_keys(n_queries)
        if documents is not None and causality_is_enough(documents):
            documents = None
        seen = Visibility(
            n_queries,
            n_keys,
            x.device,
            dtype,
            slopes=slopes,
            padding=None if padding is None else padding[:, -n_keys:],
            documents=documents,
            window=self._window(n_keys),
            skip_far_keys=self.config.attn_config.alibi_window == "exact",
        )
        choice = self._select(seen)
        if choice != self.choice:
            self.choice = choice
            log.info(choice.reason)
        if ranks is not None:
            return ParallelAttention(choice.kernel, choice.kernel.prepare(seen), turn, ranks)
        return Attention(choice.kernel, choice.kernel.prepare(seen), turn)

    def _window(self, n_keys: int) -> int | None:
        """The sliding window, where there are keys outside of it."""
        return self.window if self.window is not None and self.window < n_keys - 1 else None

    def expected_choice(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """The kernel that training on sequences of `max_seq_len` tokens will use, q, k and v being of that dtype."""
        n = self.config.max_seq_len
        documents = torch.zeros(1, n, dtype=torch.int64) if self.config.attn_config.attn_uses_sequence_id else None
        seen = Visibility(n, n, device, dtype, slopes=self.slopes, documents=documents, window=self._window(n))
        return self._select(seen)

    def _select(self, seen: Visibility) -> Choice:
        attn = self.config.attn_config
        return select(
            attn.attn_impl,
            seen,
            dropout=self.training and attn.attn_pdrop > 0,
            softcap=attn.attn_logit_softcapping is not None,
            flex_backend=attn.flex_backend,
        )

    def _check_learned_positions(self, n: int) -> None:
        if n > self.config.max_seq_len:
            raise UserError(
                f"max_seq_len: {self.config.max_seq_len} learned positions cannot take {n} tokens; "
                "shorten the input (a model with ALiBi or rotary positions has no such limit)"
            )


def _positions(input_ids: Tensor, padding: Tensor | None, past: int, documents: Tensor | None) -> Tensor:
    """Positions (T,) or (batch, T) count real tokens, in each document anew: padding on the left moves nothing."""
    if documents is not None:
        return positions_in(documents)
    if padding is None:
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    return (padding.cumsum(1) - 1).clamp(min=0)[:, past:]


class MPT(nn.Module):
    """The language model: `transformer`, and `lm_head` when embeddings are not tied.

    `device` is where the parameters are made, by default the CPU; on "meta" they stay without values, and
    `param_init_fn`, called for each module after sharding, gives them some. Elsewhere they are initialised here.

    Attributes:
        ranks: the ranks that share each sequence, when the loss is computed; they get the same batch. The sums of a
            forward are then of this rank's slice, and the mean of the ranks' `loss` is that of the whole sequences.
            Logits, and all that has a cache, each rank computes whole.
    """

    def __init__(self, config: MPTConfig, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.ranks: SequenceParallel | None = None
        device = torch.device(device or "cpu")
        # Made on meta first, so that torch's own initialisation of each layer costs nothing.
        self.transformer = Transformer(config, "meta")
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config.d_model, config.vocab_size, bias=False, device="meta")
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        cache: KVCache | None = None,
        last_logits: bool = False,
        token_losses: bool = False,
    ) -> MPTOutput:
        """Logits, or with labels the loss.

        Args:
            input_ids: (batch, T) int64; with a cache, only the tokens that it has not seen.
            labels: (batch, T) int64, a copy of the input_ids with -100 where the loss does not count; shifted here.
            attention_mask: (batch, T, or cached + T), nonzero for real tokens. Right padding may be left out of it.
            sequence_id: (batch, T) document numbers, -1 at padding. With `attn_uses_sequence_id` a token sees its own
                document only, learned positions start over in each, and a row is the same function as its documents
                one by one. Without it, as with llm-foundry, it is not used: attention crosses documents. None is one
                document a row in either case.
            cache: keys and values of earlier forwards; extended here. Not together with documents in a row.
            last_logits: logits of the last position only, (batch, 1, vocab_size): what generation needs of a prompt.
            token_losses: with labels, also give the loss at each position (`MPTOutput.token_losses`).

        Raises UserError for more tokens than the kernel or the learned positions can take, ValueError for a mask or
        documents of another shape, for a prompt padded on the right together with a cache, and for documents with one.
        """
        past = cache.length if cache is not None else 0
        if attention_mask is not None and attention_mask.shape != (len(input_ids), past + input_ids.shape[1]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, cached + new tokens) = "
                f"({len(input_ids)}, {past + input_ids.shape[1]})"
            )
        if cache is not None and past == 0 and attention_mask is not None:
            seen = attention_mask.bool()
            if (seen[:, 1:] < seen[:, :-1]).any():
                raise ValueError("generation from padded prompts needs the padding on the left")
        documents = None
        if self.config.attn_config.attn_uses_sequence_id and sequence_id is not None:
            if sequence_id.shape != input_ids.shape or cache is not None:
                raise ValueError(
                    f"sequence_id has shape {tuple(sequence_id.shape)}; expected that of input_ids, "
                    f"{tuple(input_ids.shape)}, and no cache"
                )
            documents = documents_of(sequence_id, attention_mask)
        ranks = self.ranks if labels is not None else None
        hidden = self.transformer(input_ids, attention_mask, cache, documents, ranks)
        if last_logits:
            hidden = hidden[:, -1:]
        targets = None if labels is None else shift(labels)
        if ranks is None or targets is None:
            return self._output(hidden, targets, token_losses)
        out = self._output(hidden, ranks.part(targets, IGNORED), token_losses)
        assert out.loss_sum is not None
        each = out.token_losses
        return out._replace(
            loss=out.loss_sum * ranks.degree / (targets != IGNORED).sum().clamp(min=1),
            token_losses=None if each is None else ranks.gathered(each, targets.shape[1]),
            token_correct=None,
        )

    def _output(self, hidden: Tensor, targets: Tensor | None, token_losses: bool) -> MPTOutput:
        factor = self.config.logit_factor
        if factor is not None:
            hidden = hidden * factor  # scales the logits, and d_model numbers a token instead of vocab_size
        cap = self.config.final_logit_softcapping
        if self.config.tie_word_embeddings:
            weight, count = self.transformer.wte.weight, not self.training
            return logits_or_loss(hidden, weight, targets, count_correct=count, softcap=cap, token_losses=token_losses)
        return self.lm_head(hidden, targets, softcap=cap, token_losses=token_losses)  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        """Initialise everything, as `init_config` says, from torch's current random state."""
        self.apply(self.param_init_fn)

    def param_init_fn(self, module: nn.Module) -> None:
        """Initialise one module's own parameters, sharded or not (Composer calls this after sharding meta models)."""
        init_module(module, self.config)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Which modules are sharded as a unit: the blocks and the untied head; all the rest belongs to the root."""
        return isinstance(module, (Block, LMHead))

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Which modules are recomputed in backward when that is asked for: the blocks."""
        return isinstance(module, Block)
