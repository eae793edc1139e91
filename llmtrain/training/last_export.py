"""The last export of a run that is complete, where it was lost after the last checkpoint."""

import json
import sys
from pathlib import Path

from composer.core import Timestamp
from composer.utils import dist

from llmtrain.checkpoint.exported_files import RECORD
from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.background_export import BackgroundExport
from llmtrain.training.export_place import ExportPlace
from llmtrain.training.resume import StartingPoint


def last_export_made_up(recipe: Recipe, start: StartingPoint) -> int:
    """Makes the last export of a run that was stopped between its last checkpoint and the end of that export.

    Returns:
        0: it is there, or the run has no exports. 1: it cannot be made.
    """
    settings = recipe.callbacks.hf_checkpointer if recipe.callbacks is not None else None
    if settings is None or start.load_path is None or dist.get_global_rank() > 0:
        return 0
    place = ExportPlace.of(
        settings.save_folder,
        settings.huggingface_folder_name,
        settings.push,
        recipe.run_name,
        Path("runs") / recipe.run_name,
    )
    checkpoint = Path(start.load_path)
    checkpoint = checkpoint.parent if checkpoint.is_file() else checkpoint
    info = next(one for one in checkpoints_in(checkpoint.parent) if one.path.name == checkpoint.name)
    tokens = info.manifest.tokens if info.manifest is not None else 0
    name = place.name(recipe.run_name, Timestamp(epoch=max(info.epoch, 0), batch=info.step, token=tokens))
    # What is only sent elsewhere cannot be looked for here.
    if not place.keep or (place.folder / name).exists() or exported(place.folder, recipe.run_name, info.step):
        return 0
    place.prepare(fresh=False, overwrite=settings.overwrite)
    _say(f"{place.folder / name} is missing: it is made from {checkpoint}")
    background = BackgroundExport()
    try:
        background.start(
            None,
            source=str(checkpoint.absolute()),
            target=str((place.folder / name).absolute()),
            dtype=settings.precision,
            overwrite=settings.overwrite,
            with_code=settings.with_code,
            push=place.destinations(name),
            run=recipe.run_name,
        )
        while not background.ended(1.0):
            pass
        problem = background.answer().problem
    except OSError as error:
        problem = str(error)
        background.stop()
    _say(f"FAILED. {problem}" if problem is not None else str(place.folder / name))
    return 0 if problem is None else 1


def exported(folder: Path, run_name: str, step: int) -> bool:
    """Whether an export of a run's step lies in a folder, under any name.

    A name may hold what a checkpoint does not tell (`{sample}`, `{batch_in_epoch}`); the record in it says what it is.

    Args:
        folder: of exports.
        run_name: the run's.
        step: finished optimizer steps.
    """
    for record in folder.glob(f"*/{RECORD}"):
        try:
            run, _, checkpoint = str(json.loads(record.read_text())["source"]).rpartition("/")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if run == run_name and checkpoint.rpartition("-ba")[2] == str(step):
            return True
    return False


def _say(line: str) -> None:
    print(f"export      {line}", file=sys.stderr, flush=True)
