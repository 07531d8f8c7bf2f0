"""What the tests of the data room share."""

from pathlib import Path

import pytest

from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.make import small_ranks, small_sentencepiece


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> Tokenizer:
    """SentencePiece, as Llama 2's."""
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Tokenizer:
    """Rank file, as Llama 3's."""
    return load_tokenizer(small_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model"))
