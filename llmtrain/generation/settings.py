"""How a prompt is continued: the command line's settings, and what a request changes in them."""

from dataclasses import dataclass, fields, replace
from typing import Any

from llmtrain.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What can differ from request to request; checked when it is made.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    return_full_text: bool = False
    """Whether the answer begins with the prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1.")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (all tokens) or positive.")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every answer at once.")

    def changed(self, parameters: Any) -> "Settings":
        """With what a request's `parameters` say; null is the same as nothing.

        `do_sample: false` is greedy whatever the temperature, as in transformers; `do_sample: true` is temperature 1
        where neither the request nor the command line has one.

        Raises:
            UserError: a parameter that is not known, or a value of another type or out of its range.
        """
        if parameters is None:
            return self
        if not isinstance(parameters, dict):
            raise UserError("`parameters`: expected an object")
        known = {field.name for field in fields(self)} | {"do_sample"}
        given = {key: value for key, value in parameters.items() if value is not None}
        for key, value in given.items():
            if key not in known:
                raise UserError(f"parameters: `{key}` is not supported; there are {', '.join(sorted(known))}")
            if not _fits(key, value):
                raise UserError(f"parameters.{key}: {value!r} is not {_TYPES[key]}")
        sample = given.pop("do_sample", None)
        if "stop" in given:
            given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
        new = replace(self, **given)
        if sample is False:
            return replace(new, temperature=0.0)
        if sample is True and new.temperature == 0:
            if "temperature" in given:
                raise UserError("parameters: `do_sample: true` with `temperature: 0`, which is greedy")
            return replace(new, temperature=1.0)
        return new


_TYPES = {
    "max_new_tokens": "a whole number",
    "temperature": "a number",
    "top_p": "a number",
    "top_k": "a whole number",
    "return_full_text": "true or false",
    "do_sample": "true or false",
    "stop": "a text or a list of texts",
}


def _fits(key: str, value: Any) -> bool:
    kind = _TYPES[key]
    if kind == "true or false":
        return isinstance(value, bool)
    if key == "stop":
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
    return not isinstance(value, bool) and isinstance(value, int if kind == "a whole number" else int | float)
