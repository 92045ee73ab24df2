"""What a baseline and a critic do to the policy gradient: two figures and their raw numbers.

    python benchmarks/policy_gradient.py variance     the noise of nine estimators at equal policy and equal steps
    python benchmarks/policy_gradient.py curves       what that means for learning, ten seeds each
    python benchmarks/policy_gradient.py draw         both figures again from the numbers that are there

run.py compares command lines; the first figure compares estimators on one and the same policy, which no
command line does. What is there is not run again. Results: results/policy_gradient_*.csv.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "figures"
SEEDS = range(101, 111)
COLORS = {
    "REINFORCE, no baseline": "#adb5bd", "REINFORCE, mean": "#e09f3e", "REINFORCE, time": "#d1495b",
    "REINFORCE, value": "#7b5ea7", "A2C, λ 0": "#caf0f8", "A2C, λ 0.5": "#90e0ef", "A2C, λ 0.9": "#00b4d8",
    "A2C, λ 0.95": "#0077b6", "A2C, λ 1": "#03045e", "REINFORCE": "#7b5ea7", "A2C": "#0077b6",
}  # fmt: skip


LAMBDAS = ("0", "0.5", "0.9", "0.95", "1")


def load_script(name: str) -> Any:
    """algos/<name>.py as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def read(name: str) -> list[dict[str, str]]:
    file = RESULTS / f"policy_gradient_{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def append(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"policy_gradient_{name}.csv").open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


# Variance --------------------------------------------------------------------------------------

ESTIMATORS = {
    "REINFORCE, no baseline": ("reinforce", dict(baseline="none")),
    "REINFORCE, mean": ("reinforce", dict(baseline="mean")),
    "REINFORCE, time": ("reinforce", dict(baseline="time")),
    "REINFORCE, value": ("reinforce", dict(baseline="value")),
    **{f"A2C, λ {x}": ("a2c_gae", dict(gae_lambda=float(x))) for x in LAMBDAS},
}
STAGES = {"early": 20_000, "middle": 50_000, "late": 100_000}  # steps of training behind the policy
SAMPLES, BUDGET = 32, 2048  # estimates, and environment steps behind each


def variance() -> None:
    """CartPole: A2C trains a policy and a critic; at three moments all estimators judge the same pair.

    32 estimates of 2,048 steps each. Rollouts are as long as episodes, so that lambda alone decides how
    far the critic is trusted, and lambda 1 must agree with REINFORCE's value baseline. The last column
    compares the mean of the 32 with that of an estimator without bias, REINFORCE's value baseline.
    """
    a2c = load_script("a2c_gae")
    torch.set_num_threads(1)
    done = {(row["seed"], row["stage"], row["estimator"]) for row in read("variance")}
    for seed in SEEDS:
        for stage, steps in STAGES.items():
            if all((str(seed), stage, name) in done for name in ESTIMATORS):
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                argv = ["--seed", str(seed), "--total-timesteps", str(steps), "--no-anneal-lr", "--run-dir", folder]
                args = a2c.parse_args(a2c.Args, a2c.PRESETS, [*argv, "--eval-episodes", "1"])
                saved = a2c.load_checkpoint(str(a2c.train(args)))
            mean_return = float(np.mean(saved["record"]["returns"]))
            rows, means = [], {}
            for name, (script, changes) in ESTIMATORS.items():
                module = load_script(script)
                agent = module.Agent(4, module.make_env("CartPole-v1").action_space, args.hidden)
                agent.load_state_dict(saved["agent"])
                common = dict(
                    gamma=args.gamma, reward_scale=args.reward_scale, variance_samples=SAMPLES, variance_steps=BUDGET
                )
                settings = module.Args(**common, **changes)
                rng, device = np.random.default_rng(seed), torch.device("cpu")
                with keep_mean(module, means, name):
                    if script == "reinforce":
                        noise = module.measure(settings, agent, mean_return, rng, device)
                    else:
                        settings.num_steps = 1_000_000
                        noise = module.measure(
                            settings, agent, mean_return, lambda x: x, args.reward_scale, rng, device
                        )
                row = {"seed": seed, "stage": stage, "mean_return": round(mean_return, 1), "estimator": name}
                rows.append(row | {k: f"{x:.6g}" for k, x in zip(("variance", "snr", "cosine"), noise, strict=True)})
            for row in rows:
                mean, unbiased = means[row["estimator"]], means["REINFORCE, value"]
                row["cosine_of_means"] = f"{torch.cosine_similarity(mean, unbiased, dim=0).item():.6g}"
            append("variance", rows)
            print(seed, stage, f"{mean_return:.0f}", {row["estimator"]: row["variance"] for row in rows}, flush=True)


@contextlib.contextmanager
def keep_mean(module: Any, means: dict[str, torch.Tensor], name: str) -> Any:
    """Notes the mean of the gradients that module.gradient_noise sees."""
    original = module.gradient_noise

    def noting(losses: Any, parameters: Any, share: float) -> Any:
        gradients = []

        def through() -> Any:
            for loss in losses:
                parts = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradients.append(torch.cat([part.flatten() for part in parts]))
                yield loss

        found = original(through(), parameters, share)
        means[name] = torch.stack(gradients).mean(0)
        return found

    module.gradient_noise = noting
    try:
        yield
    finally:
        module.gradient_noise = original


# Curves ----------------------------------------------------------------------------------------

RUNS = {
    ("CartPole-v1", "REINFORCE, no baseline"): "reinforce.py --baseline none",
    ("CartPole-v1", "REINFORCE, mean"): "reinforce.py --baseline mean",
    ("CartPole-v1", "REINFORCE, time"): "reinforce.py --baseline time",
    ("CartPole-v1", "REINFORCE, value"): "reinforce.py --baseline value",
    **{("CartPole-v1", f"A2C, λ {x}"): f"a2c_gae.py --gae-lambda {x}" for x in LAMBDAS},
    ("LunarLander-v3", "REINFORCE"): "reinforce.py",
    ("LunarLander-v3", "A2C"): "a2c_gae.py",
}  # fmt: skip
KEPT = ("step", "seconds", "charts/episodic_return", "charts/episodic_length", "losses/entropy")


def curves(only: str = "") -> None:
    """Each run is a process of the script, as a user starts it; at most 200 rows of its metrics are kept."""
    done = {(row["env"], row["variant"], row["seed"]) for row in read("runs")}
    for seed in SEEDS:
        for (env, variant), flags in RUNS.items():
            if (env, variant, str(seed)) in done or only.lower() not in f"{env} {variant}".lower():
                continue
            script, *rest = flags.split()
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(ROOT / "algos" / script), "--env", env, "--seed", str(seed), *rest]
                subprocess.run([*command, "--run-dir", folder], check=True, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
                run = next(Path(folder).iterdir())
                summary = json.loads((run / "summary.json").read_text())
                with (run / "metrics.csv").open(newline="") as file:
                    metrics = list(csv.DictReader(file))
            last = float(metrics[-1]["charts/episodic_return"])
            stride = -(-len(metrics) // 200)
            append("curves", [{"env": env, "variant": variant, "seed": seed} | {key: row[key] for key in KEPT}
                              for row in metrics[::stride]])  # fmt: skip
            row = {"env": env, "variant": variant, "seed": seed, "command": f"python algos/{flags} --env {env}",
                   "final_return": round(last, 1)}  # fmt: skip
            results = ("eval_return_mean", "eval_return_std", "solved_step", "solved_seconds", "steps", "train_seconds")
            row |= {key: summary[key] for key in results}
            append("runs", [row])
            print(row, flush=True)


# Figures ---------------------------------------------------------------------------------------


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    FIGURES.mkdir(parents=True, exist_ok=True)
    if rows := read("variance"):
        panels = {
            "variance": "variance of the estimate (trace of the covariance)",
            "snr": "signal-to-noise ratio",
            "cosine_of_means": "cosine of its mean with the unbiased one",
        }
        figure, axes = plt.subplots(3, 3, figsize=(11.5, 9), sharey=True, layout="constrained")
        names = list(ESTIMATORS)
        for line, stage in zip(axes, STAGES, strict=True):
            here = [row for row in rows if row["stage"] == stage]
            reached = np.mean([float(row["mean_return"]) for row in here]) if here else 0
            line[0].set_ylabel(f"{stage}: return {reached:.0f}", fontweight="bold")
            for axis, (key, title) in zip(line, panels.items(), strict=True):
                for place, name in enumerate(names):
                    values = np.array([float(row[key]) for row in here if row["estimator"] == name])
                    if len(values):
                        axis.plot(values, np.full(len(values), place), ".", color=COLORS[name], alpha=0.5)
                        axis.plot(np.median(values), place, "o", color=COLORS[name], markeredgecolor="#333333")
                axis.set_yticks(range(len(names)), names)
                axis.grid(alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
                if key != "cosine_of_means":
                    axis.set_xscale("log")
                if stage == "early":
                    axis.set_title(title, fontsize=10.5)
        axes[0, 0].invert_yaxis()
        figure.suptitle(
            "CartPole-v1: nine estimators of one policy's gradient, 2,048 steps each · ten seeds and median"
        )
        figure.savefig(FIGURES / "policy_gradient_variance.png", dpi=110)
        plt.close(figure)
    if rows := read("curves"):
        envs = list(dict.fromkeys(env for env, _ in RUNS))
        figure, axes = plt.subplots(2, len(envs), figsize=(11.5, 7), layout="constrained", squeeze=False)
        for column, env in zip(axes.T, envs, strict=True):
            for variant in (name for where, name in RUNS if where == env):
                here = [row for row in rows if row["env"] == env and row["variant"] == variant]
                for axis, key in zip(column, ("charts/episodic_return", "losses/entropy"), strict=True):
                    runs = [[(float(row["step"]), float(row[key])) for row in here if row["seed"] == seed and row[key]]
                            for seed in sorted({row["seed"] for row in here})]  # fmt: skip
                    if not runs:
                        continue
                    grid = np.linspace(max(run[0][0] for run in runs), min(run[-1][0] for run in runs), 200)
                    values = np.array([np.interp(grid, *zip(*run, strict=True)) for run in runs])
                    axis.plot(grid, values.mean(0), color=COLORS[variant], linewidth=1.8, label=variant)
                    axis.fill_between(grid, values.min(0), values.max(0), color=COLORS[variant], alpha=0.1, linewidth=0)
            column[0].axhline({"CartPole-v1": 475, "LunarLander-v3": 200}[env], color="#444444", linestyle="--", lw=1)
            column[0].set_title(f"{env}: mean return of the last 100 training episodes", fontsize=10.5)
            column[1].set(title="entropy of the policy (nats)", xlabel="environment steps")
            column[1].title.set_fontsize(10.5)
            column[0].legend(frameon=False, fontsize=8, loc="lower right")
            for axis in column:
                axis.grid(alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
                axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        figure.suptitle("REINFORCE and actor-critic: mean over ten seeds, and the range of all of them")
        figure.savefig(FIGURES / "policy_gradient_curves.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["variance"]:
        variance()
    elif sys.argv[1:2] == ["curves"]:
        curves(*sys.argv[2:3])
    elif sys.argv[1:] != ["draw"]:
        raise SystemExit(__doc__)
    draw()
