"""Llama and Mistral: rotary positions, a gate, RMS norms. Mistral is Llama with a sliding window and without biases.

Both rotate the first half of a head against its second, as MPT does here, so no row of q and k has to move; and both
compute the gate as ``down(act(gate(x)) * up(x))``. (transformers/models/llama/modeling_llama.py, 4.51 to 5.23.)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.layouts.layout import LayoutName
from llmtrain.model.config import ActivationConfig, MPTConfig, RopeHFConfig

if TYPE_CHECKING:
    from llmtrain.checkpoint.layouts.parts import Rows
    from llmtrain.checkpoint.weights import Weights

OUTSIDE = {
    "transformer.wte": "model.embed_tokens",
    "transformer.norm_f": "model.norm",
    "lm_head": "lm_head",
}
"""Ours -> theirs, outside of the blocks."""
INSIDE = {
    "norm_1": "input_layernorm",
    "attn.Wq": "self_attn.q_proj",
    "attn.Wk": "self_attn.k_proj",
    "attn.Wv": "self_attn.v_proj",
    "attn.out_proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
"""Ours -> theirs, in ``transformer.blocks.N`` and ``model.layers.N``."""


def not_llama(config: MPTConfig) -> list[str]:
    """What neither Llama nor Mistral can express, by key; [] if one of them is the same function."""
    attention = config.attn_config
    found = []
    if not attention.rope:
        found.append("attn_config.rope: false (Llama has rotary positions)")
    elif scaling(config).type == "dynamic":
        found.append("rope_hf_config.type: dynamic (Llama scales by the longest row of a batch, not row by row)")
    if config.ffn_config.ffn_type != "mptglu":
        found.append(f"ffn_config.ffn_type: {config.ffn_config.ffn_type} (Llama has a gate)")
    if not config.norm_type.endswith("rmsnorm"):
        found.append(f"norm_type: {config.norm_type} (Llama has RMS norms)")
    for norm in ("qk_ln", "qk_gn"):
        if getattr(attention, norm):
            found.append(f"attn_config.{norm}: true (Llama has no such norms)")
    if attention.clip_qkv is not None:
        found.append(f"attn_config.clip_qkv: {attention.clip_qkv:g} (Llama clips nothing)")
    if config.softmax_scale != config.d_head**-0.5:
        found.append(f"attn_config.softmax_scale: {config.softmax_scale:g} (Llama's is 1 / sqrt(head_dim))")
    for key, value in (
        ("attn_config.attn_logit_softcapping", attention.attn_logit_softcapping),
        ("final_logit_softcapping", config.final_logit_softcapping),
    ):
        if value is not None:
            found.append(f"{key}: {value:g} (Llama caps nothing)")
    if config.logit_factor not in (None, 1.0):
        found.append(f"logit_scale: {config.logit_scale} (Llama does not scale logits)")
    if config.qkv_bias == config.no_bias:
        found.append(f"attention_bias: {config.qkv_bias} with no_bias: {config.no_bias} (Llama has all biases or none)")
    elif config.qkv_bias and attention.sliding_window_size > 0:
        found.append("no_bias: false with attn_config.sliding_window_size (Mistral has no biases)")
    if config.d_model % config.n_heads:
        found.append(f"head_dim: {config.d_head} with d_model: {config.d_model}, no multiple of n_heads")
    return found


@dataclass(frozen=True)
class LlamaLayout:
    """For what :func:`not_llama` has nothing to say about.

    Args:
        name: `mistral` with a sliding window, else `llama`.
        reason: Why not MPT.
    """

    name: LayoutName
    reason: str | None
    blocks: str = "model.layers"
    needs_trust_remote_code: bool = False

    @property
    def architecture(self) -> str:
        """The class."""
        return "MistralForCausalLM" if self.name == "mistral" else "LlamaForCausalLM"

    def config_json(self, config: MPTConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
        """See :class:`Layout`. Rotary keys are transformers 4's, which 5 reads, too, as do other programs."""
        content: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "torch_dtype": dtype,
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.ffn_hidden_size,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.d_head,
            "hidden_act": hidden_act(config.ffn_config.ffn_act_fn),
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": float(config.attn_config.rope_theta),
            "rope_scaling": _rope_scaling(scaling(config)),
            "attention_dropout": config.attn_config.attn_pdrop,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_cache": True,
        }
        if self.name == "mistral":
            # Mistral counts the token itself.
            content["sliding_window"] = config.attn_config.sliding_window_size + 1
        else:
            content |= {"attention_bias": config.qkv_bias, "mlp_bias": not config.no_bias}
        # Where they are unknown they must be said to be: the class's own defaults are 1 and 2.
        return content | {name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def weights(self, config: MPTConfig, weights: "Weights") -> "Weights":
        """See :class:`Layout`."""
        from llmtrain.checkpoint.layouts.parts import RowsOf

        parts: dict[str, Rows] = {}
        for name in weights:
            stem, _, kind = name.rpartition(".")
            rows = weights.shape(name)[0]
            if stem in OUTSIDE:
                parts[f"{OUTSIDE[stem]}.{kind}"] = (name, 0, rows)
                continue
            layer, inner = stem.removeprefix("transformer.blocks.").split(".", 1)
            if inner == "attn.Wqkv":
                q, k, _ = config.qkv_rows
                for own, first, end in (("Wq", 0, q), ("Wk", q, q + k), ("Wv", q + k, rows)):
                    parts[f"model.layers.{layer}.{INSIDE[f'attn.{own}']}.{kind}"] = (name, first, end)
            else:
                parts[f"model.layers.{layer}.{INSIDE[inner]}.{kind}"] = (name, 0, rows)
        return RowsOf(weights, parts)

    def files(self) -> dict[str, str]:
        """None."""
        return {}


def scaling(config: MPTConfig) -> RopeHFConfig:
    """How rotary positions are scaled."""
    attention = config.attn_config
    return (attention.rope_hf_config if attention.rope_impl == "hf" else None) or RopeHFConfig()


def hidden_act(activation: ActivationConfig) -> str:
    """Transformers' name of an activation."""
    return "gelu_pytorch_tanh" if (activation.name, activation.approximate) == ("gelu", "tanh") else activation.name


def _rope_scaling(scaling: RopeHFConfig) -> dict[str, Any] | None:
    if scaling.type == "no_scaling":
        return None
    found: dict[str, Any] = {"rope_type": scaling.type, "factor": float(scaling.factor)}
    if scaling.type == "llama3":
        found |= scaling.model_dump(include={"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
    return found
