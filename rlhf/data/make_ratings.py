"""Makes human_ratings/ from the data that C.J. Hutto and E. Gilbert published with VADER.

Run      pip download --no-binary :all: --no-deps --no-build-isolation vaderSentiment==3.3.2
         python rlhf/data/make_ratings.py vaderSentiment-3.3.2.tar.gz

A sentence's place is decided by the SHA-256 of its letters and digits, so it is the same on every
machine and for every order of the source. The first 1,000 are held out; the others go by turns to
the reward model and to the judge. Sentences that differ in case or punctuation only are one.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets"}
HELD_OUT = 1_000


def read_sdist(path: Path) -> dict[str, str]:
    """The text files of the archive inside the source distribution, by name."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SDIST_SHA256:
        raise SystemExit(f"error: {path} is not the source distribution of vaderSentiment 3.3.2")
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = outer.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return {
            Path(member.name).stem: archive.extractfile(member).read().decode("utf-8-sig")
            for member in archive
            if member.name.endswith(".txt") and "Snippets" in member.name
        }


def sentence_key(text: str) -> str:
    """What makes two sentences the same: letters and digits, in lower case."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def rows_of(files: dict[str, str], source: str) -> list[dict]:
    """One row per sentence, with the ratings of every person."""
    ratings = {}
    for line in files[SOURCES[source] + "_anonDataRatings"].splitlines():
        number, _, _, values = line.split("\t")
        ratings[number] = json.loads(values)
    rows = []
    for line in files[SOURCES[source] + "_GroundTruth"].splitlines():
        number, mean, text = line.split("\t")
        values = ratings[number]
        assert abs(sum(values) / len(values) - float(mean)) < 1e-3, line
        text = re.sub(r"\s+", " ", text.replace("''", '"')).strip()
        rows.append({"text": text, "source": source, "rating": round(sum(values) / len(values), 4), "ratings": values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "human_ratings")
    args = parser.parse_args()

    files = read_sdist(args.sdist)
    unique: dict[str, dict] = {}
    for row in rows_of(files, "movie") + rows_of(files, "product"):
        if key := sentence_key(row["text"]):
            unique.setdefault(key, row)
    order = sorted(unique, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    splits = {"heldout": order[:HELD_OUT], "reward": order[HELD_OUT::2], "judge": order[HELD_OUT + 1 :: 2]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, keys in splits.items():
        lines = "".join(json.dumps(unique[key], ensure_ascii=False) + "\n" for key in keys)
        packed = gzip.compress(lines.encode(), mtime=0)  # no time in the header: same rows, same bytes
        (args.out / f"{name}.jsonl.gz").write_bytes(packed)
        print(f"{name}: {len(keys):,} sentences")


if __name__ == "__main__":
    main()
