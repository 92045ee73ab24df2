"""What rlhf/grpo.py's header and issue claim, measured: the variants at equal samples, pass@k, and a step beside TRL.

    python benchmarks/grpo_study.py compare --seeds 301 302 303 304 305     (a variant and seed takes about a minute)
    python benchmarks/grpo_study.py passk --seeds 301 302 303 304 305
    python benchmarks/grpo_study.py step

Raw numbers go to benchmarks/results/grpo_*.csv, the figures to benchmarks/figures/grpo_*.png. Each seed's warm start
is made once and shared by the variants, so they start from the same weights and sample the same problems.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"

DR = "--advantage dr_grpo --loss-norm constant"
VARIANTS = {
    "GRPO (paper)": "--advantage grpo --loss-norm sequence --clip-high 0.2",
    "GRPO, mean over tokens (default)": "",
    "Dr. GRPO": DR,
    "RLOO": "--advantage rloo --loss-norm constant",
    "REINFORCE++": "--advantage reinforce++",
    "DAPO (dynamic sampling)": "--dynamic-sampling 4",
    "right samples only": "",  # supervised learning on them: rejection sampling
    "length: per sequence": "--advantage dr_grpo --loss-norm sequence",
    "length: per token": "--advantage dr_grpo --loss-norm token",
    "4 updates, clip .2 / .2": "--num-minibatches 2 --update-epochs 2 --clip-high 0.2",
    "4 updates, clip .2 / .28": "--num-minibatches 2 --update-epochs 2",
    "4 updates, per answer (GSPO)": "--num-minibatches 2 --update-epochs 2 --ratio sequence --loss-norm sequence",
    "16 updates": "--num-minibatches 4 --update-epochs 4",
    "groups of 4": "--num-prompts 64 --group-size 4",
    "groups of 64": "--num-prompts 4 --group-size 64",
}
COLUMNS = ("objective/right", "objective/length_right", "objective/length_wrong", "losses/entropy", "eval/pass@1")


def load_grpo():
    """rlhf/grpo.py as a module."""
    spec = importlib.util.spec_from_file_location("grpo", HERE.parent / "rlhf" / "grpo.py")
    sys.modules["grpo"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_warm_starts(grpo, folder: Path) -> None:
    """Makes warm starts with one seed once."""
    original = grpo.warm_start

    def warm_start(args, lm, tokenizer):
        file = folder / f"start-{args.seed}-{args.warmup_steps}-{args.right_demos}.pt"
        if not file.exists():
            original(args, lm, tokenizer)
            torch.save(lm.state_dict(), file)
        lm.load_state_dict(torch.load(file, weights_only=True))

    grpo.warm_start = warm_start


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {half:.3f}"


def write(file: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def compare(grpo, seeds: list[int], names: list[str], flags: list[str]) -> None:
    """Every variant on every seed: results, and the course of some metrics."""
    final, course = [], []
    advantages = grpo.group_advantages
    with tempfile.TemporaryDirectory() as folder:
        share_warm_starts(grpo, Path(folder))
        for name in names:
            for seed in seeds:
                only_right = name == "right samples only"  # advantage = reward, 1 or 0
                grpo.group_advantages = (lambda rewards, kind: rewards.nan_to_num()) if only_right else advantages
                argv = [*VARIANTS[name].split(), "--seed", str(seed), "--run-dir", folder, *flags]
                run = grpo.train(grpo.parse_args(argv))
                summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
                with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                last = {c: np.mean([float(row[c]) for row in rows[-10:] if row[c]] or [np.nan]) for c in COLUMNS[:4]}
                before = {f"before_{key}": value for key, value in summary["before"].items()}
                after = {key: summary[key] for key in summary["before"]}
                learning = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
                final.append({"variant": name, "seed": seed, "seconds": learning, **before, **after, **last})
                course += [
                    {"variant": name, "seed": seed, "step": r["step"], **{c: r[c] for c in COLUMNS}} for r in rows
                ]
                write("grpo_compare.csv", final)
                write("grpo_course.csv", course)
    for name in names:
        rows = [row for row in final if row["variant"] == name]
        keys = ("pass@1", "greedy", "objective/length_right", "objective/length_wrong", "losses/entropy", "seconds")
        print(f"| {name} | " + " | ".join(interval([row[key] for row in rows]) for key in keys) + " |")


def passk(grpo, seeds: list[int], flags: list[str], problems: int = 128, samples: int = 256) -> None:
    """pass@k before and after, k = 1 ... 256, on held-out and on harder problems."""
    from matplotlib.figure import Figure

    ks, rows = [2**i for i in range(9)], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            args = grpo.parse_args(["--seed", str(seed), "--run-dir", folder, *flags])
            run = grpo.train(args)
            for when in ("start", "policy"):
                tokenizer, lm = grpo.load_lm(str(run / when))
                for kind, swaps in (("held out", grpo.TRAIN_SWAPS), ("harder", grpo.HARDER_SWAPS)):
                    rng = np.random.default_rng(10**9 + seed)
                    asked = grpo.make_rows(tokenizer, rng, problems, *swaps, True)
                    repeated = [row for row in asked for _ in range(samples)]
                    draws = rng.random((len(repeated), args.max_completion_length), np.float32)
                    texts = grpo.answer(args, lm, tokenizer, repeated, draws, 1.0)[-1]
                    right = grpo.score("cups", grpo.load_reward("cups"), repeated, texts).view(problems, samples)
                    found = {f"pass@{k}": grpo.pass_at_k(right, k) for k in ks}
                    rows.append({"seed": seed, "model": when, "problems": kind, **found})
                    write("grpo_passk.csv", rows)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for place, kind in enumerate(("held out", "harder"), start=1):
        axis = figure.add_subplot(1, 2, place, title=f"{kind} problems", xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
        axis.set_xscale("log", base=2)
        for when, label in (("start", "after the warm start"), ("policy", "after GRPO")):
            some = [[r[f"pass@{k}"] for k in ks] for r in rows if r["model"] == when and r["problems"] == kind]
            [line] = axis.plot(ks, np.mean(some, 0), label=label)
            axis.fill_between(ks, np.min(some, 0), np.max(some, 0), alpha=0.2, color=line.get_color())
            print(kind, label, *(f"{k}: {value:.3f}" for k, value in zip(ks, np.mean(some, 0), strict=True)))
        axis.legend()
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "grpo_passk.png", dpi=120)


def step(grpo) -> None:
    """Seconds per iteration of 16 x 16 answers on one core, this script's and TRL's; two sizes.

    Both sample from the same untrained model at temperature 1, so their answers are equally long on average.
    """
    import datasets
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    rows = []
    for size, hidden, layers, iterations in (("tiny", 96, 2, 20), ("10M", 384, 6, 4)):
        torch.manual_seed(1)
        tokenizer, small = grpo.new_lm()
        config = GPT2Config(**(small.config.to_dict() | {"n_embd": hidden, "n_layer": layers}))
        problems = [grpo.make_problem(np.random.default_rng(i), 2, 6) for i in range(1024)]
        with tempfile.TemporaryDirectory() as folder:
            lm = GPT2LMHeadModel(config).eval()
            grpo.save_pretrained(Path(folder, "lm"), lm, tokenizer)
            ours = grpo.Args(learning_rate=1e-5)
            asked, rng = grpo.make_rows(tokenizer, np.random.default_rng(0), 16, 2, 6), np.random.default_rng(0)
            optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-5)
            reward = {"cups": lambda prompts, completions, **_: [len(text) % 7 for text in completions]}
            theirs = GRPOTrainer(
                model=str(Path(folder, "lm")), processing_class=tokenizer,
                reward_funcs=lambda prompts, completions, **_: [float(len(text) % 7) for text in completions],
                train_dataset=datasets.Dataset.from_list(problems),
                args=GRPOConfig(
                    output_dir=folder, per_device_train_batch_size=256, num_generations=16, max_completion_length=40,
                    max_steps=iterations, learning_rate=1e-5, use_cpu=True, bf16=False, gradient_checkpointing=False,
                    report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, beta=0.0,
                    optim="adamw_torch",
                ),
            )  # fmt: skip
            started = time.perf_counter()
            theirs.train()
            trl_seconds = (time.perf_counter() - started) / iterations
            accelerator, started = Accelerator(cpu=True), time.perf_counter()
            for _ in range(iterations):
                batch = grpo.rollout(ours, accelerator, lm, tokenizer, reward, None, len(asked), rng)
                grpo.update(ours, accelerator, lm, None, optimizer, batch, rng)
            seconds = (time.perf_counter() - started) / iterations
        parameters = sum(p.numel() for p in lm.parameters())
        rows.append({"model": size, "parameters": parameters, "grpo.py": seconds, "trl": trl_seconds})
        print(f"{size}: {seconds:.3f} s, TRL {trl_seconds:.3f} s, {trl_seconds / seconds:.2f} times as long")
    write("grpo_step.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("compare", "passk", "step"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303, 304, 305])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of compare")
    parser.add_argument("--flags", default="", help='further flags of the script, in quotes: --flags="--seed 1"')
    args = parser.parse_args()
    grpo, flags = load_grpo(), args.flags.split()
    if args.study == "compare":
        compare(grpo, args.seeds, args.variants, flags)
    else:
        passk(grpo, args.seeds, flags) if args.study == "passk" else step(grpo)


if __name__ == "__main__":
    main()
