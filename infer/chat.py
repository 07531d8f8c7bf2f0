"""A conversation in the terminal.

    python -m infer.chat --config=configs/chat.py --config.checkpoint=DIR

/reset begins anew, /system TEXT sets the system prompt and begins anew, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer.
"""

import dataclasses
import sys
from typing import Any

import llama_jax
from infer import program
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()


class Conversation:
    """Turns so far, trimmed from the oldest when they no longer fit.

    Args:
        llama: a model with a chat format.
        settings: of every answer; max_new_tokens is the room kept for one.
        system: system prompt, "" for none.
    """

    def __init__(self, llama: Any, settings: Any, system: str = ""):
        self._llama = llama
        self._settings = settings
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._session = llama_jax.Session()

    def reset(self, system: str | None = None) -> None:
        self.turns = []
        self.system = self.system if system is None else system

    def ask(self, text: str) -> str:
        """Answers a user's turn on stdout. Ctrl-C ends the answer where it is; what was said so far is remembered.

        Raises:
            LlamaError: the turn alone does not fit, or holds tags of the chat format; the turn is forgotten.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        try:
            turns = self._trimmed(turns)
            pieces = self._llama.stream_chat(self._messages(turns), self._settings, session=self._session)
            answer = []
            try:
                for piece in pieces:
                    answer.append(piece)
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if distributed.num_processes() > 1:  # the others would go on with the answer
                    raise
                distributed.note("\n(stopped)")
        finally:
            print(flush=True)
        self._remember([*turns, {"role": "assistant", "content": "".join(answer)}])
        return "".join(answer)

    def _remember(self, turns: list[dict[str, str]]) -> None:
        """Keeps the turns, unless the model wrote what its own format forbids: no prompt could hold that answer."""
        try:
            self._llama.encode_chat(self._messages([*turns, {"role": "user", "content": "?"}]))
        except LlamaError as error:
            distributed.note(f"(this answer cannot be part of a conversation and was forgotten: {error})")
        else:
            self.turns = turns

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + turns

    def _trimmed(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """The turns without the oldest pairs that leave no room for an answer."""
        room = self._llama.max_length - self._settings.max_new_tokens
        dropped = 0
        while len(self._llama.encode_chat(self._messages(turns))) > room and len(turns) > 2:
            turns, dropped = turns[2:], dropped + 1
        if dropped:
            distributed.note(
                f"({dropped} of the oldest turns no longer fit into {self._llama.max_length} tokens and were forgotten)"
            )
        return turns


def main() -> None:
    config = CONFIG.value
    settings = program.settings(config)
    llama = program.load(config)
    llama.chat_format = config.chat_format or llama.chat_format
    if not llama.chat_format:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"{config.checkpoint} is a base model: it continues text and knows no conversations. Use a chat or instruct model, "
            "or name its format with --config.chat_format",
        )
    longest = max(1, llama.max_length // 2)
    settings = dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens or longest, longest))
    conversation = Conversation(llama, settings, config.system)
    while (line := distributed.broadcast(_read() if distributed.is_main() else None)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/system" or line.startswith("/system "):
            conversation.reset(line.removeprefix("/system").strip())
        elif line.startswith("/"):
            distributed.note(f"unknown command {line.split()[0]}; there are /reset, /system TEXT and /exit")
        elif line:
            try:
                conversation.ask(line)
            except LlamaError as error:
                distributed.note(f"error: {error}")


def _read() -> str | None:
    """A line of the user's, or None at the end; Ctrl-C at the prompt clears the line."""
    while True:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            distributed.note("\n(/exit or Ctrl-D leaves)")


if __name__ == "__main__":
    program.run(main)
