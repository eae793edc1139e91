"""How many MB of text a second each quality stage of a data recipe takes, on one core.

python scripts/benchmark/prep_stages.py CORPUS.jsonl [--mb 5] [--rounds 3] [--peers]

Rows of `{"text": ...}`. Figures are medians of CPU seconds of this process. `--peers` adds datatrove's MinHash
signature and PII formatter, on the first megabyte, as its filters.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llmtrain.prep.documents import Document
from llmtrain.prep.stages import Pipeline, passes, reduce, sign
from llmtrain.prep.stages.config import StageConfig

STAGES: dict[str, dict[str, Any]] = {
    "exact_dedup, sign": {"name": "exact_dedup"},
    "exact_dedup, sign, ignore both": {"name": "exact_dedup", "ignore": ["case", "whitespace"]},
    "minhash_dedup, sign": {"name": "minhash_dedup"},
    "length": {"name": "length", "min_words": 1, "max_mean_word_length": 100},
    "symbol_ratio": {"name": "symbol_ratio", "min_stop_words": 2},
    "repetition": {"name": "repetition"},
    "regex, 1 pattern": {"name": "regex", "patterns": ["(?i)lorem ipsum"], "action": "drop"},
    "pii: email, ip": {"name": "pii"},
    "pii: email, ip, phone": {"name": "pii", "kinds": ["email", "ip", "phone"]},
    "decontaminate": {"name": "decontaminate"},
    "datatrove GopherQualityFilter": {"name": "datatrove", "filter": "GopherQualityFilter"},
    "datatrove GopherRepetitionFilter": {"name": "datatrove", "filter": "GopherRepetitionFilter"},
    "datatrove FineWebQualityFilter": {"name": "datatrove", "filter": "FineWebQualityFilter"},
    "datatrove C4QualityFilter": {"name": "datatrove", "filter": "C4QualityFilter"},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("corpus", type=Path)
    arguments.add_argument("--mb", type=float, default=5)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peers", action="store_true")
    given = arguments.parse_args()
    documents = read(given.corpus, given.mb)
    few = documents[: next((n for n in range(len(documents)) if megabytes(documents[:n]) >= 1), len(documents))]
    print(f"{len(documents):,} documents, {megabytes(documents):.1f} MB, Python {sys.version.split()[0]}\n")
    print("| stage | MB per CPU s | core hours per TB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        items = Path(folder) / "eval.jsonl"  # 2,000 items of 60 words, some of them of this very corpus
        texts = (" ".join(document.text.split()[:60]) for document in documents[:2000])
        items.write_text("".join(json.dumps({"text": text + " ."}) + "\n" for text in texts))
        STAGES["decontaminate"]["files"] = [str(items)]
        for name, keys in STAGES.items():
            some = few if keys["name"] == "datatrove" else documents
            report(name, some, given.rounds, once(TypeAdapter(StageConfig).validate_python(keys), some))
    if given.peers:
        for name, call in peers().items():
            report(name, few, given.rounds, lambda call=call: [call(document.text) for document in few])
    sizes(documents)


def read(corpus: Path, mb: float) -> list[Document]:
    documents, size = [], 0
    with corpus.open() as rows:
        for number, row in enumerate(rows):
            text = json.loads(row)["text"]
            n_bytes = len(text.encode())
            documents.append(Document(text, n_bytes, f"corpus\0{number}", f"{corpus}:{number + 1}"))
            size += n_bytes
            if size >= mb * 1e6:
                break
    return documents


def megabytes(documents: list[Document]) -> float:
    return sum(document.n_bytes for document in documents) / 1e6


def once(stage: StageConfig, documents: list[Document]) -> Callable[[], object]:
    """One run over the documents, with all that is loaded once loaded already."""
    names = passes([stage])
    if names:
        sign([stage], names[0], iter(documents[:3]), {})
        return lambda: sign([stage], names[0], iter(documents), {})
    list(Pipeline([stage], {}).run(iter(documents[:3])))
    return lambda: list(Pipeline([stage], {}).run(iter(documents)))


def report(name: str, documents: list[Document], rounds: int, run: Callable[[], object]) -> None:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    rate = megabytes(documents) / statistics.median(seconds)
    print(f"| {name} | {rate:.3g} | {1e6 / rate / 3600:,.3g} |", flush=True)


def peers() -> dict[str, Callable[[str], object]]:
    """datatrove's own steps, where a stage does the same in another way."""
    minhash = importlib.import_module("datatrove.pipeline.dedup.minhash")
    pii = importlib.import_module("datatrove.pipeline.formatters.pii").PIIFormatter()
    signature = minhash.MinhashDedupSignature(tempfile.mkdtemp(), config=minhash.MinhashConfig())
    return {
        "(datatrove MinhashDedupSignature)": lambda text: signature.get_signature(signature.get_shingles(text)),
        "(datatrove PIIFormatter)": pii.format,
    }


def sizes(documents: list[Document]) -> None:
    """What the reduction costs: the signatures of these documents, again and again, with other hashes each time."""
    stages = TypeAdapter(list[StageConfig]).validate_python([{"name": "exact_dedup"}, {"name": "minhash_dedup"}])
    print("\n| reduction | documents | CPU s | signatures, bytes a document |\n|---|---|---|---|")
    for index, name in enumerate(passes(stages)):
        signed = sign(stages[index : index + 1], f"0-{stages[index].name}", iter(documents), {})
        copies = max(1, 1_000_000 // len(documents))
        other = [{key: values + (values != 0) * (n << 3) for key, values in signed.items()} for n in range(copies)]
        parts = [lambda arrays=arrays: arrays for arrays in other]
        start = time.process_time()
        for _ in reduce(stages, name, parts, [0] * copies):
            pass
        seconds = time.process_time() - start
        n_bytes = sum(values.itemsize for values in signed.values())
        print(f"| {stages[index].name} | {copies * len(documents):,} | {seconds:.2f} | {n_bytes} |")


if __name__ == "__main__":
    main()
