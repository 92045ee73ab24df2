"""How long a DPO step takes: rlhf/dpo.py against TRL's DPOTrainer, in one process, step by step in alternation.

    python benchmarks/dpo_speed.py                    both models, 40 steps each
    python benchmarks/dpo_speed.py --steps 10

Both train the same weights on the same pairs in the same order, 32 at a time, on one core: TRL's trainer runs as
a user would run it (reference log-probabilities computed beforehand, as here), and after each of its steps comes
one of ours. A step is everything from its pairs' token ids to the changed weights, except that TRL's padding of
the batch is not counted, which is in its favour. The first two steps are not counted either. In the end
the two losses are compared at every step. Result: results/dpo_speed.csv and the table in benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
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

BATCH = 32


class InOrder(trl.DPOTrainer):
    """TRL's trainer, taking the pairs in their order so that both meet the same minibatches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


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


def measure(dpo: Any, make_model: Any, tokenizer: Any, rows: list[dict], steps: int) -> dict[str, Any]:
    model, reference = make_model(), make_model()
    args = dpo.Args(beta=0.1, max_grad_norm=1.0, learning_rate=1e-4, sft_coef=0.0, batch_size=BATCH)
    accelerator, pad_id = Accelerator(cpu=True), tokenizer.pad_token_id
    data = dpo.load_preferences(args, rows, seed=0)
    data.ref_logps = dpo.reference_logps(args, accelerator, reference, pad_id, data.texts)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    losses: list[float] = []

    def ours(step: int) -> None:
        batch = np.arange(step * BATCH, (step + 1) * BATCH)
        loss, seen = dpo.preference_loss(args, model, pad_id, data, batch, torch.zeros(()))
        (loss / BATCH).backward()
        dpo.take_step(args, accelerator, optimizer)
        losses.append(dpo.summarize(args, [seen])["losses/preference_loss"])

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=args.learning_rate,
            lr_scheduler_type="constant", beta=args.beta, precompute_ref_log_probs=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        callback = Alternate(ours)
        table = datasets.Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows])
        trainer = InOrder(make_model(), ref_model=make_model(), args=config, train_dataset=table,
                          processing_class=tokenizer, callbacks=[callback])  # fmt: skip
        trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    gap = max(abs(a - b) for a, b in zip(theirs, losses, strict=True))
    assert gap < 1e-2, f"the two do not do the same work: losses differ by {gap}"
    medians = {name: float(np.median(values)) for name, values in callback.seconds.items()}
    ratios = np.array(callback.seconds["TRL"]) / np.array(callback.seconds["plainrl"])
    return {"parameters": sum(p.numel() for p in reference.parameters()), "steps": len(ratios),
            "plainrl_ms": round(1000 * medians["plainrl"], 1), "trl_ms": round(1000 * medians["TRL"], 1),
            "ratio_median": round(float(np.median(ratios)), 3), "ratio_low": round(float(np.quantile(ratios, 0.1)), 3),
            "ratio_high": round(float(np.quantile(ratios, 0.9)), 3), "loss_gap": float(f"{gap:.2g}")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dpo = load_script("rlhf/dpo.py")
    tokenizer, lm = dpo.load_lm(dpo.Args().model)
    tokenizer.padding_side = "right"
    usable = dpo.load_rows(dpo.Args(), tokenizer, "train")[: BATCH * options.steps]
    steps = min(options.steps, len(usable) // BATCH)

    def tiny() -> torch.nn.Module:
        return dpo.load_lm(dpo.Args().model)[1]

    def larger() -> torch.nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=384, n_layer=5, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)).eval()  # fmt: skip

    rows = [{"model": name, **measure(dpo, make, tokenizer, usable[: steps * BATCH], steps)}
            for name, make in (("tiny_lm", tiny), ("random GPT-2", larger))]  # fmt: skip
    for row in rows:
        print(row)
    with (HOME / "results" / "dpo_speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    publish(rows)


def publish(rows: list[dict[str, Any]]) -> None:
    header = ["model", "parameters", "plainrl, ms a step", "TRL, ms a step", "TRL / plainrl, median [10 %, 90 %]"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in rows:
        ratio = f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        cells = [row["model"], f"{row['parameters']:,}", row["plainrl_ms"], row["trl_ms"], ratio]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"{rows[0]['steps']} steps of {BATCH} pairs each, one core of {cpu_name()}; TRL {trl.__version__}, "
              f"torch {torch.__version__}. Largest difference of the two losses at any step: "
              f"{max(row['loss_gap'] for row in rows):.1g}."]  # fmt: skip
    section = """## A step of DPO, against TRL

How long does a step take here and in TRL's DPOTrainer, at equal weights, pairs and losses?

    python benchmarks/dpo_speed.py"""
    page = replace_between(PAGE.read_text(encoding="utf-8"), "results:dpo_speed", "\n".join(lines), section)
    write_whole(PAGE, page.encode())


if __name__ == "__main__":
    main()
