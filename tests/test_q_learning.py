"""Tabular TD learning: targets by hand, worlds with known values, schedules, seeds, bad input."""

import csv
import json
import re

import gymnasium as gym
import numpy as np
import pytest
from conftest import load_script

ql = load_script("algos/q_learning.py")
dp = load_script("algos/dynamic_programming.py")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than learning here; tests about pictures ask for the mark."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(ql, "draw_tables", lambda *args: None)


@pytest.fixture
def pictures():
    """Draw after all."""


@pytest.fixture
def learn(tmp_path):
    """Trains with these flags; returns the tables [1 or 2, S, A], the summary and the folder."""

    def run(*flags):
        args = ql.parse_args(["--run-dir", str(tmp_path), "--eval-episodes", "20", *flags])
        folder = ql.train(args)
        tables = ql.load_checkpoint(str(folder))["parts"]["table"]["q"].numpy()
        return tables, json.loads((folder / "summary.json").read_text()), folder

    return run


# Small worlds -------------------------------------------------------------------------------------


class World(gym.Env):
    """An environment made of a list P[s][a] = [(probability, next state, reward, terminated)]."""

    def __init__(self, P, first=0):
        self.P, self.first, self.seeds = P, first, []
        self.initial_state_distrib = np.eye(len(P))[first]
        self.observation_space = gym.spaces.Discrete(len(P))
        self.action_space = gym.spaces.Discrete(len(P[0]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.s = self.first
        return self.s, {}

    def step(self, action):
        chance = self.np_random.random()
        for probability, s, reward, terminated in self.P[self.s][action]:
            chance -= probability
            if chance < 0:
                self.s = s
                return s, reward, terminated, False, {}


class Bias(World):
    """Example 6.7 of Sutton & Barto: from A left to B, where ten actions pay -0.1 on average but
    with much noise, or right to the end for 0. Going left is a mistake that noise makes attractive."""

    made: list = []

    def __init__(self):
        super().__init__([[None] * 10] * 3)
        del self.P
        self.lefts = 0
        Bias.made.append(self)

    def step(self, action):
        if self.s == 0:
            self.lefts += action == 0
            self.s = 1 if action == 0 else 2
            return self.s, 0.0, self.s == 2, False, {}
        self.s = 2
        return self.s, self.np_random.normal(-0.1, 1.0), True, False, {}


def random_world(seed=3, S=5, A=2):
    rng = np.random.default_rng(seed)

    def outcomes():
        return [(p, s, rng.normal(), s == S - 1) for s, p in enumerate(rng.dirichlet(np.ones(S)))]

    return World([[outcomes() for _ in range(A)] for _ in range(S)])


def random_mdp():
    world = random_world()
    return dp.mdp_from_table(world.P, world.initial_state_distrib, 2, 30)


# One action ends the episode where it is: wait for a better price (1, 2, 5), or sell. There is no time limit.
MARKET = [[[(1.0, min(s + 1, 2), 0.0, False)], [(1.0, s, price, True)]] for s, price in enumerate((1.0, 2.0, 5.0))]

gym.register("Market-v0", lambda: World(MARKET))
gym.register("Endless-v0", lambda: World([[[(1.0, 0, 1.0, False)]]]), max_episode_steps=5)
gym.register("OneStep-v0", lambda: World([[[(1.0, 1, 1.0, True)]], [[(1.0, 1, 0.0, True)]]]), max_episode_steps=5)
gym.register("Pair-v0", lambda: World([[[(1.0, 1, 1.0, False)]], [[(1.0, 0, 0.0, False)]]]), max_episode_steps=50)
gym.register("Random-v0", random_world, max_episode_steps=30)
gym.register("Bias-v0", Bias, max_episode_steps=30)


# The mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "target"),
    [
        ("q-learning", 1 + 0.5 * 4),
        ("sarsa", 1 + 0.5 * 2),
        ("expected-sarsa", 1 + 0.5 * (0.7 * 4 + 0.3 * (2 + 4 + 0) / 3)),
        ("double-q-learning", 1 + 0.5 * -6),
        ("td0", 1 + 0.5 * 2),
    ],
)
def test_targets_by_hand(algorithm, target):
    known = dict(gamma=0.5, next_q=[2.0, 4.0, 0.0], next_action=0, epsilon=0.3, judge=[7.0, -6.0, 9.0])
    assert ql.td_target(algorithm, 1.0, False, **known) == pytest.approx(target)
    assert ql.td_target(algorithm, 1.0, True, **known) == 1.0  # nothing follows


def test_epsilon_greedy_explores_breaks_ties_by_chance_and_else_is_greedy():
    rng = ql.random.Random(0)
    assert {ql.epsilon_greedy([1.0, 3.0, 2.0], 0.0, rng) for _ in range(50)} == {1}
    ties = np.bincount([ql.epsilon_greedy([5.0, 1.0, 5.0], 0.0, rng) for _ in range(2_000)], minlength=3)
    assert ties[1] == 0 and abs(ties[0] - 1_000) < 120
    shares = np.bincount([ql.epsilon_greedy([1.0, 3.0, 2.0], 0.3, rng) for _ in range(6_000)], minlength=3) / 6_000
    assert np.abs(shares - [0.1, 0.8, 0.1]).max() < 0.025


def test_step_sizes():
    assert [ql.step_size(0.5, 0.0, n) for n in (1, 7)] == [0.5, 0.5]
    assert ql.step_size(1.0, 1.0, 4) == 0.25 and ql.step_size(0.5, 0.5, 16) == 0.125


def test_exploration_schedules():
    linear = [ql.exploration(done, 1.0, 0.2, 0.5, "linear") for done in (0, 0.25, 0.5, 1)]
    assert linear == pytest.approx([1.0, 0.6, 0.2, 0.2])
    exponential = [ql.exploration(done, 1.0, 0.01, 0.5, "exponential") for done in (0, 0.25, 0.5, 1)]
    assert exponential == pytest.approx([1.0, 0.1, 0.01, 0.01])
    assert ql.exploration(0.0, 1.0, 0.2, 0.0, "linear") == 0.2


def test_exact_q_of_a_policy_and_of_the_best_are_those_of_dynamic_programming():
    world, policy = random_world(), np.random.default_rng(5).dirichlet(np.ones(2), 5)
    rules, mdp = ql.read_rules(world), dp.mdp_from_table(world.P, world.initial_state_distrib, 2, 30)
    *_, (best, _) = dp.value_iteration(mdp.P, mdp.R, 0.9)
    assert np.allclose(ql.exact_q(rules, 0.9, 10_000), dp.action_values(mdp.P, mdp.R, 0.9, best), atol=1e-9)
    values = dp.policy_evaluation(mdp.P, mdp.R, 0.9, policy)
    assert np.allclose((policy * ql.exact_q(rules, 0.9, 10_000, policy)).sum(1), values, atol=1e-9)
    assert np.allclose(ql.exact_q(rules, 1.0, 7).max(1), dp.backward_induction(mdp.P, mdp.R, 7)[0])
    actions = policy.argmax(1)
    within = ql.exact_q(rules, 1.0, 7, np.eye(2)[actions])[np.arange(5), actions]
    assert np.allclose(within, dp.expected_return(mdp.P, mdp.R, actions, 7))
    assert (rules.visitable() == mdp.visitable()).all()


def test_report_steps_are_increasing_and_end_with_the_run():
    for total in (1, 7, 2_000, 400_000):
        steps = ql.report_steps(total)
        assert steps == sorted(set(steps)) and steps[0] >= 1 and steps[-1] == total
    assert len(steps) >= 38 and set(range(20_000, 400_001, 20_000)) <= set(steps)


def test_observations_become_rows():
    space = gym.make("Blackjack-v1").observation_space
    size, row = ql.table_rows(space)
    rows = [row((a, b, c)) for a in range(32) for b in range(11) for c in range(2)]
    assert size == 704 and sorted(rows) == list(range(704))
    size, row = ql.table_rows(gym.spaces.Discrete(3, start=5))
    assert size == 3 and [row(np.int64(obs)) for obs in (5, 6, 7)] == [0, 1, 2]


# The endings --------------------------------------------------------------------------------------

EVERY = ["q-learning", "sarsa", "expected-sarsa", "double-q-learning", "td0"]


@pytest.mark.parametrize("algorithm", EVERY)
def test_truncated_episodes_bootstrap_and_terminated_ones_do_not(algorithm, learn):
    flags = ["--algorithm", algorithm, "--total-timesteps", "3000", "--gamma", "0.9", "--lr-power", "0",
             "--learning-rate", "0.2"]  # fmt: skip
    tables, summary, _ = learn("--env", "Endless-v0", *flags)
    assert tables == pytest.approx(10.0, abs=1e-3)  # 1 / (1 - 0.9), although every episode is cut after 5 steps
    assert summary["eval_return_mean"] == 5.0
    tables, _, _ = learn("--env", "OneStep-v0", *flags)
    assert tables[:, 0] == pytest.approx(1.0, abs=1e-6)


def test_a_time_limit_of_one_step_is_no_death(learn):
    tables, summary, _ = learn("--env", "Pair-v0", "--gamma", "0.5", "--total-timesteps", "200",
                               "--max-episode-steps", "1", "--initial-value", "8")  # fmt: skip
    assert tables[0, 0, 0] == 1 + 0.5 * 8 and tables[0, 1, 0] == 8  # state 1 is seen but never left
    assert summary["eval_return_mean"] == 1.0


def test_double_q_learning_tosses_a_coin_and_moves_one_entry_of_one_table(learn):
    moved = set()
    for seed in "123456":
        tables, _, folder = learn("--env", "Pair-v0", "--algorithm", "double-q-learning", "--total-timesteps", "1",
                                  "--learning-rate", "0.5", "--initial-value", "4", "--gamma", "0.5",
                                  "--seed", seed)  # fmt: skip
        assert sorted(tables[:, 0, 0]) == [3.5, 4.0] and (tables[:, 1] == 4).all()  # 4 + 0.5 * (1 + 0.5 * 4 - 4)
        assert ql.load_checkpoint(str(folder))["parts"]["table"]["visits"].tolist() == [[1], [0]]
        moved.add(int(tables[:, 0, 0].argmin()))
    assert moved == {0, 1}


# Worlds with known values -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["q-learning", "double-q-learning"])
def test_converges_to_the_q_star_of_dynamic_programming(algorithm, learn):
    mdp = random_mdp()
    *_, (values, _) = dp.value_iteration(mdp.P, mdp.R, 0.9)
    q_star = dp.action_values(mdp.P, mdp.R, 0.9, values)
    tables, summary, folder = learn("--env", "Random-v0", "--algorithm", algorithm, "--gamma", "0.9", "--end-e", "1",
                                    "--total-timesteps", "80000", "--lr-power", "0.65")  # fmt: skip
    error = np.abs(tables.mean(0) - q_star)[:4].max()
    assert error < 0.12 and summary["q_error"] == pytest.approx(error, abs=1e-9)
    with open(folder / "metrics.csv", newline="") as file:
        errors = [float(row["charts/q_error"]) for row in csv.DictReader(file)]
    assert errors[-1] == pytest.approx(error) and errors[0] > 5 * errors[-1]


@pytest.mark.parametrize("algorithm", ["sarsa", "expected-sarsa"])
def test_on_policy_methods_learn_the_value_of_exploring(algorithm, learn):
    mdp, epsilon = random_mdp(), 0.4
    policy = np.full((5, 2), 0.5)
    for _ in range(50):  # the best policy among those that explore this much
        q = dp.action_values(mdp.P, mdp.R, 0.9, dp.policy_evaluation(mdp.P, mdp.R, 0.9, policy))
        policy = epsilon / 2 + (1 - epsilon) * np.eye(2)[q.argmax(1)]
    q_star = ql.exact_q(ql.read_rules(random_world()), 0.9, 10_000)
    tables, _, _ = learn("--env", "Random-v0", "--algorithm", algorithm, "--gamma", "0.9", "--start-e", "0.4",
                         "--end-e", "0.4", "--total-timesteps", "120000", "--lr-power", "0.8")  # fmt: skip
    assert np.abs(tables[0] - q)[:4].max() < 0.08 < 0.2 < np.abs(tables[0] - q_star)[:4].max()


def test_td0_judges_the_given_policy(learn):
    mdp = random_mdp()
    flags = ["--env", "Random-v0", "--algorithm", "td0", "--gamma", "0.9", "--lr-power", "0.8",
             "--total-timesteps", "40000"]  # fmt: skip
    tables, summary, _ = learn(*flags)
    truth = dp.policy_evaluation(mdp.P, mdp.R, 0.9, np.full((5, 2), 0.5))
    assert tables.shape == (1, 5, 1) and np.abs(tables[0, :4, 0] - truth[:4]).max() < 0.08
    assert summary["true_start_value"] == pytest.approx(truth[0])

    best = ql.exact_q(ql.read_rules(random_world()), 0.9, 10_000)
    tables, _, _ = learn(*flags, "--policy", "optimal")
    assert np.abs(tables[0, :4, 0] - best.max(1)[:4])[0] < 0.1

    _, learned, folder = learn("--env", "Random-v0", "--gamma", "0.9", "--total-timesteps", "5000")
    _, judged, _ = learn(*flags, "--policy", str(folder))
    assert judged["exact_return"] == pytest.approx(learned["exact_return"])


def test_double_q_learning_has_less_maximisation_bias(learn):
    """Example 6.7 of Sutton & Barto: how often the wrong way is taken."""
    lefts = {}
    for algorithm in ("q-learning", "double-q-learning"):
        total = 0
        for seed in range(1, 26):
            learn("--env", "Bias-v0", "--algorithm", algorithm, "--gamma", "1", "--learning-rate", "0.1",
                  "--lr-power", "0", "--start-e", "0.1", "--end-e", "0.1", "--total-timesteps", "350",
                  "--seed", str(seed), "--eval-episodes", "1")  # fmt: skip
            total += Bias.made[-2].lefts  # the last one was made for the evaluation
        lefts[algorithm] = total / 25
    assert lefts["q-learning"] > 1.5 * lefts["double-q-learning"]


# What it must show --------------------------------------------------------------------------------


def test_frozen_lake(learn):
    _, summary, _ = learn("--no-is-slippery", "--total-timesteps", "30000")
    assert summary["exact_return"] == summary["eval_return_mean"] == 1
    _, summary, _ = learn("--eval-episodes", "1000")
    assert summary["exact_return"] > 0.729 and summary["optimal_return"] == pytest.approx(0.7442, abs=5e-5)
    assert abs(summary["eval_return_mean"] - summary["exact_return"]) < 4 * (0.25 / 1000) ** 0.5
    assert abs(summary["start_value"] - 0.542) < 0.08 and summary["true_start_value"] == pytest.approx(0.5420, abs=5e-5)


def test_cliff_walking_q_learning_walks_the_edge_and_sarsa_keeps_away(learn):
    tables, summary, _ = learn("--env", "CliffWalking-v1")
    assert summary["exact_return"] == summary["eval_return_mean"] == -13
    tables, sarsa, _ = learn("--env", "CliffWalking-v1", "--algorithm", "sarsa")
    s, path = 36, []
    while s != 47 and len(path) < 50:
        s = gym.make("CliffWalking-v1").unwrapped.P[s][tables[0, s].argmax()][0][1]
        path.append(s)
    assert s == 47 and not set(path) & set(range(25, 35))  # the cells beside the cliff
    assert -18 < sarsa["exact_return"] < -13


def test_blackjack(learn):
    tables, summary, _ = learn("--env", "Blackjack-v1", "--total-timesteps", "3000")
    assert tables.shape == (1, 704, 2) and np.isfinite(tables).all() and (tables != 0).any()
    assert "exact_return" not in summary and -1 < summary["eval_return_mean"] < 0.2


# Seeds and records --------------------------------------------------------------------------------


def test_one_seed_one_table(learn):
    flags = ["--total-timesteps", "3000"]
    one, same, other = (learn(*flags, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert (one == same).all() and not (one == other).all()


def test_the_environment_is_seeded_once(learn, monkeypatch):
    worlds, make = [], ql.make_env
    monkeypatch.setattr(ql, "make_env", lambda *args, **kw: worlds.append(make(*args, **kw)) or worlds[-1])
    learn("--env", "Random-v0", "--total-timesteps", "500")
    training, evaluation = (world.unwrapped.seeds for world, _ in worlds)
    assert training[0] is not None and set(training[1:]) == {None} and len(training) > 20
    assert evaluation[0] not in (None, training[0]) and set(evaluation[1:]) == {None}


def test_resume_goes_on(learn):
    def resume(total):
        ql.train(ql.parse_args(["--resume", str(folder), "--total-timesteps", total]))
        return ql.load_checkpoint(str(folder))["parts"]["table"]

    _, _, folder = learn("--total-timesteps", "3000")
    saved, same, longer = ql.load_checkpoint(str(folder))["parts"]["table"], resume("3000"), resume("5000")
    assert (same["q"] == saved["q"]).all() and (same["visits"] == saved["visits"]).all()
    assert saved["visits"].sum() == 3000 and longer["visits"].sum() == 5000
    assert set(saved["history"]) < set(longer["history"]) and max(longer["history"]) == 5000
    assert json.loads((folder / "summary.json").read_text())["steps"] == 5000


def test_eval_plays_the_saved_table(learn, capsys):
    _, summary, folder = learn("--no-is-slippery", "--total-timesteps", "20000")
    ql.train(ql.parse_args(["--eval", str(folder), "--eval-episodes", "7"]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert summary["exact_return"] == 1 and re.search(r"\b7 \w+ episodes", line) and "exact return 1" in line


# Faults reported of other libraries ---------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["q-learning", "double-q-learning"])
def test_an_ending_belongs_to_the_transition_and_not_to_the_state(algorithm, learn):
    tables, summary, _ = learn("--env", "Market-v0", "--gamma", "0.9", "--total-timesteps", "5000", "--lr-power", "0",
                               "--algorithm", algorithm, "--end-e", "1")  # fmt: skip
    assert tables.mean(0)[0] == pytest.approx([4.05, 1], abs=1e-6)
    assert summary["true_start_value"] == pytest.approx(4.05, abs=1e-9) and summary["q_error"] < 1e-6
    assert summary["exact_return"] == summary["optimal_return"] == summary["eval_return_mean"] == 5


def test_an_environment_of_another_module(learn, tmp_path, monkeypatch):
    (tmp_path / "my_world.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv\n"
        "gym.register('MyWorld-v0', CliffWalkingEnv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tables, _, folder = learn("--env", "my_world:MyWorld-v0", "--total-timesteps", "500")
    assert tables.shape == (1, 48, 4) and ":" not in folder.name


def test_evaluation_has_a_limit_of_its_own_and_says_when_it_bit(learn, capsys):
    learn("--env", "CliffWalking-v1", "--total-timesteps", "1", "--eval-episodes", "2", "--initial-value", "1")
    assert "2 of 2 evaluation episodes were cut after 1000 steps" in capsys.readouterr().out
    learn("--env", "OneStep-v0", "--total-timesteps", "10")
    assert "were cut" not in capsys.readouterr().out


def test_the_largest_seed(learn):
    _, summary, _ = learn("--total-timesteps", "50", "--map-size", "4", "--seed", str(2**31 - 1))
    assert summary["seed"] == 2**31 - 1


@pytest.mark.parametrize("flags", [[], ["--env", "Taxi-v4"], ["--algorithm", "td0"]])
def test_pictures(flags, learn, pictures):
    from PIL import Image

    _, _, folder = learn("--total-timesteps", "100", *flags)
    with Image.open(folder / "q_table.png") as strip:
        assert strip.width > 400 and len(strip.convert("RGB").getcolors(1 << 24)) > 20


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--env", "CartPole-v1"], "Discrete"),
        (["--env", "Pendulum-v1"], "Discrete"),
        (["--env", "Nonsense-v0"], "cannot make"),
        (["--gamma", "1.1"], "--gamma"),
        (["--gamma", "-0.1"], "--gamma"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--lr-power", "-1"], "--lr-power"),
        (["--start-e", "2"], "--start-e"),
        (["--end-e", "0", "--epsilon-decay", "exponential"], "exponential"),
        (["--initial-value", "inf"], "--initial-value"),
        (["--total-timesteps", "0"], "--total-timesteps"),
        (["--eval-episodes", "0"], "--eval-episodes"),
        (["--max-episode-steps", "0"], "--max-episode-steps"),
        (["--env", "Taxi-v4", "--map-size", "5"], "--map-size"),
        (["--algorithm", "td0", "--policy", "nowhere"], "no saved model"),
        (["--algorithm", "td0", "--policy", "optimal", "--env", "Blackjack-v1"], "shows its rules"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, says, learn, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        learn(*flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and says in captured.err
    assert not list(tmp_path.iterdir())
