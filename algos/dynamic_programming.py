# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[toy-text]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
# ///
"""Dynamic programming: value iteration, policy iteration and backward induction.

When the rules of a world are known (where each action leads, how likely, for what reward), nothing
has to be learnt: the best behaviour can be computed. Its value in each state solves the equation

    V(s) = max_a  R(s, a) + gamma * sum_s' P(s, a, s') V(s')                           (Bellman)

Value iteration starts from V = 0 and puts V into the right-hand side again and again; every sweep
brings it closer by a factor of gamma. Policy iteration guesses a policy, solves a linear system for
its exact value, makes the policy greedy for that value, and is done after a handful of such steps.
Backward induction treats a time limit exactly: the best action then depends on the steps left.
Everything else in this repository approximates what this file computes.

Books    Bellman 1957, Dynamic Programming                     (value iteration, backward induction)
         Howard 1960, Dynamic Programming and Markov Processes                    (policy iteration)
         Sutton & Barto 2018, Reinforcement Learning, chapters 3 and 4, incompleteideas.net/book

Run      python algos/dynamic_programming.py
         python algos/dynamic_programming.py --env FrozenLake-v1
         python algos/dynamic_programming.py --env FrozenLake-v1 --map-size 12 --seed 3
         python algos/dynamic_programming.py --env FrozenLake8x8-v1 --gamma 0.995
         python algos/dynamic_programming.py --env Taxi-v4                 (needs gymnasium 1.3)
         python algos/dynamic_programming.py --eval runs/<folder> --eval-episodes 10000

Expect   (exact, whatever the seed; solved in less than a second)
         GridWorld          V(s0)   0.9020   the greedy policy's return   0.95   the best possible   0.95
         FrozenLake-v1      V(s0)   0.5420   its success in 100 steps   0.7402   the best possible 0.7442
         FrozenLake8x8-v1   V(s0)   0.4146   its success in 200 steps   0.8630   the best possible 0.9132
           with gamma .995  V(s0)   0.6051                              0.8936                     0.9132
         CliffWalking-v1    V(s0) -13.0000   its return                -13.00    the best possible -13.00
         Taxi-v4            V(s0)   6.3275   its return in 200 steps     7.93    the best possible   7.93

Results  summary.json: start_value is V(s0). success_probability and expected_return (undiscounted)
         belong to the greedy policy within the time limit, best_success_probability and
         best_expected_return to the best policy that may look at the clock. All four are exact.
         Success means to end where ending pays best: the goal of a grid, the right hotel in Taxi.
         values.png shows V with the greedy policy's arrows.

Deviations from the books
 1. Policy iteration keeps an action unless another is better by more than --tolerance. With the plain
    argmax, two equally good actions can alternate for ever by rounding.
 2. Discounting and the time limit are two different problems. V and the policy are those of the
    discounted problem without a limit, as everywhere; how good they are within the limit is computed
    afterwards, beside the best that is possible there.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from tqdm import tqdm

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "GridWorld"
    """GridWorld (built in, 4 x 4) or a gymnasium id, for example FrozenLake-v1, CliffWalking-v1, Taxi-v4"""
    seed: int = 1
    """seed of the simulated episodes and of a random map; the solution itself is not random; >= 0"""
    total_timesteps: int = 100_000
    """most sweeps to make; the two methods stop by themselves, usually after far fewer"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """accepted as everywhere; the tables are small, and NumPy solves them on the CPU"""
    track: bool = False
    """send the metrics to Weights & Biases too (WANDB_MODE=offline keeps them on this machine)"""
    wandb_project: str = "plainrl"
    """the project's name on Weights & Biases"""
    wandb_entity: str | None = None
    """the user or team on Weights & Biases; None is your default one"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""
    capture_video: bool = False
    """film the first three evaluation episodes into the run folder"""
    eval: str | None = None
    """evaluate this saved run (a run folder or its model.pt) and exit"""
    resume: str | None = None
    """go on with this interrupted run (a run folder or its model.pt)"""
    eval_episodes: int = 1_000
    """episodes of the greedy policy to simulate, as a check on the exact numbers; >= 1"""

    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]; 1 only where every policy worth having ends"""
    tolerance: float = 1e-12
    """a method has converged when no value changes by more than this; > 0"""
    is_slippery: bool = True
    """FrozenLake: slip to either side with probability 2/3; --no-is-slippery goes where you want"""
    map_size: int | None = None
    """FrozenLake: rows and columns of a random map drawn by the seed; None is the standard map"""
    max_episode_steps: int | None = None
    """time limit of an episode; None is the environment's own, or 1,000 where it has none"""


PRESETS: dict[str, dict[str, Any]] = {
    "CliffWalking-v1": dict(gamma=1.0),  # a step costs 1: without discounting V is minus the steps to go
}


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "eval_episodes", "tolerance"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.seed < 0:
        fail(f"--seed must not be negative, but is {args.seed}")
    if not 0 <= args.gamma <= 1:
        fail(f"--gamma must lie in [0, 1], not {args.gamma}")
    if args.map_size is not None and not (args.map_size >= 2 and args.env.startswith("FrozenLake")):
        fail("--map-size needs a FrozenLake environment and must be at least 2")
    if args.max_episode_steps is not None and args.max_episode_steps < 1:
        fail(f"--max-episode-steps must be positive, not {args.max_episode_steps}")
    if args.capture_video and args.env == "GridWorld":
        fail("GridWorld has no pictures to film; leave out --capture-video")


# 2. Environment ---------------------------------------------------------------------------------


def make_env(args: Args, **kwargs: Any) -> gym.Env:
    """The environment with its time limit; ends the program with one line if there is none."""
    if args.env.startswith("FrozenLake"):
        kwargs["is_slippery"] = args.is_slippery
        if args.map_size is not None:
            kwargs["desc"] = generate_random_map(args.map_size, seed=args.seed)
    try:
        limit = args.max_episode_steps or gym.spec(args.env).max_episode_steps or 1_000
        return gym.make(args.env, max_episode_steps=limit, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make the environment {args.env!r}: {error}")


# 3. Model ---------------------------------------------------------------------------------------


@dataclass
class MDP:
    """A Markov decision process as arrays, for S states and A actions."""

    P: np.ndarray  # [S, A, S] probability of each next state; zero in the rows of terminal states
    R: np.ndarray  # [S, A] expected reward; zero in terminal states
    terminal: np.ndarray  # [S] bool, entering such a state ends the episode
    goal: np.ndarray  # [S] bool, the terminal states that pay best
    start: np.ndarray  # [S] probability of being the first state
    limit: int  # steps after which an episode is cut
    shape: tuple[int, int] | None = None  # rows and columns, where the states are the cells of a map
    arrows: str = ""  # one per action, on a map


def grid_world(limit: int, size: int = 4) -> MDP:
    """A walk from the top left to the bottom right: 1 for arriving, -0.01 for any other step."""
    S, A, goal = size * size, 4, size * size - 1
    P, R = np.zeros((S, A, S)), np.full((S, A), -0.01)
    for s in range(S):
        row, column = divmod(s, size)
        for a, (down, right) in enumerate([(0, -1), (1, 0), (0, 1), (-1, 0)]):
            next_row = min(max(row + down, 0), size - 1)  # a wall: you stay where you are
            next_column = min(max(column + right, 0), size - 1)
            next_s = next_row * size + next_column
            P[s, a, next_s] = 1
            if next_s == goal:
                R[s, a] = 1
    terminal = np.arange(S) == goal
    P[terminal] = R[terminal] = 0
    start = np.eye(S)[0]
    return MDP(P, R, terminal, terminal, start, limit, (size, size), "←↓→↑")


def read_mdp(env: gym.Env, limit: int) -> MDP | None:
    """The arrays of an environment that shows its rules, as those of gymnasium's toy_text do, or None.

    There, P[s][a] is a list of (probability, next state, reward, terminated).
    """
    world = env.unwrapped
    if not (hasattr(world, "P") and hasattr(world, "initial_state_distrib")):
        return None
    S, A = int(env.observation_space.n), int(env.action_space.n)
    if S * A * S > 1e9:
        fail(f"{S:,} states are too many for a table of all transitions ({8e-9 * S * A * S:.0f} GB)")
    P, R = np.zeros((S, A, S)), np.zeros((S, A))
    last_reward = np.full(S, -np.inf)  # the best reward for ending in a state
    for s in range(S):
        for a in range(A):
            for probability, next_s, reward, terminated in world.P[s][a]:
                P[s, a, next_s] += probability
                R[s, a] += probability * reward
                if terminated:
                    last_reward[next_s] = max(last_reward[next_s], reward)
    terminal = last_reward > -np.inf
    P[terminal] = R[terminal] = 0
    goal = terminal & (last_reward == last_reward.max())
    shape, arrows = None, ""
    if type(world).__name__ == "FrozenLakeEnv":
        shape, arrows = world.desc.shape, "←↓→↑"
    elif type(world).__name__ == "CliffWalkingEnv":
        shape, arrows = world.shape, "↑→↓←"
    return MDP(P, R, terminal, goal, world.initial_state_distrib, limit, shape, arrows)


def make_mdp(args: Args) -> MDP:
    """The decision process that --env names."""
    if args.env == "GridWorld":
        return grid_world(args.max_episode_steps or 100)
    env = make_env(args)
    mdp = read_mdp(env, env.spec.max_episode_steps)
    if mdp is None:
        fail(f"{args.env} does not show its transition table (env.unwrapped.P), which dynamic programming needs; "
             "try FrozenLake-v1, CliffWalking-v1 or Taxi-v4, or learn from samples with q_learning.py")  # fmt: skip
    return mdp


# 4. The mathematics -----------------------------------------------------------------------------


def action_values(P: np.ndarray, R: np.ndarray, gamma: float, values: np.ndarray) -> np.ndarray:
    """Q(s, a) = R(s, a) + gamma * sum_s' P(s, a, s') V(s'), [S, A]; its maximum over a is Bellman's backup."""
    return R + gamma * P @ values


def under_policy(P: np.ndarray, R: np.ndarray, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P_pi [S, S] and R_pi [S]: the world as it moves by itself when policy [S, A] picks the actions."""
    return np.einsum("sa,sat->st", policy, P), (policy * R).sum(1)


def evaluate_policy(P: np.ndarray, R: np.ndarray, gamma: float, policy: np.ndarray) -> np.ndarray:
    """The exact value of a policy, [S]: the solution V of (I - gamma * P_pi) V = R_pi."""
    P_pi, R_pi = under_policy(P, R, policy)
    return np.linalg.solve(np.eye(len(R_pi)) - gamma * P_pi, R_pi)


def improve_policy(q: np.ndarray, policy: np.ndarray, tolerance: float) -> np.ndarray:
    """The policy [S, A] with a best action in every state where that beats what the policy does now."""
    better = q.max(1) > (policy * q).sum(1) + tolerance  # [S]
    return np.where(better[:, None], np.eye(q.shape[1])[q.argmax(1)], policy)


def greedy(q: np.ndarray) -> np.ndarray:
    """The first best action in every state, [S, A] -> [S]; actions within 1e-9 count as equally good."""
    return (q > q.max(1, keepdims=True) - 1e-9).argmax(1)


def expected_return(P: np.ndarray, R: np.ndarray, policy: np.ndarray, horizon: int) -> np.ndarray:
    """What policy [S, A] earns on average in its next `horizon` steps, undiscounted and exact, [S]."""
    P_pi, R_pi = under_policy(P, R, policy)
    values = np.zeros(len(R_pi))
    for _ in range(horizon):
        values = R_pi + P_pi @ values
    return values


def backward_induction(P: np.ndarray, R: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The most that can be earned in `horizon` steps, [S], and the actions that earn it, [horizon, S].

    Row t holds the actions at time t. With one step left only the next reward counts; with n steps
    left, the next reward and the most that can be earned in n - 1 steps.
    """
    values, actions = np.zeros(len(P)), np.zeros((horizon, len(P)), int)
    for t in reversed(range(horizon)):
        q = action_values(P, R, 1.0, values)
        values, actions[t] = q.max(1), greedy(q)
    return values, actions


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/log10_value_iteration_residual", "charts/log10_policy_iteration_residual",
          "charts/start_value")  # fmt: skip


def train(args: Args) -> Path:
    """Solves the decision process that args name and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    seed_everything(args.seed)

    mdp = make_mdp(args)
    P, R, gamma = mdp.P, mdp.R, args.gamma
    values = np.zeros(R.shape[0])  # value iteration starts from nothing,
    policy = np.full(R.shape, 1 / R.shape[1])  # policy iteration from a policy that picks at random
    policy_values = np.zeros(R.shape[0])
    progress = {"value_iteration_sweeps": 0, "policy_iteration_sweeps": 0, "policy_stable": False,
                "residual": math.inf, "contraction": 0.0}  # fmt: skip

    def state() -> dict[str, Any]:
        tables = {"values": values, "policy": policy, "policy_values": policy_values}
        return {"progress": progress, **{name: torch.tensor(table) for name, table in tables.items()}}

    if saved:
        if saved["policy"].shape != R.shape:
            fail("the saved tables do not fit these flags; use the environment and map they were made for")
        values, policy, policy_values = (saved[name].numpy() for name in ("values", "policy", "policy_values"))
        progress = saved["progress"]

    with RunRecord(args, args.env, args.total_timesteps, device, state, CURVES, saved) as run:
        for sweep in range(run.step + 1, args.total_timesteps + 1):
            if progress["residual"] <= args.tolerance and progress["policy_stable"]:
                break
            residual = policy_residual = contraction = None

            # Value iteration: one Bellman backup, V <- max_a Q, of all states.
            if progress["residual"] > args.tolerance:
                new_values = action_values(P, R, gamma, values).max(1)
                residual = float(np.abs(new_values - values).max())
                values = new_values
                if sweep > 1 and residual > 1e-9:  # below that, rounding blurs the quotient
                    contraction = residual / progress["residual"]
                    progress["contraction"] = max(progress["contraction"], contraction)
                progress |= {"residual": residual, "value_iteration_sweeps": sweep}

            # Policy iteration: the exact value of the policy, then the greedy policy for that value.
            if not progress["policy_stable"]:
                try:
                    policy_values = evaluate_policy(P, R, gamma, policy)
                except np.linalg.LinAlgError:
                    fail("without discounting, a policy that never ends has no value; use a --gamma below 1")
                q = action_values(P, R, gamma, policy_values)
                policy_residual = float(np.abs(q.max(1) - policy_values).max())
                new_policy = improve_policy(q, policy, args.tolerance)
                progress |= {"policy_stable": bool((new_policy == policy).all()), "policy_iteration_sweeps": sweep}
                policy = new_policy

            run.report(sweep, {
                "charts/start_value": float(mdp.start @ values), "charts/contraction": contraction,
                "losses/value_iteration_residual": residual, "losses/policy_iteration_residual": policy_residual,
                "charts/log10_value_iteration_residual": math.log10(residual) if residual else None,
                "charts/log10_policy_iteration_residual": math.log10(policy_residual) if policy_residual else None,
            })  # fmt: skip

        q = action_values(P, R, gamma, values)
        actions, difference = greedy(q), float(np.abs(values - policy_values).max())
        run.bar.write(describe(mdp, q))
        run.bar.write("sweeps: value iteration {value_iteration_sweeps}, policy iteration {policy_iteration_sweeps}"
                      .format(**progress))  # fmt: skip
        if progress["residual"] > args.tolerance or not progress["policy_stable"]:
            run.bar.write(f"not converged to {args.tolerance}; raise --total-timesteps")
        draw_values(mdp, q, args.env, run.folder / "values.png")
        run.finish(lambda: evaluate(args, mdp, actions, run.video_folder), start_value=float(mdp.start @ values),
                   **exact_scores(mdp, actions), difference=difference, **progress)  # fmt: skip
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------


def exact_scores(mdp: MDP, actions: np.ndarray) -> dict[str, float]:
    """How the actions [S] fare within the time limit, and how the best policy fares there."""
    policy = np.eye(mdp.R.shape[1])[actions]  # [S, A]
    scores = {}
    for name, reward in (("success_probability", mdp.P @ mdp.goal), ("expected_return", mdp.R)):
        scores[name] = float(mdp.start @ expected_return(mdp.P, reward, policy, mdp.limit))
        scores[f"best_{name}"] = float(mdp.start @ backward_induction(mdp.P, reward, mdp.limit)[0])
    return scores


EVAL_SEED = 1_000_000_000  # as in the other scripts, far from their training seeds


def evaluate(args: Args, mdp: MDP, actions: np.ndarray, video_folder: Path | None = None) -> np.ndarray:
    """Undiscounted returns of simulated episodes, [episodes]: the world itself checks our arrays."""
    returns = np.zeros(args.eval_episodes)
    if args.env == "GridWorld":  # this world is nothing but arrays: play all episodes at once
        rng = np.random.default_rng(EVAL_SEED + args.seed)
        obs = rng.choice(len(mdp.start), size=len(returns), p=mdp.start)
        for _ in range(mdp.limit):
            returns += mdp.R[obs, actions[obs]]
            next_obs = (mdp.P[obs, actions[obs]].cumsum(1) > rng.random((len(obs), 1))).argmax(1)
            obs = np.where(mdp.terminal[obs], obs, next_obs)
        return returns
    env = make_env(args, render_mode="rgb_array") if video_folder else make_env(args)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    policy = actions.tolist()
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=EVAL_SEED + args.seed if episode == 0 else None)
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy[obs])
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def evaluate_saved(args: Args) -> None:
    """--eval: simulates the saved solution and prints its score beside the exact one."""
    validate(args)
    saved = load_checkpoint(args.eval)
    mdp = make_mdp(args)
    if saved["policy"].shape != mdp.R.shape:
        fail("the saved tables do not fit these flags; use the environment and map they were made for")
    actions = greedy(action_values(mdp.P, mdp.R, args.gamma, saved["values"].numpy()))
    folder = checkpoint_path(args.eval).parent
    returns = evaluate(args, mdp, actions, folder / "videos" if args.capture_video else None)
    scores = [f"{name} {score:.4g}" for name, score in exact_scores(mdp, actions).items()]
    played = f"{args.env}: {len(returns)} greedy episodes, return {returns.mean():.4g} ± {returns.std():.2g}"
    print(" · ".join([played, *scores, str(folder)]))


def visitable(mdp: MDP) -> np.ndarray:
    """The states that an episode can come to, [S] bool."""
    reached, moves = mdp.start > 0, mdp.P.sum(1) > 0  # [S], [S, S]
    while (more := reached | reached @ moves).sum() > reached.sum():
        reached = more
    return reached


def describe(mdp: MDP, q: np.ndarray) -> str:
    """V and the greedy policy as text: cell by cell on a map, elsewhere only the range of V."""
    values, inside = q.max(1), visitable(mdp)
    if mdp.shape is None:
        return f"{inside.sum()} states, V from {values[inside].min():.4f} to {values[inside].max():.4f}"
    cells = [f"{value:8.4f} {mdp.arrows[action]}" for value, action in zip(values, greedy(q), strict=True)]
    for s in np.flatnonzero(mdp.terminal | ~inside):
        cells[s] = f"{'goal' if mdp.goal[s] else '·':>8}  "
    columns = mdp.shape[1]
    return "\n".join(" ".join(cells[first : first + columns]) for first in range(0, len(cells), columns))


def draw_values(mdp: MDP, q: np.ndarray, name: str, file: Path) -> None:
    """A heat map: V with the greedy policy's arrows on a map, elsewhere Q as states × actions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = np.where((visitable(mdp) & ~mdp.terminal)[:, None], q, np.nan)  # [S, A]; the rest stays grey
    if mdp.shape is None:
        figure, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
        picture = axis.imshow(shown.T, aspect="auto", interpolation="nearest")
        axis.set(title=f"{name} · Q(s, a)", xlabel="state", ylabel="action")
    else:
        rows, columns = mdp.shape
        values = shown.max(1).reshape(mdp.shape)
        figure, axis = plt.subplots(figsize=(0.9 * columns + 1.6, 0.9 * rows + 0.6), layout="constrained")
        picture = axis.imshow(values)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for s, action in enumerate(greedy(q)):
            row, column = divmod(s, columns)
            if mdp.goal[s]:
                axis.text(column, row, "goal", ha="center", va="center")
            elif not np.isnan(values[row, column]):
                color = "black" if values[row, column] > middle else "white"  # legible on the colour below
                text = f"{mdp.arrows[action]}\n{values[row, column]:.3g}"
                axis.text(column, row, text, ha="center", va="center", color=color)
        axis.set(title=f"{name} · V and the greedy policy", xticks=[], yticks=[])
    axis.set_facecolor("0.85")
    figure.colorbar(picture)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# 7. Run record ----------------------------------------------------------------------------------
# Command line, seeds, checkpoints and the run folder. The same text in every script: a reader who
# has read it once may skip it.


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line; status 2 stands for wrong usage."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def parse_args(cls: type, presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> Any:
    """Settings from the command line: flag > saved run (--eval, --resume) or preset > default."""

    def parse(default: Any) -> Any:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                return tyro.cli(cls, args=argv, default=default, description=(__doc__ or "").split("\n")[0])
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            box = re.sub(r"[│─╭╮╰╯]|-{5,}", " ", errors.getvalue())  # tyro's message stands in a box,
            message = box.partition("\n")[2].strip()  # under a title
            fail(re.split(r"\n\s*\n", message)[0].rstrip(" .") + "; --help lists every flag")  # and above a rule

    args = parse(cls())
    if path := args.eval or args.resume:
        try:
            return parse(cls(**load_checkpoint(path)["args"]))
        except TypeError as error:
            fail(f"{path} was saved with other settings than this version of the script has: {error}")
    name = getattr(args, "env", None)
    if name not in presets:
        return args
    print(f"preset for {name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in presets[name].items()))
    return parse(dataclasses.replace(cls(), **presets[name]))


def pick_device(name: str, auto: str) -> torch.device:
    """The torch device called name, or the one that suits this script for "auto"."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = auto if name == "auto" else name
    if not available[name]:
        fail(f"--device {name} is not available on this machine; use --device cpu")
    if name == "cpu":
        torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    return torch.device(name)


def seed_everything(seed: int) -> np.random.Generator:
    """Seeds Python and torch once, and returns the NumPy generator that the script draws from."""
    random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def checkpoint_path(path: str) -> Path:
    """model.pt of a run folder, or the file itself."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path: str) -> dict[str, Any]:
    """A dictionary of tensors and plain values; loading it runs no code."""
    file = checkpoint_path(path)
    if not file.is_file():
        fail(f"there is no saved model at {file}; give a run folder or its model.pt")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        script = saved["script"]
    except Exception as error:  # whatever a damaged file makes the loader raise
        fail(f"{file} is not a readable checkpoint: {(str(error) or repr(error)).splitlines()[0]}")
    if script != Path(__file__).stem:
        fail(f"{file} was saved by {script}.py, not by {Path(__file__).name}")
    return saved


def restore(saved: dict[str, Any], **parts: Any) -> None:
    """restore(saved, agent=agent) is agent.load_state_dict(saved["agent"]), or one line if it does not fit."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError):
            fail(f"the saved {name} does not fit these flags; use the environment and sizes it was trained with")


class RunRecord:
    """The run folder of one training, a context manager around its loop.

    config.json    every setting, versions, device
    metrics.csv    a row per report; charts/episodic_* are means over the last 100 finished episodes
    model.pt       state() and what resuming needs; at the first report, every 20 s, at the end, on Ctrl-C
    curves.png     the metrics named in curves
    summary.json   the result
    """

    def __init__(
        self, args: Any, name: str, total: int, device: torch.device, state: Callable[[], dict[str, Any]],
        curves: tuple[str, ...], saved: dict[str, Any] | None = None, threshold: float | None = None,
    ):  # fmt: skip
        self.args, self.name, self.total, self.state, self.curves = args, name, total, state, curves
        self.threshold, self.columns = threshold, []
        self.script = Path(__file__).stem
        record = saved["record"] if saved else {"step": 0, "seconds": 0.0, "solved": None, "returns": [], "lengths": []}
        self.step, self.seconds, self.solved = record["step"], record["seconds"], record["solved"]
        self.returns, self.lengths = deque(record["returns"], 100), deque(record["lengths"], 100)
        if args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs the package wandb: pip install wandb")
        try:
            self.folder = checkpoint_path(args.resume).parent if saved else self._new_folder()
            libraries = {"torch", "numpy", "gymnasium", "transformers", "trl"} & set(sys.modules)
            versions = {name: sys.modules[name].__version__ for name in sorted(libraries)}
            config = {"script": self.script, "args": dataclasses.asdict(args), "device": str(device),
                      "python": platform.python_version(), "platform": platform.platform(), **versions}  # fmt: skip
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if saved:
                self._drop_rows_after(self.step)
            self.csv = (self.folder / "metrics.csv").open("a", newline="")
        except OSError as error:
            fail(f"cannot write the run folder: {error}")
        self.video_folder = self.folder / "videos" if getattr(args, "capture_video", False) else None
        self.wandb = None
        if args.track:
            try:
                self.wandb = wandb.init(project=args.wandb_project, entity=args.wandb_entity, name=self.folder.name,
                                        config=dataclasses.asdict(args), dir=str(self.folder))  # fmt: skip
            except wandb.Error as error:
                fail(f"Weights & Biases: {error} WANDB_MODE=offline needs no account. Nothing was trained")

    def _new_folder(self) -> Path:
        stem = f"{self.name.replace('/', '-')}__{self.script}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                folder = Path(self.args.run_dir) / (stem + suffix)
                folder.mkdir(parents=True)
                return folder
        raise OSError(f"{stem} is taken")

    def _drop_rows_after(self, step: int) -> None:
        """Cuts metrics.csv back to the checkpoint that is resumed."""
        rows = (self.folder / "metrics.csv").read_text().splitlines(keepends=True)
        kept = [row for row in rows[1:] if row.endswith("\n") and int(row.split(",")[0]) <= step]
        (self.folder / "metrics.csv.tmp").write_text("".join(rows[:1] + kept))
        os.replace(self.folder / "metrics.csv.tmp", self.folder / "metrics.csv")

    def __enter__(self) -> RunRecord:
        self.started = self.reported = time.perf_counter()
        self.started -= self.seconds
        self.saved = -math.inf
        self.bar = tqdm(total=self.total, initial=self.step, unit=" steps", unit_scale=True, file=sys.stdout,
                        disable=not sys.stdout.isatty(), dynamic_ncols=True)  # fmt: skip
        return self

    def episode(self, step: int, episodic_return: float, length: int) -> None:
        """Notes a finished training episode, and the moment the threshold is first reached."""
        self.returns.append(float(episodic_return))
        self.lengths.append(int(length))
        if self.threshold is None or self.solved or len(self.returns) < 100:
            return
        if sum(self.returns) / 100 >= self.threshold:
            self.solved = [step, time.perf_counter() - self.started]

    def report(self, step: int, metrics: dict[str, float | None]) -> None:
        """Writes one row of metrics; None stands for "nothing yet". Ends the run on a loss that is not finite."""
        for key, value in metrics.items():
            if key.startswith("losses/") and value is not None and not math.isfinite(value):
                self._stop(f"{key} is {value} at step {step}")
        now = time.perf_counter()
        self.seconds, sps = now - self.started, (step - self.step) / (now - self.reported)
        row: dict[str, Any] = {"step": step, "seconds": round(self.seconds, 3), "charts/SPS": round(sps)}
        if "charts/episodic_return" in self.curves:  # a script without episodes has no such columns
            row["charts/episodic_return"] = sum(self.returns) / len(self.returns) if self.returns else None
            row["charts/episodic_length"] = sum(self.lengths) / len(self.lengths) if self.lengths else None
        row |= metrics
        self.columns = self.columns or list(row)
        assert list(row) == self.columns, "every report has the same metrics; None where there is nothing yet"
        writer = csv.writer(self.csv, lineterminator="\n")
        if self.csv.tell() == 0:
            writer.writerow(self.columns)
        writer.writerow(row.values())
        self.csv.flush()
        first = row.get(self.curves[0])  # the metric that matters most
        shown = "" if first is None else f"{self.curves[0].split('_')[-1].split('/')[-1]} {first:.4g}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.step)
        if self.bar.disable and step * 10 // self.total > self.step * 10 // self.total:
            left = self.seconds / step * (self.total - step)
            progress = f"step {step:,} of {self.total:,}"
            print(f"{progress}  {shown}  {sps:,.0f} steps/s  {max(left, 0):.0f} s left", flush=True)
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        self.step, self.reported = step, now
        if now - self.saved > 20:
            self.save()

    def _stop(self, reason: str) -> NoReturn:
        file = self.folder / "model.pt"
        fail(f"{reason}; " + (f"the last good checkpoint is {file}" if file.exists() else "nothing was saved yet"), 1)

    def save(self) -> None:
        """Writes model.pt whole or not at all, and never over a good one with weights that are not finite."""
        state = self.state()
        for name, part in (state | state.get("networks", {})).items():
            for tensor in part.values() if isinstance(part, dict) else ():
                if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                    self._stop(f"the {name} is not finite at step {self.step}")
        record = {"step": self.step, "seconds": self.seconds, "solved": self.solved,
                  "returns": list(self.returns), "lengths": list(self.lengths)}  # fmt: skip
        content = {"script": self.script, "args": dataclasses.asdict(self.args), "record": record, **state}
        torch.save(content, self.folder / "model.pt.tmp")
        os.replace(self.folder / "model.pt.tmp", self.folder / "model.pt")
        self.saved = time.perf_counter()

    def finish(self, evaluate: Callable[[], np.ndarray] | None, **results: Any) -> None:
        """Saves the model, evaluates it, and writes summary.json, curves.png and the last line."""
        self.save()
        self.bar.close()
        self.draw()
        summary: dict[str, Any] = {"script": self.script, "env": self.name, "seed": self.args.seed, "steps": self.step}
        summary |= {"train_seconds": round(self.seconds, 3), "sps": round(self.step / max(self.seconds, 1e-9))}
        headline = []
        if evaluate is not None:
            scores = evaluate()
            summary |= {"eval_episodes": len(scores), "eval_return_mean": float(scores.mean()),
                        "eval_return_std": float(scores.std())}  # fmt: skip
            headline.append(f"{len(scores)} evaluation episodes: return {scores.mean():.1f} ± {scores.std():.1f}")
        if self.threshold is not None:
            solved_step, solved_seconds = self.solved or (None, None)
            summary |= {"solved_step": solved_step, "solved_seconds": solved_seconds and round(solved_seconds, 3)}
            headline.append(f"threshold {self.threshold:g} reached after {solved_seconds:.2f} s" if self.solved
                            else f"threshold {self.threshold:g} not reached")  # fmt: skip
        summary |= results
        headline += [f"{key} {value:.4g}" for key, value in results.items() if isinstance(value, float)]
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if self.wandb:
            self.wandb.summary.update(summary)
        print(" · ".join([*headline, f"{self.seconds:.1f} s of training", str(self.folder)]))

    def draw(self) -> None:
        """curves.png: the metrics named in curves, against steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        with open(self.folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = min(3, len(self.curves))
        height = math.ceil(len(self.curves) / columns)
        size = (4.2 * columns, 2.9 * height)
        figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, key in zip(axes.flat, self.curves, strict=False):
            points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), color="#2a6f97", linewidth=1.6)
            if key == "charts/episodic_return" and self.threshold is not None:
                axis.axhline(self.threshold, color="#c1121f", linewidth=1, linestyle="--", label="solved")
                axis.legend(frameon=False, loc="lower right")
            axis.set_title(key.split("/")[-1].replace("_", " "), fontsize=11)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        for axis in axes.flat[len(self.curves) :]:
            axis.set_visible(False)
        figure.supxlabel("steps", fontsize=11)
        figure.suptitle(f"{self.name} · {self.script} · seed {self.args.seed}", fontsize=12)
        figure.savefig(self.folder / "curves.png", dpi=120)
        plt.close(figure)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt:
            self.save()
        self.csv.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        if kind is KeyboardInterrupt:
            fail(f"interrupted at step {self.step}; go on with --resume {self.folder}", 130)


# 8. Command line --------------------------------------------------------------------------------

if __name__ == "__main__":
    settings = parse_args(Args, PRESETS)
    evaluate_saved(settings) if settings.eval else train(settings)
