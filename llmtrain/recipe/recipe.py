"""The training recipe: every key that a training YAML may have. Names and meanings are llm-foundry's. Light."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.checkpoint.best import BestCheckpointConfig
from llmtrain.config.base import Config, mistake
from llmtrain.config.durations import BatchesOrEpochs, Interval, RunLength, Span
from llmtrain.data.config import TextDatasetConfig, TextLoaderConfig
from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.evaluation.icl.config import Gauntlet, ICLConfig, Tasks, refuse_repeated
from llmtrain.hf_model.config import HFConfig
from llmtrain.model.config import MPTConfig
from llmtrain.recipe.legacy import ADVICE, MICROBATCH_AUTO
from llmtrain.tokenizer import TokenizerConfig
from llmtrain.training.algorithms import AlgorithmsConfig
from llmtrain.training.bad_steps_config import BadStepsConfig
from llmtrain.training.callbacks import CallbacksConfig
from llmtrain.training.fsdp import FSDPConfig, PrecisionByUse
from llmtrain.training.loggers import LoggersConfig
from llmtrain.training.optimizers import DecoupledLionWConfig, OptimizerConfig
from llmtrain.training.schedulers import SchedulerConfig, units_problem
from llmtrain.training.watchdog_config import WatchdogConfig

ModelConfig = Annotated[MPTConfig | HFConfig, Field(discriminator="name")]
"""What may stand under `model`; `name` says which of them it is (loading takes MPT when it is left out)."""

TrainLoader = Annotated[TextLoaderConfig | FinetuningLoaderConfig, Field(discriminator="name")]
"""What may stand under `train_loader`."""


class TextEvalLoader(TextLoaderConfig):
    """An evaluation loader: a text loader with a label."""

    label: str | None = None
    """Name of the evaluator; needed when there are several."""
    drop_last: bool = False
    """Drop the last batch when it is not full. Evaluation sees every row."""
    subset_num_batches: int | None = Field(default=None, ge=-1)
    """Batches of this loader on each rank, -1 for all; eval_subset_num_batches when left out. (llmtrain's own.)"""


class FinetuningEvalLoader(FinetuningLoaderConfig):
    """An evaluation loader: a fine-tuning loader with a label. The loss is that of the trained tokens."""

    label: str | None = None
    """Name of the evaluator; needed when there are several."""
    drop_last: bool = False
    """Drop the last batch when it is not full. Evaluation sees every example."""
    subset_num_batches: int | None = Field(default=None, ge=-1)
    """Batches of this loader on each rank, -1 for all; eval_subset_num_batches when left out. (llmtrain's own.)"""


EvalLoader = Annotated[TextEvalLoader | FinetuningEvalLoader, Field(discriminator="name")]
"""What may stand under `eval_loader`."""


LOSS_METRICS = ("LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy")
"""What an evaluation loader is measured by."""


def refuse_same_labels(labels: Sequence[str | None]) -> None:
    """Refuse a list of evaluation loaders whose results could not be told apart."""
    for index, label in enumerate(labels):
        if len(labels) > 1 and label is None:
            raise mistake("With several loaders each needs a `label`.", f"eval_loader.{index}.label")
        if label in labels[:index]:
            raise mistake("Two loaders have this label.", f"eval_loader.{index}.label")


def refuse_odd_name(value: str, what: str) -> str:
    """Refuse a run_name that cannot be the name of `what` ("a folder") on a disk."""
    if value and (value.startswith(".") or value.strip() != value or any(sign in value for sign in "/\\{}")):
        raise ValueError(f"It names {what}: no slashes, braces, blanks around it or dot at its start.")
    return value


def refuse_fp8(value: Any) -> Any:
    """Refuse the one precision of llm-foundry's that there is no layer for."""
    if value == "amp_fp8":
        raise ValueError("fp8 needs TransformerEngine layers, which MPT here has not. Use `amp_bf16`.")
    return value


def _as_list(value: Any) -> Any:
    return () if value is None else [value] if isinstance(value, Mapping) else value


def _one_of_any_case(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class CompileConfig(Config):
    """Arguments of torch.compile, which is applied to each block."""

    fullgraph: bool | None = None
    """A graph break is an error. Null: for MPT, whose blocks have none, but not for Hugging Face models."""
    dynamic: bool | None = None
    """Compile for shapes that change. Null: once a second length is seen."""
    backend: str = "inductor"
    """Which compiler."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """How hard it tries."""
    options: dict[str, Any] | None = None
    """Options of the compiler; not together with `mode`."""
    disable: bool = False
    """Compile nothing."""

    @model_validator(mode="after")
    def _mode_or_options(self) -> Self:
        if self.mode is not None and self.options is not None:
            raise ValueError("give mode or options, not both")
        return self


class ProfilerScheduleConfig(Config):
    """Composer's cyclic schedule: which batches are profiled."""

    skip_first: int = Field(default=0, ge=0)
    """Batches before the first cycle."""
    wait: int = Field(default=0, ge=0)
    """Batches of a cycle that are not profiled."""
    warmup: int = Field(default=1, ge=0)
    """Batches that are profiled and thrown away."""
    active: int = Field(default=4, ge=1)
    """Batches that are recorded."""
    repeat: int = Field(default=1, ge=0)
    """Cycles; 0 goes on to the end."""


class ProfilerConfig(Config):
    """Composer's profiler."""

    schedule: ProfilerScheduleConfig
    """Which batches."""
    json_trace_handler: dict[str, Any] = Field(default_factory=dict)
    """Settings of Composer's JSONTraceHandler."""
    torch_prof_folder: str | None = None
    """Folder of torch's profiles; RUN/torch_profiles when left out."""
    torch_prof_record_shapes: bool = False
    """Record tensor shapes."""
    torch_prof_profile_memory: bool = False
    """Record memory."""
    torch_prof_with_stack: bool = False
    """Record Python stacks."""
    torch_prof_with_flops: bool = False
    """Estimate FLOPs."""
    sys_prof_cpu: bool = True
    """Record CPU use."""
    sys_prof_memory: bool = False
    """Record memory use."""
    sys_prof_disk: bool = False
    """Record disk use."""
    sys_prof_net: bool = False
    """Record network use."""


class Recipe(Config):
    """A training run."""

    ADVICE: ClassVar[Mapping[str, str]] = ADVICE

    # What is trained
    model: ModelConfig
    """The model."""
    tokenizer: TokenizerConfig
    """The tokenizer that the shards were made with."""
    max_seq_len: PositiveInt
    """Tokens in a sequence. Also sets model.max_seq_len, tokenizer.kwargs.model_max_length and the loaders'
    dataset.max_seq_len, where those do not say otherwise."""
    max_duration: RunLength
    """Length of the run: `10ba`, `1ep`, `2e9tok`; a plain number counts epochs."""
    seed: int = Field(default=17, ge=0, lt=2**32)
    """Seeds weights, dropout and everything else but the order of the data (dataset.shuffle_seed)."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Autocast's dtype. On CPU every run is in fp32."""

    # How
    optimizer: OptimizerConfig
    """The optimizer."""
    scheduler: SchedulerConfig
    """The learning-rate schedule."""
    algorithms: AlgorithmsConfig | None = None
    """Changes to the training step, by name."""
    global_train_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks. A multiple of the number of ranks."""
    device_train_microbatch_size: PositiveInt
    """Samples of one forward and backward pass on one device; what fits into memory. Does not change the result."""
    device_eval_batch_size: PositiveInt | None = None
    """Samples of one evaluation pass on one device; the micro-batch when left out."""
    accumulate_train_batch_on_tokens: bool = True
    """Weigh micro-batches by their targets, so that the micro-batch size does not change the result."""
    fsdp_config: FSDPConfig | None = None
    """Sharding over ranks. Without it every rank holds the whole model (DDP)."""
    sequence_parallel_degree: PositiveInt = 1
    """Consecutive ranks that share each sequence, when one device cannot hold it (Ulysses, arXiv:2309.14509): each has
    a slice of the tokens, and in attention some of the heads. Divides the number of ranks and model.n_heads. Does not
    change the result; a run may continue with another degree."""
    compile_config: CompileConfig | None = None
    """Arguments of torch.compile; `{}` compiles with its defaults, null does not compile."""
    dist_timeout: PositiveFloat = 600.0
    """Seconds that a rank waits for the others before the run fails."""
    max_split_size_mb: PositiveInt | None = None
    """CUDA allocator: blocks larger than this many MB are not split."""
    expandable_segments: bool = True
    """CUDA allocator: segments that grow, against fragmentation."""
    cuda_load_lazy: bool = False
    """Load CUDA kernels when they are first used."""
    deterministic: bool = False
    """Only operations that give the same bits each time; slower on GPUs. See docs/determinism.md."""

    # When something goes wrong
    bad_steps: BadStepsConfig = BadStepsConfig()
    """Losses and gradients that are not finite, and jumps of the loss."""
    watchdog: WatchdogConfig | None = WatchdogConfig()
    """Names the rank that a run waits for, and ends a run that hangs; null does neither."""

    # Data
    train_loader: TrainLoader
    """Training data."""
    eval_loader: Annotated[tuple[EvalLoader, ...], BeforeValidator(_as_list)] = ()
    """Evaluation data: one loader, or a list of them with a `label` each."""
    train_subset_num_batches: int = Field(default=-1, ge=-1)
    """Batches of an epoch that are used; -1 is all."""
    spin_dataloaders: bool = True
    """On a resume, replay a loader that cannot resume by itself. Streaming's can."""

    # Evaluation
    eval_interval: Span = "1ep"
    """How often evaluation runs; a plain number counts epochs, 0 is never."""
    eval_first: bool = False
    """Evaluate before the first step, too."""
    eval_subset_num_batches: int = Field(default=-1, ge=-1)
    """Batches of each evaluation loader; -1 is all."""
    icl_tasks: Tasks = ()
    """llm-foundry's tasks, put at each evaluation: a list, or the path of a YAML file with one."""
    icl_seq_len: PositiveInt | None = None
    """Tokens of question and answer in a task; max_seq_len when left out."""
    icl_subset_num_batches: int | None = Field(default=None, ge=-1)
    """Batches of device_eval_batch_size of each task on each rank; all when left out, or -1."""
    eval_gauntlet: Gauntlet = None
    """Averages over tasks, by category: a block, or the path of a YAML file with one."""

    # Starting point and checkpoints
    save_folder: str | None = None
    """Where checkpoints go, usually `runs/{run_name}/checkpoints`; none are saved when left out."""
    save_interval: Interval = "1000ba"
    """How often; a plain number counts epochs. The end of the run is always saved."""
    save_num_checkpoints_to_keep: int = Field(default=-1, ge=-1)
    """The newest so many are kept; -1 keeps all."""
    save_keep_every: BatchesOrEpochs | None = None
    """Also keep the first checkpoint of each such span, for ever: `10000ba`."""
    save_async: bool = True
    """Write sharded checkpoints while training goes on; it waits for the copy of the state only."""
    best_checkpoint: BestCheckpointConfig | None = None
    """Also keep the best one: `checkpoints/best` is a link to it. `{}` watches the loss of `eval`."""
    save_overwrite: bool = False
    """Start anew in a folder that has checkpoints of an earlier run, and replace them."""
    save_weights_only: bool = False
    """Save no optimizer state; such a checkpoint cannot be resumed."""
    save_filename: str | None = None
    """Accepted for old recipes; checkpoints are always named ep{epoch}-ba{batch}."""
    save_latest_filename: str | None = None
    """Accepted for old recipes; the link is always named `latest`."""
    save_ignore_keys: list[str] | None = None
    """Glob patterns of state keys that are not saved."""
    load_path: str | None = None
    """A checkpoint to start from, when the run has none of its own."""
    load_weights_only: bool = False
    """Take only the weights from load_path, not the optimizer, step and data position."""
    load_strict_model_weights: bool = True
    """Missing or unexpected weights in load_path are an error."""
    load_ignore_keys: list[str] | None = None
    """Glob patterns of state keys that are not loaded."""
    autoresume: bool | None = None
    """Go on from the newest complete checkpoint of this run. When left out: yes, if there is a save_folder, unless
    save_overwrite or save_weights_only is set."""

    # What a run shows
    run_name: str = ""
    """Names the run's folder, runs/RUN_NAME. When left out: the environment variable RUN_NAME, else the name of the
    recipe's file."""
    loggers: LoggersConfig | None = None
    """Loggers, by name. metrics.jsonl and loss.png are always written."""
    callbacks: CallbacksConfig | None = None
    """Callbacks, by name."""
    console_log_interval: Interval = "1ba"
    """How often a line is printed; a plain number counts epochs."""
    progress_bar: bool = False
    """Composer's progress bar."""
    log_to_console: bool = True
    """Print lines at all."""
    python_log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_one_of_any_case)
    ] = "warning"
    """Least severe messages of Python's loggers that are shown."""
    log_config: bool = True
    """Log the resolved recipe to the loggers as hyperparameters. It always stands in RUN/recipe.yaml."""
    metadata: dict[str, Any] | None = None
    """Free-form, logged with the run."""
    flatten_metadata: bool = True
    """Log metadata's keys at the top level."""
    profiler: ProfilerConfig | None = None
    """Composer's profiler."""

    code_paths: list[str] | None = None
    """Python files that are run before anything else (they may register components). A recipe with them is code."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Free-form: values for interpolation (`${variables.x}`)."""

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from its own newest checkpoint."""
        if self.autoresume is not None:
            return self.autoresume
        return self.save_folder is not None and not self.save_overwrite and not self.save_weights_only

    def evaluators(self) -> dict[str, EvalLoader]:
        """Label -> loader: `eval` for a single one without label, else `eval/LABEL`."""
        return {f"eval/{loader.label}" if loader.label else "eval": loader for loader in self.eval_loader}

    def icl(self, batch_size: int) -> ICLConfig | None:
        """The tasks, with what the recipe says for all of them; None when there are none."""
        if not self.icl_tasks:
            return None
        subset = self.icl_subset_num_batches
        return ICLConfig(
            icl_tasks=self.icl_tasks,
            eval_gauntlet=self.eval_gauntlet,
            icl_seq_len=self.icl_seq_len or self.max_seq_len,
            icl_subset_num_batches=-1 if subset is None else subset,
            device_eval_batch_size=batch_size,
        )

    def watched_evaluators(self) -> dict[str, str]:
        """Key in the recipe -> label of the evaluator that it watches."""
        watched = {}
        if self.callbacks is not None and self.callbacks.early_stopper is not None:
            watched["callbacks.early_stopper.dataloader_label"] = self.callbacks.early_stopper.dataloader_label
        if self.best_checkpoint is not None:
            watched["best_checkpoint.dataloader_label"] = self.best_checkpoint.dataloader_label
        return watched

    def finetuning_loaders(self) -> dict[str, FinetuningLoaderConfig]:
        """Key in the recipe -> loader, of those that read conversations."""
        loaders = {"train_loader": self.train_loader}
        loaders |= {f"eval_loader.{index}": loader for index, loader in enumerate(self.eval_loader)}
        return {key: loader for key, loader in loaders.items() if isinstance(loader, FinetuningLoaderConfig)}

    @field_validator("device_train_microbatch_size", mode="before")
    @classmethod
    def _no_auto(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip() == "auto":
            raise ValueError(MICROBATCH_AUTO)
        return value

    @field_validator("run_name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        return refuse_odd_name(value, "a folder")

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp8(cls, value: Any) -> Any:
        return refuse_fp8(value)

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        problem = units_problem(self.scheduler, self.max_duration)
        if problem is not None:
            raise mistake(problem[1], f"scheduler.{problem[0]}")
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        refuse_same_labels([loader.label for loader in self.eval_loader])
        return self

    @model_validator(mode="after")
    def _evaluators_are_there(self) -> Self:
        refuse_repeated(self.icl_tasks)
        if self.eval_gauntlet is not None and not self.icl_tasks:
            raise mistake("It averages over tasks, and there are none. Add `icl_tasks`.", "eval_gauntlet")
        if self.best_checkpoint is not None and self.save_folder is None:
            raise mistake(
                "Checkpoints are saved with a `save_folder` only. Give one, or remove this.", "best_checkpoint"
            )
        tasks = {f"{task.label}/{n}-shot": task for task in self.icl_tasks for n in task.num_fewshot}
        labels = [*self.evaluators(), *tasks]
        for key, label in self.watched_evaluators().items():
            if key.startswith("best_checkpoint") and label == "eval_gauntlet" and self.eval_gauntlet is not None:
                continue
            # Which categories a task has, its file says: they are looked at when the run begins.
            if any(task.has_categories and label.startswith(f"{name}/") for name, task in tasks.items()):
                continue
            if label not in labels or (label in tasks and tasks[label].has_categories):
                known = ", ".join(f"`{name}`" for name in labels) or "none: there is no eval_loader"
                raise mistake(f"There is no such evaluator. Known: {known}.", key)
        return self

    @model_validator(mode="after")
    def _metrics_are_there(self) -> Self:
        stopper = self.callbacks.early_stopper if self.callbacks is not None else None
        blocks = {"callbacks.early_stopper": stopper, "best_checkpoint": self.best_checkpoint}
        for key, block in blocks.items():
            known = () if block is None else self._metrics_of(block.dataloader_label)
            if block is not None and block.monitor not in known:
                raise mistake(f"{block.dataloader_label} has {', '.join(known)}.", f"{key}.monitor")
        return self

    def _metrics_of(self, label: str) -> tuple[str, ...]:
        """The metrics of an evaluator; of the gauntlet, its categories and averages."""
        if label in self.evaluators():
            return LOSS_METRICS
        for task in self.icl_tasks:
            if any(
                label == (name := f"{task.label}/{n}-shot") or label.startswith(f"{name}/") for n in task.num_fewshot
            ):
                return task.metrics
        return self.eval_gauntlet.names if self.eval_gauntlet is not None else ()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        limit = self.model.max_seq_len
        loaders = [("train_loader", self.train_loader.dataset)]
        loaders += [(f"eval_loader.{index}", loader.dataset) for index, loader in enumerate(self.eval_loader)]
        for name, dataset in loaders:
            if dataset.max_seq_len > limit:
                raise mistake(
                    f"Sequences of {dataset.max_seq_len} tokens do not fit the model's max_seq_len of {limit}. Set the "
                    "top-level `max_seq_len` alone and remove the others.",
                    f"{name}.dataset.max_seq_len",
                )
        return self

    @model_validator(mode="after")
    def _packed_examples_are_apart(self) -> Self:
        if isinstance(self.model, MPTConfig) and not self.model.attn_config.attn_uses_sequence_id:
            for key, loader in self.finetuning_loaders().items():
                if loader.dataset.packs:
                    raise mistake(
                        f"`{key}` packs several examples into a row, and with false they would see each other. Leave "
                        "this key out, or set it to true.",
                        "model.attn_config.attn_uses_sequence_id",
                    )
        return self

    @model_validator(mode="after")
    def _documents_have_ends(self) -> Self:
        data = self.train_loader.dataset
        masked = isinstance(self.model, MPTConfig) and self.model.attn_config.attn_uses_sequence_id
        if masked and isinstance(data, TextDatasetConfig) and data.eos_token_id is None and data.bos_token_id is None:
            raise mistake(
                "`model.attn_config.attn_uses_sequence_id` masks other documents, and nothing says where a document "
                "ends. Give the tokenizer's end-of-text id here (or `bos_token_id`).",
                "train_loader.dataset.eos_token_id",
            )
        return self

    @model_validator(mode="after")
    def _starts_once(self) -> Self:
        if isinstance(self.model, MPTConfig) and self.model.pretrained is not None:
            if self.load_path is not None:
                raise mistake("`model.pretrained` names a starting point, too. Keep one of the two.", "load_path")
            if self.model.init_device == "meta":
                raise mistake(
                    "`model.pretrained` is read before the model is sharded: write `mixed` (rank 0 reads, the others "
                    "receive their shards).",
                    "model.init_device",
                )
        return self

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        sharded = self.fsdp_config is not None and self.fsdp_config.sharding_strategy != "NO_SHARD"
        clipping = self.algorithms.gradient_clipping if self.algorithms is not None else None
        if sharded and clipping is not None and clipping.clipping_type == "adaptive":
            raise mistake(
                "`adaptive` compares norms of rows, which sharding spreads over ranks. Use `norm`, or shard nothing "
                "(remove `fsdp_config`).",
                "algorithms.gradient_clipping.clipping_type",
            )
        spelled = self.fsdp_config.mixed_precision if self.fsdp_config is not None else None
        low = spelled.param_dtype if isinstance(spelled, PrecisionByUse) else None
        if low in ("bf16", "fp16") and self.precision != f"amp_{low}":
            raise mistake(
                f"`precision` is {self.precision}, and gathered parameters have its dtype: write `amp_{low}` there, "
                "or change this key.",
                "fsdp_config.mixed_precision.param_dtype",
            )
        return self

    @model_validator(mode="after")
    def _sequences_grow_to_their_length(self) -> Self:
        warmup = self.algorithms.seq_length_warmup if self.algorithms is not None else None
        if warmup is None:
            return self
        if warmup.truncate and isinstance(self.train_loader, FinetuningLoaderConfig):
            raise mistake(
                "Answers stand at the end of an example, and would be cut off. Use `truncate: false`, which loses no "
                "token.",
                "algorithms.seq_length_warmup.truncate",
            )
        longest = self.train_loader.dataset.max_seq_len
        if warmup.max_seq_length not in (None, longest):
            raise mistake(
                f"Sequences grow to `max_seq_len`, {longest} tokens here: longer ones do not exist, and with shorter "
                "ones the rest would never be read. Remove it.",
                "algorithms.seq_length_warmup.max_seq_length",
            )
        if warmup.min_seq_length > longest:
            raise mistake(
                f"`max_seq_len` is only {longest}.",
                "algorithms.seq_length_warmup.min_seq_length",
            )
        return self

    @model_validator(mode="after")
    def _same_bits_each_time(self) -> Self:
        if not self.deterministic:
            return self
        if self.compile_config is not None and "max-autotune" in (self.compile_config.mode or ""):
            raise mistake(
                "`deterministic: true` is set, and max-autotune chooses kernels by timing them. Use `default`.",
                "compile_config.mode",
            )
        if isinstance(self.model, MPTConfig) and self.model.attn_config.flex_backend == "flash":
            raise mistake(
                "`deterministic: true` is set, and the backward pass of this backend adds in any order. Use `triton`.",
                "model.attn_config.flex_backend",
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> Self:
        degree = self.sequence_parallel_degree
        if degree == 1:
            return self
        if not isinstance(self.model, MPTConfig):
            raise mistake("Only MPT models share sequences over ranks. Remove it.", "sequence_parallel_degree")
        if self.model.n_heads % degree:
            raise mistake(
                f"In attention each rank has n_heads / {degree} heads, and model.n_heads is {self.model.n_heads}. "
                "Choose a divisor.",
                "sequence_parallel_degree",
            )
        loaders = [("train_loader", self.train_loader)]
        loaders += [(f"eval_loader.{index}", loader) for index, loader in enumerate(self.eval_loader)]
        for key, loader in loaders:
            if isinstance(loader.dataset, TextDatasetConfig) and loader.dataset.replication not in (None, degree):
                raise mistake(
                    f"Ranks that share sequences get the same samples by themselves (sequence_parallel_degree: "
                    f"{degree}). Remove it.",
                    f"{key}.dataset.replication",
                )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if isinstance(self.optimizer, DecoupledLionWConfig):
            for index, group in enumerate(self.optimizer.param_groups):
                if group.eps is not None:
                    raise mistake("Lion has no eps. Remove it.", f"optimizer.param_groups.{index}.eps")
        return self

    @model_validator(mode="after")
    def _metadata_is_its_own(self) -> Self:
        clash = sorted((self.metadata or {}).keys() & type(self).model_fields.keys()) if self.flatten_metadata else []
        if clash:
            raise mistake(
                "This is a key of the recipe. Rename it, or set `flatten_metadata: false`.", f"metadata.{clash[0]}"
            )
        return self

    @model_validator(mode="after")
    def _saves_can_resume(self) -> Self:
        if self.autoresume and self.save_folder is None:
            raise mistake("There is nothing to resume from without `save_folder`.", "autoresume")
        if self.autoresume and self.save_weights_only:
            raise mistake("`save_weights_only` saves nothing to resume from; keep one of the two.", "autoresume")
        if self.autoresume and self.save_overwrite:
            raise mistake("`save_overwrite` starts anew; keep one of the two.", "autoresume")
        return self
