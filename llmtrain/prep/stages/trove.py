"""`datatrove`: filters of datatrove, class by class."""

from llmtrain.errors import UserError
from llmtrain.prep.stages.config import DatatroveFilter
from llmtrain.prep.stages.step import Change, Drop, Step, Verdict

# Random, and so different when work is done again; there is a stage for what the other does.
_REFUSED = {
    "SamplerFilter": "its choice depends on what came before; max_documents of a source takes less of it",
    "LambdaFilter": "a recipe cannot hold a Python function; name one with the stage `function`",
}


def datatrove_filter(config: DatatroveFilter) -> Step:
    """Drops what the filter drops; a filter may change the text as well (`C4QualityFilter` removes lines).

    Raises:
        UserError: datatrove is not installed, or has no such filter, or it cannot be made or applied.
    """
    called = f"stage datatrove: {config.filter}"
    if config.filter in _REFUSED:
        raise UserError(f"{called}: {_REFUSED[config.filter]}")
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters
        from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
    except ImportError as problem:
        raise UserError(f"{called} needs datatrove: pip install 'llmtrain[quality]' ({problem})") from problem
    kind = getattr(filters, config.filter, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseFilter) and kind is not BaseFilter):
        known = sorted(name for name in dir(filters) if name.endswith("Filter") and name not in _REFUSED)
        raise UserError(f"{called}: there is no such filter; there are {', '.join(known)}")
    try:
        made = kind(**config.kwargs)
    except ImportError as problem:
        raise UserError(f"{called}: {problem}") from problem
    except Exception as problem:  # of any library
        raise UserError(f"{called}: kwargs {config.kwargs}: {type(problem).__name__}: {problem}") from problem

    def judge(text: str) -> Verdict:
        document = Document(text=text, id="")
        try:
            keep, reason = get_filter_result(made.filter(document))
        except ImportError as problem:  # what is needed for a language is imported by the first document
            raise UserError(f"{config.filter}: {problem}") from problem
        if not keep:
            return Drop(reason or config.filter)
        return Change(document.text, {config.filter: 1}) if document.text != text else None

    return judge
