"""llm-foundry's side of chat.py: runs in llm-foundry's environment, does what it is told over stdin."""

import json
import sys
import time
from pathlib import Path

import transformers
from llmfoundry import __version__
from llmfoundry.data.finetuning.tasks import tokenize_formatted_example


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=task["tokenizer_json"], eos_token=task["eos_token"], bos_token=task["eos_token"]
    )
    tokenizer.chat_template = task["chat_template"]
    rows = task["rows"]
    for line in sys.stdin:
        if line == "versions\n":
            answer = f"llm-foundry {__version__}, transformers {transformers.__version__}"
        elif line == "round\n":
            start = time.process_time()
            for row in rows:
                tokenize_formatted_example(row, tokenizer)
            answer = str(time.process_time() - start)
        else:
            turns = [tokenize_formatted_example(row, tokenizer)["turns"] for row in rows]
            ids = [[i for turn in example for part in ("input_ids", "labels") for i in turn[part]] for example in turns]
            Path(task["ids"]).write_text(json.dumps(ids))
            answer = "written"
        print(f"answer: {answer}", flush=True)


if __name__ == "__main__":
    main()
