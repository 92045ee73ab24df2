# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
# ///
"""REINFORCE: the policy-gradient theorem, with and without a baseline.

Play whole episodes; weigh the log-probability of each action by the return that followed it; step
uphill. What made the return high or low besides the action is noise, and subtracting a baseline that
does not depend on the action removes some of it without moving the mean.

    G_t    = r_t + gamma * r_t+1 + gamma^2 * r_t+2 + ...
    ascend   mean over episodes of  sum_t  grad log pi(a_t | s_t) * (G_t - b_t)

Papers   Williams 1992, Simple Statistical Gradient-Following Algorithms, doi 10.1007/BF00992696
         Sutton et al. 1999, Policy Gradient Methods for RL with Function Approximation (NIPS 12)
         Greensmith et al. 2004, Variance Reduction Techniques for Gradient Estimates in RL (JMLR 5)
         Kool et al. 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free! (leave-one-out)

Run      python algos/reinforce.py
         python algos/reinforce.py --env LunarLander-v3
         python algos/reinforce.py --baseline none --no-reward-to-go      (the theorem, nothing else)
         python algos/reinforce.py --baseline mean --variance-every 10    (how noisy is the gradient?)
         python algos/reinforce.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, seeds 101-110, which nothing was tuned on:
         python benchmarks/run.py scores --only reinforce --workers 1, one core of an AMD EPYC, torch 2.13.

                                     steps    mean    worst   threshold reached, seconds to it
         CartPole-v1                  205k   500.0    500.0   475 by 10 of 10, median 0.6, slowest 0.8
         LunarLander-v3                 2M   179.3    129.9   200 by 3 of 10, after 27 to 30 s of about 170
         Acrobot-v1                   300k   -84.2    -92.0   -100 by 10 of 10, median 4.7, slowest 10.7

         LunarLander's other seeds land too, but then idle with their side engines, which costs .03 a step, next
         to nothing in the noise of whole returns, and never come to rest, which would earn the last 100. Asked
         were five seeds of ten above 200: a miss (benchmarks.md says what was tried). GPU: not measured yet.

Deviations from the paper
 1. Several episodes per update, played in parallel to their ends, one per environment. Taking the
    first episodes that finish instead would prefer the short ones.
 2. Reward-to-go and a baseline; --no-reward-to-go and --baseline none take them away.
 3. The factor gamma^t of the exact gradient of the discounted return is dropped, as everyone does:
    with it, late steps would hardly learn.
 4. A time limit cuts the return, as if nothing had followed: an estimate of what would have followed
    exists with --baseline value only, which bootstraps from V of the true last observation.
 5. Adam instead of plain ascent, with the learning rate annealed to zero.
 6. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled).
 7. Box actions are rescaled: the policy's [-1, 1] is the action space's [low, high].

a2c_gae.py differs in one thing: its critic is asked for more than a baseline. --variance-every, in both,
draws independent estimates of the policy gradient (without the entropy bonus) from fresh episodes and
logs losses/grad_variance, losses/grad_snr and losses/grad_cosine, all for estimates of --variance-steps
environment steps.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

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
    """seed of every random number: network, actions, environments; >= 0"""
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

    num_envs: int = 16
    """episodes per update (N), played in parallel to their ends"""
    baseline: Literal["none", "mean", "time", "value"] = "time"
    """what a return is compared with: none (0), the other episodes' mean, their mean at the same time step, or V(s)"""
    reward_to_go: bool = True
    """weigh an action by the rewards after it; --no-reward-to-go by those of the whole episode"""
    learning_rate: float = 1e-3
    """Adam's step size at the start; > 0"""
    critic_epochs: int = 1
    """gradient steps on V(s) per update; >= 1"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-timesteps"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    norm_adv: bool = False
    """normalise advantages to mean 0 and standard deviation 1 in each batch of episodes"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, which keeps the policy exploring; >= 0"""
    max_grad_norm: float | None = None
    """the gradient's norm is scaled down to at most this; > 0; None leaves it"""
    bootstrap_truncated: bool = True
    """bootstrap where a time limit cut an episode; only --baseline value can"""
    reward_scale: float = 1.0
    """factor on rewards inside the learner; aim at returns of the order of 10"""
    hidden: int = 64
    """units in each of the two hidden layers of policy and V(s)"""
    variance_every: int | None = None
    """measure the noise of the gradient estimate every so many updates; None never does"""
    variance_samples: int = 16
    """independent estimates behind such a measurement (K); >= 2"""
    variance_steps: int = 2048
    """environment steps behind each estimate, the same for every setting and script"""


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=200_000, num_envs=16, learning_rate=2e-2, reward_scale=0.1, hidden=32,
    ),
    "LunarLander-v3": dict(
        total_timesteps=2_000_000, num_envs=4, baseline="value", learning_rate=5e-3, critic_epochs=10, gamma=0.98,
        reward_scale=0.05,
    ),
    "Acrobot-v1": dict(
        total_timesteps=300_000, num_envs=16, learning_rate=1e-2, reward_scale=0.1,
    ),
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "num_envs", "hidden", "eval_episodes", "learning_rate", "critic_epochs",
                 "max_grad_norm", "reward_scale", "variance_every", "variance_steps"):  # fmt: skip
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "ent_coef"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    if not 0 <= args.gamma <= 1:
        fail(f"--gamma must lie in [0, 1], not {args.gamma}")
    if args.num_envs < 2 and args.baseline in ("mean", "time"):
        fail(f"--baseline {args.baseline} compares an episode with the others: it needs --num-envs of at least 2")
    if args.variance_samples < 2:
        fail(f"--variance-samples must be at least 2, not {args.variance_samples}")


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
        envs = SyncVectorEnv([lambda: make_env(env_id)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


def step_unfinished(
    envs: gym.vector.VectorEnv, obs: np.ndarray, actions: np.ndarray, alive: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One step of the environments whose episode goes on: next_obs, rewards, terminated, truncated.

    The others rest at their last observation. A NumPy-vectorised environment cannot rest, and need not,
    as it costs the same; what it says of finished episodes is dropped.
    """
    if not isinstance(envs, SyncVectorEnv):
        next_obs, rewards, terminated, truncated, _ = envs.step(actions)
    else:
        next_obs, rewards = obs.copy(), np.zeros(len(alive))
        terminated, truncated = np.zeros_like(alive), np.zeros_like(alive)
        for n in np.flatnonzero(alive):
            next_obs[n], rewards[n], terminated[n], truncated[n], _ = envs.envs[n].step(actions[n])
    return next_obs, (rewards * alive).astype(np.float32), terminated & alive, truncated & alive


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

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters()] + ([] if self.discrete else [self.log_std])

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


def discounted_returns(rewards: np.ndarray, gamma: float, reward_to_go: bool) -> np.ndarray:
    """The return that weighs each action, [T, N]; rewards [T, N] are 0 after an episode's end.

    Reward-to-go: G_t = r_t + gamma r_{t+1} + ..., as no action changes the rewards before it. Otherwise
    G_0 at every step (Eq. 1 of Williams 1992, the whole episode's return).
    """
    returns = np.zeros_like(rewards)
    carry = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        returns[t] = carry = rewards[t] + gamma * carry
    return returns if reward_to_go else np.repeat(returns[:1], len(rewards), axis=0)


def mean_of_others(returns: np.ndarray, valid: np.ndarray, per_time_step: bool) -> np.ndarray:
    """For each row the mean return of the other episodes' rows: all of them, or those at its time step; [T, N].

    An episode's own return is left out, for a baseline that contains the action's own luck is biased.
    Where no other episode is left to compare with, the baseline is 0.
    """
    sums, counts = returns * valid, valid.astype(returns.dtype)
    if not per_time_step:
        sums, counts = sums.sum(0, keepdims=True), counts.sum(0, keepdims=True)  # [1, N]: an episode's rows together
    others_sum, others_count = (x.sum(1, keepdims=True) - x for x in (sums, counts))
    return np.broadcast_to(others_sum / np.maximum(others_count, 1), returns.shape)


def policy_loss(logprobs: Tensor, advantages: Tensor, num_episodes: int) -> Tensor:
    """The scalar whose gradient is minus the policy-gradient estimate, [B] -> scalar.

    grad J = E[ sum_t grad log pi(a_t | s_t) * (G_t - b_t) ]: a sum over the steps of an episode, a mean
    over episodes. Dividing by the number of steps instead would weigh batches of short episodes more.
    """
    assert logprobs.shape == advantages.shape
    return -(logprobs * advantages).sum() / num_episodes


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the mean squared error, [B] -> scalar."""
    assert values.shape == returns.shape
    return 0.5 * ((values - returns) ** 2).mean()


def gradient_noise(losses: Iterable[Tensor], parameters: list[Tensor], share: float) -> tuple[float, float, float]:
    """How noisy a policy-gradient estimate is: its variance, signal-to-noise ratio and cosine.

    losses are K scalars of the same distribution, each from data of its own; their gradients g_k [P]
    are K independent estimates of one gradient G. The variance is the trace of their covariance. As
    averaging m estimates divides it by m, `share`, the environment steps behind an estimate divided
    by the steps of a common budget, brings estimates of any size to that budget. The ratio is |G|^2
    over the variance, where |G|^2 is freed of the noise that is left in the mean of the K (so it can
    come out below 0 when there is nothing but noise). The cosine is the one between an estimate and
    the mean of the others: 1 all point the same way, 0 they share nothing.
    """
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    gradients = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients])  # [K, P]
    k, mean = len(gradients), gradients.mean(0)
    trace = gradients.var(0).sum()  # E|g - G|^2
    signal = mean.square().sum() - trace / k  # E|mean|^2 = |G|^2 + trace / K
    others = (k * mean - gradients) / (k - 1)  # [K, P]
    cosine = torch.cosine_similarity(gradients, others).mean()
    variance = trace * share
    return variance.item(), (signal / variance).item(), cosine.item()


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """The share of the returns' variance that the critic foresaw: 1 perfect, 0 useless, < 0 harmful."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/episodic_return", "losses/entropy", "losses/explained_variance",
          "losses/grad_variance", "losses/grad_snr", "losses/grad_cosine")  # fmt: skip


class Rollout(NamedTuple):
    """N episodes, padded to the T steps of the longest: rows that are not valid lie after an episode's end."""

    obs: np.ndarray  # [T + 1, N, D]; the last row is the successor of the last transitions
    actions: np.ndarray  # [T, N] or [T, N, A]
    rewards: np.ndarray  # [T, N], like the three below
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


def play(agent: Agent, envs: gym.vector.VectorEnv, seed: int | None, rng: np.random.Generator) -> Rollout:
    """Plays exactly one episode in each environment, from its reset to its end.

    Taking the first N episodes that finish would prefer short ones; here each counts once.
    """
    act = agent.numpy_policy()
    next_obs, _ = envs.reset(seed=seed)
    N = len(next_obs)
    noise_shape = (N, agent.actor[-1].out_features)
    obs, rows, alive = [next_obs], [], np.ones(N, bool)
    while alive.any():
        noise = rng.gumbel(size=noise_shape) if agent.discrete else rng.standard_normal(noise_shape)
        actions = act(next_obs, noise.astype(np.float32))
        next_obs, rewards, terminated, truncated = step_unfinished(envs, next_obs, agent.to_env(actions), alive)
        obs.append(next_obs)
        rows.append((actions, rewards, terminated, truncated, alive))
        alive = alive & ~terminated & ~truncated
    actions, rewards, terminated, truncated, valid = (np.stack(column) for column in zip(*rows, strict=True))
    return Rollout(np.stack(obs).astype(np.float32), actions, rewards, terminated, truncated, valid)


def judge(args: Args, agent: Agent, rollout: Rollout, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The returns and what they are compared with (the baseline), both [T, N]."""
    rewards = rollout.rewards * np.float32(args.reward_scale)
    if args.baseline == "value":
        obs = torch.from_numpy(rollout.obs).to(device)
        with torch.no_grad():
            values = agent.value(obs.flatten(0, 1)).view(obs.shape[:2]).cpu().numpy()  # [T + 1, N]
        if args.bootstrap_truncated:  # as if the reward at the cut were followed by V(last observation)
            rewards = rewards + args.gamma * values[1:] * rollout.truncated
    returns = discounted_returns(rewards, args.gamma, args.reward_to_go)
    if args.baseline == "none":
        return returns, np.zeros_like(returns)
    if args.baseline == "value":
        return returns, values[:-1] if args.reward_to_go else np.broadcast_to(values[:1], returns.shape)
    return returns, mean_of_others(returns, rollout.valid, per_time_step=args.baseline == "time")


def normalized(args: Args, advantages: Tensor) -> Tensor:
    """Advantages [B] as --norm-adv wants them."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages


def measure(
    args: Args, agent: Agent, mean_length: float, rng: np.random.Generator, device: torch.device
) -> tuple[float, float, float]:
    """gradient_noise of the current policy, from K groups of whole episodes that training never sees.

    Each group has about variance-steps steps, and a baseline of its own.
    """
    K, n = args.variance_samples, max(2, round(args.variance_steps / mean_length))
    envs = make_envs(args.env, K * n)
    rollout = play(agent, envs, int(rng.integers(2**31)), rng)
    envs.close()
    steps = rollout.valid.sum() / K

    def losses() -> Iterable[Tensor]:
        for group in np.split(np.arange(K * n), K):
            part = Rollout(*(array[:, group] for array in rollout))
            returns, baseline = judge(args, agent, part, device)
            arrays = (array[part.valid] for array in (part.obs[:-1], part.actions, returns - baseline))
            b_obs, b_actions, b_advantages = (torch.from_numpy(array).to(device) for array in arrays)
            logprobs, _ = agent.logprob_entropy(b_obs, b_actions)
            yield policy_loss(logprobs, normalized(args, b_advantages), n) * (n / steps)

    return gradient_noise(losses(), agent.policy_parameters(), steps / args.variance_steps)


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    rng, probe_rng = seed_everything(args.seed), np.random.default_rng([args.seed, 1])

    envs = make_envs(args.env, args.num_envs)
    obs_dim, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    agent = Agent(obs_dim, action_space, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=device.type != "mps")

    def state() -> dict[str, Any]:
        return {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.bit_generator.state}

    if saved:
        restore(saved, agent=agent, optimizer=optimizer)
        rng.bit_generator.state = saved["rng"]

    def descend(loss: Tensor) -> None:
        """One step of the network that the loss depends on; the other has no gradient and rests."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()

    threshold = gym.spec(args.env.split(":")[-1]).reward_threshold
    curves = CURVES if args.variance_every else CURVES[:3]
    with RunRecord(args, args.env, args.total_timesteps, device, state, curves, saved, threshold) as run:
        step = run.step
        env_seed: int | None = args.seed * 10_000 + step
        for update in itertools.count(1):
            if step >= args.total_timesteps:
                break
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr

            # Play N episodes.
            rollout = play(agent, envs, env_seed, rng)
            obs, actions, rewards, _, _, valid = rollout
            env_seed = None  # seeded once
            step += int(valid.sum())
            for n in range(args.num_envs):
                run.episode(step, rewards[:, n].sum(), valid[:, n].sum())

            # Judge.
            returns, baseline = judge(args, agent, rollout, device)
            noise: tuple[float | None, ...] = (None, None, None)
            if args.variance_every and update % args.variance_every == 0:
                noise = measure(args, agent, float(np.mean(run.lengths)), probe_rng, device)

            # Learn from the transitions, as one batch [B].
            batch = (obs[:-1], actions, returns - baseline, returns)
            b_obs, b_actions, b_advantages, b_returns = (torch.from_numpy(x[valid]).to(device) for x in batch)
            logprobs, entropy = agent.logprob_entropy(b_obs, b_actions)
            pg_loss = policy_loss(logprobs, normalized(args, b_advantages), args.num_envs)
            entropy = entropy.mean()
            descend(pg_loss - args.ent_coef * entropy * len(b_obs) / args.num_envs)
            v_loss = None
            if args.baseline == "value":
                for _ in range(args.critic_epochs):
                    v_loss = value_loss(agent.value(b_obs), b_returns)
                    descend(v_loss)

            run.report(step, {
                "charts/learning_rate": lr, "losses/policy_loss": pg_loss.item(),
                "losses/value_loss": None if v_loss is None else v_loss.item(), "losses/entropy": entropy.item(),
                "losses/explained_variance": explained_variance(baseline[valid], returns[valid]),
                "losses/grad_variance": noise[0], "losses/grad_snr": noise[1], "losses/grad_cosine": noise[2],
            })  # fmt: skip

        envs.close()
        run.finish(lambda: evaluate(args, agent, run.video_folder))
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------

EVAL_SEED = 1_000_000_000  # far from every seed that training uses


def evaluate(args: Args, agent: Agent, video_folder: Path | None = None) -> np.ndarray:
    """Undiscounted returns of greedy episodes on seeds of their own, [episodes]."""
    env = make_env(args.env, render_mode="rgb_array") if video_folder else make_env(args.env)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    act = agent.numpy_policy()
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=EVAL_SEED + args.seed if episode == 0 else None)
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.to_env(act(obs[None]))[0])
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
    restore(saved, agent=agent)
    folder = checkpoint_path(args.eval).parent
    returns = evaluate(args, agent, folder / "videos" if args.capture_video else None)
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
