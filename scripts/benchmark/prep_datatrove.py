"""datatrove's side of prep.py: folder of JSON lines, output, tokenizer, EOS, tasks, workers."""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    source, out, tokenizer, eos, tasks, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(source),
            DocumentTokenizer(
                f"{out}/tokens", f"{tokenizer}/tokenizer.json", eos_token=eos, shuffle_documents=False, save_index=False
            ),
        ],
        tasks=int(tasks),
        workers=int(workers),
        logging_dir=f"{out}/logs",
    ).run()


if __name__ == "__main__":
    main()
