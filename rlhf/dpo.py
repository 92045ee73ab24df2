# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers>=5.0", "datasets>=3.0", "accelerate>=1.0", "peft>=0.17", "numpy>=1.26",
#                 "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17"]
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
simpo    the mean log-probability itself is the reward           no          mean          scale of the reward: 2
                                                                 (*) mean, as in TRL, with --ipo-average

The preferences and the evaluation are those of rlhf_ppo.py, so that the two can be compared: benchmarks.md does.

Papers   Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290
         Mitchell 2023, A Note on DPO with Noisy Preferences (cdpo), ericmitchell.ai/cdpo.pdf
         Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Preferences, arXiv 2310.12036
         Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, and Liu et al. 2023, RSO, arXiv 2309.06657 (hinge)
         Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306
         Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691
         Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734

Run      python rlhf/dpo.py
         python rlhf/dpo.py --loss ipo
         python rlhf/dpo.py --loss simpo --beta 2
         python rlhf/dpo.py --loss kto --dataset labelled.jsonl --eval-split "train[:9%]"   (prompt, completion, label)
         python rlhf/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --gold None \\
             --max-prompt-length 256 --max-completion-length 256 --learning-rate 1e-6 --bf16 --gradient-accumulation 8
         accelerate launch --num-processes 2 rlhf/dpo.py
         python rlhf/dpo.py --eval runs/<folder>

Expect   Seeds 301 to 305, one core of an Intel Xeon while the other was at work: 95 to 118 s of training. Medians on
         384 held-out prompts (and the range over seeds): gold_gain 1.24 (1.21 to 1.30) at a KL of 4.6 nats (4.3 to
         5.0); distinct-2 0.89 before and 0.84 (0.80 to 0.84) after; texts 23% longer (16% to 25%). Held-out accuracy
         0.63 (0.60 to 0.64); the labels' own agreement with gold is .81.
         SmolLM2-135M-Instruct with --lora-rank 8 --threads 2, on two cores: 31 s for 64 pairs and what is measured
         before and after, 3.9 GB. A GPU is not measured yet.

Folder   besides the usual: policy/, which from_pretrained loads, and samples.md. Steps are pairs (KTO: texts).
         summary.json has accuracy (held-out pairs whose chosen text has the higher reward), margin (the mean difference
         of these rewards), gold_gain (what gold says of the policy less what it says of the reference, in deviations of
         the latter's texts), and before and after, each with gold, kl, kl_interval, length, distinct_2 and ended.

Deviations from the papers
 1. A pair is left out and counted if one of its texts is empty, too long or has words the model does not know, or if
    both are the same; none is cut.
 2. The completion starts where the tokens of the prompt and those of prompt and completion part, in both texts of a
    pair at the earlier of the two places: a tokenizer may merge the prompt's end with the completion's beginning.
 3. KTO's reference point is the KL on each prompt with the next text's completion, fixed once, so that the reference's
    log-probabilities are computed once for it as well. A pair becomes two texts of which neither knows of the other.
 4. KTO's weights default to giving both labels equal say (the paper: a ratio between 1 and 4/3 in favour of
    one). ORPO's imitation term covers the completion only, as in the paper; TRL's covers the prompt too.
 5. A little imitation of the chosen texts is added to the loss (--sft-coef 0 for the papers'): without it texts grew
    by a third while this was tuned.
 6. No dropout.
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
from dataclasses import dataclass, field
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
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parent / "data"

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = str(DATA / "tiny_lm")  # causal language model to start from, and the reference: hub name or folder
    dataset: str = str(DATA / "preferences")  # prompt, chosen, rejected: a hub name, a folder, a .jsonl or .csv file
    seed: int = 1  # seed of every random number: batches, sampled tokens
    total_episodes: int = 7_680  # pairs (KTO: texts) to learn from, over all passes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where everything runs; auto is a GPU if there is one
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    eval: str | None = None  # evaluate this saved run and exit
    resume: str | None = None  # go on with this interrupted run
    eval_episodes: int = 384  # held-out prompts continued, and held-out pairs compared, before and after

    train_split: str = "train"  # split to learn from; slices such as train[:50%] work
    eval_split: str = "test"  # split to measure on
    prompt_words: int = 2  # how many words of a text are the prompt, where the dataset has a column text and no prompt
    max_prompt_length: int = 64  # longest prompt in tokens; rows with longer ones are left out
    max_completion_length: int = 24  # longest completion in tokens: sampled ones are cut, longer rows left out
    gold: str | None = str(DATA / "gold" / "gold.py:score")  # what texts are worth, for measuring; path.py:function

    loss: Literal["dpo", "cdpo", "ipo", "hinge", "kto", "orpo", "simpo"] = "dpo"  # the header's table has them
    beta: float = 0.1  # the loss's beta; 2 suits simpo
    label_smoothing: float = 0.1  # cdpo: share of the pairs believed to be labelled the wrong way round
    ipo_average: bool = False  # ipo: mean over tokens instead of the paper's sum
    simpo_gamma: float = 0.5  # simpo: margin by which the chosen text should win
    desirable_weight: float | None = None  # kto: weight of good texts; None: both labels weigh the same, however rare
    undesirable_weight: float | None = None  # kto: weight of bad texts; None as above
    sft_coef: float = 0.04  # weight of -log pi a token of the chosen texts, added to the loss (orpo: 1)
    batch_size: int = 32  # pairs (KTO: texts) per step
    temperature: float = 1.0  # divides the logits, in sampling and in scoring alike
    learning_rate: float = 5e-4  # Adam's step size at the start; 1e-6 suits pretrained models of 100M and more
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    max_grad_norm: float = 1.0  # the gradient's norm is scaled down to at most this
    eval_every: int = 20  # steps between measurements on 128 of the held-out prompts and pairs

    gradient_accumulation: int = 1  # parts of a minibatch that go through the model one by one; the result is the same
    gradient_checkpointing: bool = False  # compute activations twice, and store few
    lora_rank: int = 0  # train low-rank adapters (peft) of this rank instead of all weights; 0 trains all
    bf16: bool = False  # compute in bfloat16; weights stay float32
    threads: int = 1  # processor threads; small models gain nothing from more

    def __post_init__(self):
        check(self, "> 0", "total_episodes", "eval_episodes", "eval_every", "prompt_words", "max_prompt_length")
        check(self, "> 0", "max_completion_length", "batch_size", "temperature", "beta", "learning_rate", "threads")
        check(self, "> 0", "desirable_weight", "undesirable_weight", "max_grad_norm", "gradient_accumulation")
        check(self, ">= 0", "simpo_gamma", "sft_coef", "lora_rank")
        if not 0 <= self.label_smoothing < 0.5:
            fail(
                f"--label-smoothing must be in [0, 0.5), not {self.label_smoothing}: beyond it labels say the opposite"
            )


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


@dataclass
class Preferences:
    """Texts to learn from, as (token ids, start of the completion).

    Pairs: texts[2n] is the chosen and texts[2n + 1] the rejected one. KTO: single texts in any order.
    """

    texts: list[tuple[list[int], int]]
    good: list[bool]  # chosen or not; KTO: the label
    paired: bool = True
    ref_logps: Tensor | None = None  # log pi_ref(completion | prompt), [texts]
    mismatched: list[tuple[list[int], int]] = field(default_factory=list)  # KTO: prompts with others' completions
    mismatched_ref_logps: Tensor | None = None


LABELS = {"true": True, "1": True, "1.0": True, "good": True, "yes": True, "desirable": True, "positive": True,
          "false": False, "0": False, "0.0": False, "-1": False, "-1.0": False, "bad": False, "no": False,
          "undesirable": False, "negative": False}  # fmt: skip


def load_preferences(args: Args, rows: list[dict], seed: int) -> Preferences:
    """Pairs of chosen and rejected texts, or for KTO single texts, from pairs or from completions with labels."""
    if "chosen_ids" in rows[0] and "rejected_ids" in rows[0]:
        texts = []
        for row in rows:
            start = min(row["chosen_ids"][1], row["rejected_ids"][1])
            texts += [(row["chosen_ids"][0], start), (row["rejected_ids"][0], start)]
        if args.loss != "kto":
            return Preferences(texts, [True, False] * len(rows))
        order = np.random.default_rng([seed, 8]).permutation(len(texts))
        data = Preferences([texts[n] for n in order], [bool(n % 2 == 0) for n in order], paired=False)
    elif args.loss == "kto" and "completion_ids" in rows[0] and "label" in rows[0]:
        spelled = [str(row["label"]).strip().lower() for row in rows]
        if unknown := sorted(set(spelled) - set(LABELS)):
            fail(
                f"labels must say good or bad, as true/false, 1/0 or 1/-1; {args.dataset} has {', '.join(unknown[:5])}"
            )
        if len(set(spelled)) > 2:
            fail(f"KTO needs labels of two kinds, good and bad; {args.dataset} has {', '.join(sorted(set(spelled)))}")
        data = Preferences([row["completion_ids"] for row in rows], [LABELS[word] for word in spelled], paired=False)
    else:
        needed = "chosen and rejected" + (", or completion and label" if args.loss == "kto" else "")
        fail(f"--loss {args.loss} needs columns {needed}, which {args.dataset} has not")
    following = data.texts[1:] + data.texts[:1]
    data.mismatched = [
        (a[:start] + b[skip:], start) for (a, start), (b, skip) in zip(data.texts, following, strict=True)
    ]
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


def completion_logps(
    lm: nn.Module, texts: list[tuple[list[int], int]], pad_id: int, temperature: float, group_size: int = 32
) -> tuple[Tensor, Tensor]:
    """log pi(completion | prompt) of each text, and the number of the completion's tokens, both [B].

    Texts go through the model in groups of like length, so that little is padding.
    """
    order = sorted(range(len(texts)), key=lambda n: len(texts[n][0]))
    logps = []
    for group in np.array_split(order, math.ceil(len(texts) / group_size)):
        ids, mask = (x.to(lm.device) for x in pad([texts[n][0] for n in group], pad_id, "right"))
        starts = torch.tensor([texts[n][1] for n in group], device=lm.device).unsqueeze(1)
        count = ids.shape[1] - int(starts.min())
        completion = mask * (torch.arange(ids.shape[1], device=lm.device) >= starts)
        logprobs, _ = token_logprobs(lm, ids, mask, count, temperature)
        logps.append(masked_rows(logprobs, completion[:, -count:]))
    counts = torch.tensor([len(ids) - start for ids, start in texts], device=lm.device)
    return torch.cat(logps)[np.argsort(order)], counts


def masked_rows(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over the tokens of the mask in each row, [B, T] -> [B]."""
    return torch.where(mask > 0, x, 0.0).sum(1)


@torch.no_grad()
def reference_logps(args: Args, accelerator: Accelerator, reference: nn.Module, pad_id: int, texts: list) -> Tensor:
    """log pi_ref of every text, computed once; every process does its share. 0 where the loss has no reference."""
    logps = torch.zeros(len(texts), device=accelerator.device)
    share = np.array_split(np.arange(len(texts)), accelerator.num_processes)[accelerator.process_index]
    if len(share) and args.loss not in ("orpo", "simpo"):
        with without_adapter(reference):
            logps[share], _ = completion_logps(reference, [texts[n] for n in share], pad_id, args.temperature)
    return accelerator.reduce(logps, "sum")


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
# A text's logp is the sum of its completion's token log-probabilities, and its logratio is logp - ref_logp; its mean
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
    device = accelerator.device
    tokenizer, lm = load_lm(args.model)
    policy = trainable(args, lm.to(device))
    reference = policy if args.lora_rank else load_lm(args.model)[1].to(device)  # with LoRA: without its adapter
    optimizer = adam(policy, args.learning_rate)
    results, pad_id = Values(), tokenizer.pad_token_id
    parts = dict(policy=Trained(policy), optimizer=optimizer, results=results)
    run = Run(args, Path(args.model).name, args.total_episodes, episodes=False, **parts)
    test_rows = load_rows(args, tokenizer, args.eval_split)[: args.eval_episodes]
    tests = load_preferences(args, test_rows, seed=0)
    judges = {"gold": load_function(args.gold)} if args.gold else {}
    if args.eval:
        tests.ref_logps = reference_logps(args, accelerator, reference, pad_id, tests.texts)
        measured, _ = evaluate(args, tokenizer, policy, reference, judges, test_rows)
        return run.finish(**measured, **held_out(args, policy, pad_id, tests))
    data = load_preferences(args, load_rows(args, tokenizer, args.train_split), args.seed)
    if len(set(data.good)) == 1:
        fail(f"KTO needs labels of two kinds, good and bad; {args.train_split!r} of {args.dataset} has one")
    try_once(args, accelerator, policy, tokenizer, test_rows, data, judges)

    with run, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        for part in (data, tests):  # what the loss needs of the reference
            part.ref_logps = reference_logps(args, accelerator, reference, pad_id, part.texts)
            part.mismatched_ref_logps = reference_logps(args, accelerator, reference, pad_id, part.mismatched)
        if "before" not in results:
            before = evaluate(args, tokenizer, policy, reference, judges, test_rows)
            results["before"], results["texts_before"] = before

        size, step, history = len(data.texts) // (2 if data.paired else 1), run.step, []
        per_epoch = math.ceil(size / args.batch_size)
        epochs = math.ceil(args.total_episodes / args.batch_size / per_epoch)
        batches = shuffled(size, args.batch_size, epochs, args.seed)
        while step < args.total_episodes:
            lr = args.learning_rate * (1 - step / args.total_episodes if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            number = step // args.batch_size
            kl = reference_point(args, accelerator, policy, pad_id, data, batches[number])
            sums = 0.0
            for part in own_parts(args, accelerator, batches[number]):
                loss, seen = preference_loss(args, policy, pad_id, data, part, kl)
                (loss / args.batch_size).backward()
                sums = sums + seen
            take_step(args, accelerator, optimizer)
            history.append(accelerator.reduce(sums, "sum"))

            step += args.batch_size
            evaluates = (number + 1) % args.eval_every == 0
            if evaluates or (number + 1) % 4 == 0 or step >= args.total_episodes:
                measured = {}
                if evaluates:
                    measured, _ = evaluate(args, tokenizer, policy, reference, judges, test_rows[:128])
                    measured |= held_out(args, policy, pad_id, tests, 128)
                names = (*results["before"], "accuracy", "margin")
                run.report(step, {
                    **summarize(args, history), "charts/learning_rate": lr, "losses/kto_kl": kl.item(),
                    **{f"eval/{name}": measured.get(name) for name in names},
                })  # fmt: skip
                history.clear()

        results["after"], texts_after = evaluate(args, tokenizer, policy, reference, judges, test_rows)
        results |= held_out(args, policy, pad_id, tests)
        if args.gold:
            gain = results["after"]["gold"] - results["before"]["gold"]
            results["gold_gain"] = gain / max(results["before"]["gold_std"], 1e-6)
    save_pretrained(run.folder / "policy", policy, tokenizer)
    write_samples(run.folder, test_rows, results.pop("texts_before"), texts_after)
    return run.finish(**results)


def preference_loss(
    args: Args, policy: nn.Module, pad_id: int, data: Preferences, part: np.ndarray, kl: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of some pairs (KTO: texts), summed, and sums of what there is to see."""
    numbers = np.concatenate((2 * part, 2 * part + 1)) if data.paired else part
    good = torch.tensor([data.good[n] for n in numbers], device=kl.device)
    logps, counts = completion_logps(policy, [data.texts[n] for n in numbers], pad_id, args.temperature)
    values = logps - data.ref_logps[numbers]  # log pi / pi_ref
    if args.loss in ("orpo", "simpo") or (args.loss == "ipo" and args.ipo_average):
        values = values / counts
    if not data.paired:
        weights = kto_weights(data.good, args.desirable_weight, args.undesirable_weight)
        losses, right = kto_loss(values, good, kl, args.beta, *weights), (values > kl) == good
    else:
        chosen, rejected = values.chunk(2)
        right = chosen > rejected
        if args.loss == "ipo":
            losses = ipo_loss(chosen, rejected, args.beta)
        elif args.loss == "hinge":
            losses = hinge_loss(chosen, rejected, args.beta)
        elif args.loss == "orpo":
            losses = args.beta * orpo_loss(chosen, rejected)
        elif args.loss == "simpo":
            losses = simpo_loss(chosen, rejected, args.beta, args.simpo_gamma)
        else:
            losses = dpo_loss(chosen, rejected, args.beta, args.label_smoothing if args.loss == "cdpo" else 0.0)
    loss = losses.sum()
    if imitation := 1.0 if args.loss == "orpo" else args.sft_coef:
        loss = loss - imitation * masked_sum(logps / counts, good)
    seen = [loss, right.sum()]
    for kind in (good, ~good):
        seen += [kind.sum(), masked_sum(args.beta * values, kind), masked_sum(logps, kind)]
    return loss, torch.stack([x.detach().float() for x in seen])


def reference_point(
    args: Args, accelerator: Accelerator, policy: nn.Module, pad_id: int, data: Preferences, batch: np.ndarray
) -> Tensor:
    """KTO: the KL that good texts must exceed (Section 4.1), the mean logratio of mismatched texts, at least 0."""
    if data.paired:
        return torch.zeros((), device=accelerator.device)
    share = np.array_split(batch, accelerator.num_processes)[accelerator.process_index]
    with torch.no_grad():
        logps, _ = completion_logps(policy, [data.mismatched[n] for n in share], pad_id, args.temperature)
    total = accelerator.reduce((logps - data.mismatched_ref_logps[share]).sum(), "sum")
    return (total / len(batch)).clamp(min=0)


def summarize(args: Args, history: list[Tensor]) -> dict[str, float | None]:
    """Means over some steps of what preference_loss() returned; None of a kind of text that did not occur."""
    loss, right, good, good_reward, good_logp, bad, bad_reward, bad_logp = torch.stack(history).sum(0).tolist()
    count = len(history) * args.batch_size
    chosen, rejected = (good_reward / good if good else None), (bad_reward / bad if bad else None)
    return {
        "losses/preference_loss": loss / count, "rewards/accuracies": right / count, "rewards/chosen": chosen,
        "rewards/rejected": rejected, "rewards/margins": chosen - rejected if good and bad else None,
        "logps/chosen": good_logp / good if good else None, "logps/rejected": bad_logp / bad if bad else None,
    }  # fmt: skip


def without_adapter(lm: nn.Module) -> contextlib.AbstractContextManager:
    """In it, a model with a LoRA adapter is the model without."""
    return lm.disable_adapter() if hasattr(lm, "disable_adapter") else contextlib.nullcontext()


def shuffled(size: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Row numbers of every minibatch: each epoch in a new order, its last minibatch filled up from its start."""
    count = math.ceil(size / batch_size)
    orders = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(epochs)]
    return [rows for order in orders for rows in np.resize(order, (count, batch_size))]


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
    args: Args, accelerator: Accelerator, policy: nn.Module, tokenizer: Any, rows: list[dict], data: Preferences,
    judges: dict[str, Callable],
) -> None:  # fmt: skip
    """Takes every stage's path once, on two examples: what cannot work fails before anything is trained."""
    share = accelerator.num_processes * args.gradient_accumulation
    if args.batch_size % share:
        fail(f"a minibatch of {args.batch_size} cannot be shared by {share} (processes times --gradient-accumulation)")
    longest = max(len(row["ids"]) for row in rows) + args.max_completion_length
    longest = max(longest, *(len(ids) for ids, _ in data.texts + data.mismatched))
    if longest > (room := getattr(policy.config, "max_position_embeddings", longest)):
        fail(f"{args.model} reads {room} tokens and a text may have {longest}: lower --max-completion-length")
    try:
        logps, _ = completion_logps(policy, data.texts[:2], tokenizer.pad_token_id, args.temperature)
        assert logps.isfinite().all(), "log-probabilities that are not finite"
        _, texts = write(args, tokenizer, policy, rows[:2], np.full((len(rows[:2]), 2), 0.5, np.float32))
    except Exception as error:  # models are programs of their own
        fail(f"{args.model} cannot be used here: {type(error).__name__}: {error}")
    for judge in judges.values():
        score(judge, rows[:2], texts)


# 6. Evaluation ----------------------------------------------------------------------------------


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


@torch.no_grad()
def held_out(
    args: Args, policy: nn.Module, pad_id: int, tests: Preferences, count: int | None = None
) -> dict[str, float]:
    """Share of held-out pairs in which the chosen text has the higher reward, and the mean difference.

    Of single texts: the share of those whose reward's sign is their label's, and good ones' mean less bad ones'.
    """
    texts, good = tests.texts[: count and 2 * count], torch.tensor(tests.good[: count and 2 * count])
    logps, counts = completion_logps(policy, texts, pad_id, args.temperature)
    values = logps - tests.ref_logps[: len(texts)]
    if args.loss in ("orpo", "simpo") or (args.loss == "ipo" and args.ipo_average):
        values = values / counts
    values = args.beta * values.cpu()
    if tests.paired:
        margins = values[0::2] - values[1::2]
        return {"accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}
    margin = (values[good].mean() - values[~good].mean()).item() if len(set(good.tolist())) == 2 else 0.0
    return {"accuracy": ((values > 0) == good).float().mean().item(), "margin": margin}


def write_samples(folder: Path, rows: list[dict], before: list[str], after: list[str]) -> None:
    """The first completions before and after training, in samples.md and on the screen."""
    triples = list(zip(rows, before, after, strict=False))[:32]
    lines = [f"**{row['prompt']}**\n- before: {old.strip()}\n- after: {new.strip()}\n" for row, old, new in triples]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[:6]))


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
