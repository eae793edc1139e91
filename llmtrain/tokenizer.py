"""Tokenizers: found by name or folder, opened light (`tokenizers`) or full (`transformers`), and told apart by hash."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmtrain.config.base import Config
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TokenizerConfig(Config):
    """Which tokenizer a recipe uses."""

    name: str = Field(min_length=1)
    """A name on the Hugging Face hub (`EleutherAI/gpt-neox-20b`), or a local folder with a `tokenizer.json`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is set exactly as given here."""


def load_tokenizer(cfg: TokenizerConfig) -> "PreTrainedTokenizerFast":
    """Open a tokenizer through transformers.

    Code from the hub is not run unless `kwargs` says `trust_remote_code: true`.

    Raises:
        UserError: it is not there, is not a fast tokenizer, or has no end-of-text token.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the loader's forks
    from transformers import AutoTokenizer

    _refuse_missing_folder(cfg.name)
    kwargs = {"trust_remote_code": False, **cfg.kwargs, "use_fast": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.name, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as problem:
        raise UserError(f"tokenizer {cfg.name!r} cannot be opened: {_first_line(problem)}") from problem
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {cfg.name!r} has no tokenizer.json (a 'fast' tokenizer is needed)")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {cfg.name!r} has no end-of-text token: name one with tokenizer.kwargs.eos_token=..., "
            "the same that the documents of the shards end with"
        )
    if "model_max_length" in cfg.kwargs:
        # transformers may have taken the smaller of this and what the hub says.
        tokenizer.model_max_length = cfg.kwargs["model_max_length"]
    return tokenizer


def load_raw(name: str, revision: str | None = None) -> "Tokenizer":
    """Open a tokenizer through `tokenizers` alone (a fraction of a second), without truncation or padding.

    Raises:
        UserError: it is not there or cannot be read.
    """
    from tokenizers import Tokenizer

    path = tokenizer_json_path(name, revision)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # tokenizers raises plain Exception
        raise UserError(f"{path} is not a tokenizer that this version of `tokenizers` reads: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_json_path(name: str, revision: str | None = None) -> Path:
    """The `tokenizer.json` of a local folder, or of a hub name (downloaded once, then from the cache).

    Raises:
        UserError: there is none.
    """
    path = _find_file(name, "tokenizer.json", revision)
    if path is None:
        raise UserError(f"tokenizer {name!r} has no tokenizer.json (a 'fast' tokenizer is needed)")
    return path


def special_token(name: str, which: Literal["eos", "bos", "pad"], revision: str | None = None) -> str | None:
    """The text of a tokenizer's special token, or None; read from its files, without transformers."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = _find_file(name, file, revision)
        if path is None:
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get(f"{which}_token")
        if value is not None:
            return str(value["content"] if isinstance(value, dict) else value)
    return None


def fingerprint(name: str, revision: str | None = None) -> str:
    """What tells two tokenizers apart: sha256 (hex) over what the ids mean.

    That is the model's type, its vocabulary with the added tokens, and its merges, in one spelling. Left out are the
    parts that do not change what an id stands for and that transformers rewrites when it saves a tokenizer
    (truncation, padding, post-processing, the older spelling of merges): a tokenizer keeps its fingerprint through
    `save_pretrained` and from version to version.

    Raises:
        UserError: there is no such tokenizer.
    """
    path = tokenizer_json_path(name, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            ids = dict(vocab)
        else:  # Unigram: [[piece, score], ...], the id is the position
            ids = {piece: number for number, (piece, _) in enumerate(vocab)}
        ids.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges", [])]
        meaning = {"type": model.get("type"), "ids": sorted(ids.items()), "merges": merges}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not a tokenizer.json: {problem!r}") from problem
    return hashlib.sha256(json.dumps(meaning, ensure_ascii=True).encode()).hexdigest()


def _find_file(name: str, file: str, revision: str | None) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    _refuse_missing_folder(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as problem:  # a subclass of EntryNotFoundError: offline, and not in the cache
        raise UserError(
            f"{file} of tokenizer {name!r} is not in the local cache and the hub cannot be reached. "
            f"Give a local folder, or download it first where there is a network: hf download {name}"
        ) from problem
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise UserError(f"tokenizer {name!r} cannot be fetched: {_first_line(problem)}") from problem


def _refuse_missing_folder(name: str) -> None:
    """A path that is not there must not be taken for a name on the hub."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise UserError(f"tokenizer: there is no folder {name!r} (from {Path.cwd()})")


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
