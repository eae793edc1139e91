"""Stands in for Composer's launcher: `fake_launcher.py SCRIPT.json` starts ranks that end as the script says.

The script is a list with one entry for each start (the last one again from then on), each a list of one dictionary for
each rank: {"after": seconds, "exit": code} or {"after": seconds, "kill": signal}; without both, the rank runs until
SIGTERM and then exits with "on_term" (143) after "saving" seconds. "step" is written to metrics.jsonl, "checkpoint" is
made, "say" is printed to stderr. Like the real one it ends the others when one crashes, and says which did.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def rank(script: dict) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    run = Path("runs/fake")
    if "step" in script:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": script["step"]}) + "\n")
    if "checkpoint" in script:
        (run / "checkpoints" / f"ep0-ba{script['checkpoint']}").mkdir(parents=True, exist_ok=True)
    if "say" in script:
        print(script["say"], file=sys.stderr, flush=True)
    (run / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    ends = "exit" in script or "kill" in script
    deadline = time.monotonic() + (script.get("after", 0.2) if ends else 60)
    while time.monotonic() < deadline and (ends or not asked):
        time.sleep(0.01)
    if "kill" in script:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), script["kill"])
    if "exit" in script:
        sys.exit(script["exit"])
    time.sleep(script.get("saving", 0))
    print("saved", file=sys.stderr, flush=True)
    sys.exit(script.get("on_term", 143))


def launcher(path: Path) -> int:
    starts = Path("starts")
    count = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (count + 1))
    scripts = json.loads(path.read_text())
    script = scripts[min(count, len(scripts) - 1)]
    Path("runs/fake").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", json.dumps(one)],
            env={**os.environ, "RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number, one in enumerate(script)
    ]
    try:
        while any(process.poll() is None for process in ranks):
            crashed = [number for number, process in enumerate(ranks) if process.poll()]
            if crashed:
                code = ranks[crashed[0]].returncode
                print(f"ERROR:fake:Rank {crashed[0]} crashed with exit code {code}.", file=sys.stderr, flush=True)
                break
            time.sleep(0.1)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.terminate()
        for process in ranks:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
    return next((process.wait() for process in ranks if process.wait()), 0)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank(json.loads(sys.argv[2]))
    else:
        sys.exit(launcher(Path(sys.argv[1])))
