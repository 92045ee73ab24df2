# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
# ///
"""Soft actor-critic (SAC) for continuous actions.

SAC learns Q(s, a) from a replay memory, as DQN does. Where actions are continuous nobody can try them all
to find the best, so a second network, the actor, learns to propose what the critics value. It is paid for
staying random as well: every nat of entropy is worth alpha. That keeps it exploring without any schedule,
and alpha, the temperature, adjusts itself so that the entropy stays at a target.

    target   y = r + gamma ( min_k Q_target_k(s', a') - alpha log pi(a' | s') ),   a' drawn from pi(. | s')
    critics  minimise  mean ( Q_k(s, a) - y )^2   over transitions drawn from the replay memory
    actor    maximise  mean ( min_k Q_k(s, a) - alpha log pi(a | s) ),   a = tanh(mean(s) + std(s) * noise)

Papers   Haarnoja et al. 2018a, Soft Actor-Critic, arXiv 1801.01290
         Haarnoja et al. 2018b, Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905
         Fujimoto et al. 2018, Addressing Function Approximation Error (two critics), arXiv 1802.09477
         Pardo et al. 2017, Time Limits in Reinforcement Learning, arXiv 1712.00378

Run      python algos/sac.py
         python algos/sac.py --env LunarLanderContinuous-v3
         python algos/sac.py --env BipedalWalker-v3
         python algos/sac.py --no-autotune --alpha 0.02                (the first paper's fixed temperature)
         python algos/sac.py --num-critics 1                           (what the second critic is for)
         python algos/sac.py --tau 1                                   (no target critics)
         python algos/sac.py --train-frequency 1                       (the papers' one gradient step per step)
         python algos/sac.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, ten seeds which nothing was tuned on:
         python benchmarks/run.py scores --only algos/sac.py --first-seed 301, torch 2.13, one core of an Intel
         Xeon, beside other work on the other core.

                                     steps    mean    worst   threshold reached, seconds to it
         Pendulum-v1                   30k  -142.0   -145.5   (has none) -200 by 10 of 10 after 25,600 steps,
                                                              median 9.6, slowest 12.2
         MountainCarContinuous-v0      50k    94.2     93.9    90 by 10 of 10, median 9.0, slowest 9.3
         LunarLanderContinuous-v3     500k   279.1    265.5   200 by 8 of 10, median 61, slowest 121; greedily by all
         BipedalWalker-v3, 5 seeds    800k   316.9    309.1   300 by 4 of 5, median 1,125; 25 to 28 minutes a run
         The default run takes 15 to 22 s from Enter to the prompt. In training the policy's noise keeps some landers
         from coming to rest, so two seeds' mean stays below 200 to the end.

         MuJoCo (pip install "gymnasium[mujoco]"), 200k steps, 8 to 17 minutes, python benchmarks/run.py mujoco
         --only algos/sac.py --seeds 3 (10 on HalfCheetah), mean (worst). At equal steps, Stable-Baselines3's SAC takes
         43 to 85 minutes. HalfCheetah-v5 6,379 (5,287), theirs 7,027 (two seeds); of the others theirs is one seed:
         Hopper-v5 1,856 (316: one of three still falls early), theirs 1,712; Walker2d-v5 1,882 (1,392), theirs 1,903;
         Ant-v5 921 (727), theirs 764.
         Other environments start from the defaults.
         GPU: not measured yet.

Deviations from the papers
 1. Several environments are stepped in parallel, and there are fewer gradient steps than environment steps
    (--train-frequency). The actor and the temperature learn at every second or third one (--policy-frequency).
 2. The learning rate is annealed to zero: without it the policy of a good moment is often lost again.
 3. Only termination ends the return. An episode cut by a time limit, or whose n-step return would
    reach beyond the newest step, is bootstrapped from the true observation there.
 4. n-step returns are neither corrected for the older policy that acted in them nor credited with its entropy.
 5. The policy acts from the first step on, without a phase of uniform actions: untrained it is nearly uniform.
 6. Density and target entropy are those of actions in [-1, 1], which to_env stretches to the environment's
    bounds: its units change nothing. The target is the paper's -1 nat per dimension, or 0 (a standard deviation
    of about a quarter) where rewards are hard to find: at -1 LunarLander hovers long before it learns to land.
 7. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled): it brings
    returns to the size at which the networks learn quickly. The temperature is in the same units.
 8. --repeat-noise holds the actor's noise for some steps (correlated noise helps: Eberhard et al. 2023, Pink Noise
    Is All You Need). On MountainCarContinuous a first policy so moves far enough to be rewarded, and Hopper, on two
    seeds of three instead of one, gets beyond a first leap that ends in a fall.
 9. The replay memory is not saved: after --resume, learning-starts steps fill it before learning goes on.
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
from gymnasium.spaces import Box
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from tqdm import tqdm

NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "Pendulum-v1"  # gymnasium id of the environment, for example BipedalWalker-v3; actions must be a Box
    seed: int = 1  # seed of every random number: networks, actions, replay, environments
    total_timesteps: int = 300_000  # environment steps to train for, over all parallel environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # the CPU is faster than a GPU for networks this small
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 100  # greedy episodes played after training, on seeds never trained on

    num_envs: int = 16  # environments stepped in parallel (N)
    buffer_size: int = 1_000_000  # transitions that the replay memory holds before it forgets the oldest
    learning_starts: int = 5000  # environment steps that fill the memory before the first gradient step
    train_frequency: float = 4.0  # environment steps, over all environments, per gradient step; 0.5 makes two a step
    batch_size: int = 256  # transitions per gradient step (B)
    learning_rate: float = 1e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    n_step: int = 1  # rewards summed before bootstrapping; 1 is the plain temporal difference
    tau: float = 0.01  # share of the online critics that the target critics take over at each gradient step; 1 copies
    policy_frequency: int = 2  # gradient steps of the critics per gradient step of the actor and the temperature
    num_critics: int = 2  # critics (K), of which the least counts; 1 over-estimates
    alpha: float = 0.1  # temperature at the start: what a nat of entropy is worth, in rewards (scaled)
    autotune: bool = True  # learn the temperature; without it alpha stays what it is
    target_entropy: float = -1.0  # entropy to hold, in nats per action dimension, of actions in [-1, 1]
    repeat_noise: float = 0.0  # chance that a step's noise is that of the step before; near 1 makes long moves
    bootstrap_truncated: bool = True  # --no-bootstrap-truncated treats a time limit as a death
    reward_scale: float = 1.0  # factor on rewards inside the learner; aim at returns of the order of 10
    layer_norm: bool = False  # normalise the critics' hidden layers
    hidden: int = 256  # units in each of the two hidden layers of actor and critics

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "num_envs", "train_frequency", "batch_size")
        check(self, "> 0", "learning_rate", "n_step", "tau", "policy_frequency", "num_critics", "alpha", "reward_scale")
        check(self, "> 0", "hidden")
        check(self, ">= 0", "learning_starts")
        check(self, "in [0, 1]", "gamma", "tau", "repeat_noise")
        if self.buffer_size < 2 * self.num_envs:
            fail(f"--buffer-size must hold two steps of every environment, {2 * self.num_envs} at least")


PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": dict(
        total_timesteps=30_000, learning_starts=600, train_frequency=10, batch_size=128, learning_rate=7e-3,
        gamma=0.97, tau=0.05, policy_frequency=3, reward_scale=0.1, hidden=64,
    ),
    "LunarLanderContinuous-v3": dict(
        total_timesteps=500_000, num_envs=32, buffer_size=100_000, train_frequency=16, batch_size=128,
        learning_rate=2e-3, n_step=8, policy_frequency=1, alpha=0.03, target_entropy=0.0, reward_scale=0.05,
        hidden=128,
    ),
    "BipedalWalker-v3": dict(
        total_timesteps=800_000, train_frequency=2, batch_size=128, n_step=3, num_critics=1, target_entropy=-0.5,
        layer_norm=True, hidden=128,
    ),
    "MountainCarContinuous-v0": dict(
        total_timesteps=50_000, train_frequency=8, batch_size=128, learning_rate=3e-3, tau=0.02, target_entropy=0.0,
        repeat_noise=0.95, reward_scale=0.1, hidden=64,
    ),
}  # fmt: skip
ROBOT = dict(total_timesteps=200_000, train_frequency=2, batch_size=128)
PRESETS |= {  # they need pip install "gymnasium[mujoco]"
    "HalfCheetah-v5": ROBOT,
    "Hopper-v5": ROBOT | dict(repeat_noise=0.7),
    "Walker2d-v5": ROBOT,
    "Ant-v5": ROBOT,
}


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
    if not isinstance(env.action_space, Box):
        fail(f"{env_id} has the action space {env.action_space}; this script handles Box; see ppo.py and dqn.py")
    if not env.action_space.is_bounded():
        fail(f"{env_id} has actions without a bound, {env.action_space}; a squashed policy needs one; see ppo.py")
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


def to_env(space: Box, actions: np.ndarray) -> np.ndarray:
    """The environment's form of the policy's actions [N, A]: [-1, 1] becomes [low, high]; integers are rounded."""
    low, high = space.low.astype(float), space.high.astype(float)
    actions = actions.reshape(-1, *space.shape).astype(float)
    actions = (low * (1 - actions) + high * (1 + actions)) / 2  # no high - low, which may overflow
    return (np.rint(actions) if np.issubdtype(space.dtype, np.integer) else actions).astype(space.dtype)


# 3. Model ---------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Two ReLU layers from an observation to a Gaussian, whose samples are squashed to (-1, 1) by tanh.

    At first the Gaussian is a standard one in every state, and the squashed actions are nearly uniform: the
    untrained policy explores. The temperature is kept here too.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, alpha: float):
        super().__init__()
        layers = [nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * action_dim)]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        nn.init.orthogonal_(layers[2].weight, 0.01)
        nn.init.zeros_(layers[2].bias)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, A] drawn at observations [B, D], and their log densities [B]; differentiable."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return squash(mean, log_std.clamp(-5, 2), torch.randn_like(mean))

    def act(self, obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions [N, A] at observations [N, D], drawn with standard normal noise [N, A]; with 0 the greedy ones.

        So small a batch is faster in NumPy.
        """
        x = obs
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                x = x @ layer.weight.detach().cpu().numpy().T + layer.bias.detach().cpu().numpy()
            else:
                x = np.maximum(x, 0)
        mean, log_std = np.split(x, 2, axis=1)
        return np.tanh(mean + np.exp(log_std.clip(-5, 2)) * noise)


class Critics(nn.Module):
    """K networks of two ReLU layers from an observation and an action to Q."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, num_critics: int, normalise: bool):
        super().__init__()

        def layer(inputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, hidden), *([nn.LayerNorm(hidden)] if normalise else []), nn.ReLU()]

        layers = [[*layer(obs_dim + action_dim), *layer(hidden), nn.Linear(hidden, 1)] for _ in range(num_critics)]
        self.nets = nn.ModuleList(nn.Sequential(*net) for net in layers)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:  # [B, D], [B, A] -> [K, B]
        inputs = torch.cat([obs, actions], 1)
        return torch.stack([net(inputs).squeeze(1) for net in self.nets])

    @torch.no_grad()
    def values(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The least of the critics' values [N], at observations [N, D] and actions [N, A]."""
        device = self.nets[0][0].weight.device
        inputs = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (obs, actions))
        return self(*inputs).min(0).values.cpu().numpy()


# 4. The mathematics -----------------------------------------------------------------------------


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The action tanh(u) with u = mean + std * noise, all [B, A], and its log density, [B].

    A change of variables (Appendix C, Haarnoja 2018b): the density of u over tanh'(u) = 1 - tanh(u)^2, whose
    logarithm is written as 2 (log 2 - u - softplus(-2u)), which stays exact where 1 - tanh^2 rounds to 0.
    """
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - softplus(-2 * u))
    return u.tanh(), (gaussian - log_slope).sum(-1)


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


def soft_target(returns: Tensor, discounts: Tensor, next_q: Tensor, next_logprobs: Tensor, alpha: Tensor) -> Tensor:
    """What Q(s, a) should have been, [B]: what was received plus the discounted soft value of the next state.

    returns, discounts, next_logprobs are [B]; next_q [K, B] the target critics', at an action of today's policy
    with these log densities. The soft value is Q - alpha log pi (Eq. 3, Haarnoja 2018a), and the least
    of the critics is taken because the actor seeks out what a single one over-estimates (Fujimoto 2018).
    """
    soft_values = next_q.min(0).values - alpha * next_logprobs
    assert returns.shape == discounts.shape == soft_values.shape == next_logprobs.shape
    return returns + discounts * soft_values


def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each critic [K, B] against the targets [B], summed over the critics (Eq. 5)."""
    assert q.shape[1:] == targets.shape
    return len(q) * mse_loss(q, targets.expand_as(q))


def actor_loss(q: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """Minus the soft value of the policy's own actions (Eq. 7, Haarnoja 2018b); q [K, B], logprobs [B]."""
    assert q.shape[1:] == logprobs.shape
    return (alpha * logprobs - q.min(0).values).mean()


def temperature_loss(log_alpha: Tensor, logprobs: Tensor, target_entropy: float) -> Tensor:
    """Its gradient with respect to log alpha is entropy minus target: below the target alpha grows (Eq. 18).

    The paper differentiates alpha * (...) instead, whose gradient with respect to log alpha is this one times
    alpha and fades as alpha does; the authors' code and most others do it this way.
    """
    return -(log_alpha * (logprobs.detach().mean() + target_entropy))


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

    def __init__(self, size: int, num_envs: int, obs_dim: int, action_dim: int):
        self.N, self.T = num_envs, math.ceil(size / num_envs) + 1
        self.head, self.rows = 0, 0  # where the next step goes; how many rows before it are filled
        needed = self.T * self.N * 4 * (obs_dim + action_dim)
        try:
            self.obs = np.zeros((self.T, self.N, obs_dim), np.float32)  # takes up memory as it fills
            self.actions = np.zeros((self.T, self.N, action_dim), np.float32)
        except (MemoryError, ValueError):
            fail(f"no memory for a replay of {size:,} transitions, {needed / 2**30:,.1f} GiB; lower --buffer-size")
        self.rewards = np.zeros((self.T, self.N), np.float32)
        self.terminated, self.truncated, self.valid = np.zeros((3, self.T, self.N), bool)

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        """Completes the row at head, actions [N, A], the rest [N], and starts the next one with next_obs [N, D]."""
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


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    device = pick_device(args.device)
    env = try_env(args.env, args.capture_video)
    space, obs_dim, action_dim = env.action_space, env.observation_space.shape[0], math.prod(env.action_space.shape)
    actor = Actor(obs_dim, action_dim, args.hidden, args.alpha).to(device)
    critics = Critics(obs_dim, action_dim, args.hidden, args.num_critics, args.layer_norm).to(device)
    target_critics = copy.deepcopy(critics)
    actor_optimizer, critic_optimizer = (
        torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=device.type != "mps")
        for net in (actor, critics)
    )
    parts = dict(actor=actor, critics=critics, target_critics=target_critics)
    parts |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, **parts)
    if args.eval:
        return run.finish(**evaluate(args, actor, critics, run.folder))

    rng, N = np.random.default_rng([args.seed, run.step]), args.num_envs
    target_entropy = args.target_entropy * action_dim
    replay = Replay(args.buffer_size, N, obs_dim, action_dim)
    envs = make_envs(args.env, N)
    obs, _ = envs.reset(seed=int(rng.integers(10**9)))
    replay.obs[replay.head] = obs
    ended, noise = np.zeros(N, bool), rng.standard_normal((N, action_dim))
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)
    losses, q_values, entropies = [], [], []
    step, learning_starts = run.step, run.step + args.learning_starts

    with run:
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            actor_optimizer.param_groups[0]["lr"] = critic_optimizer.param_groups[0]["lr"] = lr

            # Play one step of every environment.
            repeats = rng.random((N, 1)) < args.repeat_noise
            noise = np.where(repeats, noise, rng.standard_normal((N, action_dim)))
            actions = actor.act(obs, noise)
            obs, rewards, terminated, truncated, _ = envs.step(to_env(space, actions))
            valid = ~ended  # the row after an episode's end only resets
            deaths = terminated if args.bootstrap_truncated else terminated | truncated
            replay.add(actions, rewards * args.reward_scale, deaths, truncated, valid, obs)
            ended = terminated | truncated
            before, step = step, step + int(valid.sum())
            episode_return += rewards
            episode_length += valid
            for n in np.flatnonzero(ended):
                run.episode(episode_return[n], episode_length[n])
                episode_return[n] = episode_length[n] = 0

            # Learn: one gradient step for every train_frequency environment steps.
            updates = range(int(before / args.train_frequency), int(step / args.train_frequency))
            for update in updates if step >= learning_starts else ():
                batch = replay.batch(*replay.draw(args.batch_size, rng), args.n_step, args.gamma)
                b_obs, b_actions, b_returns, b_discounts, b_next_obs = (torch.from_numpy(x).to(device) for x in batch)
                alpha = actor.log_alpha.detach().exp()

                # The critics learn what was received plus the soft value of the next state.
                with torch.no_grad():
                    next_actions, next_logprobs = actor(b_next_obs)
                    next_q = target_critics(b_next_obs, next_actions)
                    targets = soft_target(b_returns, b_discounts, next_q, next_logprobs, alpha)
                q = critics(b_obs, b_actions)  # [K, B]
                loss = critic_loss(q, targets)
                critic_optimizer.zero_grad()
                loss.backward()
                critic_optimizer.step()
                update_target(critics, target_critics, args.tau)
                losses.append(loss.detach())
                q_values.append(q.detach())

                # The actor learns what the critics value, and to stay random.
                if update % args.policy_frequency == 0:
                    pi_actions, logprobs = actor(b_obs)
                    critics.requires_grad_(False)  # they are asked here, and do not learn
                    loss = actor_loss(critics(b_obs, pi_actions), logprobs, alpha)
                    critics.requires_grad_(True)
                    if args.autotune:
                        loss = loss + temperature_loss(actor.log_alpha, logprobs, target_entropy)
                    actor_optimizer.zero_grad()
                    loss.backward()
                    actor_optimizer.step()
                    entropies.append(-logprobs.detach().mean())

            if step - run.step >= args.total_timesteps / 200 or step >= args.total_timesteps:
                run.report(step, {
                    "charts/learning_rate": lr, "charts/alpha": actor.log_alpha.exp().item(),
                    "losses/qf_loss": torch.stack(losses).mean().item() if losses else None,
                    "losses/q_values": torch.cat(q_values, 1).mean().item() / args.reward_scale if losses else None,
                    "losses/entropy": torch.stack(entropies).mean().item() if entropies else None,
                })  # fmt: skip
                losses, q_values, entropies = [], [], []

    envs.close()
    return run.finish(**evaluate(args, actor, critics, run.folder))


# 6. Evaluation ----------------------------------------------------------------------------------


def evaluate(args: Args, actor: Actor, critics: Critics, folder: Path) -> dict[str, Any]:
    """Undiscounted returns of greedy episodes, all played at once on seeds of their own, [episodes].

    predicted_return is Q at their first states, obtained_return the discounted return that followed: the
    difference is by how much the critics over-estimate, and what they expect of the entropy. What a time
    limit cut off counts as predicted.
    """
    N = args.eval_episodes
    envs = [make_env(args.env, "rgb_array" if args.capture_video and n == 0 else None) for n in range(N)]
    if args.capture_video:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(folder / "videos"), disable_logger=True)
    limit, space = envs[0].spec.max_episode_steps or 10_000, envs[0].action_space
    obs = np.stack([env.reset(seed=10**9 + args.seed + n)[0] for n, env in enumerate(envs)]).astype(np.float32)
    actions = actor.act(obs, 0)  # [N, A]
    q = critics.values(obs, actions) / args.reward_scale  # [N]
    returns, predicted, obtained, alive = np.zeros(N), q.copy(), np.zeros(N), np.arange(N)
    for t in range(limit):
        rewards, terminated, truncated = np.zeros(N), np.zeros(N, bool), np.zeros(N, bool)
        played = to_env(space, actions)
        for n in alive:
            obs[n], rewards[n], terminated[n], truncated[n], _ = envs[n].step(played[n])
        actions = actor.act(obs, 0)
        if (truncated & ~terminated).any():
            q = critics.values(obs, actions) / args.reward_scale
        returns += rewards
        obtained += args.gamma**t * (rewards + args.gamma * q * (truncated & ~terminated))
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
