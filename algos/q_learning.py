# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[toy-text]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
# ///
"""Tabular Q-learning, SARSA, Expected SARSA, Double Q-learning and TD(0) prediction.

The agent does not know the rules of its world. It keeps a table with its estimate Q(s, a) of the
return after taking action a in state s, mostly acts as the table advises, and after every step moves
one entry a little towards what that step has just shown:

    Q(s, a)  <-  Q(s, a) + alpha * ( target - Q(s, a) )

    target = r + gamma * max_a' Q(s', a')               q-learning: as if greedy from now on
             r + gamma * Q(s', a')                      sarsa: with the action a' really taken next
             r + gamma * sum_a' pi(a' | s') Q(s', a')   expected-sarsa: its mean over those actions
             r + gamma * Q2(s', argmax_a' Q(s', a'))    double-q-learning: one table picks, one judges
             r + gamma * V(s')                          td0: no actions, judges a given policy

Q-learning is off-policy: it learns the value of the greedy policy while exploring. SARSA is
on-policy: it learns the value of what it does, exploration and its accidents included.

Papers   Watkins & Dayan 1992, Q-learning, Machine Learning 8          (q-learning, convergence)
         Rummery & Niranjan 1994, On-line Q-learning using connectionist systems         (sarsa)
         van Seijen et al. 2009, A theoretical and empirical analysis of Expected Sarsa
         van Hasselt 2010, Double Q-learning, NeurIPS 23
         Sutton 1988, Learning to predict by the methods of temporal differences           (td0)
         Even-Dar & Mansour 2003, Learning rates for Q-learning, JMLR 5       (1 / n ** power)
         Sutton & Barto 2018, Reinforcement Learning, chapter 6, incompleteideas.net/book

Run      python algos/q_learning.py
         python algos/q_learning.py --no-is-slippery --total-timesteps 30000
         python algos/q_learning.py --env FrozenLake8x8-v1
         python algos/q_learning.py --env CliffWalking-v1
         python algos/q_learning.py --env CliffWalking-v1 --algorithm sarsa
         python algos/q_learning.py --env Taxi-v4                       (needs gymnasium 1.3)
         python algos/q_learning.py --env Blackjack-v1
         python algos/q_learning.py --epsilon-decay exponential
         python algos/q_learning.py --algorithm td0 --policy random
         python algos/q_learning.py --eval runs/<folder> --eval-episodes 10000

Expect   Exact return of the learned greedy policy, median and worst of ten seeds which nothing was tuned on, 301
         to 310:
         FrozenLake-v1                       400k steps     .7402    .7402    the best possible .7442
         FrozenLake-v1 --no-is-slippery       30k steps    1        1         the best possible 1
         FrozenLake8x8-v1                      3M steps     .8933    .8805    the best possible .9132
         CliffWalking-v1                     100k steps   -13      -13        the best possible -13
         CliffWalking-v1 --algorithm sarsa   100k steps   -15      -17        keeps off the edge
         Taxi-v4                             300k steps     7.93     7.93     the best possible 7.93
         While they explore, the last 100 episodes on CliffWalking return -52 with q-learning and -21
         with sarsa (medians): Example 6.6 of Sutton & Barto. FrozenLake takes some 3 s on one core.

Results  Where the rules are known, summary.json and metrics.csv have exactly: exact_return of the learned
         policy within the time limit (on FrozenLake its probability of success) beside the optimal_return,
         and q_error, the largest error of the table. q_table.png shows the table at six moments.

Deviations from the papers
 1. The next action is chosen before the table is updated, for every algorithm: SARSA needs it, and one
    loop serves all. It matters only where a step leads back to the same state.
 2. An episode cut by a time limit still bootstraps from its last state; only one that ended by its
    rules does not. The books know no time limits.
 3. The time limit is counted here instead of by gymnasium's wrapper. That is faster, and truncation
    stands in the loop for you to see.
 4. Double Q-learning's two tables share one count of updates, so with alpha = 1 / n^power each moves by
    somewhat smaller steps than van Hasselt's, who counts for each table.
"""

from __future__ import annotations

import csv
import dataclasses
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
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from gymnasium.spaces import Discrete
from tqdm import tqdm

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "FrozenLake-v1"  # gymnasium id; its observations are Discrete or Tuples of Discrete
    seed: int = 1  # seed of every random number: exploration, ties, environment, random map
    total_timesteps: int = 400_000  # environment steps to train for
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # accepted as everywhere; no device makes a list faster
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 1_000  # greedy episodes played after training, on seeds never trained on

    algorithm: Literal["q-learning", "sarsa", "expected-sarsa", "double-q-learning", "td0"] = "q-learning"  # the target
    policy: str = "random"  # td0: the policy to judge: random, optimal (of known rules), or a saved run's folder
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    learning_rate: float = 1.0  # alpha of an entry's first update
    lr_power: float = 0.6  # the n-th has learning-rate / n ** lr-power: 0 is constant, above 0.5 averages chance out
    start_e: float = 1.0  # epsilon, the probability of a random action, at the start
    end_e: float = 0.01  # epsilon at the end
    exploration_fraction: float = 1.0  # share of total-timesteps in which epsilon goes from start-e to end-e
    epsilon_decay: Literal["linear", "exponential"] = "linear"  # how it goes there
    initial_value: float = 0.0  # every entry at the start; above any return, the agent tries everything once
    is_slippery: bool = True  # FrozenLake: slip to either side with probability 2/3; --no-is-slippery never
    map_size: int | None = None  # FrozenLake: rows and columns of a random map drawn by the seed; None: the usual one
    max_episode_steps: int | None = None  # time limit of an episode; None: the environment's, or 1,000 if it has none

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "learning_rate", "max_episode_steps")
        check(self, ">= 0", "lr_power")
        check(self, "in [0, 1]", "gamma", "start_e", "end_e", "exploration_fraction")
        if self.epsilon_decay == "exponential" and not (self.start_e > 0 and self.end_e > 0):
            fail("--epsilon-decay exponential never reaches 0; give --start-e and --end-e above 0, or use linear")
        if not math.isfinite(self.initial_value):
            fail(f"--initial-value must be finite, not {self.initial_value}")
        if self.map_size is not None and not (self.map_size >= 2 and self.env.startswith("FrozenLake")):
            fail("--map-size needs a FrozenLake environment and must be at least 2")


PRESETS: dict[str, dict[str, Any]] = {
    "FrozenLake8x8-v1": dict(total_timesteps=3_000_000, gamma=0.995, start_e=0.1, initial_value=1.0),
    "CliffWalking-v1": dict(  # as in Example 6.6 of Sutton & Barto, with a smaller alpha
        total_timesteps=100_000, gamma=1.0, learning_rate=0.1, lr_power=0.0, start_e=0.1, end_e=0.1
    ),
    "Taxi-v4": dict(total_timesteps=300_000, lr_power=0.0, end_e=0.0),  # nothing is left to chance: alpha 1
    "Blackjack-v1": dict(total_timesteps=300_000, gamma=1.0),
}


# 2. Environment ---------------------------------------------------------------------------------


def make_env(args: Args, **kwargs: Any) -> tuple[gym.Env, int]:
    """The environment, and its time limit, which is ours to count; one line if no table can be made for it."""
    if args.env.startswith("FrozenLake"):
        kwargs["is_slippery"] = args.is_slippery
        if args.map_size is not None:
            kwargs["desc"] = generate_random_map(args.map_size, seed=args.seed)
    try:
        env = gym.make(args.env, disable_env_checker=True, **kwargs)
    except Exception as error:  # whatever a module, a registry or a constructor raises
        fail(f"cannot make the environment {args.env!r}: {error}")
    limit = args.max_episode_steps or env.spec.max_episode_steps or 1_000
    while isinstance(env, (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing)):  # each costs time at every step
        env = env.env
    spaces = env.observation_space if isinstance(env.observation_space, gym.spaces.Tuple) else [env.observation_space]
    if not all(isinstance(space, Discrete) for space in (*spaces, env.action_space)):
        fail(f"{args.env} has observations {env.observation_space} and actions {env.action_space}; a table needs "
             "Discrete ones (or Tuples of Discrete observations); try dqn.py or ppo.py")  # fmt: skip
    return env, limit


def table_rows(space: gym.Space) -> tuple[int, Callable[[Any], int]]:
    """The number of table rows S for a space, and the function from an observation to its row."""
    if isinstance(space, Discrete):
        first = int(space.start)
        return int(space.n), int if first == 0 else lambda obs: int(obs) - first
    sizes, firsts = [int(part.n) for part in space], [int(part.start) for part in space]
    return math.prod(sizes), lambda obs: int(np.ravel_multi_index(np.subtract(obs, firsts), sizes))


# 3. Model ---------------------------------------------------------------------------------------


class QTable:
    """Q(s, a), and how often each entry was updated; for one number at a time, lists are faster than arrays.

    Double Q-learning has two tables; TD(0) has one with a single column, V(s).
    """

    def __init__(self, num_tables: int, num_states: int, num_columns: int, value: float):
        self.q = np.full((num_tables, num_states, num_columns), value, float).tolist()
        self.visits = np.zeros((num_states, num_columns), int).tolist()
        self.history: dict[int, torch.Tensor] = {}  # step: the mean table [S, A] at that report

    def mean(self) -> np.ndarray:
        return np.mean(self.q, axis=0)  # [S, A]

    def state_dict(self) -> dict[str, Any]:
        q = torch.tensor(self.q, dtype=torch.float64)
        return {"q": q, "visits": torch.tensor(self.visits), "history": dict(self.history)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["q"].shape != np.shape(self.q):
            raise ValueError("a table of another shape")
        self.q, self.visits, self.history = saved["q"].tolist(), saved["visits"].tolist(), saved["history"]


# 4. The mathematics -----------------------------------------------------------------------------


def epsilon_greedy(q: list[float], epsilon: float, rng: random.Random) -> int:
    """A random action with probability epsilon, else the best one; between equals, chance decides."""
    if rng.random() < epsilon:
        return int(rng.random() * len(q))
    best = max(q)
    if q.count(best) == 1:
        return q.index(best)
    return rng.choice([action for action, value in enumerate(q) if value == best])


def td_target(
    algorithm: str, reward: float, terminated: bool, gamma: float, next_q: list[float], next_action: int,
    epsilon: float, judge: list[float],
) -> float:  # fmt: skip
    """What Q(s, a) is moved towards. next_q is Q(s', .), judge is the other table's row in Double Q-learning.

    Only terminated ends the sum of rewards; a time limit does not, so truncated plays no part.
    """
    if terminated:
        return reward
    if algorithm == "q-learning":  # the best action (Watkins 1989)
        next_value = max(next_q)
    elif algorithm == "sarsa":  # the action that will be taken (Rummery & Niranjan 1994)
        next_value = next_q[next_action]
    elif algorithm == "expected-sarsa":  # the mean action of the epsilon-greedy policy (Eq. 6.9, Sutton & Barto)
        next_value = (1 - epsilon) * max(next_q) + epsilon * sum(next_q) / len(next_q)
    elif algorithm == "double-q-learning":  # this table's best action, judged by the other (van Hasselt 2010)
        next_value = judge[next_q.index(max(next_q))]
    else:  # td0: a table with one column, V(s') (Eq. 6.2, Sutton & Barto)
        next_value = next_q[0]
    return reward + gamma * next_value


def step_size(learning_rate: float, power: float, n: int) -> float:
    """alpha of an entry's n-th update. Power 1 gives the mean of all targets; learning converges for
    powers in (0.5, 1] (Robbins & Monro 1951), quickest between (Even-Dar & Mansour 2003)."""
    return learning_rate / n**power


def exploration(done: float, start_e: float, end_e: float, fraction: float, decay: str) -> float:
    """epsilon when a share `done` of training is over: start_e at first, end_e from `fraction` on."""
    progress = min(done / fraction, 1.0) if fraction > 0 else 1.0
    if decay == "exponential":
        return start_e * (end_e / start_e) ** progress
    return (1 - progress) * start_e + progress * end_e


# The rest needs the rules of the world. The learner never sees them; they measure how far it has come.


@dataclass
class Rules:
    """The transitions after which an episode goes on, as K entries of P; and the rewards of all."""

    pair: np.ndarray  # [K] s * A + a
    next_s: np.ndarray  # [K]
    probability: np.ndarray  # [K]
    R: np.ndarray  # [S, A] expected reward
    start: np.ndarray  # [S] probability of being the first state

    def visitable(self) -> np.ndarray:
        """The states that an episode can act in, [S] bool."""
        reached, more = np.zeros(len(self.R), bool), self.start > 0
        while (more != reached).any():
            reached = more.copy()
            more[self.next_s[reached[self.pair // self.R.shape[1]]]] = True
        return reached


def read_rules(env: gym.Env) -> Rules | None:
    """The rules of an environment that shows them as gymnasium's toy_text does, or None.

    There, P[s][a] is a list of (probability, next state, reward, terminated).
    """
    world = env.unwrapped
    if not (hasattr(world, "P") and hasattr(world, "initial_state_distrib")):
        return None
    S, A = int(env.observation_space.n), int(env.action_space.n)
    R, going_on = np.zeros((S, A)), []
    for s in range(S):
        for a in range(A):
            for probability, next_s, reward, terminated in world.P[s][a]:
                R[s, a] += probability * reward
                if not terminated:
                    going_on.append((s * A + a, next_s, probability))
    pair, next_s, probability = np.array(going_on, float).reshape(-1, 3).T
    return Rules(pair.astype(int), next_s.astype(int), probability, R, np.asarray(world.initial_state_distrib))


def exact_q(rules: Rules, gamma: float, sweeps: int, policy: np.ndarray | None = None) -> np.ndarray:
    """Q after so many Bellman backups, [S, A]: of policy [S, A], or of the best one (see dynamic_programming.py).

    With gamma 1 this is the exact undiscounted return within a time limit of so many steps.
    """
    q = last_q = np.zeros_like(rules.R)
    for _ in range(sweeps):
        values = q.max(1) if policy is None else (policy * q).sum(1)
        following = np.bincount(rules.pair, rules.probability * values[rules.next_s], q.size)
        q, last_q = rules.R + gamma * following.reshape(q.shape), q
        if np.abs(q - last_q).max() <= 1e-12:
            break
    return q


def greedy_policy(q: np.ndarray) -> np.ndarray:
    """Probability 1 for the first best action of each state, [S, A]."""
    return np.eye(q.shape[1])[q.argmax(1)]


# 5. Training ------------------------------------------------------------------------------------


def report_steps(total: int) -> list[int]:
    """When to report: at every twentieth of the run, and more often early, where most happens."""
    steps = np.concatenate([np.linspace(total / 20, total, 20), np.geomspace(total / 1000, total, 20)])
    return sorted(set(np.ceil(steps.round(6)).astype(int).tolist()))


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    pick_device(args.device)
    env, limit = make_env(args)
    num_states, row = table_rows(env.observation_space)
    num_actions, first_action = int(env.action_space.n), int(env.action_space.start)
    double, prediction = args.algorithm == "double-q-learning", args.algorithm == "td0"
    table = QTable(1 + double, num_states, 1 if prediction else num_actions, args.initial_value)
    rules = read_rules(env)
    given = given_policy(args, rules, num_states, num_actions) if prediction else None  # [S, A]
    truth = None if rules is None else exact_q(rules, args.gamma, 100_000, given)  # [S, A]
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, table=table)
    if args.eval:
        return run.finish(evaluate(args, table, given, run.folder), **measure(rules, limit, truth, table, given))

    seeds = np.random.default_rng([args.seed, run.step])
    rng, env_seed = random.Random(int(seeds.integers(2**63))), int(seeds.integers(10**9))

    def act(obs: int) -> int:
        if prediction:
            return rng.choices(range(num_actions), given[obs])[0]
        if double:  # both tables have a say
            return epsilon_greedy([a + b for a, b in zip(q[obs], judge[obs], strict=True)], epsilon, rng)
        return epsilon_greedy(q[obs], epsilon, rng)

    q, judge, visits = table.q[0], table.q[-1], table.visits
    step, squares, entries = run.step, 0.0, 0.0  # sums since the last report: squared errors, updated entries
    reports = [at for at in report_steps(args.total_timesteps) if at > step]
    with run:
        while step < args.total_timesteps:
            obs, env_seed = row(env.reset(seed=env_seed)[0]), None  # seeded once, not in every episode
            epsilon = exploration(
                step / args.total_timesteps, args.start_e, args.end_e, args.exploration_fraction, args.epsilon_decay
            )
            action = act(obs)
            episode_return, length, done = 0.0, 0, False
            while not done and step < args.total_timesteps:
                next_obs, reward, terminated, truncated, _ = env.step(first_action + action)
                next_obs = row(next_obs)
                next_action = act(next_obs)
                step += 1
                length += 1
                episode_return += reward
                done = terminated or truncated or length == limit

                # Learn: move one entry of one table towards its target.
                if double and rng.random() < 0.5:
                    q, judge = judge, q
                column = 0 if prediction else action
                visits[obs][column] = n = visits[obs][column] + 1
                target = td_target(
                    args.algorithm, reward, terminated, args.gamma, q[next_obs], next_action, epsilon, judge[next_obs]
                )
                q_obs = q[obs]
                error = target - q_obs[column]
                q_obs[column] += step_size(args.learning_rate, args.lr_power, n) * error
                squares += error * error
                entries += q_obs[column]
                obs, action = next_obs, next_action

                if step == reports[0]:
                    table.history[step] = torch.from_numpy(table.mean())
                    exact = measure(rules, limit, truth, table, given)
                    since = step - run.step
                    run.report(step, {
                        "charts/epsilon": epsilon, "losses/td_loss": squares / since,
                        "losses/q_values": entries / since, "charts/exact_return": exact.get("exact_return"),
                        "charts/q_error": exact.get("q_error"),
                    })  # fmt: skip
                    squares = entries = 0.0
                    reports.pop(0)
            if done:
                run.episode(episode_return, length)
    env.close()
    results = measure(rules, limit, truth, table, given)
    if rules is not None:
        results["optimal_return"] = float(rules.start @ exact_q(rules, 1.0, limit).max(1))
        results["start_value"] = float(rules.start @ table.mean().max(1))
        true_values = truth.max(1) if given is None else (given * truth).sum(1)
        results["true_start_value"] = float(rules.start @ true_values)
    draw_tables(args, env, table, run.folder / "q_table.png")
    return run.finish(evaluate(args, table, given, run.folder), **results)


def given_policy(args: Args, rules: Rules | None, num_states: int, num_actions: int) -> np.ndarray:
    """The policy that --policy names, for TD(0) to judge, [S, A]."""
    if args.policy == "random":
        return np.full((num_states, num_actions), 1 / num_actions)
    if args.policy == "optimal":
        if rules is None:
            fail("--policy optimal needs an environment that shows its rules; use random or a saved run")
        return greedy_policy(exact_q(rules, args.gamma, 100_000))
    q = load_checkpoint(args.policy)["parts"]["table"]["q"].mean(0).numpy()
    if q.shape != (num_states, num_actions):
        fail(f"the table in {args.policy} is {q.shape}, but this environment needs {(num_states, num_actions)}")
    return greedy_policy(q)


# 6. Evaluation ----------------------------------------------------------------------------------


def measure(
    rules: Rules | None, limit: int, truth: np.ndarray | None, table: QTable, given: np.ndarray | None
) -> dict[str, float]:
    """Exact figures, where the rules are known.

    exact_return is what the greedy (TD(0): the given) policy earns on average within the time limit,
    undiscounted; on FrozenLake this is its probability of success. q_error is the largest error of the
    table in any state that an episode can act in.
    """
    if rules is None:
        return {}
    q = table.mean()
    policy = greedy_policy(q) if given is None else given
    expected = (policy * exact_q(rules, 1.0, limit, policy)).sum(1)  # [S]
    if given is not None:
        truth = (given * truth).sum(1, keepdims=True)  # V [S, 1]
    return {"exact_return": float(rules.start @ expected),
            "q_error": float(np.abs(q - truth)[rules.visitable()].max())}  # fmt: skip


def evaluate(args: Args, table: QTable, given: np.ndarray | None, folder: Path) -> np.ndarray:
    """Undiscounted returns of the greedy policy (TD(0): the given one), [episodes]."""
    env, limit = make_env(args, render_mode="rgb_array") if args.capture_video else make_env(args)
    _, row = table_rows(env.observation_space)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), lambda episode: episode == 0, disable_logger=True)
    rng, first_action = random.Random(10**9 + args.seed), int(env.action_space.start)
    policy = (greedy_policy(table.mean()) if given is None else given).tolist()
    actions, returns, cut = range(len(policy[0])), np.zeros(args.eval_episodes), 0
    for episode in range(args.eval_episodes):  # one after the other: that is quick enough for a table
        obs, _ = env.reset(seed=10**9 + args.seed if episode == 0 else None)  # far from training's seeds
        terminated = truncated = False
        length = 0
        while not (terminated or truncated or length == limit):
            action = rng.choices(actions, policy[row(obs)])[0]
            obs, reward, terminated, truncated, _ = env.step(first_action + action)
            returns[episode] += reward
            length += 1
        cut += not terminated
    env.close()
    if cut:
        print(f"{cut} of {len(returns)} evaluation episodes were cut after {limit} steps (--max-episode-steps)")
    return returns


def draw_tables(args: Args, env: gym.Env, table: QTable, file: Path) -> None:
    """The table at six reports: the best value of each cell where the world is a map, else Q as states × actions."""
    from matplotlib.figure import Figure

    world = env.unwrapped
    shape = {"FrozenLakeEnv": getattr(world, "nrow", 0), "CliffWalkingEnv": 4}.get(type(world).__name__)
    seen = np.array(table.visits) > 0  # entries that were never updated stay grey
    steps = list(table.history)
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, 6)
    for axis, at in zip(axes, np.linspace(0, len(steps) - 1, 6).round().astype(int), strict=True):
        shown = np.where(seen, table.history[steps[at]].numpy(), np.nan)  # [S, A]
        if shape:
            best = np.where(seen, shown, -np.inf).max(1)
            shown = np.where(seen.any(1), best, np.nan).reshape(shape, -1)  # [rows, columns]
        image = axis.imshow(shown, aspect="equal" if shape else "auto", interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.7)
        axis.set(title=f"step {steps[at]:,}", xticks=[], yticks=[], facecolor="0.85")
    figure.suptitle(f"{args.env} · {args.algorithm} · " + ("best value of each state" if shape else "Q(s, a)"))
    figure.savefig(file, dpi=100)


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
