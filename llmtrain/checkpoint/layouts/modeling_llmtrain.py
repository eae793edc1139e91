"""Any model that llmtrain trains, in plain torch, for transformers 4.51 and later. Open it with trust_remote_code=True.

llmtrain puts this file beside exported weights where no class of transformers' own computes their function. A pre-norm
decoder whose parameters have MPT's names; what is special about a model stands in its config.json, and each of those
keys is used below. Attention is written out: exact on any device, in float32 where it matters, made for reading. No key
may be ignored, so what this file cannot do (static caches, masks of four dimensions, ...) is refused.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

SCORES = 2**27
"""Scores (batch x heads x queries x keys) that are computed at once: longer texts go through in slices of queries."""

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class LLMTrainConfig(PretrainedConfig):
    """What config.json says. Defaults are arbitrary: an export writes every key."""

    model_type = "llmtrain"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "head_dim": "d_head",
        "intermediate_size": "d_ffn",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        vocab_size=50368,
        d_model=2048,
        n_heads=16,
        n_kv_heads=16,
        d_head=128,
        n_layers=24,
        d_ffn=8192,
        max_seq_len=2048,
        positions="alibi",  # alibi, rotary, learned or none
        alibi_bias_max=8.0,
        rotary=None,  # theta, type (no_scaling, linear, dynamic, llama3) and the numbers of that type
        window=None,  # tokens before it that a token sees, besides itself; null is all
        norm_type="layernorm",  # layernorm or rmsnorm
        norm_eps=1e-5,
        qk_norm=None,  # all: over all heads together; head: over each head, with one weight for all
        clip_qkv=None,
        softmax_scale=None,  # factor on q.k; null is 1 / sqrt(d_head)
        score_cap=None,  # scores s become cap * tanh(s / cap)
        logit_cap=None,  # and so do logits
        logit_factor=None,  # before that
        fused_qkv=True,
        qkv_bias=False,
        bias=False,  # of all other linear layers and of layer norms
        activation="gelu",
        gated=False,  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        emb_pdrop=0.0,
        embedding_fraction=1.0,  # factor on the gradient of the embeddings
        use_cache=True,
        tie_word_embeddings=True,
        **others,
    ):
        own = {k: v for k, v in locals().items() if k not in ("self", "others", "__class__", "tie_word_embeddings")}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """Normalise."""
        wide = x.to(_wide(x))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def norm(config, width):
    """The model's kind of norm."""
    if config.norm_type == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


class Sight:
    """Who sees whom, from how far, and the angles of rotary positions: made once in a forward, for all layers."""

    def __init__(self, config, x, positions, mask, past):
        self.past, self.n_keys = past, past + x.shape[1]
        self.window = config.window
        self.mask = mask if mask is not None and not mask.all() else None
        self.slopes = self.rotation = None
        if config.positions == "alibi":
            slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)
            self.slopes = torch.tensor(slopes, device=x.device, dtype=_wide(x))[:, None, None]
        elif config.positions == "rotary":
            angles = positions.double()[..., None] * frequencies(config, positions)
            self.rotation = angles.cos().to(_wide(x))[:, None], angles.sin().to(_wide(x))[:, None]

    def bias(self, first, end, like):
        """What is added to the scores of queries first..end: (1 or batch, 1 or heads, queries, keys)."""
        keys = torch.arange(self.n_keys, device=like.device)
        distance = keys - keys[self.past + first : self.past + end, None]
        hidden = distance > 0
        if self.window is not None:
            hidden = hidden | (distance < -self.window)
        if self.mask is not None:  # a token of padding sees itself, so that no row is empty
            hidden = hidden | (~self.mask[:, None, None, :] & (distance != 0))
        bias = torch.zeros_like(distance, dtype=_wide(like)) if self.slopes is None else self.slopes * distance
        return torch.where(hidden, torch.finfo(bias.dtype).min, bias)

    def rotate(self, x):
        """Turn (batch, heads, tokens, d_head): the first half of each head against the second."""
        if self.rotation is None:
            return x
        cos, sin = self.rotation
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def alibi_slopes(n_heads, bias_max):
    """One slope a head (Press et al. 2022): with n = 2^ceil(log2 n_heads), 2^(-bias_max i / n); every second first."""
    n = 1 << (n_heads - 1).bit_length()
    powers = [2.0 ** (-bias_max * i / n) for i in range(1, n + 1)]
    return powers if n == n_heads else (powers[1::2] + powers[::2])[:n_heads]


def frequencies(config, positions):
    """Radians from one position to the next, of each pair of numbers in a head: (1 or batch, 1, d_head / 2)."""
    rotary, width = config.rotary, config.d_head
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    if rotary["type"] == "dynamic":  # a larger theta for rows that are longer than max_seq_len
        length = (positions.amax(dim=1).double() + 1).clamp(min=config.max_seq_len)[:, None, None] / config.max_seq_len
        stretch = (rotary["factor"] * length - (rotary["factor"] - 1)) ** (width / (width - 2))
        return (rotary["theta"] * stretch) ** -exponents
    turns = rotary["theta"] ** -exponents[None, None]
    if rotary["type"] == "linear":
        return turns / rotary["factor"]
    if rotary["type"] == "llama3":  # slow pairs are slowed further, fast ones stay, between is a ramp
        low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
        kept = (rotary["original_max_position_embeddings"] * turns / (2 * math.pi) - low) / (high - low)
        kept = kept.clamp(0, 1)
        return turns * (kept + (1 - kept) / rotary["factor"])
    return turns


class Attention(nn.Module):
    """Causal self-attention; heads of keys and values may be fewer than those of queries."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.rows = [config.n_heads * config.d_head, *[config.n_kv_heads * config.d_head] * 2]
        if config.fused_qkv:
            self.Wqkv = nn.Linear(config.d_model, sum(self.rows), bias=config.qkv_bias)
        else:
            self.Wq, self.Wk, self.Wv = (nn.Linear(config.d_model, n, bias=config.qkv_bias) for n in self.rows)
        if config.qk_norm is not None:
            widths = self.rows if config.qk_norm == "all" else [config.d_head] * 2
            self.q_ln, self.k_ln = norm(config, widths[0]), norm(config, widths[1])
        self.out_proj = nn.Linear(self.rows[0], config.d_model, bias=config.bias)

    def forward(self, x, sight, cache):
        """(batch, tokens, d_model) -> the same."""
        c = self.config
        q, k, v = self.Wqkv(x).split(self.rows, -1) if c.fused_qkv else (self.Wq(x), self.Wk(x), self.Wv(x))
        if c.clip_qkv is not None:
            q, k, v = (t.clamp(-c.clip_qkv, c.clip_qkv) for t in (q, k, v))
        if c.qk_norm == "all":
            q, k = self.q_ln(q), self.k_ln(k)
        q, k, v = (t.unflatten(-1, (-1, c.d_head)) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_ln(q), self.k_ln(k)
        q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
        q, k = sight.rotate(q), sight.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if k.shape[2] != sight.n_keys:
            raise ValueError(f"{type(cache).__name__} gives {k.shape[2]} keys of {sight.n_keys}; use a DynamicCache")
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for t in (k, v))
        step = max(1, SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
        slices = [(i, min(i + step, q.shape[2])) for i in range(0, q.shape[2], step)]
        out = [self.attend(q[:, :, i:j], k, v, sight.bias(i, j, q)) for i, j in slices]
        return self.out_proj(torch.cat(out, dim=2).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, bias):
        """Softmax over the keys, in float32."""
        c = self.config
        scores = (q @ k.transpose(2, 3)) * (c.d_head**-0.5 if c.softmax_scale is None else c.softmax_scale)
        if c.score_cap is not None:
            scores = torch.tanh(scores / c.score_cap) * c.score_cap
        weights = F.dropout(torch.softmax(scores + bias, dim=-1), c.attn_pdrop, self.training)
        return weights.to(v.dtype) @ v


class FeedForward(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.d_model, config.d_ffn, bias=config.bias)
        self.gate_proj = nn.Linear(config.d_model, config.d_ffn, bias=config.bias) if config.gated else None
        self.down_proj = nn.Linear(config.d_ffn, config.d_model, bias=config.bias)

    def forward(self, x):
        """Position by position."""
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm_1, self.attn = norm(config, config.d_model), Attention(config, layer)
        self.norm_2, self.ffn = norm(config, config.d_model), FeedForward(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, sight, cache):
        """(batch, tokens, d_model) -> the same."""
        x = x + self.dropout(self.attn(self.norm_1(x), sight, cache))
        return x + self.dropout(self.ffn(self.norm_2(x)))


class LLMTrainPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config_class = LLMTrainConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_cache_class = True  # transformers before 4.54 asks


class LLMTrainModel(LLMTrainPreTrainedModel):
    """Token ids (batch, tokens) -> hidden states (batch, tokens, d_model) after the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_f = norm(config, config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """The embedding."""
        return self.wte

    def set_input_embeddings(self, value):
        """Replace it."""
        self.wte = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=False,
        output_attentions=False,
        **unused,
    ):
        """Hidden states; `attention_mask` is (batch, cached + new tokens), 0 for padding."""
        if output_attentions:
            raise ValueError("output_attentions is not supported")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and not recompute and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (len(x), past + x.shape[1]):
            wanted = (len(x), past + x.shape[1])
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, not {wanted}; static caches are not supported"
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
            if mask is not None:  # positions count real tokens
                position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        if self.config.positions == "learned":
            if past + x.shape[1] > self.config.max_seq_len:
                raise ValueError(f"{past + x.shape[1]} tokens, but only {self.config.max_seq_len} learned positions")
            x = x + self.wpe(position_ids)
        fraction = self.config.embedding_fraction
        if fraction != 1.0:
            x = x * fraction + x.detach() * (1.0 - fraction)
        x = self.emb_drop(x)
        sight, states = Sight(self.config, x, position_ids, mask, past), []
        for block in self.blocks:
            states.append(x)
            if recompute:
                x = self._gradient_checkpointing_func(block.__call__, x, sight, None)
            else:
                x = block(x, sight, past_key_values)
        x = self.norm_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
        )


class LLMTrainForCausalLM(LLMTrainPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.transformer = LLMTrainModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """The embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value):
        """Replace it."""
        self.transformer.wte = value

    def get_output_embeddings(self):
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replace it."""
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=False,
        output_attentions=False,
        **kwargs,
    ):
        """Logits (batch, tokens, vocab_size), and with labels (shifted here, -100 is ignored) the mean loss."""
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = out.last_hidden_state[:, kept]
        if self.config.logit_factor is not None:
            hidden = hidden * self.config.logit_factor
        logits = self.lm_head(hidden)
        if self.config.logit_cap is not None:
            logits = torch.tanh(logits / self.config.logit_cap) * self.config.logit_cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
