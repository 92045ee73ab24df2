# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
# ///
"""Deep Q-networks (DQN), with the double, dueling, prioritised and n-step extensions.

DQN learns Q(s, a), the discounted return to expect after action a in state s, and plays the action
that promises most. It moves each prediction towards what was received plus the best prediction at
the next state. Two ideas keep this stable: learning from a memory of old transitions drawn at random
(replay), and taking the prediction at the next state from a slowly following copy (target network).

    target   y = r_t + ... + gamma^(n-1) r_(t+n-1) + gamma^n Q_target(s_(t+n), argmax_a Q(s_(t+n), a))
    minimise mean huber( y - Q(s_t, a_t) )   over transitions drawn from the replay memory

Papers   Mnih et al. 2015, Human-level control through deep RL, doi 10.1038/nature14236 (1312.5602)
         van Hasselt et al. 2016, Double Q-learning, arXiv 1509.06461
         Wang et al. 2016, Dueling Network Architectures, arXiv 1511.06581
         Schaul et al. 2016, Prioritized Experience Replay, arXiv 1511.05952
         Hessel et al. 2018, Rainbow (n-step returns), arXiv 1710.02298
         Dabney et al. 2021, Temporally-Extended epsilon-Greedy Exploration, arXiv 2006.01782

Run      python algos/dqn.py
         python algos/dqn.py --env LunarLander-v3
         python algos/dqn.py --env Acrobot-v1 --dueling --prioritized-replay-alpha 0.6
         python algos/dqn.py --no-double --n-step 1 --tau 1 --target-network-frequency 50     (plain DQN)
         python algos/dqn.py --no-double --n-step 1 --tau 1 --target-network-frequency 1      (no target network)
         python algos/dqn.py --no-double --n-step 1 --tau 0.1 --buffer-size 256               (no replay)
         python algos/dqn.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, ten seeds which nothing was tuned on:
         python benchmarks/run.py scores --only dqn --first-seed 301, torch 2.13.
         Two runs at a time on two cores of an Intel Xeon.

                          steps    mean    worst   threshold reached, seconds to it
         CartPole-v1       640k   500.0    500.0   475 by 10 of 10, median 1.9, slowest 2.8
         LunarLander-v3    1.2M   238.3    203.3   200 by 10 of 10, median 38, slowest 60
         Acrobot-v1        600k   -87.2    -93.4   -100 by 10 of 10, median 37, slowest 42
         MountainCar-v0    300k  -103.8   -110.7   -110 by 7 of 10, median 20, slowest 23; greedily 8 of 10

         What replay and the target network do: python benchmarks/run.py dqn. GPU: not measured yet.

Deviations from the papers
 1. Several environments are stepped in parallel, and the target network follows a little at every
    gradient step (--tau) instead of being copied now and then.
 2. The learning rate is annealed to zero: without it the policy of a good moment is often lost again.
 3. Only termination ends the return. An episode cut by a time limit, or whose n-step return would
    reach beyond the newest step, is bootstrapped from the true observation there.
 4. n-step returns are not corrected for the exploring actions in them (nor are Rainbow's).
 5. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled): it
    brings returns to the size at which the network learns quickly.
 6. Dueling heads are linear on one shared trunk; Wang et al. give each a hidden layer of its own.
 7. --repeat-random draws the length of an exploring move from a geometric distribution, Dabney et al.
    from a heavy-tailed one. Of 4,000 random episodes of MountainCar 9 % reach the goal at 0.95 and none at 0.
 8. The replay memory is not saved: after --resume, learning-starts steps fill it before learning goes on.
"""

from __future__ import annotations

import copy
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from tqdm import tqdm

NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "CartPole-v1"  # gymnasium id of the environment, for example LunarLander-v3; actions must be discrete
    seed: int = 1  # seed of every random number: network, actions, replay, environments
    total_timesteps: int = 1_000_000  # environment steps to train for, over all parallel environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # the CPU is faster than a GPU for networks this small
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 100  # greedy episodes played after training, on seeds never trained on

    num_envs: int = 64  # environments stepped in parallel (N)
    buffer_size: int = 100_000  # transitions that the replay memory holds before it forgets the oldest
    learning_starts: int = 2000  # environment steps that fill the memory before the first gradient step
    train_frequency: int = 64  # environment steps, over all environments, per gradient step
    batch_size: int = 128  # transitions per gradient step (B)
    learning_rate: float = 2e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    max_grad_norm: float = 10.0  # the gradient's norm is scaled down to at most this
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    n_step: int = 3  # rewards summed before bootstrapping; 1 is the plain temporal difference
    target_network_frequency: int = 1  # gradient steps between two updates of the target network
    tau: float = 0.01  # share of the online network in such an update; 1 copies it
    start_e: float = 1.0  # share of random actions (epsilon) at the start
    end_e: float = 0.01  # share of random actions after the exploration phase
    exploration_fraction: float = 0.1  # share of the training over which epsilon falls from start-e to end-e
    repeat_random: float = 0.0  # chance that a random action repeats the one before it; near 1 makes long moves
    double: bool = True  # choose the next action with the online network, value it with the target network
    dueling: bool = False  # predict the state's value and each action's advantage, and add them
    prioritized_replay_alpha: float = 0.0  # exponent on a transition's last error in its chance to be drawn; 0: uniform
    prioritized_replay_beta: float = 0.4  # exponent of the importance weights at the start; it grows to 1
    reward_scale: float = 1.0  # factor on rewards inside the learner; aim at returns of the order of 10
    hidden: int = 64  # units in each of the two hidden layers

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "num_envs", "train_frequency", "batch_size")
        check(self, "> 0", "learning_rate", "max_grad_norm", "n_step", "target_network_frequency", "tau")
        check(self, "> 0", "reward_scale", "hidden")
        check(self, ">= 0", "learning_starts")
        check(self, "in [0, 1]", "gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_random")
        check(self, "in [0, 1]", "prioritized_replay_alpha", "prioritized_replay_beta")
        if self.buffer_size < 2 * self.num_envs:
            fail(f"--buffer-size must hold two steps of every environment, {2 * self.num_envs} at least")


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=640_000, buffer_size=300_000, train_frequency=256, batch_size=256, learning_rate=8e-3,
        gamma=0.995, n_step=15, tau=0.04, reward_scale=0.05,
    ),
    "LunarLander-v3": dict(total_timesteps=1_200_000, buffer_size=400_000, reward_scale=0.05, hidden=128),
    "Acrobot-v1": dict(
        total_timesteps=600_000, num_envs=32, buffer_size=600_000, train_frequency=32, n_step=1, tau=0.005,
        reward_scale=0.1,
    ),
    "MountainCar-v0": dict(
        total_timesteps=300_000, num_envs=16, train_frequency=16, learning_rate=4e-3, n_step=10, tau=0.0125,
        end_e=0.02, exploration_fraction=0.2, repeat_random=0.95, reward_scale=0.1,
    ),
}  # fmt: skip


# 2. Environment ---------------------------------------------------------------------------------


class WithoutInfo(gym.Wrapper):
    """Drops the info dictionaries: nobody reads them here, and not all of them can be stacked."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, _ = self.env.reset(**kwargs)
        return obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {}


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One environment with observations [D]; ends the program with one line if it cannot be made."""
    kwargs = {"render_mode": render_mode} if render_mode else {}  # not every constructor takes it
    try:
        env = WithoutInfo(gym.make(env_id, disable_env_checker=True, **kwargs))
        gym.spec(env_id.split(":")[-1])  # make() guesses a missing version, spec() does not
        if len(env.observation_space.shape or ()) == 3:
            fail(f"{env_id} shows pictures; algos/dqn_atari.py learns from pixels, this script from vectors")
        if len(env.observation_space.shape or ()) != 1:
            env = gym.wrappers.FlattenObservation(env)
    except Exception as error:  # whatever the environment's own code raises
        fail(f"cannot make the environment {env_id!r}: {error}")
    if not isinstance(env.action_space, Discrete):
        fail(f"{env_id} has the action space {env.action_space}; this script handles Discrete; see ppo.py")
    return env


def try_env(env_id: str, film: bool) -> gym.Env:
    """An environment that has been reset and stepped once: what fails, fails before anything is trained."""
    env = make_env(env_id, "rgb_array" if film else None)
    try:
        env.reset(seed=0)
        env.action_space.seed(0)
        obs, reward, *_ = env.step(env.action_space.sample())
        assert np.shape(obs) == env.observation_space.shape, f"an observation of shape {np.shape(obs)}"
        assert np.shape(reward) == (), f"a reward of shape {np.shape(reward)}, where a number is expected"
        assert not film or np.ndim(env.render()) == 3, "no rgb_array to film"
    except Exception as error:  # whatever the environment's own code raises
        fail(f"{env_id} cannot be played: {type(error).__name__}: {error}")
    return env


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """N environments that reset in NEXT_STEP mode, in their own vectorised version if they have one (CartPole).

    In this mode the step after an episode's end ignores the action and returns the first observation of the
    next episode. That row is no transition; in return obs[t + 1] is always the true successor of obs[t].
    """
    one = make_env(env_id)
    if one.spec.vector_entry_point:
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
        spaces = envs.single_observation_space, envs.single_action_space
        if spaces == (one.observation_space, one.action_space) and envs.metadata.get("autoreset_mode") == NEXT_STEP:
            return envs
    return gym.vector.SyncVectorEnv([lambda: make_env(env_id)] * num_envs, autoreset_mode=NEXT_STEP)


# 3. Model ---------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """Two ReLU layers from an observation to the value of each action."""

    def __init__(self, obs_dim: int, num_actions: int, hidden: int, dueling: bool):
        super().__init__()
        self.dueling = dueling
        layers = [nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, num_actions + dueling)]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, obs: Tensor) -> Tensor:  # [B, D] -> [B, A]
        return combine_dueling(self.net(obs)) if self.dueling else self.net(obs)

    def values(self, obs: np.ndarray) -> np.ndarray:
        """The values [N, A] at observations [N, D], as forward gives them; so small a batch is faster in NumPy."""
        x = obs
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                x = x @ layer.weight.detach().cpu().numpy().T + layer.bias.detach().cpu().numpy()
            else:
                x = np.maximum(x, 0)
        return combine_dueling(x) if self.dueling else x


# 4. The mathematics -----------------------------------------------------------------------------


def combine_dueling(heads: Any) -> Any:
    """Q = V + A - mean A (Eq. 9, Wang 2016); heads [B, 1 + A], tensor or array, hold V and A."""
    value, advantages = heads[:, :1], heads[:, 1:]
    return value + advantages - advantages.mean(1)[:, None]


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From start at step 0 in a straight line to end at step duration, and end from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def n_step_return(
    rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Folds n successive steps into one: returns [B], discounts [B], horizons [B].

    rewards, terminated, truncated are [n, B], row 0 being the transition itself. The sum stops with the
    row that ends the episode; rows beyond it belong to another episode and do not count. horizons
    says how many rows count, so that the target is
    returns + discounts * Q(observation after horizons steps): 0 after a termination, else gamma^horizon.
    """
    alive = np.ones(rewards.shape, bool)  # [n, B], the row belongs to the episode of row 0
    alive[1:] = ~np.logical_or.accumulate(terminated[:-1] | truncated[:-1])
    powers = gamma ** np.arange(len(rewards) + 1, dtype=np.float32)
    returns = powers[:-1] @ (rewards * alive)
    horizons = alive.sum(0)
    discounts = powers[horizons] * ~(terminated & alive).any(0)
    return returns, discounts, horizons


def td_target(returns: Tensor, discounts: Tensor, next_q: Tensor, next_q_online: Tensor | None = None) -> Tensor:
    """What Q(s, a) should have been, [B]; returns and discounts are [B], next_q [B, A] the target network's.

    The best action there is the target network's own choice (Eq. 2, Mnih 2015) or, if next_q_online
    [B, A] is given, the online network's: the one that picks is then not the one that values, and
    the maximum over noisy values is no longer too high (double Q-learning, Eq. 4, van Hasselt 2016).
    """
    chosen = (next_q if next_q_online is None else next_q_online).argmax(1, keepdim=True)  # [B, 1]
    best = next_q.gather(1, chosen).squeeze(1)
    assert returns.shape == discounts.shape == best.shape
    return returns + discounts * best


def td_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean Huber error, all [B]: its gradient is the error clipped to [-1, 1] (Methods, Mnih 2015)."""
    assert predictions.shape == targets.shape
    if weights is None:
        return huber_loss(predictions, targets)
    assert weights.shape == targets.shape
    return (weights * huber_loss(predictions, targets, reduction="none")).mean()


@torch.no_grad()
def update_target(online: nn.Module, target: nn.Module, tau: float) -> None:
    """Moves the target network by the share tau towards the online one; tau 1 copies it."""
    for follower, leader in zip(target.parameters(), online.parameters(), strict=True):
        follower.lerp_(leader, tau)


class Replay:
    """The latest steps of N environments: a ring of T rows, one row a step, arrays [T, N, ...].

    Row t + 1 holds what followed row t. So each observation is stored once, and n-step returns are
    folded when drawn: every transition is at hand as soon as it was played. The row at head has an
    observation and no action yet. Rows that only reset an environment (see make_envs) are not valid.
    """

    def __init__(self, size: int, num_envs: int, obs_shape: tuple[int, ...]):
        self.N, self.T = num_envs, math.ceil(size / num_envs) + 1
        self.head, self.rows = 0, 0  # where the next step goes; how many rows before it are filled
        needed = self.T * self.N * 4 * math.prod(obs_shape)
        try:
            self.obs = np.zeros((self.T, self.N, *obs_shape), np.float32)  # takes up memory as it fills
        except (MemoryError, ValueError):
            fail(f"no memory for a replay of {size:,} transitions, {needed / 2**30:,.1f} GiB; lower --buffer-size")
        self.actions = np.zeros((self.T, self.N), np.int64)
        self.rewards = np.zeros((self.T, self.N), np.float32)
        self.terminated, self.truncated, self.valid = np.zeros((3, self.T, self.N), bool)

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        """Completes the row at head, all [N], and starts the next one with next_obs [N, ...]."""
        t = self.head
        self.actions[t], self.rewards[t], self.valid[t] = actions, rewards, valid
        self.terminated[t], self.truncated[t] = terminated, truncated
        self.head = (t + 1) % self.T
        self.rows = min(self.rows + 1, self.T - 1)
        self.obs[self.head] = next_obs

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The places t and n, [B] each, of transitions drawn uniformly."""
        t = (self.head - 1 - rng.integers(self.rows, size=count)) % self.T
        n = rng.integers(self.N, size=count)
        again = np.flatnonzero(~self.valid[t, n])
        if len(again):
            t[again], n[again] = self.draw(len(again), rng)
        return t, n

    def batch(self, t: np.ndarray, n: np.ndarray, n_step: int, gamma: float) -> tuple[np.ndarray, ...]:
        """The transitions [B] that start at these places: obs, actions, returns, discounts, next_obs."""
        k = np.arange(n_step)[:, None]
        rows = (t + k) % self.T  # [n, B]
        newest = k == (self.head - 1 - t) % self.T  # nothing follows: bootstrap from the current observation
        cut = self.truncated[rows, n] | newest
        returns, discounts, horizons = n_step_return(self.rewards[rows, n], self.terminated[rows, n], cut, gamma)
        return self.obs[t, n], self.actions[t, n], returns, discounts, self.obs[(t + horizons) % self.T, n]


class PrioritizedReplay(Replay):
    """Draws a transition with a probability in proportion to its priority, |last error|^alpha (Schaul 2016).

    A new one gets the largest priority so far. A draw finds first a row of the ring and then a place in the
    row, each in a cumulative sum: in NumPy as fast as a sum tree, which needs a loop over its levels.
    """

    def __init__(self, size: int, num_envs: int, obs_shape: tuple[int, ...], alpha: float):
        super().__init__(size, num_envs, obs_shape)
        self.alpha, self.largest = alpha, 1.0
        self.priorities = np.zeros((self.T, self.N))  # 0 where there is no transition

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        self.priorities[self.head] = self.largest * valid
        super().add(actions, rewards, terminated, truncated, valid, next_obs)
        self.priorities[self.head] = 0

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places as Replay.draw gives them; one row from each of count equal parts of the sum (Appendix B.2.1)."""
        shares = (np.arange(count) + 1 - rng.random(count)) / count  # in (0, 1]
        sums = self.priorities.sum(1).cumsum()  # [T]
        t = sums.searchsorted(shares * sums[-1])
        sums = self.priorities[t].cumsum(1)  # [B, N]
        shares = 1 - rng.random(count)
        n = (sums < (shares * sums[:, -1])[:, None]).sum(1)
        return t, n

    def weights(self, t: np.ndarray, n: np.ndarray, beta: float) -> np.ndarray:
        """Importance weights P^-beta over their maximum, [B]: at beta 1 they undo the draw's bias (Section 3.4)."""
        priorities = self.priorities[t, n]
        return ((priorities / priorities.min()) ** -beta).astype(np.float32)

    def update(self, t: np.ndarray, n: np.ndarray, errors: np.ndarray) -> None:
        """Takes note of the newest errors [B] (Eq. 1); the small constant keeps every transition drawable."""
        self.priorities[t, n] = (np.abs(errors) + 1e-6) ** self.alpha
        self.largest = max(self.largest, self.priorities[t, n].max())


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    device = pick_device(args.device)
    env = try_env(args.env, args.capture_video)
    obs_shape, space, num_actions = env.observation_space.shape, env.action_space, int(env.action_space.n)
    q_net = QNetwork(obs_shape[0], num_actions, args.hidden, args.dueling).to(device)
    target_net = copy.deepcopy(q_net)
    parameters = list(q_net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=device.type != "mps")
    parts = {"q_net": q_net, "target_net": target_net, "optimizer": optimizer}
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, **parts)
    if args.eval:
        return run.finish(**evaluate(args, q_net, run.folder))

    rng, N, alpha = np.random.default_rng([args.seed, run.step]), args.num_envs, args.prioritized_replay_alpha
    sizes = (args.buffer_size, N, obs_shape)
    replay = PrioritizedReplay(*sizes, alpha) if alpha else Replay(*sizes)
    envs = make_envs(args.env, N)
    obs, _ = envs.reset(seed=int(rng.integers(10**9)))
    replay.obs[replay.head] = obs
    ended, random_actions = np.zeros(N, bool), np.zeros(N, int)
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)
    losses, q_values = [], []
    step, learning_starts = run.step, run.step + args.learning_starts

    with run:
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            exploration = args.exploration_fraction * args.total_timesteps
            epsilon = linear_schedule(args.start_e, args.end_e, exploration, step)

            # Play one step of every environment.
            repeats = rng.random(N) < args.repeat_random
            random_actions = np.where(repeats, random_actions, rng.integers(num_actions, size=N))
            actions = np.where(rng.random(N) < epsilon, random_actions, q_net.values(obs).argmax(1))
            obs, rewards, terminated, truncated, _ = envs.step(actions + space.start)
            valid = ~ended  # the row after an episode's end only resets
            replay.add(actions, rewards * args.reward_scale, terminated, truncated, valid, obs)
            ended = terminated | truncated
            before, step = step, step + int(valid.sum())
            episode_return += rewards
            episode_length += valid
            for n in np.flatnonzero(ended):
                run.episode(episode_return[n], episode_length[n])
                episode_return[n] = episode_length[n] = 0

            # Learn: one gradient step for every train_frequency environment steps.
            updates = range(before // args.train_frequency, step // args.train_frequency)
            for update in updates if step >= learning_starts else ():
                t, n = replay.draw(args.batch_size, rng)
                batch = replay.batch(t, n, args.n_step, args.gamma)
                b_obs, b_actions, b_returns, b_discounts, b_next_obs = (torch.from_numpy(x).to(device) for x in batch)
                weights = None
                if alpha:
                    beta = linear_schedule(args.prioritized_replay_beta, 1, args.total_timesteps, step)
                    weights = torch.from_numpy(replay.weights(t, n, beta)).to(device)
                with torch.no_grad():
                    next_q_online = q_net(b_next_obs) if args.double else None
                    targets = td_target(b_returns, b_discounts, target_net(b_next_obs), next_q_online)
                predictions = q_net(b_obs).gather(1, b_actions[:, None]).squeeze(1)  # [B]
                loss = td_loss(predictions, targets, weights)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                if update % args.target_network_frequency == 0:
                    update_target(q_net, target_net, args.tau)
                if alpha:
                    replay.update(t, n, (targets - predictions).detach().cpu().numpy())
                losses.append(loss.detach())
                q_values.append(predictions.detach())

            if step - run.step >= args.total_timesteps / 200 or step >= args.total_timesteps:
                run.report(step, {
                    "charts/learning_rate": lr, "charts/epsilon": epsilon,
                    "losses/td_loss": torch.stack(losses).mean().item() if losses else None,
                    "losses/q_values": torch.cat(q_values).mean().item() / args.reward_scale if losses else None,
                })  # fmt: skip
                losses, q_values = [], []

    envs.close()
    return run.finish(**evaluate(args, q_net, run.folder))


# 6. Evaluation ----------------------------------------------------------------------------------


def evaluate(args: Args, q_net: QNetwork, folder: Path) -> dict[str, Any]:
    """Undiscounted returns of greedy episodes, all played at once on seeds of their own, [episodes].

    predicted_return is Q at their first states, obtained_return the discounted return that followed: the
    difference is by how much the network over-estimates. What a time limit cut off counts as predicted.
    """
    N = args.eval_episodes
    envs = [make_env(args.env, "rgb_array" if args.capture_video and n == 0 else None) for n in range(N)]
    if args.capture_video:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(folder / "videos"), disable_logger=True)
    limit, start = envs[0].spec.max_episode_steps or 10_000, envs[0].action_space.start
    obs = np.stack([env.reset(seed=10**9 + args.seed + n)[0] for n, env in enumerate(envs)]).astype(np.float32)
    q = q_net.values(obs) / args.reward_scale  # [N, A]
    returns, predicted, obtained, alive = np.zeros(N), q.max(1), np.zeros(N), np.arange(N)
    for t in range(limit):
        rewards, terminated, truncated = np.zeros(N), np.zeros(N, bool), np.zeros(N, bool)
        for n in alive:
            obs[n], rewards[n], terminated[n], truncated[n], _ = envs[n].step(q[n].argmax() + start)
        q[alive] = q_net.values(obs[alive]) / args.reward_scale
        returns += rewards
        obtained += args.gamma**t * (rewards + args.gamma * q.max(1) * (truncated & ~terminated))
        alive = alive[~(terminated | truncated)[alive]]
        if len(alive) == 0:
            break
    else:
        print(f"{len(alive)} of {N} evaluation episodes were cut after {limit:,} steps")
    for env in envs:
        env.close()
    return dict(returns=returns, predicted_return=float(predicted.mean()), obtained_return=float(obtained.mean()))


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
