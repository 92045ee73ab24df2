# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "transformers>=5.0", "tokenizers>=0.21", "datasets>=3.0", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17",
# ]
# ///
"""Pretraining: a tiny causal language model from scratch, the one that the RLHF scripts start from.

A causal language model reads a text from left to right and says at each place how likely each word is
to come next. Training makes the words that did come likelier: maximum likelihood, nothing else. What a
model of two million parameters can learn this way depends on its text: short sentences in a few thousand
common words (Eldan and Li 2023), and whole words as tokens, so that it cannot write one that does not exist.

    minimise  - mean over texts and places of  log p(word_t | word_1 ... word_{t-1})

Papers   Bengio et al. 2003, A Neural Probabilistic Language Model, JMLR 3
         Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762
         Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
         Eldan and Li 2023, TinyStories, arXiv 2305.07759

Run      python rlhf/pretrain.py --bf16
         python rlhf/pretrain.py --total-episodes 20000 --hidden 64 --layers 2         (quick, and it shows)
         python rlhf/pretrain.py --model rlhf/data/tiny_lm --total-episodes 20000 --learning-rate 3e-4
         python rlhf/pretrain.py --dataset roneneldan/TinyStories --max-length 256 --max-vocab 8000
         python rlhf/pretrain.py --eval runs/<folder>

Expect   seed 1 with --bf16, the model in data/tiny_lm: held-out loss 3.57 nats a token (perplexity 35), distinct-2
         .78 in 512 samples of 10.2 words, after 112,000 texts (3.5 passes) and 405 s on one core of a busy
         machine. About half of its sentences read well. Other seeds and a GPU: not measured yet.

Folder   besides the usual: lm/, which from_pretrained loads, and samples.txt. Steps are texts read, with
         repetition. summary.json has valid_loss (nats a token on texts left out), valid_perplexity,
         distinct_2 (different pairs of neighbouring words over all pairs, in samples) and mean_words.

Deviations from GPT-2
 1. Words, not pieces of words. A token is a word with the space before it, or a punctuation mark; a rarer
    word is <unk>, which is never a target, so the model does not learn to write it.
 2. <bos>, <eos>, <pad> and <unk> are four different tokens: where padding is the end token, masks built
    from tokens lose the end of the text, and a model that learns from them cannot stop.
 3. Each text is a row of its own. Half of the batches begin with <bos> and half with the first word, so
    the model knows both beginnings: its tokenizer adds nothing to a prompt.
 4. No dropout: a text is seen a few times only.
 5. Batches hold texts of similar length, which leaves little padding to compute.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import platform
import re
import sys
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# 1. Settings ------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"
SPECIAL = ("<pad>", "<eos>", "<unk>", "<bos>")


@dataclass
class Args:
    model: str = "new"  # new builds a model and its tokenizer; a hub name or a folder goes on with that one
    dataset: str = str(DATA / "corpus")  # texts to learn from: a hub name, a folder, a .jsonl or .csv file
    seed: int = 1  # seed of every random number: weights, order of the texts, samples
    total_episodes: int = 112_000  # texts to read, with repetition
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where training runs; auto is a GPU if there is one
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    eval: str | None = None  # evaluate this saved run and exit
    resume: str | None = None  # go on with this interrupted run
    eval_episodes: int = 512  # texts sampled at the end, to read and to count

    text_column: str = "text"  # column of the texts
    valid_percent: float = 2.0  # share of the texts left out to measure the loss on, chosen by their checksum
    max_length: int = 32  # longest text in tokens; longer ones lose their end
    max_vocab: int = 5_000  # tokens of a new model's vocabulary: the commonest words
    hidden: int = 176  # width of a new model; a multiple of heads
    layers: int = 4  # layers of a new model
    heads: int = 4  # attention heads per layer of a new model
    batch_size: int = 64  # texts per step
    learning_rate: float = 2e-3  # AdamW's step size after warm-up; 3e-4 to go on with tiny_lm, 1e-4 with larger models
    warmup: int = 6_400  # texts over which the learning rate rises from zero
    weight_decay: float = 0.1  # AdamW's weight decay, on matrices only
    max_grad_norm: float = 1.0  # the gradient's norm is scaled down to at most this
    bf16: bool = False  # compute in bfloat16 (weights stay float32); faster where the processor knows it
    report_every: int = 3_200  # texts between reports
    valid_every: int = 32_000  # texts between measurements of the held-out loss

    def __post_init__(self):
        check(self, "> 0", "total_episodes", "eval_episodes", "max_vocab", "hidden", "layers", "heads", "batch_size")
        check(self, "> 0", "learning_rate", "max_grad_norm", "report_every", "valid_every")
        check(self, ">= 0", "warmup", "weight_decay")
        if self.hidden % self.heads:
            fail(f"--hidden {self.hidden} must be a multiple of --heads {self.heads}")
        if not 0 < self.valid_percent <= 50:
            fail(f"--valid-percent must be in (0, 50], not {self.valid_percent}")
        if self.max_length < 2 or self.max_vocab <= len(SPECIAL):
            fail(f"--max-length must be at least 2 and --max-vocab more than {len(SPECIAL)}")


PRESETS: dict[str, dict[str, Any]] = {}


# 2. Data ----------------------------------------------------------------------------------------


def load_split(name: str, split: str) -> datasets.Dataset:
    """One split of a dataset: a hub name, a folder, or a .csv, .json(l) or .parquet file, whose split is train."""
    datasets.disable_progress_bars()
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    cache = None
    if Path(name).exists():  # the library's cache knows a folder by its last name, and confuses two of one name
        files = [f"{path.resolve()} {path.stat().st_mtime_ns}" for path in (Path(name), *sorted(Path(name).rglob("*")))]
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"{zlib.crc32(repr(files).encode()):08x}")
    try:
        if Path(name).is_file():
            return datasets.load_dataset(kinds[Path(name).suffix], data_files=name, split=split, cache_dir=cache)
        return datasets.load_dataset(name, split=split, cache_dir=cache)
    except Exception as error:  # the loader has no common class of errors
        fail(f"cannot load the split {split!r} of the dataset {name}: {error}")


def load_texts(args: Args) -> tuple[list[str], list[str]]:
    """The texts to learn from and those left out. A text's checksum decides, so repeated ones stay together."""
    data = load_split(args.dataset, "train")
    if args.text_column not in data.column_names:
        fail(f"the dataset has no column {args.text_column!r}; it has {', '.join(data.column_names)}")
    texts = [text for text in data[args.text_column] if text]
    out = [zlib.crc32(text.encode()) % 10_000 < 100 * args.valid_percent for text in texts]
    train = [text for text, left_out in zip(texts, out, strict=True) if not left_out]
    valid = [text for text, left_out in zip(texts, out, strict=True) if left_out]
    if not train or not valid:
        fail(f"--dataset {args.dataset} has {len(texts)} texts, too few to train on some and measure on others")
    return train, valid


def build_tokenizer(texts: list[str], max_vocab: int) -> PreTrainedTokenizerFast:
    """Whole words, each with the space before it, and punctuation marks; decoding joins them again."""
    splitter = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+('[a-z]+)*| ?[^A-Za-z]"), behavior="isolated")
    counts = Counter(token for text in texts for token, _ in splitter.pre_tokenize_str(text))
    common = sorted(counts, key=lambda token: (-counts[token], token))[: max_vocab - len(SPECIAL)]
    words = Tokenizer(models.WordLevel({token: n for n, token in enumerate((*SPECIAL, *common))}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = splitter, decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<bos>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each text and the end token; a text cut at max_length does not end there and has none."""
    return [(ids + [tokenizer.eos_token_id])[:max_length] for ids in tokenizer(texts)["input_ids"]]


def batches_of(rows: list[list[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of one epoch, as lists of indices; the same for the same seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    order, pool = rng.permutation(len(rows)), 50 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool].tolist(), key=lambda index: len(rows[index]))
        batches += [near[n : n + batch_size] for n in range(0, len(near), batch_size)]
    return [batches[n] for n in rng.permutation(len(batches))]


def pad_batch(rows: list[list[int]], tokenizer: Any, with_bos: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [B, T]; -100 stands where nothing is to be learnt: padding and unknown words."""
    rows = [[tokenizer.bos_token_id, *row] for row in rows] if with_bos else rows
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    learnt = real & (ids != tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else real
    return ids[:, :-1].to(device), ids.masked_fill(~learnt, -100)[:, 1:].to(device)


# 3. Model ---------------------------------------------------------------------------------------


def make_lm(args: Args, texts: list[str]) -> tuple[Any, nn.Module]:
    """Tokenizer and model: new ones, or those that --model names."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.model != "new":
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        except Exception as error:  # the loader has no common class of errors
            fail(f"cannot load the language model {args.model!r}: {error}; --model takes new, a hub name or a folder")
        for name in ("pad_token", "bos_token"):
            if getattr(tokenizer, name) is None:
                setattr(tokenizer, name, tokenizer.eos_token)
        return tokenizer, lm  # without dropout: from_pretrained returns it in eval mode
    tokenizer = build_tokenizer(texts, args.max_vocab)
    return tokenizer, GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=max(64, args.max_length + 1), n_embd=args.hidden,
        n_layer=args.layers, n_head=args.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def adamw(lm: nn.Module, args: Args) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves gains and biases alone."""
    matrices = [p for p in lm.parameters() if p.ndim > 1]
    vectors = [p for p in lm.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=lm.device.type != "mps")


# 4. The mathematics -----------------------------------------------------------------------------


def lm_loss(lm: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets in nats, [B, T] -> scalar.

    Padding stands on the right, and attention looks to the left, so no word sees it and no attention mask is
    needed. The logits are the model's own: some models scale or cap them after the output layer.
    """
    logits = lm(input_ids=inputs, use_cache=False).logits  # [B, T, V]
    counts = targets != -100
    return F.cross_entropy(logits[counts].float(), targets[counts])


def learning_rate_at(step: int, args: Args) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < args.warmup:
        return args.learning_rate * (step + args.batch_size) / (args.warmup + args.batch_size)
    done = min(1.0, (step - args.warmup) / max(1, args.total_episodes - args.warmup))
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def distinct_2(rows: list[list[str]]) -> float:
    """Different pairs of neighbouring words over all pairs: 1 never repeats itself, near 0 does all the time."""
    pairs = [pair for words in rows for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    train_texts, valid_texts = load_texts(args)
    tokenizer, lm = make_lm(args, train_texts)
    lm.to(device)
    optimizer = adamw(lm, args)
    rows, valid_rows = (encode(tokenizer, texts, args.max_length) for texts in (train_texts, valid_texts))
    run = Run(args, Path(args.dataset).stem, args.total_episodes, episodes=False, lm=lm, optimizer=optimizer)
    if args.eval:
        results, samples = evaluate(args, lm, tokenizer, valid_rows)
        print("\n".join(samples[:20]))
        return run.finish(**results)
    cut = sum(row[-1] != tokenizer.eos_token_id for row in rows)
    parameters = sum(p.numel() for p in lm.parameters())
    print(f"{len(rows):,} texts ({cut:,} longer than --max-length lose their end), {len(valid_rows):,} left out · "
          f"{len(tokenizer):,} words · {parameters:,} parameters")  # fmt: skip

    with run:
        step, history = run.step, []
        while step < args.total_episodes:
            epoch, done = divmod(step, len(rows))
            for number, batch in enumerate(batches_of(rows, args.batch_size, args.seed, epoch)):
                if done > 0:  # read before the run was interrupted
                    done -= len(batch)
                    continue
                if step >= args.total_episodes:
                    break
                lr = learning_rate_at(step, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                inputs, targets = pad_batch([rows[n] for n in batch], tokenizer, number % 2 == 0, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    loss = lm_loss(lm, inputs, targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(lm.parameters(), args.max_grad_norm)
                optimizer.step()
                history.append(torch.stack((loss.detach(), grad_norm)))
                before, step = step, step + len(batch)
                if step // args.report_every > before // args.report_every or step >= args.total_episodes:
                    measure = step // args.valid_every > before // args.valid_every or step >= args.total_episodes
                    mean_loss, mean_norm = torch.stack(history).mean(0).tolist()
                    history.clear()
                    run.report(step, {
                        "losses/lm_loss": mean_loss, "charts/learning_rate": lr, "charts/grad_norm": mean_norm,
                        "losses/valid_loss": valid_loss(args, lm, tokenizer, valid_rows) if measure else None,
                    })  # fmt: skip

    results, samples = evaluate(args, lm, tokenizer, valid_rows)
    lm.save_pretrained(run.folder / "lm")
    tokenizer.save_pretrained(run.folder / "lm")
    (run.folder / "samples.txt").write_text("\n".join(samples) + "\n", encoding="utf-8")
    return run.finish(**results)


# 6. Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def valid_loss(args: Args, lm: nn.Module, tokenizer: Any, rows: list[list[int]]) -> float:
    """Mean loss per token on texts left out, each begun with <bos>."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 256):
        inputs, targets = pad_batch(rows[start : start + 256], tokenizer, True, lm.device)
        tokens = int((targets != -100).sum())
        total += lm_loss(lm, inputs, targets).item() * tokens
        count += tokens
    return total / max(1, count)


@torch.no_grad()
def sample(args: Args, lm: nn.Module, tokenizer: Any) -> list[str]:
    """Texts from <bos> on, at temperature 1 and with nothing cut off; a random stream of their own."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(args.seed + 10_000)
        start = torch.full((args.eval_episodes, 1), tokenizer.bos_token_id, device=lm.device)
        ids = lm.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=args.max_length, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def evaluate(args: Args, lm: nn.Module, tokenizer: Any, valid_rows: list[list[int]]) -> tuple[dict, list[str]]:
    """The held-out loss, what it means in words, and samples."""
    samples = sample(args, lm, tokenizer)
    loss = valid_loss(args, lm, tokenizer, valid_rows)
    words = [text.split() for text in samples]
    results = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700)), "distinct_2": distinct_2(words),
               "mean_words": sum(map(len, words)) / len(words)}  # fmt: skip
    return results, samples


# 7. Run record ----------------------------------------------------------------------------------
# Settings, checkpoint and run folder. The same text in every script: read it once, then skip it.


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line; status 2 stands for wrong usage."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def check(args: Args, rule: Literal["> 0", ">= 0", "in [0, 1]"], *names: str) -> None:
    """Ends the program with one line if one of these settings breaks the rule; None is no value and passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not {"> 0": value > 0, ">= 0": value >= 0, "in [0, 1]": 0 <= value <= 1}[rule]:
            fail(f"--{name.replace('_', '-')} must be {rule}, not {value}")


def pick_device(name: str) -> torch.device:
    """The device of this name; auto is a GPU if there is one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        fail(f"--device {name} is not available on this machine; use --device cpu")
    return torch.device(name)


def parse_args(argv: list[str] | None = None) -> Args:
    """Settings: flag > saved run (with --eval, --resume) > preset of the environment > default."""
    about = (__doc__ or "").split("\n")[0]
    args = tyro.cli(Args, args=argv, description=about)
    name, path = getattr(args, "env", ""), args.eval or args.resume
    if path:
        defaults = load_checkpoint(path)["args"] | {"eval": None, "resume": None}
    elif defaults := PRESETS.get(name, {}):
        print(f"preset for {name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in defaults.items()))
    try:
        args = tyro.cli(Args, args=argv, default=Args(**defaults), description=about)
    except TypeError as error:
        fail(f"{path} was saved with other settings than this version of the script has: {error}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in [0, 2147483647], not {args.seed}")
    return args


def load_checkpoint(path: str) -> dict[str, Any]:
    """The model.pt of a run folder, tensors and plain values; loading it runs no code."""
    file = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        fail(f"there is no saved model at {file}; give a run folder")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        script = saved["script"]
    except Exception as error:  # whatever a damaged file makes the loader raise
        fail(f"{file} is not a readable checkpoint: {(str(error) or repr(error)).splitlines()[0]}")
    if script != Path(__file__).stem:
        fail(f"{file} was saved by {script}.py, not by {Path(__file__).name}")
    return saved


class Progress:
    """The progress of one stage: a bar on a terminal, ten plain lines elsewhere."""

    def __init__(self, stage: str, total: int, done: int = 0):
        self.stage, self.total, self.first, self.done = stage, total, done, done
        self.started, shown = time.perf_counter(), sys.stdout.isatty()
        self.bar = tqdm(desc=stage, total=total, initial=done, unit_scale=True, file=sys.stdout, disable=not shown)

    def update(self, done: int, text: str = "") -> None:
        if self.bar.disable and done * 10 // self.total > self.done * 10 // self.total:
            speed = (done - self.first) / (time.perf_counter() - self.started)
            left = max(0, self.total - done) / speed
            print(f"{self.stage} {done:,} of {self.total:,}  {text}  {speed:,.0f}/s  {left:.0f} s left", flush=True)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.done)
        self.done = done

    def close(self) -> None:
        self.bar.close()


class Run:
    """The folder of one run, and a context manager around its training loop.

    config.json    every setting, versions, device
    metrics.csv    one row per report; charts/episodic_* are means over the last 100 training episodes
    model.pt       the parts by name (anything with state_dict) and the record, whole or not at all:
                   at the first report, every 20 s, at the end, on Ctrl-C
    summary.json, curves.png    the result
    """

    def __init__(
        self, args: Args, name: str, total: int, threshold: float | None = None, episodes: bool = True, **parts: Any
    ):
        self.args, self.name, self.total, self.threshold, self.parts = args, name, total, threshold, parts
        self.script, self.wandb = Path(__file__).stem, None
        self.step, self.seconds, self.solved, self.rows = 0, 0.0, None, []
        self.last100 = {"return": deque(maxlen=100), "length": deque(maxlen=100)} if episodes else {}
        if path := args.eval or args.resume:
            saved = load_checkpoint(path)
            self.folder = Path(path) if Path(path).is_dir() else Path(path).parent
            self.step, self.seconds, self.solved, self.rows = (saved[k] for k in ("step", "seconds", "solved", "rows"))
            for kind, values in self.last100.items():
                values.extend(saved["last100"][kind])
            for part in parts:
                try:
                    parts[part].load_state_dict(saved["parts"][part])
                except (KeyError, RuntimeError, ValueError):
                    fail(f"the saved {part} does not fit these flags; use the environment and sizes of its training")

    def __enter__(self) -> Run:
        if self.args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs the package wandb: pip install wandb")
        modules = [sys.modules[name] for name in ("torch", "numpy", "gymnasium", "transformers") if name in sys.modules]
        config = {"script": self.script, "args": dataclasses.asdict(self.args), "python": platform.python_version()}
        config |= {"device": str(pick_device(self.args.device))} | {m.__name__: m.__version__ for m in modules}
        try:
            if not self.args.resume:
                stem = f"{self.name}__{self.script}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
                self.folder = Path(self.args.run_dir, re.sub(r"[^\w.-]+", "-", stem))
                while self.folder.exists():
                    self.folder = self.folder.with_name(self.folder.name + "-2")
                self.folder.mkdir(parents=True)
            (self.folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            self.csv = (self.folder / "metrics.csv").open("w", newline="", encoding="utf-8")
        except OSError as error:
            fail(f"cannot write the run folder: {error}")
        if self.args.track:
            try:
                self.wandb = wandb.init(name=self.folder.name, dir=self.folder, config=config)
            except wandb.Error as error:
                fail(f"Weights & Biases: {error} WANDB_MODE=offline needs no account. Nothing was trained")
        for row in self.rows:  # of the run that is resumed
            self._write(row)
        self.progress = Progress("training", self.total, self.step)
        self.reported, self.saved = time.perf_counter(), -math.inf
        self.started = self.reported - self.seconds
        return self

    def episode(self, episodic_return: float, length: int) -> None:
        """Notes a finished training episode."""
        self.last100["return"].append(float(episodic_return))
        self.last100["length"].append(int(length))

    def report(self, step: int, metrics: dict[str, float | None]) -> None:
        """Adds a row of metrics, None for "nothing yet", the headline first. One that is not finite ends the run."""
        now = time.perf_counter()
        self.seconds, speed = now - self.started, (step - self.step) / (now - self.reported)
        means = {f"charts/episodic_{kind}": sum(v) / len(v) if v else None for kind, v in self.last100.items()}
        row = {"step": step, "seconds": round(self.seconds, 3), "charts/SPS": round(speed), **means, **metrics}
        for key, value in row.items():
            if value is not None and not math.isfinite(value):
                self._stop(f"{key} is {value} at step {step}")
        self.step, self.reported = step, now
        self.rows.append(row)
        self._write(row)
        headline, value = next(iter((means or metrics).items()))
        self.progress.update(step, "" if value is None else f"{headline.split('/')[-1]} {value:.4g}")
        if self.threshold is not None and not self.solved and len(self.last100["return"]) == 100:
            self.solved = [step, self.seconds] if value >= self.threshold else None
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        if now - self.saved > 20:
            self.save()

    def _write(self, row: dict[str, float | None]) -> None:
        writer = csv.DictWriter(self.csv, list(self.rows[0]), lineterminator="\n")
        if self.csv.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self.csv.flush()

    def _stop(self, reason: str) -> NoReturn:
        file = self.folder / "model.pt"
        fail(f"{reason}; " + (f"the last good checkpoint is {file}" if file.exists() else "nothing was saved yet"), 1)

    def save(self) -> None:
        """Writes model.pt, unless a weight is not finite."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for name, state in states.items():
            if not all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor)):
                self._stop(f"the {name} is not finite at step {self.step}")
        content = {"script": self.script, "args": dataclasses.asdict(self.args), "parts": states, "rows": self.rows}
        content |= {"step": self.step, "seconds": self.seconds, "solved": self.solved}
        content |= {"last100": {kind: list(values) for kind, values in self.last100.items()}}
        torch.save(content, self.folder / "model.pt.tmp")
        os.replace(self.folder / "model.pt.tmp", self.folder / "model.pt")
        self.saved = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.progress.close()
        self.csv.close()
        if kind in (None, KeyboardInterrupt):
            self.save()
        if kind and self.wandb:
            self.wandb.finish(exit_code=1)
        if kind is KeyboardInterrupt:
            fail(f"interrupted at step {self.step}; go on with --resume {self.folder}", 130)

    def finish(self, returns: np.ndarray | None = None, **results: Any) -> Path:
        """Prints the result; after training it writes summary.json and curves.png too. Returns the folder."""
        line = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in results.items() if isinstance(value, float)]
        if returns is not None:
            mean, std = float(returns.mean()), float(returns.std())
            line.insert(0, f"{len(returns)} evaluation episodes: return {mean:.1f} ± {std:.1f}")
            results |= {"eval_episodes": len(returns), "eval_return_mean": mean, "eval_return_std": std}
        if self.threshold is not None:
            step, seconds = self.solved or (None, None)
            line.append(f"threshold {self.threshold:g} " + (f"after {seconds:.2f} s" if self.solved else "not reached"))
            results |= {"solved_step": step, "solved_seconds": seconds}
        print(*line, f"{self.seconds:.1f} s of training", self.folder, sep=" · ")
        if self.args.eval:
            return self.folder
        summary = {"script": self.script, "env": self.name, "seed": self.args.seed, "steps": self.step}
        summary |= {"train_seconds": self.seconds, "sps": round(self.step / max(self.seconds, 1e-9))} | results
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        self._draw()
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        return self.folder

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        keys = [key for key in self.rows[0] if key != "step" and any(row[key] is not None for row in self.rows)]
        figure = Figure(figsize=(16, 3 * math.ceil(len(keys) / 4)), layout="constrained")
        for place, key in enumerate(keys, start=1):
            axis = figure.add_subplot(math.ceil(len(keys) / 4), 4, place, title=key)
            axis.plot(*zip(*((row["step"], row[key]) for row in self.rows if row[key] is not None), strict=True))
            if key == "charts/episodic_return" and self.threshold is not None:
                axis.axhline(self.threshold, color="tab:red", linestyle="--")
            axis.locator_params(nbins=5)
            axis.grid(alpha=0.3)
        figure.suptitle(f"{self.name} · {self.script} · seed {self.args.seed} · over steps")
        figure.savefig(self.folder / "curves.png")


# 8. Command line --------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.set_flush_denormal(True)  # numbers below 1e-38 are nothing to learn from, and slow many times over
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        train(parse_args())
    except KeyboardInterrupt:
        fail("interrupted", 130)
