"""Dynamic programming against brute force, known numbers and simulation."""

import csv
import itertools
import json

import gymnasium as gym
import numpy as np
import pytest
from conftest import load_script

dp = load_script("algos/dynamic_programming.py")


def solve(tmp_path, *flags):
    """The summary and the rows of metrics.csv of one run."""
    folder = dp.train(dp.parse_args(["--run-dir", str(tmp_path), *flags]))
    with open(folder / "metrics.csv", newline="") as file:
        return json.loads((folder / "summary.json").read_text()), list(csv.DictReader(file)), folder


def random_mdp(seed, S=4, A=3):
    """Arrays P and R whose last state is terminal."""
    rng = np.random.default_rng(seed)
    P, R = rng.dirichlet(np.ones(S), (S, A)), rng.normal(size=(S, A))
    P[-1] = R[-1] = 0
    return P, R


# The mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_policy_evaluation_is_the_sum_of_discounted_rewards(seed):
    P, R = random_mdp(seed)
    policy = np.random.default_rng(seed + 100).dirichlet(np.ones(3), 4)
    here, total = np.eye(4), np.zeros(4)  # where one is after t steps from each state, and the sum so far
    for t in range(400):
        total += 0.9**t * np.array([sum(here[s, x] * policy[x] @ R[x] for x in range(4)) for s in range(4)])
        here = here @ np.array([sum(policy[x, a] * P[x, a] for a in range(3)) for x in range(4)])
    assert np.allclose(dp.policy_evaluation(P, R, 0.9, policy), total, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_fixed_point_is_the_best_of_all_policies(seed):
    P, R = random_mdp(seed)
    every = [
        dp.policy_evaluation(P, R, 0.9, np.eye(3)[list(choice)]) for choice in itertools.product(range(3), repeat=4)
    ]
    *_, (values, residual) = dp.value_iteration(P, R, 0.9)
    *_, (policy, policy_values) = dp.policy_iteration(P, R, 0.9)
    assert residual <= 1e-12 and (policy_values == dp.policy_evaluation(P, R, 0.9, policy)).all()
    assert np.allclose(values, np.max(every, axis=0), atol=1e-10)
    assert np.allclose(dp.policy_evaluation(P, R, 0.9, policy), values, atol=1e-10)


def test_policy_improvement_keeps_an_action_that_only_rounding_beats():
    q = np.array([[1.0, 1.0 + 1e-15], [1.0, 2.0]])
    better = dp.policy_improvement(q, np.eye(2)[[0, 0]], 1e-12)
    assert better.tolist() == [[1, 0], [0, 1]]


def test_greedy_takes_the_first_of_equals():
    assert dp.greedy(np.array([[1.0, 1.0 + 1e-13], [0.0, 0.1]])).tolist() == [0, 1]


@pytest.mark.parametrize("horizon", [1, 4])
def test_backward_induction_is_the_best_plan_and_earns_what_it_says(horizon):
    P, R = random_mdp(7)

    def best(s, left):  # the definition, by recursion
        return (
            0 if left == 0 else max(R[s, a] + sum(P[s, a, x] * best(x, left - 1) for x in range(4)) for a in range(3))
        )

    values, actions = dp.backward_induction(P, R, horizon)
    assert np.allclose(values, [best(s, horizon) for s in range(4)])
    earned, here, states = 0.0, np.eye(4)[0], np.arange(4)  # follow the plan forwards from state 0
    for now in actions:
        earned += here @ R[states, now]
        here = here @ P[states, now]
    assert earned == pytest.approx(values[0])


def test_expected_return_counts_exactly_the_horizon():
    P, R = np.zeros((2, 1, 2)), np.array([[1.0], [10.0]])
    P[0, 0, 1] = P[1, 0, 0] = 1  # back and forth: 1, 10, 1, ...
    assert dp.expected_return(P, R, np.zeros(2, int), 3).tolist() == [12, 21]


# The models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["GridWorld", "FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"])
def test_models_are_probabilities_and_both_methods_agree(env, tmp_path):
    mdp = dp.make_mdp(dp.Args(env=env))
    inside = mdp.visitable()
    assert (mdp.P.sum(2) + mdp.success <= 1 + 1e-12).all() and (mdp.P >= 0).all()
    assert mdp.start.sum() == pytest.approx(1) and mdp.goal.any() and not (mdp.goal & inside).any()
    assert (mdp.success[inside].sum() > 0) and (mdp.P.sum(2)[inside] + mdp.success[inside] > 0).any(1).all()
    summary, _, folder = solve(tmp_path, "--env", env, "--eval-episodes", "5")
    assert summary["difference"] < 1e-8
    assert summary["residual"] <= 1e-12 and summary["policy_stable"]
    assert (folder / "values.png").stat().st_size > 5_000 and (folder / "curves.png").exists()


def test_the_model_is_the_environment():
    """Frequencies of gymnasium's own steps match P, R and success."""
    args = dp.Args(env="FrozenLake-v1")
    mdp, env = dp.make_mdp(args), gym.make("FrozenLake-v1").unwrapped
    env.reset(seed=3)
    for s, a in ((14, 2), (14, 1), (4, 0), (10, 3)):
        counts, rewards, wins, n = np.zeros(16), 0.0, 0, 3_000
        for _ in range(n):
            env.s = s
            next_s, reward, terminated, _, _ = env.step(a)
            counts[next_s] += not terminated
            wins += terminated and reward == 1
            rewards += reward
        assert np.abs(counts / n - mdp.P[s, a]).max() < 0.05  # more than five standard errors
        assert abs(rewards / n - mdp.R[s, a]) < 0.05 and abs(wins / n - mdp.success[s, a]) < 0.05


def test_a_cliff_sends_back_and_does_not_end():
    mdp = dp.make_mdp(dp.Args(env="CliffWalking-v1"))
    assert mdp.P[36, 1, 36] == 1 and mdp.R[36, 1] == -100
    assert np.flatnonzero(mdp.goal).tolist() == [47] and mdp.P[35, 2].sum() == 0 and mdp.success[35, 2] == 1
    assert np.flatnonzero(~mdp.visitable()).tolist() == list(range(37, 48))  # the cliff itself and the goal


# What it must show --------------------------------------------------------------------------------


def test_grid_world_by_hand(tmp_path):
    summary, _, _ = solve(tmp_path)
    assert summary["start_value"] == pytest.approx(0.99**5 - 0.01 * sum(0.99**t for t in range(5)), abs=1e-12)
    assert summary["expected_return"] == summary["best_expected_return"] == pytest.approx(0.95)
    assert summary["success_probability"] == 1
    assert summary["eval_return_mean"] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("flags", "start_value", "greedy", "best"),
    [
        (["--env", "FrozenLake-v1"], 0.5420, 0.7402, 0.7442),
        (["--env", "FrozenLake8x8-v1"], 0.4146, 0.8630, 0.9132),
        (["--env", "FrozenLake8x8-v1", "--gamma", "0.995"], 0.6051, 0.8936, 0.9132),
        (["--env", "FrozenLake8x8-v1", "--max-episode-steps", "100"], 0.4146, 0.6317, 0.6407),
        (["--env", "FrozenLake-v1", "--no-is-slippery"], 0.99**5, 1, 1),
    ],
)
def test_frozen_lake(flags, start_value, greedy, best, tmp_path):
    summary, rows, _ = solve(tmp_path, *flags, "--eval-episodes", "2000")
    assert summary["start_value"] == pytest.approx(start_value, abs=5e-5)
    assert summary["success_probability"] == pytest.approx(greedy, abs=5e-5)
    assert summary["best_success_probability"] == pytest.approx(best, abs=5e-5)
    assert summary["expected_return"] == pytest.approx(greedy, abs=5e-5)
    # the simulation in gymnasium, within four standard errors
    error = (greedy * (1 - greedy) / 2000) ** 0.5
    assert abs(summary["eval_return_mean"] - greedy) <= 4 * error + 1e-12
    # no sweep of value iteration shrinks the residual by less than gamma
    gamma = 0.995 if "0.995" in flags else 0.99
    factors = [float(row["charts/contraction"]) for row in rows if row["charts/contraction"]]
    assert 0 < max(factors) <= gamma + 1e-6 and max(factors) == pytest.approx(summary["contraction"])


def test_cliff_and_taxi(tmp_path):
    summary, _, _ = solve(tmp_path, "--env", "CliffWalking-v1")
    assert summary["start_value"] == summary["expected_return"] == summary["eval_return_mean"] == -13
    summary, _, _ = solve(tmp_path, "--env", "Taxi-v4", "--eval-episodes", "300")
    assert summary["success_probability"] == pytest.approx(1)
    assert summary["expected_return"] == pytest.approx(summary["best_expected_return"])
    assert abs(summary["eval_return_mean"] - summary["expected_return"]) < 4 * 2.7 / 300**0.5


def test_metrics_have_a_row_per_sweep_and_say_when_it_has_not_converged(tmp_path, capsys):
    summary, rows, _ = solve(tmp_path, "--env", "FrozenLake-v1", "--total-timesteps", "20")
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert "not converged" in capsys.readouterr().out
    assert summary["residual"] > 1e-12


def test_resume_ends_where_an_uninterrupted_run_does(tmp_path):
    whole, rows, _ = solve(tmp_path, "--env", "FrozenLake-v1")
    _, first, folder = solve(tmp_path, "--env", "FrozenLake-v1", "--total-timesteps", "100")
    dp.train(dp.parse_args(["--resume", str(folder), "--total-timesteps", "100000"]))
    resumed = json.loads((folder / "summary.json").read_text())
    timed = {"train_seconds", "sps"}
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    with open(folder / "metrics.csv", newline="") as file:
        again = list(csv.DictReader(file))
    assert again[:100] == first and [row["step"] for row in again] == [row["step"] for row in rows]


# A world in which one action ends the episode where it is: wait for a better price, or sell.
PRICES = (1.0, 2.0, 5.0)
MARKET = {s: [[(1.0, min(s + 1, 2), 0.0, False)], [(1.0, s, PRICES[s], True)]] for s in range(3)}


class Market(gym.Env):
    """Without a time limit. Actions: wait, sell."""

    observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Discrete(2)
    P, initial_state_distrib = MARKET, np.eye(3)[0]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        return self.s, {}

    def step(self, action):
        _, self.s, reward, terminated = self.P[self.s][action][0]
        return self.s, reward, terminated, False, {}


gym.register("Market-v0", Market)


def test_an_ending_belongs_to_the_transition_and_not_to_the_state(tmp_path):
    """Waiting twice and selling is worth 0.9 * 0.9 * 5, although selling ends in a state one can act in."""
    summary, _, _ = solve(tmp_path, "--env", "Market-v0", "--gamma", "0.9", "--eval-episodes", "2")
    assert summary["start_value"] == pytest.approx(4.05, abs=1e-12) and summary["difference"] < 1e-12
    assert summary["expected_return"] == summary["eval_return_mean"] == 5 and summary["success_probability"] == 1


def test_an_environment_of_another_module(tmp_path, monkeypatch):
    (tmp_path / "my_market.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv\n"
        "gym.register('MyCliff-v0', CliffWalkingEnv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    summary, _, folder = solve(tmp_path / "runs", "--env", "my_market:MyCliff-v0", "--gamma", "1")
    assert summary["start_value"] == -13 and ":" not in folder.name


def test_evaluation_has_a_limit_of_its_own_and_says_when_it_bit(tmp_path, capsys):
    flags = ("--env", "Market-v0", "--gamma", "0", "--total-timesteps", "1", "--eval-episodes", "3")
    args = dp.Args(env="Market-v0", eval_episodes=3)
    returns = dp.evaluate(args, dp.make_mdp(args), np.zeros(3, int), tmp_path)  # wait for ever
    assert returns.tolist() == [0, 0, 0]
    assert "3 of 3 evaluation episodes were cut after 1000 steps" in capsys.readouterr().out
    solve(tmp_path, *flags)
    assert "were cut" not in capsys.readouterr().out


def test_the_largest_seed(tmp_path):
    summary, _, _ = solve(tmp_path, "--env", "FrozenLake-v1", "--map-size", "4", "--seed", str(2**31 - 1),
                          "--total-timesteps", "3", "--eval-episodes", "2")  # fmt: skip
    assert summary["seed"] == 2**31 - 1


def test_random_maps_are_drawn_by_the_seed():
    one, same, other = (dp.make_mdp(dp.Args(env="FrozenLake-v1", map_size=6, seed=seed)) for seed in (1, 1, 2))
    assert one.shape == (6, 6) and (one.P == same.P).all() and not (one.P == other.P).all()


def test_text_shows_values_and_arrows():
    mdp = dp.grid_world(100)
    *_, (values, _) = dp.value_iteration(mdp.P, mdp.R, 0.99)
    lines = dp.describe(mdp, dp.action_values(mdp.P, mdp.R, 0.99, values)).splitlines()
    assert len(lines) == 4 and lines[0].startswith("  0.9020 ↓")
    assert lines[3].split() == ["0.9602", "→", "0.9800", "→", "1.0000", "→", "goal"]


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--env", "CartPole-v1"], "transition table"),
        (["--env", "Blackjack-v1"], "transition table"),
        (["--env", "Nonsense-v0"], "cannot make"),
        (["--gamma", "1.1"], "--gamma"),
        (["--gamma", "nan"], "--gamma"),
        (["--tolerance", "0"], "--tolerance"),
        (["--total-timesteps", "0"], "--total-timesteps"),
        (["--eval-episodes", "0"], "--eval-episodes"),
        (["--seed", "-1"], "--seed"),
        (["--map-size", "5"], "--map-size"),
        (["--env", "FrozenLake-v1", "--map-size", "1"], "--map-size"),
        (["--env", "FrozenLake-v1", "--map-size", "130"], "too many"),
        (["--env", "FrozenLake-v1", "--max-episode-steps", "-5"], "--max-episode-steps"),
        (["--capture-video"], "no pictures"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        solve(tmp_path, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and says in captured.err
    assert not list(tmp_path.iterdir())


def test_undiscounted_policies_that_never_end_are_explained(tmp_path, capsys, monkeypatch):
    endless = dp.MDP(np.ones((1, 1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.zeros(1, bool), np.ones(1), 10)
    monkeypatch.setattr(dp, "make_mdp", lambda args: endless)
    with pytest.raises(SystemExit) as stop:
        solve(tmp_path, "--gamma", "1")
    assert stop.value.code == 2 and "--gamma below 1" in capsys.readouterr().err
