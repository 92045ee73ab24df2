# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[toy-text]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
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
         Success means to end as ending pays best: at a grid's goal, at the right hotel in Taxi.
         values.png shows V with the greedy policy's arrows.

Deviations from the books
 1. Policy iteration keeps an action unless another is better by more than --tolerance. With the plain
    argmax, two equally good actions can alternate for ever by rounding.
 2. A transition that ends the episode is left out of P: nothing follows, so its rows sum to less than
    1. The books add an absorbing state that pays nothing, which comes to the same.
 3. Discounting and the time limit are two different problems. V and the policy are those of the
    discounted problem without a limit, as everywhere; how good they are within the limit is computed
    afterwards, beside the best that is possible there.
 4. --resume solves again from the start, which takes a moment, and adds the sweeps that were missing.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import platform
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from tqdm import tqdm

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "GridWorld"  # GridWorld (built in) or a gymnasium id: FrozenLake-v1, CliffWalking-v1, my_module:Env-v0
    seed: int = 1  # seed of the simulated episodes and of a random map; the solution itself is not random
    total_timesteps: int = 100_000  # most sweeps to make; both methods stop by themselves, usually far earlier
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # accepted as everywhere; NumPy solves on the CPU
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 1_000  # episodes of the greedy policy to simulate, as a check on the exact numbers

    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]; 1 only where every policy worth having ends
    tolerance: float = 1e-12  # a method has converged when no value changes by more than this
    is_slippery: bool = True  # FrozenLake: slip to either side with probability 2/3; --no-is-slippery never
    map_size: int | None = None  # FrozenLake: rows and columns of a random map drawn by the seed; None: the usual one
    max_episode_steps: int | None = None  # time limit of an episode; None: the environment's, or 1,000 if it has none

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "tolerance", "max_episode_steps")
        check(self, "in [0, 1]", "gamma")
        if self.map_size is not None and not (self.map_size >= 2 and self.env.startswith("FrozenLake")):
            fail("--map-size needs a FrozenLake environment and must be at least 2")
        if self.capture_video and self.env == "GridWorld":
            fail("GridWorld has no pictures to film; leave out --capture-video")


PRESETS: dict[str, dict[str, Any]] = {
    "CliffWalking-v1": dict(gamma=1.0),  # a step costs 1: without discounting V is minus the steps to go
}


# 2. Environment ---------------------------------------------------------------------------------


def make_env(args: Args, **kwargs: Any) -> gym.Env:
    """The environment, always with a time limit; ends the program with one line if it cannot be made."""
    if args.env.startswith("FrozenLake"):
        kwargs["is_slippery"] = args.is_slippery
        if args.map_size is not None:
            kwargs["desc"] = generate_random_map(args.map_size, seed=args.seed)
    try:
        env = gym.make(args.env, max_episode_steps=args.max_episode_steps, disable_env_checker=True, **kwargs)
    except Exception as error:  # whatever a module, a registry or a constructor raises
        fail(f"cannot make the environment {args.env!r}: {error}")
    return env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, 1_000)


# 3. Model ---------------------------------------------------------------------------------------


@dataclass
class MDP:
    """A Markov decision process as arrays, for S states and A actions.

    Ending belongs to the transition, not to the state it leads to: P holds the transitions after which
    the episode goes on, so that P @ V values what follows and an ending transition adds nothing.
    """

    P: np.ndarray  # [S, A, S] probability of moving to each next state and going on from there
    R: np.ndarray  # [S, A] expected reward
    success: np.ndarray  # [S, A] probability of ending as well as an episode can end
    goal: np.ndarray  # [S] bool, where the best endings lead
    start: np.ndarray  # [S] probability of being the first state
    limit: int  # steps after which an episode is cut
    shape: tuple[int, int] | None = None  # rows and columns, where the states are the cells of a map
    arrows: str = ""  # one per action, on a map

    def visitable(self) -> np.ndarray:
        """The states that an episode can act in, [S] bool."""
        reached, moves = self.start > 0, self.P.sum(1) > 0  # [S], [S, S]
        while (more := reached | reached @ moves).sum() > reached.sum():
            reached = more
        return reached


def mdp_from_table(table: Any, start: np.ndarray, num_actions: int, limit: int) -> MDP:
    """The arrays of a table as gymnasium's toy_text has it: [s][a] lists (probability, next state, reward, ended)."""
    S, A = len(start), num_actions
    if S * A * S > 1e9:
        fail(f"{S:,} states are too many for a table of all transitions ({8e-9 * S * A * S:.0f} GB)")
    P, R, success, goal = np.zeros((S, A, S)), np.zeros((S, A)), np.zeros((S, A)), np.zeros(S, bool)
    rows = [(s, a, *outcome) for s in range(S) for a in range(A) for outcome in table[s][a]]
    best_ending = max((reward for *_, reward, ended in rows if ended), default=math.inf)
    for s, a, probability, next_s, reward, ended in rows:
        R[s, a] += probability * reward
        if not ended:
            P[s, a, next_s] += probability
        elif reward == best_ending:
            success[s, a] += probability
            goal[next_s] = True
    return MDP(P, R, success, goal, start, limit)


def grid_world(limit: int, size: int = 4) -> MDP:
    """A walk from the top left to the bottom right: 1 for arriving, -0.01 for any other step."""
    table, goal = {}, size * size - 1
    for s in range(size * size):
        row, column = divmod(s, size)
        table[s] = []
        for down, right in ((0, -1), (1, 0), (0, 1), (-1, 0)):
            next_row = min(max(row + down, 0), size - 1)  # a wall: you stay where you are
            next_s = next_row * size + min(max(column + right, 0), size - 1)
            table[s].append([(1.0, next_s, 1.0 if next_s == goal else -0.01, next_s == goal)])
    mdp = mdp_from_table(table, np.eye(size * size)[0], 4, limit)
    return dataclasses.replace(mdp, shape=(size, size), arrows="←↓→↑")


def make_mdp(args: Args) -> MDP:
    """The decision process that --env names."""
    if args.env == "GridWorld":
        return grid_world(args.max_episode_steps or 100)
    env = make_env(args)
    world = env.unwrapped
    if not (hasattr(world, "P") and hasattr(world, "initial_state_distrib")):
        fail(f"{args.env} does not show its transition table (env.unwrapped.P), which dynamic programming needs; "
             "try FrozenLake-v1, CliffWalking-v1 or Taxi-v4, or learn from samples with q_learning.py")  # fmt: skip
    start, num_actions = np.asarray(world.initial_state_distrib), int(env.action_space.n)
    mdp = mdp_from_table(world.P, start, num_actions, env.spec.max_episode_steps or 1_000)
    if type(world).__name__ == "FrozenLakeEnv":
        return dataclasses.replace(mdp, shape=world.desc.shape, arrows="←↓→↑")
    if type(world).__name__ == "CliffWalkingEnv":
        return dataclasses.replace(mdp, shape=world.shape, arrows="↑→↓←")
    return mdp


class Solution(torch.nn.Module):
    """What model.pt holds: V [S] and the greedy policy [S]."""

    def __init__(self, num_states: int):
        super().__init__()
        self.register_buffer("values", torch.zeros(num_states, dtype=torch.float64))
        self.register_buffer("actions", torch.zeros(num_states, dtype=torch.int64))


# 4. The mathematics -----------------------------------------------------------------------------


def action_values(P: np.ndarray, R: np.ndarray, gamma: float, values: np.ndarray) -> np.ndarray:
    """Q(s, a) = R(s, a) + gamma * sum_s' P(s, a, s') V(s'), [S, A]; its maximum over a is Bellman's backup."""
    return R + gamma * P @ values


def greedy(q: np.ndarray) -> np.ndarray:
    """The first best action in every state, [S, A] -> [S]; actions within 1e-9 count as equally good."""
    return (q > q.max(1, keepdims=True) - 1e-9).argmax(1)


def value_iteration(
    P: np.ndarray, R: np.ndarray, gamma: float, tolerance: float = 1e-12
) -> Iterator[tuple[np.ndarray, float]]:
    """V [S] after every sweep and the largest change in it, until that is at most tolerance (Sutton & Barto, 4.4)."""
    values, residual = np.zeros(len(R)), math.inf
    while residual > tolerance:
        new_values = action_values(P, R, gamma, values).max(1)
        residual = float(np.abs(new_values - values).max())
        values = new_values
        yield values, residual


def policy_evaluation(P: np.ndarray, R: np.ndarray, gamma: float, policy: np.ndarray) -> np.ndarray:
    """The exact value of a policy [S, A], [S]: the solution V of (I - gamma * P_pi) V = R_pi.

    P_pi [S, S] and R_pi [S] are the world as it moves by itself when the policy picks the actions.
    Raises LinAlgError where there is none: without discounting, for a policy that never ends.
    """
    P_pi, R_pi = np.einsum("sa,sat->st", policy, P), (policy * R).sum(1)
    return np.linalg.solve(np.eye(len(R)) - gamma * P_pi, R_pi)


def policy_improvement(q: np.ndarray, policy: np.ndarray, tolerance: float = 1e-12) -> np.ndarray:
    """The policy [S, A] with a best action in every state where that beats what the policy does now."""
    better = q.max(1) > (policy * q).sum(1) + tolerance  # [S]
    return np.where(better[:, None], np.eye(q.shape[1])[q.argmax(1)], policy)


def policy_iteration(
    P: np.ndarray, R: np.ndarray, gamma: float, tolerance: float = 1e-12
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each policy [S, A] and its exact value [S], until none is better (Sutton & Barto, 4.3)."""
    policy, stable = np.full(R.shape, 1 / R.shape[1]), False  # at first any action is as likely
    while not stable:
        values = policy_evaluation(P, R, gamma, policy)
        yield policy, values
        new_policy = policy_improvement(action_values(P, R, gamma, values), policy, tolerance)
        policy, stable = new_policy, bool((new_policy == policy).all())


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


def expected_return(P: np.ndarray, R: np.ndarray, actions: np.ndarray, horizon: int) -> np.ndarray:
    """What the actions [S] earn on average in the next `horizon` steps, undiscounted and exact, [S]."""
    states, values = np.arange(len(R)), np.zeros(len(R))
    P_pi, R_pi = P[states, actions], R[states, actions]  # [S, S], [S]
    for _ in range(horizon):
        values = R_pi + P_pi @ values
    return values


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Solves the decision process that args name and returns the run folder."""
    pick_device(args.device)
    mdp = make_mdp(args)
    solution = Solution(len(mdp.R))
    run = Run(args, args.env, args.total_timesteps, episodes=False, solution=solution)
    if args.eval:
        actions = solution.actions.numpy()
        return run.finish(evaluate(args, mdp, actions, run.folder), **exact_scores(mdp, actions))
    try:
        with run:
            results = solve(args, mdp, solution, run)
    except np.linalg.LinAlgError:
        fail("without discounting, a policy that never ends has no value; use a --gamma below 1")
    q = action_values(mdp.P, mdp.R, args.gamma, solution.values.numpy())
    print(describe(mdp, q))
    if results["residual"] > args.tolerance or not results["policy_stable"]:
        print(f"not converged to {args.tolerance}; raise --total-timesteps")
    draw_values(mdp, q, args.env, run.folder / "values.png")
    return run.finish(evaluate(args, mdp, greedy(q), run.folder), **exact_scores(mdp, greedy(q)), **results)


def solve(args: Args, mdp: MDP, solution: Solution, run: Run) -> dict[str, Any]:
    """Both methods side by side, a row of metrics a sweep; fills in the solution and returns the final figures."""
    P, R, gamma = mdp.P, mdp.R, args.gamma
    residual, largest_contraction, sweeps = math.inf, 0.0, [0, 0]
    methods = zip_longest(value_iteration(P, R, gamma, args.tolerance), policy_iteration(P, R, gamma, args.tolerance))
    for sweep, (by_values, by_policy) in enumerate(islice(methods, args.total_timesteps), start=1):
        contraction = policy_residual = None
        if by_values:  # None once it has converged
            last_residual, (values, residual) = residual, by_values
            if sweep > 1 and residual > 1e-9:  # below that, rounding blurs the quotient
                contraction = residual / last_residual
                largest_contraction = max(largest_contraction, contraction)
            sweeps[0] = sweep
        if by_policy:
            _, policy_values = by_policy
            policy_residual = float((action_values(P, R, gamma, policy_values).max(1) - policy_values).max())
            sweeps[1] = sweep
        solution.values.numpy()[:] = values  # views of the tensors that model.pt keeps
        solution.actions.numpy()[:] = greedy(action_values(P, R, gamma, values))
        if sweep > run.step:
            run.report(sweep, {
                "charts/start_value": float(mdp.start @ values), "charts/contraction": contraction,
                "losses/value_iteration_residual": residual if by_values else None,
                "losses/policy_iteration_residual": policy_residual,
            })  # fmt: skip
    return {
        "start_value": float(mdp.start @ values), "difference": float(np.abs(values - policy_values).max()),
        "value_iteration_sweeps": sweeps[0], "policy_iteration_sweeps": sweeps[1],
        "policy_stable": sweeps[1] < args.total_timesteps, "residual": residual, "contraction": largest_contraction,
    }  # fmt: skip


# 6. Evaluation ----------------------------------------------------------------------------------


def exact_scores(mdp: MDP, actions: np.ndarray) -> dict[str, float]:
    """How the actions [S] fare within the time limit, and how the best policy fares there."""
    scores = {}
    for name, reward in (("success_probability", mdp.success), ("expected_return", mdp.R)):
        scores[name] = float(mdp.start @ expected_return(mdp.P, reward, actions, mdp.limit))
        scores[f"best_{name}"] = float(mdp.start @ backward_induction(mdp.P, reward, mdp.limit)[0])
    return scores


def evaluate(args: Args, mdp: MDP, actions: np.ndarray, folder: Path) -> np.ndarray:
    """Undiscounted returns of simulated episodes, [episodes]: the world itself checks our arrays."""
    returns, cut = np.zeros(args.eval_episodes), 0
    if args.env == "GridWorld":  # nothing but arrays, and without chance
        return returns + mdp.start @ expected_return(mdp.P, mdp.R, actions, mdp.limit)
    env = make_env(args, render_mode="rgb_array") if args.capture_video else make_env(args)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), lambda episode: episode == 0, disable_logger=True)
    for episode in range(args.eval_episodes):  # one after the other: that is quick enough for a table
        obs, _ = env.reset(seed=10**9 + args.seed if episode == 0 else None)  # seeded once, far from training's seeds
        terminated = truncated = False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = env.step(int(actions[obs]))
            returns[episode] += reward
        cut += truncated
    env.close()
    if cut:
        print(f"{cut} of {len(returns)} evaluation episodes were cut after {mdp.limit} steps (--max-episode-steps)")
    return returns


def describe(mdp: MDP, q: np.ndarray) -> str:
    """V and the greedy policy as text: cell by cell on a map, elsewhere only the range of V."""
    values, inside = q.max(1), mdp.visitable()
    if mdp.shape is None:
        return f"{inside.sum()} states, V from {values[inside].min():.4f} to {values[inside].max():.4f}"
    cells = [f"{value:8.4f} {mdp.arrows[action]}" for value, action in zip(values, greedy(q), strict=True)]
    for s in np.flatnonzero(~inside):
        cells[s] = f"{'goal' if mdp.goal[s] else '·':>8}  "
    columns = mdp.shape[1]
    return "\n".join(" ".join(cells[first : first + columns]) for first in range(0, len(cells), columns))


def draw_values(mdp: MDP, q: np.ndarray, name: str, file: Path) -> None:
    """A heat map: V with the greedy policy's arrows on a map, elsewhere Q as states × actions."""
    from matplotlib.figure import Figure

    shown = np.where(mdp.visitable()[:, None], q, np.nan)  # [S, A]; the rest stays grey
    if mdp.shape is None:
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        axis = figure.add_subplot(title=f"{name} · Q(s, a)", xlabel="state", ylabel="action")
        picture = axis.imshow(shown.T, aspect="auto", interpolation="nearest")
    else:
        rows, columns = mdp.shape
        figure = Figure(figsize=(0.9 * columns + 1.6, 0.9 * rows + 0.6), layout="constrained")
        axis = figure.add_subplot(title=f"{name} · V and the greedy policy", xticks=[], yticks=[])
        picture = axis.imshow(shown.max(1).reshape(mdp.shape), cmap="summer")
        for s, action in enumerate(greedy(q)):
            text = f"{mdp.arrows[action]}\n{q[s, action]:.3g}" if mdp.visitable()[s] else "goal" if mdp.goal[s] else ""
            axis.text(s % columns, s // columns, text, ha="center", va="center")
    axis.set_facecolor("0.85")
    figure.colorbar(picture)
    figure.savefig(file, dpi=120)


# 7. Run record ----------------------------------------------------------------------------------
# Settings, checkpoint and run folder. The same text in every script: read it once, then skip it.


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line; status 2 stands for wrong usage."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def check(args: Args, rule: Literal["> 0", ">= 0", "in [0, 1]"], *names: str) -> None:
    """Ends the program with one line if one of these settings breaks the rule; None is no value and passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not {"> 0": value > 0, ">= 0": value >= 0, "in [0, 1]": 0 <= value <= 1}[rule]:
            fail(f"--{name.replace('_', '-')} must be {rule}, not {value}")


def pick_device(name: str) -> torch.device:
    """The device of this name; auto is a GPU if there is one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        fail(f"--device {name} is not available on this machine; use --device cpu")
    return torch.device(name)


def parse_args(argv: list[str] | None = None) -> Args:
    """Settings: flag > saved run (with --eval, --resume) > preset of the environment > default."""
    about = (__doc__ or "").split("\n")[0]
    args = tyro.cli(Args, args=argv, description=about)
    name, path = getattr(args, "env", ""), args.eval or args.resume
    if path:
        defaults = load_checkpoint(path)["args"] | {"eval": None, "resume": None}
    elif defaults := PRESETS.get(name, {}):
        print(f"preset for {name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in defaults.items()))
    try:
        args = tyro.cli(Args, args=argv, default=Args(**defaults), description=about)
    except TypeError as error:
        fail(f"{path} was saved with other settings than this version of the script has: {error}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in [0, 2147483647], not {args.seed}")
    return args


def load_checkpoint(path: str) -> dict[str, Any]:
    """The model.pt of a run folder, tensors and plain values; loading it runs no code."""
    file = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        fail(f"there is no saved model at {file}; give a run folder")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        script = saved["script"]
    except Exception as error:  # whatever a damaged file makes the loader raise
        fail(f"{file} is not a readable checkpoint: {(str(error) or repr(error)).splitlines()[0]}")
    if script != Path(__file__).stem:
        fail(f"{file} was saved by {script}.py, not by {Path(__file__).name}")
    return saved


class Progress:
    """The progress of one stage: a bar on a terminal, ten plain lines elsewhere."""

    def __init__(self, stage: str, total: int, done: int = 0):
        self.stage, self.total, self.first, self.done = stage, total, done, done
        self.started, shown = time.perf_counter(), sys.stdout.isatty()
        self.bar = tqdm(desc=stage, total=total, initial=done, unit_scale=True, file=sys.stdout, disable=not shown)

    def update(self, done: int, text: str = "") -> None:
        if self.bar.disable and done * 10 // self.total > self.done * 10 // self.total:
            speed = (done - self.first) / (time.perf_counter() - self.started)
            left = max(0, self.total - done) / speed
            print(f"{self.stage} {done:,} of {self.total:,}  {text}  {speed:,.0f}/s  {left:.0f} s left", flush=True)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.done)
        self.done = done

    def close(self) -> None:
        self.bar.close()


class Run:
    """The folder of one run, and a context manager around its training loop.

    config.json    every setting, versions, device
    metrics.csv    one row per report; charts/episodic_* are means over the last 100 training episodes
    model.pt       the parts by name (anything with state_dict) and the record, whole or not at all:
                   at the first report, every 20 s, at the end, on Ctrl-C
    summary.json, curves.png    the result
    """

    def __init__(
        self, args: Args, name: str, total: int, threshold: float | None = None, episodes: bool = True, **parts: Any
    ):
        self.args, self.name, self.total, self.threshold, self.parts = args, name, total, threshold, parts
        self.script, self.wandb = Path(__file__).stem, None
        self.step, self.seconds, self.solved, self.rows = 0, 0.0, None, []
        self.last100 = {"return": deque(maxlen=100), "length": deque(maxlen=100)} if episodes else {}
        if path := args.eval or args.resume:
            saved = load_checkpoint(path)
            self.folder = Path(path) if Path(path).is_dir() else Path(path).parent
            self.step, self.seconds, self.solved, self.rows = (saved[k] for k in ("step", "seconds", "solved", "rows"))
            for kind, values in self.last100.items():
                values.extend(saved["last100"][kind])
            for part in parts:
                try:
                    parts[part].load_state_dict(saved["parts"][part])
                except (KeyError, RuntimeError, ValueError):
                    fail(f"the saved {part} does not fit these flags; use the environment and sizes of its training")

    def __enter__(self) -> Run:
        if self.args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs the package wandb: pip install wandb")
        modules = [sys.modules[name] for name in ("torch", "numpy", "gymnasium", "transformers") if name in sys.modules]
        config = {"script": self.script, "args": dataclasses.asdict(self.args), "python": platform.python_version()}
        config |= {"device": str(pick_device(self.args.device))} | {m.__name__: m.__version__ for m in modules}
        try:
            if not self.args.resume:
                stem = f"{self.name}__{self.script}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
                self.folder = Path(self.args.run_dir, re.sub(r"[^\w.-]+", "-", stem))
                while self.folder.exists():
                    self.folder = self.folder.with_name(self.folder.name + "-2")
                self.folder.mkdir(parents=True)
            (self.folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            self.csv = (self.folder / "metrics.csv").open("w", newline="", encoding="utf-8")
        except OSError as error:
            fail(f"cannot write the run folder: {error}")
        if self.args.track:
            try:
                self.wandb = wandb.init(name=self.folder.name, dir=self.folder, config=config)
            except wandb.Error as error:
                fail(f"Weights & Biases: {error} WANDB_MODE=offline needs no account. Nothing was trained")
        for row in self.rows:  # of the run that is resumed
            self._write(row)
        self.progress = Progress("training", self.total, self.step)
        self.reported, self.saved = time.perf_counter(), -math.inf
        self.started = self.reported - self.seconds
        return self

    def episode(self, episodic_return: float, length: int) -> None:
        """Notes a finished training episode."""
        self.last100["return"].append(float(episodic_return))
        self.last100["length"].append(int(length))

    def report(self, step: int, metrics: dict[str, float | None]) -> None:
        """Adds a row of metrics, None for "nothing yet", the headline first. One that is not finite ends the run."""
        now = time.perf_counter()
        self.seconds, speed = now - self.started, (step - self.step) / (now - self.reported)
        means = {f"charts/episodic_{kind}": sum(v) / len(v) if v else None for kind, v in self.last100.items()}
        row = {"step": step, "seconds": round(self.seconds, 3), "charts/SPS": round(speed), **means, **metrics}
        for key, value in row.items():
            if value is not None and not math.isfinite(value):
                self._stop(f"{key} is {value} at step {step}")
        self.step, self.reported = step, now
        self.rows.append(row)
        self._write(row)
        headline, value = next(iter((means or metrics).items()))
        self.progress.update(step, "" if value is None else f"{headline.split('/')[-1]} {value:.4g}")
        if self.threshold is not None and not self.solved and len(self.last100["return"]) == 100:
            self.solved = [step, self.seconds] if value >= self.threshold else None
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        if now - self.saved > 20:
            self.save()

    def _write(self, row: dict[str, float | None]) -> None:
        writer = csv.DictWriter(self.csv, list(self.rows[0]), lineterminator="\n")
        if self.csv.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self.csv.flush()

    def _stop(self, reason: str) -> NoReturn:
        file = self.folder / "model.pt"
        fail(f"{reason}; " + (f"the last good checkpoint is {file}" if file.exists() else "nothing was saved yet"), 1)

    def save(self) -> None:
        """Writes model.pt, unless a weight is not finite."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for name, state in states.items():
            if not all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor)):
                self._stop(f"the {name} is not finite at step {self.step}")
        content = {"script": self.script, "args": dataclasses.asdict(self.args), "parts": states, "rows": self.rows}
        content |= {"step": self.step, "seconds": self.seconds, "solved": self.solved}
        content |= {"last100": {kind: list(values) for kind, values in self.last100.items()}}
        torch.save(content, self.folder / "model.pt.tmp")
        os.replace(self.folder / "model.pt.tmp", self.folder / "model.pt")
        self.saved = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.progress.close()
        self.csv.close()
        if kind in (None, KeyboardInterrupt):
            self.save()
        if kind and self.wandb:
            self.wandb.finish(exit_code=1)
        if kind is KeyboardInterrupt:
            fail(f"interrupted at step {self.step}; go on with --resume {self.folder}", 130)

    def finish(self, returns: np.ndarray | None = None, **results: Any) -> Path:
        """Prints the result; after training it writes summary.json and curves.png too. Returns the folder."""
        line = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in results.items() if isinstance(value, float)]
        if returns is not None:
            mean, std = float(returns.mean()), float(returns.std())
            line.insert(0, f"{len(returns)} evaluation episodes: return {mean:.1f} ± {std:.1f}")
            results |= {"eval_episodes": len(returns), "eval_return_mean": mean, "eval_return_std": std}
        if self.threshold is not None:
            step, seconds = self.solved or (None, None)
            line.append(f"threshold {self.threshold:g} " + (f"after {seconds:.2f} s" if self.solved else "not reached"))
            results |= {"solved_step": step, "solved_seconds": seconds}
        print(*line, f"{self.seconds:.1f} s of training", self.folder, sep=" · ")
        if self.args.eval:
            return self.folder
        summary = {"script": self.script, "env": self.name, "seed": self.args.seed, "steps": self.step}
        summary |= {"train_seconds": self.seconds, "sps": round(self.step / max(self.seconds, 1e-9))} | results
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        self._draw()
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        return self.folder

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        keys = [key for key in self.rows[0] if key != "step" and any(row[key] is not None for row in self.rows)]
        figure = Figure(figsize=(16, 3 * math.ceil(len(keys) / 4)), layout="constrained")
        for place, key in enumerate(keys, start=1):
            axis = figure.add_subplot(math.ceil(len(keys) / 4), 4, place, title=key)
            axis.plot(*zip(*((row["step"], row[key]) for row in self.rows if row[key] is not None), strict=True))
            if key == "charts/episodic_return" and self.threshold is not None:
                axis.axhline(self.threshold, color="tab:red", linestyle="--")
            axis.locator_params(nbins=5)
            axis.grid(alpha=0.3)
        figure.suptitle(f"{self.name} · {self.script} · seed {self.args.seed} · over steps")
        figure.savefig(self.folder / "curves.png")


# 8. Command line --------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.set_flush_denormal(True)  # numbers below 1e-38 are nothing to learn from, and slow many times over
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        train(parse_args())
    except KeyboardInterrupt:
        fail("interrupted", 130)
