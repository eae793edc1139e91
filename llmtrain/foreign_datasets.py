"""Data sets through the package datasets, which can run code that others wrote. Light until one is opened."""

from typing import Any

from llmtrain.errors import UserError

_PICKLES = ("pandas",)
"""Builders that unpickle `data_files` (in releases of datasets below the newest); a pickle is a program."""


def load_dataset(name: str, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, without any code that comes with a data set.

    Args:
        name: of a data set on the hub, a local folder, or a builder.
        kwargs: its other arguments, as a recipe gives them.

    Raises:
        UserError: they ask for code to be run.
    """
    refuse_code(name, kwargs)
    import datasets  # only here: it is slow to import

    # Releases below 4 still know scripts, and below 2.20 run them unasked; they run none when this says so.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    return datasets.load_dataset(name, **kwargs)


def refuse_code(name: str, kwargs: dict[str, Any]) -> None:
    """Refuse what would have datasets run code.

    Raises:
        UserError: it is a builder that unpickles files, or `trust_remote_code` is among the arguments.
    """
    if name in _PICKLES:
        raise UserError(
            f"the data set {name!r} is a builder of datasets that unpickles files, and a pickle can run any code; it "
            "is not read, and no flag changes that. Convert the files to parquet or jsonl where they were made."
        )
    if kwargs.get("trust_remote_code"):
        raise UserError(
            f"the data set {name!r}: scripts of data sets are not run, and no flag changes that (trust_remote_code). "
            "Remove the key; give files, or a data set without a script."
        )
