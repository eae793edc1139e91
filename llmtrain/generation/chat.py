"""The engine of a conversation: turns in, answers out piece by piece, with the KV cache kept between turns."""

from collections.abc import Generator
from typing import TYPE_CHECKING

from torch import nn

from llmtrain.errors import UserError
from llmtrain.generation.conversation import Conversation, TextStream
from llmtrain.generation.decoder import Decoder, decoder_for
from llmtrain.generation.generate import Row, steps
from llmtrain.generation.sampling import Sampling
from llmtrain.model.mpt import MPT
from llmtrain.stop_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Chat:
    """A conversation with a model.

    Attributes:
        conversation: what was said.
        reused: how many tokens of the last turn's prompt were in the cache already.
        context: tokens that the model was trained on at once, or None; a model with ALiBi goes on beyond them.
        used: tokens of the conversation so far.
        cut_off: whether the last answer ended for lack of room (`max_new_tokens`, positions) or by interruption.

    Args:
        model: in evaluation mode.
        tokenizer: with a chat template.
        system: the system prompt; None leaves it to the template.
        max_new_tokens: longest answer.
        sampling: how tokens are drawn.
        seed: the same seed and the same turns give the same answers.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        self.conversation = Conversation(tokenizer, system)
        self._decoder: Decoder = decoder_for(model)
        self.context = model.config.max_seq_len if isinstance(model, MPT) else self._decoder.positions
        self.reused = self.used = 0
        self.cut_off = False
        self._cached: list[int] = []
        self._tokenizer = tokenizer
        self._stops = stop_ids(tokenizer)
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling or Sampling()
        self._seed = seed

    def reset(self) -> None:
        """Forgets what was said; the system prompt stays."""
        self.conversation.reset()
        self.used = 0

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to a turn of the user, in pieces that are shown as they come.

        Closing the iterator early keeps what was said so far as the answer.

        Raises:
            UserError: at the first piece: the conversation is too long for the model's positions, or the template
                refuses it. The turn is not part of the conversation then.
        """
        prompt = self.conversation.ask(text)
        room = self._room(len(prompt))
        # The last token's logits are needed in any case.
        self.reused = self._decoder.rewind(_common(self._cached, prompt[:-1]))
        # What the cache holds if this is interrupted in mid-step is not known further than this.
        self._cached = prompt[: self.reused]
        stream, said = TextStream(self._tokenizer), list[int]()
        turn = len(self.conversation.messages)
        try:
            for ((_, token),) in steps(
                self._decoder,
                [Row(prompt, room, self._sampling, turn)],
                eos_ids=self._stops,
                seed=self._seed,
            ):
                self._cached = prompt + said  # all but the newest token
                said.append(token)
                if token not in self._stops and (piece := stream.push(token)):
                    yield piece
            if piece := stream.flush():
                yield piece
        finally:
            self.cut_off = not said or said[-1] not in self._stops
            if said:
                self.conversation.answer(said, self._stops)
                self.used = len(prompt) + len(said)

    def _room(self, prompt: int) -> int:
        """Tokens that an answer may have."""
        positions = self._decoder.positions
        if positions is None:
            return self._max_new_tokens
        room = positions - prompt + 1  # the last token is never fed back
        if room < 1:
            raise UserError(
                f"The conversation has {prompt:,} tokens with this turn, and the model takes at most "
                f"{positions:,}: it has no positions beyond (max_seq_len). Start over with /reset, or say less."
            )
        return min(room, self._max_new_tokens)


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
