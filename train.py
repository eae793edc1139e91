"""composer train.py yamls/mpt-7b.yaml [key=value ...]: trains a recipe. The same as `llmtrain train`."""

import sys

from llmtrain.training.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
