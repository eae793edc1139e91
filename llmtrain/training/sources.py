"""What a run takes from each source of a mixture, and the loss of each."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from composer import Callback, Evaluator, Logger, State
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor

from llmtrain.evaluation.by_source import LossBySource
from llmtrain.training.agreement import exchange
from llmtrain.training.language_model import LanguageModel

INTERVAL = 10
"""Steps between two lines of shares."""


def source_callbacks(train: DataSpec, evaluators: Sequence[Evaluator]) -> list[Callback]:
    """What watches the sources of a run; nothing where there is no mixture.

    Args:
        train: the training data.
        evaluators: the evaluation data.
    """
    callbacks: list[Callback] = []
    if len(names_of(train.dataloader)) > 1:
        callbacks.append(SourceShares(train))
    if any(len(names_of(evaluator.dataloader.dataloader)) > 1 for evaluator in evaluators):
        callbacks.append(SourceLosses())
    return callbacks


def names_of(loader: Any) -> tuple[str, ...]:
    """The names of a loader's sources; () where it has no mixture."""
    return getattr(getattr(loader, "dataset", None), "source_names", ())


class SourceShares(Callback):  # type: ignore[misc]
    """Counts the samples and tokens of each source that all ranks have trained on; a resumed run goes on counting.

    Logs, every ten steps and at the end, of the steps so far:
    `data/SOURCE/share` of the samples, `data/SOURCE/token_share` of the tokens, `data/SOURCE/wanted_share` (what the
    recipe asks for) and `data/SOURCE/epochs` (samples, repeated ones too, over rows that the source has).

    Args:
        train: the training data, a mixture.
    """

    def __init__(self, train: DataSpec) -> None:
        self.train = train
        dataset: Any = train.dataloader.dataset
        self.names: tuple[str, ...] = dataset.source_names
        chosen = [int(stream.choose) for stream in dataset.streams]
        self.wanted = [n / sum(chosen) for n in chosen]
        self.rows = [int(n) for n in dataset.samples_per_stream]
        self.shared_by: int = dataset.replication or 1  # ranks that get the same samples
        self._seen = torch.zeros(2, len(self.names), dtype=torch.int64)  # samples, tokens
        self._logged = 0  # step

    def batch_end(self, state: State, logger: Logger) -> None:
        """Adds the batch of all ranks; nothing waits for the sum until it is shown."""
        counts = state.device.tensor_to_device(self._count(state.batch))
        exchange(counts, "SUM", wait=False)
        self._seen = self._seen.to(counts.device) + counts // self.shared_by
        step = int(state.timestamp.batch)
        if step == 1 or step % INTERVAL == 0:
            self._log(step, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last batch of a length in epochs cannot be told when it ends."""
        if self._logged != (step := int(state.timestamp.batch)):
            self._log(step, logger)

    def _log(self, step: int, logger: Logger) -> None:
        self._logged = step
        logger.log_metrics(self.metrics())

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        samples, tokens = self._seen.tolist()
        found = {}
        for i, name in enumerate(self.names):
            found[f"data/{name}/share"] = samples[i] / max(1, sum(samples))
            found[f"data/{name}/token_share"] = tokens[i] / max(1, sum(tokens))
            found[f"data/{name}/wanted_share"] = self.wanted[i]
            found[f"data/{name}/epochs"] = samples[i] / self.rows[i]
        return found

    def state_dict(self) -> dict[str, Any]:
        """One text: checkpoints are loaded key by key, and a run may go on with other sources."""
        return {"seen": json.dumps(dict(zip(self.names, self._seen.T.tolist(), strict=True)))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = json.loads(state["seen"])
        self._seen = torch.tensor([before.get(name, [0, 0]) for name in self.names], dtype=torch.int64).T

    def _count(self, batch: dict[str, Tensor]) -> Tensor:
        """Samples and tokens of a batch by source, (2, sources)."""
        source = batch["stream_id"]
        mask = batch.get("attention_mask")
        tokens = torch.full_like(source, batch["input_ids"].shape[1]) if mask is None else mask.sum(1).to(source)
        # Where the length grows, a row of the loader may be several rows of the batch.
        rows_of_a_sample = len(source) // max(1, int(self.train.get_num_samples_in_batch(batch)))
        counts = torch.zeros(2, len(self.names), dtype=torch.int64)
        counts[0].index_add_(0, source, torch.ones_like(source))
        counts[1].index_add_(0, source, tokens)
        counts[0] //= rows_of_a_sample
        return counts


class SourceLosses(Callback):  # type: ignore[misc]
    """The loss of each source in an evaluation on a mixture, from the evaluation's own forward.

    Logs `metrics/EVALUATOR/SOURCE/LanguageCrossEntropy` beside `metrics/EVALUATOR/LanguageCrossEntropy`, which is the
    mean over the targets of all of them.
    """

    def __init__(self) -> None:
        self._losses: LossBySource | None = None

    def eval_start(self, state: State, logger: Logger) -> None:
        names = names_of(state.dataloader)
        self._losses = LossBySource(names, state.device._device) if len(names) > 1 else None
        if self._losses is not None:
            _language_model(state).gives_token_losses = True

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self._losses is None:
            return
        sharing = getattr(_language_model(state).model, "ranks", None)
        if sharing is not None and sharing.rank != 0:
            return  # each of the ranks that share sequences has the losses of all their tokens
        assert state.outputs.token_losses is not None
        self._losses.add(state.outputs.token_losses, state.batch["labels"], state.batch["stream_id"])

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._losses is None:
            return
        _language_model(state).gives_token_losses = False
        losses, self._losses = self._losses, None
        dist.all_reduce(losses.sums, reduce_operation="SUM")
        label = str(state.dataloader_label)
        found = losses.results().items()
        logger.log_metrics({f"metrics/{label}/{name}/LanguageCrossEntropy": each.loss for name, each in found})


def _language_model(state: State) -> LanguageModel:
    model: LanguageModel = state.model.module if state.is_model_ddp else state.model
    return model
