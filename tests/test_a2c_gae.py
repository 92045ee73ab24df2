"""A2C: GAE against its definition, an unbiased estimate and its noise, endings, learning."""

from functools import partial

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import small_runs
import torch
import two_state
from conftest import load_script

a2c = load_script("algos/a2c_gae.py")
CPU = torch.device("cpu")


settings = partial(small_runs.settings, a2c, num_steps=8)
trained = partial(small_runs.trained, a2c, num_steps=8)


def values_at(agent, *observations):
    with torch.no_grad():
        return agent.value(torch.tensor(observations, dtype=torch.float32).reshape(-1, 1)).numpy()


# The mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_gae_is_the_average_of_n_step_advantages(gae_lambda):
    """Eq. 16 of Schulman 2015: (1 - lambda) sum_n lambda^(n-1) A^(n), the last one taking the remaining weight."""
    rng = np.random.default_rng(0)
    rewards, values, (T, N) = rng.normal(size=(12, 5)), rng.normal(size=(13, 5)), (12, 5)
    terminated = rng.random((T, N)) < 0.15
    truncated = ~terminated & (rng.random((T, N)) < 0.15)
    assert terminated[:-1].any() and truncated[:-1].any()
    gamma, expected = 0.9, np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            collected, weight = 0.0, 1.0
            for k in range(t, T):
                collected += gamma ** (k - t) * rewards[k, n]
                future = 0.0 if terminated[k, n] else gamma ** (k - t + 1) * values[k + 1, n]
                last = k == T - 1 or terminated[k, n] or truncated[k, n]
                share = weight if last else weight * (1 - gae_lambda)
                expected[t, n] += share * (collected + future - values[t, n])
                weight *= gae_lambda
                if last:
                    break
    np.testing.assert_allclose(a2c.gae(rewards, values, terminated, truncated, gamma, gae_lambda), expected, atol=1e-12)


def test_policy_loss_by_hand():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = a2c.policy_loss(logprobs, torch.tensor([3.0, -1.0]))
    assert loss.item() == pytest.approx(-(-3 + 2) / 2)
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1.5, 0.5]
    for function in (a2c.policy_loss, a2c.value_loss):
        with pytest.raises(AssertionError):
            function(logprobs, torch.zeros(2, 1))


def estimates(agent, args, groups, size=4):
    """Gradient estimates [groups, P], each from as many whole episodes of the two-state MDP as size says."""
    played = two_state.play(a2c, agent, groups * size)
    _, advantages = a2c.judge(args, agent, played, CPU)
    gradients = []
    for group in np.split(np.arange(groups * size), groups):
        valid = played.valid[:, group]
        batch = (array[:, group][valid] for array in (played.obs[:-1], played.actions, advantages))
        obs, actions, b_advantages = map(torch.from_numpy, batch)
        loss = a2c.policy_loss(agent.logprob_entropy(obs, actions)[0], b_advantages) * valid.sum() / size
        gradients.append(-two_state.flat_gradient(agent, loss))
    return torch.stack(gradients)


def test_lambda_trades_bias_for_variance(tmp_path):
    """With any critic lambda 1 is unbiased; with the true values so is lambda 0, at a lower variance; with a
    wrong critic lambda 0 is biased."""
    agent = two_state.make_agent(a2c)
    values, gradient = two_state.exact(agent)
    one, zero = (settings(tmp_path, "CartPole-v1", gamma=1.0, gae_lambda=x) for x in (1.0, 0.0))
    assert two_state.disagreement(estimates(agent, one, 2_000), gradient) < 4.5
    assert two_state.disagreement(estimates(agent, zero, 2_000), gradient) > 6
    agent.value = lambda obs: obs @ values
    with_one, with_zero = (estimates(agent, args, 2_000) for args in (one, zero))
    assert two_state.disagreement(with_one, gradient) < 4.5
    assert two_state.disagreement(with_zero, gradient) < 4.5
    assert with_one.var(0).sum() > 1.3 * with_zero.var(0).sum()


def test_rewards_and_advantages_are_scaled_as_asked(tmp_path):
    agent = a2c.Agent(2, gym.spaces.Discrete(2), 8)
    agent.value = lambda obs: torch.zeros(len(obs))
    played = two_state.play(a2c, agent, 4)
    whole, half = (
        a2c.judge(settings(tmp_path, "CartPole-v1", reward_scale=x), agent, played, CPU)[1] for x in (1, 0.5)
    )
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)
    small_runs.check_normalized(a2c)


def test_the_noise_of_known_gradients():
    weight = torch.zeros(4, requires_grad=True)
    rows = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    variance, snr, cosine = a2c.gradient_noise([(weight * torch.tensor(row)).sum() for row in rows], [weight], 2.0)
    assert variance == pytest.approx(2.0 * 1.0)  # each of three coordinates has the variance 1/3
    assert snr == pytest.approx(0.0, abs=1e-6) and cosine == pytest.approx(0.0, abs=1e-6)  # orthogonal: no signal


def test_measuring_a_worse_critic_finds_more_noise():
    """At lambda 1 a critic far from the truth leaves the gradient alone and adds to its variance only."""
    torch.manual_seed(0)
    agent = a2c.Agent(4, gym.spaces.Discrete(2), 8)
    args = a2c.Args(gamma=1.0, gae_lambda=1.0, num_steps=500, variance_steps=256, variance_samples=32)

    def measured(value):
        agent.value = lambda obs: torch.full_like(obs[:, 0], value)
        return a2c.measure(args, agent, 22.0, np.random.default_rng(0), CPU)[0]

    assert measured(100.0) > 5 * measured(12.0)


def test_lambda_one_over_whole_episodes_is_reinforce_with_the_value_baseline():
    """Both scripts measure the same noise on the same episodes, each by its own path."""
    reinforce, found = load_script("algos/reinforce.py"), []
    for script, changes in ((a2c, dict(gae_lambda=1.0, num_steps=10**9)), (reinforce, dict(baseline="value"))):
        torch.manual_seed(0)
        agent = script.Agent(4, gym.spaces.Discrete(2), 8)
        args = script.Args(variance_steps=256, variance_samples=4, **changes)
        found.append(script.measure(args, agent, 22.0, np.random.default_rng(0), CPU))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_measured_episodes_are_cut_where_rollouts_end():
    """With rollouts of 2 steps and lambda 1 the critic is asked every second step, as in training."""
    agent = a2c.Agent(4, gym.spaces.Discrete(2), 8)
    seen, gae = [], a2c.gae
    args = a2c.Args(num_steps=2, variance_steps=64, variance_samples=2)
    try:
        a2c.gae = lambda r, v, terminated, truncated, *rest: (
            seen.append((terminated, truncated)) or gae(r, v, terminated, truncated, *rest)
        )
        a2c.measure(args, agent, 22.0, np.random.default_rng(0), CPU)
    finally:
        a2c.gae = gae
    terminated, truncated = seen[0]
    alternate = truncated[:8].astype(int)  # no CartPole falls within 8 steps
    assert ((alternate[:-1] + alternate[1:]) == 1).all() and 0 < alternate[0].sum() < alternate.shape[1]
    assert not terminated[:8].any()


# Endings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bootstrap", "truth"), [(True, 10.0), (False, 1.0)])
def test_a_time_limit_is_not_a_death(tmp_path, bootstrap, truth):
    agent, _ = trained(tmp_path, "ProbeTruncated-v0", gamma=0.9, bootstrap_truncated=bootstrap, critic_epochs=4,
                       total_timesteps=20_000)  # fmt: skip
    assert values_at(agent, 0)[0] == pytest.approx(truth, rel=0.05)


def test_rows_that_only_reset_are_not_learnt_from(tmp_path):
    envs = a2c.make_envs("ProbeMarked-v0", 3)
    agent = a2c.Agent(1, envs.single_action_space, 8)
    next_obs, _ = envs.reset(seed=0)
    played = a2c.play(agent, envs, next_obs, np.zeros(3, bool), 8, np.random.default_rng(0))
    assert played.obs[:, 0, 0].tolist() == [0, 1, 2, 99, 0, 1, 2, 99, 0]
    assert played.valid[:, 0].tolist() == [True, True, True, False] * 2
    agent, _ = trained(tmp_path, "ProbeMarked-v0", gamma=0.5, critic_epochs=4, total_timesteps=20_000)
    np.testing.assert_allclose(values_at(agent, 0, 1, 2), [1.75, 1.5, 1.0], atol=0.1)
    args = settings(tmp_path, "ProbeMarked-v0", num_steps=7, total_timesteps=2_000)  # resets fall on first rows too
    assert {row["charts/episodic_length"] for row in small_runs.metrics(a2c.train(args))} == {"3.0"}


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "observations", "truth"),
    [("Constant", [0], [1.0]), ("Sign", [-1, 1], [-1.0, 1.0]), ("Delayed", [0, 1], [0.9, 1.0])],
)
@pytest.mark.parametrize("shared_network", [False, True])
def test_the_critic_finds_the_value(tmp_path, env, observations, truth, shared_network):
    agent, _ = trained(tmp_path, f"Probe{env}-v0", gamma=0.9, shared_network=shared_network, total_timesteps=15_000)
    np.testing.assert_allclose(values_at(agent, *observations), truth, atol=0.07)


@pytest.mark.parametrize("env", ["ProbeActionDependent-v0", "ProbeContinuous-v0"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_the_policy_finds_the_best_action(tmp_path, env, optimizer):
    _, summary = trained(tmp_path, env, optimizer=optimizer, total_timesteps=20_000, eval_episodes=20)
    assert summary["eval_return_mean"] > {"ProbeActionDependent-v0": 0.99, "ProbeContinuous-v0": -0.05}[env]


def test_an_entropy_bonus_holds_the_policy_back(tmp_path):
    small_runs.check_entropy_bonus_holds_the_policy_back(a2c, tmp_path, num_steps=8, total_timesteps=10_000)


def test_cartpole_is_solved(tmp_path):
    summary = small_runs.preset_summary(a2c, tmp_path, "--seed", "5")
    assert summary["solved_step"] is not None and summary["eval_return_mean"] >= 475


def test_a_shared_network_is_one_trunk_with_two_heads():
    agent = a2c.Agent(3, gym.spaces.Discrete(2), 8, shared=True)
    assert [a is b for a, b in zip(agent.actor, agent.critic, strict=True)] == [True] * 4 + [False]
    separate = a2c.Agent(3, gym.spaces.Discrete(2), 8)
    assert not {id(p) for p in separate.actor.parameters()} & {id(p) for p in separate.critic.parameters()}


@pytest.mark.parametrize("shared_network", [False, True])
def test_only_the_critic_goes_on_learning_in_further_epochs(tmp_path, monkeypatch, shared_network):
    """Each gradient step but the first leaves the actor's own layers without a gradient."""
    agents, steps, adam_step, make = [], [], torch.optim.Adam.step, a2c.Agent
    monkeypatch.setattr(a2c, "Agent", lambda *args: agents.append(make(*args)) or agents[-1])

    def step(self, *args):
        steps.append((agents[0].actor[-1].weight.grad is not None, agents[0].critic[-1].weight.grad is not None))
        norm = torch.cat([p.grad.flatten() for p in agents[0].parameters() if p.grad is not None]).norm()
        assert norm < 0.1001
        return adam_step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    a2c.train(settings(tmp_path, "CartPole-v1", critic_epochs=3, total_timesteps=100, shared_network=shared_network,
                       max_grad_norm=0.1))  # fmt: skip
    assert steps == [(True, True), (False, True), (False, True)] * (len(steps) // 3) and len(steps) >= 6


def test_measuring_the_noise_leaves_the_training_as_it_was(tmp_path):
    args = settings(tmp_path, "CartPole-v1", total_timesteps=600, variance_steps=64, variance_samples=4)
    small_runs.check_measuring_leaves_the_training_as_it_was(a2c, args, every=3)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_steps=1), "--num-steps must be at least 2"),
        (dict(gae_lambda=1.5), "--gae-lambda must lie in [0, 1]"),
        (dict(learning_rate=0.0), "--learning-rate must be positive"),
        (dict(critic_epochs=0), "--critic-epochs must be positive"),
        (dict(variance_samples=1), "--variance-samples must be at least 2"),
        (dict(env="ProbeConstant-v0", variance_every=1), "has no time limit"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, capsys, changes, message):
    args = settings(tmp_path, **(dict(env="CartPole-v1") | changes))
    small_runs.check_one_line_of_error(a2c, args, message, capsys, tmp_path)
