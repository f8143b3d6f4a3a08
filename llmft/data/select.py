"""Rows chosen to be unlike each other, and rows dealt to folds; both independent of the rows' order."""

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
    """Indices, in rising order, of `count` different rows that are spread over the data.

    Texts become TF-IDF vectors, k-means finds as many clusters as rows are asked for (at most 1,000), and each
    cluster gives the row nearest its centre; what is then missing is taken in turn from the clusters. Copies of a text
    are taken only when the different texts run out. The texts chosen depend on their set and on `seed`, not on
    their order. `count` at or above the number of rows returns all.
    """
    if count >= len(texts):
        return list(range(len(texts)))
    if count <= 0:
        return []
    copies: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        copies[" ".join(text.split())].append(index)
    different = sorted(copies, key=lambda text: _rank(seed, text))
    if len(different) > count:
        return sorted(copies[different[place]][0] for place in _spread(different, count, seed))
    # Round by round: every text once, then second copies, and so on.
    rounds = chain.from_iterable(zip_longest(*(copies[text] for text in different)))
    return sorted([index for index in rounds if index is not None][:count])


def _spread(texts: list[str], count: int, seed: int) -> list[int]:
    """Places of `count` of the different `texts`, of which there are more than `count`."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums in another order would choose other rows on a machine with more cores
        points = _vectors(texts, seed)
        centres = _far_apart(points, min(count, _MOST_CLUSTERS))
        # No idle centre is moved (reassignment), so that small clusters keep theirs.
        means = MiniBatchKMeans(len(centres), init=centres, n_init=1, reassignment_ratio=0, random_state=seed % 2**32)
        cluster_of = means.fit_predict(points)
    distance = np.linalg.norm(points - means.cluster_centers_[cluster_of], axis=1)
    clusters: dict[int, list[int]] = defaultdict(list)
    for place, cluster in enumerate(cluster_of.tolist()):  # the places are in random order, by hash
        clusters[cluster].append(place)
    for members in clusters.values():
        members.insert(0, members.pop(int(np.argmin(distance[members]))))
    rounds = chain.from_iterable(zip_longest(*clusters.values()))
    return [place for place in rounds if place is not None][:count]


def _far_apart(points: Any, count: int) -> Any:
    """The first of `points`, then always the one farthest from those taken (Gonzalez 1985).

    k-means++ draws by squared distance summed over a cluster, and so never reaches a small one beside a large one.
    """
    import numpy as np

    taken = [0]
    distance = np.full(len(points), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, 1 - points @ points[taken[-1]])  # of unit vectors, half the squared distance
        taken.append(int(np.argmax(distance)))
    return points[taken]


def _vectors(texts: list[str], seed: int) -> Any:
    """Unit vectors (rows, at most 100) of `texts`: TF-IDF, projected to its main directions where it has more."""
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

    Rows with the same key or the same group are in one fold. Without groups and copies each fold has its share of
    every target and of all rows to within one row; with them, the largest units are dealt first, each to the fold that
    has least of its targets (the greedy of scikit-learn's StratifiedGroupKFold, which does not promise independence of
    the rows' order). A row's fold depends on the set of rows and on `seed`, not on their order.

    Args:
        keys: the content of each row, in a canonical form.
        num_folds: how many folds, at least 2; none is empty.
        seed: decides which of the rows that are as good go where.
        targets: class of each row, to be spread evenly.
        groups: what must not be torn apart, for each row.

    Raises:
        ValueError: fewer than 2 folds, or more folds than different groups or rows.
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

    ranks = [_rank(seed, key) for key in keys]
    dealt = []
    for rows in units:
        of_target = sorted(Counter(targets[row] for row in rows).items())
        # Units of one size and target follow each other, so that they are dealt in turn.
        dealt.append((-len(rows), _rank(seed, repr(of_target)), min(ranks[row] for row in rows), of_target, rows))
    dealt.sort(key=lambda unit: unit[:3])

    total = Counter(targets)
    sizes = [0] * num_folds
    held: list[Counter[str]] = [Counter() for _ in range(num_folds)]
    fold_of = [0] * len(keys)
    for *_, of_target, rows in dealt:
        costs = [sum(count * have[target] / total[target] for target, count in of_target) for have in held]
        fold = min(range(num_folds), key=lambda fold: (costs[fold], sizes[fold]))
        sizes[fold] += len(rows)
        held[fold].update(dict(of_target))
        for row in rows:
            fold_of[row] = fold
    return fold_of


def _units(keys: Sequence[str], groups: Sequence[str] | None) -> list[list[int]]:
    """Rows that must stay together: those joined, also in several steps, by a key or a group."""
    leader: dict[tuple[str, str], tuple[str, str]] = {}

    def lead(name: tuple[str, str]) -> tuple[str, str]:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for key, group in zip(keys, groups or (), strict=False):
        leader[lead(("key", key))] = lead(("group", group))
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        units[lead(("key", key))].append(row)
    return list(units.values())


def _rank(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
