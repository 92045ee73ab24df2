"""Makes gold/weights.npy: raters that never tire, fitted on the human ratings of film and product reviews.

Run      python rlhf/data/make_gold.py

A ridge regression of a text's mean rating on the presence of hashed words, word pairs and four-letter pieces
of words, divided by the root of their number so that the score has one size for long and short texts. All
texts but the 1,000 held out are read; what is printed is measured on those. gold/gold.py reads the weights and
says what is set by hand.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr

DATA = Path(__file__).resolve().parent
RIDGE = 0.2

spec = importlib.util.spec_from_file_location("gold", DATA / "gold" / "gold.py")
gold = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gold)


def read(split: str) -> tuple[list[str], np.ndarray]:
    """The texts of a split and people's mean ratings of them, in [-4, 4]."""
    with gzip.open(DATA / "human_ratings" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] for row in rows], np.array([row["rating"] for row in rows])


def feature_matrix(texts: list[str]) -> csr_matrix:
    """1 / sqrt(n) for each of the n features that a text has, [texts, buckets]."""
    found = [gold.features(text) for text in texts]
    sizes = np.array([len(row) for row in found])
    values, starts = np.repeat(sizes**-0.5, sizes), np.concatenate(([0], sizes.cumsum()))
    return csr_matrix((values, np.concatenate(found), starts), shape=(len(texts), gold.BUCKETS))


def main() -> None:
    texts, ratings = (np.concatenate(pair) for pair in zip(read("reward"), read("judge"), strict=True))
    weights = lsqr(feature_matrix(texts), ratings - ratings.mean(), damp=RIDGE**0.5)[0]
    np.save(gold.WEIGHTS, np.append(weights, ratings.mean()).astype(np.float16))

    texts, ratings = read("heldout")
    scores = np.array(gold.score([""] * len(texts), texts))
    print(f"correlation with people's mean rating on held-out texts: {np.corrcoef(scores, ratings)[0, 1]:.3f}")
    i, j = np.triu_indices(len(texts), 1)
    right, apart = (scores[i] > scores[j]) == (ratings[i] > ratings[j]), abs(ratings[i] - ratings[j])
    print(f"of all pairs {right[apart > 0].mean():.3f} in people's order; "
          f"a grade apart and more, {right[apart >= 1].mean():.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
