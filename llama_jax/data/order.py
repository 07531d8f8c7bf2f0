"""Shuffled orders that any place can be asked of, without the places before it and whatever NumPy's version.

A permutation of 0..size-1 is a Feistel network over the smallest even number of bits that holds them (Luby and Rackoff 1988);
a result beyond the size is sent through again until it is inside (Black and Rogaway 2002, cycle walking: four times at most on
average). Nothing is stored and nothing depends on a random generator's state: the order of a run's batches is a pure function.
"""

import hashlib

import numpy as np

ROUNDS = 6


def shuffled(places: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """What stands at these places of the shuffled 0..size-1.

    Args:
        places: whole numbers from 0, below `size`, of any shape.
        size: how many there are.
        key: the seed, and what else tells this order from others (a name, the epoch).

    Returns:
        int64, in the shape of `places`.
    """
    half_bits = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    digest = hashlib.sha256(repr(key).encode()).digest() + hashlib.sha256(repr((*key, "more")).encode()).digest()
    keys = np.frombuffer(digest, "<u8")[:ROUNDS]
    out = _network(np.asarray(places).astype(np.uint64).reshape(-1), half_bits, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _network(out[outside], half_bits, keys)
    return out.astype(np.int64).reshape(np.shape(places))


def _network(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of x moves half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
