"""``llmtrain chat``: a conversation in the terminal, or turn by turn from a pipe."""

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmtrain.generation.chat import Chat

HELP = """\
/reset        start over (the system prompt stays)
/save FILE    write the conversation as JSON: {"messages": [...]}
/help         this
/exit         leave (Ctrl-D does, too); Ctrl-C stops an answer"""

_COMMAND = re.compile(r"/[a-z]+(\s|$)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat_command(
    source: Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    recipe: Path | None = None,
) -> None:
    """Talk with a model until the end of the input.

    On a terminal with a prompt and colours; otherwise each line of standard input is a turn of the user and each
    answer is printed plainly, so that a conversation can be piped.

    Args:
        source: A run, a checkpoint, a ``.pt`` file or an export, whose tokenizer has a chat template.
        system: The system prompt; by default what the template says by itself.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling, 1 is off.
        top_k: Keep the k most probable tokens, 0 is off.
        seed: The same seed and the same turns give the same answers.
        device: ``cpu``, ``cuda``; by default a GPU if there is one.
        dtype: By default bfloat16 on a GPU, float32 on the CPU.
        recipe: For a checkpoint that does not carry its recipe.

    Raises:
        UserError: the source is not usable, or its tokenizer has no chat template.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1.")
    from rich.console import Console

    from llmtrain.generation.chat import Chat
    from llmtrain.generation.conversation import render
    from llmtrain.generation.load import load
    from llmtrain.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    model, tokenizer = load(source, recipe=recipe, device=device, dtype=dtype)
    chat = Chat(model, tokenizer, system=system, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    # A template that takes no system prompt says so now, not after the first question.
    render(tokenizer, [*chat.conversation.messages, {"role": "user", "content": "x"}])
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    _talk(chat, Console(stderr=not interactive), interactive)  # from a pipe, standard output has the answers alone


def _talk(chat: "Chat", console: "Console", interactive: bool) -> None:
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        _say(console, "A conversation; /help lists the commands.")
    while True:
        try:
            line = _utf8(console.input("[bold cyan]> [/]") if interactive else sys.stdin.readline())
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:  # there is no prompt to come back to
                raise
            console.print()
            continue
        except UnicodeError:
            problem = "This line of the input is not UTF-8. Convert it first, for example with iconv."
            if not interactive:
                raise UserError(problem) from None
            _say(console, problem, style="red")
            continue
        if not interactive and not line:
            return
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        try:
            if _COMMAND.match(line):
                _say(console, _run(chat, line))
            elif line:
                _answer(chat, line, console, interactive)
        except UserError as problem:
            if not interactive:
                raise
            _say(console, str(problem), style="red")


def _answer(chat: "Chat", line: str, console: "Console", interactive: bool) -> None:
    pieces = chat.say(line)
    try:
        for piece in pieces:
            # Not through rich, which expands tabs. A terminal obeys control characters, so it gets none from a model.
            sys.stdout.write(_CONTROL.sub("", piece) if interactive else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
        if not interactive:
            raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    if interactive and chat.cut_off:
        _say(console, "(cut off: --max-new-tokens, no more room, or interrupted)")
    if interactive and chat.context is not None and chat.used > chat.context:
        trained = f"longer than the {chat.context:,} that the model was trained on"
        _say(console, f"({chat.used:,} tokens: {trained}; /reset starts over)")


def _utf8(line: str) -> str:
    """The line, without the stand-ins that Python reads bytes as where the locale is not UTF-8.

    Raises:
        UnicodeError: the bytes are no UTF-8.
    """
    return line.encode("utf-8", "surrogateescape").decode("utf-8")


def _run(chat: "Chat", line: str) -> str:
    """Does what a line that begins with / says; returns what to print."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        chat.reset()
        return "(started over)"
    if command == "/save":
        if not argument.strip():
            raise UserError("/save needs the name of a file: /save conversation.json")
        file = Path(argument.strip()).expanduser()
        chat.conversation.save(file)
        return f"(saved to {file})"
    if command == "/help":
        return HELP
    raise UserError(f"{command} is no command. /help lists those there are.")


def _say(console: "Console", text: str, style: str = "dim") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
