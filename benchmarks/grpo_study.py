"""GRPO measured: its variants at equal samples, pass@k before and after, and an iteration beside TRL's.

    python benchmarks/grpo_study.py compare          18 variants, seeds 301 to 305, about a minute a run
    python benchmarks/grpo_study.py passk            about three minutes a seed
    python benchmarks/grpo_study.py step             four minutes
    python benchmarks/grpo_study.py draw             figures and tables from what is there

compare and passk go on where they stopped. Raw numbers go to benchmarks/results/grpo_*.csv, the figures to
benchmarks/figures/grpo_*.png. Each seed's warm start is made once and shared by the variants, so they start from the
same weights and sample the same problems.
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


def interval(values: list[float], digits: int) -> str:
    """Mean and 95 % interval (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


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
    """Seconds per iteration of 16 x 16 answers on one core, this script's and TRL's, in alternation.

    Both sample from the same model at temperature 1, so their answers are equally long on average, and hardly move it.
    An untrained model writes 27 tokens and is paid by their number; after the warm start it does the default task.
    """
    import datasets
    from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Alternate(TrainerCallback):
        """Times TRL's iterations, and runs and times one of ours after each."""

        def __init__(self, ours):
            self.ours, self.seconds = ours, []

        def on_step_end(self, *args, **kwargs):
            ended = time.perf_counter()
            self.ours()
            self.seconds.append((ended - self.began, time.perf_counter() - ended))
            self.began = time.perf_counter()

        def on_train_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

    torch.set_num_threads(1)
    rows, accelerator = [], Accelerator(cpu=True)
    for model, hidden, layers, iterations in (
        ("tiny, untrained", 96, 2, 22),
        ("tiny, after the warm start", 96, 2, 42),
        ("10M, untrained", 384, 6, 6),
    ):
        torch.manual_seed(1)
        tokenizer, small = grpo.new_lm()
        lm = GPT2LMHeadModel(GPT2Config(**(small.config.to_dict() | {"n_embd": hidden, "n_layer": layers}))).eval()
        args, verify = grpo.Args(learning_rate=1e-6), grpo.load_reward("cups")
        warm = "warm" in model
        if warm:
            lm = small
            with contextlib.redirect_stdout(io.StringIO()):
                grpo.warm_start(args, lm, tokenizer)

        def reward(prompts, completions, answer, **_) -> list[float]:
            if warm:  # noqa: B023
                return verify(prompts, completions, answer=answer)  # noqa: B023
            return [float(len(text) % 7) for text in completions]

        rng = np.random.default_rng(0)
        problems = [grpo.make_problem(rng, *grpo.TRAIN_SWAPS) for _ in range(1024)]
        with tempfile.TemporaryDirectory() as folder:
            grpo.save_pretrained(Path(folder, "lm"), lm, tokenizer)
            optimizer = torch.optim.AdamW(lm.parameters(), lr=args.learning_rate, weight_decay=0.0)

            def ours() -> None:
                batch = grpo.rollout(args, accelerator, lm, tokenizer, {"cups": reward}, None, 16, rng)  # noqa: B023
                grpo.update(args, accelerator, lm, None, optimizer, batch, rng)  # noqa: B023

            callback = Alternate(ours)
            trainer = GRPOTrainer(
                model=str(Path(folder, "lm")), processing_class=tokenizer, reward_funcs=reward, callbacks=[callback],
                train_dataset=datasets.Dataset.from_list(problems),
                args=GRPOConfig(
                    output_dir=folder, per_device_train_batch_size=256, num_generations=16, max_completion_length=40,
                    max_steps=iterations, learning_rate=args.learning_rate, use_cpu=True, bf16=False, beta=0.0,
                    gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
                    disable_tqdm=True, optim="adamw_torch",
                ),
            )  # fmt: skip
            trainer.train()
        theirs, mine = np.array(callback.seconds[2:]).T
        ratio = theirs / mine
        found = {"grpo.py": np.median(mine), "trl": np.median(theirs), "ratio": np.median(ratio)}
        found |= {"ratio_low": np.quantile(ratio, 0.1), "ratio_high": np.quantile(ratio, 0.9)}
        rows.append({"model": model, "parameters": sum(p.numel() for p in lm.parameters()), "steps": len(ratio)})
        rows[-1] |= {key: float(value) for key, value in found.items()}
        print(rows[-1], flush=True)
    write("grpo_step.csv", rows)


# Figures and tables ----------------------------------------------------------------------------


def course(rows: list[dict], name: str, column: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds along a variant's runs, on a grid that all of them cover."""
    here, curves = [row for row in rows if row["variant"] == name and not np.isnan(row[column])], []
    for seed in {row["seed"] for row in here}:
        curves.append(np.array([(row[x], row[column]) for row in here if row["seed"] == seed]).T)
    if not curves:  # no answer was ever wrong, say
        return np.array([]), np.array([])
    grid = np.linspace(max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves), 100)
    return grid, np.mean([np.interp(grid, xs, ys) for xs, ys in curves], 0)


def draw_comparison(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    there = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    right, lengths, several = axes[:2], axes[2], axes[3]
    for color, name in zip(COLORS, (name for name in there if name in ALGORITHMS), strict=False):
        for axis, x in zip(right, ("step", "seconds"), strict=True):
            axis.plot(*course(rows, name, "eval/pass@1", x), color=color, label=name)
    for color, name in zip(COLORS, (name for name in there if name.startswith("length:") or name == DR_GRPO),
                           strict=False):  # fmt: skip
        label = name.replace(DR_GRPO, "length: by a constant (Dr. GRPO)")
        lengths.plot(*course(rows, name, "objective/length_right"), color=color, label=label)
        lengths.plot(*course(rows, name, "objective/length_wrong"), "--", color=color)
    for color, name in zip(COLORS, (name for name in there if "updates" in name or name == DEFAULT), strict=False):
        several.plot(*course(rows, name, "losses/entropy"), color=color, label=name)
    right[0].set(xlabel="answers sampled", ylabel="pass@1 on held-out problems", ylim=(0.8, 1))
    right[1].set(xlabel="seconds of learning", ylim=(0.8, 1))
    lengths.set(xlabel="answers sampled", ylabel="tokens of right (solid) and wrong answers")
    several.set(xlabel="answers sampled", ylabel="entropy, nats a token")
    for axis in axes:
        axis.grid(alpha=0.25)
        if axis is not right[1]:
            axis.legend(fontsize="small", frameon=False)
    figure.savefig(FIGURES / "grpo_compare.png", dpi=100)


def draw_pass_at_k(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for place, kind in enumerate(PROBLEMS, start=1):
        axis = figure.add_subplot(1, 2, place, title=f"{kind} problems", xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(KS[::2], KS[::2])
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
        draw_comparison(read("grpo_course.csv"))
        keys = {"pass@1": ("pass@1", 3), "greedy": ("greedy", 3), "objective/length_right": ("tokens, right", 1),
                "objective/length_wrong": ("tokens, wrong", 1), "losses/entropy": ("entropy", 3),
                "seconds": ("seconds of learning", 0)}  # fmt: skip
        groups = {name: [row for row in final if row["variant"] == name] for name in VARIANTS}
        cells = [
            [name, str(len(rows)), *(interval([row[key] for row in rows], keys[key][1]) for key in keys)]
            for name, rows in groups.items()
            if rows
        ]
        page = replace_between(
            page, "results:grpo_compare", table(["variant", "seeds", *(title for title, _ in keys.values())], cells), ""
        )
    if passes:
        draw_pass_at_k(passes)
        cells = []
        for kind, when in itertools.product(PROBLEMS, WHEN):
            here = [row for row in passes if (row["problems"], row["model"]) == (kind, when)]
            means = [f"{np.mean([row[f'pass@{k}'] for row in here]):.3f}" for k in KS]
            cells.append([f"{kind}, {WHEN[when]}", str(len(here)), *means])
        page = replace_between(page, "results:grpo_passk", table(["problems", "seeds", *map(str, KS)], cells), "")
    if steps:
        cells = [[row["model"], f"{row['parameters']:,.0f}", f"{row['steps']:.0f}", f"{row['trl']:.2f}",
                  f"{row['grpo.py']:.2f}", f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"]
                 for row in steps]  # fmt: skip
        header = ["model", "parameters", "iterations", "TRL, s", "grpo.py, s", "TRL / plainrl, median [10 %, 90 %]"]
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
