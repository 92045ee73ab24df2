"""Makes preferences/: pairs of reviews by the tiny language model, and which of the two the raters preferred.

Run      python rlhf/data/make_preferences.py

The model continues the first two words of a review of the corpus twice. The raters (gold/gold.py) prefer the
first continuation with probability sigmoid((gold_1 - gold_2) / T), where T is half the standard deviation of
their scores: people disagree, and nobody learns from a coin. Pairs of the same text, and texts that do not end
within 24 tokens, are left out. tiny_lm has read the corpus already, so it counts as fine-tuned on it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent
TRAIN, TEST, LENGTH, TEMPERATURE = 20_000, 2_000, 24, 0.5


def load(file: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)  # a dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def main() -> None:
    rlhf, gold, rng = load(DATA.parent / "rlhf_ppo.py"), load(DATA / "gold" / "gold.py"), np.random.default_rng(0)
    torch.set_num_threads(1)
    tokenizer, lm = rlhf.load_lm(str(DATA / "tiny_lm"))
    texts = gzip.decompress((DATA / "corpus" / "reviews.txt.gz").read_bytes()).decode().splitlines()
    starts = [" ".join(texts[n].split()[:2]) for n in rng.permutation(len(texts))]
    starts = [start for start in starts if tokenizer.unk_token_id not in tokenizer(start)["input_ids"]]

    pairs = []
    for i in range(0, TRAIN + TEST + 2_000, 200):  # more than is needed, for some are left out
        prompts = [prompt for prompt in starts[i : i + 200] for _ in range(2)]
        ids, mask = rlhf.pad(tokenizer(prompts)["input_ids"], tokenizer.pad_token_id, "left")
        uniforms = torch.from_numpy(rng.random((len(prompts), LENGTH), np.float32))
        tokens, response, _ = rlhf.sample(lm, ids, mask, uniforms, tokenizer.eos_token_id, tokenizer.pad_token_id, 1.0)
        ended = (tokens == tokenizer.eos_token_id).any(1).tolist()
        completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = gold.score(prompts, completions)
        for n in range(0, len(prompts), 2):
            if ended[n] and ended[n + 1] and completions[n].strip() and completions[n + 1].strip():
                pairs.append((prompts[n], completions[n : n + 2], scores[n : n + 2]))
    pairs = [pair for pair in pairs if pair[1][0] != pair[1][1]][: TRAIN + TEST]
    assert len(pairs) == TRAIN + TEST

    scores = np.array([pair[2] for pair in pairs])
    margin = (scores[:, 0] - scores[:, 1]) / (TEMPERATURE * scores.std())
    first = rng.random(len(pairs)) < 1 / (1 + np.exp(-margin))
    rows = [{"prompt": prompt, "chosen": both[1 - int(f)], "rejected": both[int(f)]}
            for (prompt, both, _), f in zip(pairs, first, strict=True)]  # fmt: skip
    for name, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (DATA / "preferences" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    print(f"{len(rows):,} pairs; mean gold score {scores.mean():.2f}, standard deviation {scores.std():.2f}; "
          f"the label agrees with the higher score in {((margin > 0) == first).mean():.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
