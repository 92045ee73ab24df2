# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "transformers>=5.0", "datasets>=3.0", "accelerate>=1.0", "vaderSentiment>=3.3", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17",
# ]
# ///
"""RLHF: supervised fine-tuning, a reward model of human ratings, PPO with a KL penalty.

A language model first learns to write like the data (SFT). People's ratings of texts train a second
model to say which of two texts they would prefer (reward model). Then the language model writes, the
reward model scores each text, and PPO makes well-scored texts likelier, while a penalty on every token
keeps the policy near the SFT model: far from it the reward model no longer knows what people like.

    maximise  E[ r(x, y) ] - beta * KL( pi || pi_sft ),    whose exact solution is  pi* ~ pi_sft * exp(r / beta)

Papers   Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
         Stiennon et al. 2020, Learning to Summarize from Human Feedback, arXiv 2009.01325
         Ouyang et al. 2022, Training Language Models to Follow Instructions, arXiv 2203.02155
         Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347
         Wang et al. 2024, Transforming and Combining Rewards, arXiv 2402.00742 (the log-sigmoid)
         Bojanowski et al. 2017, Enriching Word Vectors with Subword Information, arXiv 1607.04606
         Gao et al. 2022, Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760

Run      python rlhf/rlhf_ppo.py
         python rlhf/rlhf_ppo.py --reward-shaping none                        (no ceiling: compare score and judge)
         python rlhf/rlhf_ppo.py --reward-model my_reward.py:score             (score(texts) -> one number a text)
         python rlhf/rlhf_ppo.py --model gpt2 --dataset stanfordnlp/imdb --label-column label \\
             --reward-split "train[:25%]+train[50%:75%]" --judge-split "train[25%:50%]+train[75%:]" \\
             --eval-split test --reward-model lvwerra/distilbert-imdb --learning-rate 1e-5 --sft-learning-rate 2e-5
         accelerate launch --num-processes 2 rlhf/rlhf_ppo.py
         python rlhf/rlhf_ppo.py --eval runs/<folder>

Expect   fresh seeds 101 to 105 (python benchmarks/run.py rlhf --seeds 5), each on one core: 178 s from Enter to
         the prompt on a quiet machine (one seed), up to 228 beside other work; 1.07 GB. On 384 held-out
         prompts, median before and after PPO (and the worst seed): judge's P(positive) .52 and .84 (.81), VADER
         .18 and .52 (.47), sequence KL 4.5 (5.4) nats, distinct-2 .93 and .83 (.82), length 12.1 and 11.4 tokens
         (at most 11 % shorter or longer), reference perplexity 53 and 40. Reward model on held-out human pairs:
         .82 right where the mean ratings are a grade or more apart, but .75 over all pairs; calibration error
         .017. A GPU and the other reward models are not measured yet.

Folder   besides the usual: sft/, reward_model/ and policy/, which from_pretrained loads, and samples.md.
         summary.json has reward_accuracy (on held-out texts rated at least a grade apart),
         reward_accuracy_all and reward_calibration, and before and after, each with score, judge, vader, kl,
         kl_interval, length, distinct_2, ref_perplexity and ended. Steps are texts: those of SFT, then those
         of rated pairs, then episodes.

Deviations from the papers
 1. The reward model is linear in hashed words, word pairs and pieces of words (--reward-model bag), trained
    like any other by Bradley-Terry; some thousand rated sentences are enough for it. The papers' way, a
    scalar head on the SFT model, is --reward-model lm --reward-learning-rate 1e-4 --reward-epochs 3.
 2. A pair's target is the share of rater pairs that prefer its first text, not one rater's verdict.
 3. The reward is log sigmoid(score): a text clearly better than the reference's typical one is good
    enough, which removes the incentive to repeat the best phrase (--reward-shaping none for the papers').
 4. A bonus per token, adapted after every iteration, keeps texts as long as the SFT model's, for the raters
    have no preference for a length (--no-keep-length).
 5. Policy and value function share the network, with a value head that starts at zero
    (--separate-value for two networks).
 6. The score stands on the last token, which is the end-of-sequence token where there is one, and that
    token is trained too, also when the tokenizer pads with it. TRL puts the score on the pad after it.
 7. One function computes the old, the reference's and the new log-probabilities, at the sampling
    temperature and without dropout, so the first ratio is 1 and the first KL 0.
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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    total_episodes: int = 5_120
    """texts the policy writes during PPO; 0 stops after the reward model"""
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
    """split for SFT, reward model and PPO's prompts; slices such as train[:50%] work"""
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
    reward_shaping: Literal["none", "logsigmoid"] = "logsigmoid"
    """what becomes of the score: itself, or log sigmoid of it, which levels off at 0"""
    keep_length: bool = True
    """pay a small bonus per token (a price, if negative), adapted to keep texts as long as the SFT model's"""
    missing_eos_penalty: float = 1.0
    """taken off the reward of a text that did not end; >= 0"""

    batch_size: int = 64
    """texts per iteration, over all processes"""
    response_length: int = 24
    """tokens a response may have"""
    temperature: float = 1.0
    """sampling temperature; > 0"""
    num_minibatches: int = 2
    """minibatches per epoch"""
    update_epochs: int = 2
    """passes over each iteration's texts"""
    learning_rate: float = 3e-4
    """Adam's step size at the start; 1e-5 suits pretrained models of 100M parameters and more"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-episodes"""
    gamma: float = 1.0
    """discount factor per token, in [0, 1]"""
    gae_lambda: float = 0.95
    """GAE's lambda, in [0, 1]"""
    clip_coef: float = 0.2
    """how far the ratio may move from 1 before it stops paying; > 0"""
    clip_vloss: bool = True
    """clip the value update as well, to clip-coef around the old value"""
    vf_coef: float = 0.1
    """weight of the value loss; >= 0"""
    target_kl: float | None = None
    """end an update early once the policy has moved this many nats a token; None never does"""
    kl_coef: float = 0.05
    """price of a nat of KL from the SFT model (beta); >= 0"""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """KL in the reward: k1 (unbiased, the objective's own gradient) or k3 (never negative, biased as a reward)"""
    kl_target: float | None = None
    """nats per text to which beta adapts (Ziegler 2019, Section 2.2); None keeps beta fixed"""
    kl_horizon: int = 1_000
    """episodes over which beta adapts; smaller is quicker"""
    separate_value: bool = False
    """give the value function a network of its own, a copy of the policy's"""
    eval_every: int = 10
    """iterations between evaluations on 128 of the held-out prompts"""


PRESETS: dict[str, dict[str, Any]] = {}


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("prompt_words", "max_length", "gradient_accumulation", "max_grad_norm", "sft_batch_size",
                 "sft_learning_rate", "reward_learning_rate", "batch_size", "response_length", "temperature",
                 "num_minibatches", "update_epochs", "learning_rate", "clip_coef", "kl_horizon",
                 "eval_every"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "total_episodes", "sft_epochs", "reward_epochs", "missing_eos_penalty", "vf_coef", "kl_coef"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.eval_episodes < 2 or args.reward_batch_size < 2:
        fail("--eval-episodes and --reward-batch-size must be at least 2")
    if args.reward_batch_size % 2:
        fail(f"--reward-batch-size {args.reward_batch_size} must be even: its texts are compared in pairs")
    for name in ("kl_target", "target_kl"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {value}")
    if args.batch_size % args.num_minibatches:
        fail(f"--batch-size {args.batch_size} must be a multiple of --num-minibatches {args.num_minibatches}")


# 2. Data ----------------------------------------------------------------------------------------


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


class ActorCritic(nn.Module):
    """The policy and its value function, a zero-initialised head on the policy's network or on a copy."""

    def __init__(self, policy: nn.Module, separate_value: bool = False):
        super().__init__()
        self.policy = policy
        self.critic = copy.deepcopy(policy.base_model) if separate_value else None
        self.value_head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids: Tensor, mask: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the last count tokens and the values of the states before them, both [B, count]."""
        logprobs, hidden = token_logprobs(self.policy, ids, mask, count, temperature)
        if self.critic is not None:
            output = self.critic(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
            hidden = output.last_hidden_state[:, -count - 1 : -1]
        return logprobs, self.value_head(hidden).squeeze(-1).float()


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
# Responses are [B, R], padded on the right; mask is 1 on a response's tokens, the last of which ends it.
# Losses are sums over tokens: whoever divides them by the tokens of the whole minibatch gets the same
# gradient in one part or in many.


def preference(shares_i: np.ndarray, shares_j: np.ndarray) -> np.ndarray:
    """P(a vote for i is above a vote for j), ties counted half; vote shares [B, grades] -> [B]."""
    below = np.cumsum(shares_j, axis=1) - shares_j
    return (shares_i * (below + 0.5 * shares_j)).sum(1)


def pair_loss(scores_i: Tensor, scores_j: Tensor, preferred: Tensor) -> Tensor:
    """-log P(what people said) under Bradley-Terry, P(i over j) = sigmoid(r_i - r_j); all [B], summed."""
    return F.binary_cross_entropy_with_logits(scores_i - scores_j, preferred, reduction="sum")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(pi || ref) at tokens sampled from pi: k1 (unbiased, any sign) or k3 (>= 0 as well)."""
    logratio = logprobs - ref_logprobs
    if estimator == "k1":
        return logratio
    return torch.expm1((-logratio).clamp(max=20)) + logratio  # the clamp keeps exp finite


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-beta * KL on every token, and the score [B] on the last one (Eq. 2, Ziegler 2019); [B, R]."""
    rewards = -kl_coef * kl * mask
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates of responses that end with their last token, [B, R] (Schulman 2015)."""
    advantages, values = torch.zeros_like(rewards), values * mask
    carry = next_values = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantages[:, t] = carry = (delta + gamma * gae_lambda * carry) * mask[:, t]
        next_values = values[:, t]
    return advantages


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Variance over the tokens of the mask, a scalar."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    return ((x - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens of the mask, 0 elsewhere."""
    mean = (x * mask).sum() / mask.sum()
    return (x - mean) * mask * torch.rsqrt(masked_variance(x, mask) + 1e-8)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 of Schulman 2017, the KL from the old policy and the number of clipped ratios, as sums over tokens."""
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    logratio = torch.where(mask > 0, logprobs - old_logprobs, 0.0).clamp(-20, 20)
    ratio = logratio.exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    clipped = ((ratio - 1).abs() > clip_coef).float()
    return -(gain * mask).sum(), ((ratio - 1 - logratio) * mask).sum().detach(), (clipped * mask).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_coef: float | None) -> Tensor:
    """Half the squared error, summed over tokens; with clip_coef the pessimistic clipped form."""
    assert values.shape == old_values.shape == returns.shape == mask.shape
    loss = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - returns) ** 2)
    return 0.5 * (loss * mask).sum()


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The proportional controller of Ziegler 2019, Section 2.2: beta grows while the KL is above its target."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def distinct_2(texts: list[str]) -> float:
    """Different word pairs over all word pairs, averaged over groups of 128 texts (larger groups repeat more)."""
    shares = []
    for i in range(0, max(len(texts) - 127, 1), 128):
        words = [text.lower().split() for text in texts[i : i + 128]]
        pairs = [pair for row in words for pair in zip(row[:-1], row[1:], strict=True)]
        shares.append(len(set(pairs)) / max(len(pairs), 1))
    return sum(shares) / len(shares)


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("objective/score", "eval/judge", "eval/kl", "eval/length", "eval/distinct_2", "losses/entropy")
COLUMNS = ("charts/learning_rate", "charts/episodes", "charts/kl_coef", "charts/token_bonus", "losses/sft_loss",
           "losses/reward_loss", "objective/score", "objective/kl", "objective/reward", "objective/length",
           "objective/ended", "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl",
           "losses/clipfrac", "losses/explained_variance", "eval/score", "eval/judge", "eval/vader", "eval/kl",
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


def rollout(
    args: Args, accelerator: Accelerator, tokenizer: Any, agent: ActorCritic, reference: nn.Module, reward: Reward,
    prompts: list[list[int]], uniforms: np.ndarray,
) -> dict[str, Tensor]:  # fmt: skip
    """Lets the policy continue the prompts and judges what it wrote: a dictionary of tensors [B, ...].

    Every process writes and judges its share of the texts; in the end each has them all.
    """
    share = np.array_split(np.arange(len(prompts)), accelerator.num_processes)[accelerator.process_index]
    prompt_ids, prompt_mask = (x[share].to(accelerator.device) for x in pad(prompts, tokenizer.pad_token_id, "left"))
    draws = torch.as_tensor(uniforms[share], dtype=torch.float32, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        tokens, mask, _ = sample(agent.policy, prompt_ids, prompt_mask, draws, tokenizer.eos_token_id,
                                 tokenizer.pad_token_id, args.temperature)  # fmt: skip
        ids, full_mask = torch.cat((prompt_ids, tokens), 1), torch.cat((prompt_mask, mask), 1)
        logprobs, values = agent(ids, full_mask, args.response_length, args.temperature)
        ref_logprobs, _ = token_logprobs(reference, ids, full_mask, args.response_length, args.temperature)
    ended = (tokens.gather(1, mask.sum(1, keepdim=True) - 1) == tokenizer.eos_token_id)[:, 0]
    scores = reward.score(decode(tokenizer, ids, full_mask))
    batch = {"ids": ids, "mask": full_mask, "response_mask": mask, "logprobs": logprobs, "values": values,
             "ref_logprobs": ref_logprobs, "scores": scores, "ended": ended.float()}  # fmt: skip
    return {name: accelerator.gather(x) for name, x in batch.items()}


def add_advantages(args: Args, batch: dict[str, Tensor], kl_coef: float, token_bonus: float = 0.0) -> None:
    """Rewards, advantages and returns of a rollout, added to it."""
    mask, scores = batch["response_mask"], batch["scores"]
    if args.reward_shaping == "logsigmoid":
        scores = F.logsigmoid(scores)
    scores = scores - args.missing_eos_penalty * (1 - batch["ended"])
    batch["kl"] = kl_estimate(batch["logprobs"], batch["ref_logprobs"], args.kl_estimator) * mask
    batch["rewards"] = token_rewards(scores, batch["kl"], mask, kl_coef) + token_bonus * mask
    advantages = gae(batch["rewards"], batch["values"], mask, args.gamma, args.gae_lambda)
    batch["returns"] = advantages + batch["values"] * mask
    batch["advantages"] = whiten(advantages, mask)


def ppo_update(
    args: Args, accelerator: Accelerator, agent: nn.Module, optimizer: Any, batch: dict[str, Tensor],
    rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """The epochs of PPO on one rollout; returns the means of its losses."""

    def sums(rows: np.ndarray) -> Tensor:
        part = {name: x[rows] for name, x in batch.items()}
        mask = part["response_mask"]
        logprobs, values = agent(part["ids"], part["mask"], mask.shape[1], args.temperature)
        pg_loss, approx_kl, clipped = ppo_loss(logprobs, part["logprobs"], part["advantages"], mask, args.clip_coef)
        v_loss = value_loss(values, part["values"], part["returns"], mask, args.clip_coef if args.clip_vloss else None)
        return torch.stack((pg_loss + args.vf_coef * v_loss, pg_loss, v_loss, approx_kl, clipped))

    history = []
    for _ in range(args.update_epochs):
        for rows in np.split(rng.permutation(len(batch["ids"])), args.num_minibatches):
            weight = batch["response_mask"][rows].sum()
            history.append(optimizer_step(args, accelerator, agent, optimizer, rows, sums, weight))
        if args.target_kl is not None and history[-1][3] > args.target_kl:
            break
    names = ("policy_loss", "value_loss", "approx_kl", "clipfrac")
    return {f"losses/{name}": x for name, x in zip(names, torch.stack(history).mean(0)[1:].tolist(), strict=True)}


def summarize(batch: dict[str, Tensor]) -> dict[str, float]:
    """Means over a rollout; the entropy is that of the sampled tokens, -log pi, a nat count per token."""
    mask, tokens = batch["response_mask"], batch["response_mask"].sum()
    residual = masked_variance(batch["returns"] - batch["values"], mask)
    metrics = {
        "objective/score": batch["scores"].mean(), "objective/kl": batch["kl"].sum(1).mean(),
        "objective/reward": batch["rewards"].sum(1).mean(), "objective/length": mask.sum(1).float().mean(),
        "objective/ended": batch["ended"].mean(), "losses/entropy": -(batch["logprobs"] * mask).sum() / tokens,
        "losses/explained_variance": 1 - residual / masked_variance(batch["returns"], mask).clamp(min=1e-8),
    }  # fmt: skip
    return {name: x.item() for name, x in metrics.items()}


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


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    rng = seed_everything(args.seed)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if args.bf16 else None)
    device = accelerator.device
    share = accelerator.num_processes * args.gradient_accumulation
    for size in (args.batch_size // args.num_minibatches, args.sft_batch_size, args.reward_batch_size // 2):
        if size % share:
            fail(f"a minibatch of {size} cannot be shared by {share} (processes times --gradient-accumulation)")
    if not accelerator.is_main_process:
        args = helper_process(args)

    tokenizer, policy = load_lm(args.model)
    data, held_out = load_split(args.dataset, args.reward_split), load_split(args.dataset, args.eval_split)
    prompts, eval_prompts = make_prompts(args, tokenizer, data), make_prompts(args, tokenizer, held_out)
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
    # Steps are texts: those of SFT, then those of the rated pairs, then the policy's own.
    starts = {"sft": 0, "reward": len(sft_batches) * args.sft_batch_size}
    starts["ppo"] = starts["reward"] + len(pair_batches) * args.reward_batch_size
    iterations = math.ceil(args.total_episodes / args.batch_size)

    # What a checkpoint holds: the place reached, the networks made so far, the stage's optimizer.
    place: dict[str, Any] = {"stage": "sft", "done": 0, "kl_coef": args.kl_coef, "token_bonus": 0.0, "sft_length": 0.0,
                             "results": {}}  # fmt: skip
    agent = ActorCritic(policy, args.separate_value).to(device)
    networks: dict[str, nn.Module] = {"agent": agent}
    current: dict[str, Any] = {}
    if saved:
        restore(saved["networks"], agent=agent)
        rng.bit_generator.state = saved["rng"]
        place = {key: saved[key] for key in place}

    def state() -> dict[str, Any]:
        optimizer = current["optimizer"].state_dict() if current else saved["optimizer"]  # not yet rebuilt
        networks_now = {name: net.state_dict() for name, net in networks.items()}
        return {**place, "networks": networks_now, "optimizer": optimizer, "rng": rng.bit_generator.state}

    def begin(stage: str, model: nn.Module, lr: float) -> tuple[nn.Module, Any]:
        """The stage's model and optimizer, ready for every process; where a run resumes, as they were."""
        if place["stage"] != stage:
            place.update(stage=stage, done=0)
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=lr))
        if saved and saved["stage"] == stage:
            optimizer.load_state_dict(saved["optimizer"])
        current["optimizer"] = optimizer
        return model, optimizer

    total = starts["ppo"] + iterations * args.batch_size
    with RunRecord(args, Path(args.model).name, total, device, state, CURVES, saved) as run:

        def report(stage: str, done: int, size: int, metrics: dict[str, float]) -> None:
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
        if place["stage"] != "ppo":
            if trains_reward:
                model, optimizer = begin("reward", reward, args.reward_learning_rate)
                pair_sums = partial(reward_loss, model, texts, shares)
                for done, lr, loss in fit(args, accelerator, model, optimizer, pair_batches, place["done"],
                                          args.reward_learning_rate, pair_sums, lambda r: len(r) // 2):  # fmt: skip
                    metrics = {"charts/learning_rate": lr, "losses/reward_loss": loss}
                    report("reward", done, args.reward_batch_size, metrics)
            place["results"] = reward_test(args, reward, held_out)
            place["sft_length"] = study_reference(args, reward, tokenizer, reference, prompts)
            if reward.net is not None:
                save_pretrained(run.folder / "reward_model", reward.net, reward.tokenizer)

        # 3. PPO: write, judge, learn.
        model, optimizer = begin("ppo", agent, args.learning_rate)
        for iteration in range(place["done"], iterations):
            lr = args.learning_rate * (1 - iteration / iterations if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            chosen = [prompts[n] for n in rng.integers(len(prompts), size=args.batch_size)]
            uniforms = rng.random((args.batch_size, args.response_length), np.float32)
            batch = rollout(args, accelerator, tokenizer, agent, reference, reward, chosen, uniforms)
            add_advantages(args, batch, place["kl_coef"], place["token_bonus"])
            losses = ppo_update(args, accelerator, model, optimizer, batch, rng)

            metrics = {"charts/learning_rate": lr, "charts/episodes": (iteration + 1) * args.batch_size,
                       "charts/kl_coef": place["kl_coef"], "charts/token_bonus": place["token_bonus"]}  # fmt: skip
            metrics |= summarize(batch) | losses
            if args.keep_length:
                place["token_bonus"] += 0.01 * (1 - metrics["objective/length"] / place["sft_length"])
            if args.kl_target is not None:
                kl = metrics["objective/kl"]
                place["kl_coef"] = adapt_kl_coef(place["kl_coef"], kl, args.kl_target, args.batch_size, args.kl_horizon)
            if (iteration + 1) % args.eval_every == 0 and accelerator.is_main_process:
                scores, _ = evaluate(args, tokenizer, policy, reference, eval_prompts[:128], reward, judges)
                metrics |= {f"eval/{name}": value for name, value in scores.items()}
            report("ppo", iteration + 1, args.batch_size, metrics)

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
    if saved["stage"] != "ppo":
        fail(f"{args.eval} was interrupted before PPO; finish it with --resume")
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, policy = load_lm(args.model)
    agent = ActorCritic(policy, args.separate_value).to(device)
    reference = copy.deepcopy(policy)
    reward = Reward(args.reward_model, policy, tokenizer, args.reward_label).to(device)
    restore(saved["networks"], agent=agent, reference=reference, reward=reward)
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
