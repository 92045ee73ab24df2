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
    folder = dp.train(dp.parse_args(dp.Args, dp.PRESETS, ["--run-dir", str(tmp_path), *flags]))
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
def test_evaluate_policy_is_the_sum_of_discounted_rewards(seed):
    P, R = random_mdp(seed)
    policy = np.random.default_rng(seed + 100).dirichlet(np.ones(3), 4)
    here, total = np.eye(4), np.zeros(4)  # where one is after t steps from each state, and the sum so far
    for t in range(400):
        total += 0.9**t * np.array([sum(here[s, x] * policy[x] @ R[x] for x in range(4)) for s in range(4)])
        here = here @ np.array([sum(policy[x, a] * P[x, a] for a in range(3)) for x in range(4)])
    assert np.allclose(dp.evaluate_policy(P, R, 0.9, policy), total, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_fixed_point_is_the_best_of_all_policies(seed):
    P, R = random_mdp(seed)
    every = [dp.evaluate_policy(P, R, 0.9, np.eye(3)[list(choice)]) for choice in itertools.product(range(3), repeat=4)]
    values, policy = np.zeros(4), np.full((4, 3), 1 / 3)
    for _ in range(300):
        values = dp.action_values(P, R, 0.9, values).max(1)
    for _ in range(10):
        policy = dp.improve_policy(dp.action_values(P, R, 0.9, dp.evaluate_policy(P, R, 0.9, policy)), policy, 1e-12)
    assert np.allclose(values, np.max(every, axis=0), atol=1e-10)
    assert np.allclose(dp.evaluate_policy(P, R, 0.9, policy), values, atol=1e-10)


def test_improve_policy_keeps_an_action_that_only_rounding_beats():
    q = np.array([[1.0, 1.0 + 1e-15], [1.0, 2.0]])
    better = dp.improve_policy(q, np.eye(2)[[0, 0]], 1e-12)
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
    assert dp.expected_return(P, R, np.ones((2, 1)), 3).tolist() == [12, 21]


# The models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["GridWorld", "FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"])
def test_models_are_probabilities_and_both_methods_agree(env, tmp_path):
    mdp = dp.make_mdp(dp.Args(env=env))
    assert np.allclose(mdp.P.sum(2)[~mdp.terminal], 1) and (mdp.P[mdp.terminal] == 0).all()
    assert mdp.start.sum() == pytest.approx(1) and (mdp.goal <= mdp.terminal).all() and mdp.goal.any()
    summary, _, folder = solve(tmp_path, "--env", env, "--eval-episodes", "5")
    assert summary["difference"] < 1e-8
    assert summary["residual"] <= 1e-12 and summary["policy_stable"]
    assert (folder / "values.png").stat().st_size > 5_000 and (folder / "curves.png").exists()


def test_the_model_is_the_environment():
    """Frequencies of gymnasium's own steps match P, R and terminal."""
    args = dp.Args(env="FrozenLake-v1")
    mdp, env = dp.make_mdp(args), gym.make("FrozenLake-v1").unwrapped
    env.reset(seed=3)
    for s, a in ((14, 2), (14, 1), (4, 0), (10, 3)):
        counts, rewards, n = np.zeros(16), 0.0, 3_000
        for _ in range(n):
            env.s = s
            next_s, reward, terminated, _, _ = env.step(a)
            counts[next_s] += 1
            rewards += reward
            assert terminated == mdp.terminal[next_s]
        assert np.abs(counts / n - mdp.P[s, a]).max() < 0.05  # more than five standard errors
        assert abs(rewards / n - mdp.R[s, a]) < 0.05


def test_a_cliff_sends_back_and_does_not_end():
    mdp = dp.make_mdp(dp.Args(env="CliffWalking-v1"))
    assert mdp.P[36, 1, 36] == 1 and mdp.R[36, 1] == -100 and not mdp.terminal[36]
    assert np.flatnonzero(mdp.terminal).tolist() == [47]
    assert (~dp.visitable(mdp)).sum() == 10  # the cells of the cliff itself


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
    _, _, folder = solve(tmp_path, "--env", "FrozenLake-v1", "--total-timesteps", "100")
    args = dp.parse_args(dp.Args, dp.PRESETS, ["--resume", str(folder), "--total-timesteps", "100000"])
    dp.train(args)
    resumed = json.loads((folder / "summary.json").read_text())
    for key in (
        "start_value",
        "steps",
        "contraction",
        "value_iteration_sweeps",
        "policy_iteration_sweeps",
        "difference",
    ):
        assert resumed[key] == whole[key]
    with open(folder / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_random_maps_are_drawn_by_the_seed():
    one, same, other = (dp.make_mdp(dp.Args(env="FrozenLake-v1", map_size=6, seed=seed)) for seed in (1, 1, 2))
    assert one.shape == (6, 6) and (one.P == same.P).all() and not (one.P == other.P).all()


def test_text_shows_values_and_arrows():
    mdp = dp.grid_world(100)
    values = np.zeros(16)
    for _ in range(20):
        values = dp.action_values(mdp.P, mdp.R, 0.99, values).max(1)
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
    endless = dp.MDP(np.ones((1, 1, 1)), np.ones((1, 1)), *np.zeros((2, 1), bool), np.ones(1), 10)
    monkeypatch.setattr(dp, "make_mdp", lambda args: endless)
    with pytest.raises(SystemExit) as stop:
        solve(tmp_path, "--gamma", "1")
    assert stop.value.code == 2 and "--gamma below 1" in capsys.readouterr().err
