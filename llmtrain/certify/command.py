"""``llmtrain certify RECIPE``: proof that a run which is killed and resumed is the run that was not."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llmtrain.certify.certificate import Certificate
from llmtrain.certify.compare import NOT_COMPARED
from llmtrain.certify.picture import draw
from llmtrain.certify.subject import subject
from llmtrain.certify.trial import Options, Tick, Trial
from llmtrain.certify.workspace import workspace
from llmtrain.errors import UserError

FEWEST_STEPS = 6
"""With fewer there is no step between saves, evaluations and the ends of epochs."""


def certify_command(
    recipe: Path,
    overrides: Sequence[str],
    *,
    ranks: int = 2,
    kills: int = 20,
    seed: int = 0,
    other_ranks: str = "1,4",
    steps: int = 24,
    keep: bool = False,
    output: Path | None = None,
) -> Certificate:
    """Certify a recipe and print the certificate; OUTPUT.json and OUTPUT.png are written, too.

    Args:
        recipe: of training.
        overrides: `key=value`.
        ranks: processes of the run.
        kills: how often it is killed.
        seed: decides where.
        other_ranks: numbers of ranks to go on with, `1,4`; `none` for no others.
        steps: of each run.
        keep: keep the folder of the runs.
        output: where the files go, without suffix; `certificate-RECIPE` when left out.

    Raises:
        UserError: the recipe cannot be certified: it has mistakes, is too large, or does not train.
    """
    options = Options(ranks, kills, seed, _numbers(other_ranks))
    if not kills and not options.other_ranks:
        raise UserError("--kills 0 --other-ranks none: nothing would be tried, so nothing would be proved.")
    if steps < FEWEST_STEPS:
        raise UserError(f"--steps {steps}: at least {FEWEST_STEPS} are needed.")
    stem = Path(f"certificate-{recipe.stem}") if output is None else output
    stem = stem.with_suffix("") if stem.suffix in (".json", ".png") else stem
    if not stem.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {stem.absolute().parent}.")
    what = subject(recipe, overrides, steps=steps, ranks=max(ranks, *options.other_ranks, 0))
    console = Console()
    with workspace(Path.cwd(), keep) as place:
        if keep:
            console.print(f"runs        {place.runs} (kept)", markup=False, highlight=False, soft_wrap=True)
        with _progress(Console(stderr=True), options, steps) as tick:
            certificate = Trial(what, options, place, tick).run()
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "png")]
    certificate.write(files[0])
    draw(certificate, files[1])
    show(console, certificate)
    console.print(" ".join(map(str, files)), markup=False, highlight=False, soft_wrap=True)
    return certificate


def _numbers(text: str) -> tuple[int, ...]:
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise UserError(f"--other-ranks {text}: expected numbers of ranks, such as 1,4, or none.")
    return numbers


def show(console: Console, certificate: Certificate) -> None:
    """Print a certificate."""
    granted = certificate.granted
    title = f"Resume certificate of {certificate.recipe}: {'granted' if granted else 'REFUSED'}"
    table = Table(title=title, show_header=False, title_style="bold green" if granted else "bold red")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    asked = certificate.command
    table.add_row("run", f"{asked['steps']} steps on {asked['ranks']} rank(s); seed of the kills {asked['seed']}")
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in certificate.versions.items()))
    table.add_row("changed for this", "\n".join(certificate.changes) or "nothing")
    kills = ", ".join(f"{number} in a{'n' if kind[0] in 'aeio' else ''} {kind}" for kind, number in _named(certificate))
    table.add_row("killed", f"{len(certificate.kills)} times with SIGKILL: {kills or 'never'}")
    alone = sum(kill.rank is not None for kill in certificate.kills)
    table.add_row("", f"{alone} of them one rank alone; {_stages(certificate)}")
    table.add_row("went on from step", ", ".join(map(str, certificate.resumed)) or "none")
    if certificate.elastic_ranks:
        table.add_row("other ranks", f"{' → '.join(map(str, certificate.elastic_ranks))}, killed between them")
        if certificate.largest_loss_difference is not None:
            table.add_row("", f"largest difference of a loss {certificate.largest_loss_difference:.2g} (relative)")
    if certificate.elastic_note:
        table.add_row("", certificate.elastic_note)
    for name, amount in certificate.compared.items():
        table.add_row(f"same: {name}" if granted else f"compared: {name}", amount)
    table.add_row("not compared", f"{', '.join(NOT_COMPARED)} (names, wall-clock times)")
    if certificate.difference is not None:
        difference = certificate.difference
        table.add_row(Text("first difference", "bold red"), Text(f"{difference.where}\n{difference.key}"))
        table.add_row(Text("  undisturbed", "red"), Text(difference.undisturbed))
        table.add_row(Text("  after the kills", "red"), Text(difference.disturbed))
    if certificate.problem is not None:
        table.add_row(Text("problem", "bold red"), Text(certificate.problem))
    table.add_row("took", f"{certificate.seconds:.0f} s")
    console.print(table)


def _named(certificate: Certificate) -> list[tuple[str, int]]:
    names = {"start": "start-up"}
    return [(names.get(kind, kind), number) for kind, number in certificate.by_kind().items()]


def _stages(certificate: Certificate) -> str:
    counts: dict[str, int] = {}
    for kill in certificate.kills:
        if kill.kind == "save":
            counts[kill.detail] = counts.get(kill.detail, 0) + 1
    return "; ".join(f"save: {number} x {detail}" for detail, number in counts.items()) or "none in a save"


@contextmanager
def _progress(console: Console, options: Options, steps: int) -> Iterator[Tick]:
    """A bar on a terminal, a line a kill in a log."""
    # A start of the run is a unit: that is what takes the time.
    total = 1 + options.kills + 1 + (1 + len(options.other_ranks) if options.other_ranks else 0)
    if not console.is_terminal:
        yield _lines(options.kills)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, last, done = bar.add_task("starting", total=total), ("", 0), 0

        def tick(doing: str, kills: int, step: int) -> None:
            nonlocal last, done
            if (doing, kills) != last:
                done += last[0] != ""
                last = (doing, kills)
            text = f"{doing}: {kills} of {options.kills} kills, step {step} of {steps}"
            bar.update(task, description=text, completed=min(done, total))

        yield tick


def _lines(total: int) -> Tick:
    last: tuple[str, int] = ("", 0)

    def tick(doing: str, kills: int, step: int) -> None:
        nonlocal last
        if (doing, kills) != last:
            last = (doing, kills)
            print(f"certify     {doing}: {kills} of {total} kills, at step {step}", file=sys.stderr, flush=True)

    return tick
