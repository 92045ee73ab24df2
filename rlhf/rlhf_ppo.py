# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers>=5.0", "datasets>=3.0", "accelerate>=1.0", "peft>=0.17", "numpy>=1.26",
#                 "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17"]
# ///
"""RLHF: supervised fine-tuning, a reward model of preferences, PPO with a KL penalty.

A language model first learns to write like the preferred texts (SFT). From pairs of which people preferred one, a
second model learns to give every text a score (reward model). Then the language model writes, the reward model scores
each text, and PPO makes well-scored texts likelier, while a penalty on every token keeps the policy near the SFT
model: far from it the reward model no longer knows what people like.

    reward model   minimise  -log sigmoid( r(x, y_chosen) - r(x, y_rejected) )
    policy         maximise  E[ r(x, y) ] - beta * KL( pi || pi_sft ),   solved exactly by  pi_sft * exp(r / beta)

Papers   Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
         Stiennon et al. 2020, Learning to Summarize from Human Feedback, arXiv 2009.01325
         Ouyang et al. 2022, Training Language Models to Follow Instructions, arXiv 2203.02155
         Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347
         Gao et al. 2022, Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760

Run      python rlhf/rlhf_ppo.py
         python rlhf/rlhf_ppo.py --reward-split "train[:1000]" --kl-coef 0.01         (over-optimisation: watch gold)
         python rlhf/rlhf_ppo.py --reward-model rlhf/data/gold/gold.py:score --gold None
         python rlhf/rlhf_ppo.py --sft-model runs/<folder>/sft --reward-model runs/<folder>/reward_model --kl-coef 0.2
         python rlhf/rlhf_ppo.py --model gpt2 --dataset stanfordnlp/imdb --train-split "train[:5000]" \\
             --eval-split "test[:500]" --reward-model lvwerra/distilbert-imdb --gold None --learning-rate 1e-5
         accelerate launch --num-processes 2 rlhf/rlhf_ppo.py
         python rlhf/rlhf_ppo.py --eval runs/<folder>

Expect   Seeds 301 to 305, one core of an Intel Xeon while the other was at work: 238 to 284 s of training, all three
         stages, and about 1.2 GB (of shorter runs at the same batch sizes). Medians on 384 held-out prompts (and the
         range over seeds): gold_gain 1.30 (1.02 to 1.36) at a KL of 4.4 nats (3.4 to 5.1); texts 16% shorter (21% to
         14%); distinct-2 0.90 before and 0.74 (0.69 to 0.78) after, where 0.75 was aimed at. The reward model orders
         0.77 (0.75 to 0.78) of the held-out pairs as gold does, and 0.71 (0.70 to 0.72) as their labels say, of which
         a fifth are noise. With --kl-coef 0.01 --total-episodes 7680 gold rises to 1.46 at 9 nats and falls to 0.06 at
         30, while the reward model's score rises to 3.5 (means of the same seeds).
         SmolLM2-135M-Instruct with --lora-rank 8 --threads 2, on two cores: about 2 s a step of SFT (16 texts) and of
         the reward model (16 pairs), 21 s an iteration of PPO (32 texts), 3.7 GB. A GPU is not measured yet.

Folder   besides the usual: sft/, reward_model/ and policy/, which from_pretrained loads, and samples.md. Steps are
         texts that the policy wrote. summary.json has reward_accuracy (held-out pairs whose preferred text gets the
         higher score), reward_accuracy_gold (the same, with gold's own order), gold_gain (what gold says of the policy
         less what it says of the SFT model, in deviations of the latter's texts), and before and after, each with
         reward, gold, kl, kl_interval, length, distinct_2 and ended.

Deviations from the papers
 1. Gold plays the people: a frozen scorer of texts, fitted to human ratings, whose noisy verdicts are the preferences
    (Gao 2022). So the language model need only read what it writes, and what people would say can be measured.
 2. Scores are shifted and scaled to mean 0 and deviation 1 on the SFT model's texts, so one beta suits any reward.
 3. Policy and value function share the network, with a value head that starts at zero; the papers have two.
 4. The score stands on the last token, the end-of-sequence token where there is one, which is trained too, also
    when the tokenizer pads with it. A text that does not end costs --missing-eos-penalty.
 5. One function computes the old, the reference's and the new log-probabilities, at the sampling temperature and
    without dropout, so the first ratio is 1 and the first KL 0.
 6. SFT and the reward model learn from minibatches of texts of like length, which saves a third of their time.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import deque
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
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

DATA = Path(__file__).resolve().parent / "data"

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = str(DATA / "tiny_lm")  # causal language model to start from: a hub name or a folder
    dataset: str = str(DATA / "preferences")  # prompt, chosen, rejected: a hub name, a folder, a .jsonl or .csv file
    seed: int = 1  # seed of every random number: batches, prompts, sampled tokens
    total_episodes: int = 5_120  # texts that the policy writes during PPO
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where everything runs; auto is a GPU if there is one
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    eval: str | None = None  # evaluate this saved run and exit
    resume: str | None = None  # go on with this interrupted run
    eval_episodes: int = 384  # held-out prompts continued before and after

    train_split: str = "train"  # split for SFT and for PPO's prompts; slices such as train[:50%] work
    reward_split: str = "train"  # split for the reward model
    eval_split: str = "test"  # split to measure on
    prompt_words: int = 2  # how many words of a text are the prompt, where the dataset has a column text and no prompt
    max_prompt_length: int = 64  # longest prompt in tokens; rows with longer ones are left out
    max_completion_length: int = 24  # longest completion in tokens: sampled ones are cut, longer rows left out
    gold: str | None = str(DATA / "gold" / "gold.py:score")  # a second reward, for measuring only; path.py:function

    sft_model: str | None = None  # skips SFT: this model (hub name or folder) is the reference
    sft_epochs: int = 1  # passes over the chosen texts
    sft_batch_size: int = 64  # texts per step
    sft_learning_rate: float = 1e-4  # Adam's step size, lowered linearly to zero
    reward_model: str | None = None  # skips reward training: a sequence classifier (hub, folder) or path.py:function
    reward_label: int = -1  # which logit of a sequence classifier is the reward
    normalize_reward: bool = True  # shift and scale rewards to mean 0 and deviation 1 on the SFT model's texts
    reward_epochs: int = 1  # passes over the pairs; more than one overfits easily
    reward_batch_size: int = 64  # pairs per step
    reward_learning_rate: float = 1e-3  # Adam's step size, lowered linearly to zero

    batch_size: int = 256  # texts per iteration of PPO
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 2  # passes over each iteration's texts
    temperature: float = 1.0  # divides the logits, in sampling and in scoring alike
    learning_rate: float = 4e-4  # Adam's step size at the start; 1e-5 suits pretrained models of 100M and more
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    kl_coef: float = 0.17  # price of a nat of KL from the SFT model (beta)
    missing_eos_penalty: float = 1.0  # taken off the reward of a text that did not end
    gamma: float = 1.0  # discount factor per token, in [0, 1]
    gae_lambda: float = 0.95  # in [0, 1]: 0 trusts the value head (bias), 1 the sampled return (variance)
    clip_coef: float = 0.2  # how far the ratio may move from 1 before it stops paying
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0  # the gradient's norm is scaled down to at most this, in every stage
    eval_every: int = 2  # iterations between measurements on 128 of the held-out prompts

    gradient_accumulation: int = 1  # parts of a minibatch that go through the model one by one; the result is the same
    gradient_checkpointing: bool = False  # compute activations twice, and store few
    lora_rank: int = 0  # train low-rank adapters (peft) of this rank instead of all weights; 0 trains all
    bf16: bool = False  # compute in bfloat16; weights stay float32
    threads: int = 1  # processor threads; small models gain nothing from more

    def __post_init__(self):
        check(self, "> 0", "total_episodes", "eval_episodes", "eval_every", "prompt_words", "max_prompt_length")
        check(self, "> 0", "max_completion_length", "sft_batch_size", "reward_batch_size", "batch_size", "temperature")
        check(self, "> 0", "num_minibatches", "update_epochs", "clip_coef", "max_grad_norm", "gradient_accumulation")
        check(self, "> 0", "sft_learning_rate", "reward_epochs", "reward_learning_rate", "learning_rate", "threads")
        check(self, ">= 0", "sft_epochs", "kl_coef", "missing_eos_penalty", "vf_coef", "lora_rank")
        check(self, "in [0, 1]", "gamma", "gae_lambda")
        if self.batch_size % self.num_minibatches:
            fail(f"--batch-size {self.batch_size} must be a multiple of --num-minibatches {self.num_minibatches}")


PRESETS: dict[str, dict[str, Any]] = {}

# 2. Data ----------------------------------------------------------------------------------------
# A row has a prompt, its token ids, and completions (chosen and rejected, or one); other columns reach the rewards.


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


def as_texts(tokenizer: Any, prompt: Any, completions: list[Any]) -> tuple[str, list[str]]:
    """Prompt and completions as texts, without the prompt where a completion repeats it.

    Lists of messages are written out by the chat template; the last message of a completion is the assistant's.
    """
    if any(isinstance(part, list) for part in (prompt, *completions)):
        talks = [(prompt if isinstance(prompt, list) else []) + completion for completion in completions]
        for talk in talks:
            if talk[-1]["role"] != "assistant":
                raise ValueError(f"the last message is by {talk[-1]['role']!r}, not by the assistant")
        common = os.path.commonprefix([talk[:-1] for talk in talks]) if talks else prompt
        prompt = tokenizer.apply_chat_template(common, tokenize=False, add_generation_prompt=True)
        completions = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
        if tokenizer("")["input_ids"] and tokenizer.bos_token:  # the tokenizer writes the first token itself
            prompt, *completions = (text.removeprefix(tokenizer.bos_token) for text in (prompt, *completions))
        prompt = os.path.commonprefix([prompt, *completions])
    if not all(isinstance(text, str) for text in (prompt, *completions)):
        raise ValueError("a text is missing")
    if prompt and all(text.startswith(prompt) for text in completions):
        completions = [text[len(prompt) :] for text in completions]
    return prompt, completions


def encode(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Token ids of prompt + completion and one end-of-sequence token; how many of them are the prompt's.

    Both are read as one text, as the model reads them, for a token may span the border: the prompt ends where the
    ids part from those of the prompt alone. Where nothing comes before the completion, a first token is put there.
    """
    eos_id, rows = tokenizer.eos_token_id, tokenizer([prompt, prompt + completion])["input_ids"]
    for row in rows:
        while len(row) > 1 and row[-1] == eos_id:
            row.pop()
    start = len(os.path.commonprefix(rows))
    if start == 0:
        first = eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [first, *rows[1], eos_id], 1
    return [*rows[1], eos_id], start


def load_rows(args: Args, tokenizer: Any, split: str, needed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a split that can be used; those that cannot are counted and said, and so are texts that are cut.

    A row has prompt (a text), ids (the prompt's tokens) and columns as in the dataset; those of the columns chosen,
    rejected and completion that are there are texts, and <column>_ids is (ids, start) as encode() gives them.
    """
    data = load_split(args.dataset, split)
    whole = "prompt" not in data.column_names and "text" in data.column_names
    columns = ["prompt", "completion"] if whole else data.column_names
    names = [name for name in ("chosen", "rejected", "completion") if name in columns]
    if missing := [name for name in needed or (() if names else ("prompt",)) if name not in columns]:
        fail(f"the dataset {args.dataset} has no column {missing[0]!r}; it has {', '.join(data.column_names)}")
    rows, left_out, cut = [], {}, 0
    for row in data:
        try:
            row = row | split_text(row["text"], args.prompt_words) if whole else row
            prompt, texts = as_texts(tokenizer, row.get("prompt") or "", [row[name] for name in names])
            ids = tokenizer(prompt)["input_ids"]
            while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
            encoded = {f"{name}_ids": encode(tokenizer, prompt, text) for name, text in zip(names, texts, strict=True)}
            if whole:  # a text that is split here may be cut as well, and then does not end
                text_ids, start = encoded["completion_ids"]
                encoded["completion_ids"] = text_ids[: start + args.max_completion_length], start
                cut += len(text_ids) - start > args.max_completion_length
            reason = unusable(args, ids, texts, list(encoded.values()), tokenizer)
        except Exception as error:  # chat templates are programs of their own
            reason = f"cannot be read ({error})"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        rows.append(row | dict(zip(names, texts, strict=True)) | encoded | {"prompt": prompt, "ids": ids})
    for reason, count in left_out.items():
        print(f"{count:,} of {len(data):,} rows of {split!r} are left out: {reason}")
    if cut:
        print(f"{cut:,} of {len(data):,} texts of {split!r} are cut to --max-completion-length")
    return rows or fail(f"no row of the split {split!r} of {args.dataset} can be used: {', '.join(left_out)}")


def split_text(text: str, prompt_words: int) -> dict[str, str]:
    """The first words of a text as a prompt, and the rest as its completion."""
    words = re.findall(r"\s*\S+", text)
    return {"prompt": "".join(words[:prompt_words]).strip(), "completion": "".join(words[prompt_words:])}


def unusable(args: Args, ids: list[int], texts: list[str], encoded: list[tuple], tokenizer: Any) -> str:
    """Why a row cannot be used; nothing if it can."""
    if not ids:
        return "empty prompt"
    if len(ids) > args.max_prompt_length:
        return "prompt longer than --max-prompt-length"
    if not all(text.strip() for text in texts):
        return "empty completion"
    if any(len(row) - start > args.max_completion_length for row, start in encoded):
        return "completion longer than --max-completion-length"
    unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    if any(unknown in row for row in (ids, *(row for row, _ in encoded))):
        return "a word that the model does not know"
    if len(texts) == 2 and texts[0] == texts[1]:
        return "chosen and rejected are the same"
    return ""


def pad(rows: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask (1 token, 0 padding). Only the mask says what is padding."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows, strict=True)]
    real = [[0] * len(f) + [1] * len(row) for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(real if side == "left" else [row[::-1] for row in real])


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
    if (top := max(tokenizer.get_vocab().values())) >= (size := lm.get_input_embeddings().num_embeddings):
        fail(
            f"the tokenizer of {name} has a token {top} and the model only {size}: lm.resize_token_embeddings, save it"
        )
    return tokenizer, lm


def trainable(args: Args, lm: nn.Module) -> nn.Module:
    """The model as the flags want it trained: all of it, or low-rank adapters; activations stored or not."""
    if args.gradient_checkpointing:  # works in training mode only, so dropout must go
        lm.gradient_checkpointing_enable()
        lm.enable_input_require_grads()
        for module in (m for m in lm.modules() if isinstance(m, nn.Dropout)):
            module.p = 0.0
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        lm = get_peft_model(lm, config)
    return lm.train(args.gradient_checkpointing)


def save_pretrained(folder: Path, net: nn.Module, tokenizer: Any) -> None:
    """Network and tokenizer as a folder that from_pretrained loads, whole or not at all; adapters are merged in."""
    net = net.merge_and_unload() if hasattr(net, "merge_and_unload") else net
    unfinished = folder.with_name(folder.name + ".tmp")
    net.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


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
    """The policy, and its value function: a linear head on the policy's hidden states that starts at zero."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(hidden_size(policy), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids: Tensor, mask: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the last count tokens and the values of the states before them, both [B, count]."""
        logprobs, hidden = token_logprobs(self.policy, ids, mask, count, temperature)
        return logprobs, self.value_head(hidden.float()).squeeze(-1)


def hidden_size(lm: nn.Module) -> int:
    """The width of the last hidden states, which the configuration does not always tell; [B, T, width]."""
    one = torch.ones(1, 2, dtype=torch.long, device=lm.device)
    with torch.no_grad():
        return token_logprobs(lm, one, one, 1, 1.0)[1].shape[-1]


class RewardModel:
    """Scores texts by a sequence classifier: our own reward model, or anybody's."""

    def __init__(self, net: nn.Module, tokenizer: Any, label: int = -1):
        self.net, self.tokenizer, self.label = net, tokenizer, label
        if hasattr(net, "get_base_model"):  # behind its LoRA adapter
            self.net = net.get_base_model()

    def scores(self, rows: list[list[int]]) -> Tensor:
        """The scores of token ids that end with the end-of-sequence token, [B]: what stands there."""
        ids, mask = (x.to(self.net.device) for x in pad(rows, self.tokenizer.pad_token_id, "right"))
        hidden = self.net.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        return self.net.score(last)[:, self.label].float()

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores, room = [], getattr(self.net.config, "max_position_embeddings", 10**9)
        for start in range(0, len(texts), 128):
            part = texts[start : start + 128]
            if hasattr(self.net, "score"):  # a decoder
                rows = [encode(self.tokenizer, text, "")[0][-room:] for text in part]
                scores += self.scores(rows).tolist()
            else:  # an encoder
                cut = dict(truncation=True, max_length=min(room, self.tokenizer.model_max_length))
                batch = self.tokenizer(part, padding=True, return_tensors="pt", **cut).to(self.net.device)
                scores += self.net(**batch).logits[:, self.label].float().tolist()
        return scores


def load_function(name: str) -> Callable[..., list[float]]:
    """The function of a path.py:function, called as function(prompts, completions, **columns)."""
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # it is anybody's code
        fail(f"cannot load the function {name!r}: {error!r}")


def load_reward(name: str, label: int, device: torch.device) -> Callable[..., list[float]]:
    """The reward of this name: reward(prompts, completions, **columns) gives each completion a number."""
    if re.search(r"\.py:\w+$", name):
        return load_function(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        net, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the loader has no common class of errors
        fail(f"cannot load the reward model {name!r} ({error}); give a hub name, a folder or path.py:function")
    if found["missing_keys"]:
        fail(f"{name} is no reward model: it has no {', '.join(found['missing_keys'])}, and random ones score noise")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return RewardModel(net.eval().to(device), tokenizer, label)


def score(reward: Callable, rows: list[dict[str, Any]], completions: list[str]) -> Tensor:
    """The reward of a completion of each row's prompt, [B]."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "ids")}
    try:
        values = list(reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns))
        finite = all(math.isfinite(value) for value in values)
    except Exception as error:  # it is anybody's code
        fail(f"the reward failed: {error!r}; the columns it was given are {', '.join(columns)}")
    if len(values) != len(rows) or not finite:
        fail(f"the reward must return a finite number for each of {len(rows)} completions, not {values}")
    return torch.tensor([float(value) for value in values])


# 4. The mathematics -----------------------------------------------------------------------------
# Completions are [B, T], padded on the right; mask is 1 on a completion's tokens, the last of which ends it.


def reward_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-log P(what people said) under Bradley-Terry (Eq. 1, Ouyang 2022); all [B]."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-beta * KL on every token, and the score [B] on the last one (Eq. 2, Ziegler 2019); [B, T]."""
    rewards = -kl_coef * kl * mask
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates of completions that end with their last token, [B, T] (Schulman 2015)."""
    advantages, values = torch.zeros_like(rewards), values * mask
    carry = next_values = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantages[:, t] = carry = (delta + gamma * gae_lambda * carry) * mask[:, t]
        next_values = values[:, t]
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens of the mask, 0 elsewhere."""
    tokens = x[mask > 0]
    return (x - tokens.mean()) / (tokens.std() + 1e-8) * mask


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 of Schulman 2017, the KL from the old policy and whether the ratio was clipped, [B, T] each."""
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    logratio = torch.where(mask > 0, logprobs - old_logprobs, 0.0).clamp(-20, 20)
    ratio = logratio.exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return -gain, (ratio - 1 - logratio).detach(), ((ratio - 1).abs() > clip_coef).float()


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over the tokens of the mask. Divided by all tokens of a minibatch, its parts add up to the mean."""
    return torch.where(mask > 0, x, 0.0).sum()


def distinct_2(texts: list[str]) -> float:
    """Different word pairs over all word pairs, averaged over groups of 128 texts (larger groups repeat more)."""
    shares = []
    for i in range(0, max(len(texts) - 127, 1), 128):
        words = [text.lower().split() for text in texts[i : i + 128]]
        pairs = [pair for row in words for pair in zip(row[:-1], row[1:], strict=True)]
        shares.append(len(set(pairs)) / max(len(pairs), 1))
    return sum(shares) / len(shares)


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    accelerator = Accelerator(cpu=pick_device(args.device).type == "cpu")
    if not accelerator.is_main_process:
        args = helper_process(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    agent, optimizer, results = Late(), Late(), Values()
    parts = dict(agent=agent, optimizer=optimizer, results=results)
    run = Run(args, Path(args.model).name, args.total_episodes, episodes=False, **parts)
    if args.eval:
        return run.finish(**evaluate_saved(args, run, accelerator.device, agent, results))
    tokenizer, lm = load_lm(args.sft_model or args.model)
    needed = () if args.reward_model else ("prompt", "chosen", "rejected")  # of what the reward model learns from
    rows, test_rows = load_rows(args, tokenizer, args.train_split), load_rows(args, tokenizer, args.eval_split, needed)
    pairs = rows
    if needed and args.reward_split != args.train_split:
        pairs = load_rows(args, tokenizer, args.reward_split, needed)
    try_once(args, accelerator, lm.to(accelerator.device), tokenizer, rows, test_rows)

    # Each stage leaves a folder, from which the next one starts, and so does a run that goes on.
    with run, torch.autocast(accelerator.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        sft_model, reward_model = stage_folders(args, run.folder)
        if not Path(sft_model).exists() and args.sft_model is None:
            sft(args, Path(sft_model), accelerator, tokenizer, lm, rows, test_rows, results)
        if not Path(reward_model).exists() and args.reward_model is None:
            train_reward_model(args, Path(reward_model), accelerator, sft_model, pairs, test_rows, results)
        ppo(args, run, accelerator, sft_model, reward_model, rows, test_rows, agent, optimizer, results)
    write_samples(run.folder, test_rows, results.pop("texts_before"), results.pop("texts_after"))
    return run.finish(**results)


def stage_folders(args: Args, folder: Path) -> tuple[str, str]:
    """Where the SFT model and the reward model are, or will be."""
    return args.sft_model or str(folder / "sft"), args.reward_model or str(folder / "reward_model")


def sft(
    args: Args, folder: Path, accelerator: Accelerator, tokenizer: Any, lm: nn.Module, rows: list[dict],
    test_rows: list[dict], results: dict[str, Any],
) -> None:  # fmt: skip
    """Stage 1: the model learns to continue prompts as the chosen texts do, by maximum likelihood."""
    wanted = "chosen_ids" if "chosen_ids" in rows[0] else "completion_ids"
    texts, tests = ([row[wanted] for row in part] for part in (rows, test_rows[: args.eval_episodes]))
    lm = trainable(args, lm)
    optimizer = adam(lm, args.sft_learning_rate)
    lengths = [len(ids) for ids, _ in texts]
    batches = batches_by_length(lengths, args.sft_batch_size, args.sft_epochs, args.seed)
    progress = Progress("SFT", max(len(batches), 1))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = args.sft_learning_rate * (1 - step / len(batches))
        num_tokens = sum(len(ids) - start for ids, start in (texts[n] for n in batch))
        for part in own_parts(args, accelerator, batch):
            logprobs, mask = completion_logprobs(lm, [texts[n] for n in part], tokenizer.pad_token_id)
            loss = masked_sum(-logprobs, mask) / num_tokens
            loss.backward()
        take_step(args, accelerator, optimizer)
        progress.update(step + 1, f"loss {loss.item() * len(batch) / len(part):.3f}")
    progress.close()
    nlls, lm = [], lm.eval()
    with torch.no_grad():
        for start in range(0, len(tests), args.sft_batch_size):
            part = tests[start : start + args.sft_batch_size]
            logprobs, mask = completion_logprobs(lm, part, tokenizer.pad_token_id)
            nlls.append(-logprobs[mask > 0])
    results["sft_loss"] = torch.cat(nlls).mean().item()
    save_pretrained(folder, lm, tokenizer)


def completion_logprobs(lm: nn.Module, texts: list[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """log pi of every token but the first, and 1 where it is a completion's; [B, T - 1] each."""
    ids, mask = (x.to(lm.device) for x in pad([ids for ids, _ in texts], pad_id, "right"))
    starts = torch.tensor([start for _, start in texts], device=lm.device).unsqueeze(1)
    logprobs, _ = token_logprobs(lm, ids, mask, ids.shape[1] - 1, 1.0)
    return logprobs, mask[:, 1:] * (torch.arange(1, ids.shape[1], device=lm.device) >= starts)


def train_reward_model(
    args: Args, folder: Path, accelerator: Accelerator, sft_model: str, pairs: list[dict], tests: list[dict],
    results: dict[str, Any],
) -> None:  # fmt: skip
    """Stage 2: the SFT model with a scalar head learns which of two texts is preferred (Section 3.4, Stiennon 2020)."""
    tokenizer, net = new_reward_model(args, sft_model, accelerator.device)
    model = RewardModel(net, tokenizer)
    optimizer = adam(net, args.reward_learning_rate)
    lengths = [max(len(pair["chosen_ids"][0]), len(pair["rejected_ids"][0])) for pair in pairs]
    batches = batches_by_length(lengths, args.reward_batch_size, args.reward_epochs, args.seed)
    progress = Progress("reward model", len(batches))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = args.reward_learning_rate * (1 - step / len(batches))
        for part in own_parts(args, accelerator, batch):
            scores = model.scores([pairs[n][name][0] for name in ("chosen_ids", "rejected_ids") for n in part])
            loss = reward_loss(*scores.chunk(2)).sum() / len(batch)
            loss.backward()
        take_step(args, accelerator, optimizer)
        progress.update(step + 1, f"loss {loss.item() * len(batch) / len(part):.3f}")
    progress.close()
    net.eval()
    margins = score_margins(model, tests)
    results["reward_accuracy"] = (margins > 0).float().mean().item()
    if args.gold:
        gold = load_reward(args.gold, args.reward_label, accelerator.device)
        results["reward_accuracy_gold"] = ((margins > 0) == (score_margins(gold, tests) > 0)).float().mean().item()
    save_pretrained(folder, net, tokenizer)


def score_margins(reward: Callable, pairs: list[dict]) -> Tensor:
    """By how much the chosen completion of each pair scores above the rejected one, [B]."""
    chosen, rejected = (score(reward, pairs, [row[name] for row in pairs]) for name in ("chosen", "rejected"))
    return chosen - rejected


def new_reward_model(args: Args, sft_model: str, device: torch.device) -> tuple[Any, nn.Module]:
    """The SFT model with a head for one score, whose first weights have the deviation of Stiennon 2020."""
    torch.manual_seed(args.seed)
    tokenizer, _ = load_lm(sft_model)
    net = AutoModelForSequenceClassification.from_pretrained(sft_model, num_labels=1, dtype=torch.float32)
    net.config.pad_token_id = tokenizer.pad_token_id
    nn.init.normal_(net.score.weight, std=1 / math.sqrt(net.score.in_features + 1))
    net = net.to(device).eval()
    if args.lora_rank:
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(TaskType.SEQ_CLS, r=args.lora_rank, lora_alpha=2 * args.lora_rank)
        net = get_peft_model(net, config)
    return tokenizer, net


def ppo(
    args: Args, run: Run, accelerator: Accelerator, sft_model: str, reward_model: str, rows: list[dict],
    test_rows: list[dict], saved_agent: Late, saved_optimizer: Late, results: dict[str, Any],
) -> None:  # fmt: skip
    """Stage 3: the policy writes, the reward model scores, and PPO makes what scored well likelier."""
    device = accelerator.device
    tokenizer, agent, reference = load_agent(args, sft_model, device)
    optimizer = adam(agent, args.learning_rate)
    saved_agent.set(Trained(agent))
    saved_optimizer.set(optimizer)
    judges, test_rows = load_judges(args, reward_model, device), test_rows[: args.eval_episodes]
    if "before" not in results:
        results["reward_scale"] = (0.0, 1.0)
        if args.normalize_reward:
            results["reward_scale"] = reward_scale(args, tokenizer, agent.policy, judges, rows)
    judges["reward"] = scaled(judges["reward"], *results["reward_scale"])
    if "before" not in results:
        before = evaluate(args, tokenizer, agent.policy, reference, judges, test_rows)
        results["before"], results["texts_before"] = before

    step = run.step
    while step < args.total_episodes:
        rng = np.random.default_rng([args.seed, step])
        lr = args.learning_rate * (1 - step / args.total_episodes if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr

        # Write. Every process writes its share, and then has them all.
        drawn = [rows[n] for n in rng.integers(len(rows), size=args.batch_size)]
        uniforms = rng.random((args.batch_size, args.max_completion_length), np.float32)
        own = np.array_split(np.arange(args.batch_size), accelerator.num_processes)[accelerator.process_index]
        batch, texts = rollout(args, tokenizer, agent, reference, [drawn[n] for n in own], uniforms[own])

        # Score, and find out which tokens did better than expected.
        batch["scores"] = score(judges["reward"], [drawn[n] for n in own], texts).to(device)
        batch = {name: accelerator.pad_across_processes(x, dim=1, pad_first=True) for name, x in batch.items()}
        batch = {name: accelerator.gather(x) for name, x in batch.items()}
        add_advantages(args, batch)

        # Learn.
        losses = update(args, accelerator, agent, optimizer, batch, rng)

        step += args.batch_size
        measured = {}
        if (len(run.rows) + 1) % args.eval_every == 0:
            measured, _ = evaluate(args, tokenizer, agent.policy, reference, judges, test_rows[:128])
        measured = {f"eval/{name}": measured.get(name) for name in results["before"]}
        run.report(step, {**summarize(batch), "charts/learning_rate": lr, **losses, **measured})

    after = evaluate(args, tokenizer, agent.policy, reference, judges, test_rows)
    results["after"], results["texts_after"] = after
    if args.gold:
        gain = results["after"]["gold"] - results["before"]["gold"]
        results["gold_gain"] = gain / max(results["before"]["gold_std"], 1e-6)
    save_pretrained(run.folder / "policy", agent.policy, tokenizer)


@torch.no_grad()
def rollout(
    args: Args, tokenizer: Any, agent: ActorCritic, reference: nn.Module, rows: list[dict], uniforms: np.ndarray
) -> tuple[dict[str, Tensor], list[str]]:
    """The policy continues the rows' prompts: ids and seen [B, P + T], the rest [B, T] or [B]; and the texts."""
    agent.eval()
    batch, texts = write(args, tokenizer, agent.policy, rows, uniforms)
    width = uniforms.shape[1]
    batch["logprobs"], batch["values"] = agent(batch["ids"], batch["seen"], width, args.temperature)
    with without_adapter(reference):
        batch["ref_logprobs"], _ = token_logprobs(reference, batch["ids"], batch["seen"], width, args.temperature)
    agent.train(args.gradient_checkpointing)
    return batch, texts


def add_advantages(args: Args, batch: dict[str, Tensor]) -> None:
    """Adds kl, rewards, advantages and returns to a batch, [B, T] each: what the losses need."""
    mask, values = batch["mask"], batch["values"]
    scores = batch["scores"] - args.missing_eos_penalty * (1 - batch["ended"])
    batch["kl"] = (batch["logprobs"] - batch["ref_logprobs"]) * mask  # its mean is the KL, without bias
    batch["rewards"] = token_rewards(scores, batch["kl"], mask, args.kl_coef)
    advantages = gae(batch["rewards"], values, mask, args.gamma, args.gae_lambda)
    batch["returns"] = advantages + values * mask
    batch["advantages"] = whiten(advantages, mask)


def update(
    args: Args, accelerator: Accelerator, agent: nn.Module, optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor], rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """The epochs of PPO on one batch; returns the means of what there is to see."""
    history = []
    for _ in range(args.update_epochs):
        for minibatch in np.split(rng.permutation(len(batch["ids"])), args.num_minibatches):
            num_tokens, sums = batch["mask"][minibatch].sum(), torch.zeros(4, device=accelerator.device)
            for part in own_parts(args, accelerator, minibatch):
                b = {name: x[part] for name, x in batch.items()}
                mask = b["mask"]
                logprobs, values = agent(b["ids"], b["seen"], mask.shape[1], args.temperature)
                pg_loss, approx_kl, clipped = ppo_loss(logprobs, b["logprobs"], b["advantages"], mask, args.clip_coef)
                v_loss = 0.5 * (values - b["returns"]) ** 2
                loss = masked_sum(pg_loss + args.vf_coef * v_loss, mask) / num_tokens
                loss.backward()
                seen = [masked_sum(x, mask) / num_tokens for x in (pg_loss, v_loss, approx_kl, clipped)]
                sums += torch.stack(seen).detach()
            take_step(args, accelerator, optimizer)
            history.append(accelerator.reduce(sums, "sum"))
    names = ("losses/policy_loss", "losses/value_loss", "losses/approx_kl", "losses/clipfrac")
    return dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True))


def summarize(batch: dict[str, Tensor]) -> dict[str, float]:
    """Means over a batch; the entropy is that of the sampled tokens, -log pi, in nats."""
    mask = batch["mask"]
    returns, errors = (x[mask > 0] for x in (batch["returns"], batch["returns"] - batch["values"]))
    return {
        "objective/reward": batch["scores"].mean().item(), "objective/kl": batch["kl"].sum(1).mean().item(),
        "objective/length": mask.sum(1).float().mean().item(), "objective/ended": batch["ended"].mean().item(),
        "losses/entropy": -batch["logprobs"][mask > 0].mean().item(),
        "losses/explained_variance": (1 - errors.var() / returns.var().clamp(min=1e-8)).item(),
    }  # fmt: skip


def load_agent(args: Args, sft_model: str, device: torch.device) -> tuple[Any, ActorCritic, nn.Module]:
    """Tokenizer, policy with value function, and reference; with LoRA the last is the policy without its adapter."""
    tokenizer, lm = load_lm(sft_model)
    agent = ActorCritic(trainable(args, lm.to(device))).to(device)
    return tokenizer, agent, agent.policy if args.lora_rank else load_lm(sft_model)[1].to(device)


def reward_scale(
    args: Args, tokenizer: Any, policy: nn.Module, judges: dict[str, Callable], rows: list[dict]
) -> tuple[float, float]:
    """Mean and standard deviation of the reward of 512 texts by the policy, which has not learnt yet."""
    rng = np.random.default_rng([args.seed, 5])
    drawn = [rows[n] for n in rng.integers(len(rows), size=512)]
    _, texts = write(args, tokenizer, policy, drawn, rng.random((512, args.max_completion_length), np.float32))
    scores = score(judges["reward"], drawn, texts)
    return scores.mean().item(), max(scores.std().item(), 1e-6)


def scaled(reward: Callable, shift: float, scale: float) -> Callable[..., list[float]]:
    """The reward less shift, over scale."""
    return lambda **columns: [(value - shift) / scale for value in reward(**columns)]


def without_adapter(lm: nn.Module) -> contextlib.AbstractContextManager:
    """In it, a model with a LoRA adapter is the model without."""
    return lm.disable_adapter() if hasattr(lm, "disable_adapter") else contextlib.nullcontext()


def batches_by_length(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Row numbers of every minibatch, each epoch anew: texts of like length meet, so that little is padded."""
    count, batches = math.ceil(len(lengths) / batch_size), []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        rows = np.resize(rng.permutation(len(lengths)), count * batch_size)  # the last minibatch is filled up
        rows = rows[np.argsort(np.array(lengths)[rows] + rng.uniform(0, 3, len(rows)))]
        batches += list(rng.permutation(rows.reshape(count, batch_size)))
    return batches


def own_parts(args: Args, accelerator: Accelerator, rows: np.ndarray) -> list[np.ndarray]:
    """This process's share of a minibatch, in the parts that go through the model one by one."""
    parts = np.array_split(rows, accelerator.num_processes * args.gradient_accumulation)
    first = accelerator.process_index * args.gradient_accumulation
    return [part for part in parts[first : first + args.gradient_accumulation] if len(part)]


def adam(net: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam on the weights that learn, in one kernel where there is one."""
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.Adam(weights, lr=learning_rate, fused=weights[0].device.type != "mps")


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


class Late:
    """A part of the checkpoint that is made after the run has begun; what was saved of it waits until then."""

    def __init__(self):
        self.part, self.saved = None, {}

    def set(self, part: Any) -> None:
        if self.saved:
            part.load_state_dict(self.saved)
        self.part = part

    def state_dict(self) -> dict[str, Any]:
        return self.part.state_dict() if self.part else self.saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.saved = saved


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


def helper_process(args: Args) -> Args:
    """Settings of a process that only computes: the first one alone writes the run folder and prints."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if args.resume:
        shutil.copytree(args.resume, Path(scratch, "run"))
    return dataclasses.replace(args, run_dir=scratch, resume=args.resume and f"{scratch}/run", track=False)


def try_once(
    args: Args, accelerator: Accelerator, lm: nn.Module, tokenizer: Any, rows: list[dict], test_rows: list[dict]
) -> None:
    """Takes every stage's path once, on two examples: what cannot work fails before anything is trained."""
    share = accelerator.num_processes * args.gradient_accumulation
    for size in (args.batch_size // args.num_minibatches, args.sft_batch_size, args.reward_batch_size):
        if size % share:
            fail(f"a minibatch of {size} cannot be shared by {share} (processes times --gradient-accumulation)")
    longest = max(len(row["ids"]) for row in rows + test_rows) + args.max_completion_length
    if longest > (room := getattr(lm.config, "max_position_embeddings", longest)):
        fail(f"{args.model} reads {room} tokens and a text may have {longest}: lower --max-completion-length")
    if args.sft_model is None and not ("chosen_ids" in rows[0] or "completion_ids" in rows[0]):
        fail(f"SFT needs a column chosen or completion, which {args.dataset} has not; or give --sft-model")
    try:
        agent = ActorCritic(lm)
        batch, texts = rollout(args, tokenizer, agent, lm, rows[:2], np.full((2, 2), 0.5, np.float32))
        assert batch["logprobs"].isfinite().all(), "log-probabilities that are not finite"
        if args.reward_model is None:
            net = AutoModelForSequenceClassification.from_config(lm.config)
            assert hasattr(net, "score"), "a classifier without a head named score"
            RewardModel(net.to(lm.device), tokenizer)(["a"], ["b"])
    except Exception as error:  # models are programs of their own
        fail(f"{args.model} cannot be used here: {type(error).__name__}: {error}")
    for judge in load_judges(args, args.reward_model, lm.device).values():
        score(judge, rows[:2], texts)


# 6. Evaluation ----------------------------------------------------------------------------------


def load_judges(args: Args, reward_model: str | None, device: torch.device) -> dict[str, Callable]:
    """The rewards by which texts are measured: the one that is optimised, and gold."""
    named = {"reward": reward_model, "gold": args.gold}
    return {key: load_reward(name, args.reward_label, device) for key, name in named.items() if name}


@torch.no_grad()
def write(
    args: Args, tokenizer: Any, lm: nn.Module, rows: list[dict], uniforms: np.ndarray
) -> tuple[dict[str, Tensor], list[str]]:
    """Continues the rows' prompts: ids and seen [B, P + T], mask and logprobs [B, T], ended [B]; and the texts."""
    prompt_ids, prompt_mask = (
        x.to(lm.device) for x in pad([row["ids"] for row in rows], tokenizer.pad_token_id, "left")
    )
    draws = torch.from_numpy(uniforms).to(lm.device)
    tokens, mask, logprobs = sample(lm, prompt_ids, prompt_mask, draws, tokenizer.eos_token_id,
                                    tokenizer.pad_token_id, args.temperature)  # fmt: skip
    ids, seen = torch.cat((prompt_ids, tokens), 1), torch.cat((prompt_mask, mask), 1)
    ended = ((tokens == tokenizer.eos_token_id) & (mask > 0)).any(1).float()
    batch = {"ids": ids, "seen": seen, "mask": mask, "logprobs": logprobs, "ended": ended}
    return batch, [
        complete(tokenizer, row, new[real > 0].tolist()) for row, new, real in zip(rows, tokens, mask, strict=True)
    ]


def complete(tokenizer: Any, row: dict[str, Any], tokens: list[int]) -> str:
    """The text of new tokens behind a row's prompt, decoded together with it: a space may belong to either."""
    whole, prompt = tokenizer.batch_decode([row["ids"] + tokens, row["ids"]], skip_special_tokens=True)
    return whole[len(prompt) :]


@torch.no_grad()
def evaluate(
    args: Args, tokenizer: Any, lm: nn.Module, reference: nn.Module, judges: dict[str, Callable], rows: list[dict]
) -> tuple[dict[str, float], list[str]]:
    """What lm makes of the prompts, with random numbers of its own: the measurements and the completions.

    Of each judge the mean and the standard deviation; kl is that of whole texts, in nats, beside half the width
    of its 95 % interval; length in tokens.
    """
    uniforms = np.random.default_rng([args.seed, 6]).random((len(rows), args.max_completion_length), np.float32)
    kls, lengths, ends, texts = [], [], [], []
    lm.eval()
    for start in range(0, len(rows), 128):
        part = slice(start, start + 128)
        batch, written = write(args, tokenizer, lm, rows[part], uniforms[part])
        with without_adapter(reference):
            ids, seen, width = batch["ids"], batch["seen"], uniforms.shape[1]
            ref_logprobs, _ = token_logprobs(reference, ids, seen, width, args.temperature)
        kls.append(((batch["logprobs"] - ref_logprobs) * batch["mask"]).sum(1))
        lengths.append(batch["mask"].sum(1).float())
        ends.append(batch["ended"])
        texts += written
    lm.train(args.gradient_checkpointing)
    kl, results = torch.cat(kls), {}
    for name, judge in judges.items():
        scores = score(judge, rows, texts)
        results |= {name: scores.mean().item(), f"{name}_std": scores.std(correction=0).item()}
    results |= {"kl": kl.mean().item(), "kl_interval": 1.96 * kl.std(correction=0).item() / math.sqrt(len(kl))}
    results |= {"length": torch.cat(lengths).mean().item(), "distinct_2": distinct_2(texts)}
    return results | {"ended": torch.cat(ends).mean().item()}, texts


def write_samples(folder: Path, rows: list[dict], before: list[str], after: list[str]) -> None:
    """The first completions before and after training, in samples.md and on the screen."""
    triples = list(zip(rows, before, after, strict=False))[:32]
    lines = [f"**{row['prompt']}**\n- before: {old.strip()}\n- after: {new.strip()}\n" for row, old, new in triples]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[:6]))


def evaluate_saved(args: Args, run: Run, device: torch.device, saved_agent: Late, results: dict) -> dict[str, float]:
    """--eval: the saved policy on the held-out prompts."""
    if "before" not in results:
        fail(f"{run.folder} was interrupted before PPO; finish it with --resume")
    sft_model, reward_model = stage_folders(args, run.folder)
    tokenizer, agent, reference = load_agent(args, sft_model, device)
    saved_agent.set(Trained(agent))
    judges = load_judges(args, reward_model, device)
    judges["reward"] = scaled(judges["reward"], *results["reward_scale"])
    rows = load_rows(args, tokenizer, args.eval_split)[: args.eval_episodes]
    return evaluate(args, tokenizer, agent.policy, reference, judges, rows)[0]


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
