"""`python -m llmtrain VERB`, for launchers that start modules: `torchrun --nproc-per-node 8 -m llmtrain eval ...`."""

from llmtrain.cli import main

main()
