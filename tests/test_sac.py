"""SAC: the mathematics against independent definitions, the soft optimum, the faults of well-known codes, learning."""

import csv
import json
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import probes
import pytest
import small_runs
import torch
from conftest import ROOT, load_script

sac, dqn = load_script("algos/sac.py"), load_script("algos/dqn.py")


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(total_timesteps=6000, num_envs=8, buffer_size=4000, learning_starts=200, train_frequency=8,
                 batch_size=64, tau=0.05, hidden=32, learning_rate=5e-3, gamma=0.9, alpha=1e-3, autotune=False,
                 policy_frequency=1, eval_episodes=2, seed=3)  # fmt: skip
    return sac.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns the actor, the critics and the rows of metrics.csv."""
    args = settings(tmp_path, env, **changes)
    folder = sac.train(args)
    parts, env = sac.load_checkpoint(str(folder))["parts"], sac.make_env(env)
    sizes = env.observation_space.shape[0], math.prod(env.action_space.shape), args.hidden
    actor, critics = sac.Actor(*sizes, args.alpha), sac.Critics(*sizes, args.num_critics, args.layer_norm)
    actor.load_state_dict(parts["actor"])
    critics.load_state_dict(parts["critics"])
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return actor, critics, list(csv.DictReader(file))


class TwoStates(gym.Env):
    """Action a in [-1, 1] leads to state 1 with probability (1 + a) / 2; reward s - 2 (a - center_s)^2."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    center = (-0.5, 0.2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return np.float32([self.state]), {}

    def step(self, action):
        reward = self.state - 2 * (float(action[0]) - self.center[self.state]) ** 2
        self.state = int(self.np_random.random() < (1 + action[0]) / 2)
        return np.float32([self.state]), reward, False, False, {}


class Ticks(probes.Probe):
    """The observation counts on from 0, 10 or 20; a time limit cuts after three steps."""

    action_space, length = gym.spaces.Box(-1, 1, (1,), np.float32), 10**9

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.first = int(self.np_random.choice([0, 10, 20]))
        return self._observe(), {}

    def observation(self):
        return float(getattr(self, "first", 0) + self.t)


gym.register("Ticks-v0", entry_point=Ticks, max_episode_steps=3)
gym.register("TwoStates-v0", entry_point=TwoStates, max_episode_steps=10)
UNBOUNDED = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, np.inf]))
gym.register("Unbounded-v0", entry_point=type("Unbounded", (probes.Constant,), {"action_space": UNBOUNDED}))
BYTES = gym.spaces.Box(-128, 127, (2, 2), np.int8)
gym.register("Bytes-v0", entry_point=type("Bytes", (probes.Constant,), {"action_space": BYTES}))


# The mathematics ------------------------------------------------------------------------------


def test_log_density_is_the_change_of_variables():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, noise = torch.randn(3, 500, 3, generator=generator, dtype=torch.float64)
    actions, logprobs = sac.squash(mean, 0.5 * log_std, noise)
    u = (mean + (0.5 * log_std).exp() * noise).requires_grad_()
    slope = torch.autograd.grad(u.tanh().sum(), u)[0]  # the derivative of tanh, by torch
    expected = torch.distributions.Normal(mean, (0.5 * log_std).exp()).log_prob(u) - slope.log()
    torch.testing.assert_close(actions, u.tanh().detach())
    torch.testing.assert_close(logprobs, expected.sum(-1).detach(), rtol=1e-6, atol=1e-6)


def test_log_density_is_exact_where_tanh_is_saturated():
    """At u = 9 the usual log(1 - tanh^2 + 1e-6) gives -13.7 in place of -16.6, and a tenth of the gradient."""
    for place in (-10.0, 9.0, 10.0, 30.0):
        mean = torch.tensor([[place]], requires_grad=True)
        _, logprob = sac.squash(mean, torch.zeros(1, 1), torch.zeros(1, 1))
        exact = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - abs(place) - math.log1p(math.exp(-2 * abs(place))))
        assert logprob.item() == pytest.approx(exact, rel=1e-5)
        logprob.backward()
        assert mean.grad.item() == pytest.approx(2 * math.tanh(place), rel=1e-5)
    _, logprob = sac.squash(torch.tensor([[10.0]]), torch.zeros(1, 1), torch.zeros(1, 1))
    assert logprob.item() == pytest.approx(18.614 - 0.919, abs=1e-3)  # by hand, in float64


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.7, -1.0), (-1.5, 0.3)])
def test_density_integrates_to_one_over_the_actions(mean, log_std):
    u = torch.linspace(-12, 12, 400_001, dtype=torch.float64)[:, None]
    means, log_stds = torch.full_like(u, mean), torch.full_like(u, log_std)
    actions, logprobs = sac.squash(means, log_stds, (u - mean) / math.exp(log_std))
    assert torch.trapezoid(logprobs.exp(), actions.squeeze(1)).item() == pytest.approx(1, abs=1e-4)


def test_soft_target_by_hand():
    returns, discounts = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.0])
    next_q = torch.tensor([[10.0, 20.0, 30.0], [12.0, 4.0, 50.0]])
    logprobs = torch.tensor([-2.0, 1.0, 7.0])
    # the least critic, plus alpha times the entropy; nothing after a termination
    assert sac.soft_target(returns, discounts, next_q, logprobs, torch.tensor(0.5)).tolist() == [6.5, 3.75, 3.0]
    assert sac.soft_target(returns, discounts, next_q[:1], logprobs, torch.tensor(0.0)).tolist() == [6.0, 12.0, 3.0]
    with pytest.raises(AssertionError):  # [B, 1] would broadcast to [B, B]
        sac.soft_target(returns, discounts, next_q, logprobs[:, None], torch.tensor(0.5))


def test_critic_loss_by_hand():
    q = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert sac.critic_loss(q, torch.tensor([1.0, 4.0])).item() == pytest.approx(0.5 * (0 + 4) + 0.5 * (1 + 0))
    with pytest.raises(AssertionError):
        sac.critic_loss(q, torch.tensor([[1.0], [4.0]]))


def test_actor_loss_by_hand():
    q, logprobs = torch.tensor([[1.0, 5.0], [3.0, 2.0]]), torch.tensor([-1.0, 3.0])
    assert sac.actor_loss(q, logprobs, torch.tensor(0.5)).item() == pytest.approx((-0.5 - 1 + 1.5 - 2) / 2)
    with pytest.raises(AssertionError):
        sac.actor_loss(q, logprobs[:, None], torch.tensor(0.5))


@pytest.mark.parametrize("alpha", [0.01, 1.0, 5.0])
def test_temperature_gradient_by_hand(alpha):
    """Entropy minus target, whatever alpha; a policy less random than the target makes it grow."""
    log_alpha = torch.tensor(math.log(alpha), requires_grad=True)
    logprobs = torch.tensor([1.0, 4.0], requires_grad=True)  # entropy -2.5
    sac.temperature_loss(log_alpha, logprobs, target_entropy=-1.0).backward()
    assert log_alpha.grad.item() == pytest.approx(-2.5 - -1.0)  # descending, log alpha grows
    assert logprobs.grad is None


def test_update_target_and_n_step_are_those_of_dqn():
    for name in ("n_step_return", "update_target"):
        assert getattr(sac, name).__code__.co_code == getattr(dqn, name).__code__.co_code
        assert getattr(sac, name).__code__.co_consts == getattr(dqn, name).__code__.co_consts


# The environment and the networks -------------------------------------------------------------


def test_actions_fill_boxes_of_any_bounds():
    lopsided = gym.spaces.Box(np.float32([0, -3, -0.1]), np.float32([100, 1, 0.7]))
    corners = sac.to_env(lopsided, np.array([[-1.0, -1, -1], [1, 1, 1], [0, 0, 0]]))
    np.testing.assert_array_equal(corners[:2], [lopsided.low, lopsided.high])  # exactly
    np.testing.assert_allclose(corners[2], [50, -1, 0.3], rtol=1e-6)
    assert sac.to_env(BYTES, np.array([[-1.0, 1.0, 0.99, -0.004]])).tolist() == [[[-128, 127], [126, -1]]]
    huge = gym.spaces.Box(np.float32(-3e38), np.float32(3e38), (1,))
    np.testing.assert_allclose(sac.to_env(huge, np.array([[1.0], [0.5]])), [[3e38], [1.5e38]], rtol=1e-6)


def test_acting_in_numpy_equals_the_network():
    torch.manual_seed(0)
    actor, obs, noise = sac.Actor(4, 2, 16, 0.1), torch.randn(5, 4), torch.randn(5, 2)
    for _ in range(2):
        mean, log_std = actor.net(obs).detach().chunk(2, 1)
        drawn = sac.squash(mean, log_std.clamp(-5, 2), noise)[0]
        np.testing.assert_allclose(actor.act(obs.numpy(), noise.numpy()), drawn, atol=1e-5)
        np.testing.assert_allclose(actor.act(obs.numpy(), 0), mean.tanh(), atol=1e-5)
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter += 0.3


def test_untrained_actor_explores_nearly_uniformly():
    torch.manual_seed(0)
    actions, logprobs = sac.Actor(3, 1, 64, 0.1)(torch.randn(50_000, 3))
    shares = torch.histc(actions, 10, -1, 1) / 50_000
    assert shares.min() > 0.06 and shares.max() < 0.15
    assert -logprobs.mean().item() == pytest.approx(math.log(2), abs=0.1)  # nats of a uniform one


def test_each_critic_is_a_network_of_its_own():
    torch.manual_seed(0)
    critics, obs, actions = sac.Critics(3, 2, 16, 2, normalise=False), torch.randn(7, 3), torch.randn(7, 2)
    q = critics(obs, actions)
    assert q.shape == (2, 7) and not torch.allclose(q[0], q[1])
    torch.testing.assert_close(q[1], critics.nets[1](torch.cat([obs, actions], 1)).squeeze(1))
    np.testing.assert_allclose(critics.values(obs.numpy(), actions.numpy()), q.min(0).values.detach())
    with torch.no_grad():
        critics.nets[0][0].weight *= 100
    assert not torch.allclose(critics(obs, actions)[0], q[0]) and torch.equal(critics(obs, actions)[1], q[1])


def test_layer_norm_bounds_what_the_critics_say_far_away():
    torch.manual_seed(0)
    far, actions = 1e6 * torch.randn(64, 3), torch.zeros(64, 1)
    assert sac.Critics(3, 1, 16, 2, normalise=True)(far, actions).abs().max() < 10
    assert sac.Critics(3, 1, 16, 2, normalise=False)(far, actions).abs().max() > 1e3


# The replay memory ----------------------------------------------------------------------------


def test_replay_keeps_vectors_of_actions_and_folds_rewards():
    replay = sac.Replay(12, 2, 3, 2)  # six rows of two environments
    obs, actions = np.random.default_rng(0).normal(size=(2, 9, 2, 3)).astype(np.float32)
    replay.obs[0] = obs[0]
    no = np.zeros(2, bool)
    for t in range(8):  # the ring wraps around
        truncated = np.array([t == 6, False])
        replay.add(actions[t, :, :2], np.array([1.0, 10.0]), no, truncated, ~no, obs[t + 1])
    t, n = np.array([5, 5, 0]), np.array([0, 1, 1])  # steps 5, 5 and 7, the newest
    batch = replay.batch(t, n, n_step=3, gamma=0.5)
    np.testing.assert_allclose(batch[0], [obs[5, 0], obs[5, 1], obs[7, 1]])
    np.testing.assert_allclose(batch[1], [actions[5, 0, :2], actions[5, 1, :2], actions[7, 1, :2]])
    np.testing.assert_allclose(batch[2], [1.5, 17.5, 10])  # cut at 6, whole, nothing newer
    np.testing.assert_allclose(batch[3], [0.25, 0.125, 0.5])
    np.testing.assert_allclose(batch[4], [obs[7, 0], obs[8, 1], obs[8, 1]])


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, dict(n_step=3, layer_norm=True)], ids=["plain", "extended"])
@pytest.mark.parametrize(
    "probe, q_at",  # observation -> Q
    [
        ("Constant", {0: 1.0}),
        ("Sign", {-1: -1.0, 1: 1.0}),
        ("Delayed", {0: 0.9, 1: 1.0}),
        ("Truncated", {0: 10.0}),  # a time limit is no death
        ("Marked", {0: 2.71, 1: 1.9, 2: 1.0}),  # and a row that resets is no transition
    ],
)
def test_probe_values(tmp_path, probe, q_at, flags):
    _, critics, _ = trained(tmp_path, f"Box{probe}-v0", **flags)
    q = critics.values(np.array(list(q_at))[:, None], np.zeros((len(q_at), 1)))
    np.testing.assert_allclose(q, list(q_at.values()), rtol=0.07, atol=0.04)


def test_a_cut_episode_is_bootstrapped_from_its_own_last_observation(tmp_path, monkeypatch):
    drawn, batch = [], sac.Replay.batch
    monkeypatch.setattr(sac.Replay, "batch", lambda self, *args: (drawn.append(batch(self, *args)), drawn[-1])[1])
    trained(tmp_path, "Ticks-v0", total_timesteps=2000)
    obs, _, _, discounts, next_obs = (np.concatenate(column).squeeze() for column in zip(*drawn, strict=True))
    assert (next_obs == obs + 1).all()  # neither the next episode's first observation, nor a row that only resets
    assert set(next_obs % 10) == {1, 2, 3} and (discounts == np.float32(0.9)).all()


def test_a_time_limit_counts_as_death_if_told_so(tmp_path):
    _, critics, _ = trained(tmp_path, "BoxTruncated-v0", bootstrap_truncated=False)
    assert critics.values(np.zeros((1, 1)), np.zeros((1, 1)))[0] == pytest.approx(1, abs=0.05)


def test_actor_finds_the_best_action_between_lopsided_bounds(tmp_path):
    actor, critics, _ = trained(tmp_path, "AimFar-v0", total_timesteps=10_000)
    aims = np.random.default_rng(0).uniform(-0.7, 0.7, (50, 2)).astype(np.float32)
    assert np.abs(actor.act(aims, 0) - aims).mean() < 0.06


def test_rescaling_the_actions_leaves_training_unchanged(tmp_path):
    """The entropy is that of actions in [-1, 1]: neither it nor the temperature knows the environment's bounds."""
    columns = ("charts/alpha", "losses/entropy", "losses/q_values", "losses/qf_loss")
    courses = []
    for env in ("Aim-v0", "AimFar-v0"):
        _, _, rows = trained(tmp_path, env, autotune=True, alpha=0.1, total_timesteps=2000)
        courses.append(np.array([[float(row[key] or 0) for key in columns] for row in rows]))
    np.testing.assert_allclose(courses[0], courses[1], rtol=0.02, atol=0.02)
    assert np.ptp(courses[0][:, 0]) > 0.02  # the temperature moved


def test_temperature_holds_the_entropy_at_its_target(tmp_path):
    last = {}
    for target in (-0.5, -1.5):
        changes = dict(autotune=True, alpha=0.05, target_entropy=target, total_timesteps=8000, anneal_lr=False)
        _, _, rows = trained(tmp_path, "Aim-v0", **changes)
        last[target] = float(rows[-1]["losses/entropy"])
        assert last[target] == pytest.approx(2 * target, abs=0.5)  # two dimensions
    assert last[-0.5] > last[-1.5] + 1


def test_fixed_temperature_stays(tmp_path):
    _, _, rows = trained(tmp_path, "Aim-v0", alpha=0.03, total_timesteps=1000)
    assert {row["charts/alpha"] for row in rows} == {rows[0]["charts/alpha"]}
    assert float(rows[0]["charts/alpha"]) == pytest.approx(0.03)


def soft_value_iteration(gamma, alpha, places=4001):
    """Q*[state, action] of TwoStates on a grid of actions: V(s) = alpha log of the integral of exp(Q / alpha)."""
    a, values = np.linspace(-1, 1, places), np.zeros(2)
    for _ in range(300):
        following = (1 - a) / 2 * values[0] + (1 + a) / 2 * values[1]
        q = np.array([s - 2 * (a - TwoStates.center[s]) ** 2 + gamma * following for s in (0, 1)])
        values = alpha * np.log(np.trapezoid(np.exp(q / alpha), a, axis=1))
    return a, q


def test_critics_reach_the_soft_optimum(tmp_path):
    """The optimal policy is a truncated Gaussian here, which the squashed one follows closely."""
    changes = dict(gamma=0.8, alpha=0.2, total_timesteps=12_000, buffer_size=12_000, train_frequency=4)
    actor, critics, _ = trained(tmp_path, "TwoStates-v0", num_critics=1, **changes)  # the least of two is too low
    a, q = soft_value_iteration(0.8, 0.2)
    for state in (0, 1):
        policy = np.exp((q[state] - q[state].max()) / 0.2)
        likely = np.flatnonzero(policy > 0.2)[::50]
        obs, actions = np.full((len(likely), 1), state, np.float32), a[likely][:, None]
        np.testing.assert_allclose(
            critics.values(obs, actions), q[state, likely], atol=0.12
        )  # it falls short by alpha KL
        mean = (policy * a).sum() / policy.sum()
        assert actor.act(obs[:1], 0)[0, 0] == pytest.approx(mean, abs=0.08)
    # As returns without the entropy's worth, the values would be others by more than the tolerance.
    assert abs(soft_value_iteration(0.8, 1e-2)[1].max(1) - q.max(1)).max() > 0.3


@pytest.fixture
def taken(monkeypatch):
    """The actions that the replay is given, one array [N, A] a step."""
    actions_of_steps, add = [], sac.Replay.add

    def spy(self, actions, *rest):
        actions_of_steps.append(np.array(actions))
        add(self, actions, *rest)

    monkeypatch.setattr(sac.Replay, "add", spy)
    return actions_of_steps


def test_every_environment_and_dimension_has_noise_of_its_own(tmp_path, taken):
    trained(tmp_path, "Aim-v0", total_timesteps=4000, learning_starts=10**6)
    noise = np.arctanh(np.array(taken)).reshape(len(taken), -1)  # [steps, N * A]; untrained: nearly standard normal
    assert 0.9 < noise.std() < 1.1
    correlations = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    assert np.abs(correlations).max() < 0.25


@pytest.mark.parametrize("repeat", [0.0, 0.9])
def test_noise_repeats_as_often_as_told(tmp_path, taken, repeat):
    trained(tmp_path, "BoxConstant-v0", total_timesteps=4000, learning_starts=10**6, repeat_noise=repeat)
    taken = np.array(taken)
    assert abs((taken[1:] == taken[:-1]).mean() - repeat) < 0.03
    assert 0.5 < taken.std() < 0.75


def test_one_gradient_step_for_every_train_frequency_steps(tmp_path, monkeypatch):
    for frequency, delay in ((0.5, 1), (4, 1), (8, 2), (50, 3)):
        with monkeypatch.context() as patch:
            counts = small_runs.count_calls(sac, patch, "critic_loss", "update_target", "actor_loss")
            trained(tmp_path, "BoxDelayed-v0", total_timesteps=1000, train_frequency=frequency, policy_frequency=delay)
        assert counts["critic_loss"] == pytest.approx(800 / frequency, abs=max(3, 8 / frequency))
        assert counts["update_target"] == counts["critic_loss"]  # the target follows at every gradient step
        assert counts["actor_loss"] == pytest.approx(counts["critic_loss"] / delay, abs=1)


def test_actors_loss_teaches_no_critic(tmp_path, monkeypatch):
    """What the critics learn comes from the critics' loss alone."""
    seen, original = [], sac.actor_loss

    def spy(q, logprobs, alpha):
        seen.append([p.requires_grad for p in critics[0].parameters()])
        before = [None if p.grad is None else p.grad.clone() for p in critics[0].parameters()]
        loss = original(q, logprobs, alpha)
        loss.backward(retain_graph=True)
        after = [p.grad for p in critics[0].parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return loss

    critics, init = [], sac.Critics.__init__
    monkeypatch.setattr(sac.Critics, "__init__", lambda self, *args: (init(self, *args), critics.append(self))[0])
    monkeypatch.setattr(sac, "actor_loss", spy)
    trained(tmp_path, "BoxSign-v0", total_timesteps=400)
    assert seen and all(p.requires_grad for p in critics[0].parameters())  # afterwards they learn again


def test_target_critics_lag_and_can_be_taken_away(tmp_path):
    def same(**changes):
        folder = sac.train(settings(tmp_path, "BoxSign-v0", total_timesteps=1000, anneal_lr=False, **changes))
        parts = sac.load_checkpoint(str(folder))["parts"]
        return all(torch.equal(parts["critics"][key], value) for key, value in parts["target_critics"].items())

    assert not same() and same(tau=1)


def test_the_target_critics_value_the_next_state(tmp_path, monkeypatch):
    made, pairs = [], []
    init, soft_target, batch = sac.Critics.__init__, sac.soft_target, sac.Replay.batch
    monkeypatch.setattr(sac.Critics, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])

    def spy(returns, discounts, next_q, next_logprobs, alpha):
        with torch.no_grad():
            online = made[0](pairs[-1], torch.zeros(len(returns), 1))
        differences.append((next_q - online).abs().max().item())
        return soft_target(returns, discounts, next_q, next_logprobs, alpha)

    def seen(self, *args):
        rows = batch(self, *args)
        pairs.append(torch.from_numpy(rows[4]))
        return rows

    differences = []
    monkeypatch.setattr(sac.Replay, "batch", seen)
    monkeypatch.setattr(sac, "soft_target", spy)
    trained(tmp_path, "BoxConstant-v0", total_timesteps=1500, tau=1e-6, anneal_lr=False)
    assert max(differences[-10:]) > 0.5  # the online critics know 1 by now, the targets still say what they said


def test_resuming_fills_the_memory_before_it_learns_on(tmp_path, monkeypatch):
    args = settings(tmp_path, "BoxSign-v0", total_timesteps=1000)
    args.resume, args.total_timesteps = str(sac.train(args)), 1600
    steps, draw = [], sac.Replay.draw
    monkeypatch.setattr(sac.Replay, "draw", lambda self, *a: (steps.append(self.rows), draw(self, *a))[1])
    sac.train(args)
    # Every other row only resets: 200 transitions of eight environments lie in 50 rows, all 600 in 150.
    assert 45 <= steps[0] <= 55 and 130 <= max(steps) <= 155


def test_the_prediction_is_compared_with_what_was_obtained(tmp_path):
    folder = sac.train(settings(tmp_path, "BoxMarked-v0", reward_scale=0.5, total_timesteps=4000))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["obtained_return"] == pytest.approx(2.71)  # in the units of the environment
    assert summary["predicted_return"] == pytest.approx(2.71, abs=0.15)
    folder = sac.train(settings(tmp_path, "BoxTruncated-v0"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["obtained_return"] == pytest.approx(10, abs=1)  # what the time limit cut off counts as predicted


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tau 1.5", "--tau must be in [0, 1]"),
        ("--tau 0", "--tau must be > 0"),
        ("--train-frequency 0", "--train-frequency must be > 0"),
        ("--alpha 0", "--alpha must be > 0"),
        ("--num-critics 0", "--num-critics must be > 0"),
        ("--repeat-noise 1.5", "--repeat-noise must be in [0, 1]"),
        ("--buffer-size 10", "--buffer-size"),
        ("--env CartPole-v1", "this script handles Box"),
        ("--env Unbounded-v0", "actions without a bound"),
        ("--buffer-size 1000000000000", "no memory for a replay of 1,000,000,000,000 transitions, 14,901.2 GiB"),
    ],
)
def test_bad_settings_end_with_one_line(flags, message, tmp_path, capsys):
    small_runs.check_refused(sac, flags, message, capsys, tmp_path)


def test_missing_mujoco_gets_one_line(tmp_path):
    code = (
        "import runpy, sys; sys.modules['mujoco'] = None;"
        f"sys.argv = ['sac.py', '--env', 'HalfCheetah-v5', '--run-dir', {str(tmp_path / 'runs')!r}];"
        f"runpy.run_path({str(ROOT / 'algos/sac.py')!r}, run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr[-2000:]
    assert "gymnasium[mujoco]" in process.stderr and not (tmp_path / "runs").exists()


def test_arrays_of_integers_are_played(tmp_path):
    folder = sac.train(settings(tmp_path, "Bytes-v0", total_timesteps=400))
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["eval_return_mean"] == 1


# Learning -------------------------------------------------------------------------------------


def test_learns_pendulum(tmp_path):
    """A random player gets -1,200, and half of the preset's budget is about enough to swing it up."""
    assert small_runs.preset_summary(sac, tmp_path, "--total-timesteps", "20000")["eval_return_mean"] > -250
