"""Catch: a ball falls and a paddle must be under it. Pixels enough for a convolutional network, rules
small enough to learn in a minute. gymnasium imports this module from the id: catch_env:Catch-v0.

Catch-v0         the ball falls straight and the paddle moves a cell a step: one frame says what to do
CatchDrift-v0    the ball also flies a third of the board sideways in every step, bouncing off the walls.
                 The action names the third in which the paddle waits, so that only the last one counts.
                 Wherever the ball is seen, both directions are equally likely: one frame is worth no
                 more than tossing a coin (0.05 at best), two frames tell
Catch42-v0, CatchDrift42-v0    the same at half the resolution
"""

from typing import Any

import gymnasium as gym
import numpy as np

CELLS, FALL, START_ROW = 21, 2, 2  # the board; rows fallen per step; the ball's first row
WALL = CELLS - 1


class Catch(gym.Env):
    """An episode lasts 9 steps and returns 1 if the paddle caught the ball, else -1. Actions: 0, 1, 2."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, size: int = 84, drift: bool = False, render_mode: str | None = None):
        assert size % CELLS == 0
        self.observation_space = gym.spaces.Box(0, 255, (size, size), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.cell, self.drift, self.render_mode = size // CELLS, drift, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        # The way from wall to wall and back as a ring: phase 0 to 20 flies right, 20 to 40 back left.
        # A uniform phase stays uniform, so that the column never betrays the direction.
        self.phase = int(self.np_random.integers(2 * WALL))
        self.row, self.paddle = START_ROW, WALL // 2
        return self.frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.row += FALL
        if self.drift:
            self.phase = (self.phase + CELLS // 3) % (2 * WALL)
            self.paddle = CELLS // 6 + int(action) * CELLS // 3  # the middle of a third
        else:
            self.paddle = min(max(self.paddle + int(action) - 1, self.reach), WALL - self.reach)
        terminated = self.row == WALL
        caught = abs(self.column - self.paddle) <= self.reach
        return self.frame(), (1.0 if caught else -1.0) if terminated else 0.0, terminated, False, {}

    @property
    def reach(self) -> int:
        return CELLS // 6 if self.drift else 1

    @property
    def column(self) -> int:
        return WALL - abs(WALL - self.phase)

    def frame(self) -> np.ndarray:
        board = np.zeros((CELLS, CELLS), np.uint8)
        if not self.drift:  # a paddle in sight would be a memory: its place could tell where the ball was
            board[WALL, self.paddle - self.reach : self.paddle + self.reach + 1] = 128
        board[self.row, self.column] = 255
        return board.repeat(self.cell, 0).repeat(self.cell, 1)

    def render(self) -> np.ndarray:
        return np.repeat(self.frame()[:, :, None], 3, 2)


for name, kwargs in {
    "Catch-v0": {},
    "Catch42-v0": {"size": 42},
    "CatchDrift-v0": {"drift": True},
    "CatchDrift42-v0": {"size": 42, "drift": True},
}.items():
    gym.register(name, entry_point=Catch, kwargs=kwargs, reward_threshold=0.9)
