"""Programs as users run them: the suite's full float32 precision is not for TPU kernels, which refuse it for bfloat16."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    with jax.default_matmul_precision("default"):
        yield
