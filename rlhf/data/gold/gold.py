"""The raters: how much people would like a text, as well as 13,289 rated sentences can tell.

    python rlhf/rlhf_ppo.py --reward-model rlhf/data/gold/gold.py:score      (PPO with the raters themselves)

Fitted by ../make_gold.py: one weight for each hashed word, word pair and four-letter piece of a word.
Set by hand: REPETITION. People rated no text that repeats itself, so their ratings cannot say what they
think of one. It stands for what every reader knows, and without it the raters applaud "love and love in love".
"""

import re
import zlib
from pathlib import Path

import numpy as np

BUCKETS = 2**17
REPETITION = 6.0  # grades taken off a text all of whose longer words have occurred in it before
WEIGHTS = Path(__file__).parent / "weights.npy"


def features(text: str) -> np.ndarray:
    """The buckets of a text's words, word pairs and four-letter pieces of words, each once."""
    words = ["<", *re.findall(r"[\w']+|[^\w\s]", text.lower()), ">"]
    pairs = [f"{first} {second}" for first, second in zip(words[:-1], words[1:], strict=True)]
    pieces = ["#" + f"^{word}$"[i : i + 4] for word in words for i in range(len(word) - 1)]
    return np.unique([zlib.crc32(gram.encode()) % BUCKETS for gram in (*words, *pairs, *pieces)])


def repetition(text: str) -> float:
    """The share of a text's words of four letters and more that have occurred in it before."""
    words = re.findall(r"[a-z']{4,}", text.lower())
    return 1 - len(set(words)) / max(len(words), 1)


def score(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Grades between about -4 (people hate it) and 4 (they love it), one a text; shapes [B]."""
    weights = np.load(WEIGHTS).astype(np.float32)  # [BUCKETS + 1], the last one is the constant
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = prompt + completion
        found = features(text)
        liking = weights[found].sum() / len(found) ** 0.5 + weights[-1]
        scores.append(float(liking - REPETITION * repetition(text)))
    return scores
