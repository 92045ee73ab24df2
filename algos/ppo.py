# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
# ///
"""Proximal Policy Optimization (PPO), discrete and continuous actions.

PPO plays the current policy for a short while, estimates how much better than expected each action
turned out (the advantage), and makes the good ones likelier. It takes several gradient steps on the
same data; to keep them honest it stops rewarding a change once an action has become a fifth (eps) likelier
or less likely than under the policy that collected the data.

    ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    maximise  mean_t  min( ratio_t * A_t,  clip(ratio_t, 1 - eps, 1 + eps) * A_t )

Papers   Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347
         Schulman et al. 2015, Generalized Advantage Estimation, arXiv 1506.02438
         Pardo et al. 2017, Time Limits in Reinforcement Learning, arXiv 1712.00378
         Andrychowicz et al. 2020, What Matters in On-Policy RL, arXiv 2006.05990

Run      python algos/ppo.py
         python algos/ppo.py --env LunarLander-v3
         python algos/ppo.py --clip-coef inf                     (the paper's ablation: nothing is clipped)
         python algos/ppo.py --update-epochs 1 --num-minibatches 1       (the plain policy gradient of a2c_gae.py)
         python algos/ppo.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, ten seeds which nothing was tuned on:
         python benchmarks/run.py scores --only algos/ppo.py --first-seed 301, torch 2.13.
         Two runs at a time on two cores of an Intel Xeon.

                                   steps    mean    worst   threshold reached, seconds to it
         CartPole-v1                250k   499.8    495.9   475 by 20 of 20 (to seed 320), median 0.9, slowest 1.1
         LunarLander-v3             600k   272.4    263.4   200 by 10 of 10, median 21.9, slowest 37.5
         LunarLanderContinuous-v3   600k   239.9    162.4   200 by 8 of 10, median 40, slowest 58; greedily 9 of 10
         Acrobot-v1                 150k   -83.0    -88.8   -100 by 10 of 10, median 2.9, slowest 3.3
         Pendulum-v1                300k  -154.4   -164.4   (has none) -200 by 10 of 10, median 4.8, slowest 8.8
         MountainCar-v0             500k  -109.1   -119.1   -110 by 8 of 10, 2 of them just below it at the end

         The default run takes 5 s from Enter to the prompt. GPU: not measured yet.
         MuJoCo (pip install "gymnasium[mujoco]"), 1M steps, 4 to 8 minutes, python benchmarks/run.py mujoco
         --only algos/ppo.py --first-seed 311 --seeds 3, mean (worst): HalfCheetah-v5 1,738 (1,642),
         Hopper-v5 2,981 (1,956), Walker2d-v5 4,359 (3,183), Ant-v5 1,469 (898).

Deviations from the paper
 1. Endings. An episode that ends by its rules (terminated) is worth nothing afterwards; one cut by a
    time limit (truncated) is bootstrapped from the value of its last observation. The paper and
    many codes treat both alike, which teaches that surviving to the limit is a death.
 2. Advantages are normalised per minibatch and the gradient norm is clipped, as in the paper's code. The
    learning rate is annealed to zero: without it the policy of a good moment is often lost by the end.
 3. The value loss is not clipped (Andrychowicz et al. find that it does not help), and the KL penalty of
    the paper's Section 4 is left out, as the clipped objective beat it there.
 4. --reward-scale multiplies rewards inside the learner only: it brings returns to the size at which the
    critic learns quickly. Box actions are rescaled: the policy's [-1, 1] is the action space's [low, high].
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn.functional import log_softmax, mse_loss
from tqdm import tqdm

NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP
Distribution.set_default_validate_args(False)  # a check at every call takes longer than the call

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "CartPole-v1"  # gymnasium id of the environment, for example LunarLander-v3
    seed: int = 1  # seed of every random number: network, actions, minibatches, environments
    total_timesteps: int = 1_000_000  # environment steps to train for, over all parallel environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # the CPU is faster than a GPU for networks this small
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 100  # greedy episodes played after training, on seeds never trained on

    num_envs: int = 8  # environments stepped in parallel (N); more of them decorrelate the batch
    num_steps: int = 256  # steps per environment and rollout (T); one update learns from N * T transitions
    num_minibatches: int = 8  # minibatches per epoch; few large ones are fast, many small ones need fewer steps
    update_epochs: int = 4  # passes over each rollout; more reuse the data harder and lean harder on the clipping
    learning_rate: float = 1e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    gae_lambda: float = 0.95  # in [0, 1]: 0 trusts the critic (bias), 1 trusts the sampled return (variance)
    norm_adv: bool = True  # normalise advantages to mean 0 and standard deviation 1 in each minibatch
    clip_coef: float = 0.2  # how far the ratio may move from 1 (epsilon of Eq. 7); inf: as far as it likes (Eq. 6)
    ent_coef: float = 0.0  # weight of the entropy bonus, which keeps the policy exploring
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient's norm is scaled down to at most this
    target_kl: float | None = None  # end an update early once the policy has moved this many nats
    bootstrap_truncated: bool = True  # --no-bootstrap-truncated treats a time limit as a death
    reward_scale: float = 1.0  # factor on rewards inside the learner; aim at returns of the order of 10
    norm_obs: bool = False  # normalise observations by their running mean and deviation (saved with the model)
    norm_reward: bool = False  # divide rewards by the running deviation of the discounted return
    hidden: int = 64  # units in each of the two hidden layers of actor and critic

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "num_envs", "num_steps", "num_minibatches")
        check(self, "> 0", "update_epochs", "learning_rate", "clip_coef", "max_grad_norm", "target_kl", "reward_scale")
        check(self, "> 0", "hidden")
        check(self, ">= 0", "ent_coef", "vf_coef")
        check(self, "in [0, 1]", "gamma", "gae_lambda")


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=250_000, num_envs=64, num_steps=64, update_epochs=1, learning_rate=1.5e-2, gamma=0.98,
        ent_coef=0.005, hidden=32,
    ),
    "LunarLander-v3": dict(
        total_timesteps=600_000, num_envs=16, num_minibatches=16, learning_rate=2e-3, gamma=0.999, gae_lambda=0.98,
        ent_coef=0.01, reward_scale=0.05,
    ),
    "LunarLanderContinuous-v3": dict(
        total_timesteps=600_000, num_envs=16, num_minibatches=16, learning_rate=2e-3, gamma=0.999, gae_lambda=0.98,
        reward_scale=0.05,
    ),
    "Acrobot-v1": dict(total_timesteps=150_000, num_envs=16, num_steps=128, learning_rate=2e-3, reward_scale=0.1),
    "MountainCar-v0": dict(
        total_timesteps=500_000, num_envs=16, num_steps=128, learning_rate=2e-3, norm_obs=True, norm_reward=True,
        ent_coef=0.01,
    ),
    "Pendulum-v1": dict(
        total_timesteps=300_000, num_envs=16, num_steps=128, update_epochs=10, learning_rate=2e-3, gamma=0.95,
        reward_scale=0.1,
    ),
}  # fmt: skip
PRESETS |= {  # they need pip install "gymnasium[mujoco]"
    robot: dict(
        num_envs=16, num_steps=128, num_minibatches=16, update_epochs=10, learning_rate=3e-4, norm_obs=True,
        norm_reward=True,
    )
    for robot in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
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


def make_env(env_id: str, film: bool = False) -> gym.Env:
    """One environment with observations [D]; ends the program with one line if it cannot be made."""
    rendering = {"render_mode": "rgb_array"} if film else {}
    try:
        env = WithoutInfo(gym.make(env_id, disable_env_checker=True, **rendering))
        gym.spec(env_id.split(":")[-1])  # make() guesses a missing version, spec() does not
        if len(env.observation_space.shape or ()) == 3:
            fail(f"{env_id} shows pictures; algos/dqn_atari.py learns from pixels, this script from vectors")
        if len(env.observation_space.shape or ()) != 1:
            env = gym.wrappers.FlattenObservation(env)
    except Exception as error:  # whatever the environment's own code raises
        fail(f"cannot make the environment {env_id!r}: {error}")
    if not isinstance(env.action_space, (Discrete, Box)):
        fail(f"{env_id} has the action space {env.action_space}; this script handles Discrete and Box")
    return env


def try_env(env_id: str, film: bool) -> gym.Env:
    """An environment that has been reset and stepped once: what fails, fails before anything is trained."""
    env = make_env(env_id, film)
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


def to_env(space: gym.Space, actions: np.ndarray) -> np.ndarray:
    """The environment's form of the policy's actions, [N] or [N, A]: in a Box, [-1, 1] becomes [low, high].

    Each dimension on its own: one that is unbounded on a side is not rescaled, and integers are rounded.
    """
    if isinstance(space, Discrete):
        return actions + space.start
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = (np.where(bounded, bound, one).astype(float) for bound, one in ((space.low, -1), (space.high, 1)))
    actions = actions.reshape(-1, *space.shape).astype(float)
    actions = (low * (1 - actions) + high * (1 + actions)) / 2  # no high - low, which may overflow
    actions = actions.clip(space.low, space.high)
    return (np.rint(actions) if np.issubdtype(space.dtype, np.integer) else actions).astype(space.dtype)


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far (Chan et al. 1979); called, it normalises with them.

    Before the first update they are 0 and 1, and nothing changes.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(1e-4))

    def update(self, rows: np.ndarray) -> None:  # rows [B, *shape]
        delta = torch.as_tensor(rows.mean(0)).to(self.mean) - self.mean
        share = len(rows) / (self.count + len(rows))
        self.var += share * (torch.as_tensor(rows.var(0)).to(self.var) - self.var) + delta**2 * share * (1 - share)
        self.mean += delta * share
        self.count += len(rows)

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / (self.var + 1e-8).sqrt()


# 3. Model ---------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int, last_std: float) -> nn.Sequential:
    """Two tanh layers, orthogonal weights; a small last_std makes the first outputs nearly equal."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, std in zip(layers, (2**0.5, 2**0.5, last_std), strict=True):
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two networks.

    Discrete actions: the actor gives logits. Box actions: it gives the mean of a Gaussian whose
    log standard deviation is a parameter of its own, the same in every state. Both networks read
    observations that norm has normalised; act() takes them as they are.
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, hidden: int):
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.norm = RunningMeanStd(obs_dim)
        self.actor = mlp(obs_dim, hidden, outputs, last_std=0.01)
        self.critic = mlp(obs_dim, hidden, 1, last_std=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(outputs))

    def value(self, obs: Tensor) -> Tensor:  # [..., D] -> [...]
        return self.critic(obs).squeeze(-1)

    def logprobs_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a | s) of actions [B] or [B, A] at observations [B, D], and the entropy of pi(. | s), both [B]."""
        outputs = self.actor(obs)
        if self.discrete:
            logprobs = log_softmax(outputs, -1)
            return logprobs.gather(-1, actions[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)
        pi = Normal(outputs, self.log_std.exp())
        return pi.log_prob(actions).sum(-1), pi.entropy().sum(-1)

    def numpy_layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weights and biases of the actor, the normalisation folded into the first: what act() computes with."""
        linear = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        layers = [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in linear]
        weight, bias = layers[0]
        mean, std = self.norm.mean.cpu().numpy(), (self.norm.var + 1e-8).sqrt().cpu().numpy()
        return [(weight / std[:, None], bias - mean / std @ weight), *layers[1:]]

    def act(self, layers: list, obs: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Actions [N] or [N, A] at observations [N, D]: sampled, or without rng the greedy ones.

        In NumPy: for a batch this small it takes a quarter of torch's time.
        """
        x = obs
        for weight, bias in layers[:-1]:
            x = np.tanh(x @ weight + bias)
        x = x @ layers[-1][0] + layers[-1][1]
        if self.discrete:  # the argmax of logits plus Gumbel noise is a sample of their softmax
            return (x if rng is None else x + rng.gumbel(size=x.shape)).argmax(-1)
        return x if rng is None else x + self.log_std.detach().exp().cpu().numpy() * rng.standard_normal(x.shape)


# 4. The mathematics -----------------------------------------------------------------------------


def gae(
    rewards: np.ndarray, values: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    """Generalized advantage estimates (Eq. 11-12 and 16, Schulman 2015), [T, N].

    rewards, terminated, truncated are [T, N]; values is [T + 1, N], where values[t + 1] is the value
    of the true successor of row t, also when the episode ended there. The three endings:
    terminated drops the bootstrap, truncated keeps it; both cut the recursion; the end of the rollout
    keeps the bootstrap and has nothing to cut.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * lam * ~(terminated | truncated)
    advantages = np.zeros_like(rewards)
    carry = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = carry = deltas[t] + decay[t] * carry
    return advantages


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef: float) -> tuple[Tensor, ...]:
    """The policy loss (Eq. 7, Schulman 2017), the KL from the old policy in nats, the clipped fraction.

    All inputs are [B], all outputs scalars. The divergence is estimated without bias from the same
    samples by (r - 1) - log r >= 0.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    logratio = logprobs - old_logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    return loss, (ratio - 1 - logratio).mean(), (ratio != clipped).float().mean()


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """The share of the returns' variance that the critic foresaw: 1 perfect, 0 useless, < 0 harmful."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    T, N = args.num_steps, args.num_envs
    if 2 * args.num_minibatches > N * (T // 2):  # every second row may be a reset
        fail("a minibatch needs two transitions: raise --num-envs or --num-steps, or lower --num-minibatches")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    env = try_env(args.env, args.capture_video)
    obs_dim, space = env.observation_space.shape[0], env.action_space
    agent = Agent(obs_dim, space, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=device.type != "mps")
    return_stats = RunningMeanStd()
    parts = dict(agent=agent, optimizer=optimizer, return_stats=return_stats)
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, **parts)
    if args.eval:
        return run.finish(evaluate(args, agent, run.folder))

    # One rollout, [T, N]. obs and done have a row more: the successor of the last one.
    obs, done = np.zeros((T + 1, N, obs_dim), np.float32), np.zeros((T + 1, N), bool)
    actions = np.zeros((T, N), np.int64) if agent.discrete else np.zeros((T, N, len(agent.log_std)), np.float32)
    rewards, terminated, truncated = np.zeros((T, N), np.float32), np.zeros((T, N), bool), np.zeros((T, N), bool)
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)
    discounted = np.zeros((T + 1, N), np.float32)  # past rewards, discounted: their deviation scales the rewards

    rng = np.random.default_rng([args.seed, run.step])
    envs, step = make_envs(args.env, N), run.step
    obs[0], _ = envs.reset(seed=int(rng.integers(10**9)))
    with run:
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr

            # Play.
            layers = agent.numpy_layers()
            for t in range(T):
                actions[t] = agent.act(layers, obs[t], rng)
                obs[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(to_env(space, actions[t]))
                done[t + 1] = terminated[t] | truncated[t]
                episode_return += rewards[t]
                episode_length += ~done[t]
                for n in np.flatnonzero(done[t + 1]):
                    run.episode(episode_return[n], episode_length[n])
                    episode_return[n] = episode_length[n] = 0
            valid = ~done[:-1]  # the row after an episode's end only resets
            step += int(valid.sum())

            # Estimate the advantages. The weights did not move while playing, so one batch gives all values.
            scaled = rewards * args.reward_scale
            if args.norm_reward:
                for t in range(T):
                    discounted[t + 1] = scaled[t] + args.gamma * discounted[t] * valid[t]
                return_stats.update(discounted[1:].reshape(-1))
                scaled /= return_stats.var.sqrt().item()
            inputs = agent.norm(torch.from_numpy(obs).to(device))
            with torch.no_grad():
                values = agent.value(inputs).cpu().numpy()
            deaths = terminated if args.bootstrap_truncated else terminated | truncated
            advantages = gae(scaled, values, deaths, truncated, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

            # Learn from the rows that are transitions, as one batch [B].
            rollout = (inputs[:-1], actions, advantages, returns)
            batch = [torch.as_tensor(x[valid], device=device) for x in rollout]
            with torch.no_grad():
                batch.append(agent.logprobs_and_entropy(*batch[:2])[0])
            history = []
            for _ in range(args.update_epochs):
                order = torch.randperm(len(batch[0])).to(device)
                minibatches = [x[order].tensor_split(args.num_minibatches) for x in batch]
                for mb_obs, mb_actions, mb_advantages, mb_returns, mb_logprobs in zip(*minibatches, strict=True):
                    if args.norm_adv:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    logprobs, entropy = agent.logprobs_and_entropy(mb_obs, mb_actions)
                    pg_loss, approx_kl, clipfrac = ppo_loss(logprobs, mb_logprobs, mb_advantages, args.clip_coef)
                    v_loss = 0.5 * mse_loss(agent.value(mb_obs), mb_returns)
                    entropy = entropy.mean()
                    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy  # Eq. 9, Schulman 2017
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    history.append(torch.stack((pg_loss, v_loss, entropy, approx_kl, clipfrac)).detach())
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break

            pg_loss, v_loss, entropy, approx_kl, clipfrac = torch.stack(history).mean(0).tolist()
            run.report(step, {
                "charts/learning_rate": lr, "losses/policy_loss": pg_loss, "losses/value_loss": v_loss,
                "losses/entropy": entropy, "losses/approx_kl": approx_kl, "losses/clipfrac": clipfrac,
                "losses/explained_variance": explained_variance(values[:-1][valid], returns[valid]),
            })  # fmt: skip
            if args.norm_obs:
                agent.norm.update(obs[:-1][valid])  # now, when no ratio compares two sides of it
            obs[0], done[0], discounted[0] = obs[T], done[T], discounted[T]
    envs.close()
    return run.finish(evaluate(args, agent, run.folder))


# 6. Evaluation ----------------------------------------------------------------------------------


def evaluate(args: Args, agent: Agent, folder: Path) -> np.ndarray:
    """Undiscounted returns of greedy episodes, all played at once on seeds of their own, [episodes]."""
    envs = [make_env(args.env, args.capture_video and n == 0) for n in range(args.eval_episodes)]
    if args.capture_video:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(folder / "videos"), disable_logger=True)
    limit = envs[0].spec.max_episode_steps or 10_000
    obs = np.stack([env.reset(seed=10**9 + args.seed + n)[0] for n, env in enumerate(envs)])
    returns, alive, layers = np.zeros(len(envs)), np.arange(len(envs)), agent.numpy_layers()
    for _ in range(limit):
        actions = to_env(envs[0].action_space, agent.act(layers, obs[alive].astype(np.float32)))
        going = []
        for n, action in zip(alive, actions, strict=True):
            obs[n], reward, terminated, truncated, _ = envs[n].step(action)
            returns[n] += reward
            going.append(not (terminated or truncated))
        alive = alive[going]
        if len(alive) == 0:
            break
    else:
        print(f"{len(alive)} of {len(envs)} evaluation episodes were cut after {limit:,} steps")
    for env in envs:
        env.close()
    return returns


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
