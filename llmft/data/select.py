"""Diverse samples of rows, and rows assigned to folds; both independent of the rows' order."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from llmft.data.overlap import words

_MOST_CLUSTERS = 1000
_MOST_TERMS = 20_000
_COMPONENTS = 100


def diverse(texts: Sequence[str], count: int, seed: int) -> list[int]:
    """Sorted indices of `count` different rows that are spread over the data.

    Texts become TF-IDF vectors. k-means finds `count` clusters (at most 1,000), and each cluster gives the row nearest
    its centre; further rows are taken from the clusters in turn. Copies of a text are taken only when there are no
    other texts left. The choice depends on the set of texts and on `seed`, not on their order. All rows are returned if
    there are at most `count`.
    """
    if count >= len(texts):
        return list(range(len(texts)))
    if count <= 0:
        return []
    copies: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        copies[" ".join(text.split())].append(index)
    unique = sorted(copies, key=lambda text: rank(seed, text))
    if len(unique) > count:
        return sorted(copies[unique[position]][0] for position in _spread(unique, count, seed))
    return sorted(_in_turn([copies[text] for text in unique], count))


def _in_turn(groups: list[list[int]], count: int) -> list[int]:
    """The first `count` of the first of each group, then the second of each, and so on."""
    rounds = chain.from_iterable(zip_longest(*groups))
    return [index for index in rounds if index is not None][:count]


def _spread(texts: list[str], count: int, seed: int) -> list[int]:
    """Indices of `count` of the unique `texts`, which are more than `count`."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # more threads would sum in another order and choose other rows
        points = _vectors(texts, seed)
        centres = _far_apart(points, min(count, _MOST_CLUSTERS))
        # Without reassignment, small clusters keep their centres.
        kmeans = MiniBatchKMeans(len(centres), init=centres, n_init=1, reassignment_ratio=0, random_state=seed % 2**32)
        cluster_of = kmeans.fit_predict(points)
    distance = np.linalg.norm(points - kmeans.cluster_centers_[cluster_of], axis=1)
    clusters: dict[int, list[int]] = defaultdict(list)
    for index, cluster in enumerate(cluster_of.tolist()):  # texts are in random order, by hash
        clusters[cluster].append(index)
    for cluster_rows in clusters.values():
        cluster_rows.insert(0, cluster_rows.pop(int(np.argmin(distance[cluster_rows]))))
    return _in_turn(list(clusters.values()), count)


def _far_apart(points: Any, count: int) -> Any:
    """The first of `points`, then always the one farthest from those chosen (Gonzalez 1985).

    k-means++ draws by squared distance summed over a cluster, so it misses a small cluster next to a large one.
    """
    import numpy as np

    chosen = [0]
    distance = np.full(len(points), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, 1 - points @ points[chosen[-1]])  # half the squared distance of unit vectors
        chosen.append(int(np.argmax(distance)))
    return points[chosen]


def _vectors(texts: list[str], seed: int) -> Any:
    """(rows, at most 100) unit vectors of `texts`: TF-IDF, reduced by SVD where it has more dimensions."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    weights = TfidfVectorizer(analyzer=words, sublinear_tf=True, max_features=_MOST_TERMS).fit_transform(texts)
    if weights.shape[1] <= _COMPONENTS:
        return weights.toarray()
    return normalize(TruncatedSVD(_COMPONENTS, random_state=seed % 2**32).fit_transform(weights))


def assign_folds(
    keys: Sequence[str],
    num_folds: int,
    seed: int,
    *,
    targets: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> list[int]:
    """The fold, from 0, of each row.

    Rows with the same key or the same group are in one fold. Without groups and copies, each fold has its share of
    every target and of all rows, to within one row. With them, the largest units are assigned first, each to the fold
    with the fewest of its targets (as in scikit-learn's StratifiedGroupKFold, which depends on the rows' order). A
    row's fold depends on the set of rows, whose contents are `keys`, and on `seed`, not on their order.

    Raises ValueError for fewer than 2 folds, or more folds than different groups or rows.
    """
    targets = [""] * len(keys) if targets is None else targets
    assert len(targets) == len(keys)
    assert groups is None or len(groups) == len(keys)
    if num_folds < 2:
        raise ValueError(f"{num_folds} folds cannot be made: the number of folds must be at least 2.")
    units = _units(keys, groups)
    if num_folds > len(units):
        kind = "rows" if groups is None else "groups"
        raise ValueError(f"{num_folds} folds need at least {num_folds} different {kind}, but there are {len(units)}.")

    ranks = [rank(seed, key) for key in keys]
    order = []
    for rows in units:
        counts = sorted(Counter(targets[row] for row in rows).items())
        # Units of the same size and targets are neighbours, so that they go to the folds in turn.
        order.append((-len(rows), rank(seed, repr(counts)), min(ranks[row] for row in rows), counts, rows))

    total = Counter(targets)
    folds: list[Counter[str]] = [Counter() for _ in range(num_folds)]
    fold_of = [0] * len(keys)
    for *_, counts, rows in sorted(order, key=lambda unit: unit[:3]):
        costs = [sum(count * fold[target] / total[target] for target, count in counts) for fold in folds]
        best = min(range(num_folds), key=lambda fold: (costs[fold], folds[fold].total()))
        folds[best].update(dict(counts))
        for row in rows:
            fold_of[row] = best
    return fold_of


def _units(keys: Sequence[str], groups: Sequence[str] | None) -> list[list[int]]:
    """Rows that must stay together: the connected components by key and group."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for key, group in zip(keys, groups or (), strict=False):
        parent[find(("key", key))] = find(("group", group))
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        units[find(("key", key))].append(row)
    return list(units.values())


def rank(seed: int, text: str) -> bytes:
    """A sort key that is random by `seed` and depends on nothing but `text`."""
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
