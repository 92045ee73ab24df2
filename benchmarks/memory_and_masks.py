"""What a memory and what masks are worth: ppo_lstm.py and ppo_masks.py, their controls, and SB3-contrib.

    pip install --no-deps --target contrib stable-baselines3==2.9.2 sb3-contrib==2.9.2
    python benchmarks/memory_and_masks.py --contrib contrib                 three seeds of every line
    python benchmarks/memory_and_masks.py --only cartpole --seeds 10        without SB3-contrib
    python benchmarks/memory_and_masks.py --draw-only                       the table again

Every run is a process of its own on one core, one after another; the lines of a task take turns, seed by seed, so
that a busy minute meets all of them. A run whose result stands in results/memory_and_masks.csv is not run again
unless its command has changed.

RecurrentPPO has the RL Zoo's settings (rl-baselines3-zoo, hyperparams/ppo_lstm.yml; MIT licence). The Zoo has none for
MaskablePPO, which keeps its own but for eight environments at once. What is measured is defined as in peers.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import gymnasium as gym
import numpy as np
from run import HOME, PAGE, ROOT, cpu_name, fold, load_script, replace_between, write_whole

RESULTS = HOME / "results" / "memory_and_masks.csv"
FIELDS = ["task", "line", "command", "seed", "steps", "train_seconds", "solved_step", "solved_seconds", "eval", "cpu"]
MASKED, PLAIN, MEMORY = "algos/ppo_masks.py", "algos/ppo.py", "algos/ppo_lstm.py"
SMALL = "--total-timesteps {} --num-envs 16 --num-steps 64 --num-minibatches 4 --learning-rate 5e-3 --hidden 32"


def flags_of_preset(script: str, env: str) -> str:
    """The preset as flags, for a control that is another script."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in load_script(script).PRESETS[env].items())


# Task: (title, line: command). {} is the seed; "peer" is this file.
TASKS: dict[str, dict[str, str]] = {
    "CartPole-v1 without velocities": {
        "with a GRU": f"{MEMORY} --env CartPole-v1 --memory gru",
        "with an LSTM": f"{MEMORY} --env CartPole-v1 --memory lstm",
        "without memory": f"{MEMORY} --env CartPole-v1 --memory none",
        "RecurrentPPO": "peer --peer recurrent --env CartPole-v1",
    },
    "Pendulum-v1 without velocities": {
        "ppo_lstm.py": f"{MEMORY} --env Pendulum-v1",
        "without memory": f"{MEMORY} --env Pendulum-v1 --memory none",
        "RecurrentPPO": "peer --peer recurrent --env Pendulum-v1",
    },
    "Acrobot-v1 without velocities": {
        "ppo_lstm.py": f"{MEMORY} --env Acrobot-v1",
        "without memory": f"{MEMORY} --env Acrobot-v1 --memory none",
    },
    "LunarLander-v3 without velocities": {
        "ppo_lstm.py": f"{MEMORY} --env LunarLander-v3",
        "without memory": f"{MEMORY} --env LunarLander-v3 --memory none",
    },
    "Trapdoors: 60 of 64 actions end the episode": {
        "ppo_masks.py": f"{MASKED} --env masked_envs:Trapdoors-v0 {SMALL.format(40_000)}",
        "ppo.py, without masks": f"{PLAIN} --env masked_envs:TrapdoorsUnmasked-v0 {SMALL.format(400_000)}",
        "MaskablePPO": "peer --peer maskable --env masked_envs:Trapdoors-v0 --total-timesteps 100000",
    },
    "Taxi-v4": {
        "ppo_masks.py": f"{MASKED} --env Taxi-v4",
        "ppo.py, without masks": f"{PLAIN} --env Taxi-v4 {flags_of_preset(MASKED, 'Taxi-v4')}",
        "MaskablePPO": "peer --peer maskable --env Taxi-v4 --total-timesteps 200000",
    },
    "Locks: MultiDiscrete, the optimum is 24": {
        "ppo_masks.py": f"{MASKED} --env masked_envs:Locks-v0 {SMALL.format(40_000)}",
    },
}

# 1. SB3-contrib ---------------------------------------------------------------------------------


def linear(start: float) -> Any:
    """The Zoo's lin_: from start to zero over the training."""
    return lambda left: left * start


ZOO: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=100_000, n_envs=8, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98,
        ent_coef=0.0, learning_rate=linear(1e-3), clip_range=linear(0.2),
    ),
    "Pendulum-v1": dict(
        total_timesteps=100_000, n_envs=4, n_steps=1024, gae_lambda=0.95, gamma=0.9, n_epochs=10, ent_coef=0.0,
        learning_rate=1e-3, clip_range=0.2, use_sde=True, sde_sample_freq=4,
    ),
}  # fmt: skip


class ActionMasks(gym.Wrapper):
    """Hands MaskablePPO the masks that gymnasium puts into the infos."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**kwargs)
        self.mask = info["action_mask"]
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.mask = info["action_mask"]
        return obs, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        return np.asarray(self.mask, bool)


def peer(argv: list[str]) -> None:
    """One run of SB3-contrib; the summary that our scripts would write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=("maskable", "recurrent"))
    parser.add_argument("--env")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--total-timesteps", type=int)
    parser.add_argument("--run-dir")
    args = parser.parse_args(argv)

    import torch
    from peers import Watch
    from sb3_contrib import MaskablePPO, RecurrentPPO
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    masked = args.peer == "maskable"
    settings = dict(n_envs=8, total_timesteps=0) if masked else dict(ZOO[args.env])
    total, n_envs = settings.pop("total_timesteps"), settings.pop("n_envs")
    total = args.total_timesteps or total

    def make() -> gym.Env:
        env = gym.make(args.env)
        return ActionMasks(env) if masked else load_script(MEMORY).WithoutVelocity(env)

    algorithm, policy = (MaskablePPO, "MlpPolicy") if masked else (RecurrentPPO, "MlpLstmPolicy")
    model = algorithm(policy, make_vec_env(make, n_envs, seed=args.seed), seed=args.seed, device="cpu", **settings)
    threshold = make().spec.reward_threshold
    watch = Watch(total, float("inf") if threshold is None else threshold, float("inf"))
    model.learn(total, callback=watch)
    seconds = time.perf_counter() - watch.started
    eval_env, evaluate = make_vec_env(make, 1, seed=10**9 + args.seed), evaluate_masked if masked else evaluate_policy
    mean, _ = evaluate(model, eval_env, 100, deterministic=True)
    solved_step, solved_seconds = watch.solved or (None, None)
    summary = {"steps": model.num_timesteps, "train_seconds": seconds, "eval_return_mean": float(mean)}
    summary |= {"solved_step": solved_step, "solved_seconds": solved_seconds}
    folder = Path(args.run_dir, "peer")
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


# 2. The runs ------------------------------------------------------------------------------------


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measure(command: str, seed: int, contrib: str) -> dict[str, Any]:
    """One run; its summary."""
    script, *flags = command.split()
    path = [str(ROOT / "tests"), *([os.path.abspath(contrib)] if script == "peer" else [])]
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / script) if script != "peer" else __file__, *flags]
        argv += ["--seed", str(seed), "--run-dir", folder]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        subprocess.run(argv, check=True, env=environment, stdout=subprocess.DEVNULL)
        [summary] = Path(folder).glob("*/summary.json")
        return json.loads(summary.read_text(encoding="utf-8"))


def measure_all(only: str, seeds: range, contrib: str | None) -> None:
    rows: list[dict[str, Any]] = read()
    for task, lines in TASKS.items():
        if only.lower() not in task.lower():
            continue
        for seed in seeds:
            for line, command in lines.items():
                done = [row for row in rows if (row["task"], row["line"], row["seed"]) == (task, line, str(seed))]
                if (command.startswith("peer") and not contrib) or (done and done[0]["command"] == command):
                    continue
                summary = measure(command, seed, contrib or "")
                row = {"task": task, "line": line, "command": command, "seed": str(seed), "cpu": cpu_name()}
                row |= {key: summary.get(key) for key in ("steps", "solved_step")} | {
                    "eval": summary["eval_return_mean"]
                }
                row |= {k: summary.get(k) and round(summary[k], 2) for k in ("train_seconds", "solved_seconds")}
                rows = [other for other in rows if other not in done] + [row]
                write(rows)
                print(*(row[key] for key in FIELDS if key != "command"), sep="  ", flush=True)


# 3. The table -----------------------------------------------------------------------------------


def table(rows: list[dict[str, str]]) -> str:
    header = ["task", "", "seeds", "steps", "threshold reached", "steps to it, median", "seconds to it, median",
              "greedy return at the end, mean", "worst", "training, s"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for task, commands in TASKS.items():
        for line in commands:
            found = [row for row in rows if (row["task"], row["line"]) == (task, line)]
            if not found:
                continue
            scores = [float(row["eval"]) for row in found]
            solved = [row for row in found if row["solved_step"]]
            count = f"{len(solved)} of {len(found)}" if not task.startswith("Pendulum") else "(has none)"
            steps = f"{np.median([int(row['solved_step']) for row in solved]):,.0f}" if solved else "–"
            seconds = f"{np.median([float(row['solved_seconds']) for row in solved]):.1f}" if solved else "–"
            numbers = sorted(int(row["seed"]) for row in found)
            budget = f"{np.median([int(row['steps']) for row in found]):,.0f}"
            train = f"{np.median([float(row['train_seconds']) for row in found]):.0f}"
            cells = [task, line, f"{numbers[0]}–{numbers[-1]}", budget, count, steps, seconds]
            lines.append([*cells, f"{np.mean(scores):.1f}", f"{min(scores):.1f}", train])
    lines = fold(["| " + " | ".join(cells) + " |" for cells in lines], "All tasks")
    return "\n".join([*lines, "", f"One core of {' or '.join(sorted({row['cpu'] for row in rows}))}."])


def publish() -> None:
    section = """## Memory and masks

What is a memory worth where the velocities are hidden, and a mask where most actions are forbidden?

    python benchmarks/memory_and_masks.py --contrib contrib"""
    page = replace_between(PAGE.read_text(encoding="utf-8"), "results:memory_and_masks", table(read()), section)
    write_whole(PAGE, page.encode())


if __name__ == "__main__":
    if "--peer" in sys.argv:
        peer(sys.argv[1:])
        raise SystemExit
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contrib", default=None, help="folder with SB3 and SB3-contrib; without it their lines are left"
    )
    parser.add_argument("--only", default="", help="part of a task's name")
    parser.add_argument("--first-seed", type=int, default=301)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw-only", action="store_true", help="measure nothing; write the table again")
    options = parser.parse_args()
    if not options.draw_only:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        measure_all(options.only, seeds, options.contrib)
    publish()
