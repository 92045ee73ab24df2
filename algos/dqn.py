# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4", "gymnasium[classic-control,box2d]>=1.1", "numpy>=1.26",
#   "tyro>=0.9", "tqdm>=4.60", "matplotlib>=3.8", "wandb>=0.17", "moviepy>=2.0",
# ]
# ///
"""Deep Q-networks (DQN), with the double, dueling, prioritised and n-step extensions.

DQN learns Q(s, a), the discounted return to expect after action a in state s, and plays the action
that promises most. It moves each prediction towards what was received plus the best prediction at
the next state. Two ideas keep this stable: learning from a memory of old transitions drawn at random
(replay), and taking the prediction at the next state from a slowly following copy (target network).

    target   y = r_t + ... + gamma^(n-1) r_(t+n-1) + gamma^n Q_target(s_(t+n), argmax_a Q(s_(t+n), a))
    minimise mean ( y - Q(s_t, a_t) )^2      over transitions drawn from the replay memory

Papers   Mnih et al. 2015, Human-level control through deep RL, doi 10.1038/nature14236 (1312.5602)
         van Hasselt et al. 2016, Double Q-learning, arXiv 1509.06461
         Wang et al. 2016, Dueling Network Architectures, arXiv 1511.06581
         Schaul et al. 2016, Prioritized Experience Replay, arXiv 1511.05952
         Hessel et al. 2018, Rainbow (n-step returns), arXiv 1710.02298
         Dabney et al. 2021, Temporally-Extended epsilon-Greedy Exploration, arXiv 2006.01782

Run      python algos/dqn.py
         python algos/dqn.py --env LunarLander-v3
         python algos/dqn.py --env Acrobot-v1 --dueling --prioritized
         python algos/dqn.py --no-double --n-step 1 --tau 1 --target-network-frequency 5000  (plain DQN)
         python algos/dqn.py --no-double --n-step 1 --tau 0.1 --no-target-network  (the paper's ablation)
         python algos/dqn.py --eval runs/<folder> --capture-video

Expect   Greedy return over 100 episodes at the end of training, on seeds which nothing was tuned on: 101-110, and
         201-210 for LunarLander and Acrobot, whose presets changed after 101-110 had been seen (--first-seed 201);
         python benchmarks/run.py scores --only dqn --workers 1, one core of an AMD EPYC, torch 2.13. CartPole's
         seconds were taken with nothing else running, the others beside other work.

                          steps    mean    worst   threshold reached, seconds to it
         CartPole-v1       640k   500.0    499.9   475 by 10 of 10, median 1.7, slowest 2.3
         LunarLander-v3    1.2M   248.3    222.2   200 by 10 of 10, median 57, slowest 92
         Acrobot-v1        600k   -86.5   -116.2   -100 by 10 of 10, median 47, slowest 53
         MountainCar-v0    300k  -106.2   -120.8   -110 by 8 of 10, 2 of them below it at the end

         With CleanRL's settings (--num-envs 1 --hidden 120 84 --learning-rate 2.5e-4 --no-anneal-lr
         --buffer-size 10000 --gamma 0.99 --tau 1 --target-network-frequency 500 --end-e 0.05
         --exploration-fraction 0.5 --learning-starts 10000 --train-frequency 10 --gradient-steps 1 --n-step 1
         --no-double --reward-scale 1 --max-grad-norm inf) it makes 6,600 steps a second, median of three runs of
         60,000; a re-enactment of CleanRL's loop, which is not part of this repository, made 4,700 in turns with
         it (ratio 1.1 to 1.7, median 1.4).
         What replay and the target network do: python benchmarks/run.py dqn. GPU: not measured yet.

Deviations from the papers
 1. Several environments are stepped in parallel, and several gradient steps follow each other.
 2. The target network follows a little at every update (--tau) instead of being copied now and then.
 3. The learning rate is annealed to zero: without it the policy of a good moment is often lost again.
 4. Only termination ends the return. An episode cut by a time limit, or whose n-step return would
    reach beyond the newest step, is bootstrapped from the true observation there.
 5. n-step returns are not corrected for the exploring actions in them (nor are Rainbow's).
 6. Squared error with clipped gradient norm in place of Mnih's clipped error (--loss huber has it).
 7. --reward-scale multiplies rewards inside the learner only (all scores are reported unscaled): it
    brings returns to the size at which the network learns quickly.
 8. Dueling heads are linear on one shared trunk; Wang et al. give each a hidden layer of its own.
 9. Priorities are corrected after all gradient steps of a phase, not after each single one.
10. --repeat-random draws the length of an exploring move from a geometric distribution; Dabney et al.
    prefer a heavy-tailed one, and play the move to its end. Of 4,000 random episodes of MountainCar
    9 % reach the goal at 0.95 and none at 0; without it the preset learns nothing there (-200, seed 1).
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
    """gymnasium id of the environment, for example LunarLander-v3; actions must be discrete"""
    seed: int = 1
    """seed of every random number: network, actions, replay, environments; >= 0"""
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

    num_envs: int = 64
    """environments stepped in parallel (N)"""
    learning_rate: float = 2e-3
    """Adam's step size at the start; > 0"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over total-timesteps"""
    gamma: float = 0.99
    """discount factor of future rewards, in [0, 1]"""
    buffer_size: int = 100_000
    """transitions that the replay memory holds before it forgets the oldest"""
    save_buffer: bool = False
    """keep the replay memory in model.pt, so that --resume goes on with it"""
    batch_size: int = 128
    """transitions per gradient step (B)"""
    learning_starts: int = 2000
    """environment steps played before the first gradient step"""
    train_frequency: int = 128
    """environment steps, over all environments, between two learning phases"""
    gradient_steps: int = 2
    """gradient steps in a learning phase"""
    target_network_frequency: int = 64
    """environment steps between updates of the target network; a phase's gradient steps count evenly"""
    tau: float = 0.01
    """share of the online network in an update of the target network, in (0, 1]; 1 copies it"""
    start_e: float = 1.0
    """share of random actions (epsilon) at the start, in [0, 1]"""
    end_e: float = 0.01
    """share of random actions after the exploration phase, in [0, 1]"""
    exploration_fraction: float = 0.1
    """share of total-timesteps over which epsilon falls linearly from start-e to end-e; in [0, 1]"""
    repeat_random: float = 0.0
    """chance in [0, 1) that a random action repeats the one before it; near 1, exploration makes long moves"""
    loss: Literal["squared", "huber"] = "squared"
    """error of a prediction; huber is linear beyond 1, so single large errors pull less"""
    max_grad_norm: float = 10.0
    """the gradient's norm is scaled down to at most this; > 0, and inf never does"""
    reward_scale: float = 1.0
    """factor on rewards inside the learner; aim at returns of the order of 10"""
    hidden: tuple[int, ...] = (64, 64)
    """units of the hidden layers"""

    double: bool = True
    """choose the next action with the online network and value it with the target network (van Hasselt)"""
    dueling: bool = False
    """predict the state's value and each action's advantage, and add them (Wang)"""
    prioritized: bool = False
    """draw transitions in proportion to their last error instead of uniformly (Schaul)"""
    prioritized_replay_alpha: float = 0.6
    """exponent on the error, in [0, 1]: 0 draws uniformly, 1 in full proportion"""
    prioritized_replay_beta: float = 0.4
    """exponent of the importance weights at the start, in [0, 1]; it grows to 1 over the training"""
    n_step: int = 3
    """rewards summed before bootstrapping; 1 is the plain temporal difference"""
    replay: bool = True
    """--no-replay learns from the newest transitions only, those of the latest train-frequency steps"""
    target_network: bool = True
    """--no-target-network bootstraps from the online network itself"""


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=640_000, buffer_size=300_000, learning_rate=5e-3, gamma=0.995, train_frequency=512,
        gradient_steps=4, target_network_frequency=128, tau=0.02, n_step=15, reward_scale=0.05,
    ),
    "LunarLander-v3": dict(
        total_timesteps=1_200_000, buffer_size=400_000, reward_scale=0.05, hidden=(128, 128),
    ),
    "Acrobot-v1": dict(
        total_timesteps=600_000, num_envs=32, buffer_size=600_000, gradient_steps=4, n_step=1, reward_scale=0.1,
    ),
    "MountainCar-v0": dict(
        total_timesteps=300_000, num_envs=16, learning_rate=4e-3, train_frequency=64, gradient_steps=4, tau=0.05,
        end_e=0.02, exploration_fraction=0.2, repeat_random=0.95, n_step=10, reward_scale=0.1,
    ),
}  # fmt: skip


def validate(args: Args) -> None:
    """Ends the program with one line if a setting makes no sense."""
    for name in ("total_timesteps", "num_envs", "buffer_size", "batch_size", "train_frequency", "gradient_steps",
                 "target_network_frequency", "n_step", "eval_episodes", "learning_rate", "max_grad_norm",
                 "reward_scale"):  # fmt: skip
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("seed", "learning_starts"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_random",
                 "prioritized_replay_alpha", "prioritized_replay_beta"):  # fmt: skip
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.tau == 0 or args.repeat_random == 1:
        fail("--tau must lie in (0, 1] and --repeat-random in [0, 1): nothing would ever change")
    if not args.hidden or min(args.hidden) < 1:
        fail(f"--hidden needs one positive number of units per layer, not {args.hidden}")
    if args.buffer_size < max(2 * args.num_envs, args.train_frequency):
        fail("--buffer-size must hold a learning phase (train-frequency) and two steps of every environment")
    if args.prioritized and not args.replay:
        fail("--prioritized draws from the replay memory, which --no-replay takes away; drop one of the two")


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
    if not isinstance(env.action_space, gym.spaces.Discrete):
        fail(f"{env_id} has the action space {env.action_space}; this script handles Discrete; see ppo.py")
    return env


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """N environments that reset in NEXT_STEP mode.

    In this mode the step after an episode's end ignores the action and returns the first observation
    of the next episode with reward 0. That row is no transition, and the replay memory masks it out;
    in return obs[t + 1] is always the true successor of obs[t], which bootstrapping needs.
    """
    make_env(env_id).close()  # says in one line what is wrong, if anything is
    if num_envs > 4 and gym.spec(env_id.split(":")[-1]).vector_entry_point is not None:  # vectorised (CartPole)
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
    else:
        envs = SyncVectorEnv([lambda: make_env(env_id)] * num_envs, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


# 3. Model ---------------------------------------------------------------------------------------


def combine_dueling(heads: Any) -> Any:
    """Q = V + A - mean A (Eq. 9, Wang 2016); heads [B, 1 + A], tensor or array, hold V and A."""
    value, advantages = heads[:, :1], heads[:, 1:]
    return value + advantages - advantages.mean(1)[:, None]


class QNetwork(nn.Module):
    """ReLU layers from an observation to the value of each action."""

    def __init__(self, obs_dim: int, num_actions: int, hidden: tuple[int, ...], dueling: bool):
        super().__init__()
        self.dueling = dueling
        widths = (obs_dim, *hidden, num_actions + dueling)
        layers = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1]

    def forward(self, obs: Tensor) -> Tensor:  # [B, D] -> [B, A]
        return combine_dueling(self.net(obs)) if self.dueling else self.net(obs)

    def numpy_q(self) -> Callable[[np.ndarray], np.ndarray]:
        """The network as a NumPy function, q(obs [N, D]) -> [N, A].

        For one small batch a forward pass in NumPy takes a quarter of torch's time. On the CPU the
        arrays below share memory with the parameters, so nothing is copied and the function always
        uses the current weights; from a GPU they are copied, so ask again after each update.
        """
        layers = [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy())
                  for layer in self.net if isinstance(layer, nn.Linear)]  # fmt: skip

        def q(obs: np.ndarray) -> np.ndarray:
            x = obs
            for weight, bias in layers[:-1]:
                x = np.maximum(x @ weight + bias, 0)
            x = x @ layers[-1][0] + layers[-1][1]
            return combine_dueling(x) if self.dueling else x

        return q


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


def td_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    """Mean squared or Huber error, [B] -> scalar, each transition weighted by weights [B] if given."""
    assert predictions.shape == targets.shape
    error = nn.functional.mse_loss if kind == "squared" else nn.functional.huber_loss
    if weights is None:
        return error(predictions, targets)
    assert weights.shape == targets.shape
    return (weights * error(predictions, targets, reduction="none")).mean()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Scales all gradients by one factor where their common norm exceeds max_norm (Pascanu 2013, Algorithm 1).

    What nn.utils.clip_grad_norm_ does, but where nothing is to be clipped, as nearly always here, nothing is
    multiplied either: for so small a network every call counts.
    """
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    if norm > max_norm:
        for parameter in parameters:
            parameter.grad.mul_(max_norm / norm)


@torch.no_grad()
def update_target(online: list[nn.Parameter], target: list[nn.Parameter], tau: float) -> None:
    """Moves the target network's parameters by the share tau towards the online ones; tau 1 copies them."""
    for follower, leader in zip(target, online, strict=True):
        follower.lerp_(leader, tau)


class SumTree:
    """Priorities in a binary tree whose nodes hold the sum of their two children.

    Changing a priority and finding the transition at a given share of the total both take log2(size)
    steps, and each step does a whole batch of them. Node 1 is the root, node k has the children
    2k and 2k + 1, and the leaves are the second half of the array.
    """

    def __init__(self, size: int):
        self.depth = max(size - 1, 1).bit_length()
        self.first_leaf = 1 << self.depth
        self.nodes = np.zeros(2 * self.first_leaf)

    @property
    def total(self) -> float:
        return self.nodes[1]

    def __getitem__(self, leaves: np.ndarray) -> np.ndarray:
        return self.nodes[self.first_leaf + leaves]

    def __setitem__(self, leaves: np.ndarray, priorities: np.ndarray) -> None:
        nodes = self.first_leaf + leaves
        self.nodes[nodes] = priorities
        for _ in range(self.depth):
            nodes = nodes >> 1  # a parent met twice is computed twice, to the same sum
            self.nodes[nodes] = self.nodes[2 * nodes] + self.nodes[2 * nodes + 1]

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """count leaves, each drawn with probability priority / total (Section 3.3, Schaul 2016).

        One draw falls into each of count equal parts of the total, which lowers the variance; the
        order is then shuffled, so that any part of the sample is a fair one.
        """
        mass = rng.permutation(np.arange(count) + rng.random(count)) * (self.total / count)
        nodes = np.ones(count, np.int64)
        for _ in range(self.depth):
            nodes = 2 * nodes
            left = self.nodes[nodes]
            right = (mass >= left) & (self.nodes[nodes + 1] > 0)  # > 0: rounding never picks an empty leaf
            mass = mass - left * right
            nodes = nodes + right
        return nodes - self.first_leaf


def importance_weights(probabilities: np.ndarray, beta: float) -> np.ndarray:
    """P^-beta over its maximum, [B]: undoes at beta 1 the bias of drawing with probability P (Section 3.4)."""
    return (probabilities / probabilities.min()) ** -beta


class Replay:
    """The latest steps of N environments, in the order in which they were played.

    Flat ring buffers: step t of environment n is slot t * N + n, so that N slots further lies the next
    step of the same environment. Next observations are not stored twice, and n-step returns
    are folded when drawn: every transition is in here as soon as it was played, those at an
    episode's end included. The row at head holds the current observation and no transition yet.
    """

    ARRAYS = ("obs", "actions", "rewards", "terminated", "truncated", "valid")

    def __init__(self, buffer_size: int, num_envs: int, obs_dim: int):
        self.N, self.slots = num_envs, (buffer_size // num_envs + 1) * num_envs
        self.obs = np.zeros((self.slots, obs_dim), np.float32)
        self.actions = np.zeros(self.slots, np.int64)
        self.rewards = np.zeros(self.slots, np.float32)
        self.terminated, self.truncated, self.valid = (np.zeros(self.slots, bool) for _ in range(3))
        self.head, self.size = 0, 0  # both in slots

    def row(self, steps_back: int = 0) -> slice:
        """The N slots that lie this many steps before the current one."""
        first = (self.head - steps_back * self.N) % self.slots
        return slice(first, first + self.N)

    def begin(self, obs: np.ndarray) -> None:
        """Takes the first observations [N, D] of a training, or of its resumption."""
        if self.size:  # what was under way when the saved run stopped is cut, as by a time limit
            self.truncated[self.row(1)] = True
            self.add(0, 0.0, False, False, False, obs)
        self.obs[self.row()] = obs

    def add(
        self, actions: Any, rewards: Any, terminated: Any, truncated: Any, valid: Any, next_obs: np.ndarray
    ) -> None:
        """Completes the current row, all [N], and starts the next one with next_obs [N, D]."""
        row = self.row()
        self.actions[row], self.rewards[row], self.valid[row] = actions, rewards, valid
        self.terminated[row], self.truncated[row] = terminated, truncated
        self.head = (self.head + self.N) % self.slots
        self.size = min(self.size + self.N, self.slots - self.N)
        self.obs[self.row()] = next_obs

    def draw(self, count: int, rng: np.random.Generator, newest: int | None = None) -> np.ndarray:
        """Slots of count transitions, uniformly from the whole memory or from its newest slots."""
        size = min(newest or self.size, self.size)

        def some(count: int) -> np.ndarray:
            return (self.head - 1 - rng.integers(size, size=count)) % self.slots

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
        return self.obs[slots], self.actions[slots], returns, discounts, self.obs[next_slots]

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head, "size": self.size, **{k: torch.from_numpy(getattr(self, k)) for k in self.ARRAYS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head, self.size = state["head"], state["size"]
        for key in self.ARRAYS:
            setattr(self, key, state[key].numpy())


class Foresight:
    """What the network predicted at the states of finished episodes, and what was obtained afterwards.

    The sum of the discounted returns from all states of an episode needs no memory of its rewards:
    with w_k = 1 + gamma w_(k-1) it is the sum of r_k w_k, each reward counted for all states up to it.
    Where a time limit cut the episode, the unseen rest counts as predicted at the last observation.
    """

    def __init__(self, num_envs: int, gamma: float):
        self.gamma = gamma
        self.weight, self.predicted, self.obtained = np.zeros((3, num_envs))
        self.episodes: deque[tuple[float, float, float]] = deque(maxlen=100)  # sums of predicted, obtained, length

    def add(self, q: np.ndarray, rewards: np.ndarray, valid: np.ndarray) -> None:
        """One step of every environment, all [N]; q is the value of the action taken."""
        self.weight = (1 + self.gamma * self.weight) * valid
        self.predicted += q * valid
        self.obtained += rewards * self.weight

    def end(self, ended: np.ndarray, lengths: np.ndarray, rest: np.ndarray) -> None:
        """Episodes of the environments ended [M] are over; rest [M] is the value of what was cut off, or 0."""
        self.obtained[ended] += self.gamma * self.weight[ended] * rest
        self.episodes.extend(zip(self.predicted[ended], self.obtained[ended], lengths, strict=True))
        for array in (self.weight, self.predicted, self.obtained):
            array[ended] = 0

    def means(self) -> tuple[float, float] | tuple[None, None]:
        """Mean prediction and mean discounted return at the states of the last 100 finished episodes."""
        if not self.episodes:
            return None, None
        predicted, obtained, states = np.sum(list(self.episodes), axis=0).tolist()
        return predicted / states, obtained / states


# 5. Training ------------------------------------------------------------------------------------

CURVES = ("charts/episodic_return", "losses/td_loss", "charts/epsilon",
          "charts/predicted_return", "charts/obtained_return", "charts/overestimation")  # fmt: skip


def train(args: Args) -> Path:
    """Trains as args say and returns the run folder."""
    validate(args)
    saved = load_checkpoint(args.resume) if args.resume else None
    device = pick_device(args.device, auto="cpu")
    rng = seed_everything(args.seed)

    envs = make_envs(args.env, args.num_envs)
    obs_dim, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    q_net = QNetwork(obs_dim, int(action_space.n), args.hidden, args.dueling).to(device)
    target_net = copy.deepcopy(q_net).requires_grad_(False) if args.target_network else q_net
    parameters, target_parameters = list(q_net.parameters()), list(target_net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=device.type != "mps")
    updates = 0

    N, T = args.num_envs, max(args.train_frequency // args.num_envs, 1)  # a phase plays T steps of N environments
    replay = Replay(args.buffer_size, N, obs_dim)
    priorities, max_priority = SumTree(replay.slots if args.prioritized else 0), 1.0
    newest = None if args.replay else max(T, 2) * N  # of two rows, one at least is a transition
    target_every = max(round(args.target_network_frequency * args.gradient_steps / (T * N)), 1)  # in updates

    def state() -> dict[str, Any]:
        memory = (replay.state_dict(), torch.from_numpy(priorities.nodes)) if args.save_buffer else None
        return {"q_net": q_net.state_dict(), "target_net": target_net.state_dict(),
                "optimizer": optimizer.state_dict(), "updates": updates, "max_priority": max_priority,
                "memory": memory, "rng": rng.bit_generator.state}  # fmt: skip

    learning_starts = args.learning_starts
    if saved:
        restore(saved, q_net=q_net, target_net=target_net, optimizer=optimizer)
        updates, max_priority = saved["updates"], saved["max_priority"]
        rng.bit_generator.state = saved["rng"]
        if saved["memory"]:
            for name in ("buffer_size", "num_envs", "prioritized", "reward_scale"):
                if getattr(args, name) != saved["args"][name]:
                    fail(f"the saved replay memory needs its own --{name.replace('_', '-')}: {saved['args'][name]}")
            replay.load_state_dict(saved["memory"][0])
            priorities.nodes = saved["memory"][1].numpy()
            print(f"going on with the replay memory of {replay.size:,} transitions")
        else:
            learning_starts += saved["record"]["step"]
            print(f"no replay memory was saved (--save-buffer): learning goes on after {args.learning_starts:,} steps")

    terminated = truncated = np.zeros(N, bool)
    last_random = np.zeros(N, int)
    episode_return, episode_length = np.zeros(N), np.zeros(N, int)
    foresight = Foresight(N, args.gamma)
    losses, q_values = [], []

    threshold = gym.spec(args.env.split(":")[-1]).reward_threshold
    with RunRecord(args, args.env, args.total_timesteps, device, state, CURVES, saved, threshold) as run:
        step, report_every = run.step, max(args.total_timesteps // 200, 1)
        obs, _ = envs.reset(seed=args.seed * 10_000 + step)
        replay.begin(obs)
        while step < args.total_timesteps:
            lr = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
            epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, step)

            # Play. In NEXT_STEP mode the row after an episode's end only resets: it is not valid.
            q_function = q_net.numpy_q()
            explore, random_actions = rng.random((T, N)) < epsilon, rng.integers(action_space.n, size=(T, N))
            if args.repeat_random:
                for t, repeat in enumerate(rng.random((T, N)) < args.repeat_random):
                    random_actions[t] = last_random = np.where(repeat, last_random, random_actions[t])
            for t in range(T):
                q = q_function(obs)  # [N, A]
                actions = np.where(explore[t], random_actions[t], q.argmax(1))
                valid = ~(terminated | truncated)
                obs, rewards, terminated, truncated, _ = envs.step(actions + action_space.start)
                replay.add(actions, rewards * args.reward_scale, terminated, truncated, valid, obs)
                step += int(np.count_nonzero(valid))
                foresight.add(q[np.arange(N), actions] / args.reward_scale, rewards, valid)
                episode_return += rewards
                episode_length += valid
                ended = np.flatnonzero(terminated | truncated)
                if len(ended):
                    rest = q_function(obs[ended]).max(1) / args.reward_scale * ~terminated[ended]
                    foresight.end(ended, episode_length[ended], rest)
                for n in ended:
                    run.episode(step, episode_return[n], episode_length[n])
                    episode_return[n] = episode_length[n] = 0
            if args.prioritized:  # new transitions come first, until their error is known
                slots = (replay.head - 1 - np.arange(T * N)) % replay.slots
                priorities[slots] = max_priority * replay.valid[slots]
                priorities[np.arange(replay.slots)[replay.row()]] = 0.0

            # Learn. The transitions of all gradient steps of this phase are drawn at once.
            if step >= learning_starts:
                count = args.gradient_steps * args.batch_size
                if args.prioritized:
                    slots = priorities.sample(count, rng)
                    beta = linear_schedule(args.prioritized_replay_beta, 1.0, args.total_timesteps, step)
                    weights = torch.from_numpy(importance_weights(priorities[slots], beta)).float().to(device)
                else:
                    slots, weights = replay.draw(count, rng, newest), None
                batch = [torch.from_numpy(x).to(device) for x in replay.batch(slots, args.n_step, args.gamma)]
                errors = []
                for i in range(0, count, args.batch_size):
                    mb_obs, mb_actions, mb_returns, mb_discounts, mb_next_obs = (
                        x[i : i + args.batch_size] for x in batch
                    )
                    with torch.no_grad():
                        next_q_online = q_net(mb_next_obs) if args.double else None
                        targets = td_target(mb_returns, mb_discounts, target_net(mb_next_obs), next_q_online)
                    predictions = q_net(mb_obs).gather(1, mb_actions.unsqueeze(1)).squeeze(1)  # [B]
                    mb_weights = weights[i : i + args.batch_size] if args.prioritized else None
                    loss = td_loss(predictions, targets, mb_weights, args.loss)
                    for parameter in parameters:
                        parameter.grad = None
                    loss.backward()
                    if args.max_grad_norm < math.inf:
                        clip_gradients(parameters, args.max_grad_norm)
                    optimizer.step()
                    updates += 1
                    if args.target_network and updates % target_every == 0:
                        update_target(parameters, target_parameters, args.tau)
                    errors.append((targets - predictions).detach())
                    losses.append(loss.detach())
                    q_values.append(predictions.detach())
                if args.prioritized:
                    surprise = (torch.cat(errors).abs().cpu().numpy() + 1e-6) ** args.prioritized_replay_alpha
                    priorities[slots] = surprise  # Eq. 1, Schaul 2016
                    max_priority = max(max_priority, float(surprise.max()))

            if step // report_every > run.step // report_every or step >= args.total_timesteps:
                predicted, obtained = foresight.means()
                run.report(step, {
                    "charts/learning_rate": lr, "charts/epsilon": epsilon,
                    "losses/td_loss": torch.stack(losses).mean().item() if losses else None,
                    "losses/q_values": torch.cat(q_values).mean().item() / args.reward_scale if losses else None,
                    "charts/predicted_return": predicted, "charts/obtained_return": obtained,
                    "charts/overestimation": None if predicted is None else predicted - obtained,
                })  # fmt: skip
                losses, q_values = [], []

        envs.close()
        run.finish(lambda: evaluate(args, q_net, run.video_folder))
    return run.folder


# 6. Evaluation ----------------------------------------------------------------------------------

EVAL_SEED = 1_000_000_000  # far from every seed that training uses


def evaluate(args: Args, q_net: QNetwork, video_folder: Path | None = None) -> np.ndarray:
    """Undiscounted returns of greedy episodes on seeds of their own, [episodes]."""
    env = make_env(args.env, render_mode="rgb_array") if video_folder else make_env(args.env)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda n: n < 3, disable_logger=True)
    q_function = q_net.numpy_q()
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=EVAL_SEED + args.seed if episode == 0 else None)
        done = False
        while not done:
            action = q_function(obs[None]).argmax(1)[0]
            obs, reward, terminated, truncated, _ = env.step(action + env.action_space.start)
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def evaluate_saved(args: Args) -> None:
    """--eval: rebuilds the saved network, plays it and prints the score."""
    validate(args)
    saved = load_checkpoint(args.eval)
    env = make_env(args.env)
    q_net = QNetwork(env.observation_space.shape[0], int(env.action_space.n), args.hidden, args.dueling)
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
