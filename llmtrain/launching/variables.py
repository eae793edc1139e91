"""Variables that are written into what a scheduler gets: well-formed, and never secrets."""

import re
from collections.abc import Sequence

from llmtrain.errors import UserError
from llmtrain.launching.plan import LaunchPlan
from llmtrain.redaction import redact_arguments, redact_variables

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_variables(given: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` of `--env` as a mapping.

    Raises:
        UserError: one is not that.
    """
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(key) or "\n" in value or "\0" in value:
            raise UserError(f"--env: {key!r} is not KEY=VALUE on one line")
        found[key] = value
    return found


def refuse_secrets(plan: LaunchPlan, advice: str) -> None:
    """Whether what is written for the scheduler would hold a password, a key or a token.

    Args:
        plan: its variables and overrides are looked at.
        advice: what to do instead, with {key} for the variable's name.

    Raises:
        UserError: it would; the value is not shown.
    """
    shown = redact_variables(plan.environment)
    masked = [key for key, value in plan.environment.items() if shown[key] != value]
    masked += [item.partition("=")[0] for item in plan.overrides if redact_arguments([item]) != [item]]
    if masked:
        key, name = masked[0], masked[0].rpartition(".")[2].upper()
        raise UserError(f"{key}: a secret would stand in a file. {advice.format(key=name)}")
