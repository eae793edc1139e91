"""The command `llmtrain`. Each verb imports what it needs when it is called, so that `--help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import llmtrain
from llmtrain.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain and fine-tune MPT-style language models from YAML recipes.",
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys.")]


@app.command()
def prep(recipe: Path, overrides: Overrides = None) -> None:
    """Turn text into MDS shards, as a data recipe (data_prep/*.yaml) says."""
    from llmtrain.prep.run import prepare

    prepare(recipe, overrides or [])


@app.command()
def check(recipe: Path, overrides: Overrides = None) -> None:
    """Validate a training recipe without starting anything, and print it resolved."""
    from llmtrain.recipe.check import check as run

    print(run(recipe, overrides or []))


@app.command()
def schema() -> None:
    """Print the JSON Schema of training recipes, for editors."""
    import json

    from llmtrain.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def train(recipe: Path, overrides: Overrides = None) -> None:
    """Train a recipe in this process; `composer [-n RANKS] train.py` starts several."""
    from llmtrain.training.command import main as run

    raise typer.Exit(run([str(recipe), *(overrides or [])]))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a .pt file.")],
    target: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder for plain transformers, and prove that it is the same model."""
    from llmtrain.checkpoint.export import export as run

    print(run(source, target, dtype=dtype, recipe=recipe, overwrite=overwrite))


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="An export, a run, or a checkpoint.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt file (a prompt a line) or .jsonl (field `prompt`).")
    ] = None,
    max_new_tokens: int = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    seed: int = 0,
    batch_size: int = 8,
    output: Annotated[Path | None, typer.Option(help="Write jsonl here instead of printing.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU.")] = None,
) -> None:
    """Continue prompts from arguments, a file or standard input."""
    from llmtrain.generation.command import generate_command

    generate_command(
        source,
        prompt or [],
        prompts_file=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
        output=output,
        recipe=recipe,
        device=device,
        dtype=dtype,
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(llmtrain.__version__)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
