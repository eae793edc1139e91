"""`llmtrain data inspect`: what shards hold, and whether they are whole. Imports neither torch nor Streaming."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from llmtrain.data import inspect_report as report
from llmtrain.data.inspect_counts import Vocabulary
from llmtrain.data.inspect_folder import Contents, read_folder
from llmtrain.data.inspect_picture import Drawn, draw
from llmtrain.data.shards import prepared_with
from llmtrain.data.verify import folders_of, manifest_of, missing_splits, print_checked, total_bytes
from llmtrain.errors import UserError
from llmtrain.progress import progress
from llmtrain.tokenizer import fingerprint, load_raw, special_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class _Opened(NamedTuple):
    name: str
    tokenizer: "Tokenizer"
    vocab_size: int
    eos: int | None
    fingerprint: str


def inspect_command(
    places: Sequence[Path],
    *,
    tokenizer: str | None = None,
    samples: int = 3,
    sample_tokens: int = 200,
    token_encoding_type: str = "int64",
    output: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Read shards once: check every file, count, draw the lengths, and show some rows.

    Args:
        places: folders of shards, or folders that have some below.
        tokenizer: name or folder; by default the one that `llmtrain prep` took, where it can be opened.
        samples: rows of each folder to show.
        sample_tokens: of each row, at most.
        token_encoding_type: dtype of the ids, for shards whose column is plain bytes.
        output: path of PNG and JSON without suffix; `inspect` in the first place when left out.
        console: where to; standard output when left out.

    Returns:
        Whether no shard is damaged.

    Raises:
        UserError: there are no shards, an id is outside of the vocabulary, or the tokenizer is not theirs.
    """
    console = console or Console(highlight=False)
    output = output or places[0] / "inspect"
    try:
        dtype = np.dtype(token_encoding_type)
    except TypeError as problem:
        raise UserError(f"--token-encoding-type {token_encoding_type}: no dtype of numpy") from problem
    if dtype.kind not in "iu":
        raise UserError(f"--token-encoding-type {token_encoding_type}: ids are integers (int64, int32, uint16, ...)")
    folders = folders_of(places)
    opened = _open_tokenizer(folders, tokenizer, console)
    found = []
    with progress(console, "reading", total_bytes(folders), "bytes") as advance:
        for folder, name in zip(folders, _short_names(folders), strict=True):
            _check_tokenizer(folder, opened, explicit=tokenizer is not None)
            contents = read_folder(
                folder,
                name=name,
                eos=None if opened is None else opened.eos,
                vocab_size=None if opened is None else opened.vocab_size,
                samples=samples,
                bytes_dtype=dtype.newbyteorder("<"),
                advance=advance,
            )
            found.append(contents)
    _report(console, places, found, opened, sample_tokens)
    _write(console, found, opened, output)
    checked = [contents.checked for contents in found] + missing_splits(places)
    console.print()
    print_checked(console, checked)
    return not any(one.damages for one in checked)


def _report(
    console: Console, places: Sequence[Path], found: Sequence[Contents], opened: _Opened | None, sample_tokens: int
) -> None:
    for made in _manifests(places, found):
        report.print_origin(console, *made)
    tokens = [contents for contents in found if contents.kind == "tokens"]
    text = [contents for contents in found if contents.kind == "text"]
    raw = None if opened is None else opened.tokenizer
    if tokens:
        report.print_tokens(console, tokens, None if opened is None else opened.vocab_size)
        report.print_frequent(console, _all(tokens), raw)
    if text:
        report.print_text(console, text)
    for contents in found:
        report.print_lengths(console, contents)
    for contents in found:
        report.print_samples(console, contents, raw, sample_tokens)


def _write(console: Console, found: Sequence[Contents], opened: _Opened | None, output: Path) -> None:
    content = {
        "tokenizer": None if opened is None else opened.name,
        "folders": [report.as_dict(contents, None if opened is None else opened.vocab_size) for contents in found],
    }
    drawable = [contents for contents in found if contents.rows]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with_suffix = output.with_name(output.name + ".json")
        with_suffix.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written = [with_suffix]
        for kind in ("tokens", "text"):
            of_kind = [contents for contents in drawable if contents.kind == kind]
            if not of_kind:
                continue
            both = len({contents.kind for contents in drawable}) > 1
            picture = output.with_name(f"{output.name}-{kind}.png" if both else f"{output.name}.png")
            what = "documents" if all(contents.lengths[0] == "documents" for contents in of_kind) else "rows"
            drawn = [
                Drawn(
                    contents.name,
                    contents.lengths[1] if what == "documents" else contents.row_lengths,
                    contents.vocabulary.by_rank(),
                )
                for contents in of_kind
            ]
            lengths = {contents.row_lengths.most for contents in of_kind}
            row = lengths.pop() if what == "documents" and len(lengths) == 1 else None
            draw(drawn, what, "tokens" if kind == "tokens" else "bytes", picture, row_length=row)
            written.append(picture)
    except OSError as problem:
        raise UserError(
            f"{output}: the results cannot be written ({problem}); give another place with --output"
        ) from problem
    console.print(f"\nwritten     {'  '.join(map(str, written))}", soft_wrap=True, markup=False)


def _open_tokenizer(folders: Sequence[Path], name: str | None, console: Console) -> _Opened | None:
    if name is not None:
        return _open(name)
    for guess in dict.fromkeys(guess for guess in map(_tokenizer_of, folders) if guess is not None):
        try:
            return _open(guess)
        except UserError as problem:
            console.print(f"note: rows are not decoded: {problem}", soft_wrap=True, markup=False)
            return None
    return None


def _open(name: str) -> _Opened:
    raw = load_raw(name)
    text = special_token(name, "eos")
    eos = None if text is None else raw.token_to_id(text)
    return _Opened(name, raw, max(raw.get_vocab(with_added_tokens=True).values()) + 1, eos, fingerprint(name))


def _tokenizer_of(folder: Path) -> str | None:
    """The tokenizer that made a folder, as its manifest tells."""
    made = manifest_of(folder)
    if made is None:
        return None
    if (made[0] / "tokenizer" / "tokenizer.json").is_file():
        return str(made[0] / "tokenizer")
    tokenizer = (made[1].get("recipe") or {}).get("tokenizer") or {}
    name = tokenizer.get("name")
    return name if isinstance(name, str) else None


def _check_tokenizer(folder: Path, opened: _Opened | None, *, explicit: bool) -> None:
    """Ids of one tokenizer, decoded with another, would be nonsense that looks like damaged data."""
    theirs = (prepared_with(folder) or {}).get("tokenizer_fingerprint")
    if opened is None or theirs is None or theirs == opened.fingerprint:
        return
    say = "give theirs with --tokenizer" if not explicit else "leave --tokenizer out, or give theirs"
    raise UserError(
        f"{folder} was made with another tokenizer (fingerprint {theirs[:12]}) than {opened.name} "
        f"({opened.fingerprint[:12]}): {say}; look at folders of different tokenizers one by one"
    )


def _manifests(places: Sequence[Path], found: Sequence[Contents]) -> list[tuple[Path, dict[str, Any]]]:
    made = [manifest_of(contents.checked.folder) for contents in found]
    return list({one[0]: one for one in made if one is not None}.values())


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Paths without what they have in common."""
    if len(folders) == 1:
        return [folders[0].name or str(folders[0])]
    parts = [folder.absolute().parts for folder in folders]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return ["/".join(part[common:]) for part in parts]


def _all(found: Sequence[Contents]) -> Vocabulary:
    together = Vocabulary()
    for contents in found:
        together.merge(contents.vocabulary)
    return together
