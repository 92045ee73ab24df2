"""How long a step on pairs takes: DPO's and the reward model's, against TRL's trainers, in alternation.

    python benchmarks/dpo_speed.py                    DPO and the reward model, both sizes, 40 steps each
    python benchmarks/dpo_speed.py --only reward --steps 10

rlhf/dpo.py against DPOTrainer and the second stage of rlhf/rlhf_ppo.py against RewardTrainer, in one process. Both
train the same weights on the same pairs in the same order, 32 at a time, on one core: TRL's trainers run as a user
would run them (DPO's reference log-probabilities computed beforehand, as here), and after each of their steps comes one
of ours. A step is everything from its pairs' token ids to the changed weights, except that TRL's padding of the batch
is not counted, which is in its favour. The first two steps are not counted either. In the end the two losses are
compared at every step. Result: results/dpo_speed.csv and the table in benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import numpy as np
import torch
import trl
from accelerate import Accelerator
from run import HOME, PAGE, cpu_name, load_script, replace_between, write_whole
from torch.utils.data import SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

BATCH, RATE = 32, 1e-4


class InOrder:
    """TRL's trainers, taking the pairs in their order so that both meet the same minibatches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class DPOInOrder(InOrder, trl.DPOTrainer):
    pass


class RewardInOrder(InOrder, trl.RewardTrainer):
    pass


class Alternate(TrainerCallback):
    """Times TRL's steps, and runs and times one of ours after each."""

    def __init__(self, ours: Any):
        self.ours, self.seconds = ours, {"TRL": [], "plainrl": []}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        ended = time.perf_counter()
        self.ours(state.global_step - 1)
        if state.global_step > 2:
            self.seconds["TRL"].append(ended - self.began)
            self.seconds["plainrl"].append(time.perf_counter() - ended)


def alternate(make_trainer: Any, ours: Any, steps: int) -> dict[str, Any]:
    """Times of both. ours(step) returns its loss; make_trainer(config, callbacks) returns TRL's trainer."""
    losses: list[float] = []
    callback = Alternate(lambda step: losses.append(ours(step)))
    with tempfile.TemporaryDirectory() as folder:
        config = dict(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE,
            lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = make_trainer(config, [callback])
        trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    gap = max(abs(a - b) for a, b in zip(theirs, losses, strict=True))
    assert gap < 1e-2, f"the two do not do the same work: losses differ by {gap}"
    medians = {name: float(np.median(values)) for name, values in callback.seconds.items()}
    ratios = np.array(callback.seconds["TRL"]) / np.array(callback.seconds["plainrl"])
    return {"parameters": sum(p.numel() for p in trainer.model.parameters()), "steps": len(ratios),
            "plainrl_ms": round(1000 * medians["plainrl"], 1), "trl_ms": round(1000 * medians["TRL"], 1),
            "ratio_median": round(float(np.median(ratios)), 3), "ratio_low": round(float(np.quantile(ratios, 0.1)), 3),
            "ratio_high": round(float(np.quantile(ratios, 0.9)), 3), "loss_gap": float(f"{gap:.2g}")}  # fmt: skip


def measure_dpo(folder: Path, tokenizer: Any, rows: list[dict], steps: int) -> dict[str, Any]:
    dpo = load_script("rlhf/dpo.py")
    model, reference, theirs = (dpo.load_lm(str(folder))[1] for _ in range(3))
    args = dpo.Args(beta=0.1, max_grad_norm=1.0, learning_rate=RATE, sft_coef=0.0, batch_size=BATCH)
    accelerator, pad_id = Accelerator(cpu=True), tokenizer.pad_token_id
    data = dpo.load_preferences(args, rows, seed=0)
    data.ref_logps = dpo.reference_logps(args, accelerator, reference, pad_id, data.texts)
    optimizer = dpo.adam(model, args.learning_rate)
    table = datasets.Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows])

    def ours(step: int) -> float:
        batch = np.arange(step * BATCH, (step + 1) * BATCH)
        loss, seen = dpo.preference_loss(args, model, pad_id, data, batch, torch.zeros(()))
        (loss / BATCH).backward()
        dpo.take_step(args, accelerator, optimizer)
        return dpo.summarize(args, [seen])["losses/preference_loss"]

    def trainer(config: dict, callbacks: list) -> Any:
        config = trl.DPOConfig(**config, beta=args.beta, precompute_ref_log_probs=True)
        return DPOInOrder(theirs, ref_model=reference, args=config, train_dataset=table, processing_class=tokenizer,
                          callbacks=callbacks)  # fmt: skip

    return alternate(trainer, ours, steps)


def measure_reward(folder: Path, tokenizer: Any, rows: list[dict], steps: int) -> dict[str, Any]:
    rlhf = load_script("rlhf/rlhf_ppo.py")
    args, accelerator = rlhf.Args(reward_batch_size=BATCH), Accelerator(cpu=True)
    (_, net), (_, theirs) = (rlhf.new_reward_model(args, str(folder), torch.device("cpu")) for _ in range(2))
    model = rlhf.RewardModel(net, tokenizer)
    optimizer = rlhf.adam(net, RATE)
    names = ("chosen_ids", "rejected_ids")
    table = datasets.Dataset.from_list([{name: row[name][0] for name in names} for row in rows])

    def ours(step: int) -> float:
        batch = range(step * BATCH, (step + 1) * BATCH)
        scores = model.scores([rows[n][name][0] for name in names for n in batch])
        loss = rlhf.reward_loss(*scores.chunk(2)).mean()
        loss.backward()
        rlhf.take_step(args, accelerator, optimizer)
        return loss.item()

    def trainer(config: dict, callbacks: list) -> Any:
        return RewardInOrder(theirs, args=trl.RewardConfig(**config), train_dataset=table, processing_class=tokenizer,
                             callbacks=callbacks)  # fmt: skip

    return alternate(trainer, ours, steps)


MEASURES = {"dpo": measure_dpo, "reward": measure_reward}
NAMES = {"dpo": "DPO", "reward": "the reward model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", choices=MEASURES, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dpo = load_script("rlhf/dpo.py")
    tokenizer, tiny = dpo.load_lm(dpo.Args().model)
    tokenizer.padding_side = "right"
    usable = dpo.load_rows(dpo.Args(), tokenizer, "train")[: BATCH * options.steps]
    steps = min(options.steps, len(usable) // BATCH)
    torch.manual_seed(0)
    larger = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=384, n_layer=5, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))  # fmt: skip
    rows = []
    for what in [options.only] if options.only else MEASURES:
        for name, lm in (("tiny_lm", tiny), ("random GPT-2", larger)):
            with tempfile.TemporaryDirectory() as folder:
                dpo.save_pretrained(Path(folder, "lm"), lm, tokenizer)
                found = MEASURES[what](Path(folder, "lm"), tokenizer, usable[: steps * BATCH], steps)
            rows.append({"step": what, "model": name, **found})
            print(rows[-1])
    if not options.only:
        with (HOME / "results" / "dpo_speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        publish(rows)


def publish(rows: list[dict[str, Any]]) -> None:
    header = [
        "step of",
        "model",
        "parameters",
        "plainrl, ms a step",
        "TRL, ms a step",
        "TRL / plainrl, median [10 %, 90 %]",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in rows:
        ratio = f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        cells = [NAMES[row["step"]], row["model"], f"{row['parameters']:,}", row["plainrl_ms"], row["trl_ms"], ratio]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"{rows[0]['steps']} steps of {BATCH} pairs each, one core of {cpu_name()}; TRL {trl.__version__}, "
              f"torch {torch.__version__}. Largest difference of the two losses at any step: "
              f"{max(row['loss_gap'] for row in rows):.1g}."]  # fmt: skip
    section = """## A step of DPO and of the reward model, against TRL

How long does a step take here and in TRL's DPOTrainer and RewardTrainer, at equal weights, pairs and losses?

    python benchmarks/dpo_speed.py"""
    page = replace_between(PAGE.read_text(encoding="utf-8"), "results:dpo_speed", "\n".join(lines), section)
    write_whole(PAGE, page.encode())


if __name__ == "__main__":
    main()
