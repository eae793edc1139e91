"""Adapters for the datasets of the published runs: each takes a row in the dataset's own columns and gives a Chat.

An instruction with a context becomes one user turn, the two joined by a line break, as in llm-foundry. What the turns
look like to the model is the chat template's affair: the same data trains Instruct (`dolly`) and Chat (`chatml`).
"""

import re
from collections.abc import Mapping
from typing import Any

from llmtrain.conversations.formats import column, parse, text_of
from llmtrain.conversations.messages import BadExample, Chat, Example, Message
from llmtrain.conversations.preprocessing import register

_DOLLY = re.compile(
    r"\s*Below is an instruction that describes a task\. "
    r"Write a response that appropriately completes the request\.\n+"
    r"### Instruction:[ \t]*\n+(?P<instruction>.*?)\n+### Response:\s*",
    re.DOTALL,
)
_EVOL = (
    "victor123/evol_instruct_70k",  # its first name
    "WizardLMTeam/WizardLM_evol_instruct_70k",
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
)
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@register("dolly_hhrlhf")
def dolly_hhrlhf(row: Mapping[str, Any]) -> Chat:
    """`mosaicml/dolly_hhrlhf`: `prompt`, in the Dolly format up to `### Response:`, and `response`.

    Not the default for that name: without it the two columns are taken as they are, as llm-foundry does.
    """
    prompt = column(row, "prompt")
    found = _DOLLY.fullmatch(prompt)
    if found is None:
        raise BadExample("not in the Dolly format", f"prompt {prompt[:60]!r}: no ### Instruction: ... ### Response:")
    return _answered(found["instruction"], column(row, "response"))


@register("databricks-dolly-15k", default_for=("databricks/databricks-dolly-15k",))
def dolly_15k(row: Mapping[str, Any]) -> Chat:
    """`databricks/databricks-dolly-15k`: `instruction`, `context` (often empty), `response`, `category`."""
    return _answered(_with_context(row, "context"), column(row, "response"))


@register("alpaca", default_for=("yahma/alpaca-cleaned",))
def alpaca(row: Mapping[str, Any]) -> Chat:
    """Stanford Alpaca: `instruction`, `input` (often empty), `output`."""
    return _answered(_with_context(row, "input"), column(row, "output"))


@register("evol-instruct", default_for=_EVOL)
def evol_instruct(row: Mapping[str, Any]) -> Example:
    """Evol-Instruct of WizardLM: `instruction` and `output` (70k), or `conversations` as in ShareGPT (V2)."""
    if row.get("conversations") is not None:
        return sharegpt(row)
    return _answered(column(row, "instruction"), column(row, "output"))


@register("hh-rlhf", default_for=("Anthropic/hh-rlhf",))
def hh_rlhf(row: Mapping[str, Any]) -> Chat:
    r"""`Anthropic/hh-rlhf`: the dialogue in `chosen`, each turn after "\n\nHuman:" or "\n\nAssistant:"."""
    text = column(row, "chosen")
    parts = _HH_TURN.split(text)  # what stands before the first turn, then speaker and words in turn
    if len(parts) == 1 or parts[0].strip():
        raise BadExample("no turns", f"chosen does not begin with 'Human:': {text[:60]!r}")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return Chat(tuple(Message(_HH_ROLES[speaker], words.strip()) for speaker, words in turns))


@register("hc3", default_for=("Hello-SimpleAI/HC3",))
def hc3(row: Mapping[str, Any]) -> Chat:
    """`Hello-SimpleAI/HC3`: `question`, `human_answers`, `chatgpt_answers`; the first answer of ChatGPT is taken."""
    answers = row.get("chatgpt_answers")
    if answers is None or isinstance(answers, str | bytes):
        raise BadExample("missing keys", "chatgpt_answers should be a list of texts")
    texts = [text_of(answer, "chatgpt_answers") for answer in answers]
    answer = next((text for text in texts if text.strip()), None)
    if answer is None:
        raise BadExample("empty turn", "chatgpt_answers holds no answer")
    return _answered(column(row, "question"), answer)


@register("sharegpt", "sharegpt_vicuna", default_for=("jeffwan/sharegpt_vicuna",))
def sharegpt(row: Mapping[str, Any]) -> Example:
    """ShareGPT as cleaned for Vicuna: `conversations` of `from` and `value`.

    Long conversations were cut into parts there, so that one may begin with an answer to what is not in it, and end
    with a question: both are left out.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return parse(row)
    speakers = [str(turn.get("from", "")).lower() if isinstance(turn, Mapping) else "" for turn in turns]
    human = [number for number, speaker in enumerate(speakers) if speaker in {"human", "user", "system"}]
    asked = {"human", "user"}
    end = max((number for number, speaker in enumerate(speakers, 1) if speaker and speaker not in asked), default=0)
    if not human or human[0] >= end:
        return parse(row)  # says what is wrong
    return parse({"conversations": turns[human[0] : end]})


def _with_context(row: Mapping[str, Any], name: str) -> str:
    instruction = column(row, "instruction")
    context = text_of(row[name], name) if row.get(name) is not None else ""
    return f"{instruction}\n{context}" if context.strip() else instruction


def _answered(instruction: str, response: str) -> Chat:
    return Chat((Message("user", instruction), Message("assistant", response)))
