# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
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
         python algos/ppo.py --env LunarLanderContinuous-v3 --seed 2
         python algos/ppo.py --env CartPole-v1 --objective none         (the paper's ablation)
         python algos/ppo.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, seeds 101-110, which nothing was tuned on:
         python benchmarks/run.py scores --only algos/ppo.py, one core of an AMD EPYC, torch 2.13.

                                     steps    mean    worst   threshold reached, seconds to it
         CartPole-v1                  250k   500.0    500.0   475 by 10 of 10, median 1.0, slowest 1.1
         LunarLander-v3               600k   267.9    257.5   200 by 10 of 10, median 20.3, slowest 42.8
         LunarLanderContinuous-v3     600k   255.5    236.1   200 by 9 of 10 in training, all greedily
         Acrobot-v1                   150k   -84.5    -89.6   -100 by 10 of 10
         Pendulum-v1                  300k  -162.6   -214.1   (has none)
         MountainCar-v0               500k  -108.2   -119.6   -110 by 9 of 10, 2 of them below it at the end

         The default run takes 7 s from Enter to the prompt, imports and evaluation included, and 370 MB.
         With CleanRL's settings (--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4
         --learning-rate 2.5e-4 --gamma 0.99 --clip-vloss --ent-coef 0.01 --hidden 64) it makes 12,900 steps
         a second, median of five runs, some beside other work; a re-enactment of CleanRL's loop, which is
         not part of this repository, made 5,400 in turns with it.
         GPU: not measured yet.

Deviations from the paper
 1. Endings. An episode that ends by its rules (terminated) is worth nothing afterwards; one cut by a
    time limit (truncated) is bootstrapped from the value of its true last observation. The paper and
    many codes treat both alike, which teaches that surviving to the limit is a death.
 2. Advantages are normalised per minibatch and the gradient norm is clipped: the paper's code does so,
    its text does not. The learning rate is annealed to zero, which the paper does on Atari only: it
    keeps what was learnt; without it the policy of a good moment is often lost by the end.
 3. Value clipping is off (Andrychowicz et al. find that it does not help); --clip-vloss turns it on.
 4. Actor and critic are separate networks, so the value coefficient matters little under Adam.
 5. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled): it
    brings returns to the size at which the critic learns quickly.
 6. Box actions are rescaled: the policy's [-1, 1] is the action space's [low, high].
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
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from tqdm import tqdm

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "CartPole-v1"
    """gymnasium id of the environment, for example LunarLander-v3"""
    seed: int = 1
    """seed of every random number: network, actions, minibatches, environments; >= 0"""
    total_timesteps: int = 1_000_000
    """environment steps to train for, counted over all parallel environments"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the updates run; auto is the CPU, faster than a GPU for networks this small"""
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
    eval_episodes: int = 100
    """greedy episodes played after training, on seeds never trained on; >= 1"""

    num_envs: int = 8
    """environments stepped in parallel (N); more of them decorrelate the batch"""
    num_steps: int = 256
    """steps per environment and rollout (T); one update learns from N * T transitions"""
    num_minibatches: int = 8
    """minibatches per epoch; fewer and larger ones are faster, more and smaller ones learn in fewer steps"""
    update_epochs: int = 4
    """passes over each rollout; more reuse the data harder and lean harder on the clipping"""
    learning_rate: float = 1e-3
    """Adam's step size at the start; > 0"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-timesteps"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    gae_lambda: float = 0.95
    """GAE's lambda, in [0, 1]: 0 trusts the critic (bias), 1 trusts the sampled return (variance)"""
    norm_adv: bool = True
    """normalise advantages to mean 0 and standard deviation 1 in each minibatch"""
    objective: Literal["clip", "none", "kl"] = "clip"
    """surrogate: clip (Eq. 7), none (Eq. 6, no constraint), kl (Eq. 8, KL penalty)"""
    clip_coef: float = 0.2
    """how far the ratio may move from 1 before it stops paying (epsilon of Eq. 7); > 0"""
    kl_beta: float = 1.0
    """weight of the KL penalty under --objective kl (beta of Eq. 8); >= 0"""
    kl_adaptive_target: float | None = 0.01
    """nats per update to which beta adapts (Section 4 of the paper); None keeps beta fixed"""
    clip_vloss: bool = False
    """clip the value update as well, to clip-coef around the old value"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, which keeps the policy exploring; >= 0"""
    vf_coef: float = 0.5
    """weight of the value loss; >= 0"""
    max_grad_norm: float = 0.5
    """the gradient's norm is scaled down to at most this; > 0"""
    target_kl: float | None = None
    """end an update early once the policy has moved this many nats; None never does"""
    bootstrap_truncated: bool = True
    """bootstrap where a time limit cut an episode; --no-bootstrap-truncated treats the limit as a death"""
    reward_scale: float = 1.0
    """factor on rewards inside the learner; aim at returns of the order of 10"""
    norm_obs: bool = False
    """normalise observations by their running mean and deviation (saved with the model)"""
    norm_reward: bool = False
    """divide rewards by the running deviation of the discounted return, inside the learner"""
    hidden: int = 64
    """units in each of the two hidden layers of actor and critic"""


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=250_000, num_envs=64, num_steps=64, num_minibatches=8, update_epochs=1,
        learning_rate=1.5e-2, gamma=0.98, hidden=32,
    ),
    "LunarLander-v3": dict(
        total_timesteps=600_000, num_envs=16, num_steps=256, num_minibatches=16, update_epochs=4,
        learning_rate=2e-3, gamma=0.999, gae_lambda=0.98, ent_coef=0.01, reward_scale=0.05,
    ),
    "LunarLanderContinuous-v3": dict(
        total_timesteps=600_000, num_envs=16, num_steps=256, num_minibatches=16, update_epochs=4,
        learning_rate=2e-3, gamma=0.999, gae_lambda=0.98, reward_scale=0.05,
    ),
    "Acrobot-v1": dict(
        total_timesteps=150_000, num_envs=16, num_steps=128, num_minibatches=8, update_epochs=4,
        learning_rate=2e-3, reward_scale=0.1,
    ),
    "MountainCar-v0": dict(
        total_timesteps=500_000, num_envs=16, num_steps=128, update_epochs=4, learning_rate=2e-3,
        norm_obs=True, norm_reward=True, ent_coef=0.01,
    ),
    "Pendulum-v1": dict(
        total_timesteps=300_000, num_envs=16, num_steps=128, update_epochs=10, learning_rate=2e-3,
        gamma=0.95, reward_scale=0.1,
    ),
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs",
                 "hidden", "eval_episodes", "learning_rate", "clip_coef", "max_grad_norm", "reward_scale"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "ent_coef", "vf_coef", "kl_beta"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("target_kl", "kl_adaptive_target"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive or None, not {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.num_envs * (args.num_steps // 2) < 2 * args.num_minibatches:
        fail("a rollout needs two transitions per minibatch, and every second row may only reset an environment: "
             "raise --num-envs or --num-steps")  # fmt: skip


# 2. Environment ---------------------------------------------------------------------------------


def make_env(env_id: str, **kwargs: Any) -> gym.Env:
    """One environment with flat observations; ends the program with one line if there is none."""
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        gym.spec(env_id.split(":")[-1])  # make guesses a missing version, spec does not
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make the environment {env_id!r}: {error}")
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(env.action_space, (gym.spaces.Discrete, gym.spaces.Box)):
        fail(f"{env_id} has the action space {env.action_space}; this script handles Discrete and Box")
    return env


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """N environments that reset in NEXT_STEP mode.

    In this mode the step after an episode's end ignores the action and returns the first observation
    of the next episode with reward 0. That row is no transition, and train() masks it out; in
    return obs[t + 1] is always the true successor of obs[t], which bootstrapping needs.
    """
    make_env(env_id).close()  # says in one line what is wrong, if anything is
    if gym.spec(env_id.split(":")[-1]).vector_entry_point is not None:  # a vectorised version (CartPole)
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
    else:
        envs = SyncVectorEnv([lambda: make_env(env_id)] * num_envs, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


class RunningMeanStd:
    """Mean and variance of all rows seen so far (Chan et al. 1979, parallel update)."""

    def __init__(self, shape: tuple[int, ...]):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, rows: np.ndarray) -> None:  # rows [B, *shape]
        delta, share = rows.mean(0) - self.mean, len(rows) / (self.count + len(rows))
        self.var = (1 - share) * self.var + share * rows.var(0) + delta**2 * share * (1 - share)
        self.mean = self.mean + delta * share
        self.count += len(rows)

    def normalize(self, rows: np.ndarray) -> np.ndarray:
        return ((rows - self.mean) / np.sqrt(self.var + 1e-8)).clip(-10, 10).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": torch.as_tensor(self.mean), "var": torch.as_tensor(self.var), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.var, self.count = state["mean"].numpy(), state["var"].numpy(), state["count"]


# 3. Model ---------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int, last_std: float) -> nn.Sequential:
    """Two tanh layers, orthogonal weights; a small last_std makes the first outputs nearly equal."""
    net = nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )
    for layer, std in zip(net[::2], (math.sqrt(2), math.sqrt(2), last_std), strict=True):
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return net


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two networks.

    Discrete actions: the actor gives logits. Box actions: it gives the mean of a Gaussian whose
    log standard deviation is a parameter of its own, the same in every state.
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, hidden: int):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.space = action_space
        num_outputs = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.actor = mlp(obs_dim, hidden, num_outputs, last_std=0.01)
        self.critic = mlp(obs_dim, hidden, 1, last_std=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(num_outputs))

    def value(self, obs: Tensor) -> Tensor:  # [B, D] -> [B]
        return self.critic(obs).squeeze(-1)

    def logprob_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a | s) and the entropy of pi(. | s), both [B]; actions [B] or [B, A]."""
        if self.discrete:
            logps = torch.log_softmax(self.actor(obs), dim=-1)  # [B, A]
            entropy = -(logps.exp() * logps).sum(-1)
            return logps.gather(1, actions.unsqueeze(1)).squeeze(1), entropy
        z = (actions - self.actor(obs)) / self.log_std.exp()
        logprob = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return logprob, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(obs))

    def numpy_policy(self) -> Callable[..., np.ndarray]:
        """The actor as a NumPy function, act(obs [N, D], noise=None) -> actions [N] or [N, A].

        For one small batch a forward pass in NumPy takes a quarter of torch's time. On the CPU the
        weights below share memory with the parameters, so nothing is copied; from a GPU they are copied,
        as is the Gaussian's deviation everywhere, so ask again after each update.
        Without noise the action is the greedy one. Noise is standard Gumbel (argmax of logits plus
        Gumbel noise is a sample of the softmax) or standard normal.
        """
        layers = [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy())
                  for layer in self.actor if isinstance(layer, nn.Linear)]  # fmt: skip
        std = None if self.discrete else self.log_std.detach().exp().cpu().numpy()

        def act(obs: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
            x = obs
            for weight, bias in layers[:-1]:
                x = np.tanh(x @ weight + bias)
            x = x @ layers[-1][0] + layers[-1][1]
            if self.discrete:
                return (x if noise is None else x + noise).argmax(-1)
            return x if noise is None else x + std * noise

        return act

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """The environment's form of the policy's actions: Box actions from [-1, 1] to [low, high]."""
        if self.discrete:
            return actions + self.space.start
        low, high = self.space.low, self.space.high
        if np.isfinite(low).all() and np.isfinite(high).all():
            actions = low + (actions.reshape(-1, *low.shape) + 1) / 2 * (high - low)
        return actions.reshape(-1, *low.shape).clip(low, high).astype(self.space.dtype)


# 4. The mathematics -----------------------------------------------------------------------------


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Generalized advantage estimates (Eq. 11-12 and 16, Schulman 2015), [T, N].

    rewards, terminated, truncated are [T, N]; values is [T + 1, N], where values[t + 1] is the value
    of the true successor of row t, also when the episode ended there. The three endings:
    terminated drops the bootstrap, truncated keeps it; both cut the recursion; the end of the rollout
    keeps the bootstrap and has nothing to cut.
    """
    advantages = np.zeros_like(rewards)
    carry = np.zeros_like(rewards[0])
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    for t in reversed(range(len(rewards))):
        advantages[t] = carry = deltas[t] + decay[t] * carry
    return advantages


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, objective: str, clip_coef: float, kl_beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss, the KL divergence from the old policy in nats, and the clipped fraction.

    All inputs are [B], all outputs scalars. Schulman 2017: Eq. 7 (clip), Eq. 6 (none), Eq. 8 (kl).
    The divergence is estimated without bias from the same samples by (r - 1) - log r >= 0, whose
    gradient is that of the exact KL(old, new) in expectation.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    logratio = logprobs - old_logprobs
    ratio = logratio.exp()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
    gain = ratio * advantages
    if objective == "clip":
        gain = torch.min(gain, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    loss = -gain.mean()
    if objective == "kl":
        loss = loss + kl_beta * approx_kl
    return loss, approx_kl.detach(), clipfrac


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error, [B] -> scalar; with clip_coef the pessimistic clipped form."""
    assert values.shape == old_values.shape == returns.shape
    loss = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - returns) ** 2)
    return 0.5 * loss.mean()


def adapt_kl_beta(kl_beta: float, kl: float, target: float) -> float:
    """Halves or doubles the penalty when the last update moved too little or too far (Section 4)."""
    return kl_beta / 2 if kl < target / 1.5 else kl_beta * 2 if kl > target * 1.5 else kl_beta


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """The share of the returns' variance that the critic foresaw: 1 perfect, 0 useless, < 0 harmful."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/episodic_return", "losses/value_loss", "losses/entropy",
          "losses/approx_kl", "losses/clipfrac", "losses/explained_variance")  # fmt: skip


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    rng = seed_everything(args.seed)

    envs = make_envs(args.env, args.num_envs)
    obs_dim, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    agent = Agent(obs_dim, action_space, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=device.type != "mps")
    obs_stats, return_stats = RunningMeanStd((obs_dim,)), RunningMeanStd(())
    kl_beta = args.kl_beta

    def see(raw_obs: np.ndarray) -> np.ndarray:
        """What the networks get to see of observations [N, D]."""
        if not args.norm_obs:
            return raw_obs
        obs_stats.update(raw_obs)
        return obs_stats.normalize(raw_obs)

    def state() -> dict[str, Any]:
        return {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "kl_beta": kl_beta,
                "obs_stats": obs_stats.state_dict(), "return_stats": return_stats.state_dict(),
                "rng": rng.bit_generator.state}  # fmt: skip

    if saved:
        restore(saved, agent=agent, optimizer=optimizer, obs_stats=obs_stats, return_stats=return_stats)
        rng.bit_generator.state = saved["rng"]
        kl_beta = saved["kl_beta"]

    # One rollout, [T, N]. obs has a row more: the successor of the last one.
    T, N = args.num_steps, args.num_envs
    obs = np.zeros((T + 1, N, obs_dim), np.float32)
    actions = np.zeros((T, N), np.int64) if agent.discrete else np.zeros((T, N, *agent.log_std.shape), np.float32)
    noise_shape = (T, N, agent.actor[-1].out_features)
    rewards = np.zeros((T, N), np.float32)
    terminated, truncated, valid = (np.zeros((T, N), bool) for _ in range(3))
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)
    discounted_return = np.zeros(N)

    threshold = gym.spec(args.env.split(":")[-1]).reward_threshold
    with RunRecord(args, args.env, args.total_timesteps, device, state, CURVES, saved, threshold) as run:
        step = run.step
        next_obs = see(envs.reset(seed=args.seed * 10_000 + step)[0])
        next_done = np.zeros(N, bool)
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr

            # Play. In NEXT_STEP mode the row after an episode's end only resets: it is not valid.
            act = agent.numpy_policy()
            noise = rng.gumbel(size=noise_shape) if agent.discrete else rng.standard_normal(noise_shape)
            noise = noise.astype(np.float32)
            for t in range(T):
                obs[t], valid[t] = next_obs, ~next_done
                actions[t] = act(next_obs, noise[t])
                next_obs, rewards[t], terminated[t], truncated[t], _ = envs.step(agent.to_env(actions[t]))
                next_obs = see(next_obs)
                next_done = terminated[t] | truncated[t]
                step += int(valid[t].sum())
                episode_return += rewards[t]
                episode_length += valid[t]
                for n in np.flatnonzero(next_done):
                    run.episode(step, episode_return[n], episode_length[n])
                    episode_return[n] = episode_length[n] = 0
            obs[T] = next_obs

            # Judge. The weights did not move while playing, so one batch gives all values and
            # log-probabilities.
            with torch.no_grad():
                x = torch.from_numpy(obs).to(device)  # [T + 1, N, D]
                values = agent.value(x.view((T + 1) * N, obs_dim)).view(T + 1, N).cpu().numpy()
            learner_rewards = rewards * args.reward_scale
            if args.norm_reward:
                for t in range(T):  # past rewards, discounted: its deviation is the scale of returns
                    discounted_return = learner_rewards[t] + args.gamma * discounted_return * valid[t]
                    return_stats.update(discounted_return)
                learner_rewards /= math.sqrt(return_stats.var + 1e-8)
            deaths = terminated if args.bootstrap_truncated else terminated | truncated
            advantages = gae(learner_rewards, values, deaths, truncated, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

            # The rows that are transitions, as one batch [B].
            rollout = (obs[:-1], actions, advantages, returns, values[:-1])
            b_obs, b_actions, *b_rest = (torch.from_numpy(array[valid]).to(device) for array in rollout)
            with torch.no_grad():
                b_logprobs, _ = agent.logprob_entropy(b_obs, b_actions)
            batch = (b_obs, b_actions, b_logprobs, *b_rest)

            # Learn.
            history = []
            for _ in range(args.update_epochs):
                shuffle = torch.from_numpy(rng.permutation(len(b_obs))).to(device)
                minibatches = zip(*(item[shuffle].tensor_split(args.num_minibatches) for item in batch), strict=True)
                for mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns, mb_values in minibatches:
                    if args.norm_adv:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    logprobs, entropy = agent.logprob_entropy(mb_obs, mb_actions)
                    pg_loss, approx_kl, clipfrac = ppo_loss(
                        logprobs, mb_logprobs, mb_advantages, args.objective, args.clip_coef, kl_beta
                    )
                    v_loss = value_loss(
                        agent.value(mb_obs), mb_values, mb_returns, args.clip_coef if args.clip_vloss else None
                    )
                    entropy = entropy.mean()
                    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss  # Eq. 9, Schulman 2017
                    for parameter in agent.parameters():
                        parameter.grad = None
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    history.append(torch.stack((pg_loss, v_loss, entropy, approx_kl, clipfrac)).detach())
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break

            pg_loss, v_loss, entropy, approx_kl, clipfrac = torch.stack(history).mean(0).tolist()
            if args.objective == "kl" and args.kl_adaptive_target is not None:
                kl_beta = adapt_kl_beta(kl_beta, history[-1][3].item(), args.kl_adaptive_target)
            run.report(step, {
                "charts/learning_rate": lr, "losses/policy_loss": pg_loss, "losses/value_loss": v_loss,
                "losses/entropy": entropy, "losses/approx_kl": approx_kl, "losses/clipfrac": clipfrac,
                "losses/explained_variance": explained_variance(values[:-1][valid], returns[valid]),
            })  # fmt: skip

        envs.close()
        run.finish(lambda: evaluate(args, agent, obs_stats, run.video_folder))
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------

EVAL_SEED = 1_000_000_000  # far from every seed that training uses


def evaluate(args: Args, agent: Agent, obs_stats: RunningMeanStd, video_folder: Path | None = None) -> np.ndarray:
    """Undiscounted returns of greedy episodes on seeds of their own, [episodes]; statistics frozen."""
    env = make_env(args.env, render_mode="rgb_array") if video_folder else make_env(args.env)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    act = agent.numpy_policy()
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=EVAL_SEED + args.seed if episode == 0 else None)
        done = False
        while not done:
            x = obs_stats.normalize(obs[None]) if args.norm_obs else obs[None]  # [1, D]
            obs, reward, terminated, truncated, _ = env.step(agent.to_env(act(x))[0])
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def evaluate_saved(args: Args) -> None:
    """--eval: rebuilds the saved agent, plays it and prints the score."""
    validate(args)
    saved = load_checkpoint(args.eval)
    env = make_env(args.env)
    agent = Agent(env.observation_space.shape[0], env.action_space, args.hidden)
    obs_stats = RunningMeanStd((env.observation_space.shape[0],))
    restore(saved, agent=agent, obs_stats=obs_stats)
    folder = checkpoint_path(args.eval).parent
    returns = evaluate(args, agent, obs_stats, folder / "videos" if args.capture_video else None)
    print(f"{args.env}: {len(returns)} greedy episodes, return {returns.mean():.1f} ± {returns.std():.1f} · {folder}")


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
