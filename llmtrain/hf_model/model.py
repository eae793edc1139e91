"""A causal language model of transformers with MPT's interface: a batch goes in, the loss and its sums come out."""

import inspect
import struct
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.errors import UserError
from llmtrain.hf_model import documents, head
from llmtrain.model.loss import shift
from llmtrain.model.mpt import MPTOutput, logits_or_loss

FROZEN_IDENTITY = "frozen_weights_hash"
"""A buffer of models whose checkpoints leave the frozen weights out: what these were."""
OTHER_FROZEN_WEIGHTS = (
    "The checkpoint holds adapters only, and the weights of model.pretrained_model_name_or_path are not those that "
    "they were trained on (their hash differs). Give the model as it was, in the same frozen_dtype."
)


class HFCausalLM(nn.Module):
    """Runs the body of a transformers model and computes logits or the chunked loss from its last hidden states.

    Its children are those of the transformers model (with adapters: of the PeftModel), so that parameters have the
    names of llm-foundry's checkpoints: `state.model.model.` and transformers' own name. A tied head is not among them:
    its weight is the embedding's.

    Attributes:
        hf: the transformers model.
        peft: the PeftModel around it, or None.
        config: transformers' config.
    """

    hf: Any
    peft: Any

    def __init__(self, model: Any, peft: Any = None) -> None:
        super().__init__()
        # Plain attributes: the same modules are registered below, under their names in checkpoints.
        object.__setattr__(self, "hf", model)
        object.__setattr__(self, "peft", peft)
        self.config = model.config
        self.scale, self.cap = head.logit_scale(self.config), head.logit_cap(self.config)
        self.no_documents: str | None = None
        self._body_takes = frozenset(inspect.signature(model.base_model.forward).parameters)
        self._prepare_head()
        for name, child in (peft if peft is not None else model).named_children():
            self.add_module(name, child)
        self._blocks = _blocks(model)
        self._frozen_identity: list[int] | None = None

    def _prepare_head(self) -> None:
        """Decides how logits are made, and gives a plain untied head the class that FSDP can gather alone."""
        out, table = self.hf.get_output_embeddings(), self.hf.get_input_embeddings()
        matrix = type(out) in (nn.Linear, head.Head) and out.bias is None
        users = [m for m in self.hf.modules() if m is not out and any(p is out.weight for p in m._parameters.values())]
        self.tied = matrix and users == [table] and isinstance(table, nn.Embedding)
        self.plain = matrix and self.cap is None and (self.tied or not users)
        if self.tied:
            for parent in list(self.hf.modules()):
                for name in [name for name, child in parent.named_children() if child is out]:
                    delattr(parent, name)
                    object.__setattr__(parent, name, out)  # transformers' own code still finds it, until it is sharded
        elif self.plain and type(out) is nn.Linear:
            own = head.Head(out.in_features, out.out_features, bias=False, device="meta")
            own.weight = out.weight
            own.train(out.training)
            self.hf.set_output_embeddings(own)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        cache: Any = None,
        last_logits: bool = False,
        token_losses: bool = False,
    ) -> MPTOutput:
        """Logits, or with labels the loss.

        Args:
            input_ids: (batch, T) int64; with a cache, only the tokens that it has not seen.
            labels: (batch, T) int64, a copy of the input_ids with -100 where the loss does not count; shifted here.
            attention_mask: (batch, T, or cached + T), nonzero for real tokens.
            sequence_id: (batch, T) document numbers, -1 at padding: tokens see only their own document, and positions
                begin anew in each.
            cache: a transformers cache (`transformers.DynamicCache`), extended here.
            last_logits: only the last position's logits (batch, 1, vocab_size), without labels.
            token_losses: with labels, also give the loss at each position (`MPTOutput.token_losses`).

        Raises UserError for packed rows that this architecture cannot keep apart.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if sequence_id is not None:
            self._refuse_documents(input_ids.shape[1])
            inputs["attention_mask"], inputs["position_ids"] = documents.packed(sequence_id, self._computes_in())
        elif attention_mask is not None and (cache is not None or not documents.padded_on_the_right(attention_mask)):
            inputs["attention_mask"] = attention_mask.long()
            positions = documents.positions_of(attention_mask)
            inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        hidden: Tensor = self.hf.base_model(**inputs)[0]
        return self._output(hidden[:, -1:] if last_logits else hidden, labels, token_losses)

    def _output(self, hidden: Tensor, labels: Tensor | None, token_losses: bool) -> MPTOutput:
        count, targets = not self.training, None if labels is None else shift(labels)
        if not self.plain:
            rows = int(self.hf.get_input_embeddings().weight.shape[0])
            return head.general_output(hidden, self._logits, targets, rows, count=count, token_losses=token_losses)
        if self.scale != 1.0:
            hidden = hidden * self.scale  # scales the logits, and hidden_size numbers a token instead of vocab_size
        if self.tied:
            weight = self.hf.get_input_embeddings().weight
            return logits_or_loss(hidden, weight, targets, count_correct=count, token_losses=token_losses)
        return self.hf.get_output_embeddings()(hidden, targets, token_losses=token_losses)  # type: ignore[no-any-return]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.tied:
            logits = F.linear(hidden, self.hf.get_input_embeddings().weight)
        else:
            logits = self.hf.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _computes_in(self) -> torch.dtype:
        weight = self.hf.get_input_embeddings().weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def _refuse_documents(self, length: int) -> None:
        if self.no_documents is not None:
            raise UserError(f"packing: {self.no_documents}. Set packing: false in the loader.")
        documents.refuse_beyond_window(self.config, length)

    def keep_frozen_identity(self) -> None:
        """Adds the buffer FROZEN_IDENTITY: a hash of the frozen weights, for checkpoints that do not hold them.

        Other ranks than the one with the weights call this too, and receive the hash with its buffers.
        """
        identity = [0, 0]
        if not any(p.is_meta for p in self.parameters()):
            identity = self._frozen_identity = self.frozen_identity()
        self.register_buffer(FROZEN_IDENTITY, torch.tensor(identity))

    def frozen_identity(self) -> list[int]:
        """The hash of the frozen weights as they are now."""
        return frozen_identity(self)

    def check_frozen_identity(self) -> None:
        """To be called after a checkpoint was loaded, on the rank that has read the weights.

        Raises:
            UserError: the checkpoint's adapters were trained on other frozen weights.
        """
        if self._frozen_identity is not None and self.get_buffer(FROZEN_IDENTITY).tolist() != self._frozen_identity:
            raise UserError(OTHER_FROZEN_WEIGHTS)

    @property
    def takes_positions(self) -> bool:
        """Whether the body takes `position_ids` (MPT and BLOOM have none: ALiBi counts distances)."""
        return "position_ids" in self._body_takes

    @property
    def takes_cache(self) -> bool:
        """Whether the body takes transformers' DynamicCache (since version 5 all do)."""
        return bool(getattr(self.hf, "_supports_cache_class", True))

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Which modules are sharded as a unit: the decoder layers and an untied plain head; the rest is the root's."""
        return self._is_block(module) or isinstance(module, head.Head)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Which modules are recomputed in backward when that is asked for: the decoder layers."""
        return self._is_block(module)

    def param_init_fn(self, module: nn.Module) -> None:
        """Not reached: `init_device: meta` is refused, and with `mixed` rank 0 sends the values."""
        raise RuntimeError(f"{type(module).__name__} has no values, and no rank has any to send")

    def _is_block(self, module: nn.Module) -> bool:
        return type(module) in self._blocks

    def n_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations to train on one token of a sequence of `seq_len` tokens.

        As `llmtrain.model.flops` counts them: a multiply-add is 2, attention is the whole square, nothing is
        recomputed. Frozen weights have no gradient of their own; of a mixture's experts those that are used count.
        """
        config, table = self.config.get_text_config(), self.hf.get_input_embeddings().weight
        heads = config.num_attention_heads
        attention = (
            config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        )
        used = (getattr(config, "num_experts_per_tok", None) or 1) / (_experts(config) or 1)
        forward, trained = 0.0, 0.0
        for name, parameter in self.named_parameters():
            if parameter is table and not self.tied:
                continue  # looked up
            size = parameter.numel() * (float(used) if ".experts." in name else 1.0)
            forward += size
            trained += size if parameter.requires_grad else 0.0
        return float(4.0 * forward + 2.0 * trained + 12.0 * attention * seq_len)


def _blocks(model: Any) -> set[type]:
    """The classes of the decoder layers: what the longest list of modules in the body holds.

    transformers names them too (`_no_split_modules`), but there embeddings or encoders may stand beside them.
    """
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    named = set(getattr(model, "_no_split_modules", None) or ())
    layers = [found for found in lists if {type(layer).__name__ for layer in found} & named] or lists
    return {type(layer) for layer in max(layers, key=len)} if layers else set()


def _experts(config: Any) -> int | None:
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    return None


def frozen_identity(model: nn.Module) -> list[int]:
    """`identity_of` the parameters that are not trained."""
    return identity_of({name: p for name, p in model.named_parameters() if not p.requires_grad})


def identity_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """A hash (xxh3, 128 bits) of names, dtypes, shapes and values, as two signed 64-bit numbers."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return list(struct.unpack("<2q", digest.digest()))
