# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium>=1.1", "ale-py>=0.10", "opencv-python>=4.8", "numpy>=1.26", "tyro>=0.9",
#                 "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0"]
# ///
"""Deep Q-networks (DQN) from pixels, on Atari and other games that show images.

The algorithm is that of dqn.py: move Q(s, a) towards the reward plus the best prediction at the next
state, on transitions drawn from a replay memory, with a slowly following target network. New is what
pixels need. A convolutional network reads the last four frames, since one frame does not show which
way the ball flies. The memory keeps every frame once, as bytes, and puts stacks together when drawn.

    state    s_t = the frames (x_(t-3), x_(t-2), x_(t-1), x_t), 84 x 84 in grey
    target   y = r_t + ... + gamma^(n-1) r_(t+n-1) + gamma^n Q_target(s_(t+n), argmax_a Q(s_(t+n), a))
    minimise mean huber( y - Q(s_t, a_t) )   over transitions drawn from the replay memory

Papers   Mnih et al. 2015, Human-level control through deep RL, doi 10.1038/nature14236 (1312.5602)
         Machado et al. 2018, Revisiting the Arcade Learning Environment, arXiv 1709.06009
         van Hasselt et al. 2016, Double Q-learning, arXiv 1509.06461
         Wang et al. 2016, Dueling Network Architectures, arXiv 1511.06581
         Hessel et al. 2018, Rainbow (n-step returns), arXiv 1710.02298

Run      python algos/dqn_atari.py
         python algos/dqn_atari.py --env ALE/Breakout-v5 --bf16
         python algos/dqn_atari.py --resume runs/<folder>                  (after Ctrl-C)
         python algos/dqn_atari.py --env ALE/Pong-v5 --no-double --n-step 1 --repeat-action-probability 0
                                   --terminal-on-life-loss                 (closest to the paper of 2015)
         python algos/dqn_atari.py --eval runs/<folder> --capture-video
         PYTHONPATH=tests python algos/dqn_atari.py --env catch_env:CatchDrift-v0    (a minute or two)

Expect   Catch at 84 x 84 (tests/catch_env.py), 200 greedy episodes after 32,000 steps, at most 1, three seeds which
         nothing was tuned on, with --bf16 on one core of an Intel Xeon, beside other work:
         PYTHONPATH=tests python benchmarks/run.py catch --seeds 3
         ball that falls straight  1.00 on all, 60 s of training
         ball that drifts          1.00 on all, 63 s of training at most
         the same, --frame-stack 1 .01 to .16: one frame does not show which way the ball flies
         GPU: not measured yet.

         Pong: one run of the preset, seed 301, with --bf16: 300,000 steps in 25 minutes on the same core (200 a
         second). The last 100 games ended at -14.2 on average, and rising; ten greedy games after training at
         -6.1 (a random player has -20.7, perfect is 21). No claim beyond it (benchmarks.md has the curve).
         With a gradient step on 32 transitions every 4 steps (--train-frequency 4; the preset's 8 does with half
         as many) it makes 86 steps a second, with --bf16, which this processor computes itself, 124 (medians
         over a minute, beside other work).

Deviations from the papers
 1. Sticky actions: the machine repeats the last action with probability 0.25 per frame (Machado et
    al.; the default of the v5 games). --repeat-action-probability 0 is Mnih's deterministic machine.
 2. A lost life does not end the return (Machado et al.); --terminal-on-life-loss has it so, while the
    game itself goes on: returns are always those of whole games.
 3. Several games are played in parallel.
 4. Adam in place of RMSProp, the learning rate annealed to zero, the gradient's norm clipped.
 5. The initial weights are those of He et al. (arXiv 1502.01852), and each stack's mean brightness is
    subtracted. With torch's own, smaller weights and Pong's grey background, all 32 channels of the
    first layer fell silent within 270,000 steps and every state was worth the same.
 6. Only termination ends the return. An episode cut by a time limit, or whose n-step return would
    reach beyond the newest step, is bootstrapped from the true observation there.
 7. n-step returns are not corrected for the exploring actions in them (nor are Rainbow's).
 8. Evaluation is greedy; Mnih's has 5 % random actions. Where a greedy player may wait forever, as in
    Breakout for the first serve, the game's own limit of 108,000 frames ends the episode.
 9. The replay memory is not saved: after --resume, learning-starts steps fill it before learning goes on.
"""

from __future__ import annotations

import contextlib
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

with contextlib.suppress(ImportError):  # without it the ALE games are unknown; other games need it not
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gym.register_envs(ale_py)

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "ALE/Pong-v5"  # gymnasium id of a game that shows images; actions must be discrete
    seed: int = 1  # seed of every random number: network, actions, replay, environments
    total_timesteps: int = 10_000_000  # environment steps to train for, over all parallel environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks run; auto is a GPU if there is one
    track: bool = False  # send the metrics to Weights & Biases too (WANDB_PROJECT, _ENTITY and _MODE say where)
    run_dir: str = "runs"  # folder in which the run's own folder is made
    capture_video: bool = False  # film the first evaluation episode
    eval: str | None = None  # evaluate this saved run (its folder) and exit
    resume: str | None = None  # go on with this interrupted run (its folder)
    eval_episodes: int = 30  # greedy episodes played after training, on seeds never trained on

    num_envs: int = 8  # environments stepped in parallel (N)
    buffer_size: int = 1_000_000  # transitions that the replay memory holds; a million take 7.07 GB
    learning_starts: int = 50_000  # environment steps that fill the memory before the first gradient step
    train_frequency: int = 4  # environment steps, over all environments, per gradient step
    batch_size: int = 32  # transitions per gradient step (B)
    learning_rate: float = 1e-4  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    max_grad_norm: float = 10.0  # the gradient's norm is scaled down to at most this
    gamma: float = 0.99  # discount factor of future rewards, in [0, 1]
    n_step: int = 3  # rewards summed before bootstrapping; 1 is the plain temporal difference
    target_network_frequency: int = 2000  # gradient steps between two updates of the target network
    tau: float = 1.0  # share of the online network in such an update; 1 copies it
    start_e: float = 1.0  # share of random actions (epsilon) at the start
    end_e: float = 0.01  # share of random actions after the exploration phase
    exploration_fraction: float = 0.1  # share of the training over which epsilon falls from start-e to end-e
    double: bool = True  # choose the next action with the online network, value it with the target network
    dueling: bool = False  # predict the state's value and each action's advantage, and add them

    frame_stack: int = 4  # frames that the network sees at once; 1 hides every movement
    frame_skip: int = 4  # Atari: frames for which an action is held; the last two are merged by their maximum
    noop_max: int = 30  # Atari: an episode begins with up to this many frames of doing nothing, so that starts differ
    repeat_action_probability: float = 0.25  # Atari: chance per frame that the last action is repeated ("sticky")
    terminal_on_life_loss: bool = False  # Atari: a lost life ends the return as death does; the game goes on
    clip_rewards: bool = True  # learn from the sign of each reward only (scores are reported unclipped)
    threads: int = 1  # CPU cores that the networks may use; how many changes what is learnt by rounding only
    bf16: bool = False  # run the networks in bfloat16: for GPUs, and CPUs that compute in it (AVX512-BF16, AMX)

    def __post_init__(self):
        check(self, "> 0", "total_timesteps", "eval_episodes", "num_envs", "train_frequency", "batch_size")
        check(self, "> 0", "learning_rate", "max_grad_norm", "n_step", "target_network_frequency", "tau", "frame_stack")
        check(self, "> 0", "frame_skip", "threads")
        check(self, ">= 0", "learning_starts", "noop_max")
        check(self, "in [0, 1]", "gamma", "tau", "start_e", "end_e", "exploration_fraction")
        check(self, "in [0, 1]", "repeat_action_probability")
        if self.buffer_size < 2 * self.num_envs:
            fail(f"--buffer-size must hold two steps of every environment, {2 * self.num_envs} at least")


CATCH = dict(
    total_timesteps=32_000, buffer_size=20_000, learning_starts=1000, num_envs=16, train_frequency=16,
    learning_rate=5e-4, target_network_frequency=62, exploration_fraction=0.4, double=False,
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "ALE/Pong-v5": dict(
        total_timesteps=300_000, buffer_size=100_000, learning_starts=5000, learning_rate=2.5e-4,
        train_frequency=8, target_network_frequency=250, double=False,
    ),
    "catch_env:Catch-v0": CATCH,  # the small game of tests/catch_env.py
    "catch_env:CatchDrift-v0": CATCH,
}  # fmt: skip


# 2. Environment ---------------------------------------------------------------------------------


class OnlyLives(gym.Wrapper):
    """Drops the info dictionaries, which cannot all be stacked, but for the lives that a game counts."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**kwargs)
        return obs, {"lives": info.get("lives", 0)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {"lives": info.get("lives", 0)}


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment that shows single grey frames [H, W]; ends the program with one line if it cannot be made.

    An Atari v5 game skips frames and repeats actions by itself. The skipping is switched off here and
    done by the wrapper instead, which also merges the last two frames: some sprites flicker.
    """
    kwargs: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}  # not every constructor takes it
    atari = args.env.startswith(("ALE/", "ale_py:ALE/"))
    if atari:
        kwargs |= {"frameskip": 1, "repeat_action_probability": args.repeat_action_probability}
    elif args.terminal_on_life_loss:
        fail(f"--terminal-on-life-loss is for the ALE games; {args.env} counts no lives")
    try:
        env = gym.make(args.env, disable_env_checker=True, **kwargs)
        gym.spec(args.env.split(":")[-1])  # make() guesses a missing version, spec() does not
        if not atari and "ale_py" in str(env.spec.entry_point):
            fail(f"{args.env} is an old name; Atari games are called ALE/<Game>-v5 here, see --frame-skip for the rest")
        if atari:
            return OnlyLives(gym.wrappers.AtariPreprocessing(env, args.noop_max, args.frame_skip))
        space = env.observation_space
        if getattr(space, "dtype", None) != np.uint8 or len(space.shape) not in (2, 3):
            fail(f"{args.env} observes {space}; this script handles images of bytes; see dqn.py")
        if len(space.shape) == 3:
            env = gym.wrappers.GrayscaleObservation(env)
        if max(space.shape[:2]) > 84 or min(space.shape[:2]) < 36:  # the least that the network can read
            env = gym.wrappers.ResizeObservation(env, (84, 84))
    except Exception as error:  # whatever the environment's own code raises
        fail(f"cannot make the environment {args.env!r}: {error}")
    if not isinstance(env.action_space, Discrete):
        fail(f"{args.env} has the action space {env.action_space}; this script handles Discrete; see ppo.py")
    return OnlyLives(env)


def try_env(args: Args, film: bool) -> gym.Env:
    """An environment that has been reset and stepped once: what fails, fails before anything is trained."""
    env = make_env(args, "rgb_array" if film else None)
    try:
        env.reset(seed=0)
        env.action_space.seed(0)
        obs, reward, *_ = env.step(env.action_space.sample())
        assert np.shape(obs) == env.observation_space.shape, f"an observation of shape {np.shape(obs)}"
        assert np.shape(reward) == (), f"a reward of shape {np.shape(reward)}, where a number is expected"
        assert not film or np.ndim(env.render()) == 3, "no rgb_array to film"
    except Exception as error:  # whatever the environment's own code raises
        fail(f"{args.env} cannot be played: {type(error).__name__}: {error}")
    return env


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments that reset in NEXT_STEP mode.

    In this mode the step after an episode's end ignores the action and returns the first observation of the
    next episode. That row is no transition; in return obs[t + 1] is always the true successor of obs[t].
    """
    return gym.vector.SyncVectorEnv([lambda: make_env(args)] * args.num_envs, autoreset_mode=NEXT_STEP)


# 3. Model ---------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """The network of Mnih 2015: from a stack of frames to the value of each action."""

    def __init__(self, stack_shape: tuple[int, int, int], num_actions: int, dueling: bool, bf16: bool):
        super().__init__()
        self.dueling, self.bf16 = dueling, bf16
        self.convolutions = nn.Sequential(
            nn.Conv2d(stack_shape[0], 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        features = self.convolutions(torch.zeros(1, *stack_shape)).shape[1]  # 3136 for 84 x 84
        self.heads = nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, num_actions + dueling))
        for layer in [*self.convolutions, *self.heads]:
            if hasattr(layer, "weight"):  # He et al. 2015: signals keep their size from layer to layer
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.heads[-1].weight, -0.01, 0.01)

    def forward(self, stacks: Tensor) -> Tensor:  # bytes [B, K, H, W] -> [B, A]
        pixels = stacks.float() / 255
        pixels -= pixels.mean((1, 2, 3), keepdim=True)  # a grey background would switch whole channels off
        with torch.autocast(stacks.device.type, torch.bfloat16, enabled=self.bf16):
            heads = self.heads(self.convolutions(pixels)).float()
        return combine_dueling(heads) if self.dueling else heads

    @torch.no_grad()
    def values(self, stacks: np.ndarray) -> np.ndarray:
        """The values [N, A] at stacks [N, K, H, W], as forward gives them."""
        return self(torch.from_numpy(stacks).to(self.heads[0].weight.device)).cpu().numpy()


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


def td_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean Huber error, all [B]: its gradient is the error clipped to [-1, 1] (Methods, Mnih 2015)."""
    assert predictions.shape == targets.shape
    return huber_loss(predictions, targets)


@torch.no_grad()
def update_target(online: nn.Module, target: nn.Module, tau: float) -> None:
    """Moves the target network by the share tau towards the online one; tau 1 copies it."""
    for follower, leader in zip(target.parameters(), online.parameters(), strict=True):
        follower.lerp_(leader, tau)


class Replay:
    """The latest steps of N environments: a ring of T rows, one row a step, arrays [T, N, ...].

    Row t + 1 holds what followed row t. So each frame is stored once, as bytes, and n-step returns are
    folded when drawn: every transition is at hand as soon as it was played. The row at head has a
    frame and no action yet. Rows that only reset an environment (see make_envs) are not valid.

    age counts the frames before this one in its episode, K - 1 at most: a stack of K frames reaches no further
    back, and repeats the first one instead. The K - 1 oldest rows are there for the stacks of their successors.
    """

    def __init__(self, size: int, num_envs: int, frame_shape: tuple[int, ...], frame_stack: int):
        self.N, self.K, self.T = num_envs, frame_stack, math.ceil(size / num_envs) + frame_stack
        self.head, self.rows = 0, 0  # where the next step goes; how many rows before it are filled
        needed = self.T * self.N * math.prod(frame_shape)
        try:
            self.frames = np.zeros((self.T, self.N, *frame_shape), np.uint8)  # takes up memory as it fills
        except (MemoryError, ValueError):
            fail(f"no memory for a replay of {size:,} transitions, {needed / 2**30:,.1f} GiB; lower --buffer-size")
        self.age = np.zeros((self.T, self.N), np.uint8)
        self.actions = np.zeros((self.T, self.N), np.int64)
        self.rewards = np.zeros((self.T, self.N), np.float32)
        self.terminated, self.truncated, self.valid = np.zeros((3, self.T, self.N), bool)

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        """Completes the row at head, all [N], and starts the next one with next_obs [N, H, W]."""
        t = self.head
        self.actions[t], self.rewards[t], self.valid[t] = actions, rewards, valid
        self.terminated[t], self.truncated[t] = terminated, truncated
        self.head = (t + 1) % self.T
        self.rows = min(self.rows + 1, self.T - self.K)
        self.frames[self.head] = next_obs
        self.age[self.head] = np.where(valid, np.minimum(self.age[t] + 1, self.K - 1), 0)

    def stacks(self, t: Any, n: np.ndarray) -> np.ndarray:
        """The frames at these places and the K - 1 before each, oldest first: [B, K, H, W]."""
        back = np.minimum(np.arange(self.K)[::-1, None], self.age[t, n])  # [K, B]
        return self.frames[((t - back) % self.T).T, n[:, None]]

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
        return self.stacks(t, n), self.actions[t, n], returns, discounts, self.stacks((t + horizons) % self.T, n)


# 5. Training ------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    env = try_env(args, args.capture_video)
    frame_shape, space, num_actions = env.observation_space.shape, env.action_space, int(env.action_space.n)
    q_net = QNetwork((args.frame_stack, *frame_shape), num_actions, args.dueling, args.bf16).to(device)
    target_net = copy.deepcopy(q_net)
    parameters = list(q_net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=device.type != "mps")
    parts = {"q_net": q_net, "target_net": target_net, "optimizer": optimizer}
    run = Run(args, args.env, args.total_timesteps, env.spec.reward_threshold, **parts)
    if args.eval:
        return run.finish(**evaluate(args, q_net, run.folder))

    rng, N = np.random.default_rng([args.seed, run.step]), args.num_envs
    replay = Replay(args.buffer_size, N, frame_shape, args.frame_stack)
    envs = make_envs(args)
    obs, _ = envs.reset(seed=int(rng.integers(10**9)))
    replay.frames[replay.head] = obs
    ended, lives = np.zeros(N, bool), np.zeros(N, int)
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
            random_actions = rng.integers(num_actions, size=N)
            greedy = q_net.values(replay.stacks(replay.head, np.arange(N))).argmax(1)
            actions = np.where(rng.random(N) < epsilon, random_actions, greedy)
            obs, rewards, terminated, truncated, infos = envs.step(actions + space.start)
            valid = ~ended  # the row after an episode's end only resets
            died = terminated
            if args.terminal_on_life_loss:
                died = terminated | (valid & (infos["lives"] < lives))
                lives = infos["lives"]
            clipped = np.sign(rewards) if args.clip_rewards else rewards
            replay.add(actions, clipped, died, truncated, valid, obs)
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
                with torch.no_grad():
                    next_q_online = q_net(b_next_obs) if args.double else None
                    targets = td_target(b_returns, b_discounts, target_net(b_next_obs), next_q_online)
                predictions = q_net(b_obs).gather(1, b_actions[:, None]).squeeze(1)  # [B]
                loss = td_loss(predictions, targets)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                if update % args.target_network_frequency == 0:
                    update_target(q_net, target_net, args.tau)
                losses.append(loss.detach())
                q_values.append(predictions.detach())

            if step - run.step >= min(args.total_timesteps / 200, 1000) or step >= args.total_timesteps:
                run.report(step, {
                    "charts/learning_rate": lr, "charts/epsilon": epsilon,
                    "losses/td_loss": torch.stack(losses).mean().item() if losses else None,
                    "losses/q_values": torch.cat(q_values).mean().item() if losses else None,
                })  # fmt: skip
                losses, q_values = [], []

    envs.close()
    return run.finish(**evaluate(args, q_net, run.folder))


# 6. Evaluation ----------------------------------------------------------------------------------


def evaluate(args: Args, q_net: QNetwork, folder: Path) -> dict[str, Any]:
    """Undiscounted returns of greedy episodes, all played at once on seeds of their own, [episodes].

    Rewards are not clipped. predicted_return is Q at their first states, obtained_return the discounted return
    that followed: the difference is by how much the network over-estimates. What a time limit cut off counts
    as predicted.
    """
    N, K = args.eval_episodes, args.frame_stack
    envs = [make_env(args, "rgb_array" if args.capture_video and n == 0 else None) for n in range(N)]
    if args.capture_video:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(folder / "videos"), disable_logger=True)
    limit, start = envs[0].spec.max_episode_steps or 27_000, envs[0].action_space.start  # 108,000 frames of a game
    frames = np.stack([env.reset(seed=10**9 + args.seed + n)[0] for n, env in enumerate(envs)])
    stacks = frames[:, None].repeat(K, 1)  # [N, K, H, W]
    q = q_net.values(stacks)  # [N, A]
    returns, predicted, obtained, alive = np.zeros(N), q.max(1), np.zeros(N), np.arange(N)
    for t in range(limit):
        rewards, terminated, truncated = np.zeros(N), np.zeros(N, bool), np.zeros(N, bool)
        for n in alive:
            frames[n], rewards[n], terminated[n], truncated[n], _ = envs[n].step(q[n].argmax() + start)
        stacks = np.concatenate((stacks[:, 1:], frames[:, None]), 1)
        q[alive] = q_net.values(stacks[alive])
        returns += rewards
        learnt = np.sign(rewards) if args.clip_rewards else rewards
        obtained += args.gamma**t * (learnt + args.gamma * q.max(1) * (truncated & ~terminated))
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
