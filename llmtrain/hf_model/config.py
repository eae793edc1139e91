"""What a recipe says about a model of Hugging Face transformers. Light: imports neither torch nor transformers."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from llmtrain.config.base import Config, mistake


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class LoRAConfig(Config):
    """Low-rank adapters (LoRA, arXiv:2106.09685) through PEFT. Keys and meanings are those of `peft.LoraConfig`."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "alpha": "It is called `lora_alpha`.",
        "lora_r": "It is called `r`.",
        "dropout": "It is called `lora_dropout`.",
        "inference_mode": "Adapters are trained here. Remove it.",
        "base_model_name_or_path": "It follows from `pretrained_model_name_or_path`. Remove it.",
    }

    peft_type: Annotated[Literal["LORA"], BeforeValidator(_upper)] = "LORA"
    """The kind of adapters: LoRA is the one there is."""
    task_type: Annotated[Literal["CAUSAL_LM"], BeforeValidator(_upper)] = "CAUSAL_LM"
    """What the model is for."""
    r: PositiveInt = 8
    """Rank of the update of each weight matrix."""
    lora_alpha: float = Field(default=8, gt=0, allow_inf_nan=False)
    """The update is scaled with lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of the adapters."""
    target_modules: str | tuple[str, ...] | None = None
    """Which layers get adapters: names (or ends of names), one regular expression, or `all-linear`. When left out,
    what PEFT knows for the architecture (usually the query and value projections)."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers that get none although `target_modules` names them."""
    modules_to_save: tuple[str, ...] | None = None
    """Layers that are trained whole beside the adapters, and saved with them (`embed_tokens`, `lm_head`)."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; all when left out."""
    layers_pattern: str | tuple[str, ...] | None = None
    """Name of the list of blocks, where PEFT does not know it."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Layer name or regular expression -> its own `r`."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Layer name or regular expression -> its own `lora_alpha`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained. With others than `none`, the model without its adapters is not the base model."""
    use_rslora: bool = False
    """Scale with lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How adapters begin: either way the model starts as the base model does. False is for tests only."""
    fan_in_fan_out: bool = False
    """The layer stores its weight transposed, as GPT-2's Conv1D does."""

    @field_validator("r", "lora_alpha", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value


class HFConfig(Config):
    """A causal language model of transformers (`model:` in a recipe with `name: hf_causal_lm`)."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "shift_labels": "Labels are always shifted inside the model. Remove it.",
        "use_logits": "The loss never holds all logits. Remove it.",
        "tokenizer": "The tokenizer stands at the top of the recipe, in `tokenizer`.",
        "vocab_size": "It follows from the model and the tokenizer: the embeddings grow when they are too few.",
        "loss_fn": "The loss is always llmtrain's chunked cross-entropy. Remove it.",
        "torch_dtype": "What is trained is kept in float32; `frozen_dtype` is for what LoRA freezes.",
        "dtype": "What is trained is kept in float32; `frozen_dtype` is for what LoRA freezes.",
        "attn_config": "Write `attn_implementation: sdpa`; `attn_config` is MPT's.",
    }

    name: Literal["hf_causal_lm"]
    """Which model this section describes."""
    pretrained_model_name_or_path: str = Field(min_length=1)
    """A local folder with a config.json, or a name on the Hugging Face hub (`Qwen/Qwen3-0.6B`)."""
    pretrained: bool = True
    """Start from its weights; false takes its config alone and draws new ones."""
    pretrained_lora_id_or_path: str | None = None
    """An adapter (folder or hub name) to continue with. The recipe's `peft_config` must describe the same adapters."""
    config_overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model's config (`{max_position_embeddings: 8192}`); the keys must exist there. With
    `pretrained: true` they must leave the shapes of the weights alone."""
    init_device: Literal["cpu", "meta", "mixed"] = "mixed"
    """Where parameters are first made: `mixed` reads the weights on rank 0 only, which sends each rank its part."""
    max_seq_len: PositiveInt = 2048
    """Tokens in a training sequence. The top-level `max_seq_len` sets it."""
    attn_implementation: Annotated[Literal["eager", "sdpa", "flash_attention_2"] | None, BeforeValidator(_lower)] = None
    """Attention in transformers; when left out, transformers' choice (`sdpa` where the architecture has it)."""
    use_flash_attention_2: bool = False
    """The older spelling of `attn_implementation: flash_attention_2`."""
    peft_config: LoRAConfig | None = None
    """Train low-rank adapters and freeze everything else."""
    should_save_peft_only: bool = True
    """With `peft_config`: checkpoints hold what is trained and not the frozen weights, which are read again from
    `pretrained_model_name_or_path` when the run continues."""
    frozen_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """With `peft_config`: dtype of the frozen weights; `auto` is the one of the model's config. What is trained is
    always float32. (Before torch 2.11 both are float32.)"""
    allow_embedding_resizing: bool = True
    """Add embedding rows (to a multiple of 128) when the tokenizer has more tokens than the model; false refuses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    use_auth_token: bool | str | None = None
    """Refused: see the message."""
    load_in_8bit: bool = False
    """Refused: see the message."""
    use_train_metrics: bool = True
    """Accepted for old recipes: the training loss is always logged."""
    additional_train_metrics: tuple[str, ...] | None = None
    """Accepted when empty."""
    additional_eval_metrics: tuple[str, ...] | None = None
    """Accepted when empty: evaluation measures loss, perplexity and token accuracy."""

    @property
    def attention(self) -> str | None:
        """The attention implementation to ask transformers for; None for its own choice."""
        return "flash_attention_2" if self.use_flash_attention_2 else self.attn_implementation

    @property
    def saves_adapters_only(self) -> bool:
        """Whether checkpoints leave the frozen weights out."""
        return self.peft_config is not None and self.should_save_peft_only

    @field_validator("config_overrides", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("use_auth_token")
    @classmethod
    def _no_token_in_a_recipe(cls, value: Any) -> Any:
        if value:
            raise ValueError(
                "A recipe is copied into runs and checkpoints, so no token goes through it. Run `hf auth login` once "
                "on each machine (or set the environment variable HF_TOKEN) and remove the key."
            )
        return None

    @field_validator("load_in_8bit")
    @classmethod
    def _no_8bit(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "8-bit weights cannot be sharded or trained here. Remove the key; to save memory use `peft_config` "
                "with `frozen_dtype: bfloat16`."
            )
        return value

    @field_validator("additional_train_metrics", "additional_eval_metrics")
    @classmethod
    def _no_metrics(cls, value: Any) -> Any:
        if value:
            raise ValueError("Not supported: evaluation measures loss, perplexity and token accuracy. Remove the key.")
        return None

    @field_validator("init_device")
    @classmethod
    def _not_meta(cls, value: str) -> str:
        if value == "meta":
            raise ValueError(
                "transformers' models cannot be initialised after sharding (buffers such as rotary frequencies would "
                "stay empty). Use `mixed`: rank 0 makes the model, and the others take no memory for it."
            )
        return value

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.use_flash_attention_2 and self.attn_implementation not in (None, "flash_attention_2"):
            raise mistake(
                f"`use_flash_attention_2: true` and `attn_implementation: {self.attn_implementation}` contradict each "
                "other. Keep one.",
                "use_flash_attention_2",
            )
        if self.pretrained_lora_id_or_path is not None and self.peft_config is None:
            raise mistake(
                "To continue with an adapter, describe it in `peft_config` (r, lora_alpha, target_modules), too.",
                "pretrained_lora_id_or_path",
            )
        if self.saves_adapters_only and not self.pretrained:
            raise mistake(
                "With `pretrained: false` the frozen weights are random and stand nowhere else: adapters alone would "
                "be worth nothing. Set `should_save_peft_only: false`.",
                "should_save_peft_only" if "should_save_peft_only" in self.model_fields_set else "pretrained",
            )
        for key in ("tie_word_embeddings", "vocab_size"):
            if self.pretrained and key in self.config_overrides:
                raise mistake(
                    f"`{key}` belongs to the weights; with `pretrained: true` it stays what it is.",
                    f"config_overrides.{key}",
                )
        return self
