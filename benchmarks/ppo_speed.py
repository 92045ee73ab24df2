"""How long a PPO iteration takes: rlhf/rlhf_ppo.py against TRL's PPOTrainer, in one process, in alternation.

    pip install --no-deps --target trl112 trl==1.12.0        (the last TRL with a PPOTrainer, in a folder of its own)
    python benchmarks/ppo_speed.py trl112 --iterations 10

An iteration samples 64 texts of 24 tokens after 4 of prompt, scores them with a reward network of the policy's
size, computes reference log-probabilities and values, and makes two epochs of two minibatches. Models are random
GPT-2s with the tiny model's vocabulary, so hardly a text ends early on either side. TRL has a second network for the
values, rlhf_ppo.py has not. After each iteration of TRL comes one of ours; the first of all is not counted. Result:
results/ppo_speed.csv and the table in benchmarks.md.
"""

# ruff: noqa: E402 (the imports come after the path to TRL)
from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("trl", help="folder with TRL 1.12.0")
parser.add_argument("--iterations", type=int, default=10)
options = parser.parse_args()
sys.path.insert(0, options.trl)

import numpy as np
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from run import HOME, PAGE, cpu_name, load_script, replace_between, write_whole
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

VOCAB, BATCH, RESPONSE = 4_000, 64, 24
SIZES = {"as tiny_lm": dict(n_embd=176, n_layer=4, n_head=4), "larger": dict(n_embd=384, n_layer=5, n_head=6)}
rlhf = load_script("rlhf/rlhf_ppo.py")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")


class Ours:
    """One iteration of rlhf_ppo.py at a time."""

    def __init__(self, lm: Any, tokenizer: Any, prompts: list[list[int]]):
        self.args = rlhf.Args(batch_size=BATCH, max_completion_length=RESPONSE, learning_rate=1e-5)
        self.accelerator, self.tokenizer = Accelerator(cpu=True), tokenizer
        self.rows = [{"prompt": tokenizer.decode(ids), "ids": ids} for ids in prompts]
        self.agent, self.reference = rlhf.ActorCritic(lm()), lm()
        config = self.reference.config.to_dict() | {"num_labels": 1}
        self.reward = rlhf.RewardModel(GPT2ForSequenceClassification(GPT2Config(**config)).eval(), tokenizer)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=1e-5)
        self.rng, self.seconds = np.random.default_rng(0), []

    def iterate(self) -> None:
        start = time.perf_counter()
        drawn = [self.rows[n] for n in self.rng.integers(len(self.rows), size=BATCH)]
        uniforms = self.rng.random((BATCH, RESPONSE), np.float32)
        batch, texts = rlhf.rollout(self.args, self.tokenizer, self.agent, self.reference, drawn, uniforms)
        batch["scores"] = rlhf.score(self.reward, drawn, texts)
        rlhf.add_advantages(self.args, batch)
        rlhf.update(self.args, self.accelerator, self.agent, self.optimizer, batch, self.rng)
        rlhf.summarize(batch)
        self.seconds.append(time.perf_counter() - start)


class Alternate(PPOTrainer):
    """TRL's trainer, which reports at the end of each iteration: the moment for ours."""

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "objective/kl" in logs:
            self.seconds.append(time.perf_counter() - self.began)
            with torch.enable_grad():  # TRL reports inside no_grad
                self.ours.iterate()
            self.began = time.perf_counter()


def measure(size: dict[str, int]) -> dict[str, Any]:
    config = dict(vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=1, pad_token_id=0, **size)
    tokenizer = make_tokenizer()
    prompts = np.random.default_rng(0).integers(3, VOCAB, size=(BATCH * (options.iterations + 2), 4)).tolist()

    def lm() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**config)).eval()

    trainer = Alternate(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", num_sample_generations=0,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=2,
            total_episodes=BATCH * (options.iterations + 1), response_length=RESPONSE, temperature=1.0,
            learning_rate=1e-5, optim="adamw_torch", bf16=False, use_cpu=True, gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        processing_class=tokenizer, model=lm(), ref_model=lm(),
        reward_model=GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1)),
        value_model=GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip
    trainer.ours = Ours(lm, tokenizer, prompts)
    trainer.seconds, trainer.began = [], time.perf_counter()
    trainer.train()
    ratios = np.array(trainer.seconds[1:]) / np.array(trainer.ours.seconds[1:])
    row = {"parameters": sum(p.numel() for p in lm().parameters()), "iterations": options.iterations}
    row |= {"trl_seconds": round(float(np.median(trainer.seconds[1:])), 3)}
    row |= {"plainrl_seconds": round(float(np.median(trainer.ours.seconds[1:])), 3)}
    return row | {f"ratio_{name}": round(float(np.quantile(ratios, q)), 3)
                  for name, q in (("median", 0.5), ("low", 0.1), ("high", 0.9))}  # fmt: skip


def publish(rows: list[dict[str, Any]]) -> None:
    header = ["model", "parameters", "TRL, s", "rlhf_ppo.py, s", "TRL / plainrl, median [10 %, 90 %]"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in rows:
        ratio = f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        cells = [
            row["model"],
            f"{row['parameters']:,}",
            f"{row['trl_seconds']:.2f}",
            f"{row['plainrl_seconds']:.2f}",
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{options.iterations} iterations of each, one core of {cpu_name()}; TRL {trl.__version__}, "
              f"torch {torch.__version__}."]  # fmt: skip
    section = """## An iteration of PPO, against TRL

How long does an iteration take here and in TRL's last PPOTrainer, at equal models, batch, lengths and epochs?

    python benchmarks/ppo_speed.py trl112"""
    page = replace_between(PAGE.read_text(encoding="utf-8"), "results:ppo_speed", "\n".join(lines), section)
    write_whole(PAGE, page.encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert trl.__version__ == "1.12.0", f"TRL {trl.__version__} has no PPOTrainer"
    rows: list[dict[str, Any]] = []
    for name, size in SIZES.items():
        rows.append({"model": name, **measure(size)})
        print(rows[-1], flush=True)
        with (HOME / "results" / "ppo_speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        publish(rows)
