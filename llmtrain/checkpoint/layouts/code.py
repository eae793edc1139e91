"""Any model at all: our modelling file beside the weights, under MPT's names. It opens with trust_remote_code only."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.layouts.layout import LayoutName
from llmtrain.checkpoint.layouts.llama import scaling
from llmtrain.model.config import MPTConfig

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights

FILE = Path(__file__).with_name("modeling_llmtrain.py")
MODEL_TYPE = "llmtrain"
"""Unknown to transformers, so that the folder never opens as something else without the code."""


@dataclass(frozen=True)
class CodeLayout:
    """For every MPTConfig.

    Args:
        reason: Why no class of transformers' own.
    """

    reason: str | None
    name: LayoutName = "code"
    architecture: str = "LLMTrainForCausalLM"
    blocks: str = "transformer.blocks"
    needs_trust_remote_code: bool = True

    def config_json(self, config: MPTConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
        """See :class:`Layout`. The keys are those of the modelling file: resolved numbers, no defaults."""
        attention, activation = config.attn_config, config.ffn_config.ffn_act_fn
        positions = "alibi" if attention.alibi else "rotary" if attention.rope else "none"
        scaled = scaling(config).model_dump(exclude_none=True)
        return {
            "architectures": [self.architecture],
            "model_type": MODEL_TYPE,
            "auto_map": {
                "AutoConfig": f"{FILE.stem}.LLMTrainConfig",
                "AutoModel": f"{FILE.stem}.LLMTrainModel",
                "AutoModelForCausalLM": f"{FILE.stem}.{self.architecture}",
            },
            "torch_dtype": dtype,
            "vocab_size": config.vocab_size,
            "d_model": config.d_model,
            "n_heads": config.n_heads,
            "n_kv_heads": config.kv_heads,
            "d_head": config.d_head,
            "n_layers": config.n_layers,
            "d_ffn": config.ffn_hidden_size,
            "max_seq_len": config.max_seq_len,
            "positions": "learned" if config.uses_learned_positions else positions,
            "alibi_bias_max": attention.alibi_bias_max,
            "rotary": {"theta": attention.rope_theta, **scaled} if attention.rope else None,
            "window": attention.sliding_window_size if attention.sliding_window_size > 0 else None,
            "norm_type": config.norm_type.removeprefix("low_precision_"),
            "norm_eps": config.norm_eps,
            "qk_norm": "all" if attention.qk_ln else "head" if attention.qk_gn else None,
            "clip_qkv": attention.clip_qkv,
            "softmax_scale": attention.softmax_scale,
            "score_cap": attention.attn_logit_softcapping,
            "logit_cap": config.final_logit_softcapping,
            "logit_factor": config.logit_factor,
            "fused_qkv": attention.fused_qkv,
            "qkv_bias": config.qkv_bias,
            "bias": not config.no_bias,
            "activation": "gelu_tanh"
            if (activation.name, activation.approximate) == ("gelu", "tanh")
            else activation.name,
            "gated": config.ffn_config.ffn_type == "mptglu",
            "attn_pdrop": attention.attn_pdrop,
            "resid_pdrop": config.resid_pdrop,
            "emb_pdrop": config.emb_pdrop,
            "embedding_fraction": config.embedding_fraction,
            "use_cache": True,
            "tie_word_embeddings": config.tie_word_embeddings,
            **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }

    def weights(self, config: MPTConfig, weights: "Weights") -> "Weights":
        """As they are."""
        return weights

    def files(self) -> dict[str, str]:
        """The modelling file."""
        return {FILE.name: FILE.read_text(encoding="utf-8")}
