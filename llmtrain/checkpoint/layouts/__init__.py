"""Under which class of transformers a model is written: the one that computes exactly its function.

`choose.py` chooses; each other file is one layout: what goes into config.json, and how the weights are named there.
"""

from llmtrain.checkpoint.layouts.choose import choose_layout
from llmtrain.checkpoint.layouts.layout import Layout, LayoutName

__all__ = ["Layout", "LayoutName", "choose_layout"]
