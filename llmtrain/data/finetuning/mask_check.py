"""Does the mask train what the assistant says, and nothing else? Asked of a run's first examples, before it starts."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtrain.conversations.messages import BadExample, Chat, Example
from llmtrain.data.finetuning.layout import Layout, Response
from llmtrain.data.finetuning.tokenize import ExampleTokenizer
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHATS = 50
"""Conversations that are looked at."""
_NO_LIMIT = 1 << 40


def check_template(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example]) -> list[str]:
    """Hold the rendering of the first conversations and the mask against each other.

    Args:
        tokenizer: With the chat template that the run uses.
        examples: The first ones of the data; those that are no conversations are passed over.

    Returns:
        What is worth knowing though it is no fault, a sentence each; every one once.

    Raises:
        UserError: the template trains a role marker or what others say, puts a turn in another's place, loses or
            changes what the assistant says, trains nothing, refuses every conversation; or it is rendered here in
            another way than by transformers.
    """
    chats = [example for example in examples if isinstance(example, Chat)][:_CHATS]
    if not chats:
        return []
    tokenize = ExampleTokenizer(tokenizer, max_seq_len=_NO_LIMIT, target_responses="all")
    warnings: dict[str, str] = {}
    refusals, unfit = [], []
    for number, chat in enumerate(chats, 1):
        if tokenize.renderer is not None:
            try:
                layout, contents = tokenize.renderer(chat)
            except BadExample as problem:
                if problem.reason != "refused by the chat template":
                    unfit.append(f"the chat template does not fit conversation {number}: {problem}")
                else:
                    refusals.append(problem)
                continue
            _check_rendering(tokenizer, tokenize, chat, number)
            _check_order(layout, chat)
            for response in layout.responses:
                _check_marker(response, tokenize)
                _check_place(response)
            if not any(response.trained for response in layout.responses):
                raise UserError(
                    "the chat template has generation blocks and no answer stands in one: nothing would be trained. "
                    "Put {% generation %} and {% endgeneration %} around what the assistant says"
                )
            for kind, remark in _remarks(layout, chat, tokenize):
                warnings.setdefault(kind, remark)
        (found,) = tokenize([chat])
        if isinstance(found, BadExample):
            unfit.append(f"conversation {number} cannot be tokenised: {found}")
            continue
        _check_ids(tokenizer, tokenize, layout, contents, found.ids[found.trained], number)
    if 2 * len(unfit) > len(chats) - len(refusals):  # few may be the fault of the data: such rows are dropped
        raise UserError(unfit[0])
    if len(refusals) == len(chats):
        raise UserError(f"the chat template refuses each of the first {len(chats)} conversations: {refusals[0].detail}")
    looked_at = f"of the first {len(chats)} conversations"
    if unfit:
        warnings["unfit"] = f"{len(unfit)} {looked_at} are dropped: {unfit[0]}"
    if refusals:
        warnings["refused"] = f"the chat template refuses {len(refusals)} {looked_at}: {refusals[0].detail}"
    count = tokenize.counts["special token text in a content"]
    if count and tokenize.encoder.separable:
        warnings["special"] = f"{count} {looked_at} hold the text of a special token: it is tokenised as ordinary text"
    return list(warnings.values())


def _check_rendering(tokenizer: "PreTrainedTokenizerFast", tokenize: ExampleTokenizer, chat: Chat, number: int) -> None:
    assert tokenize.renderer is not None
    ours, _ = tokenize.renderer.template.render(list(chat.messages))
    turns = [{"role": message.role, "content": message.content} for message in chat.messages]
    theirs = tokenizer.apply_chat_template(turns, tokenize=False)
    if ours != theirs:
        at = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"conversation {number} is rendered in another way than by transformers, from character {at} on: "
            f"{ours[at : at + 40]!r} here, {theirs[at : at + 40]!r} there. The chat template uses something that only "
            "transformers gives it; write it without"
        )


def _check_order(layout: Layout, chat: Chat) -> None:
    """The system turn may stand anywhere (some templates put it into the first or last question); the others not."""
    shown = [part for run in layout.runs for part in run.parts if isinstance(part, int)]
    order = [message for message in shown if chat.messages[message].role != "system"]
    if order != sorted(order):
        raise UserError(
            "the chat template shifts the turns: "
            f"it renders messages {', '.join(str(n + 1) for n in order)} in this order"
        )


def _check_marker(response: Response, tokenize: ExampleTokenizer) -> None:
    special = tokenize.encoder.boundary
    marks = set(special.findall(response.marker)) if special else set()
    written = response.lead + response.close
    found = sorted(mark for mark in marks if mark in written)
    if response.marker.strip() and response.marker.strip() in written:
        found.append(response.marker.strip())
    ended = special.search(response.close) if special else None
    behind = response.close[ended.end() :] if ended else ""
    if any(mark in response.before for mark in (special.findall(behind) if special else ())):
        found.append(behind.strip())
    if response.trained and found:
        raise UserError(
            f"the chat template would train the role marker {found[-1]!r}: around an answer these would be trained as "
            f"well: {response.lead!r} before it, {response.close!r} after it. Where it has generation blocks, let them "
            "begin behind the marker and end with the token that closes the turn; where it has none, it must write the "
            "generation prompt only if add_generation_prompt is set"
        )


def _check_place(response: Response) -> None:
    if response.prompt is None:
        return
    before, prompt = "".join(response.before.split()), "".join(response.prompt.split())
    if not before.startswith(prompt) and not prompt.startswith(before):
        raise UserError(
            f"the chat template puts an answer where its generation prompt does not: {response.before!r} stands before "
            f"it, the generation prompt is {response.prompt!r}. The model would be trained in one place and asked in "
            "another"
        )


def _check_end(layout: Layout, tokenize: ExampleTokenizer) -> str | None:
    """A template that always writes its generation prompt has an answer seem to end with a role marker."""
    header = tokenize.encoder.split(layout.responses[-1].before)
    after = tokenize.encoder.split(_after_the_last_answer(layout))
    pieces, ending = ([(text.strip(), special) for text, special in part if text.strip()] for part in (header, after))
    if not pieces or not ending or pieces[-1] != ending[-1] or (len(ending) == 1 and ending[-1][1]):
        return None
    closing = next((text for text, special in ending if special), None)
    opening = layout.runs[0].parts[0]
    if closing is None or (isinstance(opening, str) and closing in opening):  # it opens turns, it does not close them
        raise UserError(
            f"the chat template would train the role marker {ending[-1][0]!r}: it writes the generation prompt at the "
            "end of a conversation whether add_generation_prompt is set or not"
        )
    return "the chat template writes its generation prompt at the end even if add_generation_prompt is not set"


def _after_the_last_answer(layout: Layout) -> str:
    parts = [part for run in layout.runs for part in run.parts]
    last = max(number for number, part in enumerate(parts) if isinstance(part, int))
    return "".join(part for part in parts[last + 1 :] if isinstance(part, str))


def _remarks(layout: Layout, chat: Chat, tokenize: ExampleTokenizer) -> Iterator[tuple[str, str]]:
    """Pairs of the kind of remark, of which one is enough, and the remark."""
    shown = {part for run in layout.runs for part in run.parts if isinstance(part, int)}
    for number, message in enumerate(chat.messages):
        if number not in shown:
            yield "left out", f"the chat template leaves out, repeats or rewrites what the {message.role} says"
    for response in layout.responses:
        prompt, before = response.prompt, response.before
        if not response.trained:
            yield "outside", "some answers stand outside the chat template's generation blocks: they are not trained"
        elif prompt is None:
            yield "no prompt", "the chat template makes no generation prompt of the turns before an answer"
        elif len(prompt) > len(before):
            rest = prompt[len(before) :]
            yield "longer", f"the generation prompt ends with {rest!r}, which does not stand before the trained answers"
        elif response.lead.strip():
            yield "lead", f"after the generation prompt the chat template writes {response.lead!r}: it is trained"
        elif not response.marker and before[len(prompt) :].strip():
            yield (
                "no marker",
                f"the chat template has no generation prompt: {before[len(prompt) :]!r} stands before an answer in "
                "training, and whoever generates has to write it",
            )
    special = tokenize.encoder.boundary
    if not layout.closed:
        yield "open", "no special token closes the chat template's answers: the last one gets the end-of-text token"
    elif not all(special and special.search(response.close) for response in layout.responses):
        yield (
            "no end",
            "some answers are trained without their end: the token that closes them varies, or stands outside",
        )
    if end := _check_end(layout, tokenize):
        yield "end", end


def _check_ids(
    tokenizer: "PreTrainedTokenizerFast",
    tokenize: ExampleTokenizer,
    layout: Layout,
    contents: Sequence[str],
    trained: np.ndarray,
    number: int,
) -> None:
    """The trained tokens spell the responses; where a tokenizer gives back what it was given."""
    normalizer = (tokenize.encoder.pipeline["normalizer"] or {"type": "NFC"})["type"]
    if not tokenize.encoder.separable or normalizer != "NFC":
        return
    wanted = "".join(
        part if isinstance(part, str) else contents[part] for run in layout.runs if run.turn >= 0 for part in run.parts
    )
    if not layout.closed and layout.responses[-1].trained:
        wanted += tokenizer.eos_token
    got = tokenizer.decode(trained.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if unicodedata.normalize("NFC", wanted) != got and wanted != got:
        raise UserError(
            f"conversation {number}: the trained tokens do not spell what the assistant says: {got[:80]!r}..., "
            f"not {wanted[:80]!r}..."
        )
