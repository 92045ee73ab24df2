"""Trains Stable-Baselines3 with the RL Zoo's settings and leaves the same run folder as our scripts.

    python benchmarks/peers.py --algo ppo --env CartPole-v1 --seed 301

What is measured is defined as everywhere in this repository: seconds count from the first environment
step to the last update, without imports; the threshold is reached when the last 100 finished training
episodes average at least it; evaluation is 100 greedy episodes on seeds never trained on. Steps, network
sizes, schedules are the Zoo's (its LunarLander-v2 settings serve LunarLander-v3; rl-baselines3-zoo,
hyperparams/*.yml, with DQN's values as of Stable-Baselines3 2.x releases; MIT licence).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise


def linear(start: float) -> Any:
    """The Zoo's lin_: from start to zero over the training."""
    return lambda left: left * start


WIDE, WIDER = dict(net_arch=[256, 256]), dict(net_arch=[400, 300])
TD3_SETTINGS = dict(
    n_envs=1, learning_rate=1e-3, gamma=0.98, buffer_size=200_000, learning_starts=10_000, train_freq=(1, "episode"),
    gradient_steps=-1, noise_std=0.1, policy_kwargs=WIDER,
)  # fmt: skip
MUJOCO = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): dict(
        total_timesteps=100_000, n_envs=8, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98,
        ent_coef=0.0, learning_rate=linear(1e-3), clip_range=linear(0.2),
    ),
    ("ppo", "LunarLander-v3"): dict(
        total_timesteps=1_000_000, n_envs=16, n_steps=1024, batch_size=64, n_epochs=4, gae_lambda=0.98, gamma=0.999,
        ent_coef=0.01,
    ),
    ("a2c", "CartPole-v1"): dict(total_timesteps=500_000, n_envs=8, ent_coef=0.0),
    ("a2c", "LunarLander-v3"): dict(
        total_timesteps=200_000, n_envs=8, n_steps=5, gamma=0.995, learning_rate=linear(8.3e-4), ent_coef=1e-5,
    ),
    ("dqn", "CartPole-v1"): dict(
        total_timesteps=50_000, n_envs=1, learning_rate=2.3e-3, batch_size=64, buffer_size=100_000,
        learning_starts=1000, gamma=0.99, target_update_interval=10, train_freq=256, gradient_steps=128,
        exploration_fraction=0.16, exploration_final_eps=0.04, policy_kwargs=WIDE,
    ),
    ("dqn", "LunarLander-v3"): dict(
        total_timesteps=100_000, n_envs=1, learning_rate=6.3e-4, batch_size=128, buffer_size=50_000,
        learning_starts=0, gamma=0.99, target_update_interval=250, train_freq=4, gradient_steps=-1,
        exploration_fraction=0.12, exploration_final_eps=0.1, policy_kwargs=WIDE,
    ),
    ("sac", "Pendulum-v1"): dict(total_timesteps=20_000, n_envs=1, learning_rate=1e-3),
    ("sac", "LunarLanderContinuous-v3"): dict(
        total_timesteps=500_000, n_envs=1, learning_rate=linear(7.3e-4), tau=0.01, learning_starts=10_000,
        policy_kwargs=WIDER,
    ),
    **{("sac", env): dict(total_timesteps=1_000_000, n_envs=1, learning_starts=10_000) for env in MUJOCO},
    ("td3", "Pendulum-v1"): TD3_SETTINGS | dict(total_timesteps=20_000),
    ("td3", "LunarLanderContinuous-v3"): TD3_SETTINGS | dict(total_timesteps=300_000),
}  # fmt: skip


ALGORITHMS = {"ppo": PPO, "a2c": A2C, "dqn": DQN, "sac": SAC, "td3": TD3}


class Watch(BaseCallback):
    """Notes finished episodes, the moment the threshold is first reached, and a row every 1/200 of the run."""

    def __init__(self, total: int, threshold: float, max_seconds: float):
        super().__init__()
        self.every, self.threshold, self.max_seconds = total // 200, threshold, max_seconds
        self.returns, self.lengths = deque(maxlen=100), deque(maxlen=100)
        self.rows: list[dict[str, Any]] = []
        self.solved: tuple[int, float] | None = None
        self.capped = False

    def _on_training_start(self) -> None:
        self.started = time.perf_counter()

    def _on_step(self) -> bool:
        seconds = time.perf_counter() - self.started
        for info in self.locals["infos"]:
            if "episode" in info:
                self.returns.append(float(info["episode"]["r"]))
                self.lengths.append(int(info["episode"]["l"]))
        if not self.solved and len(self.returns) == 100 and np.mean(self.returns) >= self.threshold:
            self.solved = self.num_timesteps, seconds
        last_step, last_seconds = (self.rows[-1]["step"], self.rows[-1]["seconds"]) if self.rows else (0, 0.0)
        if self.num_timesteps // self.every > last_step // self.every:
            self.rows.append({
                "step": self.num_timesteps, "seconds": round(seconds, 3),
                "charts/SPS": round((self.num_timesteps - last_step) / max(seconds - last_seconds, 1e-9)),
                "charts/episodic_return": float(np.mean(self.returns)) if self.returns else None,
                "charts/episodic_length": float(np.mean(self.lengths)) if self.lengths else None,
            })  # fmt: skip
        self.capped = seconds > self.max_seconds
        return not self.capped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, default="ppo")
    parser.add_argument("--env", choices=sorted({env for _, env in SETTINGS}), default="CartPole-v1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=None, help="the default is the Zoo's")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="stop the training after so long")
    parser.add_argument("--eval-episodes", type=int, default=100)
    parser.add_argument("--run-dir", default="runs")
    args = parser.parse_args()

    torch.set_num_threads(1)
    settings = dict(SETTINGS[args.algo, args.env])
    total, n_envs = settings.pop("total_timesteps"), settings.pop("n_envs")
    total = args.total_timesteps or total
    envs = make_vec_env(args.env, n_envs, seed=args.seed)
    if "noise_std" in settings:
        shape = envs.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(shape), np.full(shape, settings.pop("noise_std")))
    model = ALGORITHMS[args.algo]("MlpPolicy", envs, seed=args.seed, device="cpu", **settings)
    threshold = gym.spec(args.env).reward_threshold
    threshold = float("inf") if threshold is None else threshold
    watch = Watch(total, threshold, args.max_seconds)
    model.learn(total, callback=watch)
    seconds = time.perf_counter() - watch.started

    eval_env = make_vec_env(args.env, 1, seed=1_000_000_000 + args.seed)
    returns, _ = evaluate_policy(model, eval_env, args.eval_episodes, deterministic=True, return_episode_rewards=True)
    folder = Path(args.run_dir) / f"{args.env}__sb3-{args.algo}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    plain = {k: v for k, v in settings.items() if type(v) in (int, float, tuple, dict)}
    config = {
        "script": f"sb3-{args.algo}", "args": vars(args) | plain,
        "device": "cpu", "python": platform.python_version(), "platform": platform.platform(),
        "gymnasium": gym.__version__, "numpy": np.__version__, "torch": torch.__version__,
        "stable-baselines3": stable_baselines3.__version__,
    }  # fmt: skip
    if args.max_seconds == float("inf"):
        config["args"]["max_seconds"] = None
    steps, (solved_step, solved_seconds) = model.num_timesteps, watch.solved or (None, None)
    summary = {
        "script": f"sb3-{args.algo}", "env": args.env, "seed": args.seed, "steps": steps,
        "train_seconds": round(seconds, 3), "sps": round(steps / seconds), "eval_episodes": len(returns),
        "eval_return_mean": float(np.mean(returns)), "eval_return_std": float(np.std(returns)),
        "solved_step": solved_step, "solved_seconds": solved_seconds and round(solved_seconds, 3),
        "capped": watch.capped,
    }  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, watch.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(watch.rows)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"evaluation {np.mean(returns):.1f} ± {np.std(returns):.1f} · {seconds:.1f} s of training · {folder}")


if __name__ == "__main__":
    main()
