# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
# ///
"""Advantage actor-critic (A2C) with generalized advantage estimation, discrete and continuous actions.

Many copies of the environment are played in step for a few dozen steps. A second network, the critic,
says how much reward each state promises; an action that turned out better than the critic expected
has a positive advantage and is made likelier, by one gradient step, and the data are thrown away. That
is REINFORCE with two liberties: the critic is subtracted from the return, and it also replaces the
return beyond some horizon. GAE's lambda sets the horizon: 0 looks one step ahead, 1 to the end.

    delta_t = r_t + gamma * V(s_t+1) - V(s_t)
    A_t     = sum_k (gamma * lambda)^k * delta_t+k
    ascend    mean_t  grad log pi(a_t | s_t) * A_t

Papers   Mnih et al. 2016, Asynchronous Methods for Deep RL (A3C; A2C is its synchronous form), arXiv 1602.01783
         Schulman et al. 2015, Generalized Advantage Estimation, arXiv 1506.02438
         Pardo et al. 2017, Time Limits in Reinforcement Learning, arXiv 1712.00378

Run      python algos/a2c_gae.py
         python algos/a2c_gae.py --env LunarLander-v3
         python algos/a2c_gae.py --env Pendulum-v1 --seed 2
         python algos/a2c_gae.py --optimizer rmsprop --shared-network     (nearer to the paper)
         python algos/a2c_gae.py --gae-lambda 0 --variance-every 20       (how noisy is the gradient?)
         python algos/a2c_gae.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, on seeds which nothing was tuned on: 101-110,
         and 201-210 (--first-seed 201) for LunarLander, where 101-110 had shown what deviation 5 says:
         python benchmarks/run.py scores --only a2c --workers 1, one core of an AMD EPYC, torch 2.13.

                                     steps    mean    worst   threshold reached, seconds to it
         CartPole-v1                  302k   499.6    495.6   475 by 10 of 10, median 1.0, slowest 2.3
         LunarLander-v3               1.5M   239.7    193.5   200 by 10 of 10, median 25, slowest 72, and one of
                                             them below it at the end; seconds beside other work
         Acrobot-v1                   300k   -83.5    -85.1   -100 by 10 of 10, median 2.0, slowest 2.3
         Pendulum-v1                    1M  -157.1   -169.7   no threshold; 28 s of training

         GPU: not measured yet.

Deviations from the paper
 1. Synchronous: one network learns from all environments together. Asynchronous workers, whose
    gradients come from outdated weights, gain nothing on one machine.
 2. GAE instead of the n-step advantage, which is lambda 1 here: the sum to the rollout's end.
 3. Endings. An episode that ends by its rules (terminated) is worth nothing afterwards; one cut by a
    time limit (truncated) is bootstrapped from the value of its true last observation.
 4. Adam instead of RMSprop, and actor and critic as separate networks; both flags lead back. A critic
    of its own can learn faster than the actor: --critic-epochs gives it several gradient steps per
    rollout, without which it lags behind the policy that it judges.
 5. Advantages are not normalised, except on LunarLander. In a batch where nothing happens they are
    small and noisy; normalised they weigh as much as those of the batch with the crash. There it helps:
    a landed craft that idles with its side engines loses .03 a step and never rests, which would earn
    the last 100; without normalisation 3 of 10 runs (seeds 101-110, 1M steps) stayed below 200.
 6. The learning rate is annealed to zero: without it the policy of a good moment is often lost.
 7. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled): it
    brings returns to the size at which the critic learns quickly.
 8. Box actions are rescaled: the policy's [-1, 1] is the action space's [low, high].

--variance-every measures what lambda trades: it draws independent estimates of the policy gradient
(without the entropy bonus) from fresh episodes and logs losses/grad_variance, losses/grad_snr and
losses/grad_cosine, all for estimates of --variance-steps environment steps; reinforce.py does the same.
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
    """environments stepped in parallel (N); more of them decorrelate the batch"""
    num_steps: int = 32
    """steps per environment and rollout (T); one update learns from N * T transitions"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam, or the paper's RMSprop"""
    learning_rate: float = 1e-3
    """the optimizer's step size at the start; > 0"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-timesteps"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    gae_lambda: float = 0.95
    """GAE's lambda, in [0, 1]: 0 trusts the critic (bias), 1 trusts the sampled return (variance)"""
    norm_adv: bool = False
    """normalise advantages to mean 0 and standard deviation 1 in each rollout"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, which keeps the policy exploring; >= 0"""
    vf_coef: float = 0.5
    """weight of the value loss; >= 0"""
    critic_epochs: int = 1
    """gradient steps of the critic on each rollout (the actor takes one); 1 is the paper's"""
    max_grad_norm: float = 0.5
    """the gradient's norm is scaled down to at most this; > 0"""
    bootstrap_truncated: bool = True
    """bootstrap where a time limit cut an episode; --no-bootstrap-truncated treats the limit as a death"""
    reward_scale: float = 1.0
    """factor on rewards inside the learner; aim at returns of the order of 10"""
    shared_network: bool = False
    """actor and critic share their hidden layers, as in the paper; otherwise they are two networks"""
    hidden: int = 64
    """units in each of the two hidden layers of actor and critic"""
    variance_every: int | None = None
    """measure the noise of the gradient estimate every so many updates; None never does"""
    variance_samples: int = 16
    """independent estimates behind such a measurement (K); >= 2"""
    variance_steps: int = 2048
    """environment steps behind each estimate, the same for every setting and script"""


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=300_000, num_envs=64, num_steps=32, learning_rate=7e-3, gamma=0.995, critic_epochs=4,
        reward_scale=0.1,
    ),
    "LunarLander-v3": dict(
        total_timesteps=1_500_000, num_envs=16, num_steps=64, learning_rate=3e-3, gamma=0.999, gae_lambda=0.98,
        norm_adv=True, critic_epochs=6, reward_scale=0.05,
    ),
    "Acrobot-v1": dict(
        total_timesteps=300_000, num_envs=16, num_steps=64, learning_rate=3e-3, critic_epochs=4, reward_scale=0.1,
    ),
    "Pendulum-v1": dict(
        total_timesteps=1_000_000, num_envs=16, num_steps=64, learning_rate=3e-3, gamma=0.95, critic_epochs=6,
        reward_scale=0.1,
    ),
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "num_envs", "num_steps", "hidden", "eval_episodes", "learning_rate",
                 "critic_epochs", "max_grad_norm", "reward_scale", "variance_every", "variance_steps"):  # fmt: skip
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "ent_coef", "vf_coef"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.num_steps < 2:
        fail("--num-steps must be at least 2: a rollout of one step may hold nothing but resets")
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
    """The policy (actor) and the value function (critic), two networks or two heads of one.

    Discrete actions: the actor gives logits. Box actions: it gives the mean of a Gaussian whose
    log standard deviation is a parameter of its own, the same in every state.
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, hidden: int, shared: bool = False):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.space = action_space
        num_outputs = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.actor = mlp(obs_dim, hidden, num_outputs, last_std=0.01)
        self.critic = mlp(obs_dim, hidden, 1, last_std=1.0)
        if shared:
            self.critic = nn.Sequential(*self.actor[:-1], self.critic[-1])
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


def policy_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The scalar whose gradient is minus the policy-gradient estimate (Eq. 1, Schulman 2015), [B] -> scalar."""
    assert logprobs.shape == advantages.shape
    return -(logprobs * advantages).mean()


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
    """T steps of N environments. Rows that are not valid only reset an environment (NEXT_STEP mode)."""

    obs: np.ndarray  # [T + 1, N, D]; the last row is the successor of the last transitions
    actions: np.ndarray  # [T, N] or [T, N, A]
    rewards: np.ndarray  # [T, N], like the three below
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


def play(
    agent: Agent, envs: gym.vector.VectorEnv, next_obs: np.ndarray, next_done: np.ndarray,
    num_steps: int, rng: np.random.Generator,
) -> Rollout:  # fmt: skip
    """Plays num_steps on from next_obs [N, D], where next_done [N] tells which episodes are over."""
    T, N, num_outputs = num_steps, len(next_obs), agent.actor[-1].out_features
    obs = np.zeros((T + 1, *next_obs.shape), np.float32)
    actions = np.zeros((T, N), np.int64) if agent.discrete else np.zeros((T, N, num_outputs), np.float32)
    rewards = np.zeros((T, N), np.float32)
    terminated, truncated, valid = (np.zeros((T, N), bool) for _ in range(3))
    act = agent.numpy_policy()
    noise_shape = (T, N, num_outputs)
    noise = rng.gumbel(size=noise_shape) if agent.discrete else rng.standard_normal(noise_shape)
    noise = noise.astype(np.float32)
    obs[0] = next_obs
    for t in range(T):
        valid[t] = ~next_done
        actions[t] = act(obs[t], noise[t])
        obs[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(agent.to_env(actions[t]))
        next_done = terminated[t] | truncated[t]
    return Rollout(obs, actions, rewards, terminated, truncated, valid)


def judge(
    args: Args, agent: Agent, rollout: Rollout, device: torch.device, cut: np.ndarray | bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The critic's values [T + 1, N] and the advantages [T, N]; cut marks rows where a rollout ends.

    The weights did not move while playing, so one batch gives the values of all steps.
    """
    obs = torch.from_numpy(rollout.obs).to(device)
    with torch.no_grad():
        values = agent.value(obs.flatten(0, 1)).view(obs.shape[:2]).cpu().numpy()
    deaths = rollout.terminated if args.bootstrap_truncated else rollout.terminated | rollout.truncated
    rewards, truncated = rollout.rewards * np.float32(args.reward_scale), rollout.truncated | cut
    return values, gae(rewards, values, deaths, truncated, args.gamma, args.gae_lambda)


def normalized(args: Args, advantages: Tensor) -> Tensor:
    """Advantages [B] as --norm-adv wants them."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages


def measure(
    args: Args, agent: Agent, mean_length: float, rng: np.random.Generator, device: torch.device
) -> tuple[float, float, float]:
    """gradient_noise of the current policy, from K groups of whole episodes that training never sees.

    Each group has about variance-steps steps. Rollouts cut episodes anywhere, so here each episode is
    cut every num-steps steps from a random first step on, and bootstrapped there as in training.
    """
    K, limit = args.variance_samples, gym.spec(args.env.split(":")[-1]).max_episode_steps
    envs = make_envs(args.env, K * max(2, round(args.variance_steps / mean_length)))
    N, (next_obs, _) = envs.num_envs, envs.reset(seed=int(rng.integers(2**31)))
    rollout = play(agent, envs, next_obs, np.zeros(N, bool), limit, rng)
    envs.close()
    done = rollout.terminated | rollout.truncated
    first = done.cumsum(0) - done == 0  # the rows of each environment's first episode
    cut = (np.arange(limit)[:, None] + rng.integers(args.num_steps, size=N)) % args.num_steps == 0
    _, advantages = judge(args, agent, rollout, device, cut)

    def losses() -> Iterable[Tensor]:
        for group in np.split(np.arange(N), K):
            rows = first[:, group]
            arrays = (array[:, group][rows] for array in (rollout.obs[:-1], rollout.actions, advantages))
            b_obs, b_actions, b_advantages = (torch.from_numpy(array).to(device) for array in arrays)
            logprobs, _ = agent.logprob_entropy(b_obs, b_actions)
            yield policy_loss(logprobs, normalized(args, b_advantages)) * (rows.sum() / steps)

    steps = first.sum() / K
    return gradient_noise(losses(), agent.policy_parameters(), steps / args.variance_steps)


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    rng, probe_rng = seed_everything(args.seed), np.random.default_rng([args.seed, 1])

    envs = make_envs(args.env, args.num_envs)
    obs_dim, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    agent = Agent(obs_dim, action_space, args.hidden, args.shared_network).to(device)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=device.type != "mps")
    else:
        optimizer = torch.optim.RMSprop(agent.parameters(), lr=args.learning_rate, alpha=0.99, eps=1e-5)

    def state() -> dict[str, Any]:
        return {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.bit_generator.state}

    if saved:
        restore(saved, agent=agent, optimizer=optimizer)
        rng.bit_generator.state = saved["rng"]

    T, N = args.num_steps, args.num_envs
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)

    threshold = gym.spec(args.env.split(":")[-1]).reward_threshold
    curves = CURVES if args.variance_every else CURVES[:3]
    if args.variance_every and gym.spec(args.env.split(":")[-1]).max_episode_steps is None:
        fail(f"--variance-every plays whole episodes, but {args.env} has no time limit")
    with RunRecord(args, args.env, args.total_timesteps, device, state, curves, saved, threshold) as run:
        step = run.step
        next_obs, _ = envs.reset(seed=args.seed * 10_000 + step)
        next_done = np.zeros(N, bool)
        for update in itertools.count(1):
            if step >= args.total_timesteps:
                break
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr

            # Play.
            rollout = play(agent, envs, next_obs, next_done, T, rng)
            obs, actions, rewards, terminated, truncated, valid = rollout
            next_obs, next_done = obs[T], terminated[-1] | truncated[-1]
            for t in range(T):
                step += int(valid[t].sum())
                episode_return += rewards[t]
                episode_length += valid[t]
                for n in np.flatnonzero(terminated[t] | truncated[t]):
                    run.episode(step, episode_return[n], episode_length[n])
                    episode_return[n] = episode_length[n] = 0

            # Judge.
            values, advantages = judge(args, agent, rollout, device)
            returns = advantages + values[:-1]
            noise: tuple[float | None, ...] = (None, None, None)
            if args.variance_every and update % args.variance_every == 0:
                mean_length = float(np.mean(run.lengths)) if run.lengths else args.variance_steps
                noise = measure(args, agent, mean_length, probe_rng, device)

            # Learn: one step on the transitions, as one batch [B], which are then forgotten.
            batch = (obs[:-1], actions, advantages, returns)
            b_obs, b_actions, b_advantages, b_returns = (torch.from_numpy(x[valid]).to(device) for x in batch)
            logprobs, entropy = agent.logprob_entropy(b_obs, b_actions)
            pg_loss = policy_loss(logprobs, normalized(args, b_advantages))
            entropy = entropy.mean()
            loss = pg_loss - args.ent_coef * entropy
            for _ in range(args.critic_epochs):
                v_loss = value_loss(agent.value(b_obs), b_returns)
                loss = loss + args.vf_coef * v_loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                loss = 0.0  # from here on the critic alone

            pg_loss, v_loss, entropy = torch.stack((pg_loss, v_loss, entropy)).tolist()
            run.report(step, {
                "charts/learning_rate": lr, "losses/policy_loss": pg_loss, "losses/value_loss": v_loss,
                "losses/entropy": entropy,
                "losses/explained_variance": explained_variance(values[:-1][valid], returns[valid]),
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
    agent = Agent(env.observation_space.shape[0], env.action_space, args.hidden, args.shared_network)
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
