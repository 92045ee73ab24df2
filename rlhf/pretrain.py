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

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
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
    model: str = "new"
    """new builds a model and its tokenizer; a hub name or a folder goes on with that one"""
    dataset: str = str(DATA / "corpus")
    """texts to learn from: a hub name or a folder"""
    seed: int = 1
    """seed of every random number: weights, order of the texts, samples; >= 0"""
    total_episodes: int = 112_000
    """texts to read, with repetition"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where training runs; auto is the GPU where there is one"""
    track: bool = False
    """send the metrics to Weights & Biases too (WANDB_MODE=offline keeps them on this machine)"""
    wandb_project: str = "plainrl"
    """the project's name on Weights & Biases"""
    wandb_entity: str | None = None
    """the user or team on Weights & Biases; None is your default one"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""
    eval: str | None = None
    """evaluate this saved run (a run folder or its model.pt) and exit"""
    resume: str | None = None
    """go on with this interrupted run (a run folder or its model.pt)"""
    eval_episodes: int = 512
    """texts sampled at the end, to read and to count; >= 1"""

    text_column: str = "text"
    """column of the texts"""
    valid_percent: float = 2.0
    """share of the texts left out to measure the loss on, chosen by their checksum; in (0, 50]"""
    max_length: int = 32
    """longest text in tokens; longer ones lose their end"""
    max_vocab: int = 5_000
    """tokens of a new model's vocabulary: the commonest words"""
    hidden: int = 176
    """width of a new model; a multiple of heads"""
    layers: int = 4
    """layers of a new model"""
    heads: int = 4
    """attention heads per layer of a new model"""
    batch_size: int = 64
    """texts per step"""
    learning_rate: float = 2e-3
    """AdamW's step size after warm-up; less to go on with a trained model: 3e-4 for tiny_lm, 1e-4 for larger ones"""
    warmup: int = 6_400
    """texts over which the learning rate rises from zero"""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only; >= 0"""
    max_grad_norm: float = 1.0
    """the gradient's norm is scaled down to at most this; > 0"""
    bf16: bool = False
    """compute in bfloat16 (weights stay float32); faster where the processor knows it"""
    report_every: int = 3_200
    """texts between reports"""
    valid_every: int = 32_000
    """texts between measurements of the held-out loss"""


PRESETS: dict[str, dict[str, Any]] = {}


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_episodes", "eval_episodes", "max_vocab", "hidden", "layers", "heads", "batch_size",
                 "learning_rate", "max_grad_norm", "report_every", "valid_every"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "warmup", "weight_decay"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    if args.hidden % args.heads:
        fail(f"--hidden {args.hidden} must be a multiple of --heads {args.heads}")
    if not 0 < args.valid_percent <= 50:
        fail(f"--valid-percent must lie in (0, 50], not {args.valid_percent}")
    if args.max_length < 2 or args.max_vocab <= len(SPECIAL):
        fail(f"--max-length must be at least 2 and --max-vocab more than {len(SPECIAL)}")


# 2. Data ----------------------------------------------------------------------------------------


def load_texts(args: Args) -> tuple[list[str], list[str]]:
    """The texts to learn from and those left out. A text's checksum decides, so repeated ones stay together."""
    datasets.disable_progress_bars()
    cache = None
    if Path(args.dataset).is_dir():  # the library's cache knows a folder by its last name, and confuses two of one name
        files = [f"{path.resolve()} {path.stat().st_mtime_ns}" for path in sorted(Path(args.dataset).rglob("*"))]
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"{zlib.crc32(repr(files).encode()):08x}")
    try:
        data = datasets.load_dataset(args.dataset, split="train", cache_dir=cache)
    except Exception as error:  # the loader has no common class of errors
        fail(f"cannot load --dataset {args.dataset}: {error}")
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

CURVES = ("losses/lm_loss", "losses/valid_loss", "charts/learning_rate")


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    seed_everything(args.seed)

    train_texts, valid_texts = load_texts(args)
    tokenizer, lm = make_lm(args, train_texts)
    lm.to(device)
    optimizer = adamw(lm, args)
    rows, valid_rows = (encode(tokenizer, texts, args.max_length) for texts in (train_texts, valid_texts))
    if saved:
        restore(saved, lm=lm, optimizer=optimizer)
    parameters = sum(p.numel() for p in lm.parameters())
    print(f"{len(rows):,} texts, {len(valid_rows):,} left out · {len(tokenizer):,} words · {parameters:,} parameters")

    def state() -> dict[str, Any]:
        return {"lm": lm.state_dict(), "optimizer": optimizer.state_dict()}

    with RunRecord(args, Path(args.dataset).name, args.total_episodes, device, state, CURVES, saved) as run:
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
                        "charts/learning_rate": lr, "charts/grad_norm": mean_norm, "losses/lm_loss": mean_loss,
                        "losses/valid_loss": valid_loss(args, lm, tokenizer, valid_rows) if measure else None,
                    })  # fmt: skip

        results, samples = evaluate(args, lm, tokenizer, valid_rows)
        lm.save_pretrained(run.folder / "lm")
        tokenizer.save_pretrained(run.folder / "lm")
        (run.folder / "samples.txt").write_text("\n".join(samples) + "\n", encoding="utf-8")
        run.finish(None, **results)
    return run.folder


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


def evaluate_saved(args: Args) -> None:
    """--eval: rebuilds the saved model, measures it and prints samples."""
    validate(args)
    saved = load_checkpoint(args.eval)
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    train_texts, valid_texts = load_texts(args)
    tokenizer, lm = make_lm(args, train_texts)
    restore(saved, lm=lm)
    results, samples = evaluate(args, lm.to(device), tokenizer, encode(tokenizer, valid_texts, args.max_length))
    print("\n".join(samples[:20]))
    figures = " · ".join(f"{name} {value:.4g}" for name, value in results.items())
    print(f"{figures} · {checkpoint_path(args.eval).parent}")


# 7. Run record ----------------------------------------------------------------------------------
# Command line, seeds, checkpoints and the run folder. The same text in every script: a reader who
# has read it once may skip it.


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line; status 2 stands for wrong usage."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def parse_args(cls: type, presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> Any:
    """Settings from the command line: flag > saved run (--eval, --resume) or preset > default."""

    def parse(default: Any) -> Any:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                return tyro.cli(cls, args=argv, default=default, description=(__doc__ or "").split("\n")[0])
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            box = re.sub(r"[│─╭╮╰╯]|-{5,}", " ", errors.getvalue())  # tyro's message stands in a box,
            message = box.partition("\n")[2].strip()  # under a title
            fail(re.split(r"\n\s*\n", message)[0].rstrip(" .") + "; --help lists every flag")  # and above a rule

    args = parse(cls())
    if path := args.eval or args.resume:
        try:
            return parse(cls(**load_checkpoint(path)["args"]))
        except TypeError as error:
            fail(f"{path} was saved with other settings than this version of the script has: {error}")
    name = getattr(args, "env", None)
    if name not in presets:
        return args
    print(f"preset for {name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in presets[name].items()))
    return parse(dataclasses.replace(cls(), **presets[name]))


def pick_device(name: str, auto: str) -> torch.device:
    """The torch device called name, or the one that suits this script for "auto"."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = auto if name == "auto" else name
    if not available[name]:
        fail(f"--device {name} is not available on this machine; use --device cpu")
    if name == "cpu":
        torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    return torch.device(name)


def seed_everything(seed: int) -> np.random.Generator:
    """Seeds Python and torch once, and returns the NumPy generator that the script draws from."""
    random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def checkpoint_path(path: str) -> Path:
    """model.pt of a run folder, or the file itself."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path: str) -> dict[str, Any]:
    """A dictionary of tensors and plain values; loading it runs no code."""
    file = checkpoint_path(path)
    if not file.is_file():
        fail(f"there is no saved model at {file}; give a run folder or its model.pt")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        script = saved["script"]
    except Exception as error:  # whatever a damaged file makes the loader raise
        fail(f"{file} is not a readable checkpoint: {(str(error) or repr(error)).splitlines()[0]}")
    if script != Path(__file__).stem:
        fail(f"{file} was saved by {script}.py, not by {Path(__file__).name}")
    return saved


def restore(saved: dict[str, Any], **parts: Any) -> None:
    """restore(saved, agent=agent) is agent.load_state_dict(saved["agent"]), or one line if it does not fit."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError):
            fail(f"the saved {name} does not fit these flags; use the environment and sizes it was trained with")


class RunRecord:
    """The run folder of one training, a context manager around its loop.

    config.json    every setting, versions, device
    metrics.csv    a row per report; charts/episodic_* are means over the last 100 finished episodes
    model.pt       state() and what resuming needs; at the first report, every 20 s, at the end, on Ctrl-C
    curves.png     the metrics named in curves
    summary.json   the result
    """

    def __init__(
        self, args: Any, name: str, total: int, device: torch.device, state: Callable[[], dict[str, Any]],
        curves: tuple[str, ...], saved: dict[str, Any] | None = None, threshold: float | None = None,
    ):  # fmt: skip
        self.args, self.name, self.total, self.state, self.curves = args, name, total, state, curves
        self.threshold, self.columns = threshold, []
        self.script = Path(__file__).stem
        record = saved["record"] if saved else {"step": 0, "seconds": 0.0, "solved": None, "returns": [], "lengths": []}
        self.step, self.seconds, self.solved = record["step"], record["seconds"], record["solved"]
        self.returns, self.lengths = deque(record["returns"], 100), deque(record["lengths"], 100)
        if args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs the package wandb: pip install wandb")
        try:
            self.folder = checkpoint_path(args.resume).parent if saved else self._new_folder()
            libraries = {"torch", "numpy", "gymnasium", "transformers", "trl"} & set(sys.modules)
            versions = {name: sys.modules[name].__version__ for name in sorted(libraries)}
            config = {"script": self.script, "args": dataclasses.asdict(args), "device": str(device),
                      "python": platform.python_version(), "platform": platform.platform(), **versions}  # fmt: skip
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if saved:
                self._drop_rows_after(self.step)
            self.csv = (self.folder / "metrics.csv").open("a", newline="", encoding="utf-8")
        except OSError as error:
            fail(f"cannot write the run folder: {error}")
        self.video_folder = self.folder / "videos" if getattr(args, "capture_video", False) else None
        self.wandb = None
        if args.track:
            try:
                self.wandb = wandb.init(project=args.wandb_project, entity=args.wandb_entity, name=self.folder.name,
                                        config=dataclasses.asdict(args), dir=str(self.folder))  # fmt: skip
            except wandb.Error as error:
                fail(f"Weights & Biases: {error} WANDB_MODE=offline needs no account. Nothing was trained")

    def _new_folder(self) -> Path:
        stem = f"{self.name.replace('/', '-')}__{self.script}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                folder = Path(self.args.run_dir) / (stem + suffix)
                folder.mkdir(parents=True)
                return folder
        raise OSError(f"{stem} is taken")

    def _drop_rows_after(self, step: int) -> None:
        """Cuts metrics.csv back to the checkpoint that is resumed."""
        rows = (self.folder / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows[1:] if row.endswith("\n") and int(row.split(",")[0]) <= step]
        (self.folder / "metrics.csv.tmp").write_text("".join(rows[:1] + kept), encoding="utf-8")
        os.replace(self.folder / "metrics.csv.tmp", self.folder / "metrics.csv")

    def __enter__(self) -> RunRecord:
        self.started = self.reported = time.perf_counter()
        self.started -= self.seconds
        self.saved = -math.inf
        self.bar = tqdm(total=self.total, initial=self.step, unit=" steps", unit_scale=True, file=sys.stdout,
                        disable=not sys.stdout.isatty(), dynamic_ncols=True)  # fmt: skip
        return self

    def episode(self, step: int, episodic_return: float, length: int) -> None:
        """Notes a finished training episode, and the moment the threshold is first reached."""
        self.returns.append(float(episodic_return))
        self.lengths.append(int(length))
        if self.threshold is None or self.solved or len(self.returns) < 100:
            return
        if sum(self.returns) / 100 >= self.threshold:
            self.solved = [step, time.perf_counter() - self.started]

    def report(self, step: int, metrics: dict[str, float | None]) -> None:
        """Writes one row of metrics; None stands for "nothing yet". Ends the run on a loss that is not finite."""
        for key, value in metrics.items():
            if key.startswith("losses/") and value is not None and not math.isfinite(value):
                self._stop(f"{key} is {value} at step {step}")
        now = time.perf_counter()
        self.seconds, sps = now - self.started, (step - self.step) / (now - self.reported)
        row: dict[str, Any] = {"step": step, "seconds": round(self.seconds, 3), "charts/SPS": round(sps)}
        if "charts/episodic_return" in self.curves:  # a script without episodes has no such columns
            row["charts/episodic_return"] = sum(self.returns) / len(self.returns) if self.returns else None
            row["charts/episodic_length"] = sum(self.lengths) / len(self.lengths) if self.lengths else None
        row |= metrics
        self.columns = self.columns or list(row)
        assert list(row) == self.columns, "every report has the same metrics; None where there is nothing yet"
        writer = csv.writer(self.csv, lineterminator="\n")
        if self.csv.tell() == 0:
            writer.writerow(self.columns)
        writer.writerow(row.values())
        self.csv.flush()
        first = row.get(self.curves[0])  # the metric that matters most
        shown = "" if first is None else f"{self.curves[0].split('_')[-1].split('/')[-1]} {first:.4g}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.step)
        if self.bar.disable and step * 10 // self.total > self.step * 10 // self.total:
            left = self.seconds / step * (self.total - step)
            progress = f"step {step:,} of {self.total:,}"
            print(f"{progress}  {shown}  {sps:,.0f} steps/s  {max(left, 0):.0f} s left", flush=True)
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        self.step, self.reported = step, now
        if now - self.saved > 20:
            self.save()

    def _stop(self, reason: str) -> NoReturn:
        file = self.folder / "model.pt"
        fail(f"{reason}; " + (f"the last good checkpoint is {file}" if file.exists() else "nothing was saved yet"), 1)

    def save(self) -> None:
        """Writes model.pt whole or not at all, and never over a good one with weights that are not finite."""
        state = self.state()
        for name, part in (state | state.get("networks", {})).items():
            for tensor in part.values() if isinstance(part, dict) else ():
                if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                    self._stop(f"the {name} is not finite at step {self.step}")
        record = {"step": self.step, "seconds": self.seconds, "solved": self.solved,
                  "returns": list(self.returns), "lengths": list(self.lengths)}  # fmt: skip
        content = {"script": self.script, "args": dataclasses.asdict(self.args), "record": record, **state}
        torch.save(content, self.folder / "model.pt.tmp")
        os.replace(self.folder / "model.pt.tmp", self.folder / "model.pt")
        self.saved = time.perf_counter()

    def finish(self, evaluate: Callable[[], np.ndarray] | None, **results: Any) -> None:
        """Saves the model, evaluates it, and writes summary.json, curves.png and the last line."""
        self.save()
        self.bar.close()
        self.draw()
        summary: dict[str, Any] = {"script": self.script, "env": self.name, "seed": self.args.seed, "steps": self.step}
        summary |= {"train_seconds": round(self.seconds, 3), "sps": round(self.step / max(self.seconds, 1e-9))}
        headline = []
        if evaluate is not None:
            scores = evaluate()
            summary |= {"eval_episodes": len(scores), "eval_return_mean": float(scores.mean()),
                        "eval_return_std": float(scores.std())}  # fmt: skip
            headline.append(f"{len(scores)} evaluation episodes: return {scores.mean():.1f} ± {scores.std():.1f}")
        if self.threshold is not None:
            solved_step, solved_seconds = self.solved or (None, None)
            summary |= {"solved_step": solved_step, "solved_seconds": solved_seconds and round(solved_seconds, 3)}
            headline.append(f"threshold {self.threshold:g} reached after {solved_seconds:.2f} s" if self.solved
                            else f"threshold {self.threshold:g} not reached")  # fmt: skip
        summary |= results
        headline += [f"{key} {value:.4g}" for key, value in results.items() if isinstance(value, float)]
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if self.wandb:
            self.wandb.summary.update(summary)
        print(" · ".join([*headline, f"{self.seconds:.1f} s of training", str(self.folder)]))

    def draw(self) -> None:
        """curves.png: the metrics named in curves, against steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        with open(self.folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = min(3, len(self.curves))
        height = math.ceil(len(self.curves) / columns)
        size = (4.2 * columns, 2.9 * height)
        figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, key in zip(axes.flat, self.curves, strict=False):
            points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), color="#2a6f97", linewidth=1.6)
            if key == "charts/episodic_return" and self.threshold is not None:
                axis.axhline(self.threshold, color="#c1121f", linewidth=1, linestyle="--", label="solved")
                axis.legend(frameon=False, loc="lower right")
            axis.set_title(key.split("/")[-1].replace("_", " "), fontsize=11)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        for axis in axes.flat[len(self.curves) :]:
            axis.set_visible(False)
        figure.supxlabel("steps", fontsize=11)
        figure.suptitle(f"{self.name} · {self.script} · seed {self.args.seed}", fontsize=12)
        figure.savefig(self.folder / "curves.png", dpi=120)
        plt.close(figure)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt:
            self.save()
        self.csv.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        if kind is KeyboardInterrupt:
            fail(f"interrupted at step {self.step}; go on with --resume {self.folder}", 130)


# 8. Command line --------------------------------------------------------------------------------

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    settings = parse_args(Args, PRESETS)
    evaluate_saved(settings) if settings.eval else train(settings)
