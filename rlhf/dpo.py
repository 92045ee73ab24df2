# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "transformers>=5.0", "datasets>=3.0", "accelerate>=1.0", "vaderSentiment>=3.3", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17",
# ]
# ///
"""DPO and its family: learning from preferences without reinforcement learning.

PPO asks a reward model about every text it writes. But the best policy for a reward is known in closed form,
pi* ~ pi_ref * exp(r / beta). Read backwards, it says which reward a policy stands for: beta * log pi / pi_ref,
up to a constant per prompt. Put that into the likelihood of people's preferences and no reward model is left:
the policy learns by classifying pairs, chosen text c against rejected text r, and never writes while it learns.

    loss = -log sigmoid( beta * [ log pi(c|x) / pi_ref(c|x)  -  log pi(r|x) / pi_ref(r|x) ] )

--loss   what it assumes                                         reference   over tokens   --beta
dpo      P(a preferred to b) = sigmoid(r_a - r_b)                yes         sum           price of a nat of KL
cdpo     the same, but a share of the labels is wrong            yes         sum           price of a nat of KL
ipo      nothing: the gap shall be 1 / (2 beta), not infinite    yes         sum (*)       price of a nat of KL
hinge    a pair with a gap of 1 / beta has nothing to teach      yes         sum           1 / gap
kto      texts are good or bad on their own; pairs not needed    yes         sum           price of a nat of KL
orpo     imitate the chosen text, at better odds than rejected   no          mean          weight beside imitation
simpo    the mean log-probability itself is the reward           no          mean          scale of the reward
                                                                 (*) mean, as in TRL, with --ipo-average

SFT, reward model, sampling, judges and evaluation are those of rlhf_ppo.py, word for word, so that the two can
be compared: benchmarks.md does.

Papers   Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290
         Mitchell 2023, A Note on DPO with Noisy Preferences (cdpo), ericmitchell.ai/cdpo.pdf
         Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Preferences, arXiv 2310.12036
         Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, and Liu et al. 2023, RSO, arXiv 2309.06657 (hinge)
         Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306
         Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691
         Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734

Run      python rlhf/dpo.py
         python rlhf/dpo.py --loss ipo --pairs runs/<folder>/pairs             (another loss, the same pairs)
         python rlhf/dpo.py --loss kto --pairs human                           (people's ratings, and no pairs)
         python rlhf/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --pairs trl-lib/ultrafeedback_binarized \\
             --sft-epochs 0 --max-length 512 --learning-rate 1e-6 --bf16
         accelerate launch --num-processes 2 rlhf/dpo.py
         python rlhf/dpo.py --eval runs/<folder>

Expect   five fresh seeds (101 to 105; benchmarks/frontier.py), on one core beside other work: 92 to 130 s of
         training, of which the pairs take 65 and DPO itself 36; peak memory 1.1 GB; a GPU is not measured yet.
         On 384 held-out prompts, before and after, medians (range after): judge's P(positive) .52 and .78 (.77 to
         .79), VADER .18 and .38, KL 0 and 4.3 nats a text (4.1 to 5.2), distinct-2 .93 and .89, length 12.1 and
         12.5 tokens, reference perplexity 53 and 65. The chosen texts' log-probability falls by 2 to 5 nats (four
         of the seeds), the rejected ones' by 7 to 11. PPO from the same start: judge .84, KL 4.5, distinct-2 .85.

Folder   besides the usual: sft/, reward_model/ and policy/, which from_pretrained loads, pairs/ (what --pairs
         sampled made; --pairs reads it) and samples.md. summary.json has what rlhf_ppo.py's has. Steps are texts:
         those of SFT, then those of rated pairs, then pairs (KTO: texts).

Deviations from the papers
 1. A sampled pair is the best and the worst of --num-samples texts by the reward model's score, not two texts
    and a drawn preference: the same labelling teaches more, and beta is no longer exactly the price of KL.
 2. A pair of which one text is empty, too long for --max-length or not made of the tokenizer's words, or whose
    texts are the same, is left out and counted; none is cut.
 3. The response starts where the tokens of prompt, chosen and rejected text first part: a tokenizer may merge
    the prompt's end with the response's beginning.
 4. KTO's reference point is the KL on each prompt with the next text's response, fixed once, so that the
    reference's log-probabilities are computed once for it as well.
 5. KTO's weights default to giving both labels equal say (the paper: a ratio between 1 and 4/3 in favour of
    one). ORPO's imitation term covers the response only, as in the paper; TRL's covers the prompt too.
 6. No dropout, in any stage. What comes before the pairs deviates as in rlhf_ppo.py.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

# 1. Settings ------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"


@dataclass
class Args:
    model: str = str(DATA / "tiny_lm")
    """causal language model to start from: a hub name or a folder"""
    dataset: str = str(DATA / "human_ratings")
    """rated texts: a hub name or a folder"""
    seed: int = 1
    """seed of every random number: batches, prompts, sampled tokens; >= 0"""
    total_episodes: int = 2_048
    """pairs (KTO: texts) the policy learns from, over all passes; 0 stops before it learns"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where everything runs; auto is the GPU where there is one"""
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
    eval_episodes: int = 384
    """held-out prompts continued before and after training; >= 2 (distinct-2 is taken over groups of 128)"""

    text_column: str = "text"
    """column of the texts, or of the completions where there is a prompt column"""
    prompt_column: str | None = None
    """column of the prompts; None takes the first words of each text"""
    label_column: str = "rating"
    """column of the ratings or classes, higher is better"""
    votes_column: str | None = "ratings"
    """column with the list of single ratings of a text; where there is none the label is the only vote"""
    positive_above: float = 0.0
    """texts with a label above this are the judge's positive class"""
    reward_split: str = "reward"
    """split for SFT, reward model and the prompts of sampled pairs; slices such as train[:50%] work"""
    judge_split: str | None = "judge"
    """split that trains the independent judge; None for no judge"""
    eval_split: str = "heldout"
    """split for the held-out prompts and the reward model's test"""
    prompt_words: int = 2
    """length of a prompt in words where there is no prompt column; >= 1"""
    max_length: int = 64
    """longest text and longest prompt in tokens"""
    bf16: bool = False
    """compute in bfloat16 (weights stay float32); for GPUs"""
    gradient_accumulation: int = 1
    """parts into which a minibatch is cut to save memory; the result stays the same"""
    max_grad_norm: float = 1.0
    """the gradient's norm is scaled down to at most this, in every stage; > 0"""

    sft_epochs: int = 1
    """passes of supervised fine-tuning over the texts; 0 skips the stage"""
    sft_batch_size: int = 32
    """texts per SFT step, over all processes"""
    sft_learning_rate: float = 3e-4
    """Adam's step size, lowered linearly to zero"""

    reward_model: str = "bag"
    """bag (n-grams), lm (a head on the SFT model), a sequence classifier (hub or folder), or path.py:function"""
    reward_epochs: int = 20
    """passes over the rated texts; each pairs them anew"""
    reward_batch_size: int = 128
    """texts per step, half as many pairs, over all processes"""
    reward_learning_rate: float = 1e-2
    """Adam's step size, lowered linearly to zero; 1e-4 suits --reward-model lm"""
    reward_label: int = -1
    """which logit of a sequence classifier is the reward"""
    normalize_reward: bool = True
    """shift and scale scores to mean 0 and standard deviation 1 on the SFT model's samples"""
    missing_eos_penalty: float = 1.0
    """taken off the score of a sampled text that did not end; >= 0"""

    pairs: str = "sampled"
    """sampled (by the SFT model, judged by the reward model), human (rated texts), or a dataset: hub name or folder"""
    pairs_split: str = "train"
    """split of a dataset of pairs"""
    num_pairs: int = 2_048
    """pairs made by --pairs sampled or human"""
    num_samples: int = 8
    """texts sampled per prompt, of which the best and the worst make a pair; >= 2"""
    response_length: int = 24
    """tokens a sampled response may have"""
    temperature: float = 1.0
    """sampling temperature, at which log-probabilities are taken too; > 0"""

    loss: Literal["dpo", "cdpo", "ipo", "hinge", "kto", "orpo", "simpo"] = "dpo"
    """what is minimised; the header's table has the differences"""
    beta: float | None = None
    """the loss's beta (see the table); None takes 2 for simpo and 0.1 for the others; > 0"""
    label_smoothing: float = 0.1
    """cdpo: share of the pairs believed to be labelled the wrong way round, in [0, 0.5)"""
    ipo_average: bool = False
    """ipo: mean over tokens instead of the paper's sum"""
    simpo_gamma: float = 0.5
    """simpo: margin by which the chosen text should win; >= 0"""
    desirable_weight: float | None = None
    """kto: weight of good texts; None makes both labels weigh the same however rare one is"""
    undesirable_weight: float | None = None
    """kto: weight of bad texts; None as above"""
    reference_free: bool = False
    """leave the reference out of the loss, as if it found all texts equally likely"""
    sft_coef: float = 0.0
    """weight of -log pi a token of the chosen texts, added to the loss (orpo has it anyway, at 1); >= 0"""
    batch_size: int = 32
    """pairs (KTO: texts) per step, over all processes"""
    learning_rate: float = 2e-4
    """Adam's step size at the start; 1e-6 suits pretrained models of 100M parameters and more"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-episodes"""
    eval_every: int = 8
    """steps between evaluations on 128 of the held-out prompts"""


PRESETS: dict[str, dict[str, Any]] = {}
BETAS = {"dpo": 0.1, "cdpo": 0.1, "ipo": 0.1, "hinge": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("prompt_words", "max_length", "gradient_accumulation", "max_grad_norm", "sft_batch_size",
                 "sft_learning_rate", "reward_learning_rate", "num_pairs", "response_length", "temperature",
                 "batch_size", "learning_rate", "eval_every"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "total_episodes", "sft_epochs", "reward_epochs", "missing_eos_penalty", "sft_coef",
                 "simpo_gamma"):  # fmt: skip
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {value}")
    if not 0 <= args.label_smoothing < 0.5:
        fail(f"--label-smoothing must lie in [0, 0.5), not {args.label_smoothing}: beyond it labels say the opposite")
    if args.eval_episodes < 2 or args.reward_batch_size < 2 or args.num_samples < 2:
        fail("--eval-episodes, --reward-batch-size and --num-samples must be at least 2")
    if args.reward_batch_size % 2:
        fail(f"--reward-batch-size {args.reward_batch_size} must be even: its texts are compared in pairs")


# 2. Data ----------------------------------------------------------------------------------------
# A preference is a dictionary: prompt, chosen and rejected; or, for KTO, prompt, completion and label.


@dataclass
class Preferences:
    """Texts to learn from. Pairs are neighbours, the chosen text first."""

    rows: list[tuple[list[int], int]]
    """token ids, and where among them the response starts"""
    good: list[bool]
    """chosen or rejected, good or bad"""
    ref_logps: Tensor | None = None
    """the reference's log-probabilities of the responses, computed once; 0 where the loss has no reference"""
    mismatched: list[tuple[list[int], int]] = field(default_factory=list)
    """for KTO: each text's prompt with another text's response, and below the reference's log-probability of it"""
    mismatched_ref_logps: Tensor | None = None


def load_split(name: str, split: str) -> datasets.Dataset:
    """One split of a dataset from the hub or from a folder."""
    datasets.disable_progress_bars()
    cache = None
    if Path(name).is_dir():  # the library's cache knows a folder by its last name, and confuses two of one name
        files = [f"{path.resolve()} {path.stat().st_mtime_ns}" for path in sorted(Path(name).rglob("*"))]
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"{zlib.crc32(repr(files).encode()):08x}")
    try:
        return datasets.load_dataset(name, split=split, cache_dir=cache)
    except Exception as error:  # the loader has no common class of errors
        fail(f"cannot load the split {split!r} of the dataset {name}: {error}")


def column(data: datasets.Dataset, name: str, kind: type = object) -> list[Any]:
    """The rows of a column; of kind str, or numbers.Real, where only that will do."""
    if name not in data.column_names:
        fail(f"the dataset has no column {name!r}; it has {', '.join(data.column_names)}")
    values = list(data[name])
    if not all(isinstance(value, kind) for value in values):
        fail(f"the column {name!r} of the dataset has rows that are no {'text' if kind is str else 'number'}")
    return values


def encode(tokenizer: Any, prompt: str, text: str, max_length: int) -> tuple[list[int], int]:
    """Token ids of prompt + text with one end-of-sequence token, and how many of them are the prompt's.

    A text longer than max_length loses its end and gets no end-of-sequence token: it does not end there.
    """
    ids = tokenizer(prompt + text)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return (ids + [tokenizer.eos_token_id])[:max_length], len(tokenizer(prompt)["input_ids"]) if prompt else 0


def known(tokenizer: Any, rows: list[list[int]], what: str) -> list[int]:
    """Numbers of the rows without an unknown token; says how many there are."""
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # GPT-2 has one token for both
    kept = [n for n, ids in enumerate(rows) if not unknown & set(ids)]
    if not kept:
        fail(f"none of the {len(rows)} {what} is made of words that the tokenizer knows")
    if len(kept) < len(rows):
        print(f"{len(kept):,} of {len(rows):,} {what} are made of words that the tokenizer knows; the rest is left out")
    return kept


def make_prompts(args: Any, tokenizer: Any, data: datasets.Dataset) -> list[list[int]]:
    """Token ids of the prompts: their own column, or the first words of each text that has more."""
    if args.prompt_column:
        prompts = column(data, args.prompt_column, str)
    else:
        words = [text.split() for text in column(data, args.text_column, str)]
        prompts = [" ".join(text[: args.prompt_words]) for text in words if len(text) > args.prompt_words]
    ids = [encode(tokenizer, "", prompt, 10**9)[0][:-1] for prompt in prompts]
    if not ids:
        fail(f"no text has more than the {args.prompt_words} words of --prompt-words: there is nothing to continue")
    if not all(ids):
        fail(f"{sum(not x for x in ids)} of {len(ids)} prompts are empty; a model can only continue a beginning")
    return [ids[n][-args.max_length :] for n in known(tokenizer, ids, "prompts")]


def pad(rows: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask (1 token, 0 padding). Only the mask says what is padding."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows, strict=True)]
    real = [[0] * len(f) + [1] * len(row) for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(real if side == "left" else [row[::-1] for row in real])


def heads_and_texts(args: Any, data: datasets.Dataset) -> tuple[list[str], list[str]]:
    """The prompts ("" where there is no prompt column) and the texts that follow them."""
    texts = column(data, args.text_column, str)
    return column(data, args.prompt_column, str) if args.prompt_column else [""] * len(texts), texts


def decode(tokenizer: Any, ids: Any, mask: Tensor | None = None) -> list[str]:
    """Texts of token ids without special tokens; with a mask, of its tokens only."""
    if mask is not None:
        ids = [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def vote_shares(args: Any, data: datasets.Dataset) -> np.ndarray:
    """The share of a text's votes that each grade got, [texts, grades], grades in rising order."""
    single = args.votes_column not in data.column_names
    votes = [[label] for label in column(data, args.label_column, Real)] if single else column(data, args.votes_column)
    grades, index = np.unique([grade for row in votes for grade in row], return_inverse=True)
    shares = np.zeros((len(votes), len(grades)), np.float32)
    np.add.at(shares, (np.repeat(np.arange(len(votes)), [len(row) for row in votes]), index), 1)
    return shares / shares.sum(1, keepdims=True)


def from_messages(tokenizer: Any, record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A record whose texts are lists of messages, as strings by the tokenizer's chat template.

    The prompt is what all texts start with: the messages of the prompt column, or their common first ones.
    """
    talks = [record[name] for name in names]
    if isinstance(record.get("prompt"), list):
        talks = [record["prompt"] + talk for talk in talks]
    shared = min(map(len, talks)) - 1
    while any(talk[:shared] != talks[0][:shared] for talk in talks):
        shared -= 1
    try:
        head = tokenizer.apply_chat_template(talks[0][:shared], tokenize=False, add_generation_prompt=True)
        texts = [tokenizer.apply_chat_template(talk, tokenize=False).rstrip() for talk in talks]
    except Exception as error:  # templates are programs of their own
        fail(f"--pairs holds conversations, and the model's chat template cannot render them: {error}")
    if tokenizer("")["input_ids"]:  # the tokenizer writes the first token itself
        head, *texts = (text.removeprefix(tokenizer.bos_token) for text in (head, *texts))
    head = os.path.commonprefix([head, *texts])
    return record | {"prompt": head} | {name: text[len(head) :] for name, text in zip(names, texts, strict=True)}


def load_preferences(args: Args, tokenizer: Any) -> list[dict[str, Any]]:
    """--pairs PATH: the preferences of a dataset on the hub or in a folder."""
    data = load_split(args.pairs, args.pairs_split)
    names = ("completion",) if "label" in data.column_names and args.loss == "kto" else ("chosen", "rejected")
    for name in names:
        column(data, name)
    if data.num_rows and isinstance(data[0][names[0]], list):
        return [from_messages(tokenizer, record, names) for record in data]
    column(data, "prompt")
    return list(data)


def rated_preferences(args: Args, tokenizer: Any, data: datasets.Dataset) -> list[dict[str, Any]]:
    """--pairs human: of two rated texts drawn at random the better rated one is chosen. KTO needs no pairs."""
    heads, texts = heads_and_texts(args, data)
    texts = [head + text for head, text in zip(heads, texts, strict=True)]
    ratings = column(data, args.label_column, Real)
    rows = np.array(known(tokenizer, [encode(tokenizer, "", text, 10**9)[0] for text in texts], "rated texts"))
    if args.loss == "kto":
        return [{"prompt": "", "completion": texts[n], "label": ratings[n] > args.positive_above} for n in rows]
    drawn = np.random.default_rng([args.seed, 7]).choice(rows, (args.num_pairs, 2))
    pairs = [sorted(pair, key=lambda n: -ratings[n]) for pair in drawn if ratings[pair[0]] != ratings[pair[1]]]
    print(f"{len(pairs):,} of {args.num_pairs:,} pairs of rated texts have a better one; the rest is left out")
    return [{"prompt": "", "chosen": texts[a], "rejected": texts[b]} for a, b in pairs]


def encode_preferences(args: Args, tokenizer: Any, records: list[dict[str, Any]]) -> Preferences:
    """Token ids of what can be learnt from; the rest is counted and left out."""
    single = bool(records) and "completion" in records[0]
    names, what = (("completion",), "texts") if single else (("chosen", "rejected"), "pairs")
    data, problems = Preferences([], []), Counter()
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    for record in records:
        head = record["prompt"] or ""
        prompt = tokenizer(head)["input_ids"]
        texts = [encode(tokenizer, head, record[name] or "", 10**9)[0] for name in names]
        for ids, name in zip(texts, names, strict=True):
            if not record.get(f"{name}_ended", True):
                ids.pop()
        # A tokenizer may merge the prompt's end with the response's start: the response starts where they part.
        start = len(os.path.commonprefix([prompt, *texts]))
        if start == 0:  # something must come before the first token
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            start, texts = 1, [[first, *ids] for ids in texts]
        if any(unknown & set(ids) for ids in texts):
            problems["have words that the tokenizer does not know"] += 1
        elif not all(tokenizer.decode(ids[start:], skip_special_tokens=True).strip() for ids in texts):
            problems["have an empty text"] += 1
        elif texts[0] == texts[-1] and not single:
            problems["have the same text as chosen and as rejected"] += 1
        elif max(map(len, texts)) > args.max_length:
            problems[f"are longer than the {args.max_length} tokens of --max-length"] += 1
        else:
            data.rows += [(ids, start) for ids in texts]
            data.good += [bool(record["label"])] if single else [True, False]
    shown = "; ".join(f"{count:,} {problem}" for problem, count in problems.items())
    if not data.rows:
        fail(f"none of the {len(records)} {what} can be learnt from: {shown or 'there are none'}")
    if problems:
        print(f"{sum(problems.values()):,} of {len(records):,} {what} are left out: {shown}")
    return data


# 3. Model ---------------------------------------------------------------------------------------


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
    return tokenizer, lm


def positions(mask: Tensor) -> Tensor:
    """Position of each token, counted from the first that is no padding; [B, T]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def token_logprobs(lm: nn.Module, ids: Tensor, mask: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token | all before it) of the last count tokens, [B, count], and the hidden states before them.

    The one function behind the old, the reference's and the new log-probabilities. ids, mask: [B, T].
    """
    output = lm(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=count + 1,
                output_hidden_states=True, use_cache=False)  # fmt: skip
    logits = output.logits[:, -count - 1 : -1].float() / temperature  # [B, count, V]
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, -count:].flatten(), reduction="none")
    return -nll.view(len(ids), count), output.hidden_states[-1][:, -count - 1 : -1]


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


@lru_cache(maxsize=2**15)
def hash_grams(text: str, buckets: int) -> list[int]:
    """Bucket numbers of a text's words, word pairs and four-letter pieces."""
    words = ["<", *re.findall(r"[\w']+|[^\w\s]", text.lower()), ">"]
    pairs = [" ".join(pair) for pair in zip(words[:-1], words[1:], strict=True)]
    pieces = ["#" + f"^{word}$"[i : i + 4] for word in words for i in range(len(word) - 1)]
    return [zlib.crc32(gram.encode()) % buckets for gram in (*words, *pairs, *pieces)]


class NGramBagConfig(transformers.PretrainedConfig):
    model_type = "ngram_bag"

    def __init__(self, buckets: int = 2**18, **kwargs: Any):
        self.buckets = buckets
        super().__init__(**kwargs)


class NGramBag(transformers.PreTrainedModel):
    """A linear model of words, word pairs and four-letter pieces of words, all hashed (Bojanowski 2017).

    The score is the sum of their weights over the root of their number: a mean would reward short texts.
    """

    config_class = NGramBagConfig

    def __init__(self, config: NGramBagConfig):
        super().__init__(config)
        self.weights = nn.EmbeddingBag(config.buckets, 1, mode="sum")
        self.bias = nn.Parameter(torch.zeros(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.EmbeddingBag):
            nn.init.zeros_(module.weight)

    def forward(self, texts: list[str]) -> Tensor:  # -> [B]
        buckets = [hash_grams(text, self.config.buckets) for text in texts]
        sizes = torch.tensor([len(row) for row in buckets])
        ids, starts = torch.tensor([n for row in buckets for n in row]), sizes.cumsum(0) - sizes
        total = self.weights(ids.to(self.bias.device), starts.to(self.bias.device)).squeeze(-1)
        return total / sizes.to(self.bias.device).sqrt() + self.bias


transformers.AutoConfig.register("ngram_bag", NGramBagConfig)
AutoModelForSequenceClassification.register(NGramBagConfig, NGramBag)


class Reward(nn.Module):
    """Texts in, scores out, [B]: from a bag, a sequence classifier or a Python function."""

    def __init__(self, name: str, lm: nn.Module, tokenizer: Any, label: int):
        super().__init__()
        self.net = self.function = None
        self.tokenizer, self.label = tokenizer, label
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        if found := re.fullmatch(r"(.+\.py):(\w+)", name):
            self.function = load_function(*found.groups())
        elif name == "bag":
            self.net = NGramBag(NGramBagConfig())
        elif name == "lm":  # Stiennon 2020: the head's weights have standard deviation 1 / sqrt(d + 1)
            config = copy.deepcopy(lm.config)
            config.num_labels = 1
            self.net = AutoModelForSequenceClassification.from_config(config).eval()
            nn.init.normal_(self.net.score.weight, std=1 / math.sqrt(config.hidden_size + 1))
        else:
            try:
                self.net = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32).eval()
                self.tokenizer = AutoTokenizer.from_pretrained(name)
            except Exception as error:  # the loader has no common class of errors
                fail(f"cannot load the reward model {name!r}: {error}")
            self.mean.fill_(getattr(self.net.config, "reward_mean", 0.0))
            self.std.fill_(getattr(self.net.config, "reward_std", 1.0))

    def forward(self, texts: list[str]) -> Tensor:
        """Scores as the model gives them."""
        if self.function is not None:
            try:
                scores = torch.as_tensor(np.asarray(self.function(texts), dtype=np.float32))
            except Exception as error:  # it is anybody's code
                fail(f"the reward function failed: {error!r}")
            if scores.shape != (len(texts),):
                fail(f"the reward function returned shape {tuple(scores.shape)} for {len(texts)} texts")
            return scores.to(self.mean.device)
        if self.net.config.model_type == "ngram_bag":
            return self.net(texts)
        if not hasattr(self.net, "score"):  # an encoder
            batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.mean.device)
            return self.net(**batch).logits[:, self.label].float()
        # A decoder reads the text from left to right and gives its score at the end-of-sequence token. The
        # mask says where that is; transformers looks for the pad token, which may be the same one.
        longest = getattr(self.net.config, "max_position_embeddings", 10**9)  # what is longer loses its end
        rows = [encode(self.tokenizer, "", text, longest)[0] for text in texts]
        ids, mask = (x.to(self.mean.device) for x in pad(rows, self.tokenizer.eos_token_id, "right"))
        hidden = self.net.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        return self.net.score(last)[:, self.label].float()

    @torch.no_grad()
    def score(self, texts: list[str]) -> Tensor:
        """Normalised scores, [B]; ends the program if one is no number."""
        parts = [self(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        scores = (torch.cat(parts) - self.mean) / self.std
        if not torch.isfinite(scores).all():
            text = texts[int((~torch.isfinite(scores)).nonzero()[0])]
            fail(f"the reward of the text {text!r} is no finite number")
        return scores


def save_pretrained(folder: Path, net: nn.Module, tokenizer: Any) -> None:
    """Network and tokenizer as a folder that from_pretrained loads."""
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def response_logps(
    lm: nn.Module, rows: list[tuple[list[int], int]], pad_id: int, temperature: float, group_size: int = 32
) -> tuple[Tensor, Tensor]:
    """log pi(response | prompt) of each text, and the number of the response's tokens, both [B].

    Texts go through the model in groups of like length, so that little is padding.
    """
    device = next(lm.parameters()).device
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
    logps = []
    for group in np.array_split(order, math.ceil(len(rows) / group_size)):
        ids, mask = (x.to(device) for x in pad([rows[n][0] for n in group], pad_id, "right"))
        starts = torch.tensor([rows[n][1] for n in group], device=device).unsqueeze(1)
        count = ids.shape[1] - int(starts.min())
        response = mask * (torch.arange(ids.shape[1], device=device) >= starts)
        logprobs, _ = token_logprobs(lm, ids, mask, count, temperature)
        logps.append((logprobs * response[:, -count:]).sum(1))
    counts = torch.tensor([len(ids) - start for ids, start in rows], device=device)
    return torch.cat(logps)[np.argsort(order)], counts


def load_function(path: str, name: str) -> Callable[[list[str]], Any]:
    """A reward function of the user's own: texts in, one number a text out."""
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # it is anybody's code
        fail(f"cannot load the reward function {name} from {path}: {error!r}")


# 4. The mathematics -----------------------------------------------------------------------------
# A text's logp is the sum of its response's token log-probabilities, and its logratio is logp - ref_logp; its mean
# is the same over the number of tokens. All are [B], and so are the losses. A reward is beta times either of them.


def dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 7 of Rafailov 2023; with smoothing the conservative form, Eq. 3 of Mitchell 2023."""
    margins = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Eq. 17 of Azar 2023: the gap shall be 1 / (2 beta), no less and no more."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SLiC's margin loss (Zhao 2023) on DPO's rewards, as in Section 3 of Liu 2023."""
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def kto_loss(logratios: Tensor, good: Tensor, kl: Tensor, beta: float, good_weight: float, bad_weight: float) -> Tensor:
    """Eq. 7 of Ethayarajh 2024: a text is worth what it is above (good) or below (bad) the reference point kl."""
    value = torch.sigmoid(beta * torch.where(good, logratios - kl, kl - logratios))
    return torch.where(good, good_weight, bad_weight) * (1 - value)


def kto_weights(good: list[bool], good_weight: float | None, bad_weight: float | None) -> tuple[float, float]:
    """Weights of good and of bad texts: those given, and otherwise such that both labels have equal say (Eq. 8)."""
    share = sum(good) / len(good)
    larger = max(share, 1 - share)
    weights = larger / max(share, 1e-9), larger / max(1 - share, 1e-9)
    return good_weight or weights[0], bad_weight or weights[1]


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """Eq. 7 of Hong 2024, -log sigmoid of the log odds ratio; beta times this is added to the SFT loss (Eq. 6)."""

    def log_odds(means: Tensor) -> Tensor:
        return means - torch.log(-torch.expm1(means.clamp(max=-1e-6)))

    return -F.logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))


def simpo_loss(chosen_means: Tensor, rejected_means: Tensor, beta: float, gamma: float) -> Tensor:
    """Eq. 6 of Meng 2024: the mean log-probability is the reward, and gamma the margin asked for."""
    return -F.logsigmoid(beta * (chosen_means - rejected_means) - gamma)


def preference(shares_i: np.ndarray, shares_j: np.ndarray) -> np.ndarray:
    """P(a vote for i is above a vote for j), ties counted half; vote shares [B, grades] -> [B]."""
    below = np.cumsum(shares_j, axis=1) - shares_j
    return (shares_i * (below + 0.5 * shares_j)).sum(1)


def pair_loss(scores_i: Tensor, scores_j: Tensor, preferred: Tensor) -> Tensor:
    """-log P(what people said) under Bradley-Terry, P(i over j) = sigmoid(r_i - r_j); all [B], summed."""
    return F.binary_cross_entropy_with_logits(scores_i - scores_j, preferred, reduction="sum")


def distinct_2(texts: list[str]) -> float:
    """Different word pairs over all word pairs, averaged over groups of 128 texts (larger groups repeat more)."""
    shares = []
    for i in range(0, max(len(texts) - 127, 1), 128):
        words = [text.lower().split() for text in texts[i : i + 128]]
        pairs = [pair for row in words for pair in zip(row[:-1], row[1:], strict=True)]
        shares.append(len(set(pairs)) / max(len(pairs), 1))
    return sum(shares) / len(shares)


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("rewards/margins", "eval/judge", "eval/kl", "logps/chosen", "logps/rejected", "eval/distinct_2")
COLUMNS = ("charts/learning_rate", "losses/sft_loss", "losses/reward_loss", "losses/preference_loss",
           "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected", "charts/kto_kl", "eval/score", "eval/judge", "eval/vader", "eval/kl",
           "eval/kl_interval", "eval/length", "eval/distinct_2", "eval/ref_perplexity", "eval/ended")  # fmt: skip


def batches(size: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Row numbers of every minibatch: each epoch in a new order, its last minibatch filled up from its start."""
    count = math.ceil(size / batch_size)
    orders = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(epochs)]
    return [rows for order in orders for rows in np.resize(order, (count, batch_size))]


def optimizer_step(
    args: Any, accelerator: Accelerator, model: nn.Module, optimizer: Any, rows: np.ndarray,
    sums: Callable[[np.ndarray], Tensor], weight: float,
) -> Tensor:  # fmt: skip
    """One step along the gradient of sums(rows)[0] / weight; returns sums(rows) / weight.

    Every process takes its share of the rows, in parts that fit into memory. Because sums are added up and
    divided by the weight of all rows together, neither changes the result.
    """
    optimizer.zero_grad(set_to_none=True)
    parts = np.array_split(rows, accelerator.num_processes * args.gradient_accumulation)
    parts = parts[accelerator.process_index * args.gradient_accumulation :][: args.gradient_accumulation]
    total = 0
    for i, part in enumerate(parts):
        with accelerator.no_sync(model) if i < len(parts) - 1 else contextlib.nullcontext():
            with accelerator.autocast():
                values = sums(part) / weight
            accelerator.backward(values[0] * accelerator.num_processes)  # gradients of processes are averaged
        total = total + values.detach()
    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    return accelerator.reduce(total, "sum")


def sft_tokens(rows: list[tuple[list[int], int]], chosen: np.ndarray) -> int:
    """How many tokens the chosen texts teach: all but the prompts and a text's first."""
    return max(sum(len(ids) - max(start, 1) for ids, start in (rows[n] for n in chosen)), 1)


def sft_loss(lm: nn.Module, rows: list[tuple[list[int], int]], pad_id: int, chosen: np.ndarray) -> Tensor:
    """-log pi(text | prompt) summed over the chosen texts, [1]."""
    device = next(lm.parameters()).device
    ids, mask = (x.to(device) for x in pad([rows[n][0] for n in chosen], pad_id, "right"))
    start = torch.tensor([rows[n][1] for n in chosen], device=device).unsqueeze(1)
    target = mask[:, 1:] * (torch.arange(1, ids.shape[1], device=device) >= start)
    logprobs, _ = token_logprobs(lm, ids, mask, ids.shape[1] - 1, 1.0)
    return -(logprobs * target).sum().unsqueeze(0)


def reward_loss(model: nn.Module, texts: list[str], shares: np.ndarray, chosen: np.ndarray) -> Tensor:
    """Bradley-Terry on neighbours: the first chosen text with the second, the third with the fourth, ..., [1]."""
    scores = model([texts[n] for n in chosen])
    preferred = torch.from_numpy(preference(shares[chosen[::2]], shares[chosen[1::2]])).to(scores.device)
    return pair_loss(scores[::2], scores[1::2], preferred).unsqueeze(0)


def study_reference(
    args: Args, reward: Reward, tokenizer: Any, reference: nn.Module, prompts: list[list[int]]
) -> float:  # fmt: skip
    """Shifts and scales the reward so that the reference's texts score 0 and 1; returns their mean length."""
    rng = np.random.default_rng([args.seed, 5])
    ids, mask = pad([prompts[n] for n in rng.integers(len(prompts), size=512)], tokenizer.pad_token_id, "left")
    ids, mask = ids.to(reference.device), mask.to(reference.device)
    uniforms = torch.from_numpy(rng.random((512, args.response_length), np.float32)).to(reference.device)
    tokens, response, _ = sample(reference, ids, mask, uniforms, tokenizer.eos_token_id, tokenizer.pad_token_id,
                                 args.temperature)  # fmt: skip
    scores = reward.score(decode(tokenizer, torch.cat((ids, tokens), 1), torch.cat((mask, response), 1)))
    if args.normalize_reward:
        reward.mean += scores.mean() * reward.std
        reward.std *= scores.std().clamp(min=1e-6)
    if reward.net is not None:  # so that from_pretrained brings them back
        reward.net.config.reward_mean, reward.net.config.reward_std = reward.mean.item(), reward.std.item()
    return response.sum(1).float().mean().item()


def helper_process(args: Args) -> Args:
    """Settings of a process that only computes: the first one alone writes the run folder and prints."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if args.resume:
        shutil.copytree(checkpoint_path(args.resume).parent, scratch, dirs_exist_ok=True)
    return dataclasses.replace(args, run_dir=scratch, resume=scratch if args.resume else None, track=False)


def fit(
    args: Any, accelerator: Accelerator, model: nn.Module, optimizer: Any, minibatches: list[np.ndarray], first: int,
    lr: float, sums: Callable[[np.ndarray], Tensor], weight: Callable[[np.ndarray], float],
) -> Iterator[tuple[int, float, float]]:  # fmt: skip
    """Supervised learning, one step a minibatch; yields minibatches done, learning rate and loss now and then."""
    for i in range(first, len(minibatches)):
        optimizer.param_groups[0]["lr"] = rate = lr * (1 - i / len(minibatches))
        loss = optimizer_step(args, accelerator, model, optimizer, minibatches[i], sums, weight(minibatches[i]))
        if (i + 1) % 20 == 0 or i + 1 == len(minibatches):
            yield i + 1, rate, loss.item()


def sample_pairs(
    args: Args, accelerator: Accelerator, tokenizer: Any, lm: nn.Module, reward: Reward, prompts: list[list[int]]
) -> list[dict[str, Any]]:  # fmt: skip
    """--pairs sampled: the best and the worst of several texts of lm to each prompt, by the reward model."""
    rng, size = np.random.default_rng([args.seed, 7]), args.num_samples
    drawn = rng.integers(len(prompts), size=args.num_pairs)
    uniforms = rng.random((args.num_pairs, size, args.response_length), np.float32)
    share = np.array_split(np.arange(args.num_pairs), accelerator.num_processes)[accelerator.process_index]
    pairs = []
    for rows in np.array_split(share, math.ceil(len(share) * size / 256)):
        heads = [prompts[n] for n in drawn[rows].repeat(size)]
        ids, mask = (x.to(accelerator.device) for x in pad(heads, tokenizer.pad_token_id, "left"))
        draws = torch.from_numpy(uniforms[rows]).flatten(0, 1).to(accelerator.device)
        tokens, response, _ = sample(lm, ids, mask, draws, tokenizer.eos_token_id, tokenizer.pad_token_id,
                                     args.temperature)  # fmt: skip
        texts = decode(tokenizer, torch.cat((ids, tokens), 1), torch.cat((mask, response), 1))
        ended = (tokens == tokenizer.eos_token_id).mul(response).any(1)
        scores = (reward.score(texts) - args.missing_eos_penalty * ~ended).view(-1, size)
        for first, row in enumerate(scores):
            best, worst = (first * size + int(n) for n in (row.argmax(), row.argmin()))
            head = decode(tokenizer, [heads[best]])[0]
            pair = {"prompt": head}
            for name, n in (("chosen", best), ("rejected", worst)):
                pair |= {name: texts[n][len(head) :], f"{name}_ended": bool(ended[n]),
                         f"{name}_score": round(scores.flatten()[n].item(), 4)}  # fmt: skip
            pairs.append(pair)
    return gather_object(pairs)


def add_reference(args: Args, accelerator: Accelerator, reference: nn.Module, pad_id: int, data: Preferences) -> None:
    """What the losses need of the reference, computed once. Every process does its share of the texts."""

    @torch.no_grad()
    def logps(rows: list[tuple[list[int], int]]) -> Tensor:
        total = torch.zeros(len(rows), device=accelerator.device)
        if args.loss in ("orpo", "simpo") or args.reference_free:
            return total
        share = np.array_split(np.arange(len(rows)), accelerator.num_processes)[accelerator.process_index]
        with accelerator.autocast():
            total[share], _ = response_logps(reference, [rows[n] for n in share], pad_id, args.temperature)
        return accelerator.reduce(total, "sum")

    if args.loss == "kto":  # a pair is torn into two texts of which neither knows of the other
        order = np.random.default_rng([args.seed, 8]).permutation(len(data.rows))
        data.rows, data.good = [data.rows[n] for n in order], [data.good[n] for n in order]
        following = data.rows[1:] + data.rows[:1]
        mixed = [(a[:start] + b[skip:], start) for (a, start), (b, skip) in zip(data.rows, following, strict=True)]
        data.mismatched = [(ids[: args.max_length], start) for ids, start in mixed]
        data.mismatched_ref_logps = logps(data.mismatched)
    data.ref_logps = logps(data.rows)


def kto_reference_point(
    args: Args, accelerator: Accelerator, model: nn.Module, pad_id: int, data: Preferences, rows: np.ndarray
) -> Tensor:
    """The KL that good texts must exceed (Section 4.1): the mean logratio of mismatched texts, at least 0."""
    share = np.array_split(rows, accelerator.num_processes)[accelerator.process_index]
    with torch.no_grad(), accelerator.autocast():
        logps, _ = response_logps(model, [data.mismatched[n] for n in share], pad_id, args.temperature)
    total = accelerator.reduce((logps - data.mismatched_ref_logps[share]).sum(), "sum")
    return (total / len(rows)).clamp(min=0)


def preference_losses(args: Args, values: Tensor, good: Tensor, kl: Tensor, weights: tuple[float, float]) -> Tensor:
    """The losses of pairs; values has all chosen texts and then all rejected ones. KTO: of single texts."""
    if args.loss == "kto":
        return kto_loss(values, good, kl, args.beta, *weights)
    chosen, rejected = values.chunk(2)
    if args.loss == "ipo":
        return ipo_loss(chosen, rejected, args.beta)
    if args.loss == "hinge":
        return hinge_loss(chosen, rejected, args.beta)
    if args.loss == "orpo":
        return args.beta * orpo_loss(chosen, rejected)
    if args.loss == "simpo":
        return simpo_loss(chosen, rejected, args.beta, args.simpo_gamma)
    return dpo_loss(chosen, rejected, args.beta, args.label_smoothing if args.loss == "cdpo" else 0.0)


def preference_step(
    args: Args, accelerator: Accelerator, model: nn.Module, optimizer: Any, pad_id: int, data: Preferences,
    rows: np.ndarray,
) -> Tensor:  # fmt: skip
    """One optimizer step on these pairs (KTO: texts); the loss and, over their number, the sums that are reported."""
    single, average = args.loss == "kto", args.loss in ("orpo", "simpo") or (args.loss == "ipo" and args.ipo_average)
    kl = torch.zeros((), device=accelerator.device)
    if single:
        kl = kto_reference_point(args, accelerator, model, pad_id, data, rows)
    weights = kto_weights(data.good, args.desirable_weight, args.undesirable_weight)
    taught = [n for n in (rows if single else 2 * rows) if data.good[n]]
    tokens = sum(len(data.rows[n][0]) - data.rows[n][1] for n in taught)
    sft_coef = args.sft_coef + (args.loss == "orpo")

    def sums(part: np.ndarray) -> Tensor:
        numbers = part if single else np.concatenate((2 * part, 2 * part + 1))
        good = torch.tensor([data.good[n] for n in numbers], device=accelerator.device)
        logps, counts = response_logps(model, [data.rows[n] for n in numbers], pad_id, args.temperature)
        values = logps - data.ref_logps[numbers]
        if average:
            values = values / counts
        losses = preference_losses(args, values, good, kl, weights)
        loss = losses.sum() - sft_coef * (logps * good).sum() * len(rows) / max(tokens, 1)
        right = (values > kl) == good if single else torch.gt(*values.chunk(2))
        ones = torch.ones_like(logps)
        measured = [(x * mask).sum() for mask in (good, ~good) for x in (ones, args.beta * values, logps)]
        return torch.stack((loss, kl * len(part), right.sum(), *measured))

    return optimizer_step(args, accelerator, model, optimizer, rows, sums, len(rows))


def preference_metrics(args: Args, steps: list[Tensor]) -> dict[str, float | None]:
    """The means over some steps of what preference_step returned."""
    loss, kl, right, good, good_reward, good_logp, bad, bad_reward, bad_logp = torch.stack(steps).mean(0).tolist()
    metrics = {"losses/preference_loss": loss, "rewards/accuracies": right}
    if good:
        metrics |= {"rewards/chosen": good_reward / good, "logps/chosen": good_logp / good}
    if bad:
        metrics |= {"rewards/rejected": bad_reward / bad, "logps/rejected": bad_logp / bad}
    if good and bad:
        metrics["rewards/margins"] = good_reward / good - bad_reward / bad
    return metrics | ({"charts/kto_kl": kl} if args.loss == "kto" else {})


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    args = dataclasses.replace(args, beta=args.beta or BETAS[args.loss])
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    seed_everything(args.seed)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if args.bf16 else None)
    device = accelerator.device
    share = accelerator.num_processes * args.gradient_accumulation
    for size in (args.batch_size, args.sft_batch_size, args.reward_batch_size // 2):
        if size % share:
            fail(f"a minibatch of {size} cannot be shared by {share} (processes times --gradient-accumulation)")
    if not accelerator.is_main_process:
        args = helper_process(args)

    tokenizer, policy = load_lm(args.model)
    policy.to(device)
    data, held_out = load_split(args.dataset, args.reward_split), load_split(args.dataset, args.eval_split)
    prompts, eval_prompts = make_prompts(args, tokenizer, data), make_prompts(args, tokenizer, held_out)
    preferences = None  # until the SFT model has written them
    if args.pairs != "sampled":
        human = args.pairs == "human"
        records = rated_preferences(args, tokenizer, data) if human else load_preferences(args, tokenizer)
        preferences = encode_preferences(args, tokenizer, records)
    judges = Judges(args)
    heads, texts = heads_and_texts(args, data)
    sft_rows = [encode(tokenizer, head, text, args.max_length) for head, text in zip(heads, texts, strict=True)]
    texts = [head + text for head, text in zip(heads, texts, strict=True)]
    if args.sft_epochs:
        sft_rows = [sft_rows[n] for n in known(tokenizer, [ids for ids, _ in sft_rows], "texts")]
    lengths = [len(ids) + args.response_length for ids in prompts + eval_prompts]
    lengths += [len(ids) for ids, _ in sft_rows] if args.sft_epochs else []
    if max(lengths) > (room := getattr(policy.config, "max_position_embeddings", max(lengths))):
        fail(f"{args.model} reads {room} tokens, a text may have {max(lengths)}: "
             "lower --response-length or --max-length")  # fmt: skip
    sft_batches = batches(len(sft_rows), args.sft_batch_size, args.sft_epochs, args.seed)
    trains_reward = args.reward_model in ("bag", "lm")
    reward = Reward(args.reward_model, policy, tokenizer, args.reward_label)
    reward.to(device).score(texts[:2])  # a reward that does not work should say so now
    shares = vote_shares(args, data) if trains_reward else None
    pair_batches = batches(len(texts), args.reward_batch_size, args.reward_epochs if trains_reward else 0, args.seed)
    # Steps are texts: those of SFT, then those of the rated pairs, then the preferences.
    starts = {"sft": 0, "reward": len(sft_batches) * args.sft_batch_size}
    starts["dpo"] = starts["reward"] + len(pair_batches) * args.reward_batch_size
    steps = math.ceil(args.total_episodes / args.batch_size)

    # What a checkpoint holds: the place reached, the networks made so far, the stage's optimizer.
    place: dict[str, Any] = {"stage": "sft", "done": 0, "results": {}}
    networks: dict[str, nn.Module] = {"policy": policy}
    current: dict[str, Any] = {}
    if saved:
        restore(saved["networks"], policy=policy)
        place = {key: saved[key] for key in place}

    def state() -> dict[str, Any]:
        optimizer = current["optimizer"].state_dict() if current else saved["optimizer"]  # not yet rebuilt
        networks_now = {name: net.state_dict() for name, net in networks.items()}
        return {**place, "networks": networks_now, "optimizer": optimizer}

    def begin(stage: str, model: nn.Module, lr: float) -> tuple[nn.Module, Any]:
        """The stage's model and optimizer, ready for every process; where a run resumes, as they were."""
        if place["stage"] != stage:
            place.update(stage=stage, done=0)
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=lr))
        if saved and saved["stage"] == stage:
            optimizer.load_state_dict(saved["optimizer"])
        current["optimizer"] = optimizer
        return model, optimizer

    total = starts["dpo"] + steps * args.batch_size
    with RunRecord(args, Path(args.model).name, total, device, state, CURVES, saved) as run:

        def report(stage: str, done: int, size: int, metrics: dict[str, float | None]) -> None:
            place["done"] = done
            run.report(starts[stage] + done * size, dict.fromkeys(COLUMNS) | metrics)

        # 1. Supervised fine-tuning: the policy learns to write like the data.
        if place["stage"] == "sft":
            lm, optimizer = begin("sft", policy, args.sft_learning_rate)
            sft_sums = partial(sft_loss, lm, sft_rows, tokenizer.pad_token_id)
            sft_weight = partial(sft_tokens, sft_rows)
            for done, lr, loss in fit(args, accelerator, lm, optimizer, sft_batches, place["done"],
                                      args.sft_learning_rate, sft_sums, sft_weight):  # fmt: skip
                report("sft", done, args.sft_batch_size, {"charts/learning_rate": lr, "losses/sft_loss": loss})
            save_pretrained(run.folder / "sft", policy, tokenizer)

        # The SFT model, frozen, is the reference from which the KL is measured.
        networks["reference"] = reference = copy.deepcopy(policy).requires_grad_(False)
        networks["reward"] = reward
        if args.reward_model == "lm":
            reward.net.base_model.load_state_dict(policy.base_model.state_dict())
        if saved and "reward" in saved["networks"]:
            restore(saved["networks"], reference=reference, reward=reward)

        # 2. The reward model: which of two texts do people rate higher?
        if place["stage"] != "dpo":
            if trains_reward:
                model, optimizer = begin("reward", reward, args.reward_learning_rate)
                pair_sums = partial(reward_loss, model, texts, shares)
                for done, lr, loss in fit(args, accelerator, model, optimizer, pair_batches, place["done"],
                                          args.reward_learning_rate, pair_sums, lambda r: len(r) // 2):  # fmt: skip
                    metrics = {"charts/learning_rate": lr, "losses/reward_loss": loss}
                    report("reward", done, args.reward_batch_size, metrics)
            place["results"] = reward_test(args, reward, held_out)
            study_reference(args, reward, tokenizer, reference, prompts)
            if reward.net is not None:
                save_pretrained(run.folder / "reward_model", reward.net, reward.tokenizer)

        # 3. The preferences: the SFT model writes, the reward model says which text is better.
        if preferences is None:
            file = run.folder / "pairs" / "train.jsonl"
            if place["stage"] != "dpo":
                records = sample_pairs(args, accelerator, tokenizer, reference, reward, prompts)
                file.parent.mkdir(exist_ok=True)
                file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            preferences = encode_preferences(args, tokenizer, records)
        add_reference(args, accelerator, reference, tokenizer.pad_token_id, preferences)

        # 4. Learning from them: classification, with the policy's own log-probabilities as the classifier.
        model, optimizer = begin("dpo", policy, args.learning_rate)
        size = len(preferences.rows) if args.loss == "kto" else len(preferences.rows) // 2
        epochs = math.ceil(steps / math.ceil(size / args.batch_size))
        minibatches, history = batches(size, args.batch_size, epochs, args.seed), []
        for i in range(place["done"], steps):
            optimizer.param_groups[0]["lr"] = lr = args.learning_rate * (1 - i / steps if args.anneal_lr else 1)
            history.append(preference_step(args, accelerator, model, optimizer, tokenizer.pad_token_id, preferences,
                                           minibatches[i]))  # fmt: skip
            evaluates = (i + 1) % args.eval_every == 0
            if not evaluates and (i + 1) % 8 and i + 1 < steps:
                continue
            metrics = {"charts/learning_rate": lr} | preference_metrics(args, history)
            history.clear()
            if evaluates and accelerator.is_main_process:
                scores, _ = evaluate(args, tokenizer, policy, reference, eval_prompts[:128], reward, judges)
                metrics |= {f"eval/{name}": value for name, value in scores.items()}
            report("dpo", i + 1, args.batch_size, metrics)

        save_pretrained(run.folder / "policy", policy, tokenizer)
        results = compare(args, tokenizer, policy, reference, eval_prompts, reward, judges, run.folder)
        run.finish(None, **place["results"], **results)
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------


class Judges:
    """Two opinions that the policy never saw: a classifier of the other half of the ratings, and VADER's rules."""

    def __init__(self, args: Any):
        self.vader, self.net = SentimentIntensityAnalyzer(), None
        if args.judge_split is None:
            return
        data = load_split(args.dataset, args.judge_split)
        heads, texts = heads_and_texts(args, data)
        texts = [head + text for head, text in zip(heads, texts, strict=True)]
        positive = (torch.tensor(column(data, args.label_column, Real)) > args.positive_above).float()
        self.net = NGramBag(NGramBagConfig())
        optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-2)
        for rows in batches(len(texts), 64, 10, seed=0):  # the same judge whatever the run's seed
            loss = F.binary_cross_entropy_with_logits(self.net([texts[n] for n in rows]), positive[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> dict[str, float | None]:
        """Mean probability that a text is positive, and VADER's mean compound score in [-1, 1]."""
        judge = None if self.net is None else torch.sigmoid(self.net(texts)).mean().item()
        vader = [self.vader.polarity_scores(text)["compound"] for text in texts]
        return {"judge": judge, "vader": sum(vader) / len(vader)}


@torch.no_grad()
def reward_test(args: Args, reward: Reward, data: datasets.Dataset) -> dict[str, float | None]:
    """The reward model on pairs of held-out texts: how often it prefers the one that raters prefer, for all pairs
    and for those rated at least a grade apart, and how far, on average, its stated probability is from the share
    of raters (expected calibration error, ten bins)."""
    if args.label_column not in data.column_names or reward.function is not None:
        return {"reward_accuracy": None, "reward_accuracy_all": None, "reward_calibration": None}
    heads, texts = heads_and_texts(args, data)
    scores = reward.score([head + text for head, text in zip(heads, texts, strict=True)])
    rows = np.random.default_rng(0).integers(len(texts), size=(20_000, 2))
    shares = vote_shares(args, data)
    share = preference(shares[rows[:, 0]], shares[rows[:, 1]])
    margin = ((scores[rows[:, 0]] - scores[rows[:, 1]]) * reward.std).cpu().numpy()  # undoes the scaling of score()
    grades = np.array(column(data, args.label_column, Real), float)
    apart = grades[rows[:, 0]] - grades[rows[:, 1]]
    right = (margin > 0) == (apart > 0)
    stated = 1 / (1 + np.exp(-margin))
    bins = np.minimum((stated * 10).astype(int), 9)
    gap = sum(abs((stated - share)[bins == b].sum()) for b in range(10)) / len(rows)
    found = {"reward_accuracy": right[abs(apart) >= 1], "reward_accuracy_all": right[apart != 0]}
    shown = {name: float(pairs.mean()) if len(pairs) else None for name, pairs in found.items()}
    return shown | {"reward_calibration": float(gap)}


@torch.no_grad()
def evaluate(
    args: Any, tokenizer: Any, lm: nn.Module, reference: nn.Module, prompts: list[list[int]], reward: Any,
    judges: Judges,
) -> tuple[dict[str, float | None], list[tuple[str, str]]]:  # fmt: skip
    """What lm makes of the prompts, with random numbers of its own: the measurements, and prompts with texts."""
    device = reference.device
    uniforms = np.random.default_rng([args.seed, 6]).random((len(prompts), args.response_length), np.float32)
    lengths, kls, nlls, ends, pairs = [], [], [], [], []
    for i in range(0, len(prompts), 128):
        ids, mask = (x.to(device) for x in pad(prompts[i : i + 128], tokenizer.pad_token_id, "left"))
        draws = torch.from_numpy(uniforms[i : i + 128]).to(device)
        tokens, response, logprobs = sample(lm, ids, mask, draws, tokenizer.eos_token_id, tokenizer.pad_token_id,
                                            args.temperature)  # fmt: skip
        ids, mask = torch.cat((ids, tokens), 1), torch.cat((mask, response), 1)
        ref_logprobs, _ = token_logprobs(reference, ids, mask, args.response_length, args.temperature)
        kls.append(((logprobs - ref_logprobs) * response).sum(1))
        nlls.append(-(ref_logprobs * response).sum())
        lengths.append(response.sum(1))
        ends.append((tokens == tokenizer.eos_token_id).mul(response).any(1))
        heads = decode(tokenizer, prompts[i : i + 128])
        pairs += zip(heads, decode(tokenizer, ids, mask), strict=True)
    kl, length, texts = torch.cat(kls), torch.cat(lengths).float(), [text for _, text in pairs]
    return {
        "score": reward.score(texts).mean().item(), **judges(texts), "kl": kl.mean().item(),
        "kl_interval": 1.96 * kl.std().item() / math.sqrt(len(kl)), "length": length.mean().item(),
        "distinct_2": distinct_2([text[len(head) :] for head, text in pairs]),
        "ref_perplexity": (sum(nlls) / length.sum()).exp().item(),
        "ended": torch.cat(ends).float().mean().item(),
    }, pairs  # fmt: skip


def compare(
    args: Any, tokenizer: Any, lm: nn.Module, reference: nn.Module, prompts: list[list[int]], reward: Any,
    judges: Judges, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Measures the reference and the trained model on the same held-out prompts; writes and prints samples."""
    prompts = prompts[: args.eval_episodes]
    before, texts_before = evaluate(args, tokenizer, reference, reference, prompts, reward, judges)
    after, texts_after = evaluate(args, tokenizer, lm, reference, prompts, reward, judges)
    lines = ["# Held-out prompts, continued before and after training", ""]
    for (head, old), (_, new) in list(zip(texts_before, texts_after, strict=True))[:32]:
        lines += [f"**{head}**", f"- before: {old[len(head) :].strip()}", f"- after: {new[len(head) :].strip()}", ""]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[2:26]))
    shown = ("score", "judge", "vader", "kl", "length", "distinct_2")
    print(" ".join(f"{name} {before[name]:.2f} → {after[name]:.2f}" for name in shown if after[name] is not None))
    return {"before": before, "after": after}


def evaluate_saved(args: Args) -> None:
    """--eval: rebuilds the saved models, lets them write and prints the measurements."""
    validate(args)
    saved, folder = load_checkpoint(args.eval), checkpoint_path(args.eval).parent
    if saved["stage"] != "dpo":
        fail(f"{args.eval} was interrupted before it learnt from preferences; finish it with --resume")
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, policy = load_lm(args.model)
    policy.to(device)
    reference = copy.deepcopy(policy)
    reward = Reward(args.reward_model, policy, tokenizer, args.reward_label).to(device)
    restore(saved["networks"], policy=policy, reference=reference, reward=reward)
    prompts = make_prompts(args, tokenizer, load_split(args.dataset, args.eval_split))
    compare(args, tokenizer, policy, reference, prompts, reward, Judges(args), folder)


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
