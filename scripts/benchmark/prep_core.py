"""The limit for prep.py: the tokenizer's core alone, from texts in memory to ids; prints CPU seconds as JSON."""

import json
import sys
import time
from itertools import chain
from pathlib import Path

from llmtrain.fast_bpe import translate


def main() -> None:
    source, tokenizer = sys.argv[1:]
    fast = translate((Path(tokenizer) / "tokenizer.json").read_text(encoding="utf-8"), checked=True)
    seconds, tokens, waiting, n_waiting = 0.0, 0, [], 0
    with Path(source).open(encoding="utf-8") as file:
        for line in chain(file, [None]):
            if line is not None:
                waiting.append(json.loads(line)["text"])
                n_waiting += len(waiting[-1])
            if line is None or n_waiting > 1 << 20:
                start = time.process_time()
                ids = [fast.encode(text) for text in waiting]
                seconds += time.process_time() - start
                tokens += sum(map(len, ids))
                waiting, n_waiting = [], 0
    print(json.dumps({"cpu": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
