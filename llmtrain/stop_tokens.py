"""Tokens that end an answer: end of text, and what a chat template closes an assistant's turn with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER = "llmtrain-answer-0a1b2c3d"


def stop_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The ids after which generation stops, in increasing order: EOS, and the template's end-of-turn token.

    The end of turn is the special token that directly follows an assistant's text in the rendering of a conversation
    (white space between them aside). A template that closes a turn with plain text leaves EOS alone.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        try:
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}], tokenize=False
                )
            )
        except Exception:  # templates raise what they like; this one takes no such conversation
            return tuple(sorted(found))
        after = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = tokenizer.encode(after, add_special_tokens=False)
        if ids and ids[0] in special:
            found.add(int(ids[0]))
    return tuple(sorted(found))
