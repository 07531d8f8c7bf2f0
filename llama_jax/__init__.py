"""llama_jax: Llama 2 and its family in JAX.

import llama_jax
llama = llama_jax.load("checkpoints/llama-2-7b")
print(llama.generate(["Once upon a time"], max_new_tokens=100)[0].text)
"""

from typing import Any

__version__ = "0.1.0"
_LAZY = {
    "load": "llama_jax.generation.load",
    "Llama": "llama_jax.generation.llama",
    "Session": "llama_jax.generation.llama",
    "Settings": "llama_jax.generation.request",
    "Completion": "llama_jax.generation.answer",
    "LlamaError": "llama_jax.errors",
}
__all__ = ["Completion", "Llama", "LlamaError", "Session", "Settings", "load"]


def __getattr__(name: str) -> Any:
    """Imports on first use: `import llama_jax` costs nothing."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
