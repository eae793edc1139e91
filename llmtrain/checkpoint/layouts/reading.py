"""The way back: folders written as Llama, Mistral or with our modelling file, as configs and weights of MPT."""

from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.layouts.code import MODEL_TYPE
from llmtrain.checkpoint.layouts.llama import INSIDE, OUTSIDE
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights

MODEL_TYPES = ("llama", "mistral", MODEL_TYPE)
_SCALINGS = ("default", "linear", "llama3")
_ACTIVATIONS: dict[str, dict[str, str]] = {
    "silu": {"name": "silu"},
    "gelu": {"name": "gelu"},
    "relu": {"name": "relu"},
    "quick_gelu": {"name": "quick_gelu"},
    "gelu_pytorch_tanh": {"name": "gelu", "approximate": "tanh"},
    "gelu_tanh": {"name": "gelu", "approximate": "tanh"},
}


def mpt_block(data: dict[str, Any], where: str) -> dict[str, Any]:
    """What a config.json of one of MODEL_TYPES says, as the keys of an MPTConfig.

    Raises:
        UserError: a key is missing, or asks for what MPT does not compute.
    """
    try:
        return _from_code(data) if data["model_type"] == MODEL_TYPE else _from_llama(data, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: cannot be read as {data['model_type']}: {error!r}.") from None


def mpt_weights(data: dict[str, Any], stored: "Weights") -> "Weights":
    """The tensors of a folder under MPT's names, q, k and v stacked again; read when they are asked for.

    Args:
        data: The folder's config.json.
        stored: By the names in its files. What has no place in MPT keeps its name.
    """
    if data.get("model_type") not in ("llama", "mistral"):
        return stored
    from llmtrain.checkpoint.layouts.parts import Stacked

    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    inside = {theirs: ours for ours, theirs in INSIDE.items()}
    parts: dict[str, tuple[str, ...]] = {}
    for name in stored:
        stem, _, kind = name.rpartition(".")
        layer, _, inner = stem.removeprefix("model.layers.").partition(".")
        own = inside.get(inner) if stem.startswith("model.layers.") else None
        if stem in outside:
            parts[f"{outside[stem]}.{kind}"] = (name,)
        elif own in ("attn.Wq", "attn.Wk", "attn.Wv"):
            three = tuple(f"model.layers.{layer}.{INSIDE[f'attn.W{x}']}.{kind}" for x in "qkv")
            present = all(part in stored for part in three)
            parts[f"transformer.blocks.{layer}.attn.Wqkv.{kind}" if present else name] = three if present else (name,)
        elif own is not None:
            parts[f"transformer.blocks.{layer}.{own}.{kind}"] = (name,)
        else:
            parts[name] = (name,)
    return Stacked(stored, parts)


def _from_llama(data: dict[str, Any], where: str) -> dict[str, Any]:
    mistral = data["model_type"] == "mistral"
    # transformers 5 gathers both in rope_parameters.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or data.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    heads, width = data["num_attention_heads"], data["hidden_size"]
    kv_heads = data.get("num_key_value_heads") or (8 if mistral else heads)
    bias = bool(data.get("mlp_bias", False)) and not mistral
    strange = {
        f"rope type {kind}": kind not in _SCALINGS,
        "attention_bias without mlp_bias, or the reverse": not mistral
        and bool(data.get("attention_bias", False)) != bias,
        f"hidden_act {data.get('hidden_act')}": data.get("hidden_act", "silu") not in _ACTIVATIONS,
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1) != 1,
        "pretraining_tp": data.get("pretraining_tp", 1) not in (1, None),
        "layer_types": bool(data.get("layer_types")),
    }
    if problems := [name for name, is_so in strange.items() if is_so]:
        raise UserError(f"{where}: llmtrain's model cannot compute {', '.join(problems)}.")
    window = data.get("sliding_window", 4096) if mistral else None
    attention: dict[str, Any] = {
        **_heads(heads, kv_heads),
        "rope": True,
        "rope_theta": theta,
        "attn_pdrop": data.get("attention_dropout") or 0.0,
        "sliding_window_size": window - 1 if window else -1,
        **_rope_hf({**rope, "type": "no_scaling" if kind == "default" else kind}),
    }
    return {
        "vocab_size": data["vocab_size"],
        "d_model": width,
        "n_heads": heads,
        "n_layers": data["num_hidden_layers"],
        "head_dim": data.get("head_dim") if (data.get("head_dim") or width // heads) * heads != width else None,
        "max_seq_len": data.get("max_position_embeddings", 4096 * 32 if mistral else 2048),
        "norm_type": "rmsnorm",
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "no_bias": not bias,
        "tie_word_embeddings": data.get("tie_word_embeddings", False),
        "ffn_config": _ffn(data["intermediate_size"], data.get("hidden_act", "silu"), gated=True),
        "attn_config": attention,
    }


def _from_code(data: dict[str, Any]) -> dict[str, Any]:
    rotary, heads = data["rotary"], data["n_heads"]
    attention: dict[str, Any] = {
        **_heads(heads, data["n_kv_heads"]),
        "alibi": data["positions"] == "alibi",
        "alibi_bias_max": data["alibi_bias_max"],
        "rope": data["positions"] == "rotary",
        "qk_ln": data["qk_norm"] == "all",
        "qk_gn": data["qk_norm"] == "head",
        "clip_qkv": data["clip_qkv"],
        "softmax_scale": data["softmax_scale"],
        "attn_logit_softcapping": data["score_cap"],
        "sliding_window_size": data["window"] or -1,
        "fused_qkv": data["fused_qkv"],
        "attn_pdrop": data["attn_pdrop"],
    }
    if rotary is not None:
        attention |= {"rope_theta": rotary["theta"], **_rope_hf(rotary)}
    return {
        **{name: data[name] for name in ("vocab_size", "d_model", "n_heads", "n_layers", "max_seq_len", "norm_type")},
        **{name: data[name] for name in ("norm_eps", "resid_pdrop", "emb_pdrop", "embedding_fraction")},
        "tie_word_embeddings": data["tie_word_embeddings"],
        "head_dim": data["d_head"] if data["d_head"] * heads != data["d_model"] else None,
        "learned_pos_emb": data["positions"] == "learned",
        "logit_scale": data["logit_factor"],
        "final_logit_softcapping": data["logit_cap"],
        "no_bias": not data["bias"],
        "attention_bias": data["qkv_bias"] if data["qkv_bias"] != data["bias"] else None,
        "ffn_config": _ffn(data["d_ffn"], data["activation"], gated=data["gated"]),
        "attn_config": attention,
    }


def _heads(heads: int, kv_heads: int) -> dict[str, Any]:
    if kv_heads == heads:
        return {"attn_type": "multihead_attention"}
    if kv_heads == 1:
        return {"attn_type": "multiquery_attention"}
    return {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}


def _ffn(width: int, activation: str, *, gated: bool) -> dict[str, Any]:
    kind = "mptglu" if gated else "mptmlp"
    return {"ffn_type": kind, "ffn_hidden_size": width, "ffn_act_fn": _ACTIVATIONS[activation]}


def _rope_hf(rope: dict[str, Any]) -> dict[str, Any]:
    if rope["type"] == "no_scaling":
        return {}
    names = ["type", "factor"]
    if rope["type"] == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return {"rope_impl": "hf", "rope_hf_config": {name: rope[name] for name in names}}
