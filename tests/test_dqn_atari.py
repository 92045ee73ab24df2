"""DQN from pixels: the memory of single frames, the Atari settings, the network, learning on Catch."""

import csv
import inspect
import json

import gymnasium as gym
import numpy as np
import pytest
import small_runs
import torch
from conftest import load_script
from gymnasium.vector import AutoresetMode, SyncVectorEnv

dqn = load_script("algos/dqn.py")
atari = load_script("algos/dqn_atari.py")

PONG = "ALE/Pong-v5"
CATCH, DRIFT = "catch_env:Catch42-v0", "catch_env:CatchDrift42-v0"


class Noise(gym.Env):
    """Frames of noise; episodes of random length that end either way; rewards of any size."""

    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, size: int = 4, mean_length: int = 6):
        self.observation_space = gym.spaces.Box(0, 255, (size, size), np.uint8)
        self.mean_length = mean_length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.frame(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        ends, how = self.np_random.random() < 1 / self.mean_length, self.np_random.random() < 0.5
        return self.frame(), float(self.np_random.normal() * 3), bool(ends and how), bool(ends and not how), {}

    def frame(self):
        return self.np_random.integers(256, size=self.observation_space.shape, dtype=np.uint8)


gym.register("Noise-v0", entry_point=Noise, kwargs={"size": 36})


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(total_timesteps=400, num_envs=4, buffer_size=200, learning_starts=100, train_frequency=16,
                 target_network_frequency=1, batch_size=8, eval_episodes=2, seed=3)  # fmt: skip
    return atari.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, monkeypatch=None, **changes):
    """Trains and returns the checkpoint, and the replay memory if monkeypatch is given to get at it."""
    memories = []
    if monkeypatch:
        init = atari.Replay.__init__
        monkeypatch.setattr(atari.Replay, "__init__", lambda self, *a: (init(self, *a), memories.append(self))[0])
    folder = atari.train(settings(tmp_path, env, **changes))
    saved = atari.load_checkpoint(str(folder))
    return (saved, memories[0], folder) if monkeypatch else saved


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# The mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_schedule", "n_step_return", "td_target", "update_target", "combine_dueling"])
def test_the_mathematics_is_that_of_dqn(name):
    """The same text, so that the tests of dqn.py hold for it too."""
    assert inspect.getsource(getattr(atari, name)) == inspect.getsource(getattr(dqn, name))


# The replay memory ----------------------------------------------------------------------------


def play(steps, N=3, K=4, buffer_size=60, seed=0):
    """A memory filled from N random environments, and what gymnasium's own wrapper showed meanwhile.

    Of the log, entry t holds the stacks, actions, rewards, terminated, truncated and valid [N] of step t.
    """
    raw = SyncVectorEnv([Noise] * N, autoreset_mode=AutoresetMode.NEXT_STEP)
    wrapped = SyncVectorEnv(
        [lambda: gym.wrappers.FrameStackObservation(Noise(), K)] * N, autoreset_mode=AutoresetMode.NEXT_STEP
    )
    rng = np.random.default_rng(seed)
    obs, stacks = raw.reset(seed=seed)[0], wrapped.reset(seed=seed)[0]
    replay, log, ended = atari.Replay(buffer_size, N, (4, 4), K), [], np.zeros(N, bool)
    replay.frames[replay.head] = obs
    for _ in range(steps):
        np.testing.assert_array_equal(replay.stacks(replay.head, np.arange(N)), stacks)
        actions, valid = rng.integers(3, size=N), ~ended
        obs, rewards, terminated, truncated, _ = raw.step(actions + 5)
        log.append((stacks, actions, rewards, terminated, truncated, valid))
        stacks = wrapped.step(actions + 5)[0]
        replay.add(actions, rewards, terminated, truncated, valid, obs)
        ended = terminated | truncated
    log.append((stacks,))
    return replay, log


def places(replay, log):
    """(row of the ring, step, environment) of every transition that the memory should offer."""
    for back in range(1, replay.rows + 1):
        step = len(log) - 1 - back
        for n in range(replay.N):
            if log[step][5][n]:
                yield (replay.head - back) % replay.T, step, n


@pytest.mark.parametrize(
    ("steps", "K", "n_step"), [(12, 4, 1), (90, 4, 3), (91, 4, 1), (137, 4, 5), (90, 1, 3), (77, 2, 2)]
)
def test_stacks_and_returns_are_those_of_the_episodes(steps, K, n_step):
    """play() compares the newest stacks with FrameStackObservation's; here everything that can be drawn."""
    replay, log = play(steps, K=K)
    gamma, seen = 0.9, 0
    for row, t, n in places(replay, log):
        batch = replay.batch(np.array([row]), np.array([n]), n_step, gamma)
        obs, actions, returns, discounts, next_obs = batch
        expected, end = 0.0, t
        for k in range(n_step):
            expected += gamma**k * log[t + k][2][n]
            end = t + k + 1
            terminated, truncated = log[t + k][3][n], log[t + k][4][n]
            if terminated or truncated or end == len(log) - 1:
                break
        np.testing.assert_array_equal(obs[0], log[t][0][n])
        assert actions[0] == log[t][1][n]
        assert returns[0] == pytest.approx(expected, rel=1e-5)
        assert discounts[0] == pytest.approx(0 if terminated else gamma ** (end - t), rel=1e-5)
        np.testing.assert_array_equal(next_obs[0], log[end][0][n])  # at an episode's end its true last stack
        seen += 1
    assert seen > replay.rows * replay.N * 0.7


@pytest.mark.parametrize("steps", [12, 90])
def test_draw_gives_every_transition_and_nothing_else(steps):
    replay, log = play(steps)
    drawn = np.stack(replay.draw(20_000, np.random.default_rng(1)), 1)
    drawn, counts = np.unique(drawn, axis=0, return_counts=True)
    assert set(map(tuple, drawn)) == {(row, n) for row, _, n in places(replay, log)}
    assert counts.max() / counts.min() < 1.8  # 3.4 standard deviations each way at 340 draws


def test_the_memory_holds_what_was_asked_for_and_each_frame_once():
    replay = atari.Replay(1_000_000, 8, (84, 84), 4)
    assert (replay.T - replay.K) * replay.N == 1_000_000
    assert replay.frames.nbytes == (1_000_000 + 8 * 4) * 84 * 84
    arrays = [value for value in vars(replay).values() if isinstance(value, np.ndarray)]
    assert round(sum(array.nbytes for array in arrays) / 1e9, 2) == 7.07  # what the help of --buffer-size says
    assert play(90, buffer_size=60)[0].rows == 20


# The environment ------------------------------------------------------------------------------


def test_atari_frames_are_skipped_once_and_sticky_as_told(tmp_path):
    env = atari.make_env(atari.Args(repeat_action_probability=0.125, noop_max=0))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (84, 84) and obs.dtype == np.uint8
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.125
    frames = [env.unwrapped.ale.getEpisodeFrameNumber()]
    for _ in range(3):
        env.step(0)
        frames.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert np.diff(frames).tolist() == [4, 4, 4]
    assert atari.make_env(atari.Args()).unwrapped.ale.getFloat("repeat_action_probability") == 0.25


def test_episodes_begin_with_different_numbers_of_noops():
    env = atari.make_env(atari.Args(noop_max=30))
    env.reset(seed=0)
    starts = set()
    for _ in range(10):
        env.reset()
        starts.add(env.unwrapped.ale.getEpisodeFrameNumber())
    assert len(starts) > 3


def test_a_lost_life_ends_the_return_but_not_the_game(tmp_path, monkeypatch):
    changes = dict(total_timesteps=600, num_envs=2, buffer_size=1000, learning_starts=10_000, end_e=1.0)
    monkeypatch.setattr(atari, "evaluate", lambda *a: {"returns": np.zeros(1)})
    monkeypatch.setattr(atari.QNetwork, "values", lambda self, stacks: np.eye(4)[np.zeros(len(stacks), int)])
    _, replay, _ = trained(tmp_path, "ALE/Breakout-v5", monkeypatch, terminal_on_life_loss=True, **changes)
    rows, n = np.nonzero(replay.terminated)
    game_goes_on = replay.valid[(rows + 1) % replay.T, n]
    assert len(rows) >= 4 and np.count_nonzero(game_goes_on) >= 0.7 * len(rows)
    assert (replay.age[rows + 1, n] > 0).all()  # stacks go through a lost life
    _, replay, _ = trained(tmp_path, "ALE/Breakout-v5", monkeypatch, **changes)
    rows, n = np.nonzero(replay.terminated)
    assert not replay.valid[(rows + 1) % replay.T, n].any()


@pytest.mark.parametrize("clip", [True, False])
def test_rewards_are_clipped_for_learning_only(tmp_path, monkeypatch, clip):
    _, replay, folder = trained(tmp_path, "Noise-v0", monkeypatch, clip_rewards=clip, learning_starts=1000)
    rewards = replay.rewards[replay.draw(300, np.random.default_rng(0))]
    assert (set(rewards) == {-1.0, 1.0}) == clip
    assert any(float(row["charts/episodic_return"] or 0) % 1 for row in rows_of(folder))


def test_returns_and_lengths_are_those_of_all_finished_episodes(tmp_path, monkeypatch):
    """However they ended; counted from the memory, which holds the whole run."""
    _, replay, folder = trained(tmp_path, "Noise-v0", monkeypatch, clip_rewards=False, buffer_size=1000, num_envs=2)
    lengths, returns = [], []
    for n in range(2):
        rows = np.flatnonzero(replay.valid[: replay.rows, n])
        ends = np.flatnonzero(replay.terminated[rows, n] | replay.truncated[rows, n]) + 1
        lengths += np.diff(ends, prepend=0).tolist()
        returns += [part.sum() for part in np.split(replay.rewards[rows, n], ends)[:-1]]
    last = rows_of(folder)[-1]
    assert 30 < len(lengths) <= 100  # the means are over 100 episodes
    assert float(last["charts/episodic_length"]) == pytest.approx(np.mean(lengths))
    assert float(last["charts/episodic_return"]) == pytest.approx(np.mean(returns), rel=1e-4)


def test_colour_images_become_grey_and_small():
    class Colour(Noise):
        def __init__(self):
            super().__init__()
            self.observation_space = gym.spaces.Box(0, 255, (96, 120, 3), np.uint8)

    gym.register("Colour-v0", entry_point=Colour)
    env = atari.make_env(atari.Args(env="Colour-v0"))
    assert env.observation_space.shape == env.reset()[0].shape == (84, 84)


class Guest(Noise):
    """Infos that no vector environment can stack, seeds of 32 bits only, no end once the evaluation begins."""

    def reset(self, *, seed=None, options=None):
        assert seed is None or 0 <= seed < 2**32
        self.t, self.endless = 0, seed is not None and seed >= 10**9
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.t += 1
        obs, _, terminated, truncated, _ = super().step(action)
        return (
            obs,
            1.0,
            terminated and not self.endless,
            truncated and not self.endless,
            {"found": np.zeros(self.np_random.integers(1, 9))},
        )


class ArrayReward(Noise):
    def step(self, action):
        return self.frame(), np.ones(1), True, False, {}


gym.register("NoiseGuest-v0", entry_point=Guest, kwargs={"size": 36})
gym.register("NoiseArrayReward-v0", entry_point=ArrayReward, kwargs={"size": 36})


def test_an_unusual_game_is_trained_and_an_evaluation_without_end_is_cut(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(atari.QNetwork, "values", lambda self, stacks: np.zeros((len(stacks), 3)))
    folder = atari.train(settings(tmp_path, "NoiseGuest-v0", seed=2**31 - 1, eval_episodes=1))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] >= 400 and summary["eval_return_mean"] == 27_000
    assert "1 of 1 evaluation episodes were cut after 27,000 steps" in capsys.readouterr().out


def test_a_game_of_a_named_module_is_an_atari_game_too():
    env = atari.make_env(atari.Args(env="ale_py:ALE/Pong-v5", noop_max=0))
    assert env.observation_space.shape == (84, 84)
    env.reset(seed=0)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25


@pytest.mark.parametrize(
    ("env", "changes", "message"),
    [
        ("NoiseArrayReward-v0", {}, "a reward of shape (1,)"),
        ("Noise-v0", dict(capture_video=True), "Noise-v0"),  # it cannot render
    ],
)
def test_what_cannot_be_played_ends_with_one_line_before_training(tmp_path, capsys, env, changes, message):
    with pytest.raises(SystemExit) as stop:
        atari.train(settings(tmp_path, env, **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# The network ----------------------------------------------------------------------------------


def test_network_is_that_of_2015():
    net = atari.QNetwork((4, 84, 84), 6, dueling=False, bf16=False)
    assert sum(p.numel() for p in net.parameters()) == (
        (4 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64 + (3136 + 1) * 512 + 513 * 6
    )


def test_pixels_are_scaled_and_freed_from_the_brightness_of_each_stack():
    net, seen = atari.QNetwork((2, 36, 36), 3, dueling=False, bf16=False), []
    net.convolutions[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stacks = torch.randint(200, (5, 2, 36, 36), dtype=torch.uint8)
    stacks[0], stacks[1] = 77, stacks[2] + 50
    net(stacks)
    assert (seen[0][0] == 0).all()
    torch.testing.assert_close(seen[0][1], seen[0][2])
    torch.testing.assert_close(seen[0][3], stacks[3] / 255 - (stacks[3] / 255).mean())


def test_a_small_ball_on_grey_reaches_the_last_layer_of_a_new_network():
    """With torch's own initial weights what arrives is forty times smaller, and Pong's ball was never found."""
    torch.manual_seed(0)
    stacks = torch.full((64, 4, 84, 84), 87, dtype=torch.uint8)
    for n, (row, column) in enumerate(torch.randint(82, (64, 2))):
        stacks[n, :, row : row + 2, column : column + 2] = 236
    net, seen = atari.QNetwork((4, 84, 84), 6, dueling=False, bf16=False), []
    net.heads[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert net(stacks).abs().max() < 0.05  # what it knows nothing of is worth about nothing
    assert seen[0].std(0).mean() > 0.005


def test_dueling_by_hand():
    heads = torch.tensor([[1.0, 3.0, 5.0, 4.0]])
    torch.testing.assert_close(atari.combine_dueling(heads), torch.tensor([[0.0, 2.0, 1.0]]))
    net = atari.QNetwork((2, 36, 36), 3, dueling=True, bf16=False)
    stacks = torch.randint(256, (5, 2, 36, 36), dtype=torch.uint8)
    heads = []
    net.heads.register_forward_hook(lambda _, inputs, output: heads.append(output))
    torch.testing.assert_close(net(stacks), atari.combine_dueling(heads[0]))
    assert heads[0].shape == (5, 4)


def test_bf16_computes_in_bfloat16_and_returns_floats():
    exact, short = (atari.QNetwork((4, 84, 84), 6, False, bf16) for bf16 in (False, True))
    short.load_state_dict(exact.state_dict())
    kinds = []
    short.heads[0].register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    stacks = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(short(stacks), exact(stacks), atol=0.02, rtol=0.05)
    assert short(stacks).dtype == torch.float32 and kinds[0] == torch.bfloat16


@pytest.mark.parametrize("dueling", [False, True])
def test_a_fixed_batch_is_learnt_to_zero_loss(dueling):
    torch.manual_seed(0)
    net = atari.QNetwork((2, 36, 36), 3, dueling, bf16=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    stacks = torch.randint(256, (16, 2, 36, 36), dtype=torch.uint8)
    actions, targets = torch.arange(16) % 3, torch.randn(16)
    for _ in range(120):
        loss = torch.nn.functional.huber_loss(net(stacks)[torch.arange(16), actions], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# Training -------------------------------------------------------------------------------------


def test_target_network_lags(tmp_path):
    def same(frequency):
        saved = trained(tmp_path, CATCH, target_network_frequency=frequency)["parts"]
        return all(torch.equal(saved["q_net"][key], saved["target_net"][key]) for key in saved["q_net"])

    assert same(1)  # a copy at every gradient step
    assert not same(10_000)


@pytest.mark.parametrize("double", [True, False])
def test_the_target_network_values_and_the_online_one_chooses_if_double(tmp_path, monkeypatch, double):
    batch = atari.Replay.batch

    def checked_batch(self, t, n, n_step, gamma):
        assert (n_step, gamma) == (2, 0.9)
        return batch(self, t, n, n_step, gamma)

    monkeypatch.setattr(atari.Replay, "batch", checked_batch)
    same = small_runs.watch_td_targets(atari, monkeypatch, double)
    trained(tmp_path, CATCH, double=double, n_step=2, gamma=0.9, target_network_frequency=10_000)
    assert same[0] and not any(same[1:]) and len(same) > 10  # the two networks part ways at the first step


def test_schedules_are_followed_and_epsilon_is_the_share_of_random_actions(tmp_path, monkeypatch):
    monkeypatch.setattr(atari.QNetwork, "values", lambda self, stacks: np.tile([0.0, 0.0, 1.0], (len(stacks), 1)))
    no_learning = dict(total_timesteps=8000, buffer_size=16_000, learning_starts=10_000)
    _, replay, folder = trained(tmp_path, CATCH, monkeypatch, **no_learning, exploration_fraction=0.5, end_e=0.1)
    columns = ("step", "charts/epsilon", "charts/learning_rate")
    steps, epsilons, rates = (np.array([float(row[key]) for row in rows_of(folder)]) for key in columns)
    np.testing.assert_allclose(epsilons, np.maximum(1 - 0.9 * (steps - 4) / 4000, 0.1), atol=0.02)
    np.testing.assert_allclose(rates, 1e-4 * (1 - (steps - 4) / 8000), atol=1e-6)
    first, last = replay.actions[:500] != 2, replay.actions[replay.head - 500 : replay.head] != 2
    assert first.mean() == pytest.approx(2 / 3 * (1 - 0.9 * 900 / 4000), abs=0.05)
    assert last.mean() == pytest.approx(2 / 3 * 0.1, abs=0.03)


def test_resume_fills_the_memory_before_it_learns_on(tmp_path, capsys, monkeypatch):
    report, rows, draw = atari.Run.report, [], atari.Replay.draw

    def interrupt(self, step, metrics):
        report(self, step, metrics)
        if step >= 192:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(atari.Run, "report", interrupt)
        atari.train(settings(tmp_path, CATCH))
    folder = capsys.readouterr().err.split()[-1]
    monkeypatch.setattr(atari.Replay, "draw", lambda self, *a: (rows.append(self.rows), draw(self, *a))[1])
    assert stop.value.code == 130
    assert str(atari.train(atari.parse_args(["--resume", folder]))) == folder
    assert json.loads((tmp_path / folder / "summary.json").read_text())["steps"] >= 400
    assert 25 <= rows[0] <= 33  # 100 steps of four environments, a tenth of the rows resets


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "ALE/Pang-v5"], "Pang"),
        (["--env", "PongNoFrameskip-v4"], "ALE/<Game>-v5"),
        (["--env", "CartPole-v1"], "images"),
        (["--env", CATCH, "--terminal-on-life-loss"], "lives"),
        (["--frame-stack", "0"], "--frame-stack must be > 0"),
        (["--repeat-action-probability", "1.5"], "[0, 1]"),
        (["--buffer-size", "7"], "--buffer-size"),
        (["--buffer-size", "1000000000000"], "no memory for a replay of 1,000,000,000,000 transitions, 6,5"),
    ],
)
def test_bad_settings_end_with_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        atari.train(atari.parse_args([*flags, "--run-dir", str(tmp_path)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Learning -------------------------------------------------------------------------------------


def test_one_frame_of_the_drifting_ball_is_worth_a_tossed_coin():
    """The best that any player can do who sees one frame at a time, counted out over all balls."""
    env = gym.make(DRIFT).unwrapped
    env.reset(seed=0)
    won = {}  # by what is seen before the last step, and the action
    for phase in range(40):
        for action in range(3):
            env.phase, env.row = phase, 18
            seen = env.frame().tobytes()
            won[seen, action] = won.get((seen, action), 0) + env.step(action)[1]
    best = sum(max(won[seen, action] for action in range(3)) for seen in {seen for seen, _ in won}) / 40
    assert best == pytest.approx(0.05)


def score(tmp_path, **changes):
    """The greedy return on the drifting ball after 30,000 steps."""
    catch = dict(total_timesteps=30_000, num_envs=16, learning_rate=1e-3, train_frequency=16,
                 batch_size=32, buffer_size=50_000, target_network_frequency=62, learning_starts=1000,
                 exploration_fraction=0.5, eval_episodes=200, seed=1)  # fmt: skip
    folder = atari.train(settings(tmp_path, DRIFT, **(catch | changes)))
    return json.loads((folder / "summary.json").read_text())["eval_return_mean"]


def test_movement_is_learnt_from_four_frames_and_not_from_one(tmp_path):
    assert score(tmp_path) >= 0.9
    assert score(tmp_path, frame_stack=1) <= 0.3
