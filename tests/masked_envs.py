"""Environments whose rules forbid choices. gymnasium imports this module from the id: masked_envs:Trapdoors-v0.

Trapdoors-v0    ten rooms with 64 doors each: a coin is behind one, nothing behind three, and 60 are trapdoors, which
                end the episode. The mask forbids the trapdoors. The best return is ten coins
Locks-v0        eight locks of four dials with 2, 3, 4 and 5 digits, which count from 1; each digit that is right
                pays 1. In each lock one dial cannot be turned to its right digit: the best return is 8 * 3 = 24.
                Actions are two-dimensional, masks come in tuples, and what they forbid is an error
TrapdoorsUnmasked-v0    the rooms without the masks
"""

from typing import Any

import gymnasium as gym
import numpy as np

ROOMS, DOORS, REAL = 10, 64, 4
COINS = np.random.default_rng(0).permuted(np.tile(np.arange(DOORS), (ROOMS, 1)), axis=1)[:, :REAL]  # first: the coin


class Trapdoors(gym.Env):
    """Observation: which room, one-hot [10]."""

    observation_space, action_space = gym.spaces.Box(0, 1, (ROOMS,)), gym.spaces.Discrete(DOORS)
    played_forbidden = 0  # over all of these environments

    def __init__(self, masked: bool = True):
        self.masked = masked

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.room = 0
        return self.look()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        coin, fell = action == COINS[self.room, 0], action not in COINS[self.room]
        Trapdoors.played_forbidden += fell
        self.room += 1
        obs, info = self.look()
        return obs, float(coin), bool(fell or self.room == ROOMS), False, info

    def look(self) -> tuple[np.ndarray, dict]:
        mask = np.zeros(DOORS, np.int8)  # after the last room all zero: nothing is left to choose
        if self.room < ROOMS:
            mask[COINS[self.room]] = 1
        return np.float32(np.arange(ROOMS) == self.room), {"action_mask": mask} if self.masked else {}


NVEC = np.array([[2, 3], [4, 5]])
LOCKS = np.random.default_rng(1).integers(NVEC, size=(8, 2, 2))  # the right digits, counted from 0


class Locks(gym.Env):
    """Observation: which lock, one-hot [8]."""

    observation_space = gym.spaces.Box(0, 1, (len(LOCKS),))
    action_space = gym.spaces.MultiDiscrete(NVEC, start=np.ones_like(NVEC))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.lock = 0
        return self.look(), {"action_mask": self.mask()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        for allowed, digit in zip(sum(self.mask(), ()), action.ravel() - 1, strict=True):
            assert allowed[digit], "a forbidden digit"
        right = int((action - 1 == LOCKS[self.lock]).sum())
        self.lock = (self.lock + 1) % len(LOCKS)
        return self.look(), float(right), self.lock == 0, False, {"action_mask": self.mask()}

    def look(self) -> np.ndarray:
        return np.float32(np.arange(len(LOCKS)) == self.lock)

    def mask(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """One mask for each dial, nested as the actions are; dial lock % 4 cannot be turned to its right digit."""
        masks = [np.ones(n, np.int8) for n in NVEC.ravel()]
        masks[self.lock % 4][LOCKS[self.lock].ravel()[self.lock % 4]] = 0
        return tuple(masks[:2]), tuple(masks[2:])


gym.register("Trapdoors-v0", entry_point=Trapdoors, reward_threshold=9)
gym.register("TrapdoorsUnmasked-v0", entry_point=Trapdoors, kwargs={"masked": False}, reward_threshold=9)
gym.register("Locks-v0", entry_point=Locks, reward_threshold=23)
