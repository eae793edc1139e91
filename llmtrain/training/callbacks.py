"""Callbacks by the names that llm-foundry gives them. The configs are light; composer is imported when built."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from llmtrain.checkpoint.best import lower_is_better
from llmtrain.config.base import Config
from llmtrain.config.durations import BatchesOrEpochs, Interval
from llmtrain.config.named_blocks import NamedBlocks
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from composer import Callback
    from transformers import PreTrainedTokenizerFast

TimeUnit = Literal["seconds", "minutes", "hours", "days"]


class SpeedMonitorConfig(Config):
    """Samples, tokens and FLOPs per second, and MFU where the device's peak is known."""

    window_size: PositiveInt = 100
    """Batches that the rates are averaged over."""
    gpu_flops_available: float | None = Field(default=None, gt=0)
    """Peak FLOP/s of one device, for MFU; Composer knows A10, A100, H100, H200, V100 and T4."""
    time_unit: TimeUnit = "hours"
    """Unit of the wall-clock metrics."""


class LRMonitorConfig(Config):
    """Learning rate at each step."""


class MemoryMonitorConfig(Config):
    """Allocator statistics of the GPU; does nothing on CPU."""

    memory_keys: dict[str, str] | None = None
    """Keys of `torch.cuda.memory_stats` -> name in the log; a selection when left out."""
    dist_aggregate_batch_interval: PositiveInt | None = None
    """Also log minimum, mean and maximum over ranks, every so many batches."""


class RuntimeEstimatorConfig(Config):
    """Time left."""

    skip_batches: NonNegativeInt = 1
    """Batches at the start that do not count."""
    time_unit: TimeUnit = "hours"
    """Unit of the estimate."""


class OptimizerMonitorConfig(Config):
    """L2 norms of gradients, weights, moments and updates."""

    log_optimizer_metrics: bool = True
    """Also log each layer, not only the global gradient norm."""
    batch_log_interval: PositiveInt = 10
    """Every so many batches."""


class NaNMonitorConfig(Config):
    """Stops the run when the loss is not a number. The recipe's `bad_steps`, which is always on, tells more."""


class EarlyStopperConfig(Config):
    """Stops the run when an evaluation metric no longer improves."""

    monitor: str
    """Name of the metric: `LanguageCrossEntropy`, `LanguagePerplexity`, `TokenAccuracy`, or a task's."""
    dataloader_label: str
    """The evaluator that computes it: `eval`, `eval/LABEL` when there are several, or a task's `LABEL/N-shot`."""
    comp: Literal["less", "lt", "greater", "gt"] | None = None
    """What is better; when left out, less for losses, errors and perplexities, greater for the rest."""
    min_delta: NonNegativeFloat = 0.0
    """Changes up to this size are no improvement."""
    patience: BatchesOrEpochs = "1ep"
    """How long to wait for an improvement."""

    @field_validator("dataloader_label")
    @classmethod
    def _not_the_training_loss(cls, value: str) -> str:
        if value == "train":
            raise ValueError(
                "Early stopping compares metrics, and the training loop computes only the loss. Use an evaluator's "
                "label: `eval`, or `eval/LABEL`."
            )
        return value


class SystemMetricsMonitorConfig(Config):
    """CPU, memory, disk and GPU use of each node."""

    log_all_data: bool = False
    """Log each device, not only minimum, mean and maximum."""


class MemorySnapshotConfig(Config):
    """Records GPU allocations for a few batches, for PyTorch's memory visualiser; does nothing on CPU."""

    skip_batches: NonNegativeInt = 1
    """Batches before the recording."""
    interval: BatchesOrEpochs = "3ba"
    """Length of the recording."""
    max_entries: PositiveInt = 100_000
    """Most events that are recorded."""
    folder: str = "{run_name}/torch_traces"
    """Where the files go."""
    filename: str = "rank{rank}.{batch}.memory_snapshot"
    """Their names."""
    remote_file_name: str | None = "{run_name}/torch_memory_traces"
    """Where loggers that take files put them; null does not upload."""
    overwrite: bool = False
    """Write into a folder that is not empty."""


class OOMObserverConfig(Config):
    """Writes a memory snapshot when a GPU runs out of memory; does nothing on CPU."""

    max_entries: PositiveInt = 100_000
    """Most events that are recorded."""
    folder: str = "{run_name}/torch_traces"
    """Where the files go."""
    filename: str = "rank{rank}_oom"
    """Their names."""
    remote_file_name: str | None = "{run_name}/oom_traces/rank{rank}_oom"
    """Where loggers that take files put them; null does not upload."""
    overwrite: bool = False
    """Write into a folder that is not empty."""


class ScheduledGCConfig(Config):
    """Collects Python's garbage on all ranks at the same step, instead of whenever each one happens to."""

    batch_interval: PositiveInt = 1000
    """Every so many batches, all generations."""
    gen_1_batch_interval: PositiveInt | None = None
    """Every so many batches, the young generations."""
    eval_keep_disabled: bool = False
    """No automatic collection during evaluation, either."""


class PromptMessage(Config):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""
    content: str
    """What is said."""


class PromptText(Config):
    """Text to continue as it stands, without a chat template."""

    text: str
    """The text."""


class GenerateConfig(Config):
    """Samples from fixed prompts, to the console, `samples.jsonl` and the loggers' tables."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "max_length": "Use `max_new_tokens`, which does not count the prompt.",
        "num_beams": "Beam search is not supported. Remove it.",
    }

    prompts: tuple[str | PromptText | tuple[PromptMessage, ...], ...] = Field(min_length=1)
    """What to continue or answer. A text is a user's turn where the run is fine-tuned on conversations, and text to
    continue elsewhere; `{text: ...}` is always text to continue, and a list of `{role: user, content: ...}` always a
    conversation."""
    interval: Interval | None = None
    """How often; after each evaluation when left out."""
    batch_size: PositiveInt | None = None
    """Prompts that run together; all of them when left out."""
    max_new_tokens: PositiveInt = 64
    """Longest sample."""
    do_sample: bool | None = None
    """Draw tokens instead of taking the most probable one; when left out, if `temperature`, `top_k` or `top_p` is
    given."""
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of sampling, 1 when left out; 0 is greedy."""
    top_k: NonNegativeInt | None = None
    """Keep the k most probable tokens; all when left out, or 0."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the most probable tokens that add up to this (nucleus sampling); all when left out."""
    seed: int = 0
    """The same seed and weights give the same samples."""
    use_cache: bool = True
    """Accepted for old recipes; means nothing."""

    @model_validator(mode="after")
    def _greedy_has_no_temperature(self) -> Self:
        if self.do_sample is False and any(x is not None for x in (self.temperature, self.top_k, self.top_p)):
            raise ValueError("do_sample: false takes no temperature, top_k or top_p. Remove them, or do_sample.")
        return self

    @field_validator("prompts")
    @classmethod
    def _conversations_have_turns(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if () in value:
            raise ValueError("A conversation needs at least one turn.")
        return value


class LossByPositionConfig(Config):
    """Loss as a function of position, in each evaluation: `loss_by_position.png` and `.json`, and the loggers."""

    curves: PositiveInt = 4
    """Evaluations in the picture: the first one and the latest. The JSON file has all of them."""


class HFCheckpointerConfig(Config):
    """Exports while training goes on, and at its end: what `llmtrain export` writes, proven like it.

    The training waits for the copy out of the device only. An export that fails does not stop it, but the run then
    exits with 1 at its end.
    """

    ADVICE: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("mlflow_registered_model_name", "mlflow_logging_config", "final_register_only", "register_wait_seconds"),
        "MLflow's registry is not used. Register the exported folder with `mlflow.transformers`, or set `push`.",
    )

    save_folder: str
    """Exports go to `huggingface/NAME` in it; `{run_name}` is filled in. A URL (s3, gs, azure, sftp) is pushed to; of
    `hf://USER/REPOSITORY`, the repository holds the newest export."""
    save_interval: Interval
    """How often; a plain number counts epochs. The end of the run is always exported."""
    huggingface_folder_name: str = "ba{batch}"
    """Name of an export. Placeholders: `{batch}`, `{epoch}`, `{token}`, `{run_name}`, ..."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the weights."""
    overwrite: bool = True
    """Replace exports of an earlier run that have the same name. (A resumed run leaves its own as they are.)"""
    with_code: bool = False
    """Put one Python file of ours beside the weights where no class of transformers computes the model; such an export
    opens with `trust_remote_code=True` only. (llmtrain's own.)"""
    push: str | None = None
    """A folder or URL that each export is copied to as well, as `PUSH/NAME`; `hf://USER/REPOSITORY` as above.
    (llmtrain's own.)"""
    flatten_imports: tuple[str, ...] = ("llmfoundry",)
    """Accepted for old recipes; means nothing."""


class EvalOutputLoggingConfig(Config):
    """What the model makes of the first questions of each task: `eval_outputs.jsonl`, and the loggers' tables."""

    n_rows: PositiveInt = 3
    """Questions of each task. (llm-foundry logs all of them.)"""
    log_tokens: bool = False
    """Accepted for old recipes; texts are logged."""
    log_output_text: bool | None = None
    """Accepted for old recipes; texts are logged."""


class CallbacksConfig(NamedBlocks):
    """Callbacks by name."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "mono_checkpoint_saver": "Not needed: `llmtrain export` reads sharded checkpoints. Remove it.",
        "eval_gauntlet": "It is a key of the recipe's top level: `eval_gauntlet`, beside `icl_tasks`.",
        "load_checkpoint": "Use the top-level key `load_path`, with `load_weights_only: true` for weights alone.",
        "async_eval": "Existed only on the MosaicML platform. Remove it.",
        "checkpoint_saver": "Checkpoints are asked for by the top-level `save_folder` and `save_interval`.",
    }

    speed_monitor: SpeedMonitorConfig | None = None
    """Rates and MFU."""
    lr_monitor: LRMonitorConfig | None = None
    """Learning rate."""
    memory_monitor: MemoryMonitorConfig | None = None
    """GPU memory."""
    runtime_estimator: RuntimeEstimatorConfig | None = None
    """Time left."""
    optimizer_monitor: OptimizerMonitorConfig | None = None
    """Norms of gradients, weights and updates."""
    nan_monitor: NaNMonitorConfig | None = None
    """Stop on NaN."""
    early_stopper: EarlyStopperConfig | None = None
    """Stop when nothing improves."""
    system_metrics_monitor: SystemMetricsMonitorConfig | None = None
    """Use of the machine."""
    memory_snapshot: MemorySnapshotConfig | None = None
    """Recording of GPU allocations."""
    oom_observer: OOMObserverConfig | None = None
    """Snapshot when memory runs out."""
    scheduled_gc: ScheduledGCConfig | None = None
    """Garbage collection in step."""
    generate_callback: GenerateConfig | None = None
    """Samples from fixed prompts."""
    loss_by_position: LossByPositionConfig | None = None
    """Loss by position in the window."""
    eval_output_logging: EvalOutputLoggingConfig | None = None
    """Questions and answers of tasks."""
    hf_checkpointer: HFCheckpointerConfig | None = None
    """Exports during the run."""


def callback_classes() -> "dict[str, type[Callback]]":
    """The class behind each name."""
    from composer import callbacks

    from llmtrain.training.generate_callback import GenerateCallback
    from llmtrain.training.hf_checkpointer import HuggingFaceCheckpointer
    from llmtrain.training.icl_callback import EvalOutputLogging
    from llmtrain.training.loss_by_position import LossByPositionCallback
    from llmtrain.training.optimizer_monitor import OptimizerMonitor
    from llmtrain.training.scheduled_gc import ScheduledGC

    return {
        "speed_monitor": callbacks.SpeedMonitor,
        "lr_monitor": callbacks.LRMonitor,
        "memory_monitor": callbacks.MemoryMonitor,
        "runtime_estimator": callbacks.RuntimeEstimator,
        "optimizer_monitor": OptimizerMonitor,
        "nan_monitor": callbacks.NaNMonitor,
        "early_stopper": callbacks.EarlyStopper,
        "system_metrics_monitor": callbacks.SystemMetricsMonitor,
        "memory_snapshot": callbacks.MemorySnapshot,
        "oom_observer": callbacks.OOMObserver,
        "scheduled_gc": ScheduledGC,
        "generate_callback": GenerateCallback,
        "loss_by_position": LossByPositionCallback,
        "eval_output_logging": EvalOutputLogging,
        "hf_checkpointer": HuggingFaceCheckpointer,
    }


def build_callbacks(
    cfg: CallbacksConfig | None,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    folder: Path | None = None,
    *,
    conversations: bool = False,
) -> "list[Callback]":
    """The callbacks that are switched on.

    Args:
        cfg: Their settings.
        tokenizer: The run's, for samples.
        folder: The run's, for their file.
        conversations: The run is fine-tuned on conversations.

    Raises:
        UserError: One needs a package that is not installed.
    """
    if cfg is None:
        return []
    classes = callback_classes()
    built: list[Any] = []
    for name, settings in cfg.switched_on():
        arguments: dict[str, Any] = settings.model_dump()
        if name == "early_stopper" and arguments["comp"] is None:
            # Composer goes by "loss", "error", "perplexity" in the name: to it a larger LanguageCrossEntropy is better.
            arguments["comp"] = "less" if lower_is_better(arguments["monitor"]) else "greater"
        try:
            built.append(classes[name](**arguments))
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or "a package that is not installed"
            raise UserError(f"callbacks.{name} needs {missing}. Install it, or remove the callback.") from error
        if name == "generate_callback" and tokenizer is not None and folder is not None:
            built[-1].attach(tokenizer, folder, conversations)
        elif name == "loss_by_position" and folder is not None:
            built[-1].attach(folder)
    return built
