"""Environments as people bring them, rebuilt small from public reports: each is played, or refused in one line."""

import json

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
from conftest import load_script

SCRIPTS = ["dqn", "reinforce", "a2c_gae", "ppo"]
CONTINUOUS = ["reinforce", "a2c_gae", "ppo"]
each_script = pytest.mark.parametrize("name", SCRIPTS)


class Guest(gym.Env):
    """Four steps with reward 1, unless a subclass does something unusual; nothing that gymnasium does not ask for."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.look(), 1.0, self.t == 4, False, {}

    def look(self):
        return np.zeros(2, np.float32)


class Endless(Guest):
    """Has neither an end nor a time limit once the evaluation begins."""

    def reset(self, *, seed=None, options=None):
        self.end = 10**9 if seed is not None and seed >= 10**9 else 4
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, self.t >= self.end, False, {}


class Lists(Guest):
    def look(self):
        return [0.0, 0.0]


class Legacy(Guest):
    """Takes seeds of 32 bits only, as NumPy's old generator does."""

    def reset(self, *, seed=None, options=None):
        assert seed is None or 0 <= seed < 2**32
        return super().reset(seed=seed, options=options)


class OddInfos(Guest):
    """Arrays of random length in the infos: no vector environment can stack them."""

    def step(self, action):
        return *super().step(action)[:4], {"found": np.zeros(self.np_random.integers(1, 9))}


class FromFive(Guest):
    action_space = gym.spaces.Discrete(2, start=5)


class SameStep(gym.vector.VectorEnv):
    """A vectorised version that resets within the step and shows another observation."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs, **kwargs):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = gym.spaces.Box(-9, 9, (3,)), Guest.action_space

    def reset(self, **kwargs):
        raise AssertionError("this version does not fit and must not be played")


class OldReset(Guest):
    def reset(self):
        return np.zeros(2, np.float32), {}


class OldStep(Guest):
    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, {}


class ArrayReward(Guest):
    def step(self, action):
        return np.zeros(2, np.float32), np.ones(1), True, False, {}


class NeedsArgument(Guest):
    def __init__(self, level):
        self.level = level


class Pixels(Guest):
    observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)


GUESTS = (Guest, Endless, Lists, Legacy, OddInfos, FromFive, OldReset, OldStep, ArrayReward, NeedsArgument, Pixels)
for kind in GUESTS:
    gym.register(f"Guest{kind.__name__}-v0", entry_point=kind)
gym.register("GuestSameStep-v0", entry_point=Guest, vector_entry_point=SameStep)


def run(name, folder, env, **changes):
    """Trains for some hundred steps; the run's folder and its summary."""
    script = load_script(f"algos/{name}.py")
    small = dict(total_timesteps=600, num_envs=8, hidden=16, eval_episodes=2, seed=3)
    small |= {"dqn": dict(buffer_size=2000, learning_starts=200, train_frequency=16, batch_size=64)}.get(name, {})
    args = script.Args(env=env, run_dir=str(folder), **(small | changes))
    run_folder = script.train(args)
    return run_folder, json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))


@each_script
@pytest.mark.parametrize("guest", ["Guest", "Lists", "Legacy", "OddInfos", "FromFive", "SameStep"])
def test_unusual_environments_are_trained_and_evaluated(name, guest, tmp_path):
    _, summary = run(name, tmp_path, f"Guest{guest}-v0", seed=2**31 - 1)
    assert summary["eval_return_mean"] == 4 and summary["steps"] >= 600


@each_script
def test_an_evaluation_without_end_is_cut_and_says_so(name, tmp_path, capsys):
    _, summary = run(name, tmp_path, "GuestEndless-v0")
    assert summary["eval_return_mean"] == 10_000
    assert "2 of 2 evaluation episodes were cut after 10,000 steps" in capsys.readouterr().out


@each_script
def test_the_environment_of_a_module_is_made_and_its_folder_has_a_plain_name(name, tmp_path):
    folder, _ = run(name, tmp_path, "probes:ProbeConstant-v0")
    assert folder.name.startswith(f"probes-ProbeConstant-v0__{name}__3__")


@each_script
@pytest.mark.parametrize(
    ("guest", "changes", "message"),
    [
        ("Pixels", {}, "dqn_atari.py"),
        ("OldReset", {}, "GuestOldReset-v0 cannot be played"),
        ("OldStep", {}, "GuestOldStep-v0 cannot be played"),
        ("ArrayReward", {}, "a reward of shape (1,)"),
        ("NeedsArgument", {}, "level"),
        ("Guest", dict(capture_video=True), "Guest"),  # it cannot render
    ],
)
def test_what_cannot_be_played_ends_with_one_line_before_training(name, guest, changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, tmp_path, f"Guest{guest}-v0", **changes)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


class Mixed(Guest):
    """Box actions of every kind at once: bounded, unbounded, bounded on one side. Ends if a bound is broken."""

    action_space = gym.spaces.Box(np.array([0, -np.inf, 0]), np.array([100, np.inf, np.inf]), dtype=np.float64)


class Bytes(Guest):
    action_space = gym.spaces.Box(-128, 127, (2, 2), np.int8)


for kind in (Mixed, Bytes):
    gym.register(f"Guest{kind.__name__}-v0", entry_point=kind)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("guest", ["Mixed", "Bytes"])
def test_box_actions_of_any_bounds_lie_in_the_space(name, guest, tmp_path):
    assert run(name, tmp_path, f"Guest{guest}-v0")[1]["eval_return_mean"] == 4  # the environment asserts it


@pytest.mark.parametrize("name", CONTINUOUS)
def test_each_dimension_of_a_box_is_rescaled_on_its_own(name):
    to_env = load_script(f"algos/{name}.py").to_env
    np.testing.assert_allclose(to_env(Mixed.action_space, np.array([[0.5, 7.0, -3.0]])), [[75, 7, 0]])
    integers = gym.spaces.Box(-128, 127, (2,), np.int8)
    assert to_env(integers, np.array([[-1.0, 1.0], [0.004, -0.004]])).tolist() == [[-128, 127], [0, -1]]
    huge = gym.spaces.Box(np.float32(-3e38), np.float32(3e38), (1,))
    np.testing.assert_allclose(to_env(huge, np.array([[1.0], [0.5]])), [[3e38], [1.5e38]], rtol=1e-6)
