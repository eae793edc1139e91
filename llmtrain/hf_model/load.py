"""transformers' own classes: the config of a model, and the model with its weights or without values."""

import contextlib
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from llmtrain.checkpoint.unpickle import refuse_code
from llmtrain.errors import UserError
from llmtrain.hf_model.config import HFConfig
from llmtrain.quiet_transformers import quiet_transformers
from llmtrain.trust import python_files, require

log = logging.getLogger(__name__)

ROWS = 128
"""Embeddings grow to a multiple of this many rows, which GPUs multiply fastest."""
SHARDS_MIXED_DTYPES = "2.11"
"""From this version of torch on FSDP2 is known to take frozen parameters of another dtype than the trained ones."""
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)
"""What reading weights raises when a file is damaged, is of another model, or is not what its name says."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(cfg: HFConfig) -> Any:
    """The config of the architecture (transformers' PreTrainedConfig), with `config_overrides`.

    Raises:
        UserError: it is not there, needs code that is not trusted, or an override names a key that it has not.
    """
    from transformers import AutoConfig

    name = cfg.pretrained_model_name_or_path
    refuse_missing_folder(name, "pretrained_model_name_or_path")
    if cfg.trust_remote_code:
        what = "the Python code that comes with this model"
        require("model.trust_remote_code", name, what=what, files=python_files(name))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except Exception as problem:  # each architecture's config has checks of its own
        raise UserError(f"model.pretrained_model_name_or_path: {name!r} cannot be opened: {reason(problem)}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.pretrained_model_name_or_path: {name!r} is an encoder-decoder, no causal LM.")
    _override(config, cfg.config_overrides, "model.config_overrides")
    _refuse_kernels(config, name)
    config.use_cache = False
    return config


def _refuse_kernels(config: Any, name: str) -> None:
    """A config may name a repository of the hub as its attention, which transformers fetches and runs unasked."""
    waiting: list[Any] = [config]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        waiting += [value for value in vars(part).values() if hasattr(value, "_attn_implementation")]
        for key in ("_attn_implementation", "_experts_implementation"):
            wanted = getattr(part, key, None)
            if isinstance(wanted, str) and "/" in wanted:
                require(f"{key[1:]} in the config of {name}", wanted, what="a kernel of this repository on the hub")


def _override(config: Any, overrides: dict[str, Any], where: str) -> None:
    """Sets keys of a config; a key that it has not is a mistake (transformers would take it and do nothing)."""
    for key, value in overrides.items():
        known = config if isinstance(config, dict) else config.to_dict()
        if key not in known and not (not isinstance(config, dict) and hasattr(config, key)):
            raise UserError(f"{where}.{key}: the model's config has no such key. Known: {', '.join(sorted(known))}.")
        old = config[key] if isinstance(config, dict) else getattr(config, key)
        if isinstance(value, dict) and (isinstance(old, dict) or hasattr(old, "to_dict")):
            _override(old, value, f"{where}.{key}")
        elif isinstance(config, dict):
            config[key] = value
        else:
            setattr(config, key, value)


def vocab_size(config: Any, n_tokens: int, *, may_grow: bool = True) -> int:
    """Embedding rows of a model for a tokenizer of `n_tokens` ids: its own, or the next multiple of 128 above those.

    Raises:
        UserError: they are too few and must not grow.
    """
    rows = int(config.get_text_config().vocab_size)
    if n_tokens <= rows:
        return rows
    if not may_grow:
        raise UserError(
            f"The tokenizer has {n_tokens:,} tokens and the model {rows:,} embeddings. Use the model's own tokenizer, "
            "or set model.allow_embedding_resizing: true to add rows."
        )
    return -(-n_tokens // ROWS) * ROWS


def dtype_of(cfg: HFConfig, config: Any) -> torch.dtype:
    """The dtype that parameters are held in: float32, unless LoRA freezes them.

    What is trained is float32 beside them, and only newer versions of FSDP2 shard both in one unit.
    """
    if cfg.peft_config is None:
        return torch.float32
    if TorchVersion(torch.__version__) < SHARDS_MIXED_DTYPES:
        if cfg.frozen_dtype not in ("auto", "float32"):
            log.warning(
                "frozen_dtype: %s needs torch >= %s (this is %s); frozen weights are held in float32.",
                *(cfg.frozen_dtype, SHARDS_MIXED_DTYPES, torch.__version__),
            )
        return torch.float32
    if cfg.frozen_dtype != "auto":
        return DTYPES[cfg.frozen_dtype]
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return next((dtype for name, dtype in DTYPES.items() if own in (name, dtype)), torch.float32)


def with_weights(cfg: HFConfig, config: Any, dtype: torch.dtype) -> Any:
    """The model with its pretrained weights, on the CPU: safetensors, or `.bin` unpickled with `weights_only`.

    Raises:
        UserError: weights are missing, do not fit the config, or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    name = cfg.pretrained_model_name_or_path
    refuse_code(Path(name).expanduser())
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                trust_remote_code=cfg.trust_remote_code,
                weights_only=True,
                **_options(cfg, dtype),
            )
    except (*UNREADABLE, ImportError) as problem:
        raise UserError(f"model: the weights of {name!r} cannot be loaded: {reason(problem)}") from None
    wrong = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "mismatched_keys")}
    for kind, keys in wrong.items():
        if keys:
            raise UserError(
                f"model: {name!r} has {kind.replace('_', ' ')}: {', '.join(keys[:5])} ({len(keys)} in all); they would "
                "stay random. Is it a causal language model, and do config_overrides leave its shapes alone?"
            )
    return cast(model, dtype)


def without_weights(cfg: HFConfig, config: Any, dtype: torch.dtype) -> Any:
    """The model as its config describes it, initialised by transformers from torch's random state."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=cfg.trust_remote_code, **_options(cfg, dtype)
            )
        except (ValueError, ImportError) as problem:
            raise UserError(
                f"model: {cfg.pretrained_model_name_or_path!r} cannot be built: {reason(problem)}"
            ) from None
    return cast(model, dtype)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Casts the parameters and leaves buffers: frequencies of rotary embeddings in bfloat16 are other positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without values; buffers, and tensors that are neither, are real.

    A whole model on the meta device loses what no checkpoint brings back: the frequencies of rotary embeddings, for
    one, are buffers outside the state dict, and some architectures keep such tensors as plain attributes.
    """
    register, linear, embedding = (
        nn.Module.register_parameter,
        nn.Linear.reset_parameters,
        nn.Embedding.reset_parameters,
    )

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            empty = torch.empty_like(param, device="meta")
            kept = {key: value for key, value in vars(param).items() if key.startswith("_is_hf")}
            param = nn.Parameter(empty, requires_grad=param.requires_grad)
            vars(param).update(kept)
        register(self, name, param)

    def nothing(self: Any) -> None:
        """Torch's first values would cost time and are not used."""

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    nn.Linear.reset_parameters = nn.Embedding.reset_parameters = nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Linear.reset_parameters = linear  # type: ignore[method-assign]
        nn.Embedding.reset_parameters = embedding  # type: ignore[method-assign]


def grow(model: Any, rows: int) -> None:
    """Adds embedding rows (and rows of an untied head): each new one is the mean of the old ones."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows == old:
        return
    with torch.no_grad():
        means = [_mean(layer.weight) for layer in _tables(model)]
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer, mean in zip(_tables(model), means, strict=True):
            layer.weight[old:] = mean
            if getattr(layer, "bias", None) is not None:
                layer.bias[old:] = layer.bias[:old].mean()


def _tables(model: Any) -> list[Any]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [table] if head is None or head.weight is table.weight else [table, head]


def _mean(weight: Tensor) -> Tensor:
    return weight.float().mean(0).to(weight.dtype)


def _options(cfg: HFConfig, dtype: torch.dtype) -> dict[str, Any]:
    import transformers

    # The keyword was renamed in 4.56; the newest versions warn about the old one.
    renamed = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    options: dict[str, Any] = {"dtype" if renamed else "torch_dtype": dtype}
    if cfg.attention is not None:
        options["attn_implementation"] = cfg.attention
    return options


def refuse_missing_folder(name: str, key: str) -> None:
    """A path that is not there must not be taken for a name on the hub.

    Raises:
        UserError: it looks like a path, and there is no such folder.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise UserError(f"model.{key}: there is no folder {name!r} (from {Path.cwd()})")


def reason(problem: BaseException) -> str:
    """Why something of Hugging Face's cannot be opened, in one line."""
    if "trust_remote_code" in str(problem):
        return (
            "it comes with Python code of its own. If you have read it and trust it: model.trust_remote_code: true, "
            "and --trust-code on the command line"
        )
    if isinstance(problem, pickle.UnpicklingError):
        named = re.search(r"GLOBAL ([\w.]+)", str(problem))
        what = f" (it names `{named[1]}`)" if named else ""
        return (
            f"its .bin holds more than tensors{what}, and reading it would run code, or it is damaged. "
            "Convert it to safetensors."
        )
    if isinstance(problem, SafetensorError):
        return f"a .safetensors file is damaged ({problem}). Fetch it again."
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else repr(problem)
