"""Where rows come from: files, and datasets that `datasets` opens."""

from llmtrain.conversations.files import expand, file_rows, identity_of_files
from llmtrain.conversations.hf_rows import hf_rows, identity_of_dataset
from llmtrain.conversations.row import Row

__all__ = ["Row", "expand", "file_rows", "hf_rows", "identity_of_dataset", "identity_of_files"]
