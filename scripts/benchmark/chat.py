"""What it costs to tokenise conversations: llmtrain against llm-foundry 0.22.0, side by side, in CPU seconds.

    python scripts/benchmark/chat.py --foundry-python /path/to/python

llm-foundry runs in an environment of its own (it needs an older torch and transformers), as a subprocess that is told
when to do its rounds; the two take turns, so that what else the machine does falls on both. Time is CPU time of the
process that works, all threads. To make that environment:

    python3.11 -m venv /somewhere/foundry
    /somewhere/foundry/bin/pip install llm-foundry==0.22.0 'setuptools<81'      # a gigabyte of torch comes with it

Without --foundry-python the other rows of the table are measured: apply_chat_template once a conversation, and
llmtrain without tiktoken's core.

Both start from the same rows ({"messages": [{"role": ..., "content": ...}]}) and end with token ids and what is
response in them, in memory. llm-foundry's part is its `tokenize_formatted_example`: each turn rendered twice, prompt
and response tokenised; stitching the turns and cutting at max_seq_len, which is part of llmtrain's figure, comes later
there. The conversations and the tokenizer are made here, from the standard library: about 3.3 pairs of turns each,
lengths spread as in ShareGPT; byte-level BPE with GPT-NeoX's pipeline (NFC, GPT-2's pattern, runs of spaces as tokens)
and as many ids.
"""

import argparse
import ast
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from rich.console import Console
from rich.table import Table

from llmtrain.conversations.messages import BadExample, Chat, Message
from llmtrain.data.finetuning.tokenize import ExampleTokenizer
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

NEOX_IDS = 50_277
LONGEST_RUN_OF_SPACES = 24
WORKER = Path(__file__).with_name("chat_foundry.py")
Row = dict[str, list[dict[str, str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundry-python", help="python of an environment with llm-foundry 0.22.0")
    parser.add_argument("--chats", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=NEOX_IDS, help="of the tokenizer that is trained")
    parser.add_argument("--work", type=Path, help="folder that keeps the tokenizer for another time")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, args.work or Path(temporary))


def measure(args: argparse.Namespace, work: Path) -> None:
    console = Console()
    folder = neox_like_tokenizer(work / f"tokenizer-{args.vocab_size}", args.vocab_size)
    tokenizer = load_tokenizer(TokenizerConfig(name=str(folder), chat_template="chatml"))
    rows = list(conversations(args.chats))
    ours = ExampleTokenizer(tokenizer, max_seq_len=1 << 30, target_responses="all")
    slower = ExampleTokenizer(tokenizer, max_seq_len=1 << 30, target_responses="all")
    slower.encoder.fast = None
    if ours.encoder.fast is None:
        console.print("tiktoken's core does not fit this tokenizer; the first two rows are the same", style="bold red")

    def with_llmtrain(tokenize: ExampleTokenizer) -> list[np.ndarray]:
        found = tokenize([Chat(tuple(Message(**message) for message in row["messages"])) for row in rows])
        return [example.ids for example in found if not isinstance(example, BadExample)]

    ways: dict[str, Callable[[], float]] = {
        "llmtrain": lambda: cpu_seconds(lambda: with_llmtrain(ours)),
        "llmtrain, `tokenizers` only": lambda: cpu_seconds(lambda: with_llmtrain(slower)),
        "apply_chat_template, no mask": lambda: cpu_seconds(
            lambda: [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
        ),
    }
    foundry = None
    if args.foundry_python:
        saved = work / "with-template"
        tokenizer.save_pretrained(saved)
        foundry = Foundry(args.foundry_python, saved / "tokenizer.json", tokenizer, rows, work)
        ways["llm-foundry 0.22.0"] = foundry.round
    ids = with_llmtrain(ours)
    template_ids = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    same_as_template = sum(a.tolist() == b for a, b in zip(ids, template_ids, strict=True))

    for way in ways.values():
        way()  # warm
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(way())

    tokens = sum(map(len, ids))
    result = {
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "chats": len(rows),
        "turn_pairs_per_chat": round(sum(len(row["messages"]) for row in rows) / 2 / len(rows), 2),
        "tokens": tokens,
        "tokens_per_chat": round(tokens / len(rows)),
        "vocab_size": len(tokenizer),
        "rounds": args.rounds,
        "cpu_seconds": {name: [round(t, 4) for t in measured] for name, measured in times.items()},
        "times_llmtrain_median_of_ratios": {
            name: round(statistics.median(b / a for a, b in zip(times["llmtrain"], measured, strict=True)), 2)
            for name, measured in times.items()
        },
        "same_ids_as_apply_chat_template": same_as_template,
    }
    if foundry is not None:
        theirs = foundry.ids()
        same = sum(a.tolist() == b for a, b in zip(ids, theirs, strict=True))
        result["same_ids_as_llm_foundry"] = same
        result["llm_foundry"] = foundry.versions
    show(console, result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if foundry is not None:
        foundry.stop()


def show(console: Console, result: dict) -> None:
    table = Table(title=f"{result['chats']} conversations, {result['tokens']:,} tokens, {result['rounds']} rounds")
    table.add_column("", no_wrap=True)
    for title in ("CPU s / 10k chats", "Mtok / CPU s", "ratio to llmtrain"):
        table.add_column(title, justify="right")
    for name, times in result["cpu_seconds"].items():
        typical = statistics.median(times)
        table.add_row(
            name,
            f"{typical / result['chats'] * 10_000:.1f}",
            f"{result['tokens'] / typical / 1e6:.2f}",
            f"{result['times_llmtrain_median_of_ratios'][name]:.2f}",
        )
    console.print(table)
    console.print(
        f"ids equal to apply_chat_template's: {result['same_ids_as_apply_chat_template']} of {result['chats']} "
        "(they may differ where a token reaches over the start of an answer)"
    )
    if "same_ids_as_llm_foundry" in result:
        console.print(
            f"ids equal to llm-foundry's turns put together: {result['same_ids_as_llm_foundry']} of {result['chats']} "
            "(they may differ where a token reaches over the end of a turn's rendering)"
        )


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Foundry:
    """llm-foundry in its own environment, doing a round when told to."""

    def __init__(self, python: str, tokenizer_json: Path, tokenizer, rows: list[Row], work: Path) -> None:
        self._task = work / "foundry-task.json"
        self._ids = work / "foundry-ids.json"
        self._task.write_text(
            json.dumps(
                {
                    "tokenizer_json": str(tokenizer_json),
                    "eos_token": tokenizer.eos_token,
                    "chat_template": tokenizer.chat_template,
                    "rows": rows,
                    "ids": str(self._ids),
                }
            )
        )
        self._process = subprocess.Popen(
            [python, str(WORKER), str(self._task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        )
        self.versions = self._ask("versions")

    def round(self) -> float:
        return float(self._ask("round"))

    def ids(self) -> list[list[int]]:
        self._ask("ids")
        return json.loads(self._ids.read_text())

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return line.removeprefix("answer: ").strip()
        sys.exit(f"llm-foundry's process ended with code {self._process.wait()}; is it llm-foundry 0.22.0's python?")


# The text


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))
    return sorted(files)


def paragraphs() -> tuple[list[str], list[str]]:
    """Prose and code of the standard library: documentation by paragraphs, functions by themselves."""
    from pydoc_data.topics import topics

    prose = [text for topic in sorted(topics) for text in topics[topic].split("\n\n")]
    code = []
    for path in stdlib_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose += (ast.get_docstring(node) or "").split("\n\n")
            if isinstance(node, ast.FunctionDef):
                code.append("".join(lines[node.lineno - 1 : node.end_lineno]))
    return [text for text in prose if len(text.strip()) > 40], [text for text in code if 100 < len(text) < 3_000]


def conversations(count: int, seed: int = 17) -> Iterator[Row]:
    """ShareGPT-like: a few pairs of turns, short questions and long answers, a quarter of the answers with code."""
    prose, code = paragraphs()
    dice = random.Random(seed)
    for _ in range(count):
        pairs = min(30, 1 + int(dice.expovariate(1 / 2.8)))
        messages = []
        for _ in range(pairs):
            question = cut(dice.choice(prose), dice, median=130, sigma=1.0)
            answer = ""
            wanted = dice.lognormvariate(math.log(900), 0.8)
            while len(answer) < wanted:
                piece = f"```python\n{dice.choice(code)}```" if dice.random() < 0.1 else dice.choice(prose)
                answer += ("\n\n" if answer else "") + piece
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer[: int(wanted) + 40].strip()})
        yield {"messages": messages}


def cut(text: str, dice: random.Random, median: float, sigma: float) -> str:
    return text.strip()[: max(12, int(dice.lognormvariate(math.log(median), sigma)))].strip()


def neox_like_tokenizer(folder: Path, vocab_size: int) -> Path:
    """GPT-NeoX's pipeline and number of ids, trained on the standard library: needs no network."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if (folder / "tokenizer_config.json").is_file():
        return folder
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.decoder = decoders.ByteLevel()
    runs = [" " * n for n in range(LONGEST_RUN_OF_SPACES, 1, -1)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(runs),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator((path.read_text(encoding="utf-8", errors="ignore") for path in stdlib_files()), trainer)
    raw.add_tokens([AddedToken(run, normalized=True, special=False) for run in runs])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
