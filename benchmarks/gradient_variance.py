"""How noisy is the policy gradient? Ten estimators judge one and the same policy.

    python benchmarks/gradient_variance.py            measures what is not there yet, draws, writes the table
    python benchmarks/gradient_variance.py --env LunarLander-v3 --seeds 3
    python benchmarks/gradient_variance.py --draw-only

A2C trains a policy and a critic with its preset. At three moments each estimator draws 32 independent
gradient estimates of 2,048 environment steps from that policy, with that critic. run.py compares command
lines; here the policy must be the same for all, which no command line does.

GAE's rollouts are as long as episodes here, so that lambda alone decides how far the critic is trusted, and
lambda 1 has to agree with REINFORCE's value baseline. The variance does not see a bias; the cosine between
the mean of an estimator's 32 and the mean of an unbiased estimator's 32 does. The unbiased one is lambda 1,
and another draw of its own shows how far two means of 32 agree at best. Where the time limit cuts an episode,
lambda 1 and the value baseline ask the critic for the rest and the others count it as 0. Results:
results/gradient_variance.csv and gradient_variance_lunarlander.csv. CartPole-v1 takes 30 seconds a seed,
LunarLander-v3 some 10 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import HOME, PAGE, load_script, number, replace_between, write_whole
from studies import SEED

STAGES = {  # steps of training behind the policy
    "CartPole-v1": {"early": 20_000, "middle": 50_000, "late": 100_000},
    "LunarLander-v3": {"early": 50_000, "middle": 200_000, "late": 600_000},
}
SAMPLES, BUDGET = 32, 2048  # estimates, and environment steps behind each
ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "REINFORCE, whole return": ("reinforce", dict(baseline="none", reward_to_go=False)),
    "REINFORCE, no baseline": ("reinforce", dict(baseline="none")),
    "REINFORCE, mean": ("reinforce", dict(baseline="mean")),
    "REINFORCE, time": ("reinforce", dict(baseline="time")),
    "REINFORCE, value": ("reinforce", dict(baseline="value")),
    **{f"A2C, λ = {x:g}": ("a2c_gae", dict(gae_lambda=x, num_steps=10**6)) for x in (1.0, 0.95, 0.9, 0.5, 0.0)},
}
UNBIASED = "A2C, λ = 1"


def name_of(env: str) -> str:
    """Stem of its files, and its mark on the page."""
    return "gradient_variance" + ("" if env == "CartPole-v1" else f"_{env.split('-')[0].lower()}")


def read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# 1. Measuring -----------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_mean(module: Any, means: list[torch.Tensor]) -> Iterator[None]:
    """Notes the mean of the gradients that the script's gradient_noise sees."""
    original = module.gradient_noise

    def noting(losses: Iterable[torch.Tensor], parameters: list[Any], share: float) -> Any:
        losses = list(losses)
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        means.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients]).mean(0))
        return original(losses, parameters, share)

    module.gradient_noise = noting
    try:
        yield
    finally:
        module.gradient_noise = original


def measure(name: str, saved: dict[str, Any], seed: int) -> tuple[tuple[float, float, float], torch.Tensor]:
    """Variance, signal-to-noise ratio and cosine of one estimator, and the mean of its estimates."""
    script, changes = ESTIMATORS[name]
    module, trained = load_script(f"algos/{script}.py"), saved["args"]
    common = {key: trained[key] for key in ("env", "gamma", "reward_scale", "hidden")}
    args = module.Args(**common, variance_samples=SAMPLES, variance_steps=BUDGET, **changes)
    env = module.make_env(args.env)
    agent = module.Agent(env.observation_space.shape[0], env.action_space, args.hidden)
    agent.load_state_dict(saved["agent"])
    mean_length, means = float(np.mean(saved["record"]["lengths"])), []
    with keep_mean(module, means):
        noise = module.measure(args, agent, mean_length, np.random.default_rng(seed), torch.device("cpu"))
    return noise, means[0]


def measure_all(env: str, seeds: int, results: Path) -> None:
    a2c = load_script("algos/a2c_gae.py")
    torch.set_num_threads(1)
    done = {(row["seed"], row["stage"]) for row in read(results)}
    for seed in range(SEED, SEED + seeds):
        for stage, steps in STAGES[env].items():
            if (str(seed), stage) in done:
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                argv = ["--env", env, "--seed", str(seed), "--total-timesteps", str(steps), "--no-anneal-lr"]
                argv += ["--run-dir", folder, "--eval-episodes", "1"]
                args = a2c.parse_args(a2c.Args, a2c.PRESETS, argv)
                saved = a2c.load_checkpoint(str(a2c.train(args)))
            reached = float(np.mean(saved["record"]["returns"]))
            rows, common = [], {"seed": seed, "stage": stage, "policy_return": round(reached, 1)}
            _, reference = measure(UNBIASED, saved, seed + 1000)  # from episodes that no estimator below sees
            for name in ESTIMATORS:
                noise, mean = measure(name, saved, seed)
                agreement = torch.cosine_similarity(mean, reference, dim=0).item()
                found = dict(zip(COLUMNS, (f"{value:.5g}" for value in (*noise, agreement)), strict=True))
                rows.append(common | {"estimator": name} | found)
            with results.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)
            print(f"seed {seed}, {stage}: the policy's return is {reached:.0f}", flush=True)


# 2. Figure and table ----------------------------------------------------------------------------

COLUMNS = {
    "variance": "variance (trace of the covariance)",
    "snr": "signal-to-noise ratio",
    "cosine": "cosine between an estimate and the others' mean",
    "cosine_of_means": "cosine of the mean with an unbiased one",
}


def draw(env: str, rows: list[dict[str, str]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"variance": (1e-6, 10), "snr": (1e-3, 1e3), "cosine_of_means": (-1.05, 1.05)}
    figure, axes = plt.subplots(3, 3, figsize=(12, 9.4), sharey=True, sharex="col", layout="constrained")
    for line, stage in zip(axes, STAGES[env], strict=True):
        here = [row for row in rows if row["stage"] == stage]
        reached = np.median([float(row["policy_return"]) for row in here])
        line[0].set_ylabel(f"{stage}: return {reached:.0f}", fontsize=10.5, fontweight="bold", labelpad=9)
        for axis, (key, limits) in zip(line, shown.items(), strict=True):
            for place, name in enumerate(ESTIMATORS):
                values = np.array([float(row[key]) for row in here if row["estimator"] == name])
                values = values.clip(*limits)  # what lies outside stands at the edge
                color = "#d1495b" if name.startswith("R") else "#2a6f97"
                style = dict(marker="o", linestyle="", color=color, clip_on=False)
                axis.plot(values, np.full(len(values), place), **style, alpha=0.35, markersize=4.5, mew=0)
                axis.plot(np.median(values), place, **style, markersize=8, mec="white", zorder=3)
            axis.set_yticks(range(len(ESTIMATORS)), list(ESTIMATORS))
            axis.set(xscale="linear" if key == "cosine_of_means" else "log", xlim=limits)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if stage == "early":
                axis.set_title(COLUMNS[key], fontsize=10.5)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{env}: ten estimators of one policy's gradient, 2,048 steps each · all seeds and their median")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def table(env: str, rows: list[dict[str, str]]) -> str:
    if not rows:
        return "Not measured yet."
    stages = list(STAGES[env])
    header = ["estimator", *(f"variance, {stage}" for stage in stages), *(f"signal to noise, {s}" for s in stages)]
    header += [f"cosine with an unbiased mean, {stage}" for stage in stages]
    lines = [header, ["---"] * len(header)]
    for name in ESTIMATORS:
        cells = [name]
        for key in ("variance", "snr", "cosine_of_means"):
            for stage in stages:
                values = [float(row[key]) for row in rows if row["stage"] == stage and row["estimator"] == name]
                cells.append(number(float(np.median(values))) if values else "–")
        lines.append(cells)
    seeds = sorted({int(row["seed"]) for row in rows})
    note = f"Medians over seeds {seeds[0]} to {seeds[-1]}; 32 estimates of 2,048 steps each."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{note}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=list(STAGES), default="CartPole-v1")
    parser.add_argument("--seeds", type=int, default=10, help=f"from seed {SEED} on")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing; draw the results that are there")
    options = parser.parse_args()
    stem = name_of(options.env)
    file = HOME / "results" / f"{stem}.csv"
    if not options.draw_only:
        measure_all(options.env, options.seeds, file)
    if found := read(file):
        draw(options.env, found, HOME / "figures" / f"{stem}.png")
    page = PAGE.read_text(encoding="utf-8")
    title = f"## The gradient's noise: {options.env}"
    write_whole(PAGE, replace_between(page, f"results:{stem}", table(options.env, found), title).encode())
