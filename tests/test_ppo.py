"""PPO: the mathematics against independent definitions, the endings of a trajectory, learning."""

import json

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import scipy.stats
import small_runs
import torch
from conftest import load_script

ppo = load_script("algos/ppo.py")


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(num_envs=8, num_steps=32, num_minibatches=2, hidden=16, learning_rate=1e-2, eval_episodes=2, seed=3)
    return ppo.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns the saved agent and the summary."""
    args = settings(tmp_path, env, **changes)
    folder = ppo.train(args)
    env = ppo.make_env(args.env)
    agent = ppo.Agent(env.observation_space.shape[0], env.action_space, args.hidden)
    agent.load_state_dict(ppo.load_checkpoint(str(folder))["parts"]["agent"])
    return agent, json.loads((folder / "summary.json").read_text())


def values_at(agent, *observations):
    with torch.no_grad():
        return agent.value(torch.tensor(observations, dtype=torch.float32).reshape(-1, 1)).numpy()


# The mathematics ------------------------------------------------------------------------------


def random_trajectories(rng, T=40, N=6):
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated = rng.random((T, N)) < 0.1
    truncated = ~terminated & (rng.random((T, N)) < 0.1)
    return rewards, values, terminated, truncated


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_the_quadratic_definition(gae_lambda):
    rewards, values, terminated, truncated = random_trajectories(np.random.default_rng(0))
    assert terminated.any() and truncated.any() and not (terminated | truncated)[-1].all()
    gamma, (T, N) = 0.9, rewards.shape
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                future = 0.0 if terminated[k, n] else values[k + 1, n]
                expected[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * future - values[k, n])
                if terminated[k, n] or truncated[k, n]:
                    break
    np.testing.assert_allclose(ppo.gae(rewards, values, terminated, truncated, gamma, gae_lambda), expected, atol=1e-12)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards, values, terminated, truncated = random_trajectories(np.random.default_rng(1))
    gamma, returns, following = 0.97, np.zeros_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        following = np.where(terminated[t], 0, np.where(truncated[t], values[t + 1], following))
        returns[t] = following = rewards[t] + gamma * following
    advantages = ppo.gae(rewards, values, terminated, truncated, gamma, 1.0)
    np.testing.assert_allclose(advantages, returns - values[:-1], atol=1e-12)


@pytest.mark.parametrize(
    ("clip_coef", "expected_loss", "expected_gradient", "expected_fraction"),
    [  # ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1; gradients by d ratio / d logprob = ratio
        (0.2, -(1.2 - 1.5 + 0.5 - 0.8) / 4, [0.0, 1.5 / 4, -0.5 / 4, 0.0], 1.0),
        (float("inf"), -(1.5 - 1.5 + 0.5 - 0.5) / 4, [-1.5 / 4, 1.5 / 4, -0.5 / 4, 0.5 / 4], 0.0),
    ],
)
def test_objectives_by_hand(clip_coef, expected_loss, expected_gradient, expected_fraction):
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    loss, approx_kl, clipfrac = ppo.ppo_loss(logprobs, torch.zeros_like(ratio), advantages, clip_coef)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss)
    np.testing.assert_allclose(logprobs.grad.numpy(), expected_gradient, atol=1e-12)
    assert approx_kl.item() == pytest.approx((2 * (0.5 - np.log(1.5)) + 2 * (-0.5 - np.log(0.5))) / 4)
    assert clipfrac.item() == expected_fraction
    with pytest.raises(AssertionError):  # [B, 1] - [B] would broadcast to [B, B]
        ppo.ppo_loss(logprobs.unsqueeze(1), torch.zeros_like(ratio), advantages, clip_coef)


def test_the_kl_estimate_is_the_exact_divergence_on_average():
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logps = torch.tensor([0.1, -0.4, 0.6], dtype=torch.float64).log_softmax(0)
    exact = (old * (old.log() - logps)).sum()
    estimates = [ppo.ppo_loss(logps[a : a + 1], old[a : a + 1].log(), torch.zeros(1), 0.2)[1] for a in range(3)]
    assert sum(p * kl for p, kl in zip(old, estimates, strict=True)).item() == pytest.approx(exact.item())


def test_explained_variance():
    returns = np.array([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns + 7, returns) == 1.0
    assert ppo.explained_variance(np.zeros(3), returns) == 0.0
    assert ppo.explained_variance(returns, np.ones(3)) == 0.0


def test_running_statistics_equal_those_of_all_rows():
    rows, stats = np.random.default_rng(0).normal(3, 5, size=(1000, 2)), ppo.RunningMeanStd(2)
    assert stats(torch.tensor([[3.0, -2.0]])).tolist() == [[3.0, -2.0]]  # before the first update nothing changes
    for part in np.split(rows, [10, 400, 401]):
        stats.update(part)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4)
    seen = stats(torch.from_numpy(rows).float())
    np.testing.assert_allclose([seen.mean(), seen.var()], [0, 1], atol=1e-2)


# The policy -----------------------------------------------------------------------------------


def test_the_numpy_policy_samples_the_torch_policy():
    torch.manual_seed(0)
    agent, rng = ppo.Agent(3, gym.spaces.Discrete(4), 8), np.random.default_rng(0)
    agent.norm.update(rng.normal(0.5, 2, size=(100, 3)))
    obs = np.ones((100_000, 3), np.float32)
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter += torch.randn_like(parameter)
        inputs = agent.norm(torch.ones(4, 3))
        logprobs, entropies = agent.logprobs_and_entropy(inputs, torch.arange(4))
        probabilities = logprobs.exp().numpy()
    np.testing.assert_allclose(entropies, scipy.stats.entropy(probabilities), rtol=1e-5)
    layers = agent.numpy_layers()
    actions = agent.act(layers, obs, rng)
    frequencies = np.bincount(actions, minlength=4) / len(actions)
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * np.sqrt(0.25 / len(actions)))
    assert (agent.act(layers, obs[:1]) == probabilities.argmax()).all()


def test_the_numpy_policy_samples_the_torch_gaussian():
    torch.manual_seed(0)
    agent, rng = ppo.Agent(3, gym.spaces.Box(-1, 1, (2,)), 8), np.random.default_rng(0)
    with torch.no_grad():
        agent.log_std += torch.tensor([0.3, -0.5])
        mean, std = agent.actor(torch.ones(3)).numpy(), agent.log_std.exp().numpy()
    actions = agent.act(agent.numpy_layers(), np.ones((100_000, 3), np.float32), rng)
    np.testing.assert_allclose(actions.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(actions.std(0), std, rtol=0.01)
    np.testing.assert_allclose(agent.act(agent.numpy_layers(), np.ones((1, 3), np.float32))[0], mean, rtol=1e-5)
    with torch.no_grad():
        logprobs, entropies = agent.logprobs_and_entropy(torch.ones(50, 3), torch.from_numpy(actions[:50]).float())
    normal = scipy.stats.multivariate_normal(mean, np.diag(std**2))
    np.testing.assert_allclose(logprobs, normal.logpdf(actions[:50]), rtol=1e-4)
    np.testing.assert_allclose(entropies, np.full(50, normal.entropy()), rtol=1e-5)


def test_actions_reach_the_environment_in_its_own_units():
    box = gym.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)
    np.testing.assert_allclose(ppo.to_env(box, np.array([[0.0, 0.0], [-1, 1], [5, -5]])), [[0, 5], [-2, 10], [2, 0]])
    unbounded = gym.spaces.Box(-np.inf, np.inf, (1,))
    np.testing.assert_allclose(ppo.to_env(unbounded, np.array([[7.0]])), [[7.0]])
    assert ppo.to_env(gym.spaces.Discrete(3, start=-1), np.array([0, 2])).tolist() == [-1, 1]


# The loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["ProbeMarked-v0", "ProbeContinuous-v0"])
@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_the_ratio_is_one_on_the_first_minibatch_of_every_update(tmp_path, monkeypatch, env, num_minibatches):
    calls, original = [], ppo.ppo_loss

    def spy(logprobs, old_logprobs, *rest):
        calls.append((logprobs - old_logprobs).abs().max().item())
        return original(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    args = settings(tmp_path, env, num_minibatches=num_minibatches, update_epochs=2, norm_obs=True)
    args.total_timesteps = 1000
    ppo.train(args)
    per_update = 2 * num_minibatches
    assert len(calls) > 3 * per_update
    assert max(calls[::per_update]) < 2e-6  # float32 rounding: the batch of one differs in size from that of the other
    assert max(calls) > 1e-3  # and the spy sees a policy that moves


def test_reset_rows_and_successors_of_ends_never_enter_a_loss(tmp_path, monkeypatch):
    seen, original = [], ppo.Agent.logprobs_and_entropy

    def spy(self, obs, actions):
        seen.append(obs.numpy().ravel())
        return original(self, obs, actions)

    monkeypatch.setattr(ppo.Agent, "logprobs_and_entropy", spy)
    ppo.train(settings(tmp_path, "ProbeMarked-v0", total_timesteps=1000))
    values, counts = np.unique(np.concatenate(seen), return_counts=True)
    assert values.tolist() == [0, 1, 2]  # 99, the last observation, only ever follows a reset row
    assert counts.max() < 1.1 * counts.min()


def test_steps_count_transitions_not_reset_rows(tmp_path):
    args = settings(tmp_path, "ProbeMarked-v0", total_timesteps=500)
    folder = ppo.train(args)
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert int(rows[0].split(",")[0]) == 8 * 32 * 3 // 4  # every fourth row resets


@pytest.mark.parametrize(
    ("env", "observations", "expected", "changes"),
    [
        ("ProbeConstant-v0", [0], [1], {}),
        ("ProbeSign-v0", [-1, 1], [-1, 1], {}),
        ("ProbeSign-v0", [-1, 1], [-0.5, 0.5], {"reward_scale": 0.5}),
        ("ProbeDelayed-v0", [0, 1], [0.5, 1], {"gamma": 0.5}),
        ("ProbeDelayed-v0", [0, 1], [0.5, 1], {"gamma": 0.5, "num_steps": 2}),  # half the rollouts end in state 1
        ("ProbeActionDependent-v0", [-1, 1], [1, 1], {"total_timesteps": 10_000}),
        ("ProbeTruncated-v0", [0], [2], {"gamma": 0.5}),
        ("ProbeTruncated-v0", [0], [1], {"gamma": 0.5, "bootstrap_truncated": False}),
        ("ProbeContinuous-v0", [-1, 1], [0, 0], {"total_timesteps": 30_000}),
    ],
)
def test_probe_environments_learn_their_value(tmp_path, env, observations, expected, changes):
    agent, _ = trained(tmp_path, env, **({"total_timesteps": 8_000} | changes))
    np.testing.assert_allclose(values_at(agent, *observations), expected, atol=0.1)


def test_probe_policies_act_best(tmp_path):
    _, summary = trained(tmp_path / "discrete", "ProbeActionDependent-v0", total_timesteps=10_000, eval_episodes=20)
    assert summary["eval_return_mean"] == 1.0
    _, summary = trained(tmp_path / "box", "ProbeContinuous-v0", total_timesteps=30_000, eval_episodes=20)
    assert summary["eval_return_mean"] > -0.02


def test_target_kl_ends_an_update_early(tmp_path, monkeypatch):
    calls, original = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *a: calls.append(1) or original(*a))
    ppo.train(settings(tmp_path, "ProbeSign-v0", total_timesteps=100, update_epochs=5, target_kl=None))
    everything, calls[:] = len(calls), []
    ppo.train(settings(tmp_path, "ProbeSign-v0", total_timesteps=100, update_epochs=5, target_kl=1e-9))
    assert (everything, len(calls)) == (10, 2)


def test_normalisation_statistics_are_saved_and_frozen_in_evaluation(tmp_path, capsys):
    args = settings(tmp_path, "Pendulum-v1", total_timesteps=600, norm_obs=True, norm_reward=True, eval_episodes=3)
    folder = ppo.train(args)
    saved = ppo.load_checkpoint(str(folder))["parts"]
    assert saved["agent"]["norm.count"] > 600 and saved["return_stats"]["var"] != 1
    assert saved["agent"]["norm.mean"].abs().max() > 0.01
    before = (folder / "model.pt").read_bytes()
    capsys.readouterr()
    args.eval = str(folder)
    ppo.train(args)
    score = json.loads((folder / "summary.json").read_text())["eval_return_mean"]
    assert f"return {score:.1f} " in capsys.readouterr().out
    assert (folder / "model.pt").read_bytes() == before


def test_the_unconstrained_objective_trains(tmp_path):
    _, summary = trained(tmp_path, "ProbeActionDependent-v0", total_timesteps=10_000, clip_coef=float("inf"))
    assert summary["eval_return_mean"] == 1.0


def test_an_entropy_bonus_holds_the_policy_back(tmp_path):
    changes = dict(num_steps=32, num_minibatches=2, total_timesteps=10_000)
    small_runs.check_entropy_bonus_holds_the_policy_back(ppo, tmp_path, **changes)


def test_cartpole_is_solved(tmp_path):
    args = ppo.parse_args(["--run-dir", str(tmp_path), "--seed", "7", "--eval-episodes", "20"])
    summary = json.loads((ppo.train(args) / "summary.json").read_text())
    assert summary["solved_step"] is not None and summary["solved_step"] < 200_000
    assert summary["eval_return_mean"] >= 475


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"env": "ProbeUnsupportedActions-v0"}, "Discrete and Box"),
        ({"gamma": 1.5}, "--gamma"),
        ({"num_envs": 0}, "--num-envs"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"num_envs": 1, "num_steps": 4, "num_minibatches": 4}, "minibatch"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, capsys, changes, says):
    with pytest.raises(SystemExit) as stop:
        ppo.train(settings(tmp_path / "runs", **({"env": "CartPole-v1"} | changes)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
