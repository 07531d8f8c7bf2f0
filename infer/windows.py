"""Texts longer than what a model reads at once, in windows that overlap: every token once, with enough before it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import ExitCode, LlamaError


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, first): tokens[begin:end] are read, of which tokens[first:end] were not predicted before.

    Windows begin `stride` tokens apart, so each token has at least window - stride before it, or all there are.
    """
    begin, first = 0, 1
    while first < length:
        end = min(begin + window, length)
        yield begin, end, first
        begin, first = begin + stride, end


def check_windows(window: int, stride: int, max_length: int) -> tuple[int, int]:
    """Window and stride in tokens, where 0 stands for max_length and half a window.

    Raises:
        LlamaError: the model cannot read such a window, or windows would leave tokens out.
    """
    window = window or max_length
    if not 2 <= window <= max_length:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"window is {window:,}, expected 2 to max_length ({max_length:,}): lower it, or raise max_length",
        )
    stride = stride or window // 2
    if not 1 <= stride < window:
        raise LlamaError(ExitCode.BAD_REQUEST, f"stride is {stride}, expected 1 to {window - 1}, less than a window")
    return window, stride


def log_likelihoods(llama: Any, tokens: Sequence[int], window: int, stride: int) -> np.ndarray:
    """Log-probability of each of tokens[1:], [T - 1]."""
    found = np.zeros(len(tokens) - 1)
    for begin, end, first in windows(len(tokens), window, stride):
        found[first - 1 : end - 1] = llama.score(tokens[begin:end]).logprobs[first - 1 - begin :]
    return found
