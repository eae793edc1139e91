"""From raw text to shards: llmtrain against llm-foundry 0.22.0 and datatrove, and the tokenizer's core as the limit.

    python scripts/benchmark/prep.py --foundry-python V/bin/python --datatrove-python D/bin/python --out prep

Peers live in environments of their own and are left out without them:

    python3.11 -m venv V && V/bin/pip install llm-foundry==0.22.0 'setuptools<80'
    python3.11 -m venv D && D/bin/pip install 'datatrove[processing,io]==0.9.0' tokenizers 'numpy<2.3'

The corpus is what machines have: text packages of Debian (kernel, Python and Perl documentation, manual pages, two
dictionaries, six novels; downloaded where apt-get works, otherwise left out), pydoc's topics, the sources of the
standard library and of the packages installed here. A document is a window of such a text from a line's start, of
log-normal length (median 1,300 characters, sigma 1.2, which is a mean of 2,700 less what the texts' ends cut off); 70%
are prose, 30% code. Windows overlap once the corpus is larger than the texts: no measure of de-duplication. The
tokenizer is trained on it: byte-level BPE of 50,277 ids with NFC and runs of spaces, as GPT-NeoX's is.

Every contender is a command that is started anew; contenders take turns within a round, after one run of each at the
smallest size that is not counted. CPU seconds are those of all processes of a command, memory is the largest sum of
their proportional set sizes. Ratios are medians over the rounds. llm-foundry writes int32 without compression and
datatrove plain ids, as they do by default; llmtrain uint16 with zstd and a hash, as it does. What they write is
compared: the same tokens, in the same order where they keep it (llm-foundry's JSON route against llmtrain with a single
partition; datatrove), otherwise but for the ends that the peer drops.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prep_check
import prep_corpus
from prep_process import Run, run
from prep_report import draw, markdown

FOLDER = Path(__file__).parent
OURS = "llmtrain"
SEQ_LEN = 2048
RECIPE = """\
out: {out}
max_seq_len: {seq_len}
tokenizer: {{name: {tokenizer}}}
sources: [{{name: corpus, files: [{corpus}/corpus.jsonl]}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundry-python", help="python of an environment with llm-foundry 0.22.0")
    parser.add_argument("--datatrove-python", help="python of an environment with datatrove")
    parser.add_argument("--sizes", nargs="+", default=["10:5", "100:3", "500:1"], help="MB:ROUNDS ...")
    parser.add_argument("--peers-up-to", type=float, default=500, help="MB; larger sizes are llmtrain's alone")
    parser.add_argument("--vocab-size", type=int, default=50_277)
    parser.add_argument("--work", type=Path, default=Path("prep-benchmark"), help="folder for corpora; they are kept")
    parser.add_argument("--no-debian", action="store_true", help="download nothing")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    args = parser.parse_args()
    rounds = {float(size): int(n or 1) for size, _, n in (text.partition(":") for text in args.sizes)}
    result = measure(args, rounds)
    text = markdown(result)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(text + "\n")
        draw(result, args.out.with_suffix(".png"))


def measure(args: argparse.Namespace, rounds: dict[float, int]) -> dict[str, Any]:
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    debian = work / "debian"
    packages = [] if args.no_debian else prep_corpus.fetch_debian(debian)
    corpus = prep_corpus.build(work / "corpus", list(rounds), debian)
    tokenizer = work / "tokenizer"
    smallest, largest = min(rounds), max(rounds)
    corpus_of = {size: work / "corpus" / f"{size:g}MB" for size in rounds}
    prep_corpus.train_tokenizer(corpus_of[largest] / "corpus.jsonl", tokenizer, args.vocab_size)
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the beginning",
        "peers": versions(args),
        "corpus": {**corpus, "debian": packages},
        "vocab_size": args.vocab_size,
        "seq_len": SEQ_LEN,
        "sizes": {},
    }
    for contender in contenders(args).values():
        measured(contender, corpus_of[smallest], tokenizer, work)
    for size in sorted(rounds):
        takes_part = contenders(args) if size <= args.peers_up_to else contenders(args, peers=False)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in takes_part}
        limits, same = [], {}
        for number in range(rounds[size]):
            for name, contender in takes_part.items():
                runs[name].append(measured(contender, corpus_of[size], tokenizer, work)._asdict())
                if number == 0:
                    shutil.rmtree(work / "kept" / name, ignore_errors=True)
                    shutil.move(work / "out", work / "kept" / name)
                print(f"{size:g} MB, round {number + 1}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
            limits.append(limit(corpus_of[size], tokenizer))
        same = compare(list(takes_part), work, corpus_of[size], tokenizer, args.vocab_size)
        shutil.rmtree(work / "kept")
        result["sizes"][f"{size:g}"] = {
            "megabytes": corpus["sizes"][f"{size:g}"]["bytes"] / 1e6,
            "tokens": limits[0]["tokens"],
            "runs": runs,
            "core_cpu": [one["cpu"] for one in limits],
            "same_ids": same,
        }
    result["machine"] += f", {os.getloadavg()[0]:.1f} at the end"
    return summary(result)


Contender = Callable[[Path, Path, Path], list[str]]
"""Corpus, tokenizer, output -> command."""


def contenders(args: argparse.Namespace, *, peers: bool = True) -> dict[str, Contender]:
    found: dict[str, Contender] = {f"{OURS}, {n} proc.": ours(n) for n in (1, 2)}
    if peers and args.foundry_python:
        script = [args.foundry_python, str(FOLDER / "prep_foundry.py")]
        end = [prep_corpus.EOS, str(SEQ_LEN)]
        found["llm-foundry json"] = lambda c, t, o: [*script, "json", f"{c}/corpus.jsonl", str(o), str(t), *end, "1"]
        found["llm-foundry text, 2 proc."] = lambda c, t, o: [*script, "text", f"{c}/files", str(o), str(t), *end, "2"]
    if peers and args.datatrove_python:
        for n in (1, 2):
            found[f"datatrove, {n} proc."] = datatrove(args.datatrove_python, n)
    return found


def ours(processes: int, *settings: str) -> Contender:
    def command(corpus: Path, tokenizer: Path, out: Path) -> list[str]:
        recipe = out.with_name("recipe.yaml")
        recipe.write_text(RECIPE.format(out=out, seq_len=SEQ_LEN, tokenizer=tokenizer, corpus=corpus))
        start = "from llmtrain.cli import main; main()"
        return [sys.executable, "-c", start, "prep", str(recipe), "--processes", str(processes), *settings]

    return command


def datatrove(python: str, workers: int) -> Contender:
    end = [prep_corpus.EOS, str(prep_corpus.PARTS), str(workers)]
    return lambda c, t, o: [python, str(FOLDER / "prep_datatrove.py"), f"{c}/parts", str(o), str(t), *end]


def measured(contender: Contender, corpus: Path, tokenizer: Path, work: Path) -> Run:
    """One run with empty output and caches."""
    out, home = work / "out", work / "hf"
    for folder in (out, home):
        shutil.rmtree(folder, ignore_errors=True)
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "TQDM_DISABLE": "1"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    try:
        return run(contender(corpus, tokenizer, out), {**env, **quiet}, work / "log.txt")
    except subprocess.CalledProcessError as problem:
        log = (work / "log.txt").read_text(errors="replace")
        raise SystemExit(f"{' '.join(problem.cmd)} failed:\n{log[-3000:]}") from problem


def limit(corpus: Path, tokenizer: Path) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "prep_core.py"), str(corpus / "corpus.jsonl"), str(tokenizer)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(names: list[str], work: Path, corpus: Path, tokenizer: Path, vocab_size: int) -> dict[str, bool]:
    """Whether each contender's tokens are llmtrain's."""
    measured(ours(1, f"partition_bytes={1 << 40}"), corpus, tokenizer, work)
    stream = prep_check.mds_tokens(work / "out" / "train", SEQ_LEN)
    same = {}
    for name in names:
        kept = work / "kept" / name
        if name.startswith(OURS):
            # Tails of partitions come last, so the order is another, and the last row may be, too.
            same[name] = prep_check.same_tokens(stream, prep_check.mds_tokens(kept / "train", SEQ_LEN), 2 * SEQ_LEN)
        elif name.startswith("datatrove"):
            tokens = prep_check.datatrove_tokens(kept, vocab_size)
            same[name] = prep_check.same_beginning(stream, tokens, SEQ_LEN)
        elif "json" in name:
            same[name] = bool((prep_check.mds_tokens(kept, SEQ_LEN) == stream).all())
        else:
            same[name] = prep_check.same_tokens(stream, prep_check.mds_tokens(kept, SEQ_LEN), 4 * SEQ_LEN)
    return same


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Adds rates, ratios as medians over the rounds, and what another megabyte costs."""
    for found in result["sizes"].values():
        mb, tokens, runs = found["megabytes"], found["tokens"], found["runs"]
        found["summary"] = {}
        for name, some in runs.items():
            middle = {key: statistics.median(one[key] for one in some) for key in some[0]}
            found["summary"][name] = {
                **middle,
                "mb_per_cpu": mb / middle["cpu"],
                "mb_per_s": mb / middle["wall"],
                "tokens_per_s": tokens / middle["wall"],
                "of_limit": statistics.median(
                    core / one["cpu"] for core, one in zip(found["core_cpu"], some, strict=True)
                ),
            }
        peers = [name for name in runs if not name.startswith(OURS)]
        found["times_faster"] = {
            f"{peer} / {mine}": {
                key: statistics.median(b[key] / a[key] for a, b in zip(runs[mine], runs[peer], strict=True))
                for key in ("cpu", "wall", "peak_mb")
            }
            for mine in runs
            if mine.startswith(OURS)
            for peer in peers
        }
    sizes = sorted(result["sizes"].values(), key=lambda found: found["megabytes"])
    result["growth"] = {}
    if len(sizes) > 1:
        result["growth"] = {
            name: growth(sizes, name) for name in sizes[0]["summary"] if sum(name in s["summary"] for s in sizes) > 1
        }
        core = [statistics.median(s["core_cpu"]) for s in (sizes[0], sizes[-1])]
        result["growth"]["core"] = {
            "cpu_per_mb": (core[1] - core[0]) / (sizes[-1]["megabytes"] - sizes[0]["megabytes"])
        }
    return result


def growth(sizes: list[dict[str, Any]], name: str) -> dict[str, float]:
    """What a megabyte more costs, between the smallest and the largest size that a contender did."""
    did = [found for found in sizes if name in found["summary"]]
    first, last = did[0], did[-1]
    more = last["megabytes"] - first["megabytes"]
    keys = {"cpu_per_mb": "cpu", "wall_per_mb": "wall", "peak_mb_per_mb": "peak_mb"}
    return {new: (last["summary"][name][key] - first["summary"][name][key]) / more for new, key in keys.items()}


def versions(args: argparse.Namespace) -> dict[str, str]:
    found = {}
    for package, python in (("llm-foundry", args.foundry_python), ("datatrove", args.datatrove_python)):
        if python:
            ask = f"import importlib.metadata as m; print(m.version({package!r}), m.version('tokenizers'))"
            found[package] = subprocess.run(
                [python, "-c", ask], check=True, capture_output=True, text=True
            ).stdout.strip()
    return found


if __name__ == "__main__":
    main()
