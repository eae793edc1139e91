"""The command `llmtrain`. Each verb imports what it needs when it is called, so that `--help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import llmtrain
from llmtrain.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain and fine-tune MPT-style language models from YAML recipes.",
)


class ShowsByDefault(TyperGroup):
    """`llmtrain data X` is `llmtrain data show X`, unless X is one of the other verbs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand that the arguments name."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


data = typer.Typer(cls=ShowsByDefault, no_args_is_help=True, help="Look at training data.")
app.add_typer(data, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys.")]


def _trust(given: bool) -> bool:
    if given:
        from llmtrain.trust import trust

        trust()
    return given


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trust,
        help="Run Python code that the recipe or the checkpoint names; what runs is printed.",
    ),
]
"""Obeyed where it is parsed; commands need not look at it."""

Private = Annotated[bool, typer.Option("--private/--public", help="A repository that is new on the hub.")]


class MakesByDefault(TyperGroup):
    """`llmtrain prep X` is `llmtrain prep make X`, options of it included, unless X is one of the other verbs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The subcommand that the arguments name, and its own."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["make", *args])


prep = typer.Typer(cls=MakesByDefault, help="Turn text into MDS shards, as a data recipe (data_prep/*.yaml) says.")
app.add_typer(prep, name="prep")


@prep.command("make")
def make_shards(
    recipe: Path,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(help="One a core when left out.")] = None,
    engine: Annotated[str, typer.Option(help="local, spark or datatrove.")] = "local",
    master: Annotated[str | None, typer.Option(help="Spark's: local[2], spark://HOST:7077.")] = None,
    rank: Annotated[int | None, typer.Option(help="Do this share of the work, without the merge.")] = None,
    world_size: Annotated[int | None, typer.Option(help="Number of shares.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Plan the work, and stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace output, or discard unfinished work, of another recipe.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Turn text into MDS shards, as a data recipe (data_prep/*.yaml) says. Interrupted, it goes on where it was.

    Where a scheduler starts many processes: --rank R --world-size W for each, and then `llmtrain prep merge RECIPE`.
    """
    from llmtrain.prep.run import Options, prepare

    options = Options(
        processes=processes,
        engine=engine,
        master=master,
        rank=rank,
        world_size=world_size,
        only_plan=plan,
        overwrite=overwrite,
    )
    prepare(recipe, overrides or [], options)


@prep.command("merge")
def merge_shards(recipe: Path, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Put together what the ranks of a recipe have made."""
    from llmtrain.prep.run import prepare_merge

    prepare_merge(recipe, overrides or [])


@app.command()
def check(
    recipe: Path,
    overrides: Overrides = None,
    last_mile: Annotated[
        bool, typer.Option("--last-mile", help="Save, export and open tiny weights of its shape; try where it writes.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Validate a training or evaluation recipe without starting anything, and print it resolved."""
    from llmtrain.evaluation.recipe import check as check_evaluation
    from llmtrain.evaluation.recipe import is_eval_recipe
    from llmtrain.recipe.check import check as run

    if is_eval_recipe(recipe):
        print(check_evaluation(recipe, overrides or []))
        return
    print(run(recipe, overrides or [], last_mile=last_mile))


@app.command()
def schema() -> None:
    """Print the JSON Schema of training recipes, for editors."""
    import json

    from llmtrain.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@data.command("show")
def show_data(recipe: Path, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """What a fine-tuning recipe trains: one batch decoded token by token, and counts. Starts no training."""
    from llmtrain.data.command import show_command

    show_command(recipe, overrides or [])


@data.command("inspect")
def inspect_data(
    shards: Annotated[list[Path], typer.Argument(help="Folders of MDS shards, or with some below.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or folder; the one that llmtrain prep took when left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows of each folder to show.")] = 3,
    sample_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each to show.")] = 200,
    token_encoding_type: Annotated[str, typer.Option(help="dtype of ids that were stored as bytes.")] = "int64",
    output: Annotated[
        Path | None, typer.Option(help="Path of the PNG and JSON, without suffix; SHARDS/inspect.")
    ] = None,
) -> None:
    """What shards hold: counts, vocabulary, lengths of documents (PNG), decoded rows; every file is checked."""
    from llmtrain.data.inspect_command import inspect_command

    sound = inspect_command(
        shards,
        tokenizer=tokenizer,
        samples=samples,
        sample_tokens=sample_tokens,
        token_encoding_type=token_encoding_type,
        output=output,
    )
    raise typer.Exit(0 if sound else 1)


@data.command("verify")
def verify_data(
    shards: Annotated[list[Path], typer.Argument(help="Folders of MDS shards, or with some below.")],
) -> None:
    """Check every shard's size, hash, decompression and rows against the index; exit code 1 names what is damaged."""
    from llmtrain.data.verify import verify_command

    raise typer.Exit(0 if verify_command(shards) else 1)


@app.command()
def train(recipe: Path, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train a recipe in this process; `composer [-n RANKS] train.py` starts several."""
    from llmtrain.training.command import main as run

    raise typer.Exit(run([str(recipe), *(overrides or [])]))


@app.command()
def launch(
    recipe: Path,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Go on with so many hosts when others are gone; all when left out.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each host; its GPUs are counted when left out (none: 1 rank).")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="local, torchrun, slurm or kubernetes; local or torchrun, by --nodes.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts after crashes.")] = 3,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT of one of several hosts, where they find each other.")
    ] = None,
    rdzv_conf: Annotated[str | None, typer.Option(help="More of torchrun's --rdzv-conf.")] = None,
    local_addr: Annotated[
        str | None, typer.Option(help="This host's address for the others; found when left out.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="Number this host and use Composer's launcher instead of torchrun.")
    ] = None,
    grace: Annotated[float, typer.Option(min=1, help="Seconds to save and end in after SIGTERM.")] = 300.0,
    restart_preempted: Annotated[
        bool, typer.Option("--restart-preempted", help="Start again after ranks were sent SIGTERM by others, too.")
    ] = False,
    only_print: Annotated[bool, typer.Option("--print", help="Print the commands, and run nothing.")] = False,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="The recipe may run code that it names.")] = False,
    on_cpu: Annotated[bool, typer.Option("--cpu", help="Ranks on CPUs: ask a scheduler for no GPUs.")] = False,
    env: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the ranks; no secrets.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one start: 24:00:00.", rich_help_panel="SLURM")] = None,
    partition: Annotated[str | None, typer.Option(help="Its queue.", rich_help_panel="SLURM")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.", rich_help_panel="SLURM")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.", rich_help_panel="SLURM")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="More of sbatch: KEY=VALUE, or KEY for a flag.", rich_help_panel="SLURM"),
    ] = None,
    max_requeues: Annotated[
        int, typer.Option(min=0, help="Returns to the queue until it gives up.", rich_help_panel="SLURM")
    ] = 100,
    image: Annotated[str, typer.Option(help="With llmtrain in it.", rich_help_panel="Kubernetes")] = "",
    namespace: Annotated[str | None, typer.Option(help="kubectl's, left out.", rich_help_panel="Kubernetes")] = None,
    volume_claim: Annotated[
        list[str] | None,
        typer.Option(
            help="CLAIM:/path, a PersistentVolumeClaim; the first one is the working directory.",
            rich_help_panel="Kubernetes",
        ),
    ] = None,
    workdir: Annotated[
        str | None, typer.Option(help="Another working directory.", rich_help_panel="Kubernetes")
    ] = None,
    secret_env: Annotated[
        list[str] | None,
        typer.Option(help="VARIABLE=SECRET/KEY, or SECRET for all keys.", rich_help_panel="Kubernetes"),
    ] = None,
    request: Annotated[
        list[str] | None, typer.Option(help="cpu=32, memory=200Gi, ...", rich_help_panel="Kubernetes")
    ] = None,
    gpu_resource: Annotated[
        str, typer.Option(help="What a GPU is called.", rich_help_panel="Kubernetes")
    ] = "nvidia.com/gpu",
    node_selector: Annotated[
        list[str] | None, typer.Option(help="LABEL=VALUE of nodes.", rich_help_panel="Kubernetes")
    ] = None,
    shm_size: Annotated[str, typer.Option(help="Of /dev/shm.", rich_help_panel="Kubernetes")] = "16Gi",
    service_account: Annotated[
        str | None, typer.Option(help="The namespace's, left out.", rich_help_panel="Kubernetes")
    ] = None,
    pod_retries: Annotated[
        int, typer.Option(min=0, help="Replacements of a failed pod.", rich_help_panel="Kubernetes")
    ] = 5,
) -> None:
    """Train a recipe on one host or several, and start it again when it crashes."""
    from llmtrain.launching.command import Options, launch_command
    from llmtrain.launching.kubernetes import KubernetesOptions
    from llmtrain.launching.slurm import SlurmOptions
    from llmtrain.trust import trust

    if trust_code:
        trust()
    options = Options(
        scheduler=scheduler,
        nodes=nodes,
        min_nodes=min_nodes,
        gpus_per_node=gpus_per_node,
        max_restarts=max_restarts,
        rdzv_endpoint=rdzv_endpoint,
        rdzv_conf=rdzv_conf,
        local_addr=local_addr,
        node_rank=node_rank,
        grace=grace,
        restart_preempted=restart_preempted,
        only_print=only_print,
        on_cpu=on_cpu,
        variables=tuple(env or ()),
        slurm=SlurmOptions(
            time=time,
            partition=partition,
            account=account,
            qos=qos,
            sbatch=tuple(sbatch or ()),
            max_requeues=max_requeues,
        ),
        kubernetes=KubernetesOptions(
            image=image,
            namespace=namespace,
            volume_claims=tuple(volume_claim or ()),
            workdir=workdir,
            secrets=tuple(secret_env or ()),
            requests=tuple(request or ()),
            gpu_resource=gpu_resource,
            node_selector=tuple(node_selector or ()),
            shared_memory=shm_size,
            service_account=service_account,
            retries=pod_retries,
        ),
    )
    raise typer.Exit(launch_command(recipe, overrides or [], options))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a .pt file.")],
    target: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
    adapter_only: Annotated[
        bool, typer.Option(help="Of a LoRA run, the adapters alone; merged when left out.")
    ] = False,
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code", help="Allow a modelling file of ours, where no class of transformers is the model."
        ),
    ] = False,
    weights_format: Annotated[str, typer.Option(help="safetensors, or bin for what reads nothing else.")] = (
        "safetensors"
    ),
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file: 5GB, 500MB, 2GiB.")] = "5GB",
    license: Annotated[
        str | None, typer.Option(help="For the model card; the recipe's metadata.license when left out.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Copy it there, too: a folder, s3://..., gs://..., hf://USER/REPOSITORY.")
    ] = None,
    private: Private = True,
    trust_code: TrustCode = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder for plain transformers, and prove that it is the same model."""
    from llmtrain.checkpoint.export import export as run

    report = run(
        source,
        target,
        dtype=dtype,
        recipe=recipe,
        overwrite=overwrite,
        adapter_only=adapter_only,
        with_code=with_code,
        weights_format=weights_format,  # type: ignore[arg-type]  # checked there
        max_shard_size=max_shard_size,
        license=license,
    )
    print(report)
    if push is not None:
        from llmtrain.checkpoint.push import push_command

        push_command(target, push, overwrite=overwrite, private=private)


@app.command("push")
def push_export(
    folder: Annotated[Path, typer.Argument(help="What llmtrain export wrote.")],
    destination: Annotated[str, typer.Argument(help="A folder, s3://..., gs://..., azure://..., hf://USER/REPO.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an export that stands there.")] = False,
    private: Private = True,
) -> None:
    """Copy an export to a folder, object storage or a hub's repository; what arrived is compared with what was sent."""
    from llmtrain.checkpoint.push import push_command

    push_command(folder, destination, overwrite=overwrite, private=private)


@app.command("import")
def import_weights(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, another trainer's checkpoint, or one of ours.")
    ],
    target: Annotated[Path, typer.Argument(help="The checkpoint's folder to write.")],
    to: Annotated[str, typer.Option(help="sharded, for any number of ranks, or full, one .pt file.")] = "sharded",
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write an MPT's weights as a checkpoint of ours, to train from, and prove that they are the same bits."""
    from llmtrain.checkpoint.import_command import import_weights as run

    print(run(source, target, to=to, recipe=recipe, overwrite=overwrite))  # type: ignore[arg-type]  # checked there


@app.command("eval")
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(help="An evaluation recipe, a run, a checkpoint, an export, or a training recipe."),
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Shards, text files or folders of them, instead of the recipe's; several times."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-evaluation-harness, or YAML files with icl_tasks; commas, or several times."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task.")] = None,
    max_seq_len: Annotated[
        list[int] | None, typer.Option(help="Tokens in a window; several times for several lengths.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of text; all of it when left out.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward; decides on memory.")] = 16_384,
    output: Annotated[
        Path | None, typer.Option(help="Path of the results, without suffix; RUN/eval/CHECKPOINT.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU.")] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Shard the model over the ranks.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Loss, perplexity and bits per byte on shards or text, and tasks; on several ranks with `composer -n 2 -c`."""
    from llmtrain.evaluation.command import eval_command

    eval_command(
        source,
        overrides or [],
        data=data or [],
        lengths=max_seq_len or [],
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        output=output,
        recipe=recipe,
        device=device,
        dtype=dtype,
        tasks=tasks or [],
        num_fewshot=num_fewshot,
        limit=limit,
        shard=shard,
    )


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="An export, a run, or a checkpoint.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file (a prompt a line) or .jsonl (prompt, messages or input_data); `< FILE` is one prompt."
        ),
    ] = None,
    max_new_tokens: int = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; several times.")] = None,
    seed: int = 0,
    batch_size: int = 8,
    output: Annotated[
        Path | None, typer.Option(help="Write jsonl here instead of printing; interrupted, it goes on where it was.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output of something else.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU.")] = None,
    trust_code: TrustCode = False,
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
        stop=stop or [],
        seed=seed,
        batch_size=batch_size,
        output=output,
        overwrite=overwrite,
        recipe=recipe,
        device=device,
        dtype=dtype,
    )


@app.command()
def chat(
    source: Annotated[Path, typer.Argument(help="An export, a run, or a checkpoint.")],
    system: Annotated[str | None, typer.Option(help="System prompt, instead of the template's own.")] = None,
    max_new_tokens: int = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    seed: int = 0,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, for a checkpoint that does not hold one.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Talk with a model; piped in, each line is a turn. /reset forgets, /save FILE keeps the conversation."""
    from llmtrain.generation.chat_command import chat_command

    chat_command(
        source,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        recipe=recipe,
        device=device,
        dtype=dtype,
    )


@app.command("compare")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or going on: runs/NAME.")],
    output: Annotated[Path | None, typer.Option(help="Write OUTPUT.json and OUTPUT.png, too.")] = None,
) -> None:
    """Runs side by side: losses, evaluations, speed, and where their recipes differ."""
    from llmtrain.comparison.command import compare_command

    compare_command(runs, output=output)


@app.command()
def certify(
    recipe: Path,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run.")] = 2,
    kills: Annotated[int, typer.Option(min=0, help="How often it is killed.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides where.")] = 0,
    other_ranks: Annotated[str, typer.Option(help="Numbers of ranks to go on with, or none.")] = "1,4",
    steps: Annotated[int, typer.Option(min=6, help="Of each run.")] = 24,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder of the runs.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Path of the JSON and PNG, without suffix; certificate-RECIPE.")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Prove that a run which is killed and resumed is the run that was not: kills it at random and compares bits."""
    from llmtrain.certify.processes import preload

    preload(at_once=True)  # while this process imports the same
    from llmtrain.certify.command import certify_command

    certificate = certify_command(
        recipe,
        overrides or [],
        ranks=ranks,
        kills=kills,
        seed=seed,
        other_ranks=other_ranks,
        steps=steps,
        keep=keep,
        output=output,
    )
    raise typer.Exit(0 if certificate.granted else 1)


@app.command()
def version() -> None:
    """Print the version."""
    print(llmtrain.__version__)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    from llmtrain.redaction import redact_output

    redact_output()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
