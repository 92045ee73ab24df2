# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[toy-text]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
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
         python algos/q_learning.py --no-is-slippery --total-timesteps 30000 --animate
         python algos/q_learning.py --env FrozenLake8x8-v1
         python algos/q_learning.py --env CliffWalking-v1
         python algos/q_learning.py --env CliffWalking-v1 --algorithm sarsa
         python algos/q_learning.py --env Taxi-v4                       (needs gymnasium 1.3)
         python algos/q_learning.py --env Blackjack-v1
         python algos/q_learning.py --algorithm td0 --policy random
         python algos/q_learning.py --eval runs/<folder> --eval-episodes 10000

Expect   (exact return of the learned greedy policy; median and worst of seeds 101-110, 8x8: 101-120)
         FrozenLake-v1                         400k steps     .7402    .7402    the best possible .7442
         FrozenLake-v1 --no-is-slippery         30k steps    1        1         the best possible 1
         FrozenLake8x8-v1                        3M steps     .8932    .7976    the best possible .9132
         CliffWalking-v1                       100k steps   -13      -13        the best possible -13
         CliffWalking-v1 --algorithm sarsa     100k steps   -15      -17        keeps off the edge
         Taxi-v4                               300k steps     7.93     7.93     the best possible 7.93
         While they explore, the last 100 episodes on CliffWalking return -53 with q-learning and -22
         with sarsa (medians): Example 6.6 of Sutton & Barto. One core of an AMD EPYC, nothing
         else running: FrozenLake 3.1 s (slowest 3.5), 129,000 steps a second; not slippery .25 s (.31).
         FrozenLake8x8 passes .85 after a median of 15 s (22) beside other work, and holds it on 19 of 20
         seeds; the second worst has .8924.

Results  summary.json: success_rate with its 95 % interval, from the evaluation episodes. Where the rules
         are known also, exactly: exact_return of the learned policy within the time limit (on
         FrozenLake its probability of success) beside the optimal_return, and q_error, the largest
         error of the table. metrics.csv has both as curves; q_table.png shows the table at six moments.

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
from gymnasium.spaces import Discrete
from tqdm import tqdm

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "FrozenLake-v1"
    """gymnasium id of an environment whose observations are Discrete or Tuples of Discrete"""
    seed: int = 1
    """seed of every random number: exploration, ties, environment, random map; >= 0"""
    total_timesteps: int = 400_000
    """environment steps to train for"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """accepted as everywhere; the table is a Python list, which no device makes faster"""
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
    """greedy episodes played after training, on seeds never trained on; >= 1"""

    algorithm: Literal["q-learning", "sarsa", "expected-sarsa", "double-q-learning", "td0"] = "q-learning"
    """what an entry of the table is moved towards: see the header"""
    policy: str = "random"
    """td0: the policy to judge: random, optimal (needs a known transition table), or a saved run of this script"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    learning_rate: float = 1.0
    """alpha of an entry's first update; > 0"""
    lr_power: float = 0.6
    """an entry's n-th update has alpha = learning-rate / n ** lr-power: 0 is constant, above 0.5 averages chance out"""
    start_e: float = 1.0
    """epsilon, the probability of a random action, at the start; in [0, 1]"""
    end_e: float = 0.01
    """epsilon at the end; in [0, 1]"""
    exploration_fraction: float = 1.0
    """share of total-timesteps in which epsilon goes from start-e to end-e; in [0, 1]"""
    epsilon_decay: Literal["linear", "exponential"] = "linear"
    """how epsilon goes from start-e to end-e"""
    initial_value: float = 0.0
    """every entry at the start; optimistic (above any return) makes the agent try everything once"""
    is_slippery: bool = True
    """FrozenLake: slip to either side with probability 2/3; --no-is-slippery goes where you want"""
    map_size: int | None = None
    """FrozenLake: rows and columns of a random map drawn by the seed; None is the standard map"""
    max_episode_steps: int | None = None
    """time limit of an episode; None is the environment's own, or 1,000 where it has none"""
    animate: bool = False
    """also write q_table.gif, the table at every report as a film"""


PRESETS: dict[str, dict[str, Any]] = {
    "FrozenLake8x8-v1": dict(total_timesteps=3_000_000, gamma=0.995, start_e=0.1, initial_value=1.0),
    "CliffWalking-v1": dict(  # as in Example 6.6 of Sutton & Barto, with a smaller alpha
        total_timesteps=100_000, gamma=1.0, learning_rate=0.1, lr_power=0.0, start_e=0.1, end_e=0.1,
    ),
    "Taxi-v4": dict(total_timesteps=300_000, lr_power=0.0, end_e=0.0),  # nothing is left to chance: alpha 1
    "Blackjack-v1": dict(total_timesteps=300_000, gamma=1.0),
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "eval_episodes", "learning_rate"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "lr_power"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "start_e", "end_e", "exploration_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.epsilon_decay == "exponential" and not (args.start_e > 0 and args.end_e > 0):
        fail("--epsilon-decay exponential never reaches 0; give --start-e and --end-e above 0, or use linear")
    if not math.isfinite(args.initial_value):
        fail(f"--initial-value must be finite, not {args.initial_value}")
    if args.map_size is not None and not (args.map_size >= 2 and args.env.startswith("FrozenLake")):
        fail("--map-size needs a FrozenLake environment and must be at least 2")
    if args.max_episode_steps is not None and args.max_episode_steps < 1:
        fail(f"--max-episode-steps must be positive, not {args.max_episode_steps}")


# 2. Environment ---------------------------------------------------------------------------------


def make_env(args: Args, **kwargs: Any) -> tuple[gym.Env, int]:
    """The environment without wrappers, and the time limit, which is ours to count.

    Ends the program with one line if there is no such environment or no table can be made for it.
    """
    if args.env.startswith("FrozenLake"):
        kwargs["is_slippery"] = args.is_slippery
        if args.map_size is not None:
            kwargs["desc"] = generate_random_map(args.map_size, seed=args.seed)
    try:
        spec = dataclasses.replace(gym.spec(args.env), order_enforce=False)
        env = gym.make(spec, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make the environment {args.env!r}: {error}")
    spaces = env.observation_space if isinstance(env.observation_space, gym.spaces.Tuple) else [env.observation_space]
    if not all(isinstance(space, Discrete) for space in (*spaces, env.action_space)):
        fail(f"{args.env} has observations {env.observation_space} and actions {env.action_space}; a table needs "
             "Discrete ones (or Tuples of Discrete observations); try dqn.py or ppo.py")  # fmt: skip
    return env, args.max_episode_steps or spec.max_episode_steps or 1_000


def table_rows(space: gym.Space) -> tuple[int, Callable[[Any], int]]:
    """The number of table rows S for a space, and the function from an observation to its row."""
    if isinstance(space, Discrete):
        first = int(space.start)
        return int(space.n), int if first == 0 else lambda obs: int(obs) - first
    parts = [(int(part.n), int(part.start)) for part in space]

    def row(obs: tuple[int, ...]) -> int:  # the digits of a number, each with its own base
        number = 0
        for digit, (base, first) in zip(obs, parts, strict=True):
            number = number * base + int(digit) - first
        return number

    return math.prod(base for base, _ in parts), row


# 3. Model ---------------------------------------------------------------------------------------

Table = list[list[float]]  # [S][A]; for one number at a time, Python's lists are faster than arrays


def new_table(num_states: int, num_actions: int, value: float) -> Table:
    return [[value] * num_actions for _ in range(num_states)]


def average(tables: list[Table]) -> np.ndarray:
    """The mean of one table, or of Double Q-learning's two, as an array [S, A]."""
    return np.mean(tables, axis=0)


# 4. The mathematics -----------------------------------------------------------------------------


def epsilon_greedy(q: list[float], epsilon: float) -> int:
    """A random action with probability epsilon, else the best one; between equals, chance decides."""
    if random.random() < epsilon:
        return int(random.random() * len(q))
    best = max(q)
    if q.count(best) == 1:
        return q.index(best)
    return random.choice([action for action, value in enumerate(q) if value == best])


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


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/episodic_return", "charts/exact_return", "charts/q_error",
          "losses/td_loss", "losses/q_values", "charts/epsilon")  # fmt: skip


def report_steps(total: int) -> list[int]:
    """When to report: at every twentieth of the run, and more often early, where most happens."""
    steps = np.concatenate([np.linspace(total / 20, total, 20), np.geomspace(total / 1000, total, 20)])
    return sorted(set(np.ceil(steps.round(6)).astype(int).tolist()))


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    seed_everything(args.seed)

    env, limit = make_env(args)
    num_states, row = table_rows(env.observation_space)
    num_actions, first_action = int(env.action_space.n), int(env.action_space.start)
    mdp = read_mdp(env, limit)  # measures how far the learner has come; the learner never sees it
    algorithm, gamma, prediction = args.algorithm, args.gamma, args.algorithm == "td0"
    given = given_policy(args.policy, mdp, gamma, num_states, num_actions) if prediction else None  # [S, A]
    truth = true_values(mdp, gamma, given) if mdp else None  # [S, A], or [S, 1] in TD(0)

    # One table; two in Double Q-learning; one with a single column, V, in TD(0).
    double, columns = algorithm == "double-q-learning", 1 if prediction else num_actions
    tables = [new_table(num_states, columns, args.initial_value) for _ in range(1 + double)]
    visits = new_table(num_states, columns, 0)
    history: dict[int, np.ndarray] = {}  # step: the table at that report
    if saved:
        if saved["tables"].shape != (len(tables), num_states, columns):
            fail("the saved tables do not fit these flags; use the environment and algorithm they were made for")
        tables, visits = saved["tables"].tolist(), saved["visits"].tolist()
        history = {step: table.numpy() for step, table in saved["history"].items()}
        random.setstate(saved["random"])

    def state() -> dict[str, Any]:
        return {"tables": torch.tensor(tables, dtype=torch.float64), "visits": torch.tensor(visits),
                "history": {step: torch.tensor(table) for step, table in history.items()},
                "random": random.getstate()}  # fmt: skip

    weights = given.tolist() if prediction else None

    def act(obs: int, epsilon: float) -> int:
        if prediction:
            return random.choices(range(num_actions), weights[obs])[0]
        if double:  # both tables have a say
            return epsilon_greedy([a + b for a, b in zip(tables[0][obs], tables[1][obs], strict=True)], epsilon)
        return epsilon_greedy(tables[0][obs], epsilon)

    threshold = gym.spec(args.env).reward_threshold
    curves = CURVES if mdp else tuple(name for name in CURVES if name not in ("charts/exact_return", "charts/q_error"))
    with RunRecord(args, args.env, args.total_timesteps, device, state, curves, saved, threshold) as run:
        step, reports = run.step, [at for at in report_steps(args.total_timesteps) if at > run.step]
        squares = entries = 0.0  # sums since the last report: squared errors, updated entries
        seed: int | None = args.seed * 10_000 + step
        q, judge = tables[0], tables[-1]
        while step < args.total_timesteps:
            obs, seed = row(env.reset(seed=seed)[0]), None  # seeded once, not in every episode
            epsilon = exploration(
                step / args.total_timesteps, args.start_e, args.end_e, args.exploration_fraction, args.epsilon_decay
            )
            action = act(obs, epsilon)
            episode_return, length, done = 0.0, 0, False
            while not done and step < args.total_timesteps:
                next_obs, reward, terminated, truncated, _ = env.step(first_action + action)
                next_obs = row(next_obs)
                next_action = act(next_obs, epsilon)
                step += 1
                length += 1
                episode_return += reward
                done = terminated or truncated or length == limit

                # Learn: move one entry of one table towards its target.
                if double and random.random() < 0.5:
                    q, judge = judge, q
                column = 0 if prediction else action
                visits[obs][column] = n = visits[obs][column] + 1
                target = td_target(
                    algorithm, reward, terminated, gamma, q[next_obs], next_action, epsilon, judge[next_obs]
                )
                error = target - q[obs][column]
                q[obs][column] += step_size(args.learning_rate, args.lr_power, n) * error
                squares += error * error
                entries += q[obs][column]
                obs, action = next_obs, next_action

                if step == reports[0]:
                    history[step] = table = average(tables)
                    exact = {f"charts/{name}": value for name, value in measure(mdp, truth, table, given).items()}
                    since = step - run.step
                    run.report(step, {"charts/epsilon": epsilon, "losses/td_loss": squares / since,
                                      "losses/q_values": entries / since, **exact})  # fmt: skip
                    squares = entries = 0.0
                    reports.pop(0)
            if done:
                run.episode(step, episode_return, length)

        env.close()
        table = average(tables)
        draw_tables(args, mdp, history, np.array(visits), run.folder)
        returns, results = evaluate(args, greedy_policy(table) if given is None else given, run.video_folder)
        if mdp:
            results |= measure(mdp, truth, table, given)
            results["optimal_return"] = float(mdp.start @ best_return(mdp.P, mdp.R, mdp.limit))
            results["start_value"] = float(mdp.start @ table.max(1))
            results["true_start_value"] = float(mdp.start @ truth.max(1))
        run.finish(lambda: returns, **results)
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------
# Where an environment shows its rules, dynamic programming (see dynamic_programming.py) says exactly
# how good the learned policy is, how good the best one, and how wrong the table still is.


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


def under_policy(P: np.ndarray, R: np.ndarray, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P_pi [S, S] and R_pi [S]: the world as it moves by itself when policy [S, A] picks the actions."""
    return np.einsum("sa,sat->st", policy, P), (policy * R).sum(1)


def evaluate_policy(P: np.ndarray, R: np.ndarray, gamma: float, policy: np.ndarray) -> np.ndarray:
    """The exact value of a policy, [S]: the solution V of (I - gamma * P_pi) V = R_pi."""
    P_pi, R_pi = under_policy(P, R, policy)
    return np.linalg.solve(np.eye(len(R_pi)) - gamma * P_pi, R_pi)


def expected_return(P: np.ndarray, R: np.ndarray, policy: np.ndarray, horizon: int) -> np.ndarray:
    """What policy [S, A] earns on average in its next `horizon` steps, undiscounted and exact, [S]."""
    P_pi, R_pi = under_policy(P, R, policy)
    values = np.zeros(len(R_pi))
    for _ in range(horizon):
        values = R_pi + P_pi @ values
    return values


def best_return(P: np.ndarray, R: np.ndarray, horizon: int) -> np.ndarray:
    """The most that any policy can earn in `horizon` steps, undiscounted and exact, [S]."""
    values = np.zeros(len(R))
    for _ in range(horizon):
        values = (R + P @ values).max(1)
    return values


def optimal_q(P: np.ndarray, R: np.ndarray, gamma: float) -> np.ndarray:
    """Q* by value iteration, [S, A]."""
    q = np.zeros_like(R)
    for _ in range(100_000):
        q, last_q = R + gamma * P @ q.max(1), q
        if np.abs(q - last_q).max() < 1e-12:
            break
    return q


def greedy_policy(q: np.ndarray) -> np.ndarray:
    """Probability 1 for the first best action of each state, [S, A]."""
    return np.eye(q.shape[1])[q.argmax(1)]


def given_policy(name: str, mdp: MDP | None, gamma: float, num_states: int, num_actions: int) -> np.ndarray:
    """The policy that --policy names, for TD(0) to judge, [S, A]."""
    if name == "random":
        return np.full((num_states, num_actions), 1 / num_actions)
    if name == "optimal":
        if mdp is None:
            fail("--policy optimal needs an environment that shows its rules; use random or a saved run")
        return greedy_policy(optimal_q(mdp.P, mdp.R, gamma))
    table = load_checkpoint(name)["tables"].mean(0).numpy()
    if table.shape != (num_states, num_actions):
        fail(f"the table in {name} is {table.shape}, but this environment needs {(num_states, num_actions)}")
    return greedy_policy(table)


def true_values(mdp: MDP, gamma: float, given: np.ndarray | None) -> np.ndarray:
    """What the table should become: Q* [S, A], or in TD(0) the value of the given policy [S, 1]."""
    if given is None:
        return optimal_q(mdp.P, mdp.R, gamma)
    try:
        return evaluate_policy(mdp.P, mdp.R, gamma, given)[:, None]
    except np.linalg.LinAlgError:
        fail("without discounting, a policy that never ends has no value; use a --gamma below 1")


def visitable(mdp: MDP) -> np.ndarray:
    """The states that an episode can come to, [S] bool."""
    reached, moves = mdp.start > 0, mdp.P.sum(1) > 0  # [S], [S, S]
    while (more := reached | reached @ moves).sum() > reached.sum():
        reached = more
    return reached


def measure(mdp: MDP | None, truth: np.ndarray | None, table: np.ndarray, given: np.ndarray | None) -> dict[str, float]:
    """Exact figures, where the rules are known.

    exact_return is what the greedy (TD(0): the given) policy earns on average within the time limit,
    undiscounted; on FrozenLake this is its probability of success. q_error is the largest error of the
    table in any state that can be visited and goes on.
    """
    if mdp is None:
        return {}
    policy = greedy_policy(table) if given is None else given
    counts = visitable(mdp) & ~mdp.terminal
    return {"exact_return": float(mdp.start @ expected_return(mdp.P, mdp.R, policy, mdp.limit)),
            "q_error": float(np.abs(table - truth)[counts].max())}  # fmt: skip


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a probability, given so many successes (Wilson 1927)."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return middle - half, middle + half


EVAL_SEED = 1_000_000_000  # far from every seed that training uses


def evaluate(args: Args, policy: np.ndarray, video_folder: Path | None = None) -> tuple[np.ndarray, dict[str, float]]:
    """Undiscounted returns [episodes] of policy [S, A], and its success rate with Wilson's 95 % interval.

    Success is to end where ending pays best, or, where the rules are not known, with a positive reward.
    """
    env, limit = make_env(args, render_mode="rgb_array") if video_folder else make_env(args)
    mdp, (_, row) = read_mdp(env, limit), table_rows(env.observation_space)
    first_action = int(env.action_space.start)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    rng = random.Random(EVAL_SEED + args.seed)
    actions, weights = range(policy.shape[1]), policy.tolist()
    returns, successes = np.zeros(args.eval_episodes), 0
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=EVAL_SEED + args.seed if episode == 0 else None)
        for _ in range(limit):
            action = rng.choices(actions, weights[row(obs)])[0]
            obs, reward, terminated, truncated, _ = env.step(first_action + action)
            returns[episode] += reward
            if terminated or truncated:
                break
        successes += terminated and bool(mdp.goal[obs] if mdp else reward > 0)
    env.close()
    low, high = wilson_interval(successes, len(returns))
    return returns, {"success_rate": successes / len(returns), "success_low": low, "success_high": high}


def evaluate_saved(args: Args) -> None:
    """--eval: plays the saved table (TD(0): the given policy) and prints the score."""
    validate(args)
    saved = load_checkpoint(args.eval)
    env, limit = make_env(args)
    mdp, table = read_mdp(env, limit), saved["tables"].mean(0).numpy()
    columns = 1 if args.algorithm == "td0" else int(env.action_space.n)
    if table.shape != (table_rows(env.observation_space)[0], columns):
        fail("the saved tables do not fit these flags; use the environment and algorithm they were made for")
    policy = greedy_policy(table)
    if args.algorithm == "td0":
        policy = given_policy(args.policy, mdp, args.gamma, len(table), int(env.action_space.n))
    folder = checkpoint_path(args.eval).parent
    returns, results = evaluate(args, policy, folder / "videos" if args.capture_video else None)
    if mdp:
        results["exact_return"] = float(mdp.start @ expected_return(mdp.P, mdp.R, policy, mdp.limit))
    print(" · ".join([f"{args.env}: {len(returns)} episodes, return {returns.mean():.4g} ± {returns.std():.2g}",
                      *(f"{name} {value:.4g}" for name, value in results.items()), str(folder)]))  # fmt: skip


def draw_tables(args: Args, mdp: MDP | None, history: dict[int, np.ndarray], visits: np.ndarray, folder: Path) -> None:
    """q_table.png, the table at six reports, and with --animate q_table.gif, the table at all of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    if not history:
        return
    on_map = mdp is not None and mdp.shape is not None
    seen = visits > 0  # entries that were never updated stay grey

    def shown(table: np.ndarray) -> np.ndarray:
        if not on_map:
            return np.where(seen, table, np.nan)  # [S, A]
        best = np.where(seen, table, -np.inf).max(1)
        return np.where(seen.any(1), best, np.nan).reshape(mdp.shape)  # [rows, columns]

    pictures = {step: shown(table) for step, table in history.items()}
    low, high = (pick(list(pictures.values())) for pick in (np.nanmin, np.nanmax))
    size = (0.42 * mdp.shape[1] + 0.3, 0.42 * mdp.shape[0] + 0.5) if on_map else (1.9, 4.5)

    def paint(axis: Any, step: int) -> Any:
        axis.clear()
        axis.set_title(f"step {step:,}", fontsize=9)
        axis.set(xticks=[], yticks=[], facecolor="0.85")
        image = axis.imshow(
            pictures[step], vmin=low, vmax=high, aspect="equal" if on_map else "auto", interpolation="nearest"
        )
        if on_map and history[step].shape[1] > 1:
            for s, q in enumerate(history[step]):
                if seen[s].any() and (q == q.max()).sum() == 1:  # a tie has no arrow
                    row, column = divmod(s, mdp.shape[1])
                    color = "black" if pictures[step][row, column] > (low + high) / 2 else "white"
                    axis.text(column, row, mdp.arrows[q.argmax()], ha="center", va="center", color=color)
        return image

    label = f"{args.env} · {args.algorithm} · " + ("best value of each state" if on_map else "Q(s, a), a row per state")
    steps = list(history)
    strip = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, 6)]
    columns = 6 if size[0] < 3 else 2
    rows = 6 // columns
    figsize = (size[0] * columns + 0.8, size[1] * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained")
    for axis, step in zip(axes.flat, strip, strict=True):
        image = paint(axis, step)
    figure.colorbar(image, ax=axes)
    figure.suptitle(label, fontsize=11)
    figure.savefig(folder / "q_table.png", dpi=120)
    plt.close(figure)

    if args.animate:
        figure, axis = plt.subplots(figsize=(size[0] * 1.6, size[1] * 1.6), layout="constrained")
        writer = PillowWriter(fps=5)
        with writer.saving(figure, str(folder / "q_table.gif"), dpi=100):
            for step in steps + steps[-1:] * 10:  # the last one stays for two seconds
                paint(axis, step)
                writer.grab_frame()
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
