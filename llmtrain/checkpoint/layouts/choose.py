"""The layout of an export: plain MPT where that is the same function, else another class that is, else none."""

from llmtrain.checkpoint.hugging_face_config import inexpressible
from llmtrain.checkpoint.layouts.layout import Layout
from llmtrain.checkpoint.layouts.mpt import MptLayout
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig


def choose_layout(config: MPTConfig, *, with_code: bool, where: str) -> Layout:
    """The plainest layout that computes exactly what the model computes.

    Args:
        config: Of the model.
        with_code: Whether our modelling file may stand beside the weights, where nothing plain fits.
        where: Of what the message speaks.

    Raises:
        UserError: no class of transformers expresses the model and no code is allowed; each key is named.
    """
    problems = inexpressible(config)
    if not problems:
        return MptLayout()
    raise UserError(
        f"{where}: transformers' own MPT cannot express this model and would silently compute another function:\n  "
        + "\n  ".join(problems)
        + "\nExports of such models (with a modelling file, or as another architecture) are not supported yet; the "
        "checkpoint itself works with `llmtrain generate`."
    )
