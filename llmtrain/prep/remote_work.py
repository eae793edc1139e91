"""Unfinished output on object storage or an SFTP server."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from llmtrain.data.shards import MANIFEST, check_names
from llmtrain.errors import UserError
from llmtrain.prep import storage
from llmtrain.prep.in_threads import in_threads
from llmtrain.prep.remote_lock import remote_lock, require_not_lost
from llmtrain.prep.scratch import scratch_folder
from llmtrain.prep.stores.open import open_store
from llmtrain.prep.stores.retry import persistently
from llmtrain.redaction import without_password

WORK = ".work"
RECORD = ".files.json"
_FILES, _DISCARDED, _LOCKS = "files", "discarded.json", "locks"

_downloaded: dict[str, Path] = {}
_kept = ExitStack()


class RemoteWork:
    """`Work` where files cannot be hidden and renamed: they are uploaded to their places, and the index comes last.

    Without `index.json` nobody reads the shards; working files are below `OUT/.work/`. Before a file is uploaded, its
    name is written down there, so that what is deleted later is what prep wrote and nothing else: `OUT/.files.json`
    has all names in the end. Temporary files are on this machine.

    Args:
        out: URL of the output.
    """

    def __init__(self, out: str) -> None:
        self.out = out.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """See `Work`."""
        return storage.read_bytes(self._working(name))

    def write(self, name: str, data: bytes) -> None:
        """See `Work`."""
        self._put(self._working(name), data)

    def names(self, folder: str) -> set[str]:
        """See `Work`."""
        return {name for name in storage.names_below(self._working(folder)) if "/" not in name}

    def local(self, folder: str) -> Path:
        """See `Work`. A process downloads it once."""
        url = f"{self.out}/{folder}"
        if url not in _downloaded:
            names = list(storage.names_below(url))
            if not names:
                raise UserError(f"{without_password(url)}: there is no such folder")
            check_names(names, without_password(url))
            here = _kept.enter_context(scratch_folder())
            for name in names:
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).write_bytes(storage.read_bytes(f"{url}/{name}") or b"")
            _downloaded[url] = here
        return _downloaded[url]

    def temporary(self) -> AbstractContextManager[Path]:
        """See `Work`."""
        return scratch_folder()

    def commit(self, files: Mapping[str, Path], marker: str, content: bytes) -> None:
        """See `Work`."""
        require_not_lost(self.out)
        self._record(marker, files)
        for place, path in files.items():
            self._put(f"{self.out}/{place}", path)
        self.write(marker, content)

    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> AbstractContextManager[None]:
        """See `Work` and `remote_lock`."""
        return remote_lock(self._working(f"{_LOCKS}/{name}"), shared=shared, wait=wait)

    def publish(self, files: Mapping[str, bytes]) -> None:
        """See `Work`. A reader sees each folder of shards from its `index.json` on."""
        require_not_lost(self.out)
        self._record("", files)
        everything = json.dumps(sorted(self._recorded()), indent=1).encode()
        self._put(f"{self.out}/{RECORD}", everything)
        for place, data in files.items():
            self._put(f"{self.out}/{place}", data)
        self._clear_work()

    def amend(self, files: Mapping[str, bytes]) -> None:
        """See `Work`."""
        for place, data in files.items():
            self._put(f"{self.out}/{place}", data)

    def published(self, name: str) -> bytes | None:
        """See `Work`."""
        return storage.read_bytes(f"{self.out}/{name}")

    def occupied(self) -> bool:
        """See `Work`."""
        ours = self._recorded() | {RECORD}
        return any(name not in ours and not name.startswith(f"{WORK}/") for name in storage.names_below(self.out))

    def repair(self) -> None:
        """See `Work`."""
        if self.read(_DISCARDED) is not None:
            self._delete_discarded()
        elif self.published(MANIFEST) is not None:  # all is there: only the end of `publish` is missing
            self._clear_work()

    def is_clean(self) -> bool:
        """See `Work`."""
        return all(name.startswith(f"{_LOCKS}/") for name in storage.names_below(self._working("")))

    def discard(self) -> None:
        """Delete what is unfinished, and what is finished, too: it cannot stay beside what takes its place.

        Raises:
            UserError: there is finished output of which it is not known what belongs to it.
        """
        places = self._recorded()
        record = self.published(RECORD)
        if record is not None:
            places |= set(json.loads(record))
        elif self.published(MANIFEST) is not None:
            raise UserError(
                f"{without_password(self.out)} holds data that were copied there (no {RECORD}): what belongs to them "
                "is not known. Delete them yourself, or choose another place"
            )
        for url in [url for url in _downloaded if url.startswith(f"{self.out}/")]:
            del _downloaded[url]
        self.write(_DISCARDED, json.dumps(sorted(places)).encode())
        self._delete_discarded()

    def _delete_discarded(self) -> None:
        places = set(json.loads(self.read(_DISCARDED) or b"[]"))
        check_names(sorted(places), without_password(self.out))
        # First what makes the output look finished, then what makes it visible.
        finished = places & {MANIFEST}
        visible = {place for place in places if place.rpartition("/")[2] == "index.json"}
        for group in (finished, visible, places - finished - visible, {RECORD}):
            self._remove(f"{self.out}/{place}" for place in sorted(group))
        self._clear_work()

    def _clear_work(self) -> None:
        """Delete the working files, but for the locks: they are their holders'."""
        names = [name for name in storage.names_below(self._working("")) if not name.startswith(f"{_LOCKS}/")]
        # The list of what to delete last, or a process that is killed here would leave the rest for ever.
        files = {name for name in names if name.startswith(f"{_FILES}/")}
        last = {_DISCARDED} & set(names)
        for group in (files, set(names) - files - last, last):
            self._remove(self._working(name) for name in sorted(group))
        store, _, path = open_store(self.out)
        persistently(lambda: store.prune(path, leftovers=True), f"deleting empty folders below {self.out}")

    def _record(self, marker: str, places: Iterable[str]) -> None:
        name = hashlib.sha256(marker.encode()).hexdigest()[:24]
        self.write(f"{_FILES}/{name}.json", json.dumps(sorted(places)).encode())

    def _recorded(self) -> set[str]:
        """All files of the unfinished output, uploaded or about to be."""
        contents = list(in_threads(self.read, [f"{_FILES}/{name}" for name in sorted(self.names(_FILES))]))
        contents.append(self.read(_DISCARDED))
        return {place for content in contents if content is not None for place in json.loads(content)}

    def _working(self, name: str) -> str:
        return f"{self.out}/{WORK}/{name}".rstrip("/")

    def _put(self, url: str, content: bytes | Path) -> None:
        store, _, path = open_store(url)
        try:
            persistently(lambda: store.put(path, content), f"writing {url}")
        except FileNotFoundError as problem:
            raise UserError(f"{without_password(url)} cannot be written: {problem}") from problem

    def _remove(self, urls: Iterable[str]) -> None:
        for _ in in_threads(self._remove_one, urls):
            pass

    def _remove_one(self, url: str) -> None:
        store, _, path = open_store(url)
        persistently(partial(store.remove, path), f"deleting {url}")
