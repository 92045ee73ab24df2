"""Tiny environments whose value function is known in closed form.

Each isolates one thing that a learner must get right, so a test trains for seconds and compares the
learned values with the truth. Register them by importing this module; make them as "Probe<Name>-v0".
"""

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """observation(), reward(action) and length are all that a probe defines."""

    length = 1
    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-100, 100, (1,), np.float32)

    def observation(self) -> float:
        return 0.0

    def reward(self, action) -> float:
        return 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.sign = float(self.np_random.choice([-1, 1]))
        return self._observe(), {}

    def step(self, action):
        reward = self.reward(action)
        self.t += 1
        return self._observe(), reward, self.t >= self.length, False, {}

    def _observe(self):
        return np.array([self.observation()], np.float32)


class Constant(Probe):
    """Reward 1, one step: V = 1."""


class Sign(Probe):
    """Reward = observation, -1 or 1: V(obs) = obs."""

    def observation(self):
        return self.sign

    def reward(self, action):
        return self.sign


class Delayed(Probe):
    """Two steps, reward 1 at the second: V(0) = gamma, V(1) = 1."""

    length = 2

    def observation(self):
        return float(self.t)

    def reward(self, action):
        return float(self.t == 1)


class ActionDependent(Sign):
    """Reward 1 for action 1 at obs 1 and action 0 at obs -1, else -1: under the best policy V = 1."""

    def reward(self, action):
        return 1.0 if (action == 1) == (self.sign > 0) else -1.0


class Truncated(Probe):
    """Reward 1 for ever, cut by a time limit after every step: V = 1 / (1 - gamma), as a death 1."""

    length = 10**9


class Continuous(Sign):
    """Box action in [-2, 2], best at obs / 2 * 2 = obs: reward -(action - obs)^2, best V = 0."""

    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reward(self, action):
        return -float((action[0] - self.sign) ** 2)


class Marked(Probe):
    """Three steps with reward 1; the last observation of an episode is 99 and no row of it may be learnt from."""

    length = 3

    def observation(self):
        return 99.0 if self.t == self.length else float(self.t)


class UnsupportedActions(Probe):
    action_space = gym.spaces.MultiBinary(3)


class Aim(gym.Env):
    """Reward -|a - aim|^2 with a the place of the action between its bounds, from -1 to 1; three steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    low, high = np.float32([-1, -1]), np.float32([1, 1])

    def __init__(self):
        self.action_space = gym.spaces.Box(self.low, self.high)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def look(self):
        self.aim = self.np_random.uniform(-0.8, 0.8, 2).astype(np.float32)
        return self.aim

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        place = (action - self.low) / (self.high - self.low) * 2 - 1
        reward = -float(((place - self.aim) ** 2).sum())
        return self.look(), reward, self.t == 3, False, {}


class AimFar(Aim):
    low, high = np.float32([-0.25, 0]), np.float32([0.25, 64])


for kind in (Constant, Sign, Delayed, ActionDependent, Continuous, Marked, UnsupportedActions):
    gym.register(f"Probe{kind.__name__}-v0", entry_point=kind)
gym.register("ProbeTruncated-v0", entry_point=Truncated, max_episode_steps=1)
gym.register("Aim-v0", entry_point=Aim)
gym.register("AimFar-v0", entry_point=AimFar)

# The same with a Box action that does not matter.
for probe in (Constant, Sign, Delayed, Truncated, Marked):
    limit = 1 if probe is Truncated else None
    kind = type(f"Box{probe.__name__}", (probe,), {"action_space": gym.spaces.Box(-2, 2, (1,), np.float32)})
    gym.register(f"Box{probe.__name__}-v0", entry_point=kind, max_episode_steps=limit)
