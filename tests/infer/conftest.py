"""Programs run in this process: their config, flags and model are put in their place."""

import importlib
import types
from collections.abc import Callable
from unittest import mock

import ml_collections
import pytest

from infer import program
from llama_jax.generation.llama import Llama
from tests.generation.make import llama_of

with mock.patch.object(program, "define_config"):  # each program defines the flag `config`, which a process can do once
    for name in ("sample", "chat", "score"):
        importlib.import_module(f"infer.{name}")


@pytest.fixture(scope="session")
def llama() -> Llama:
    return llama_of()


@pytest.fixture
def given(monkeypatch, llama) -> Callable[..., None]:
    """Calls as `given(module, config, PROMPT=[...])`: what the module's main then finds in its flags, and our model."""

    def give(module: types.ModuleType, config: ml_collections.ConfigDict, model: Llama = llama, **flags: object) -> None:
        monkeypatch.setattr(module, "CONFIG", types.SimpleNamespace(value=config))
        for name, value in flags.items():
            monkeypatch.setattr(module, name, types.SimpleNamespace(value=value))
        monkeypatch.setattr(program, "load", lambda config: model)

    return give
