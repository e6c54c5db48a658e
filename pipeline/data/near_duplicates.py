"""Texts that are equal or nearly so, put into groups.

Two texts are near duplicates when half of the distinct n-word windows of the shorter one are in the other too.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def normalise(text: str) -> str:
    """The letters and digits of a text, in lower case: two texts are equal when these are."""
    return re.sub(r"[\W_]+", "", text.lower())


def group_keys(texts: Sequence[str], keys: Sequence[str]) -> list[str]:
    """For each text the smallest key of its group; equal texts and near duplicates are in one group, transitively."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    equal = [(first.setdefault(normalise(text), i), i) for i, text in enumerate(texts)]
    for a, b in equal + near_duplicates(texts).tolist():
        a, b = sorted((root(a), root(b)), key=keys.__getitem__)
        parent[b] = a
    return [keys[root(i)] for i in range(len(texts))]


def word_ids(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(words, owner), (W,) each: every word as a random 64-bit number of its own, and the index of its text."""
    words = [re.findall(r"[a-z0-9]+", re.sub("['\u2019]", "", text.lower())) for text in texts]
    vocabulary: dict[str, int] = defaultdict(lambda: len(vocabulary))
    stream = np.array([vocabulary[word] for row in words for word in row], dtype=np.int64)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(vocabulary) + 1, dtype=np.uint64)
    return numbers[stream], np.repeat(np.arange(len(texts)), [len(row) for row in words])


def windows(words: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash, owner) of every n-word window that lies within one text, in reading order."""
    count = max(len(words) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[k : k + count]
    inside = owner[:count] == owner[len(owner) - count :]
    return hashes[inside], owner[:count][inside]


def distinct_windows(hashes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (hash, owner), sorted by hash, then owner; `owner` ascends, as `windows` returns it."""
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[new], owner[new]


def near_duplicates(texts: Sequence[str], n: int = 8) -> np.ndarray:
    """Index pairs (D, 2) of texts: at least half of the distinct n-word windows of the shorter one are in the other.

    A text of 5 to n-1 words pairs with every text that contains all of it as one run of words; shorter ones pair with
    none. Windows are compared as 64-bit hashes; that two of six million windows collide has probability 1e-6.
    """
    words, owner = word_ids(texts)
    length = np.bincount(owner, minlength=len(texts))
    near = []
    for size in range(5, n + 1):
        hashes, holder = windows(words, owner, size)
        if size < n:  # only what a whole text of this length says
            kept = np.isin(hashes, hashes[length[holder] == size])
            hashes, holder = hashes[kept], holder[kept]
        hashes, holder = distinct_windows(hashes, holder)
        total = np.bincount(holder, minlength=len(texts)) if size == n else np.where(length == size, 1, 2**31)
        joint, start = [np.zeros(0, np.int64)], np.arange(len(hashes))
        while len(start):  # the k-th pass pairs each holder of a window with the k-th holder after it
            start = start[start + len(joint) < len(hashes)]
            start = start[hashes[start] == hashes[start + len(joint)]]
            joint.append(holder[start] * len(texts) + holder[start + len(joint)])
        pair, shared = np.unique(np.concatenate(joint), return_counts=True)
        pair = np.stack([pair // len(texts), pair % len(texts)], axis=1)
        near.append(pair[2 * shared >= total[pair].min(axis=1)])
    return np.concatenate(near)
