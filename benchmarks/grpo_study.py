"""What rlhf/grpo.py's header and issue claim, measured: the variants at equal samples, pass@k, and a step beside TRL.

    python benchmarks/grpo_study.py compare --seeds 301 302 303 304 305     (about a minute a variant and seed)
    python benchmarks/grpo_study.py passk --seeds 301 302 303 304 305
    python benchmarks/grpo_study.py step

Raw numbers go to benchmarks/results/grpo_*.csv, the figures to benchmarks/figures/grpo_*.png. Each seed's warm start
is made once and shared by the variants, so they start from the same weights and sample the same problems.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from figure import COLORS
from run import PAGE, fold, load_script, replace_between, write_whole

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"

FILES = ("grpo_compare.csv", "grpo_passk.csv", "grpo_step.csv")
DEFAULT, DR_GRPO = "GRPO, mean over tokens (default)", "Dr. GRPO"
VARIANTS = {
    "GRPO (paper)": "--advantage grpo --loss-norm sequence --clip-high 0.2",
    DEFAULT: "",
    DR_GRPO: "--advantage dr_grpo --loss-norm constant",
    "RLOO": "--advantage rloo --loss-norm constant",
    "REINFORCE++": "--advantage reinforce++",
    "DAPO (dynamic sampling)": "--dynamic-sampling 4",
    "PPO with a value function": "--learning-rate 1e-3",  # rlhf_ppo.py's; best of five settings on seeds 1 and 2
    "right samples only": "",  # supervised learning on them: rejection sampling
    "length: per sequence": "--advantage dr_grpo --loss-norm sequence",
    "length: per token": "--advantage dr_grpo --loss-norm token",
    "4 updates, clip .2 / .2": "--num-minibatches 2 --update-epochs 2 --clip-high 0.2",
    "4 updates, clip .2 / .28": "--num-minibatches 2 --update-epochs 2",
    "4 updates, per answer (GSPO)": "--num-minibatches 2 --update-epochs 2 --ratio sequence --loss-norm sequence",
    "4 updates, learning rate 5e-4": "--num-minibatches 2 --update-epochs 2 --learning-rate 5e-4",
    "16 updates": "--num-minibatches 4 --update-epochs 4",
    "16 updates, learning rate 2e-4": "--num-minibatches 4 --update-epochs 4 --learning-rate 2e-4",
    "groups of 4": "--num-prompts 64 --group-size 4",
    "groups of 64": "--num-prompts 4 --group-size 64",
}
ALGORITHMS = list(VARIANTS)[:8]  # the others change one part of them
WHEN = {"start": "after the warm start", "policy": "after GRPO"}
PROBLEMS = {"held out": "TRAIN_SWAPS", "harder": "HARDER_SWAPS"}
KS = [2**i for i in range(9)]
COLUMNS = ("objective/right", "objective/length_right", "objective/length_wrong", "losses/entropy", "eval/pass@1")


class ValueFunction:
    """PPO as rlhf_ppo.py has it, in the place of GRPO's update: a value for every token instead of a group's mean."""

    def __init__(self):
        self.rlhf = load_script("rlhf/rlhf_ppo.py")
        self.agent = None

    def update(self, args, accelerator, lm, reference, optimizer, batch, rng) -> dict[str, float]:
        if self.agent is None:
            self.agent = self.rlhf.ActorCritic(lm)
            self.optimizer = torch.optim.AdamW(self.agent.parameters(), weight_decay=0.0)
        self.optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        settings = self.rlhf.Args(
            batch_size=batch["rewards"].numel(), num_minibatches=args.num_minibatches, update_epochs=args.update_epochs,
            max_completion_length=args.max_completion_length, kl_coef=0, missing_eos_penalty=0,
            max_grad_norm=args.max_grad_norm,
        )  # fmt: skip
        width = int(batch["mask"].sum(-1).max())
        tokens, mask, logprobs = (batch[name][..., :width].flatten(0, 1) for name in ("tokens", "mask", "logprobs"))
        prompts = [row["ids"] for row in batch["rows"] for _ in range(args.group_size)]
        prompt_ids, prompt_mask = self.rlhf.pad(prompts, 0, "left")
        texts = {"ids": torch.cat((prompt_ids, tokens), 1), "seen": torch.cat((prompt_mask, mask), 1), "mask": mask}
        with torch.no_grad():
            _, values = self.agent(texts["ids"], texts["seen"], width, args.temperature)
        texts |= {"logprobs": logprobs, "ref_logprobs": logprobs, "values": values}
        texts |= {"scores": batch["rewards"].flatten(), "ended": batch["ended"].flatten().float()}
        self.rlhf.add_advantages(settings, texts)
        return self.rlhf.update(settings, accelerator, self.agent, self.optimizer, texts, rng)


@contextlib.contextmanager
def replaced(module, **functions):
    """The module with other functions, as long as the block lasts."""
    original = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in original.items():
            setattr(module, name, function)


def shared_warm_start(original, folder: Path):
    """A warm start that makes one model for all runs with the same seed."""

    def warm_start(args, lm, tokenizer):
        file = folder / f"start-{args.seed}-{args.warmup_steps}-{args.right_demos}.pt"
        if not file.exists():
            original(args, lm, tokenizer)
            torch.save(lm.state_dict(), file)
        lm.load_state_dict(torch.load(file, weights_only=True))

    return warm_start


def only_right(rewards, kind):
    """Every right answer counts once and a wrong one not at all: supervised learning on the right answers."""
    return rewards.nan_to_num()


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {half:.3f}"


def read(file: str) -> list[dict]:
    """The rows measured so far, numbers as numbers."""

    def number(cell: str) -> float | str:
        try:
            return float(cell)
        except ValueError:
            return cell or float("nan")

    if not (RESULTS / file).exists():
        return []
    with open(RESULTS / file, newline="", encoding="utf-8") as found:
        return [{key: number(cell) for key, cell in row.items()} for row in csv.DictReader(found)]


def write(file: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def compare(grpo, seeds: list[int], names: list[str], flags: list[str]) -> None:
    """Every variant on every seed that is not there yet: results, and the course of some metrics."""
    final, course = read("grpo_compare.csv"), read("grpo_course.csv")
    with tempfile.TemporaryDirectory() as folder:
        warm_start = shared_warm_start(grpo.warm_start, Path(folder))
        for seed, name in itertools.product(seeds, names):
            if any((row["variant"], row["seed"]) == (name, seed) for row in final):
                continue
            functions = {"warm_start": warm_start}
            if name.startswith("PPO"):
                functions["update"] = ValueFunction().update
            if name == "right samples only":
                functions["group_advantages"] = only_right
            argv = [*VARIANTS[name].split(), "--seed", str(seed), "--run-dir", folder, *flags]
            with replaced(grpo, **functions), contextlib.redirect_stdout(io.StringIO()):
                run = grpo.train(grpo.parse_args(argv))
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            last = {c: np.mean([float(row[c]) for row in rows[-10:] if row[c]] or [np.nan]) for c in COLUMNS[:4]}
            before = {f"before_{key}": value for key, value in summary["before"].items()}
            after = {key: summary[key] for key in summary["before"]}
            began = float(rows[0]["seconds"])  # after the warm start and the first iteration
            learning = float(rows[-1]["seconds"]) - began
            final.append({"variant": name, "seed": seed, "seconds": learning, **before, **after, **last})
            course += [
                {"variant": name, "seed": seed, "step": r["step"], "seconds": float(r["seconds"]) - began}
                | {c: float(r[c] or "nan") for c in COLUMNS} for r in rows[4::5]
            ]  # fmt: skip
            write("grpo_compare.csv", final)
            write("grpo_course.csv", course)
            print(f"{name}, seed {seed}: pass@1 {after['pass@1']:.3f}, {learning:.0f} s", flush=True)


def passk(grpo, seeds: list[int], flags: list[str], problems: int = 128, samples: int = 256) -> None:
    """pass@k before and after, k = 1 ... 256, on held-out and on harder problems."""
    rows = read("grpo_passk.csv")
    for seed in (seed for seed in seeds if seed not in {row["seed"] for row in rows}):
        with tempfile.TemporaryDirectory() as folder:
            args = grpo.parse_args(["--seed", str(seed), "--run-dir", folder, *flags])
            with contextlib.redirect_stdout(io.StringIO()):
                run = grpo.train(args)
            for when, (kind, swaps) in itertools.product(WHEN, PROBLEMS.items()):
                tokenizer, lm = grpo.load_lm(str(run / when))
                rng = np.random.default_rng(10**9 + seed)
                asked = grpo.make_rows(tokenizer, rng, problems, *getattr(grpo, swaps), True)
                repeated = [row for row in asked for _ in range(samples)]
                draws = rng.random((len(repeated), args.max_completion_length), np.float32)
                texts = grpo.answer(args, lm, tokenizer, repeated, draws, 1.0)[-1]
                right = grpo.score("cups", grpo.load_reward("cups"), repeated, texts).view(problems, samples)
                found = {f"pass@{k}": grpo.pass_at_k(right, k) for k in KS}
                rows.append({"seed": seed, "model": when, "problems": kind, **found})
                print(seed, when, kind, *(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        write("grpo_passk.csv", rows)


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


# Figures and tables ----------------------------------------------------------------------------


def courses(rows: list[dict], name: str, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the seeds along a variant's runs: answers sampled, seconds, and a column where it was measured."""
    here = [row for row in rows if row["variant"] == name and not np.isnan(row[column])]
    groups = [[row for row in here if row["step"] == step] for step in sorted({row["step"] for row in here})]
    return tuple(np.array([np.mean([row[key] for row in group]) for group in groups])
                 for key in ("step", "seconds", column))  # fmt: skip


def draw_comparison(final: list[dict], rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    there = [name for name in VARIANTS if any(row["variant"] == name for row in final)]
    for color, name in zip(COLORS, (name for name in there if name in ALGORITHMS), strict=False):
        steps, seconds, right = courses(rows, name, "eval/pass@1")
        axes[0].plot(steps, right, color=color, label=name)
        axes[1].plot(seconds, right, color=color)
    axes[0].set(xlabel="answers sampled", ylabel="pass@1 on held-out problems")
    axes[1].set(xlabel="seconds of learning", ylabel="pass@1 on held-out problems")
    for color, name in zip(COLORS, (name for name in there if name.startswith("length:") or name == DR_GRPO),
                           strict=False):  # fmt: skip
        for kind, style in (("right", "-"), ("wrong", "--")):
            steps, _, length = courses(rows, name, f"objective/length_{kind}")
            label = name.replace(DR_GRPO, "length: by a constant (Dr. GRPO)") if kind == "right" else None
            axes[2].plot(steps, length, style, color=color, label=label)
    axes[2].set(xlabel="answers sampled", ylabel="tokens of right (solid) and wrong answers")
    for color, name in zip(COLORS, (name for name in there if "updates" in name or name == DEFAULT), strict=False):
        steps, _, entropy = courses(rows, name, "losses/entropy")
        axes[3].plot(steps, entropy, color=color, label=name)
    axes[3].set(xlabel="answers sampled", ylabel="entropy, nats a token")
    for axis in axes:
        axis.grid(alpha=0.25)
        if axis is not axes[1]:
            axis.legend(fontsize="small", frameon=False)
    figure.savefig(FIGURES / "grpo_compare.png", dpi=100)


def draw_pass_at_k(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for place, kind in enumerate(PROBLEMS, start=1):
        axis = figure.add_subplot(1, 2, place, title=f"{kind} problems", xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
        axis.set_xscale("log", base=2)
        for color, (when, label) in zip(COLORS, WHEN.items(), strict=False):
            some = [[r[f"pass@{k}"] for k in KS] for r in rows if r["model"] == when and r["problems"] == kind]
            axis.plot(KS, np.mean(some, 0), label=label, color=color)
            axis.fill_between(KS, np.min(some, 0), np.max(some, 0), alpha=0.2, color=color)
        axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(FIGURES / "grpo_passk.png", dpi=100)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(fold(lines, "All variants"))


def publish() -> None:
    """Draws what has been measured and writes its tables into benchmarks.md."""
    FIGURES.mkdir(exist_ok=True)
    page, final, passes, steps = PAGE.read_text(encoding="utf-8"), *map(read, FILES)
    if final:
        draw_comparison(final, read("grpo_course.csv"))
        keys = {
            "pass@1": "pass@1",
            "greedy": "greedy",
            "objective/length_right": "tokens of right answers",
            "objective/length_wrong": "of wrong ones",
            "losses/entropy": "entropy",
            "seconds": "seconds of learning",
        }
        groups = {name: [row for row in final if row["variant"] == name] for name in VARIANTS}
        cells = [[name, str(len(rows)), *(interval([row[key] for row in rows]) for key in keys)]
                 for name, rows in groups.items() if rows]  # fmt: skip
        page = replace_between(page, "results:grpo_compare", table(["variant", "seeds", *keys.values()], cells), "")
    if passes:
        draw_pass_at_k(passes)
        cells = []
        for kind, when in itertools.product(PROBLEMS, WHEN):
            here = [row for row in passes if (row["problems"], row["model"]) == (kind, when)]
            means = [f"{np.mean([row[f'pass@{k}'] for row in here]):.3f}" for k in KS]
            cells.append([f"{kind}, {WHEN[when]}", str(len(here)), *means])
        page = replace_between(page, "results:grpo_passk", table(["problems", "seeds", *map(str, KS)], cells), "")
    if steps:
        cells = [[row["model"], f"{row['parameters']:,.0f}", f"{row['trl']:.2f}", f"{row['grpo.py']:.2f}",
                  f"{row['trl'] / row['grpo.py']:.2f}"] for row in steps]  # fmt: skip
        header = ["model", "parameters", "TRL, s an iteration", "grpo.py", "TRL / plainrl"]
        page = replace_between(page, "results:grpo_step", table(header, cells), "")
    write_whole(PAGE, page.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("compare", "passk", "step", "draw"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303, 304, 305])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of compare")
    parser.add_argument("--flags", default="", help='further flags of the script, in quotes: --flags="--seed 1"')
    args = parser.parse_args()
    grpo, flags = load_script("rlhf/grpo.py"), args.flags.split()
    if args.study == "compare":
        compare(grpo, args.seeds, args.variants, flags)
    elif args.study == "passk":
        passk(grpo, args.seeds, flags)
    elif args.study == "step":
        step(grpo)
    publish()


if __name__ == "__main__":
    main()
