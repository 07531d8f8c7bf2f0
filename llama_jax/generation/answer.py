"""From a row's tokens to its text: streaming detokeniser, stop strings, the record of an answer."""

import dataclasses
from collections.abc import Sequence

from llama_jax.generation.request import Row
from llama_jax.generation.state import Output
from llama_jax.text.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: without stop strings and control tokens; begins with the prompt under `echo`.
        tokens: generated ids, without the stop token.
        finish_reason: "stop" (stop token or string) or "length".
        prompt_tokens: ids of the prompt.
        sample: which of the prompt's n answers it is.
        logprobs: of each token in `tokens`, under `logprobs`; natural logarithm, of the model before sampling settings.
        top_logprobs: per token, the likeliest ids with theirs.
        prompt_logprobs: of prompt_tokens[1:], under `logprobs` and `echo`.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: list[int]
    sample: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float] | None = None


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first, wherever pieces begin and end."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - self._open())

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        return "" if self.stopped else self._take(len(self._held))

    def _open(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0

    def _take(self, n: int) -> str:
        taken, self._held = self._held[:n], self._held[n:]
        return taken


class Answer:
    """Collects a row's output as it arrives.

    Attributes:
        finish_reason: "" while it is under way.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer | None, *, continued: bool):
        self.row = row
        self.finish_reason = ""
        self._decoder = tokenizer.stream(continued=continued) if tokenizer else None
        self._stops = StopStrings(row.settings.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []

    def push(self, output: Output, b: int) -> str:
        """Takes row b of an output; returns the new text that is certain."""
        new = []
        for i, token in enumerate(output.tokens[b].tolist()):
            if self.finish_reason or token < 0:
                break
            new.append(self._take(token, output, b, i))
        self._text += new
        return "".join(new)

    def completion(self, prompt_text: str = "", prompt_logprobs: list[float] | None = None) -> Completion:
        reports = self.row.settings.logprobs >= 0
        return Completion(
            text=prompt_text + "".join(self._text),
            tokens=self._tokens,
            finish_reason=self.finish_reason or "stop",
            prompt_tokens=list(self.row.tokens),
            sample=self.row.sample,
            logprobs=self._logprobs if reports else None,
            top_logprobs=self._top if reports else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _take(self, token: int, output: Output, b: int, i: int) -> str:
        if token in self.row.stop_ids:
            return self._finish("stop")
        self._tokens.append(token)
        self._logprobs.append(float(output.logprobs[b, i]))
        alternatives = slice(0, max(self.row.settings.logprobs, 0))
        ids, values = output.top_ids[b, i, alternatives], output.top_logprobs[b, i, alternatives]
        self._top.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
        text = self._stops.push(self._decoder.push([token])) if self._decoder else ""
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif len(self._tokens) >= self.row.settings.max_new_tokens:
            text += self._finish("length")
        return text

    def _finish(self, reason: str) -> str:
        text = self._stops.push(self._decoder.finish()) if self._decoder else ""
        self.finish_reason = "stop" if self._stops.stopped else reason
        return text + self._stops.finish()
