# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26", "tyro>=0.9", "tqdm>=4.60",
#                 "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
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
         python algos/reinforce.py --baseline value --critic-epochs 10    (V(s) as the baseline)
         python algos/reinforce.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, ten seeds which nothing was tuned on:
         python benchmarks/run.py scores --only reinforce --first-seed 301, torch 2.13.
         Two runs at a time on two cores of an Intel Xeon.

                          steps    mean    worst   threshold reached, seconds to it
         CartPole-v1       205k   498.6    486.6   475 by 10 of 10, median 0.5, slowest 0.9
         LunarLander-v3      2M   208.4    150.5   200 by 3 of 10, after 17 to 42 s of 157; greedily by 7 of 10
         Acrobot-v1        300k   -83.8    -89.6   -100 by 8 of 10, median 2.7, slowest 3.3; greedily by all

         LunarLander's other seeds land too, but then idle with their side engines, which costs .03 a step, next
         to nothing in the noise of whole returns, and never come to rest, which would earn the last 100. Before the
         preset had an entropy bonus, seven of ten seeds did (101 to 110). GPU: not measured yet.

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

a2c_gae.py differs in one thing: its critic is asked for more than a baseline.
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
from typing import Any, Literal, NamedTuple, NoReturn

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

    num_envs: int = 16  # episodes per update (N), played in parallel to their ends
    baseline: Literal["none", "mean", "time", "value"] = "time"  # the others' mean, theirs at the same time step, V(s)
    reward_to_go: bool = True  # weigh an action by the rewards after it; otherwise by those of the whole episode
    learning_rate: float = 1e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    critic_epochs: int = 1  # gradient steps on V per update; the policy takes one
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    norm_adv: bool = False  # normalise advantages to mean 0 and standard deviation 1 in each batch
    ent_coef: float = 0.0  # weight of the entropy bonus, which keeps the policy exploring
    max_grad_norm: float = math.inf  # the gradient's norm is scaled down to at most this
    bootstrap_truncated: bool = True  # bootstrap where a time limit cut an episode; only --baseline value can
    reward_scale: float = 1.0  # factor on rewards inside the learner; aim at returns of the order of 10
    hidden: int = 64  # units in each of the two hidden layers of actor and critic

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "num_envs", "learning_rate", "critic_epochs")
        check(self, "> 0", "max_grad_norm", "reward_scale", "hidden")
        check(self, ">= 0", "ent_coef")
        check(self, "in [0, 1]", "gamma")


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=200_000, num_envs=16, learning_rate=2e-2, reward_scale=0.1, hidden=32,
    ),
    "LunarLander-v3": dict(
        total_timesteps=2_000_000, num_envs=4, baseline="value", learning_rate=5e-3, critic_epochs=10, gamma=0.98,
        ent_coef=0.01, reward_scale=0.05,
    ),
    "Acrobot-v1": dict(
        total_timesteps=300_000, num_envs=16, learning_rate=1e-2, reward_scale=0.1,
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


def step_unfinished(
    envs: gym.vector.VectorEnv, obs: np.ndarray, actions: np.ndarray, alive: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One step of the environments whose episode goes on: next_obs, rewards, terminated, truncated.

    The others rest at their last observation. A NumPy-vectorised environment cannot rest, and need not,
    as it costs the same; what it says of finished episodes is dropped.
    """
    if not isinstance(envs, gym.vector.SyncVectorEnv):
        next_obs, rewards, terminated, truncated, _ = envs.step(actions)
    else:
        next_obs, rewards = obs.copy(), np.zeros(len(alive))
        terminated, truncated = np.zeros_like(alive), np.zeros_like(alive)
        for n in np.flatnonzero(alive):
            next_obs[n], rewards[n], terminated[n], truncated[n], _ = envs.envs[n].step(actions[n])
    return next_obs, (rewards * alive).astype(np.float32), terminated & alive, truncated & alive


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
    log standard deviation is a parameter of its own, the same in every state.
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, hidden: int):
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
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
        """Weights and biases of the actor: what act() computes with."""
        linear = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        return [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in linear]

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


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """The share of the returns' variance that the critic foresaw: 1 perfect, 0 useless, < 0 harmful."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


# 5. Training ------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """N episodes, padded to the T steps of the longest: rows that are not valid lie after an episode's end."""

    obs: np.ndarray  # [T + 1, N, D]; the last row is the successor of the last transitions
    actions: np.ndarray  # [T, N] or [T, N, A]
    rewards: np.ndarray  # [T, N], like the three below
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    N = args.num_envs
    if N < 2 and args.baseline in ("mean", "time"):
        fail(f"--baseline {args.baseline} compares episodes: it needs --num-envs of at least 2")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    env = try_env(args.env, args.capture_video)
    obs_dim, space = env.observation_space.shape[0], env.action_space
    agent = Agent(obs_dim, space, args.hidden).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=device.type != "mps")
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, agent=agent, optimizer=optimizer)
    if args.eval:
        return run.finish(evaluate(args, agent, run.folder))

    rng = np.random.default_rng([args.seed, run.step])
    envs, step = make_envs(args.env, N), run.step
    env_seed: int | None = int(rng.integers(10**9))
    with run:
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr

            # Play N episodes.
            rollout = play(agent, envs, env_seed, rng)
            obs, actions, rewards, _, _, valid = rollout
            env_seed = None  # seeded once
            step += int(valid.sum())
            for n in range(N):
                run.episode(rewards[:, n].sum(), valid[:, n].sum())

            # Compare each action's return with the baseline.
            returns, baseline = returns_and_baseline(args, agent, rollout)
            advantages = returns - baseline

            # Learn from the rows that are transitions, as one batch [B], which is then forgotten.
            rollout = (obs[:-1], actions, advantages, returns)
            b_obs, b_actions, b_advantages, b_returns = (torch.from_numpy(x[valid]).to(device) for x in rollout)
            if args.norm_adv:
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
            logprobs, entropy = agent.logprobs_and_entropy(b_obs, b_actions)
            pg_loss = policy_loss(logprobs, b_advantages, N)
            entropy = entropy.mean()
            optimizer.zero_grad()
            (pg_loss - args.ent_coef * entropy * len(b_obs) / N).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            v_loss = None
            for _ in range(args.critic_epochs if args.baseline == "value" else 0):
                v_loss = 0.5 * mse_loss(agent.value(b_obs), b_returns)
                optimizer.zero_grad()
                v_loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

            run.report(step, {
                "charts/learning_rate": lr, "losses/policy_loss": pg_loss.item(),
                "losses/value_loss": None if v_loss is None else v_loss.item(), "losses/entropy": entropy.item(),
                "losses/explained_variance": explained_variance(baseline[valid], returns[valid]),
            })  # fmt: skip
    envs.close()
    return run.finish(evaluate(args, agent, run.folder))


def play(agent: Agent, envs: gym.vector.VectorEnv, seed: int | None, rng: np.random.Generator) -> Rollout:
    """Plays exactly one episode in each environment, from its reset to its end.

    Taking the first N episodes that finish would prefer short ones; here each counts once.
    """
    obs, layers = [envs.reset(seed=seed)[0].astype(np.float32)], agent.numpy_layers()
    rows, alive = [], np.ones(len(obs[0]), bool)
    while alive.any():
        actions = agent.act(layers, obs[-1], rng)
        env_actions = to_env(envs.single_action_space, actions)
        next_obs, rewards, terminated, truncated = step_unfinished(envs, obs[-1], env_actions, alive)
        obs.append(next_obs.astype(np.float32))
        rows.append((actions, rewards, terminated, truncated, alive))
        alive = alive & ~terminated & ~truncated
    actions, rewards, terminated, truncated, valid = (np.stack(column) for column in zip(*rows, strict=True))
    return Rollout(np.stack(obs), actions.astype(np.int64 if agent.discrete else np.float32), rewards,
                   terminated, truncated, valid)  # fmt: skip


def returns_and_baseline(args: Args, agent: Agent, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """The returns and what they are compared with, both [T, N]."""
    rewards = rollout.rewards * np.float32(args.reward_scale)
    if args.baseline == "value":
        with torch.no_grad():
            values = agent.value(torch.from_numpy(rollout.obs).to(next(agent.parameters()).device)).cpu().numpy()
        if args.bootstrap_truncated:  # as if the reward at the cut were followed by V(last observation)
            rewards = rewards + args.gamma * values[1:] * rollout.truncated
    returns = discounted_returns(rewards, args.gamma, args.reward_to_go)
    if args.baseline == "none":
        return returns, np.zeros_like(returns)
    if args.baseline == "value":
        return returns, values[:-1] if args.reward_to_go else np.broadcast_to(values[:1], returns.shape)
    return returns, mean_of_others(returns, rollout.valid, per_time_step=args.baseline == "time")


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
