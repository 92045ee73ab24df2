"""A2C: GAE against its definition, an unbiased estimate and its noise, endings, learning."""

from functools import partial

import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import small_runs
import torch
import two_state
from conftest import load_script

a2c = load_script("algos/a2c_gae.py")

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
    with pytest.raises(AssertionError):
        a2c.policy_loss(logprobs, torch.zeros(2, 1))


def estimates(agent, gae_lambda, groups, size=4):
    """Gradient estimates [groups, P], each from as many whole episodes of the two-state MDP as size says."""
    played = two_state.play(a2c, agent, groups * size)
    values = agent.value(torch.from_numpy(played.obs)).detach().numpy()
    advantages = a2c.gae(played.rewards, values, played.terminated, played.truncated, 1.0, gae_lambda)
    gradients = []
    for group in np.split(np.arange(groups * size), groups):
        valid = played.valid[:, group]
        batch = (array[:, group][valid] for array in (played.obs[:-1], played.actions, advantages))
        obs, actions, b_advantages = map(torch.from_numpy, batch)
        loss = a2c.policy_loss(agent.logprobs_and_entropy(obs, actions)[0], b_advantages) * valid.sum() / size
        gradients.append(-two_state.flat_gradient(agent, loss))
    return torch.stack(gradients)


def test_lambda_trades_bias_for_variance():
    """With any critic lambda 1 is unbiased; with the true values so is lambda 0, at a lower variance; with a
    wrong critic lambda 0 is biased."""
    agent = two_state.make_agent(a2c)
    values, gradient = two_state.exact(agent)
    assert two_state.disagreement(estimates(agent, 1.0, 2_000), gradient) < 4.5
    assert two_state.disagreement(estimates(agent, 0.0, 2_000), gradient) > 6
    agent.value = lambda obs: obs @ values
    with_one, with_zero = (estimates(agent, gae_lambda, 2_000) for gae_lambda in (1.0, 0.0))
    assert two_state.disagreement(with_one, gradient) < 4.5
    assert two_state.disagreement(with_zero, gradient) < 4.5
    assert with_one.var(0).sum() > 1.3 * with_zero.var(0).sum()


@pytest.mark.parametrize("norm_adv", [False, True])
def test_rewards_and_advantages_are_scaled_as_asked(tmp_path, monkeypatch, norm_adv):
    """The same first rollout under two scales: its advantages differ by the scale, or not at all."""
    seen, original = [], a2c.policy_loss
    monkeypatch.setattr(a2c, "policy_loss", lambda logprobs, adv: seen.append(adv) or original(logprobs, adv))
    monkeypatch.setattr(a2c.Agent, "value", lambda self, obs: 0 * self.critic(obs).squeeze(-1))
    for reward_scale in (1.0, 0.5):
        a2c.train(settings(tmp_path, "CartPole-v1", reward_scale=reward_scale, norm_adv=norm_adv, total_timesteps=60))
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0] if norm_adv else seen[0] / 2)
    if norm_adv:
        assert seen[0].mean().item() == pytest.approx(0, abs=1e-6)
        assert seen[0].std().item() == pytest.approx(1, abs=1e-3)


# Endings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bootstrap", "truth"), [(True, 10.0), (False, 1.0)])
def test_a_time_limit_is_not_a_death(tmp_path, bootstrap, truth):
    agent, _ = trained(tmp_path, "ProbeTruncated-v0", gamma=0.9, bootstrap_truncated=bootstrap, critic_epochs=4,
                       total_timesteps=20_000)  # fmt: skip
    assert values_at(agent, 0)[0] == pytest.approx(truth, rel=0.05)


def test_rows_that_only_reset_are_not_learnt_from(tmp_path, monkeypatch):
    seen, original = [], a2c.Agent.logprobs_and_entropy

    def spy(self, obs, actions):
        seen.append(obs.unique())
        return original(self, obs, actions)

    monkeypatch.setattr(a2c.Agent, "logprobs_and_entropy", spy)
    agent, _ = trained(tmp_path, "ProbeMarked-v0", gamma=0.5, critic_epochs=4, total_timesteps=20_000)
    assert torch.cat(seen).unique().tolist() == [0, 1, 2]  # 99, the last observation, only precedes a reset
    np.testing.assert_allclose(values_at(agent, 0, 1, 2), [1.75, 1.5, 1.0], atol=0.1)
    args = settings(tmp_path, "ProbeMarked-v0", num_steps=7, total_timesteps=2_000)  # resets fall on first rows too
    assert {row["charts/episodic_length"] for row in small_runs.metrics(a2c.train(args))} == {"3.0"}


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "observations", "truth"),
    [("Constant", [0], [1.0]), ("Sign", [-1, 1], [-1.0, 1.0]), ("Delayed", [0, 1], [0.9, 1.0])],
)
def test_the_critic_finds_the_value(tmp_path, env, observations, truth):
    agent, _ = trained(tmp_path, f"Probe{env}-v0", gamma=0.9, total_timesteps=15_000)
    np.testing.assert_allclose(values_at(agent, *observations), truth, atol=0.07)


@pytest.mark.parametrize("env", ["ProbeActionDependent-v0", "ProbeContinuous-v0"])
def test_the_policy_finds_the_best_action(tmp_path, env):
    _, summary = trained(tmp_path, env, total_timesteps=20_000, eval_episodes=20)
    assert summary["eval_return_mean"] > {"ProbeActionDependent-v0": 0.99, "ProbeContinuous-v0": -0.05}[env]


def test_an_entropy_bonus_holds_the_policy_back(tmp_path):
    small_runs.check_entropy_bonus_holds_the_policy_back(a2c, tmp_path, num_steps=8, total_timesteps=10_000)


def test_cartpole_is_solved(tmp_path):
    summary = small_runs.preset_summary(a2c, tmp_path, "--seed", "5")
    assert summary["solved_step"] is not None and summary["eval_return_mean"] >= 475


def test_only_the_critic_goes_on_learning_in_further_epochs(tmp_path, monkeypatch):
    """Each gradient step but the first leaves the actor without a gradient."""
    agents, steps, adam_step, make = [], [], torch.optim.Adam.step, a2c.Agent
    monkeypatch.setattr(a2c, "Agent", lambda *args: agents.append(make(*args)) or agents[-1])

    def step(self, *args):
        steps.append((agents[0].actor[-1].weight.grad is not None, agents[0].critic[-1].weight.grad is not None))
        norm = torch.cat([p.grad.flatten() for p in agents[0].parameters() if p.grad is not None]).norm()
        assert norm < 0.1001
        return adam_step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    a2c.train(settings(tmp_path, "CartPole-v1", critic_epochs=3, total_timesteps=100, max_grad_norm=0.1))
    assert steps == [(True, True), (False, True), (False, True)] * (len(steps) // 3) and len(steps) >= 6


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_envs=1, num_steps=1), "a rollout needs two transitions"),
        (dict(gae_lambda=1.5), "--gae-lambda must be in [0, 1]"),
        (dict(learning_rate=0.0), "--learning-rate must be > 0"),
        (dict(critic_epochs=0), "--critic-epochs must be > 0"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, capsys, changes, message):
    small_runs.check_one_line_of_error(
        lambda: a2c.train(settings(tmp_path, "CartPole-v1", **changes)), message, capsys, tmp_path
    )
