"""Llama 3's tokenizer: byte-level BPE in tiktoken's rank file, 256 special tokens after the ranks.

The special ids count from the number of ranks n (128000): n is BOS, n+1 end of text, n+8 end of message, n+9 end of turn.
Their names moved between releases, the ids did not; a name that two releases give to different ids is not recognised.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import ByteStream, Tokenizer

NUM_SPECIAL = 256
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SLICE_CHARS = 400_000  # tiktoken recurses on long texts
RUN_CHARS = 25_000  # and is quadratic in a long word
LONG_RUN = re.compile(rf"\s{{{RUN_CHARS + 1},}}|\S{{{RUN_CHARS + 1},}}")

_COMMON = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
NAMED_3_0 = _COMMON  # meta-llama/llama3
NAMED_3_1 = _COMMON | {4: "finetune_right_pad_id", 5: "step_id", 8: "eom_id", 10: "python_tag", 11: "image"}  # llama-models
NAMED_HF = _COMMON | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}  # Hugging Face's 3.1 and later


def special_names(named: dict[int, str]) -> list[str]:
    """The 256 texts of one release in id order; ids it does not name are numbered through as reserved."""
    reserved = (f"reserved_special_token_{k}" for k in range(NUM_SPECIAL))
    return [f"<|{named[i] if i in named else next(reserved)}|>" for i in range(NUM_SPECIAL)]


class RankTokenizer(Tokenizer):
    """Ids as Meta's tokenizer gives them.

    Args:
        ranks: the file's contents.
    """

    def __init__(self, ranks: bytes, *, chat_template: str | None = None, files: Sequence[Path] = ()):
        import tiktoken

        self.ranks = parse_ranks(ranks)
        n = len(self.ranks)
        self._encoding = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens={})
        self.vocab_size = n + NUM_SPECIAL
        self.bos_id, self.eos_id = n, n + 1
        self.stop_ids = (n + 1, n + 8, n + 9)
        self.special_tokens = _agreed_names(n)
        self.special_ids = frozenset(range(n, self.vocab_size))
        self.chat_template = chat_template
        self._files = tuple(files)
        self._table: list[bytes | str] = [*self.ranks, *special_names(NAMED_3_1)]  # ranks are in order

    def stream(self, *, skip_special: bool = True, continued: bool = False) -> ByteStream:
        def pieces(ids: Sequence[int]) -> Iterable[bytes | str]:
            for i in self.check_ids(ids):
                special = i in self.special_ids
                yield "" if special and skip_special else self._table[i]

        return ByteStream(pieces)

    def _encode(self, text: str) -> list[int]:
        return [i for part in _slices(text) for i in self._encoding.encode_ordinary(part)]


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """`base64(bytes) rank` lines -> {bytes: rank}, in rank order and without gaps."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as e:
            raise _bad(f"line {number} is not `base64 rank`: {line[:40]!r}") from e
        if not token or rank < 0:
            raise _bad(f"line {number} holds {'a negative rank' if token else 'an empty token'}")
        if rank in tokens:
            raise _bad(f"rank {rank} is given twice, again in line {number}")
        tokens[rank] = token
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise _bad(f"rank {missing} is missing; ranks must be 0..{len(tokens) - 1} for {len(tokens)} lines")
    ranks = {tokens[rank]: rank for rank in range(len(tokens))}
    if len(ranks) != len(tokens):
        twice = next(rank for rank, token in tokens.items() if ranks[token] != rank)
        raise _bad(f"the token of rank {twice} is given again as rank {ranks[tokens[twice]]}")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise _bad(f"no token for the single byte 0x{byte:02X}, so not every text could be encoded")
    return ranks


def _bad(what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_TOKENIZER, f"Llama 3 tokenizer.model: {what}: download the file again")


def _agreed_names(n: int) -> dict[str, int]:
    ids: dict[str, set[int]] = {}
    for named in (NAMED_3_0, NAMED_3_1, NAMED_HF):
        for i, name in enumerate(special_names(named)):
            ids.setdefault(name, set()).add(n + i)
    return {name: min(found) for name, found in ids.items() if len(found) == 1}


def _slices(text: str) -> Iterator[str]:
    """The parts Meta's tokenizer encodes one by one: few characters each, and no long run of space or of non-space."""
    for start in range(0, len(text), SLICE_CHARS):
        part = text[start : start + SLICE_CHARS]
        cut = 0
        for run in LONG_RUN.finditer(part):
            for end in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                yield part[cut:end]
                cut = end
        yield part[cut:]
