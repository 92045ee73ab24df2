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
    **{f"A2C, λ = {x:g}": ("a2c_gae", dict(gae_lambda=x)) for x in (1.0, 0.95, 0.9, 0.5, 0.0)},
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


def gradient_noise(gradients: torch.Tensor, share: float) -> tuple[float, float, float]:
    """How noisy a policy-gradient estimate is: its variance, signal-to-noise ratio and cosine.

    gradients [K, P] are K independent estimates of one gradient G. The variance is the trace of their
    covariance. As averaging m estimates divides it by m, `share`, the environment steps behind an estimate
    divided by the steps of a common budget, brings estimates of any size to that budget. The ratio is |G|^2
    over the variance, where |G|^2 is freed of the noise that is left in the mean of the K (so it can
    come out below 0 when there is nothing but noise). The cosine is the one between an estimate and
    the mean of the others: 1 all point the same way, 0 they share nothing.
    """
    k, mean = len(gradients), gradients.mean(0)
    trace = gradients.var(0).sum()  # E|g - G|^2
    signal = mean.square().sum() - trace / k  # E|mean|^2 = |G|^2 + trace / K
    others = (k * mean - gradients) / (k - 1)  # [K, P]
    cosine = torch.cosine_similarity(gradients, others).mean()
    variance = trace * share
    return variance.item(), (signal / variance).item(), cosine.item()


def advantages_of(args: Any, agent: Any, part: Any) -> np.ndarray:
    """What weighs each action of the rollout, [T, N]: of REINFORCE's baselines or, with a gae_lambda, of A2C."""
    if not hasattr(args, "gae_lambda"):
        returns, baseline = load_script("algos/reinforce.py").returns_and_baseline(args, agent, part)
        return returns - baseline
    with torch.no_grad():
        values = agent.value(torch.from_numpy(part.obs)).numpy()  # [T + 1, N]
    gae = load_script("algos/a2c_gae.py").gae
    rewards = part.rewards * np.float32(args.reward_scale)
    return gae(rewards, values, part.terminated, part.truncated, args.gamma, args.gae_lambda)


def estimate(
    args: Any, agent: Any, mean_length: float, samples: int, budget: int, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """K estimates [K, P] of the policy gradient per step, each from whole episodes of about `budget` steps; and
    the steps behind an estimate as a share of the budget."""
    reinforce = load_script("algos/reinforce.py")
    n = max(2, round(budget / mean_length))
    envs = reinforce.make_envs(args.env, samples * n)
    rollout = reinforce.play(agent, envs, int(rng.integers(2**31)), rng)
    envs.close()
    steps, gradients = rollout.valid.sum() / samples, []
    parameters = [*agent.actor.parameters()] + ([] if agent.discrete else [agent.log_std])
    for group in np.split(np.arange(samples * n), samples):
        part = reinforce.Rollout(*(array[:, group] for array in rollout))
        arrays = (part.obs[:-1], part.actions, advantages_of(args, agent, part))
        obs, actions, advantages = (torch.from_numpy(array[part.valid]) for array in arrays)
        loss = -(agent.logprobs_and_entropy(obs, actions)[0] * advantages).sum() / steps
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(gradients), steps / budget


def measure(name: str, saved: dict[str, Any], seed: int) -> tuple[tuple[float, float, float], torch.Tensor]:
    """Variance, signal-to-noise ratio and cosine of one estimator, and the mean of its estimates."""
    script, changes = ESTIMATORS[name]
    module, trained = load_script(f"algos/{script}.py"), saved["args"]
    common = {key: trained[key] for key in ("env", "gamma", "reward_scale", "hidden")}
    args = module.Args(**common, **changes)
    env = module.make_env(args.env)
    agent = module.Agent(env.observation_space.shape[0], env.action_space, args.hidden)
    agent.load_state_dict(saved["parts"]["agent"])
    mean_length = float(np.mean(saved["last100"]["length"]))
    gradients, share = estimate(args, agent, mean_length, SAMPLES, BUDGET, np.random.default_rng(seed))
    return gradient_noise(gradients, share), gradients.mean(0)


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
                saved = a2c.load_checkpoint(a2c.train(a2c.parse_args(argv)))
            reached = float(np.mean(saved["last100"]["return"]))
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
