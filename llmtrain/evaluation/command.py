"""`llmtrain eval`: losses on data, and tasks, of one model or several, on one process or on ranks."""

import contextlib
import gc
import importlib.metadata
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import llmtrain
from llmtrain.errors import UserError
from llmtrain.evaluation import ranks as processes
from llmtrain.evaluation.evaluate import TOKENS_IN_A_BATCH
from llmtrain.evaluation.losses import Losses, made_for
from llmtrain.evaluation.plan import Arguments, Plan, make_plan, own_data
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.recipe import is_eval_recipe, load_eval_recipe
from llmtrain.evaluation.report import Evaluated, print_results, write_results
from llmtrain.evaluation.results import TaskResults, merged
from llmtrain.evaluation.sharded import load_model
from llmtrain.evaluation.source import RECIPES, Place
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.redaction import redact
from llmtrain.user_code import run_code_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def eval_command(
    source: Path,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[Path] = (),
    lengths: Sequence[int] = (),
    max_tokens: int | None = None,
    batch_tokens: int = TOKENS_IN_A_BATCH,
    output: Path | None = None,
    recipe: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    shard: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate, print tables, and write JSON, text, CSV and a picture. All ranks call it together.

    Args:
        source: an evaluation recipe, a run, a checkpoint, a `.pt` file, an export, or a training recipe.
        overrides: `key=value` of the recipe.
        data: folders of shards, text files or folders of them, instead of the recipe's evaluation data.
        lengths: tokens in a window; the recipe's `max_seq_len`, or the shards' when there is no recipe.
        max_tokens: of the text, from its beginning; all of it when left out.
        batch_tokens: of a forward; does not change the results but for rounding.
        output: path of the results without suffix; in the run's folder `eval/` when left out.
        recipe: for a checkpoint that does not carry its recipe.
        device: `cpu`, `cuda`; a GPU if there is one.
        dtype: by default bfloat16 on a GPU, float32 on the CPU.
        tasks: names of lm-evaluation-harness, paths of YAML files with `icl_tasks`; then losses only with `data`.
        num_fewshot: examples before each question, instead of the tasks' own number.
        limit: samples of each of the harness's tasks.
        shard: shard the model over the ranks.
        console: where to; standard output when left out. Only the first rank prints.

    Returns:
        What the JSON file holds; the same on all ranks.

    Raises:
        UserError: a recipe, the model, the data, a task or a length is not usable.
    """
    is_recipe = source.suffix in RECIPES and is_eval_recipe(source)
    timeout = load_eval_recipe(source, overrides).dist_timeout if is_recipe else processes.TIMEOUT
    ranks = processes.start(device, timeout)
    if not ranks.is_first:
        console = Console(quiet=True)
    console = console or Console()
    given = Arguments(
        data=data,
        lengths=lengths,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        output=output,
        recipe=recipe,
        dtype=dtype,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        shard=shard,
    )
    plan = make_plan(source, overrides, given, ranks.device.type)
    _prepare(plan, console)
    _refuse_place(plan, ranks)
    found: list[Evaluated] = []
    for place in plan.places:
        if len(plan.places) > 1:
            console.rule(place.name)
        found.append(_evaluate(place, plan, ranks, console))
        gc.collect()  # the next model needs the memory
        content = _content(found, _about(plan, ranks), several=len(plan.places) > 1)
        if ranks.is_first:  # what is known stays, should the next model fail
            written = write_results(plan.stem, content, found)
    if ranks.is_first:
        print_results(console, found)
        console.print(f"written     {'  '.join(map(str, written))}", highlight=False, soft_wrap=True)
    ranks.close()
    return content


def _prepare(plan: Plan, console: Console) -> None:
    """What comes before the first model: packages that are missing, notes, code of the recipe."""
    if plan.harness is not None and find_spec("lm_eval") is None:
        raise UserError(
            "Tasks of lm-evaluation-harness need the package lm-eval. Install it: pip install 'llmtrain[eval]'"
        )
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if plan.recipe is not None and plan.recipe.python_log_level is not None:
        logging.getLogger("llmtrain").setLevel(plan.recipe.python_log_level.upper())
    run_code_paths(plan.recipe.code_paths if plan.recipe is not None else None)


def _refuse_place(plan: Plan, ranks: Ranks) -> None:
    """Results that cannot be written: said before the hours that they take, on all ranks."""
    problem = None
    if ranks.is_first:
        probe = plan.stem.with_name(f".{plan.stem.name}.writing")
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem = f"results {plan.stem}: cannot be written: {error.strerror}. Give another place: --output"
    if problem := ranks.gather_each(problem)[0]:
        raise UserError(problem)


def _evaluate(place: Place, plan: Plan, ranks: Ranks, console: Console) -> Evaluated:
    data = own_data(place) if plan.data is None else plan.data
    model, tokenizer = load_model(place, ranks, shard=plan.shard, dtype=plan.dtype)
    sharded = plan.shard and ranks.world > 1
    losses = Losses(model, tokenizer, place, plan, ranks, sharded=sharded, console=console)
    losses.open(data)
    measured = losses.measure()
    tasks = _tasks(model, tokenizer, plan, ranks, sharded=sharded, console=console)
    parameter = next(model.parameters())
    about = {
        "source": place.name,
        "path": str(place.weights) if place.weights is not None else place.name,
        "data": losses.names,
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    return Evaluated(about, measured, tasks)


def _tasks(
    model: MPT | HFCausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    plan: Plan,
    ranks: Ranks,
    *,
    sharded: bool,
    console: Console,
) -> TaskResults:
    parts = []
    torch.manual_seed(plan.seed)
    with torch.no_grad():
        if plan.icl is not None:
            from llmtrain.evaluation.icl.run import run_icl

            icl = plan.icl
            if "icl_seq_len" not in icl.model_fields_set:  # nothing says how long: what the model was made for
                icl = icl.model_copy(update={"icl_seq_len": min(made_for(model) or icl.icl_seq_len, icl.icl_seq_len)})
            parts.append(run_icl(model, tokenizer, icl, ranks, sharded=sharded, console=console))
        if plan.harness is not None:
            from llmtrain.evaluation.harness import run_harness

            samples = plan.stem.with_name(f"{plan.stem.name}-samples")
            parts.append(
                run_harness(model, tokenizer, plan.harness, ranks, sharded=sharded, console=console, samples=samples)
            )
    return merged(parts)


def _about(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    versions = {"llmtrain": llmtrain.__version__}
    for package in ("torch", "transformers", "tokenizers", "lm_eval"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    recipe = None if plan.recipe is None else redact(plan.recipe.model_dump(mode="json", exclude_unset=True))
    return {
        "ranks": ranks.world,
        "sharded": plan.shard and ranks.world > 1,
        "seed": plan.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        **({} if recipe is None else {"recipe": recipe}),
    }


def _content(found: Sequence[Evaluated], about: dict[str, Any], *, several: bool) -> dict[str, Any]:
    """Of one model, its facts and results at the top; of several, a list of those."""
    if not several:
        return {**found[0].as_dict(), **about}
    return {"models": [one.as_dict() for one in found], **about}
