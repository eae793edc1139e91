"""MPT as Composer sees it."""

from typing import Any

from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import flops_per_token
from llmtrain.model.mpt import MPT, MPTOutput
from llmtrain.training.metrics import LanguageCrossEntropy, LanguagePerplexity, TokenAccuracy

Batch = dict[str, Tensor]


class LanguageModel(ComposerModel):  # type: ignore[misc]
    """Wraps an MPT; the weights are saved as `state.model.model.*`, the names of llm-foundry's checkpoints.

    The loss is computed inside `forward`: the head's weight is tied to the embedding, which FSDP gathers only while the
    root module's forward runs, and the chunked loss must not return logits.
    """

    def __init__(self, model: MPT, config: MPTConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: Batch) -> MPTOutput:
        """A batch of `input_ids`, `labels` (B, T) and optional masks becomes the loss and its sums."""
        inputs = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "sequence_id") if k in batch}
        output: MPTOutput = self.model(**inputs)
        return output

    def loss(self, outputs: MPTOutput, batch: Batch) -> Tensor:
        assert outputs.loss is not None
        return outputs.loss

    def eval_forward(self, batch: Batch, outputs: MPTOutput | None = None) -> MPTOutput:
        return outputs if outputs is not None else self.forward(batch)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        if is_train:  # the training loss is logged by the trainer; metrics would cost a second forward
            return {}
        metrics = (LanguageCrossEntropy(), LanguagePerplexity(), TokenAccuracy())
        return {type(metric).__name__: metric for metric in metrics}

    def update_metric(self, batch: Any, outputs: MPTOutput, metric: Metric) -> None:
        metric.update(outputs)

    def flops_per_batch(self, batch: Batch) -> float:
        """Training FLOPs of one batch (read by Composer's SpeedMonitor for FLOP/s and MFU)."""
        n_samples, seq_len = batch["input_ids"].shape
        return n_samples * seq_len * flops_per_token(self.config, seq_len)


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
