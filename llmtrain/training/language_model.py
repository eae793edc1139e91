"""MPT, or a model of transformers, as Composer sees it."""

from typing import TYPE_CHECKING, Any

from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import flops_per_token
from llmtrain.model.mpt import MPT, MPTOutput
from llmtrain.training.metrics import LanguageCrossEntropy, LanguagePerplexity, TokenAccuracy

if TYPE_CHECKING:
    from llmtrain.training.icl_callback import TaskEvaluation

Batch = dict[str, Tensor]


class LanguageModel(ComposerModel):  # type: ignore[misc]
    """Wraps a model; its weights are saved as `state.model.model.*`, the names of llm-foundry's checkpoints.

    The loss is computed inside `forward`: the head's weight is tied to the embedding, which FSDP gathers only while the
    root module's forward runs, and the chunked loss must not return logits.

    Attributes:
        should_save_peft_only: leave frozen weights out of the state dict. (The name is Composer's: it switches this off
            while rank 0 sends all weights to the other ranks.)
        gives_token_losses: in evaluation, outputs have the loss of each token, too.
        tasks: what evaluates the tasks of the run, where it has some.
    """

    def __init__(self, model: MPT | HFCausalLM, config: MPTConfig | HFConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.should_save_peft_only = isinstance(config, HFConfig) and config.saves_adapters_only
        self.gives_token_losses = False
        self.tasks: TaskEvaluation | None = None

    def forward(self, batch: Batch) -> MPTOutput:
        """A batch of `input_ids`, `labels` (B, T) and optional masks becomes the loss and its sums."""
        inputs = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "sequence_id") if k in batch}
        with_losses = {"token_losses": True} if self.gives_token_losses and not self.training else {}
        output: MPTOutput = self.model(**inputs, **with_losses)
        return output

    def loss(self, outputs: MPTOutput, batch: Batch) -> Tensor:
        assert outputs.loss is not None
        return outputs.loss

    def eval_forward(self, batch: Batch, outputs: MPTOutput | None = None) -> Any:
        """The forward of a batch; of one that names a task, the scores of the whole task (TaskScores)."""
        if self.tasks is not None and "icl_task" in batch:
            return self.tasks.evaluate(self, int(batch["icl_task"]))
        return outputs if outputs is not None else self.forward(batch)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        if is_train:  # the training loss is logged by the trainer; metrics would cost a second forward
            return {}
        metrics = (LanguageCrossEntropy(), LanguagePerplexity(), TokenAccuracy())
        of_tasks = self.tasks.metrics() if self.tasks is not None else {}
        return {type(metric).__name__: metric for metric in metrics} | of_tasks

    def is_task(self, label: str) -> bool:
        """Whether an evaluator puts a task, so that its outputs are scores."""
        return self.tasks is not None and label in self.tasks.labels

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        metric.update(outputs)

    def flops_per_batch(self, batch: Batch) -> float:
        """Training FLOPs of one batch on this rank (Composer's SpeedMonitor adds up ranks, for FLOP/s and MFU)."""
        n_samples, seq_len = batch["input_ids"].shape
        if isinstance(self.model, HFCausalLM):
            return n_samples * seq_len * self.model.flops_per_token(seq_len)
        shared_by = 1 if self.model.ranks is None else self.model.ranks.degree
        return n_samples * seq_len * flops_per_token(self.model.config, seq_len) / shared_by

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All parameters, or without the frozen ones: see `should_save_peft_only`."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.should_save_peft_only:
            for name in self._frozen():
                state.pop(kwargs.get("prefix", "") + name, None)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; frozen weights may be missing where the state dict leaves them out."""
        if not self.should_save_peft_only:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(set(result.missing_keys) - self._frozen())
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing keys {missing[:5]}, unexpected keys {result.unexpected_keys[:5]}")
        return result

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
