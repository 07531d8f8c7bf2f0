"""The models that the tests of the generation room share."""

import pytest

from llama_jax.generation.llama import Llama
from tests.generation.make import llama_of


@pytest.fixture(scope="session")
def llama() -> Llama:
    """Random weights, a small SentencePiece tokenizer, Llama 2's chat format; batches of up to 4."""
    return llama_of()


@pytest.fixture(scope="session")
def bare() -> Llama:
    """The same without a tokenizer."""
    return llama_of(tokenizer=None, chat_format="")
