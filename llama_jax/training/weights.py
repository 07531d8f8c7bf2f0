"""What training decides by a weight's logical axes and name, `layers` left out: stacked layers train like a list of them."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from llama_jax.errors import ExitCode, LlamaError

Axes = tuple[str, ...]


def is_axes(node: Any) -> bool:
    """Whether a node of a tree is the logical axes of a weight: what `is_leaf` of jax.tree.map asks."""
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def sides(names: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The outputs and the inputs among the axes of a matrix [out..., in...]; None of what is no matrix (norms, magnitudes).

    A head's width belongs to the heads before it: q_proj [N, H, D] has outputs 0, 1 and input 2, o_proj [D, N, H] output 0 and
    inputs 1, 2.

    Args:
        names: without `layers`.
    """
    groups: list[tuple[int, ...]] = []
    for axis, name in enumerate(names):
        if name == "head_dim" and groups:
            groups[-1] += (axis,)
        else:
            groups.append((axis,))
    return (groups[0], groups[1]) if len(groups) == 2 else None


def matrices(axes: Any) -> Any:
    """The tree of axes with True in the place of matrices: what decays."""
    return jax.tree.map(lambda names: sides(_alone(names)) is not None, axes, is_leaf=is_axes)


def per_weight(axes: Any, choose: Callable[[Axes], optax.GradientTransformation]) -> optax.GradientTransformation:
    """Every weight by a transformation of its own, stacked layers each as if they were alone.

    The state is a tree like the weights with the state of each in its place, [L, ...] where layers are stacked.

    Args:
        choose: by logical axes without `layers`, what transforms a weight of them; its trees are single arrays.
    """

    def each(names: Axes, f: Callable) -> Callable:
        return f if _alone(names) == names else jax.vmap(f)

    def init(weights: Any) -> Any:
        return jax.tree.map(lambda names, w: each(names, choose(_alone(names)).init)(w), axes, weights, is_leaf=is_axes)

    def update(gradients: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        def one(names: Axes, *args: Any) -> tuple[Any, Any]:
            return each(names, choose(_alone(names)).update)(*args)

        pairs = jax.tree.map(one, axes, gradients, state, weights, is_leaf=is_axes)
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], axes, pairs, is_leaf=is_axes) for i in range(2))

    return optax.GradientTransformation(init, update)


def flat_shape(names: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """(outputs, inputs) of a matrix, (n,) of what is none."""
    if (found := sides(names)) is None:
        return (math.prod(shape),)
    return tuple(math.prod(shape[axis] for axis in side) for side in found)


def as_matrix(names: Axes, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of one weight that sees it in its flat_shape."""

    def flat(weight: jax.Array) -> jax.Array:
        return weight.reshape(flat_shape(names, weight.shape))

    def update(gradient: jax.Array, state: Any, weight: jax.Array) -> tuple[jax.Array, Any]:
        change, state = transformation.update(flat(gradient), state, flat(weight))
        return change.reshape(weight.shape), state

    return optax.GradientTransformation(lambda weight: transformation.init(flat(weight)), update)


def without_frozen(tree: Any, freeze: Sequence[str]) -> Any:
    """A tree like the parameters (or their axes) with None in the place of what does not train.

    Args:
        freeze: regular expressions that match whole names: "embedding", "layers.q_proj" (of all layers), "layers[.].*_norm".

    Raises:
        LlamaError: an expression that is none or matches no name, or nothing is left to train; with the names.
    """
    if not freeze:
        return tree
    leaves, form = jax.tree.flatten_with_path(tree, is_leaf=is_axes)
    names = [".".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)) for path, _ in leaves]
    known = ", ".join(dict.fromkeys(names))
    frozen = [_matches(expression, names, known) for expression in freeze]
    if all(map(any, zip(*frozen, strict=True))):
        raise LlamaError(ExitCode.BAD_CONFIG, f"freeze matches every weight, and nothing would train: {known}")
    return form.unflatten([None if any(hits) else leaf for (_, leaf), *hits in zip(leaves, *frozen, strict=True)])


def combine(tree: Any, rest: Any) -> Any:
    """A tree from without_frozen, with what `rest` has where it has None."""
    return jax.tree.map(lambda leaf, other: other if leaf is None else leaf, tree, rest, is_leaf=lambda leaf: leaf is None)


def _matches(expression: str, names: list[str], known: str) -> list[bool]:
    try:
        found = [re.fullmatch(expression, name) is not None for name in names]
    except re.error as error:
        raise LlamaError(ExitCode.BAD_CONFIG, f"freeze has {expression!r}, which is no regular expression: {error}") from None
    if not any(found):
        raise LlamaError(ExitCode.BAD_CONFIG, f"freeze has {expression!r}, which matches no weight; their names: {known}")
    return found


def _alone(names: Axes) -> Axes:
    return names[1:] if names[0] == "layers" else names
