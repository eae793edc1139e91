"""The layout of an export: plain MPT where that is the same function, else another class that is, else none."""

from llmtrain.checkpoint.hugging_face_config import inexpressible
from llmtrain.checkpoint.layouts.code import CodeLayout
from llmtrain.checkpoint.layouts.layout import Layout, LayoutName
from llmtrain.checkpoint.layouts.llama import LlamaLayout, not_llama
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
    not_mpt = "transformers' own MPT cannot express " + "; ".join(problems)
    beyond_llama = not_llama(config)
    if not beyond_llama:
        name: LayoutName = "mistral" if config.attn_config.sliding_window_size > 0 else "llama"
        return LlamaLayout(name, f"{not_mpt}. {name.capitalize()} computes the same function.")
    if with_code:
        return CodeLayout(f"{not_mpt}. So llmtrain's modelling file stands beside the weights.")
    raise UserError(
        f"{where}: transformers' own MPT cannot express this model and would silently compute another function:\n  "
        + "\n  ".join(problems)
        + ("\nNor can its Llama or Mistral:\n  " + "\n  ".join(beyond_llama) if config.attn_config.rope else "")
        + "\nPass --with-code to export it with llmtrain's modelling file beside the weights (it then opens with "
        "trust_remote_code=True only); the checkpoint itself works with `llmtrain generate` and `llmtrain eval`."
    )
