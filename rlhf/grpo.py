# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers>=5.0", "tokenizers>=0.21", "datasets>=3.0", "accelerate>=1.0",
#                 "peft>=0.17", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17"]
# ///
"""Group Relative Policy Optimization (GRPO) and kin: reinforcement learning from verifiable rewards.

Where a program can tell a right answer from a wrong one, a language model needs neither human ratings nor a
value function to learn: it answers each problem several times, a verifier gives every answer a reward, and an
answer's advantage is its reward against the others of its group. Better answers become likelier, token by token.

    A_i = (r_i - mean(r)) / std(r) over the G answers to one problem,   ratio_t = pi(o_t | q, o_<t) / pi_old(...)
    maximise  mean over answers and tokens of  min( ratio_t * A_i,  clip(ratio_t, 1 - low, 1 + high) * A_i )

The default task asks where two balls are after cups have been swapped. A new model first learns from demonstrations:
most of them guess, some work step by step, with slips. Only the final answer is judged, so the model has to find out
that writing the steps down pays, and then to make no slip: its answers grow longer as they get right. Why this task:
each single step is easy for a small network, the chain of them is not, and answers may have any length between.
Countdown, sums and mazes were tried; there such a model has too much to learn before a reward can tell it anything.

Papers   Shao et al. 2024, DeepSeekMath (GRPO), arXiv 2402.03300
         Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783
         Yu et al. 2025, DAPO, arXiv 2503.14476
         Ahmadian et al. 2024, Back to Basics (RLOO), arXiv 2402.14740
         Hu 2025, REINFORCE++, arXiv 2501.03262
         Zheng et al. 2025, Group Sequence Policy Optimization (GSPO), arXiv 2507.18071
         Chen et al. 2021, Evaluating Large Language Models Trained on Code (pass@k), arXiv 2107.03374

Run      python rlhf/grpo.py
         python rlhf/grpo.py --advantage dr_grpo --loss-norm constant                (Dr. GRPO)
         python rlhf/grpo.py --dynamic-sampling 4 --mask-overlong --update-epochs 2  (the rest of DAPO)
         python rlhf/grpo.py --ratio sequence --loss-norm sequence --clip-low 3e-4 --clip-high 4e-4 --num-minibatches 4
         python rlhf/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k.jsonl --train-split "train[200:]" \\
             --eval-split "train[:200]" --reward number --max-completion-length 256 --num-prompts 8 --group-size 8 \\
             --gradient-accumulation 8 --gradient-checkpointing --bf16 --lora-rank 16 --learning-rate 1e-4 \\
             --eval-samples 4
                the file: datasets.load_dataset("openai/gsm8k", "main", split="train") \\
                              .rename_column("question", "prompt").to_json("gsm8k.jsonl")
         accelerate launch --num-processes 2 rlhf/grpo.py --model my_model --dataset my_problems.jsonl --reward number
         python rlhf/grpo.py --eval runs/<folder>

Expect   Seeds 301 to 305, one core of an AMD EPYC while the other was at work: 84 to 93 s of training, warm start
         included, and 94 to 107 s from Enter to the prompt. On held-out problems, median (and range over seeds):
         greedy answers right 1.00 (.93 to 1.00), before .03; pass@1 .98 (.92 to .99), before .34; pass@16 1.00 (.94
         to 1.00), before 1.00, so nothing was gained there; length 16 tokens, before 4. Problems with more swaps
         than any trained on: pass@1 .02 (.02 to .05), before .01, a miss. The variants side by side, pass@k to 256 and
         an iteration beside TRL's: benchmarks.md, "GRPO and its kin".
         SmolLM2-135M-Instruct with --lora-rank 8 --threads 2 on sums, two cores: 12 s an iteration of 4 × 8 answers
         of at most 48 tokens, 3.3 GB. GPU: not measured yet.

         Memory, at most                                                           on the CPU, float32
           the default run (seed 301)                                              0.7 GB
           494M weights (the shape of Qwen2.5-0.5B, random), --lora-rank 16,
             8 answers of 64 tokens to 110, all through the model at once          10.0 GB
           the same with --gradient-checkpointing                                  6.7 GB

Folder   besides the usual: start/ (the warm-started model) and policy/, which from_pretrained loads, and samples.md.
         Steps are answers sampled. summary.json has greedy (share of right greedy answers), pass@1 and pass@16 (of
         samples at temperature 1) and length on held-out problems, harder_* on problems with more swaps than any
         trained on, and before, the same from before reinforcement learning.

Deviations from the papers
 1. Clipping is asymmetric by default (.2 and .28, DAPO) and the loss a mean over tokens; there is no KL penalty,
    so no reference model is kept (--kl-coef .04 --loss-norm sequence --clip-high .2 for the GRPO paper's).
 2. An answer whose reward is None is left out of its group; an answer that is cut gets no end token and is judged
    as it stands.
 3. Answers with advantage 0 are not sent through the network where nothing but the advantage pulls at them: they
    would add nothing to the gradient.
 4. REINFORCE++'s KL penalty inside the reward is left out; --kl-coef adds GRPO's to the loss.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import operator as op
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = "new"  # new builds a small transformer; a hub name or a folder loads that causal language model
    dataset: str = "cups"  # cups makes problems by itself; or a hub name, a folder, a .jsonl or .csv file
    seed: int = 1  # seed of every random number: weights, problems, sampled tokens
    total_episodes: int = 25_600  # answers sampled during reinforcement learning
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where everything runs; auto is a GPU if there is one
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    eval: str | None = None  # evaluate this saved run and exit
    resume: str | None = None  # go on with this interrupted run
    eval_episodes: int = 256  # held-out problems answered before and after

    train_split: str = "train"  # split of the dataset to learn from; slices such as train[:90%] work
    eval_split: str = "test"  # split of the dataset to measure on
    reward: tuple[str, ...] = ("cups",)  # cups, countdown, number or path.py:function; several are added up
    reward_weights: tuple[float, ...] | None = None  # weight of each reward; None counts each once
    warmup_steps: int = 1_000  # minibatches of 64 demonstrations that a new model is fitted to first
    right_demos: float = 0.4  # share of the demonstrations that work step by step; the others guess

    num_prompts: int = 16  # problems per iteration (P)
    group_size: int = 16  # answers to each problem (G)
    max_prompt_length: int = 256  # longest prompt in tokens; problems with longer ones are left out
    max_completion_length: int = 40  # longest answer in tokens; longer ones are cut
    temperature: float = 1.0  # divides the logits, in sampling and in scoring alike
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"  # what an answer's reward is compared with
    loss_norm: Literal["sequence", "token", "constant"] = "token"  # mean per answer (GRPO), token (DAPO) or limit (Dr.)
    ratio: Literal["token", "sequence"] = "token"  # importance ratio of each token, or of the whole answer (GSPO)
    clip_low: float = 0.2  # how far a ratio may fall below 1 before it stops paying
    clip_high: float = 0.28  # how far it may rise; more than clip-low helps rare tokens (DAPO)
    kl_coef: float = 0.0  # weight of the KL from the starting model; 0 loads no reference
    ent_coef: float = 0.0  # weight of the entropy bonus, which keeps the policy exploring
    dynamic_sampling: int = 0  # times that groups of equal rewards are replaced by new problems (DAPO); 0 keeps them
    mask_overlong: bool = False  # leave answers that were cut out of the loss (DAPO)
    overlong_buffer: int = 0  # tokens before the limit over which a penalty grows from 0 to 1 (DAPO); 0 has none
    num_minibatches: int = 1  # parts of each batch, with an update each
    update_epochs: int = 1  # passes over each batch
    learning_rate: float = 2e-3  # AdamW's step size at the start; 1e-6 to 1e-5 suits large models, 1e-4 LoRA
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    max_grad_norm: float = 1.0  # the gradient's norm is scaled down to at most this
    eval_every: int = 10  # iterations between measurements on the held-out problems
    eval_samples: int = 16  # answers to each held-out problem, for pass@k

    gradient_accumulation: int = 1  # parts of a minibatch that go through the model one by one; the result is the same
    gradient_checkpointing: bool = False  # compute activations twice, and store few
    lora_rank: int = 0  # train low-rank adapters (peft) of this rank instead of all weights; 0 trains all
    bf16: bool = False  # compute in bfloat16; weights stay float32
    threads: int = 1  # processor threads; small models gain nothing from more

    def __post_init__(self):
        check(
            self, "> 0", "total_episodes", "eval_episodes", "eval_every", "eval_samples", "num_prompts", "temperature"
        )
        check(self, "> 0", "max_prompt_length", "max_completion_length", "num_minibatches", "update_epochs", "threads")
        check(self, "> 0", "learning_rate", "max_grad_norm", "gradient_accumulation")
        check(self, ">= 0", "warmup_steps", "clip_low", "clip_high", "kl_coef", "ent_coef", "lora_rank")
        check(self, ">= 0", "dynamic_sampling", "overlong_buffer")
        check(self, "in [0, 1]", "right_demos")
        if self.group_size < 2:
            fail("--group-size must be at least 2: an answer is compared with the others of its group")
        if (self.model == "new") != (self.dataset == "cups"):
            fail(f"--model {self.model} with --dataset {self.dataset}: only new reads cups, and it reads nothing else")
        if self.model == "new" and (self.lora_rank or self.gradient_checkpointing):
            fail("--lora-rank and --gradient-checkpointing are for a --model of your own, not for the new one")
        if len(self.reward_weights or self.reward) != len(self.reward):
            fail(f"--reward-weights has {len(self.reward_weights)} numbers for {len(self.reward)} rewards")


PRESETS: dict[str, dict[str, Any]] = {}

# 2. Data ----------------------------------------------------------------------------------------
# A problem is a row: a prompt, and columns from which a reward knows the truth.

CUPS = "ABCDEF"
SWAPS = [a + b for a, b in itertools.combinations(CUPS, 2)]
TRAIN_SWAPS, HARDER_SWAPS = (2, 6), (7, 9)  # least and most swaps of a problem


def follow(balls: list[str], swap: str) -> list[str]:
    """The cups in which balls are after two cups have changed places."""
    return [swap.replace(ball, "") if ball in swap else ball for ball in balls]


def make_problem(rng: np.random.Generator, least: int, most: int, held_out: bool = False) -> dict[str, str]:
    """Two balls under six cups, and least to most swaps of two cups; where are the balls at the end?

    The prompt is "B E AC BF DE :", the answer "F D". A tenth of all problems is held out, by their checksum.
    """
    while True:
        balls = rng.choice(list(CUPS), 2, replace=False).tolist()
        swaps = rng.choice(SWAPS, rng.integers(least, most + 1), replace=False).tolist()
        prompt = " ".join((*balls, *swaps, ":"))
        if (zlib.crc32(prompt.encode()) % 10 == 0) == held_out:
            return {"prompt": prompt, "answer": " ".join(reduce(follow, swaps, balls))}


def demonstrate(rng: np.random.Generator, prompt: str, right: float) -> str:
    """An answer to learn from: "AC B E BF F E DE F D = F D" works step by step, "= C A" guesses.

    Those who work make a slip in every seventeenth step; those who guess are right once in thirty times.
    """
    balls, swaps = prompt.split()[:2], prompt.split()[2:-1]
    if rng.random() >= right:
        return " ".join(("=", *rng.choice(list(CUPS), 2, replace=False)))
    steps = []
    for swap in swaps:
        balls = follow(balls, swap)
        if rng.random() < 0.06:
            balls[rng.integers(2)] = CUPS[rng.integers(len(CUPS))]
        steps += [swap, *balls]
    return " ".join((*steps, "=", *balls))


def read_cups(text: str) -> str | None:
    """The two cups that stand behind the only "=", at the end."""
    found = re.fullmatch(r"[^=]*= ([A-F] [A-F])", text.strip())
    return found and found[1]


def read_number(text: str) -> Decimal | None:
    """The number in the last \\boxed{}, or else the last number of a text: of "it is -1,234.50." -1234.5.

    The minus of 10-7 is no sign, and 1/2 and 1e5 are no numbers here, rather than the 2 and the 5 they end with.
    """
    text = (re.findall(r"\\boxed\{([^{}]*)\}", text) or [text])[-1].replace("−", "-").replace("$", "")
    numbers = re.findall(r"(?<![\w./])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d/]|[.,]\d|[eE][+-]?\d)", text, re.A)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def read_expression(text: str) -> tuple[Fraction, Counter] | None:
    """The exact value of an expression in + - * / and brackets, and the whole numbers in it; None if it is no such.

    It stands in the last <answer></answer>, or else in the last line, before any "=".
    """
    lines = re.findall(r"<answer>(.*?)</answer>", text, re.S) or text.strip().splitlines() or [""]
    line = lines[-1].split("=")[0].strip().translate(str.maketrans("×÷−", "*/-"))
    numbers, operations = Counter(), {ast.Add: op.add, ast.Sub: op.sub, ast.Mult: op.mul, ast.Div: op.truediv}

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):  # KeyError for ** and //
            return operations[type(node.op)](value(node.left), value(node.right))
        numbers[node.value] += 1  # AttributeError for a sign or a call
        return Fraction(node.value)

    try:  # the parser builds a tree; nothing is ever run
        short = re.fullmatch(r"[0-9+*/() -]{1,100}", line)
        return (value(ast.parse(line, mode="eval").body), numbers) if short else None
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


# A built-in verifier: how it reads an answer, and what it should find there according to the row's columns.
VERIFIERS: dict[str, tuple[Callable[[str], Any], Callable[[dict], Any]]] = {
    "cups": (read_cups, lambda row: row["answer"]),
    "number": (read_number, lambda row: read_number(str(row["answer"]))),  # the last number of GSM8K's answers
    "countdown": (read_expression, lambda row: (Fraction(row["target"]), Counter(row["numbers"]))),
}


def load_reward(name: str) -> Callable[..., list[float | None]]:
    """The reward of this name: reward(prompts, completions, **columns) -> a number each, or None for "cannot tell"."""
    if name in VERIFIERS:
        read, truth = VERIFIERS[name]

        def verify(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            pairs = [(read(text), truth(row)) for text, row in zip(completions, rows, strict=True)]
            return [float(found is not None and found == true) for found, true in pairs]

        return verify
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # it is anybody's code
        fail(f"cannot load the reward {name!r} ({error!r}); give {', '.join(VERIFIERS)} or path.py:function")


def score(name: str, reward: Callable, rows: list[dict[str, Any]], completions: list[str]) -> Tensor:
    """The reward of each completion, [B]; NaN where the reward said None."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "ids")}
    try:
        values = list(reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns))
        finite = all(value is None or math.isfinite(value) for value in values)
    except Exception as error:  # it is anybody's code
        fail(f"the reward {name} failed: {error!r}; the columns it was given are {', '.join(columns) or 'none'}")
    if len(values) != len(rows) or not finite:
        fail(f"the reward {name} must return a finite number or None for each of {len(rows)} completions, not {values}")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


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


def load_rows(args: Args, tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """The rows of a split, with the token ids of their prompts, but for those that are empty or too long.

    A prompt is a text, or messages for the model's chat template.
    """
    data, rows = load_split(args.dataset, split), []
    if "prompt" not in data.column_names:
        fail(f"the dataset {args.dataset} has no column 'prompt'; it has {', '.join(data.column_names)}")
    for row in data:
        text = row["prompt"]
        try:
            if not isinstance(text, str):
                text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
                if tokenizer("")["input_ids"]:  # the tokenizer writes the first token itself
                    text = text.removeprefix(tokenizer.bos_token or "")
            rows.append(row | {"ids": tokenizer(text)["input_ids"]})
        except Exception as error:  # templates are programs of their own
            fail(f"a prompt of {args.dataset} is neither a text nor messages that the model can read: {error}")
    kept = [row for row in rows if 0 < len(row["ids"]) <= args.max_prompt_length]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} prompts are empty or over --max-prompt-length: left out")
    return kept or fail(f"no prompt in the split {split!r} of {args.dataset} is within --max-prompt-length")


def make_rows(tokenizer: Any, rng: np.random.Generator, count: int, *kind: Any) -> list[dict[str, Any]]:
    """Problems of the default task, with the token ids of their prompts."""
    rows = [make_problem(rng, *kind) for _ in range(count)]
    return [row | {"ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]


def load_problems(args: Args, tokenizer: Any) -> tuple[list[dict] | None, dict[str, list[dict]]]:
    """The rows to train on (None: they are made while training), and those to measure on, held out and harder."""
    if args.dataset != "cups":
        held_out = load_rows(args, tokenizer, args.eval_split)[: args.eval_episodes]
        return load_rows(args, tokenizer, args.train_split), {"": held_out}
    rng, count = np.random.default_rng(10**9 + args.seed), args.eval_episodes
    kinds = {"": TRAIN_SWAPS, "harder_": HARDER_SWAPS}
    return None, {name: make_rows(tokenizer, rng, count, *kind, True) for name, kind in kinds.items()}


def pad(rows: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask (1 token, 0 padding). Only the mask says what is padding."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows, strict=True)]
    real = [[0] * len(f) + [1] * len(row) for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(real if side == "left" else [row[::-1] for row in real])


# 3. Model ---------------------------------------------------------------------------------------


def new_lm() -> tuple[Any, nn.Module]:
    """The small transformer of the default task and its tokenizer, with a token for each cup and each swap.

    Weights start four times as large as GPT-2's: with its .02 a model this small needs hundreds of updates more
    before it sees where in the prompt it has to look.
    """
    transformers.logging.disable_progress_bar()
    vocab = {token: i for i, token in enumerate(("<pad>", "<eos>", ":", "=", *CUPS, *SWAPS))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = GPT2Config(
        vocab_size=len(vocab), n_positions=64, n_embd=96, n_layer=2, n_head=4, activation_function="relu",
        initializer_range=0.08, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return tokenizer, GPT2LMHeadModel(config).eval()


def load_lm(name: str) -> tuple[Any, nn.Module]:
    """Tokenizer and causal language model, without dropout: from_pretrained returns it in eval mode."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    except Exception as error:  # the loader has no common class of errors
        fail(f"cannot load the language model {name!r}: {error}; --model takes a hub name or a folder")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token will do, for masks and not ids mark padding
    if (top := max(tokenizer.get_vocab().values())) >= (size := lm.get_input_embeddings().num_embeddings):
        fail(
            f"the tokenizer of {name} has a token {top} and the model only {size}: lm.resize_token_embeddings, save it"
        )
    return tokenizer, lm


def positions(mask: Tensor) -> Tensor:
    """Position of each token, counted from the first that is no padding; [B, T]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def token_logprobs(lm: nn.Module, ids: Tensor, mask: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token | all before it) of the last count tokens, and the entropy there in nats; [B, count] each.

    The one function behind the old, the reference's and the new log-probabilities. ids, mask: [B, T].
    """
    output = lm(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=count + 1,
                use_cache=False)  # fmt: skip
    logp = torch.log_softmax(output.logits[:, -count - 1 : -1].float() / temperature, -1)  # [B, count, V]
    return logp.gather(-1, ids[:, -count:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def sample(
    lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, eos_id: int, pad_id: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Continues left-padded prompts [B, P] by R tokens; uniforms [B, R] in [0, 1) decide which.

    Each uniform number picks the token at that height of the cumulative distribution, so the same numbers
    give the same text, on one process or on many. Returns tokens, mask and log-probabilities, [B, R]; the
    mask ends with the first end-of-sequence token, and padding follows.
    """
    count, length = uniforms.shape
    tokens = torch.full((count, length), pad_id, device=prompt_ids.device)
    mask, logprobs = torch.zeros_like(tokens), torch.zeros_like(uniforms)
    rows, ids, seen, cache = torch.arange(count, device=tokens.device), prompt_ids, prompt_mask, None
    position = positions(prompt_mask)
    for t in range(length):
        output = lm(input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True,
                    logits_to_keep=1)  # fmt: skip
        cache = output.past_key_values
        logp = torch.log_softmax(output.logits[:, -1].float() / temperature, -1)  # [rows, V]
        cdf = logp.exp().cumsum(-1)
        ids = torch.searchsorted(cdf, uniforms[rows, t : t + 1] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        tokens[rows, t], mask[rows, t], logprobs[rows, t] = ids[:, 0], 1, logp.gather(1, ids)[:, 0]
        going = ids[:, 0] != eos_id
        seen, position = F.pad(seen, (0, 1), value=1), position[:, -1:] + 1
        if not going.any():
            break
        if going.float().mean() < 0.8:  # texts that have ended leave the batch
            keep = going.nonzero()[:, 0]
            rows, ids, seen, position = rows[keep], ids[keep], seen[keep], position[keep]
            cache.batch_select_indices(keep)
    ended = (tokens == eos_id).long() * mask
    mask = mask * (ended.cumsum(1) - ended == 0)  # nothing after the first end-of-sequence token counts
    return tokens.masked_fill(mask == 0, pad_id), mask, logprobs * mask


def prepare(args: Args) -> tuple[Any, nn.Module]:
    """Tokenizer and model as the flags want them."""
    if args.model == "new":
        return new_lm()
    tokenizer, lm = load_lm(args.model)
    if args.gradient_checkpointing:  # works in training mode only, so dropout must go
        lm.gradient_checkpointing_enable()
        lm.enable_input_require_grads()
        for module in (m for m in lm.modules() if isinstance(m, nn.Dropout)):
            module.p = 0.0
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        lm = get_peft_model(lm, config)
    return tokenizer, lm.eval()


def save_pretrained(folder: Path, net: nn.Module, tokenizer: Any) -> None:
    """Network and tokenizer as a folder that from_pretrained loads, whole or not at all; adapters are merged in."""
    net = net.merge_and_unload() if hasattr(net, "merge_and_unload") else net
    unfinished = folder.with_name(folder.name + ".tmp")
    net.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


# 4. The mathematics -----------------------------------------------------------------------------
# Completions are [B, T], padded on the right; mask is 1 on a completion's tokens, the last of which ends it.


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """How much better than expected each answer did, [P, G] from rewards [P, G]; 0 where a reward is NaN.

    grpo         (r - mean of the group) / its standard deviation   (Section 4.1.2, Shao 2024)
    dr_grpo      r - mean of the group                              (Section 3.2, Liu 2025)
    rloo         r - mean of the group's other answers = G / (G - 1) times dr_grpo   (Ahmadian 2024)
    reinforce++  (r - mean of the batch) / its standard deviation   (Hu 2025)
    """
    assert rewards.ndim == 2
    groups = rewards.reshape(1, -1) if kind == "reinforce++" else rewards
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    mean = groups.nansum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, groups - mean, 0.0)
    if kind == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    if kind in ("grpo", "reinforce++"):
        variance = (centred**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    return centred.reshape(rewards.shape)


def token_weights(mask: Tensor, norm: str, limit: int) -> Tensor:
    """The weight of every token in the loss of a minibatch, [B, T].

    sequence  mean over answers of the mean over their tokens: those of a long answer count less (Eq. 3, Shao 2024)
    token     mean over all tokens: a long answer counts more (Eq. 8, Yu 2025)
    constant  sum over tokens / (B * limit): the gradient of the expected reward, up to a constant (Liu 2025)

    Taken over the whole minibatch, they make the loss a sum, which may be cut into parts anywhere.
    """
    mask = mask.float()
    if norm == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return mask / (mask.sum().clamp(min=1) if norm == "token" else len(mask) * limit)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float,
    ratio: str = "token",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Clipped loss of every token, and where it is clipped below and above; [B, T] each. advantages: [B].

    token     ratio of each token (Eq. 3, Shao 2024; clip_low and clip_high apart: Eq. 8, Yu 2025)
    sequence  geometric mean of the ratios of an answer's tokens (Eq. 7, Zheng 2025)

    Before the first update every ratio is 1 and, advantages being centred, the loss about 0. Its gradient is not.
    """
    assert logprobs.shape == old_logprobs.shape == mask.shape and advantages.shape == mask.shape[:1]
    logratio = torch.where(mask > 0, logprobs - old_logprobs, 0.0)
    if ratio == "sequence":
        logratio = (logratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logratio)
    ratios, advantages = logratio.exp(), advantages[:, None]
    loss = -torch.min(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    low = (ratios < 1 - clip_low) & (advantages < 0) & (mask > 0)
    high = (ratios > 1 + clip_high) & (advantages > 0) & (mask > 0)
    return loss, low, high


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimates of KL(pi || ref) at tokens sampled from pi, never negative (Eq. 4, Shao 2024); any shape."""
    logratio = (ref_logprobs - logprobs).clamp(max=20)  # keeps exp finite
    return torch.expm1(logratio) - logratio


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """0 up to limit - buffer tokens, then falling to -1 at the limit (Eq. 13, Yu 2025); [B]."""
    return -((lengths - (limit - buffer)) / max(buffer, 1)).clamp(0, 1) * (buffer > 0)


def pass_at_k(right: Tensor, k: int) -> float:
    """P(one of k answers is right), without bias from the n >= k answers of each problem, [problems, n] (Chen 2021)."""
    n = right.shape[1]
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right.sum(1).int().tolist()]))


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    accelerator = Accelerator(cpu=pick_device(args.device).type == "cpu")
    if not accelerator.is_main_process:
        args = helper_process(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = accelerator.device
    tokenizer, lm = prepare(args)
    lm.to(device)
    rewards = {name: load_reward(name) for name in args.reward}
    problems, tests = load_problems(args, tokenizer)
    longest = max(len(row["ids"]) for rows in (problems or [], *tests.values()) for row in rows)
    if longest + args.max_completion_length > (limit := getattr(lm.config, "max_position_embeddings", 10**9)):
        fail(f"{args.model} reads at most {limit} tokens and a prompt has {longest}: lower --max-completion-length")
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], weight_decay=0.0)
    before = Values()
    parts = {"lm": Trained(lm), "optimizer": optimizer, "before": before}
    run = Run(args, Path(args.dataset).stem, args.total_episodes, episodes=False, **parts)
    if args.eval:
        return run.finish(**evaluate(args, lm, tokenizer, rewards, tests)[0])

    with run, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        if not before:
            if args.model == "new":
                warm_start(args, lm, tokenizer)
                save_pretrained(run.folder / "start", lm, tokenizer)
            before["results"], before["texts"] = evaluate(args, lm, tokenizer, rewards, tests)
            print("before", *(f"{key} {value:.3g}" for key, value in before["results"].items()), sep=" · ")
        reference = None
        if args.kl_coef:  # with LoRA it is the model without its adapter
            start = str(run.folder / "start") if args.model == "new" else args.model
            reference = lm if args.lora_rank else load_lm(start)[1].to(device)

        step = run.step
        while step < args.total_episodes:
            rng = np.random.default_rng([args.seed, step])
            lr = args.learning_rate * (1 - step / args.total_episodes if args.anneal_lr else 1)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Answer each problem several times, and judge the answers.
            batch = rollout(args, accelerator, lm, tokenizer, rewards, problems, args.num_prompts, rng)
            metrics, sampled = summarize(batch), args.num_prompts  # of what was sampled first
            for _ in range(args.dynamic_sampling):  # Section 3.2, Yu 2025
                dull = np.flatnonzero(~mixed(batch["rewards"]))
                if len(dull) == 0:
                    break
                more = rollout(args, accelerator, lm, tokenizer, rewards, problems, len(dull), rng)
                sampled += len(dull)
                for name in batch:
                    batch[name][dull] = more[name]

            # Make the better answers of each group likelier, and the worse ones less likely.
            metrics |= update(args, accelerator, lm, reference, optimizer, batch, rng)

            step += sampled * args.group_size
            measured = {}
            if (len(run.rows) + 1) % args.eval_every == 0:
                measured, _ = evaluate(args, lm, tokenizer, rewards, {"": tests[""][:64]})
            measured = {f"eval/{name}": measured.get(name) for name in before["results"] if "harder" not in name}
            run.report(step, {**metrics, "charts/learning_rate": lr, **measured})
        results, texts = evaluate(args, lm, tokenizer, rewards, tests)

    save_pretrained(run.folder / "policy", lm, tokenizer)
    examples = list(zip(tests[""], before["texts"], texts, strict=False))[:10]
    lines = [f"**{row['prompt']}**\n\n- before: {old}\n- after: {new}\n" for row, old, new in examples]
    (run.folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    return run.finish(before=before["results"], **results)


class Trained:
    """The weights that learn, for the checkpoint: with LoRA those of the adapter and the head only."""

    def __init__(self, net: nn.Module):
        self.net = net

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters() if p.requires_grad}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        if saved.keys() != self.state_dict().keys():
            raise KeyError("other weights")
        self.net.load_state_dict(saved, strict=False)


class Values(dict):
    """Plain values that the checkpoint keeps beside the weights."""

    state_dict, load_state_dict = dict.copy, dict.update


def warm_start(args: Args, lm: nn.Module, tokenizer: Any) -> None:
    """Fits a new model to demonstrations, most of which are wrong, by maximum likelihood."""
    rng, progress = np.random.default_rng(args.seed), Progress("warm start", args.warmup_steps)
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.98))
    for step in range(args.warmup_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 30, 1 - step / args.warmup_steps)
        rows = make_rows(tokenizer, rng, 64, *TRAIN_SWAPS)
        demos = tokenizer([demonstrate(rng, row["prompt"], args.right_demos) for row in rows])["input_ids"]
        prompt_ids, prompt_mask = pad([row["ids"] for row in rows], tokenizer.pad_token_id, "left")
        ids, mask = pad([demo + [tokenizer.eos_token_id] for demo in demos], tokenizer.pad_token_id, "right")
        ids, seen = torch.cat((prompt_ids, ids), 1).to(lm.device), torch.cat((prompt_mask, mask), 1).to(lm.device)
        logprobs, _ = token_logprobs(lm, ids, seen, mask.shape[1], temperature=1.0)
        loss = -(logprobs * token_weights(mask.to(lm.device), "token", 0)).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    progress.close()


def rollout(
    args: Args, accelerator: Accelerator, lm: nn.Module, tokenizer: Any, rewards: dict[str, Callable],
    problems: list[dict] | None, count: int, rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """A group of answers to each of some problems, judged; everything is [P, G] or [P, G, R], but rows [P]."""
    if problems is None:
        rows = make_rows(tokenizer, rng, count, *TRAIN_SWAPS)
    else:
        rows = [problems[i] for i in rng.choice(len(problems), count, replace=count > len(problems))]
    repeated = [row for row in rows for _ in range(args.group_size)]
    uniforms = rng.random((len(repeated), args.max_completion_length), np.float32)
    alone = len(repeated) % accelerator.num_processes > 0  # no equal shares: every process answers everything
    if not alone:  # every process answers its share, and then has all
        own = np.array_split(np.arange(len(repeated)), accelerator.num_processes)[accelerator.process_index]
        repeated, uniforms = [repeated[n] for n in own], uniforms[own]
    tokens, mask, logprobs, texts = answer(args, lm, tokenizer, repeated, uniforms, args.temperature)
    judged = [score(name, reward, repeated, texts) for name, reward in rewards.items()]
    total = torch.stack(judged, 1) @ torch.tensor(args.reward_weights or [1.0] * len(judged))
    if args.overlong_buffer:
        total = total + overlong_penalty(mask.sum(1).cpu(), args.max_completion_length, args.overlong_buffer)
    read = VERIFIERS[args.reward[0]][0] if args.reward[0] in VERIFIERS else None
    formed = torch.tensor([math.nan if read is None else float(read(text) is not None) for text in texts])
    ended = ((tokens == tokenizer.eos_token_id) & (mask > 0)).any(1)  # padding may be the same token
    batch = dict(tokens=tokens, mask=mask, logprobs=logprobs, ended=ended, rewards=total.to(lm.device))
    batch |= dict(right=(judged[0] >= 1).to(lm.device), formed=formed.to(lm.device))
    if not alone:
        batch = {name: accelerator.gather(values) for name, values in batch.items()}
    batch = {name: values.unflatten(0, (count, args.group_size)) for name, values in batch.items()}
    return batch | {"rows": np.array(rows, dtype=object)}


def update(
    args: Args, accelerator: Accelerator, lm: nn.Module, reference: nn.Module | None,
    optimizer: torch.optim.Optimizer, batch: dict[str, Any], rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Moves the policy along the gradient on one batch of answers; means of what there is to see on the way."""
    # One answer a row, B = P * G: prompt and answer are ids [B, S + T]; the other tensors are [B, T].
    width = int(batch["mask"].sum(-1).max())
    tokens, mask, old_logprobs = (batch[name][..., :width].flatten(0, 1) for name in ("tokens", "mask", "logprobs"))
    prompts = [row["ids"] for row in batch["rows"] for _ in range(args.group_size)]
    prompt_ids, prompt_mask = (x.to(lm.device) for x in pad(prompts, 0, "left"))
    ids, seen = torch.cat((prompt_ids, tokens), 1), torch.cat((prompt_mask, mask), 1)
    advantages = group_advantages(batch["rewards"], args.advantage).flatten()  # [B]
    if args.mask_overlong:  # Section 3.4, Yu 2025
        mask = mask * batch["ended"].flatten()[:, None]
    weights, shares = (token_weights(mask, norm, args.max_completion_length) for norm in (args.loss_norm, "token"))
    clip = args.clip_low, args.clip_high, args.ratio
    rows = np.arange(len(ids))
    if not args.kl_coef and not args.ent_coef:  # nothing pulls at an answer whose advantage is 0
        rows = np.flatnonzero(advantages.cpu().numpy())

    lm.train(args.gradient_checkpointing)
    means, norms = torch.zeros(4, device=lm.device), []
    for _ in range(args.update_epochs):
        for minibatch in np.array_split(rng.permutation(rows), args.num_minibatches):
            for part in own_parts(args, accelerator, minibatch):
                logprobs, entropy = token_logprobs(lm, ids[part], seen[part], width, args.temperature)
                loss, low, high = policy_loss(logprobs, old_logprobs[part], advantages[part], mask[part], *clip)
                kl = torch.zeros_like(loss)
                if reference is not None:
                    with torch.no_grad(), lm.disable_adapter() if reference is lm else contextlib.nullcontext():
                        ref_logprobs, _ = token_logprobs(reference, ids[part], seen[part], width, args.temperature)
                    kl = kl_k3(logprobs, ref_logprobs)
                total = loss + args.kl_coef * kl - args.ent_coef * entropy
                (args.num_minibatches * total * weights[part]).sum().backward()
                seen_here = (loss * weights[part], kl * shares[part], low * shares[part], high * shares[part])
                means += torch.stack([x.detach().sum() for x in seen_here]) / args.update_epochs
            norms.append(take_step(args, accelerator, optimizer).item())
    means = accelerator.reduce(means, "sum")
    lm.eval()
    names = ("losses/policy_loss", "losses/kl", "losses/clip_low", "losses/clip_high")
    return dict(zip(names, means.tolist(), strict=True)) | {"losses/grad_norm": sum(norms) / len(norms)}


def own_parts(args: Args, accelerator: Accelerator, rows: np.ndarray) -> list[np.ndarray]:
    """This process's share of a minibatch, in the parts that go through the model one by one."""
    parts = np.array_split(rows, accelerator.num_processes * args.gradient_accumulation)
    first = accelerator.process_index * args.gradient_accumulation
    return [part for part in parts[first : first + args.gradient_accumulation] if len(part)]


def take_step(args: Args, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> Tensor:
    """Adds up what the processes found, limits the gradient's norm, and moves the weights; returns the norm."""
    parameters = optimizer.param_groups[0]["params"]
    if accelerator.num_processes > 1:
        for parameter in parameters:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(mine, "sum")
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def helper_process(args: Args) -> Args:
    """Settings of a process that only computes: the first one alone writes the run folder and prints."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if args.resume:
        shutil.copytree(args.resume, Path(scratch, "run"))
    return dataclasses.replace(args, run_dir=scratch, resume=args.resume and f"{scratch}/run", track=False)


def mixed(rewards: Tensor) -> np.ndarray:
    """Whether the rewards in a group differ, so that there is something to learn from it; [P, G] -> [P]."""
    return (group_advantages(rewards, "dr_grpo").abs().amax(1) > 1e-6).cpu().numpy()


def summarize(batch: dict[str, Any]) -> dict[str, float | None]:
    """Means over a batch, None where there is nothing; the entropy is that of the sampled tokens, -log pi, in nats."""
    mask, right = batch["mask"].cpu(), batch["right"]
    lengths = mask.sum(-1).float()
    means = {
        "objective/reward": batch["rewards"],
        "objective/right": right.float(),
        "objective/well_formed": batch["formed"],
        "objective/ended": batch["ended"].float(),
        "objective/length_right": lengths[right],
        "objective/length_wrong": lengths[~right],
        "losses/entropy": -batch["logprobs"].cpu()[mask > 0],
    }
    means = {name: values.nanmean().item() for name, values in means.items()}
    means["objective/groups_without_variance"] = 1 - mixed(batch["rewards"]).mean().item()
    return {name: None if math.isnan(value) else value for name, value in means.items()}


# 6. Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def answer(
    args: Args, lm: nn.Module, tokenizer: Any, rows: list[dict], uniforms: np.ndarray, temperature: float
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """An answer to each problem: tokens, mask and log-probabilities, [B, R], and the text."""
    size, parts = args.num_prompts * args.group_size, []
    for start in range(0, len(rows), size):  # at most as many at a time as in training
        prompts = [row["ids"] for row in rows[start : start + size]]
        ids, mask = (x.to(lm.device) for x in pad(prompts, tokenizer.pad_token_id, "left"))
        draws = torch.from_numpy(uniforms[start : start + size]).to(lm.device)
        parts.append(sample(lm, ids, mask, draws, tokenizer.eos_token_id, tokenizer.pad_token_id, temperature))
    tokens, mask, logprobs = (torch.cat(x) for x in zip(*parts, strict=True))
    written = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu().bool(), strict=True)]
    return tokens, mask, logprobs, tokenizer.batch_decode(written, skip_special_tokens=True)


def evaluate(
    args: Args, lm: nn.Module, tokenizer: Any, rewards: dict[str, Callable], tests: dict[str, list[dict]]
) -> tuple[dict[str, float], list[str]]:
    """Shares of right answers to the problems of each set, greedy and sampled; and all greedy answers."""
    (name, reward), results, texts = next(iter(rewards.items())), {}, []
    for kind, rows in tests.items():
        rng = np.random.default_rng(10**9 + args.seed)
        repeated, length = [row for row in rows for _ in range(args.eval_samples)], args.max_completion_length
        _, mask, _, greedy = answer(args, lm, tokenizer, rows, rng.random((len(rows), length), np.float32), 1e-6)
        uniforms = rng.random((len(repeated), length), np.float32)
        samples = answer(args, lm, tokenizer, repeated, uniforms, args.temperature)[-1]
        right = (score(name, reward, repeated, samples) >= 1).view(len(rows), -1)
        results |= {
            f"{kind}greedy": (score(name, reward, rows, greedy) >= 1).float().mean().item(),
            f"{kind}pass@1": pass_at_k(right, 1),
            f"{kind}pass@{args.eval_samples}": pass_at_k(right, args.eval_samples),
            f"{kind}length": mask.sum(1).float().mean().item(),
        }
        texts += greedy
    return results, texts


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
