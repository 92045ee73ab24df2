"""REINFORCE: returns and baselines by hand, an unbiased estimate, its noise, endings, learning."""

from functools import partial

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import small_runs
import torch
import two_state
from conftest import load_script

reinforce = load_script("algos/reinforce.py")

settings = partial(small_runs.settings, reinforce)
trained = partial(small_runs.trained, reinforce)


def rollout(rewards, truncated=None):
    """Two-dimensional observations around rewards [T, N]; NaN marks the rows after an episode's end."""
    rewards = np.array(rewards, np.float32)
    valid = ~np.isnan(rewards)
    obs = np.arange(2 * (len(rewards) + 1) * rewards.shape[1], dtype=np.float32).reshape(len(rewards) + 1, -1, 2) / 10
    truncated = np.zeros_like(valid) if truncated is None else np.array(truncated)
    return reinforce.Rollout(obs, np.zeros(valid.shape, int), np.nan_to_num(rewards), ~valid & False, truncated, valid)


# The mathematics ------------------------------------------------------------------------------


def test_returns_by_hand():
    rewards = np.array([[1.0, 5.0], [2.0, 0.0], [4.0, 0.0]])
    expected = [[1 + 0.5 * 2 + 0.25 * 4, 5], [2 + 0.5 * 4, 0], [4, 0]]
    np.testing.assert_allclose(reinforce.discounted_returns(rewards, 0.5, reward_to_go=True), expected)
    np.testing.assert_allclose(reinforce.discounted_returns(rewards, 0.5, reward_to_go=False), [[3, 5]] * 3)


def test_mean_of_others_by_hand():
    returns = np.array([[6.0, 3.0, 9.0], [4.0, 99.0, 2.0], [1.0, 99.0, 99.0]])
    valid = np.array([[True, True, True], [True, False, True], [True, False, False]])
    by_time = reinforce.mean_of_others(returns, valid, per_time_step=True)
    np.testing.assert_allclose(by_time[valid], [(3 + 9) / 2, (6 + 9) / 2, (6 + 3) / 2, 2, 4, 0])
    overall = reinforce.mean_of_others(returns, valid, per_time_step=False)
    expected = [(3 + 9 + 2) / 3, (6 + 4 + 1 + 9 + 2) / 5, (6 + 4 + 1 + 3) / 4]
    np.testing.assert_allclose(overall, [expected] * 3)


def test_each_baseline_is_what_its_name_says(tmp_path):
    played = rollout([[1, 2], [3, np.nan]])
    agent = reinforce.Agent(2, gym.spaces.Discrete(2), 8)
    values = agent.value(torch.from_numpy(played.obs)).detach().numpy()[:-1]
    expected = {"none": [[0, 0], [0, 0]], "mean": [[2, 3.5], [2, 3.5]], "time": [[2, 4], [0, 3]], "value": values}
    for name, baseline in expected.items():
        args = settings(tmp_path, "CartPole-v1", baseline=name, gamma=1.0)
        returns, found = reinforce.returns_and_baseline(args, agent, played)
        np.testing.assert_allclose(returns, [[4, 2], [3, 0]])
        np.testing.assert_allclose(found, baseline, atol=1e-6)


def test_rewards_and_advantages_are_scaled_as_asked(tmp_path):
    args = settings(tmp_path, "CartPole-v1", baseline="none", gamma=1.0, reward_scale=0.5)
    agent = reinforce.Agent(2, gym.spaces.Discrete(2), 8)
    returns, _ = reinforce.returns_and_baseline(args, agent, rollout([[1, 2], [3, np.nan]]))
    assert returns.tolist() == [[2, 1], [1.5, 0]]


@pytest.mark.parametrize("baseline", ["none", "mean", "time", "value"])
def test_only_the_value_baseline_bootstraps_a_truncated_episode(tmp_path, baseline):
    played = rollout([[1, 2], [3, np.nan]], truncated=[[False, False], [True, False]])
    agent = reinforce.Agent(2, gym.spaces.Discrete(2), 8)
    last = agent.value(torch.from_numpy(played.obs[2, :1])).item()
    for bootstrap in (True, False):
        args = settings(tmp_path, "CartPole-v1", baseline=baseline, gamma=0.5, bootstrap_truncated=bootstrap)
        future = last if baseline == "value" and bootstrap else 0.0
        returns, _ = reinforce.returns_and_baseline(args, agent, played)
        np.testing.assert_allclose(returns[:, 0], [1 + 0.5 * (3 + 0.5 * future), 3 + 0.5 * future], atol=1e-6)
        assert returns[0, 1] == 2


def test_policy_loss_sums_over_steps_and_averages_over_episodes():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = reinforce.policy_loss(logprobs, torch.tensor([2.0, 0.5, -1.0]), num_episodes=2)
    assert loss.item() == pytest.approx(-(-2 - 1 + 3) / 2)
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1.0, -0.25, 0.5]
    with pytest.raises(AssertionError):
        reinforce.policy_loss(logprobs, torch.zeros(3, 1), num_episodes=2)


def estimates(agent, args, groups, baseline_of=None, size=4):
    """Gradient estimates [groups, P], each from as many episodes of the two-state MDP as size says."""
    played = two_state.play(reinforce, agent, groups * size)
    gradients = []
    for group in np.split(np.arange(groups * size), groups):
        part = reinforce.Rollout(*(array[:, group] for array in played))
        returns, baseline = reinforce.returns_and_baseline(args, agent, part)
        if baseline_of is not None:
            baseline = baseline_of(part, returns)
        batch = (array[part.valid] for array in (part.obs[:-1], part.actions, returns - baseline))
        obs, actions, advantages = map(torch.from_numpy, batch)
        loss = reinforce.policy_loss(agent.logprobs_and_entropy(obs, actions)[0], advantages.float(), size)
        gradients.append(-two_state.flat_gradient(agent, loss))
    return torch.stack(gradients)


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("baseline", ["none", "mean", "time", "value"])
def test_the_estimate_is_unbiased(tmp_path, baseline, reward_to_go):
    agent = two_state.make_agent(reinforce)
    args = settings(tmp_path, "CartPole-v1", baseline=baseline, reward_to_go=reward_to_go, gamma=1.0)
    _, gradient = two_state.exact(agent)
    assert two_state.disagreement(estimates(agent, args, 2_000), gradient) < 4.5


WRONG = {
    "depends on the action": lambda part, returns: two_state.REWARD[part.obs[:-1].argmax(-1), part.actions],
    "contains the episode's own return": lambda part, returns: np.broadcast_to(returns[:1].mean(), returns.shape),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_baseline_is_caught(tmp_path, wrong):
    agent = two_state.make_agent(reinforce)
    args = settings(tmp_path, "CartPole-v1", gamma=1.0)
    _, gradient = two_state.exact(agent)
    assert two_state.disagreement(estimates(agent, args, 2_000, WRONG[wrong]), gradient) > 6


def test_baselines_and_reward_to_go_lower_the_variance(tmp_path):
    agent = two_state.make_agent(reinforce)
    values, _ = two_state.exact(agent)
    agent.value = lambda obs: obs @ values

    def variance(**changes):
        args = settings(tmp_path, "CartPole-v1", gamma=1.0, **changes)
        return estimates(agent, args, 500, size=16).var(0).sum().item()

    none, mean, time, value = (variance(baseline=name) for name in ("none", "mean", "time", "value"))
    assert none > 1.2 * mean and none > 1.2 * time and time > 1.1 * value and mean > 1.1 * value
    assert variance(baseline="none", reward_to_go=False) > 1.1 * none


# Playing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "ProbeMarked-v0"])
def test_one_episode_per_environment_from_its_reset_to_its_end(env):
    envs = reinforce.make_envs(env, 6)
    agent = reinforce.Agent(envs.single_observation_space.shape[0], envs.single_action_space, 16)
    rng = np.random.default_rng(0)
    for seed in (0, None):
        played = reinforce.play(agent, envs, seed, rng)
        ends = played.terminated | played.truncated
        assert played.valid[0].all() and (ends.sum(0) == 1).all()
        lengths = played.valid.sum(0)
        assert (ends.argmax(0) == lengths - 1).all()  # the end is the last valid row, without gaps before it
        assert (played.rewards[~played.valid] == 0).all()
        if env == "CartPole-v1":
            assert (played.rewards.sum(0) == lengths).all() and len(set(lengths)) > 2
            for n in range(6):  # obs[t + 1] is the true successor, also of the last row: the pole has fallen
                position, _, angle, _ = played.obs[lengths[n], n]
                assert abs(angle) > 0.2 or abs(position) > 2.4
        if env == "ProbeMarked-v0":
            assert played.obs[:, :, 0].T.tolist() == [[0, 1, 2, 99]] * 6


def test_episodes_of_both_kinds_of_environments_start_afresh_each_time():
    for env in ("CartPole-v1", "Acrobot-v1"):
        envs = reinforce.make_envs(env, 2)
        agent = reinforce.Agent(envs.single_observation_space.shape[0], envs.single_action_space, 16)
        rng = np.random.default_rng(0)
        starts = [reinforce.play(agent, envs, seed, rng).obs[0] for seed in (5, None, None)]
        assert len(np.unique(np.concatenate(starts), axis=0)) == 6


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "observation", "truth"),
    [("Constant", [0], 1.0), ("Sign", [-1], -1.0), ("Delayed", [0], 0.9), ("Truncated", [0], 10.0)],
)
def test_the_critic_finds_the_value(tmp_path, env, observation, truth):
    agent, _ = trained(tmp_path, f"Probe{env}-v0", baseline="value", gamma=0.9, critic_epochs=10,
                       learning_rate=2e-2, max_grad_norm=0.5, total_timesteps=6_000)  # fmt: skip
    assert agent.value(torch.tensor([observation]).float()).item() == pytest.approx(truth, abs=0.05 * abs(truth))


@pytest.mark.parametrize("env", ["ProbeActionDependent-v0", "ProbeContinuous-v0"])
@pytest.mark.parametrize("baseline", ["none", "mean", "time", "value"])
def test_every_baseline_finds_the_best_action(tmp_path, env, baseline):
    _, summary = trained(tmp_path, env, baseline=baseline, num_envs=16, total_timesteps=8_000, eval_episodes=20,
                         max_grad_norm=0.5)  # fmt: skip
    assert summary["eval_return_mean"] > {"ProbeActionDependent-v0": 0.99, "ProbeContinuous-v0": -0.05}[env]


def test_an_entropy_bonus_holds_the_policy_back(tmp_path):
    small_runs.check_entropy_bonus_holds_the_policy_back(reinforce, tmp_path)


def test_each_update_plays_on_and_steps_the_actor_once(tmp_path, monkeypatch):
    """Only the first reset is seeded; then one gradient step of the actor, and critic-epochs of the critic alone."""
    seeds, agents, steps, play, adam_step = [], [], [], reinforce.play, torch.optim.Adam.step

    def noting_play(agent, envs, seed, rng):
        seeds.append(seed)
        agents[:] = [agent]
        return play(agent, envs, seed, rng)

    def noting_step(self, *args):
        nets = (agents[0].actor, agents[0].critic)
        steps.append(tuple(net[-1].weight.grad is not None for net in nets))
        norm = torch.cat([p.grad.flatten() for p in agents[0].parameters() if p.grad is not None]).norm()
        assert norm < 0.1001
        return adam_step(self, *args)

    monkeypatch.setattr(reinforce, "play", noting_play)
    monkeypatch.setattr(torch.optim.Adam, "step", noting_step)
    args = settings(tmp_path, "CartPole-v1", baseline="value", critic_epochs=2, total_timesteps=600, max_grad_norm=0.1)
    reinforce.train(args)
    assert seeds[0] is not None and seeds[1:] == [None] * (len(seeds) - 1) and len(seeds) >= 2
    assert steps == [(True, False), (False, True), (False, True)] * len(seeds)


def test_cartpole_is_solved(tmp_path):
    summary = small_runs.preset_summary(reinforce, tmp_path, "--seed", "5")
    assert summary["solved_step"] is not None and summary["eval_return_mean"] >= 475


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_envs=1, baseline="time"), "--num-envs of at least 2"),
        (dict(num_envs=1, baseline="mean"), "--num-envs of at least 2"),
        (dict(gamma=1.5), "--gamma must be in [0, 1]"),
        (dict(ent_coef=-1.0), "--ent-coef must be >= 0"),
        (dict(critic_epochs=0), "--critic-epochs must be > 0"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, capsys, changes, message):
    small_runs.check_one_line_of_error(
        lambda: reinforce.train(settings(tmp_path, "CartPole-v1", **changes)), message, capsys, tmp_path
    )
