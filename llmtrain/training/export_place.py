"""Where the exports of a run go: `save_folder/huggingface/NAME`, on this machine or elsewhere."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError
from llmtrain.training.background_export import remove_half_written

if TYPE_CHECKING:
    from composer.core import Timestamp

FOLDER = "huggingface"
"""Of a save_folder; llm-foundry's name."""
KEY = "callbacks.hf_checkpointer"


@dataclass(frozen=True)
class ExportPlace:
    """A folder here, and where its exports are copied to."""

    folder: Path
    """Where exports are made."""
    pattern: str
    """Name of an export, with Composer's placeholders."""
    push: tuple[str, ...]
    """Where they are copied to: URLs or folders."""
    keep: bool
    """False: the folder is only a stage on the way to `push`."""

    @classmethod
    def of(cls, save_folder: str, pattern: str, push: str | None, run_name: str, run: Path) -> "ExportPlace":
        """From the settings; `{run_name}` is filled in.

        Args:
            save_folder: a folder or a URL.
            pattern: name of an export.
            push: a further place, or None.
            run_name: the run's.
            run: the run's folder; where `save_folder` is elsewhere, exports are made in it first.

        Raises:
            UserError: one of them names no place.
        """
        place = save_folder.replace("{run_name}", run_name)
        more = (_destination("push", push.replace("{run_name}", run_name)),) if push is not None else ()
        if "://" not in place:
            return cls(Path(place) / FOLDER, pattern, more, True)
        url = _destination("save_folder", place)
        elsewhere = url if url.startswith("hf://") else f"{url}/{FOLDER}"
        return cls(run / FOLDER, pattern, (elsewhere, *more), False)

    def name(self, run_name: str, timestamp: "Timestamp") -> str:
        """Of the export at this moment of the training."""
        from composer.utils import format_name_with_dist_and_time

        name: str = format_name_with_dist_and_time(self.pattern, run_name, timestamp)
        return name

    def destinations(self, name: str) -> list[str]:
        """Where the export of this name is copied to; a hub's repository holds the newest one itself."""
        return [url if url.startswith("hf://") else f"{url}/{name}" for url in self.push]

    def prepare(self, *, fresh: bool, overwrite: bool) -> None:
        """Makes the folder, tries to write there, and removes what a killed run left half-written.

        Args:
            fresh: the run starts at step 0.
            overwrite: exports of an earlier run may be replaced.

        Raises:
            UserError: it cannot be written, or holds exports of an earlier run that may not be replaced.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial = self.folder / f".trial-{uuid.uuid4().hex[:8]}"
            trial.write_bytes(b"x")
            trial.unlink()
        except OSError as error:
            raise UserError(
                f"{KEY}.save_folder: exports cannot be written to {self.folder}: {error.strerror}"
            ) from None
        for left in self.folder.glob(".*.exporting-*"):
            remove_half_written(self.folder / left.name[1:].rpartition(".exporting-")[0])
        earlier = sorted(entry.name for entry in self.folder.iterdir() if (entry / "config.json").is_file())
        if fresh and earlier and not overwrite:
            raise UserError(
                f"{KEY}: {self.folder} holds exports of an earlier run ({', '.join(earlier[:4])}). Set overwrite: true "
                "to replace them, or another save_folder or run_name."
            )


def _destination(key: str, text: str) -> str:
    """Without slashes at its end."""
    scheme, separator, place = text.partition("://") if "://" in text else ("", "", text)
    if not place.strip("/ "):
        raise UserError(f"{KEY}.{key}: `{text}` names no place; expected a folder, or a URL such as s3://BUCKET/PATH.")
    return f"{scheme}{separator}{place.rstrip('/')}"
