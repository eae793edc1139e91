"""Who is waited for, from what the ranks say of themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmtrain.training.heartbeat import Beat

State = Literal["alive", "silent", "stopped", "gone", "finished"]


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it.

    Attributes:
        beat: its newest sign of life.
        silent: seconds since that was new, by the clock of whoever looks.
        state: what became of it.
    """

    beat: Beat
    silent: float
    state: State

    def told(self) -> str:
        """One line: `rank 1 (host, pid 7): its heart stopped 41 s ago, last in step 58: reads data, text.py:57`."""
        beat = self.beat
        where = f"{beat.phase}" + (f": {beat.place}" if beat.place else "")
        return f"{beat.name}: {self.condition()}, {'' if self.state == 'alive' else 'last in '}{where}"

    def condition(self) -> str:
        """Alive, or what is known of its end."""
        if self.state == "alive":
            return f"alive, nothing finished for {self.beat.since:.0f} s"
        if self.state == "finished":
            return "has finished"
        if self.state == "gone":
            return f"its process is gone; its heart stopped {self.silent:.0f} s ago"
        why = ": its process is stopped (SIGSTOP?)" if self.state == "stopped" else ""
        return f"its heart stopped {self.silent:.0f} s ago{why}"


def waited_for(ranks: Sequence[Seen]) -> tuple[list[Seen], str]:
    """Those that the others wait for, and why they are thought to be.

    Returns:
        No rank where it cannot be told; the text says so.
    """
    lost = [seen for seen in ranks if seen.state in ("silent", "stopped", "gone")]
    if lost:
        return lost, "its heart has stopped"
    behind = min(seen.beat.step for seen in ranks)
    late = [seen for seen in ranks if seen.beat.step == behind and seen.beat.kind != "collective"]
    if late and len(late) < len(ranks):
        return late, "the others wait in a collective call, and it has not come there"
    if late:
        return late, ""
    slow = [seen for seen in ranks if seen.beat.step == behind]
    if len(slow) < len(ranks):
        return slow, "the others have finished more steps"
    return [], "all of them wait in collective calls: is the network between their hosts up?"


def hang_message(ranks: Sequence[Seen], *, waited: float, limit: float, stacks: str, advice: str) -> str:
    """What the user is told, once.

    Args:
        ranks: all of them, in order.
        waited: seconds since anything was finished.
        limit: of this step, or whatever it is.
        stacks: where the files with the stacks of all threads are.
        advice: what to do.
    """
    culprits, why = waited_for(ranks)
    step = max(seen.beat.step for seen in ranks)
    known = bool(culprits) and len(culprits) < max(2, len(ranks))
    who = ", ".join(f"rank {seen.beat.rank}" for seen in culprits) if known else "all ranks"
    if known and len(ranks) > 1:
        first = culprits[0]
        cause = f"the run waits for it: {first.condition() if first.state != 'alive' else why}"
        cause += f"; {first.beat.place}" if first.state == "alive" and first.beat.place else ""
    elif known:
        cause = f"nothing was finished in {culprits[0].beat.phase}: {culprits[0].beat.place}"
    else:
        cause = why or "none of them comes on"
    lines = [f"error ({who}, after step {step}): {cause} (after {waited:.0f} s; the limit is {limit:.0f} s)"]
    shown = list(ranks) if len(ranks) <= 16 else culprits[:16]
    lines += [f"            {seen.told()}" for seen in shown]
    if len(shown) < len(ranks):
        lines.append(f"            ... and {len(ranks) - len(shown)} other ranks")
    return "\n".join([*lines, f"            stacks of all threads: {stacks}. {advice}"])
