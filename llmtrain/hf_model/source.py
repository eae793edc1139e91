"""Whatever a user points at that is a Hugging Face model other than MPT, opened for generation or export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import source
from llmtrain.checkpoint.hugging_face import read_json
from llmtrain.checkpoint.resolve import locate
from llmtrain.checkpoint.unpickle import refuse_code
from llmtrain.errors import UserError
from llmtrain.hf_model.build import parts
from llmtrain.hf_model.checkpoint import hf_config_of, is_hf_run, open_checkpoint
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.load import UNREADABLE, read_config, reason
from llmtrain.hf_model.lora import require_peft
from llmtrain.quiet_transformers import quiet_transformers
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer
from llmtrain.trust import require


@dataclass(frozen=True)
class HFSource:
    """A model as it lies on disk."""

    path: Path
    """The checkpoint that was chosen, or the folder."""
    config: HFConfig
    model: Any
    """transformers' model, on the CPU, in evaluation mode."""
    peft: Any
    """The PeftModel around it, or None."""
    tokenizer: TokenizerConfig | None
    """Where its tokenizer is, or None when nothing says so."""
    rows_added: bool = False
    """Whether it has more embeddings than the model that it started from."""


def open_hf(path: Path, recipe: Path | None = None) -> HFSource | None:
    """Opens a run or checkpoint of `hf_causal_lm`, a Hugging Face folder, or a folder of adapters.

    Args:
        path: any of those.
        recipe: the YAML file of the run, for a checkpoint that carries none.

    Returns:
        The model, or None when it is an MPT (which llmtrain opens itself) or something else.

    Raises:
        UserError: it is one of those and cannot be opened.
    """
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _adapter_folder(path)
    if path.is_dir() and (path / "config.json").is_file():
        return None if _is_mpt(path) else _folder(path)
    if not is_hf_run(path, recipe):
        return None
    checkpoint = locate(path)  # verifies what it chooses itself
    cfg = hf_config_of(checkpoint, recipe)
    tokenizer = source.tokenizer_of(checkpoint, recipe)
    n_tokens = len(load_tokenizer(tokenizer)) if tokenizer is not None else 0
    model, peft = open_checkpoint(checkpoint, cfg, n_tokens, verified=checkpoint != path)
    grown = read_config(cfg).get_text_config().vocab_size < model.get_input_embeddings().weight.shape[0]
    return HFSource(checkpoint, cfg, model, peft, tokenizer, grown)


def _folder(path: Path) -> HFSource:
    cfg = HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(path))
    model, _ = parts(cfg)
    return HFSource(path, cfg, model.eval(), None, _tokenizer_in(path))


def _adapter_folder(path: Path) -> HFSource:
    peft = require_peft()
    config = read_json(path / "adapter_config.json")
    base = str(config.get("base_model_name_or_path") or "")
    if not base:
        raise UserError(f"{path}/adapter_config.json: does not say which model it belongs to.")
    files = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((path / name).is_file() for name in files):  # PEFT would look for them on the hub
        raise UserError(f"{path}: has no {files[0]} (nor {files[1]}).")
    cfg = HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=base)
    refuse_code(path)
    if config.get("megatron_config"):  # PEFT imports the module that stands beside it
        require(f"megatron_core in {path}/adapter_config.json", config.get("megatron_core"), what="this module")
    model, _ = parts(cfg)
    try:
        with quiet_transformers():
            wrapped = peft.PeftModel.from_pretrained(model, str(path))
    except UNREADABLE as problem:
        raise UserError(f"{path}: the adapters cannot be opened on {base}: {reason(problem)}") from None
    return HFSource(path, cfg, wrapped.get_base_model().eval(), wrapped.eval(), _tokenizer_in(path))


def _tokenizer_in(path: Path) -> TokenizerConfig | None:
    return TokenizerConfig(name=str(path)) if (path / "tokenizer.json").is_file() else None


def _is_mpt(path: Path) -> bool:
    config = read_json(path / "config.json")
    # `llmtrain`: our own modelling file stands beside the weights, for other programs; here it is not run.
    own = config.get("model_type") in ("mpt", "llmtrain")
    return own or any("mpt" in str(name).lower() for name in config.get("architectures") or ())
