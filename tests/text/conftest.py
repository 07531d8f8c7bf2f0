"""Tokenizers of all kinds for the tests of the text room."""

from pathlib import Path

import pytest

from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from tests.text import make

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
KINDS = ("sentencepiece", "codellama", "ranks", "json_bytes", "json_prepend", "json_metaspace")


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {name} in {SHARED}, which is not part of the repository")
    return SHARED / name


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with one small tokenizer of each kind; tests only read it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        (folder / kind).mkdir()
    model = make.small_sentencepiece(folder / "sentencepiece" / "tokenizer.model")
    infilling = make.with_pieces(model.read_bytes(), make.INFILL_PIECES)
    (folder / "codellama" / "tokenizer.model").write_bytes(infilling)
    make.small_ranks(folder / "ranks" / "tokenizer.model")
    for kind in ("bytes", "prepend", "metaspace"):
        make.small_tokenizer_json(folder / f"json_{kind}" / "tokenizer.json", kind)
    return folder


@pytest.fixture(scope="session")
def all_tokenizers(folder) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, all_tokenizers) -> Tokenizer:
    """Each kind in turn."""
    return all_tokenizers[request.param]


@pytest.fixture(scope="session")
def llama2() -> Tokenizer:
    return load_tokenizer(shared("tokenizers/llama2"))


@pytest.fixture(scope="session")
def llama3() -> Tokenizer:
    return load_tokenizer(shared("tokenizers/llama3"))
