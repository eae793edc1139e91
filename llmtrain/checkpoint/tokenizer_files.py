"""The tokenizer that belongs to weights, as the files of a folder."""

import json
import shutil
from pathlib import Path
from typing import Literal

from llmtrain.checkpoint.fetch import TOKENIZER_FILES
from llmtrain.errors import UserError
from llmtrain.inside import leads_outside
from llmtrain.json_text import parse_json
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer


def tokenizer_folder(tokenizer: TokenizerConfig | None, made: Path) -> Path | None:
    """A folder with a tokenizer's files: its own, or `made` for one that is elsewhere or was changed by its config."""
    if tokenizer is None:
        return None
    folder = Path(tokenizer.name).expanduser()
    if folder.is_dir() and tokenizer == TokenizerConfig(name=tokenizer.name):
        return folder
    save_tokenizer(load_tokenizer(tokenizer), made)
    return made


def copy_tokenizer(source: Path, target: Path, vocab_size: int) -> dict[str, int | None]:
    """Copy a tokenizer's files (and nothing else) into an export.

    Returns:
        ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` (EOS where the tokenizer has no padding token).

    Raises:
        UserError: there is no tokenizer.json, or it has more tokens than the model has rows.
    """
    from llmtrain.tokenizer import load_raw, special_token

    raw = load_raw(str(source))
    size = max(raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(
            f"{source}: the tokenizer has ids up to {size - 1:,}, but the model only {vocab_size:,} embeddings: they "
            "do not belong together."
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            _refuse_foreign_link(source, name)
            shutil.copyfile(source / name, target / name)
    _without_code(target / "tokenizer_config.json")
    ids: dict[str, int | None] = {}
    kinds: tuple[Literal["bos", "eos", "pad"], ...] = ("bos", "eos", "pad")
    for which in kinds:
        text = special_token(str(source), which)
        ids[f"{which}_token_id"] = None if text is None else raw.token_to_id(text)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"]
    return ids


def _refuse_foreign_link(source: Path, name: str) -> None:
    """An export is shown to others: a link to a private file must not become part of it.

    Files of the hub's cache are links to `blobs` beside their `snapshots`, and stay within the repository's folder.
    """
    file = source / name
    if not leads_outside(source, name):
        return
    target = file.resolve()
    if target.parent.name == "blobs" and file.absolute().is_relative_to(target.parent.parent):
        return
    raise UserError(f"{file}: is a link to {target}, outside of its folder; put the file itself there.")


def _without_code(file: Path) -> None:
    """Names a class that every version of transformers has, where the file names version 5's or one that is code.

    The tokenizer itself is tokenizer.json. Code is not copied, so naming it would keep the tokenizer from opening.
    """
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(config, dict) or not (
        config.get("tokenizer_class") == "TokenizersBackend" or "auto_map" in config
    ):
        return
    for key in ("auto_map", "backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
