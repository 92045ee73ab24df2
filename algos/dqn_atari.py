# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium>=1.1", "ale-py>=0.10", "opencv-python>=4.8", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
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
         python algos/dqn_atari.py --save-buffer                           (and after Ctrl-C:)
         python algos/dqn_atari.py --resume runs/<folder>
         python algos/dqn_atari.py --env ALE/Pong-v5 --no-double --n-step 1 --repeat-action-probability 0
                                   --terminal-on-life-loss                 (closest to the paper of 2015)
         python algos/dqn_atari.py --eval runs/<folder> --capture-video
         PYTHONPATH=tests python algos/dqn_atari.py --env catch_env:CatchDrift-v0    (a minute or two)

Expect   Steps a second of ALE/Pong-v5, medians on an AMD EPYC with nothing else running, torch 2.13,
         with a gradient step on 32 transitions every 4 steps (--train-frequency 32; the preset's 64 does
         with half as many): 81 on one core, 107 on two (--threads 2); with --bf16, which this processor
         computes itself, 136 on one and no more on two. (Taken before deviation 5 was added. The run below made 193.)
         Pong: one run of the preset, seed 101, with --bf16: 300,000 steps in 26 minutes on one core beside other
         work. The last 100 games ended at -12.4 on average, and rising; ten greedy games after training at -6.8
         (a random player has -20.7, perfect is 21). No claim beyond it (benchmarks.md has the curve).
         Catch at 84 x 84 (tests/catch_env.py), 200 greedy episodes after 32,000 steps, at most 1, seeds 201 and
         202 (20,000 steps missed on one of 101 and 102), with --bf16 on one core beside other work:
         PYTHONPATH=tests python benchmarks/run.py catch --first-seed 201 --seeds 2
         ball that falls straight  1.00 and 1.00, 75 s of training at most
         ball that drifts          1.00 and 1.00, 81 s of training at most
         the same, --frame-stack 1 .01 and .09: one frame does not show which way the ball flies
         GPU: not measured yet.

Deviations from the papers
 1. Sticky actions: the machine repeats the last action with probability 0.25 per frame (Machado et
    al.; the default of the v5 games). --repeat-action-probability 0 is Mnih's deterministic machine.
 2. A lost life does not end the return (Machado et al.); --terminal-on-life-loss has it so, while the
    game itself goes on: returns are always those of whole games.
 3. Several games are played in parallel, and several gradient steps follow each other.
 4. Adam in place of RMSProp, the learning rate annealed to zero, the gradient's norm clipped.
 5. The initial weights are those of He et al. (arXiv 1502.01852), and each stack's mean brightness is
    subtracted. With torch's own, smaller weights and Pong's grey background, all 32 channels of the
    first layer fell silent within 270,000 steps and every state was worth the same.
 6. Only termination ends the return. An episode cut by a time limit, or whose n-step return would
    reach beyond the newest step, is bootstrapped from the true observation there.
 7. n-step returns are not corrected for the exploring actions in them (nor are Rainbow's).
 8. Evaluation is greedy; Mnih's has 5 % random actions. Where a greedy player may wait forever, as in
    Breakout for the first serve, the game's own limit of 108,000 frames ends the episode.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import json
import math
import os
import platform
import random
import re
import shutil
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

with contextlib.suppress(ImportError):  # without it the ALE games are unknown; other games need it not
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gym.register_envs(ale_py)

# 1. Settings ------------------------------------------------------------------------------------


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "ALE/Pong-v5"
    """gymnasium id of a game that shows images; actions must be discrete"""
    seed: int = 1
    """seed of every random number: network, actions, replay, environments; >= 0"""
    total_timesteps: int = 10_000_000
    """environment steps to train for, counted over all parallel environments; one is frame-skip frames"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks run; auto is cuda where there is one, else cpu"""
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
    eval_episodes: int = 30
    """greedy episodes played after training, on seeds never trained on; >= 1"""

    num_envs: int = 8
    """environments stepped in parallel (N)"""
    learning_rate: float = 1e-4
    """Adam's step size at the start; > 0"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-timesteps"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    buffer_size: int = 1_000_000
    """transitions that the replay memory holds before it forgets the oldest; a million take 7.07 GB"""
    save_buffer: bool = False
    """write the replay memory beside model.pt at the end and on Ctrl-C, so that --resume goes on with it"""
    batch_size: int = 32
    """transitions per gradient step (B)"""
    learning_starts: int = 50_000
    """environment steps played before the first gradient step"""
    train_frequency: int = 32
    """environment steps, over all environments, between two learning phases"""
    gradient_steps: int = 8
    """gradient steps in a learning phase"""
    target_network_frequency: int = 8000
    """environment steps between two copies of the network into the target network"""
    start_e: float = 1.0
    """share of random actions (epsilon) at the start, in [0, 1]"""
    end_e: float = 0.01
    """share of random actions after the exploration phase, in [0, 1]"""
    exploration_fraction: float = 0.1
    """share of total-timesteps over which epsilon falls linearly from start-e to end-e; in [0, 1]"""
    max_grad_norm: float = 10.0
    """the gradient's norm is scaled down to at most this; > 0"""

    double: bool = True
    """choose the next action with the online network and value it with the target network (van Hasselt)"""
    dueling: bool = False
    """predict the state's value and each action's advantage, and add them (Wang)"""
    n_step: int = 3
    """rewards summed before bootstrapping; 1 is the plain temporal difference"""

    frame_stack: int = 4
    """frames that the network sees at once; 1 hides every movement"""
    frame_skip: int = 4
    """Atari: frames for which an action is held; the last two are merged by their maximum"""
    noop_max: int = 30
    """Atari: an episode begins with 1 to this many frames of doing nothing, so that starts differ; 0 is none"""
    repeat_action_probability: float = 0.25
    """Atari: chance per frame that the machine repeats the previous action ("sticky"), in [0, 1]"""
    terminal_on_life_loss: bool = False
    """Atari: a lost life ends the return as death does; the game goes on"""
    clip_rewards: bool = True
    """learn from the sign of each reward only (scores are reported unclipped)"""
    threads: int = 1
    """CPU cores that the networks may use; how many does not change what is learnt but for rounding"""
    bf16: bool = False
    """run the networks in bfloat16; meant for GPUs, and for CPUs whose arithmetic has it (AVX512-BF16, AMX)"""


CATCH = dict(
    total_timesteps=32_000, buffer_size=20_000, learning_starts=1000, num_envs=16, train_frequency=64, gradient_steps=4,
    learning_rate=5e-4, target_network_frequency=1000, exploration_fraction=0.4, double=False,
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "ALE/Pong-v5": dict(
        total_timesteps=300_000, buffer_size=100_000, learning_starts=5000, learning_rate=2.5e-4,
        train_frequency=64, target_network_frequency=2000, double=False,
    ),
    "catch_env:Catch-v0": CATCH,  # the small game of tests/catch_env.py
    "catch_env:CatchDrift-v0": CATCH,
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "num_envs", "buffer_size", "batch_size", "train_frequency", "gradient_steps",
                 "target_network_frequency", "n_step", "frame_stack", "frame_skip", "eval_episodes",
                 "learning_rate", "max_grad_norm", "threads"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "learning_starts", "noop_max"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "start_e", "end_e", "exploration_fraction", "repeat_action_probability"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.buffer_size < 2 * args.num_envs:
        fail("--buffer-size must hold two steps of every environment")


# 2. Environment ---------------------------------------------------------------------------------


def make_env(args: Args, **kwargs: Any) -> gym.Env:
    """One environment that shows single grey frames [H, W]; fails with one line if there is none.

    An Atari v5 game skips frames and repeats actions by itself. The skipping is switched off here and
    done by the wrapper instead, which also merges the last two frames: some sprites flicker.
    """
    atari = args.env.startswith("ALE/")
    if atari:
        kwargs |= {"frameskip": 1, "repeat_action_probability": args.repeat_action_probability}
    elif args.terminal_on_life_loss:
        fail(f"--terminal-on-life-loss is for the ALE games; {args.env} counts no lives")
    try:
        env = gym.make(args.env, disable_env_checker=True, **kwargs)
        if not atari and "ale_py" in str(env.spec.entry_point):
            fail(f"{args.env} is an old name; Atari games are called ALE/<Game>-v5 here, see --frame-skip for the rest")
        if atari:
            return gym.wrappers.AtariPreprocessing(env, noop_max=args.noop_max, frame_skip=args.frame_skip)
        space = env.observation_space
        if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
            fail(f"{args.env} observes {space}; this script handles images of bytes; see dqn.py")
        if not isinstance(env.action_space, gym.spaces.Discrete):
            fail(f"{args.env} has the action space {env.action_space}; this script handles Discrete; see ppo.py")
        if len(space.shape) == 3:
            env = gym.wrappers.GrayscaleObservation(env)
        if max(space.shape[:2]) > 84 or min(space.shape[:2]) < 36:  # the least that the network can read
            env = gym.wrappers.ResizeObservation(env, (84, 84))
    except (gym.error.Error, ImportError, AssertionError, ValueError) as error:
        fail(f"cannot make the environment {args.env!r}: {error}")
    return env


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments that reset in NEXT_STEP mode.

    In this mode the step after an episode's end ignores the action and returns the first observation
    of the next episode with reward 0. That row is no transition, and the replay memory masks it out;
    in return obs[t + 1] is always the true successor of obs[t], which bootstrapping needs.
    """
    envs = SyncVectorEnv([lambda: make_env(args)] * args.num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


# 3. Model ---------------------------------------------------------------------------------------


def combine_dueling(heads: Tensor) -> Tensor:
    """Q = V + A - mean A (Eq. 9, Wang 2016); heads [B, 1 + A] hold V and A."""
    value, advantages = heads[:, :1], heads[:, 1:]
    return value + advantages - advantages.mean(1)[:, None]


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
    def act(self, stacks: np.ndarray) -> np.ndarray:
        """The greedy actions [N] at stacks [N, K, H, W]."""
        return self(torch.from_numpy(stacks).to(self.heads[0].weight.device)).argmax(1).cpu().numpy()


# 4. The mathematics -----------------------------------------------------------------------------


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


class Replay:
    """The latest steps of N environments, in the order in which they were played.

    Flat ring buffers: step t of environment n is slot t * N + n, so that N slots further lies the next
    step of the same environment. Every frame is stored once, as bytes; stacks of K frames are put
    together and n-step returns folded when drawn. age counts the frames before this one in its
    episode, K - 1 at most: a stack reaches no further back, and repeats the first frame instead.
    The row at head holds the current frame and no transition yet. The K - 1 oldest rows are kept
    for the stacks of their successors only, since what preceded them is overwritten.
    """

    ARRAYS = ("frames", "age", "actions", "rewards", "terminated", "truncated", "valid")

    def __init__(self, buffer_size: int, num_envs: int, frame_shape: tuple[int, ...], frame_stack: int):
        self.N, self.K = num_envs, frame_stack
        self.spare = self.N * self.K  # slots that hold no whole transition
        self.slots = -(-buffer_size // self.N) * self.N + self.spare
        try:
            self.frames = np.zeros((self.slots, *frame_shape), np.uint8)  # takes up memory as it fills
        except (MemoryError, ValueError):
            fail(f"no memory for {self.slots:,} frames; choose a smaller --buffer-size than {buffer_size:,}")
        self.age = np.zeros(self.slots, np.uint8)
        self.actions = np.zeros(self.slots, np.int64)
        self.rewards = np.zeros(self.slots, np.float32)
        self.terminated, self.truncated, self.valid = (np.zeros(self.slots, bool) for _ in range(3))
        self.head, self.size = 0, 0  # both in slots

    def row(self, steps_back: int = 0) -> np.ndarray:
        """The N slots that lie this many steps before the current one."""
        return (self.head - steps_back * self.N) % self.slots + np.arange(self.N)

    def begin(self, obs: np.ndarray) -> None:
        """Takes the first frames [N, H, W] of a training, or of its resumption."""
        if self.size:  # what was under way when the saved run stopped is cut, as by a time limit
            self.truncated[self.row(1)] = True
            self.add(0, 0.0, False, False, False, obs)
        self.frames[self.row()] = obs

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        """Completes the current row, all [N], and starts the next one with next_obs [N, H, W].

        A row that is not valid only reset its environment: the frame that follows it begins an episode.
        """
        row = self.row()
        self.actions[row], self.rewards[row], self.valid[row] = actions, rewards, valid
        self.terminated[row], self.truncated[row] = terminated, truncated
        self.head = (self.head + self.N) % self.slots
        self.size = min(self.size + self.N, self.slots - self.spare)
        self.frames[self.row()] = next_obs
        self.age[self.row()] = np.where(valid, np.minimum(self.age[row] + 1, self.K - 1), 0)

    def stacks(self, slots: np.ndarray) -> np.ndarray:
        """The frames of these slots and the K - 1 before each, oldest first: [B, K, H, W]."""
        back = np.minimum(np.arange(self.K - 1, -1, -1), self.age[slots][:, None])  # [B, K]
        return self.frames[(slots[:, None] - back * self.N) % self.slots]

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Slots of count transitions, uniformly from the whole memory."""

        def some(count: int) -> np.ndarray:
            return (self.head - 1 - rng.integers(self.size, size=count)) % self.slots

        slots = some(count)
        while not (kept := self.valid[slots]).all():  # draw again where the row only reset
            slots[~kept] = some(int((~kept).sum()))
        return slots

    def batch(self, slots: np.ndarray, n_step: int, gamma: float) -> tuple[np.ndarray, ...]:
        """The transitions [B] that start at these slots: obs, actions, returns, discounts, next_obs."""
        k = np.arange(n_step)[:, None]
        steps = (slots + k * self.N) % self.slots  # [n, B]
        steps_left = (self.head - slots - 1) % self.slots // self.N  # until the newest row
        # The newest row is not followed by another: bootstrap from the current observation.
        cut = self.truncated[steps] | (k == steps_left)
        returns, discounts, horizons = n_step_return(self.rewards[steps], self.terminated[steps], cut, gamma)
        next_slots = (slots + horizons * self.N) % self.slots
        return self.stacks(slots), self.actions[slots], returns, discounts, self.stacks(next_slots)

    def save(self, folder: Path) -> None:
        """Writes the memory into this folder, whole or not at all: a file per array, frames uncompressed."""
        new = folder.with_name(folder.name + ".tmp")
        used = self.slots if self.size == self.slots - self.spare else self.head + self.N
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            for key in self.ARRAYS:
                np.save(new / f"{key}.npy", getattr(self, key)[:used])
            np.save(new / "sizes.npy", [self.slots, self.N, self.K, self.head, self.size])
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        except OSError as error:
            fail(f"cannot write the replay memory: {error}")

    def load(self, folder: Path) -> None:
        """Reads what save wrote."""
        *sizes, self.head, self.size = np.load(folder / "sizes.npy").tolist()
        if sizes != [self.slots, self.N, self.K]:
            fail("the saved replay memory needs its own --buffer-size, --num-envs and --frame-stack")
        for key in self.ARRAYS:
            saved = np.load(folder / f"{key}.npy", mmap_mode="r")  # a second copy in memory may not fit
            getattr(self, key)[: len(saved)] = saved


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/episodic_return", "charts/episodic_length", "charts/epsilon",
          "losses/td_loss", "losses/q_values", "charts/SPS")  # fmt: skip


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    rng = seed_everything(args.seed)

    env = make_env(args)  # says in one line what is wrong, if anything is
    frame_shape, action_space, threshold = env.observation_space.shape, env.action_space, env.spec.reward_threshold
    env.close()
    envs = make_envs(args)
    q_net = QNetwork((args.frame_stack, *frame_shape), int(action_space.n), args.dueling, args.bf16).to(device)
    target_net = copy.deepcopy(q_net).requires_grad_(False)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, fused=device.type != "mps")
    updates = 0

    N, T = args.num_envs, max(args.train_frequency // args.num_envs, 1)  # a phase plays T steps of N environments
    replay = Replay(args.buffer_size, N, frame_shape, args.frame_stack)
    target_every = max(round(args.target_network_frequency * args.gradient_steps / (T * N)), 1)  # in updates

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def state() -> dict[str, Any]:
        return {"q_net": q_net.state_dict(), "target_net": target_net.state_dict(),
                "optimizer": optimizer.state_dict(), "updates": updates, "rng": rng.bit_generator.state}  # fmt: skip

    learning_starts = args.learning_starts
    if saved:
        restore(saved, q_net=q_net, target_net=target_net, optimizer=optimizer)
        updates, rng.bit_generator.state = saved["updates"], saved["rng"]
        memory = checkpoint_path(args.resume).parent / "replay"
        if memory.is_dir():
            replay.load(memory)
            print(f"going on with the replay memory of {replay.size:,} transitions")
        else:
            learning_starts += saved["record"]["step"]
            print(f"the replay memory was not saved (--save-buffer); {args.learning_starts:,} steps will fill it first")

    terminated = truncated = np.zeros(N, bool)
    episode_return, episode_length, lives = np.zeros(N), np.zeros(N, int), np.zeros(N, int)
    losses, q_values = [], []

    with (
        RunRecord(args, args.env, args.total_timesteps, device, state, CURVES, saved, threshold) as run,
        contextlib.ExitStack() as at_exit,
    ):
        if args.save_buffer:
            at_exit.callback(replay.save, run.folder / "replay")  # on Ctrl-C too
        step, report_every = run.step, min(max(args.total_timesteps // 200, 1), 1000)
        obs, _ = envs.reset(seed=args.seed * 10_000 + step)
        replay.begin(obs)
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            exploration = args.exploration_fraction * args.total_timesteps
            epsilon = linear_schedule(args.start_e, args.end_e, exploration, step)

            # Play. In NEXT_STEP mode the row after an episode's end only resets: it is not valid.
            explore, random_actions = rng.random((T, N)) < epsilon, rng.integers(action_space.n, size=(T, N))
            for t in range(T):
                actions = np.where(explore[t], random_actions[t], q_net.act(replay.stacks(replay.row())))
                valid = ~(terminated | truncated)
                obs, rewards, terminated, truncated, infos = envs.step(actions + action_space.start)
                died = terminated
                if args.terminal_on_life_loss:
                    died = terminated | valid & (infos["lives"] < lives)
                    lives = infos["lives"]
                learner_rewards = np.sign(rewards) if args.clip_rewards else rewards
                replay.add(actions, learner_rewards, died, truncated, valid, obs)
                step += int(np.count_nonzero(valid))
                episode_return += rewards
                episode_length += valid
                for n in np.flatnonzero(terminated | truncated):
                    run.episode(step, episode_return[n], episode_length[n])
                    episode_return[n] = episode_length[n] = 0

            # Learn.
            for _ in range(args.gradient_steps if step >= learning_starts else 0):
                batch = replay.batch(replay.draw(args.batch_size, rng), args.n_step, args.gamma)
                mb_obs, mb_actions, mb_returns, mb_discounts, mb_next_obs = map(to_device, batch)
                with torch.no_grad():
                    next_q_online = q_net(mb_next_obs) if args.double else None
                    targets = td_target(mb_returns, mb_discounts, target_net(mb_next_obs), next_q_online)
                predictions = q_net(mb_obs).gather(1, mb_actions.unsqueeze(1)).squeeze(1)  # [B]
                assert predictions.shape == targets.shape
                loss = nn.functional.huber_loss(predictions, targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(q_net.parameters(), args.max_grad_norm)
                optimizer.step()
                updates += 1
                if updates % target_every == 0:
                    target_net.load_state_dict(q_net.state_dict())
                losses.append(loss.detach())
                q_values.append(predictions.detach().mean())

            if step // report_every > run.step // report_every or step >= args.total_timesteps:
                run.report(step, {
                    "charts/learning_rate": lr, "charts/epsilon": epsilon,
                    "losses/td_loss": torch.stack(losses).mean().item() if losses else None,
                    "losses/q_values": torch.stack(q_values).mean().item() if losses else None,
                })  # fmt: skip
                losses, q_values = [], []

        envs.close()
        run.finish(lambda: evaluate(args, q_net, run.video_folder))
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------


def evaluate(args: Args, q_net: QNetwork, video_folder: Path | None = None) -> np.ndarray:
    """Undiscounted returns of greedy episodes on seeds of their own, [episodes]; rewards are not clipped."""
    env = make_env(args, render_mode="rgb_array") if video_folder else make_env(args)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    env = gym.wrappers.FrameStackObservation(env, args.frame_stack)  # repeats the first frame, as Replay does
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed * 10_000 + 5_000 if episode == 0 else None)
        done = False
        while not done:
            action = q_net.act(obs[None])[0]  # from [1, K, H, W]
            obs, reward, terminated, truncated, _ = env.step(action + env.action_space.start)
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def evaluate_saved(args: Args) -> None:
    """--eval: rebuilds the saved network, plays it and prints the score."""
    validate(args)
    torch.set_num_threads(args.threads)
    saved = load_checkpoint(args.eval)
    env = make_env(args)
    device = pick_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    stack_shape = (args.frame_stack, *env.observation_space.shape)
    q_net = QNetwork(stack_shape, int(env.action_space.n), args.dueling, args.bf16).to(device)
    restore(saved, q_net=q_net)
    folder = checkpoint_path(args.eval).parent
    returns = evaluate(args, q_net, folder / "videos" if args.capture_video else None)
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
