"""The functions that llm-foundry registers, under its names and with its results: its recipes train the same text.

They give plain prompts and responses, and no chat template is applied. (`adapters.py` has Chats of the same sources.)
"""

from collections.abc import Mapping
from typing import Any

from llmtrain.conversations.formats import column, parse
from llmtrain.conversations.messages import BadExample, Example, PromptResponse
from llmtrain.conversations.preprocessing import register

_DOLLY_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_BLANKS = (" ", "\n", "\t")


@register("tatsu-lab/alpaca", default_for=("tatsu-lab/alpaca",))
def alpaca_text(row: Mapping[str, Any]) -> PromptResponse:
    """`text`, cut behind its `### Response:`."""
    parts = column(row, "text").split("### Response:")
    if len(parts) != 2:
        raise BadExample("preprocessing failed", f"text holds '### Response:' {len(parts) - 1} times, not once")
    return PromptResponse(parts[0] + "### Response:", parts[1])


@register("HuggingFaceH4/databricks_dolly_15k", default_for=("HuggingFaceH4/databricks_dolly_15k",))
def dolly_text(row: Mapping[str, Any]) -> PromptResponse:
    """`instruction`, `input`, `output` in the Dolly format with empty lines."""
    instruction, extra = column(row, "instruction"), column(row, "input")
    asked = f"{instruction}\n{extra}" if extra else instruction
    return PromptResponse(_DOLLY_PROMPT.format(instruction=asked), column(row, "output"))


@register("bigscience/P3", default_for=("bigscience/P3",))
def p3(row: Mapping[str, Any]) -> PromptResponse:
    """`inputs` with a colon behind, and `targets`."""
    return PromptResponse(column(row, "inputs") + ":", column(row, "targets"))


@register("Muennighoff/P3", "Muennighoff/flan", default_for=("Muennighoff/P3", "Muennighoff/flan"))
def flan(row: Mapping[str, Any]) -> PromptResponse:
    """`inputs` and `targets`, with a blank between them when there is none."""
    prompt, response = column(row, "inputs"), column(row, "targets")
    separated = prompt.endswith(_BLANKS) or response.startswith(_BLANKS)
    return PromptResponse(prompt, response if separated else " " + response)


@register("teknium/OpenHermes-2.5", default_for=("teknium/OpenHermes-2.5",))
def openhermes(row: Mapping[str, Any]) -> Example:
    """`conversations` as in ShareGPT, exactly as they are."""
    return parse(row)


@register("math-ai/StackMathQA", default_for=("math-ai/StackMathQA",))
def stack_math_qa(row: Mapping[str, Any]) -> PromptResponse:
    """`Q` and `A`."""
    return PromptResponse(column(row, "Q"), column(row, "A"))


@register("AI-MO/NuminaMath-CoT", default_for=("AI-MO/NuminaMath-CoT",))
def numina_math(row: Mapping[str, Any]) -> PromptResponse:
    """`problem` and `solution`."""
    return PromptResponse(column(row, "problem"), column(row, "solution"))
