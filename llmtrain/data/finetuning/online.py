"""`streaming: true`: examples of MDS shards are tokenized and packed while training reads them.

Nothing is tokenized before the first step and no store is written. The rows of an epoch are cut into windows, each read
by one rank; what a window leaves over waits for that rank's next one, and is part of the checkpoint. Ranks need not be
equally fast with their windows: one that has no row left at the end of an epoch gives blank ones.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llmtrain.conversations.messages import BadExample, Example
from llmtrain.conversations.rows import Row
from llmtrain.data.finetuning.collate import TokensAndMask
from llmtrain.data.finetuning.config import FinetuningDatasetConfig
from llmtrain.data.finetuning.epoch import deal, examples_an_epoch, random_of
from llmtrain.data.finetuning.local_ranks import Place, gather
from llmtrain.data.finetuning.packing import OnlinePacker
from llmtrain.data.finetuning.sources import Source
from llmtrain.data.finetuning.tokenize_many import Tokenizes
from llmtrain.errors import UserError

log = logging.getLogger(__name__)

_SHARDS_MIXED = 16
"""Shards whose rows are shuffled among each other."""

Found = tuple[int, TokensAndMask | BadExample]
"""The number of an example in all sources, and what became of it."""


class StreamedExamples(Dataset[list[Found]]):
    """The windows of one rank, epoch by epoch, and where a checkpoint stands among them.

    Args:
        sources: of MDS shards.
        tokenize: makes ids and masks of examples.
        data: the dataset's block of the recipe.
        where: which rank this is.
        vocab_size: ids of the model.
        same_epoch: give epoch 0 each time (evaluation).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenize: Tokenizes,
        data: FinetuningDatasetConfig,
        where: Place,
        *,
        vocab_size: int,
        same_epoch: bool = False,
    ) -> None:
        self.sources = list(sources)
        self.vocab_size = vocab_size
        self.tokenize = tokenize
        self.where = where
        self.same_epoch = same_epoch
        self.strict = data.strict
        self.shuffle = data.shuffle
        self.seed = data.shuffle_seed
        self.window = data.packing_window
        self.seq_len = data.max_seq_len
        self.packs = data.packs
        self.sizes = [source.rough_rows() or 0 for source in self.sources]
        self.draws = examples_an_epoch([source.config for source in self.sources], self.sizes, data.epoch_size)
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])
        self._preprocess = [source.preprocess() for source in self.sources]
        self._numbers: tuple[tuple[int, int], NDArray[np.int64]] | None = None
        self.dropped: Counter[str] = Counter()
        self._state = self._start_of(0)
        self._begun = False

    def __len__(self) -> int:
        """Rows of the sources that an epoch reads, on all ranks."""
        return sum(self.draws)

    def numbers(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The examples of a window of an epoch."""
        asked = (0 if self.same_epoch else epoch, self.seed)
        if self._numbers is None or self._numbers[0] != asked:
            self._numbers = asked, self._order(*asked)
        return self._numbers[1][window * self.window : (window + 1) * self.window]

    def __getitem__(self, numbers: NDArray[np.int64]) -> list[Found]:
        """Read and tokenize examples.

        Raises:
            ShardError: a shard cannot be had.
            UserError: `strict: true`, and a row is no use.
        """
        found: list[Found] = []
        for number in numbers.tolist():
            row, example = self.read(number)
            result = example if isinstance(example, BadExample) else self.tokenize([example])[0]
            if not isinstance(result, BadExample):
                if int(result.ids.max()) >= self.vocab_size:
                    raise UserError(
                        f"{row.place}: token id {result.ids.max()} is outside of the model's vocabulary of "
                        f"{self.vocab_size}. Was it tokenized with another tokenizer?"
                    )
                found.append((number, (result.ids, result.trained)))
            elif self.strict:
                raise UserError(f"{row.place}: {result}. Mend or remove the row, or leave out strict: true")
            else:
                log.debug("%s: dropped: %s", row.place, result)
                found.append((number, result))
        return found

    def read(self, number: int) -> tuple[Row, Example | BadExample]:
        """A row by its number in all sources, and its example or what is wrong with it.

        Raises:
            ShardError: its shard cannot be had.
        """
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        shards = self.sources[source].shards
        assert shards is not None
        row = shards.row(number - int(self._first[source]))
        return row, self.sources[source].example(row, self._preprocess[source])

    def example(self, number: int) -> TokensAndMask:
        """An example that was good before, by its number in all sources."""
        ((_, found),) = self[np.array([number])]
        assert not isinstance(found, BadExample)
        return found

    def place(self, number: int) -> str:
        """Where an example comes from: shard and row."""
        return self.read(number)[0].place

    # What follows is the state of this rank: changed by the loader, saved in checkpoints.

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or will be."""
        return int(self._state["epoch"])

    @property
    def todo(self) -> list[int]:
        """The windows that this rank has still to read."""
        windows: list[int] = self._state["todo"]
        return windows

    @property
    def rows(self) -> list[list[int]]:
        """Finished rows that no batch has taken yet."""
        rows: list[list[int]] = self._state["rows"]
        return rows

    @property
    def batches(self) -> int:
        """Batches of the epoch that were taken."""
        return int(self._state["batches"])

    def count_batch(self) -> None:
        """One more was taken."""
        self._state["batches"] += 1

    def upcoming(self) -> tuple[int, list[int], list[list[int]], dict[str, Any] | None]:
        """Where the next iteration begins: epoch, windows, finished rows, state of the packer. Copies."""
        state = copy.deepcopy(self._start_of(self.epoch + 1) if self._begun else self._state)
        return state["epoch"], state["todo"], state["rows"], state["packer"]

    def begin_epoch(self) -> OnlinePacker:
        """Turn to the epoch that comes next, or to what a resume left of one; the packer holds what waits."""
        if self._begun:
            self._state = self._start_of(self.epoch + 1)
        self._begun = True
        self.packer = OnlinePacker(self.seq_len, self.window)
        if self._state["packer"]:
            self.packer.load_state_dict(self._state["packer"])
        return self.packer

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a checkpoint stands, on all ranks (a collective call).

        Args:
            num_samples: rows read in the epoch; 0 between two epochs.
            from_beginning: as Composer says it.
        """
        mine = self._state
        if self._begun and num_samples == 0:
            mine = self._start_of(self.epoch + 1)
        elif self._begun:
            mine = {**mine, "packer": self.packer.state_dict()}
        # As text: a distributed checkpoint takes lists and dicts apart, and loads only what the new run has as well.
        states = gather(mine)
        states = states[:: max(1, len(states) // self.where.ranks)]  # ranks that share sequences have the same one
        return {"shuffle_seed": self.seed, "streaming": True, "ranks": json.dumps(states)}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where a checkpoint stood.

        On as many ranks as it had each goes on exactly; on others, windows and leftovers are dealt out among them.

        Raises:
            UserError: it is the state of another kind of loader.
        """
        if not obj.get("streaming"):
            raise UserError(
                "the checkpoint stands in the data of another kind of loader, where this one cannot go on. To start "
                "from its weights, set load_weights_only=true"
            )
        self.seed = int(obj["shuffle_seed"])
        states = json.loads(obj["ranks"])
        rank, ranks = self.where.rank, self.where.ranks
        self._begun = False
        self._state = states[rank] if len(states) == ranks else self._share(states, rank, ranks)

    def _share(self, states: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
        log.info("the checkpoint is of %d ranks: what was left over is dealt out to %d", len(states), ranks)
        packers = [state["packer"] for state in states if state["packer"]]
        packer = OnlinePacker(self.seq_len, self.window).state_dict()
        for kind in ("pending", "waiting"):
            packer[kind] = [entry for one in packers for entry in one[kind]][rank::ranks]
        return {
            "epoch": states[0]["epoch"],
            "batches": states[0]["batches"],
            "todo": sorted(window for state in states for window in state["todo"])[rank::ranks],
            "rows": [row for state in states for row in state["rows"]][rank::ranks],
            "packer": packer,
        }

    def _start_of(self, epoch: int) -> dict[str, Any]:
        windows = range(-(-sum(self.draws) // self.window))
        todo = list(windows[self.where.rank :: self.where.ranks])
        return {"epoch": epoch, "batches": 0, "todo": todo, "rows": [], "packer": None}

    def _order(self, epoch: int, seed: int) -> NDArray[np.int64]:
        """The examples of an epoch: shards in a random order, their rows shuffled; sources mixed evenly."""
        parts, keys = [], []
        for source, (size, draw) in enumerate(zip(self.sizes, self.draws, strict=True)):
            dealt = deal(size, draw, epoch, (seed, source), False)
            shards = self.sources[source].shards
            if self.shuffle and shards is not None:
                # Shards change places, and rows only within a few shards: not every shard is needed at once.
                limits = np.concatenate([[0], np.cumsum(shards.sizes)])
                shard = np.searchsorted(limits, dealt, side="right") - 1
                deck = (np.arange(len(dealt)) + epoch * draw) // size
                place = random_of(seed, epoch, source, 4).permutation(len(shards.sizes))[shard] // _SHARDS_MIXED
                noise = random_of(seed, epoch, source, 5).random_sample(len(dealt))
                dealt = dealt[np.lexsort((noise, place, deck))]
            parts.append(dealt + int(self._first[source]))
            keys.append((np.arange(draw) + 0.5) / draw)
        return np.concatenate(parts)[np.argsort(np.concatenate(keys), kind="stable")]
