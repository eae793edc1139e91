"""Tokenizers: found by name or folder, opened light (`tokenizers`) or full (`transformers`), and told apart by hash."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmtrain.chat_template import NAMED, needed_tokens, template_text
from llmtrain.config.base import Config, mistake
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.quiet_transformers import quiet_transformers
from llmtrain.trust import python_files, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TokenizerConfig(Config):
    """Which tokenizer a recipe uses."""

    name: str = Field(min_length=1)
    """A name on the Hugging Face hub (`EleutherAI/gpt-neox-20b`), or a local folder with a `tokenizer.json`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is set exactly as given here."""
    chat_template: str | None = None
    """How a conversation becomes text: `chatml`, `dolly`, the path of a `.jinja` file, or Jinja text.

    Without it the tokenizer's own template is used, and ChatML where fine-tuning needs one and the tokenizer has none.
    The tokens that a named template needs are added to the vocabulary where they are missing."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """What a named template says as system turn where a conversation has none.

    It is written into the template, so that training, the export and `llmtrain chat` agree."""
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Special tokens to add to the vocabulary where they are missing; the embeddings must have room for them."""

    @model_validator(mode="after")
    def _system_prompt_has_a_place(self) -> Self:
        if self.system_prompt is not None and self.chat_template not in NAMED:
            raise mistake(
                f"A system prompt is written into a named template: set chat_template to one of {', '.join(NAMED)}. "
                "Any other template says its system turn itself.",
                "system_prompt",
            )
        return self


def load_tokenizer(cfg: TokenizerConfig) -> "PreTrainedTokenizerFast":
    """Open a tokenizer through transformers.

    Code that comes with it is not run unless `kwargs` says `trust_remote_code: true`, and then with `--trust-code`
    only. The chat template and the special
    tokens of the config are part of what is returned: `save_pretrained` writes them.

    Raises:
        UserError: it is not there, is not a fast tokenizer, has no end-of-text token, or the chat template is none.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the loader's forks
    from transformers import AutoTokenizer

    _refuse_missing_folder(cfg.name)
    # With null transformers would ask at the terminal.
    kwargs = {**cfg.kwargs, "trust_remote_code": bool(cfg.kwargs.get("trust_remote_code")), "use_fast": True}
    if kwargs["trust_remote_code"]:
        what = "the Python code that comes with this tokenizer" + _of_revision(cfg.kwargs)
        require("tokenizer.kwargs.trust_remote_code", cfg.name, what=what, files=python_files(cfg.name))
    try:
        with (
            quiet_transformers()
        ):  # of a model's folder it reads the config, too, and wonders at types it does not know
            tokenizer = AutoTokenizer.from_pretrained(cfg.name, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as problem:
        if "trust_remote_code" in str(problem):
            raise UserError(
                f"tokenizer {cfg.name!r} comes with Python code of its own. If you have read it and trust it: "
                "tokenizer.kwargs.trust_remote_code=true --trust-code"
            ) from problem
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
    if cfg.chat_template is not None:
        tokenizer.chat_template = template_text(cfg.chat_template, cfg.system_prompt)
    _add_special_tokens(tokenizer, (*needed_tokens(cfg.chat_template), *cfg.special_tokens))
    return tokenizer


def _of_revision(kwargs: Mapping[str, Any]) -> str:
    revision = kwargs.get("code_revision") or kwargs.get("revision")
    return f" (revision {revision})" if revision else ""


def with_chat_template(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """The same tokenizer, given ChatML (and its two special tokens) if it has no chat template."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = template_text("chatml")
        _add_special_tokens(tokenizer, NAMED["chatml"])
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a tokenizer so that every version of transformers opens it.

    Version 5 calls the class of a plain fast tokenizer by a name that version 4 does not know, and both know the older.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = parse_json(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):  # how it was opened here
            config.pop(key, None)
    # Version 4's class gives token_type_ids otherwise, which `generate` of decoders refuses.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def tokenizer_size(cfg: TokenizerConfig, *, chat: bool = False) -> int:
    """Rows that an embedding needs for a tokenizer: its largest id plus one, with the tokens that will be added.

    Light: nothing is opened but its files.

    Args:
        cfg: The recipe's `tokenizer`.
        chat: Count as `with_chat_template` leaves it: with the tokens of ChatML if it has no template of its own.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    from tokenizers import AddedToken

    revision = cfg.kwargs.get("revision")
    raw = load_raw(cfg.name, revision)
    wanted = list(_named_in_files(cfg, revision))
    wanted += needed_tokens(cfg.chat_template)
    wanted += cfg.special_tokens
    if chat and cfg.chat_template is None and not _has_chat_template(cfg, revision):
        wanted += NAMED["chatml"]
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
    return max(raw.get_vocab(with_added_tokens=True).values()) + 1


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
        value = parse_json(path.read_text(encoding="utf-8")).get(f"{which}_token")
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
        return _hash_of_text(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not a tokenizer.json: {problem!r}") from problem


def fingerprint_of(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The `fingerprint` of an open tokenizer, with the tokens that were added to it.

    Where nothing was added it is the `fingerprint` of the folder or name that the tokenizer came from.
    """
    return _hash_of_meaning(parse_json(tokenizer.backend_tokenizer.to_str()))


@lru_cache(maxsize=1)  # half a second for 50,000 tokens, and asked for more than once
def _hash_of_text(text: str) -> str:
    return _hash_of_meaning(parse_json(text))


def _hash_of_meaning(content: Mapping[str, Any]) -> str:
    """Over the content of a `tokenizer.json`; see `fingerprint`."""
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        ids = dict(vocab)
    else:  # Unigram: [[piece, score], ...], the id is the position
        ids = {piece: number for number, (piece, _) in enumerate(vocab)}
    ids.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges", [])]
    meaning = {"type": model.get("type"), "ids": sorted(ids.items()), "merges": merges}
    return hashlib.sha256(json.dumps(meaning, ensure_ascii=True).encode()).hexdigest()


def _add_special_tokens(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)


def _named_in_files(cfg: TokenizerConfig, revision: str | None) -> list[str]:
    """Special tokens that transformers adds when it opens a tokenizer, in case `tokenizer.json` does not have them."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        found.update(_read_json(cfg.name, file, revision))
    found.update(cfg.kwargs)
    tokens = [found[key] for key in sorted(found) if key.endswith("_token") and not key.startswith("add_")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = found.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    tokens += (found.get("added_tokens_decoder") or {}).values()
    texts = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return [text for text in texts if isinstance(text, str)]


def _has_chat_template(cfg: TokenizerConfig, revision: str | None) -> bool:
    return bool(
        cfg.kwargs.get("chat_template")
        or _find_file(cfg.name, "chat_template.jinja", revision)
        or _read_json(cfg.name, "tokenizer_config.json", revision).get("chat_template")
    )


def _read_json(name: str, file: str, revision: str | None) -> dict[str, Any]:
    path = _find_file(name, file, revision)
    try:
        content = {} if path is None else parse_json(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not JSON: {problem}") from problem
    return content if isinstance(content, dict) else {}


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
