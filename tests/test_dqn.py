"""DQN: the mathematics against independent definitions, the replay memory, the extensions, learning."""

import csv
import json

import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import small_runs
import torch
from conftest import load_script

dqn = load_script("algos/dqn.py")


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(total_timesteps=6000, num_envs=8, buffer_size=2000, learning_starts=200, train_frequency=16,
                 batch_size=64, tau=0.05, hidden=16, learning_rate=1e-2, end_e=0.2, n_step=1, eval_episodes=2,
                 seed=3)  # fmt: skip
    return dqn.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns what was saved and the rows of metrics.csv."""
    folder = dqn.train(settings(tmp_path, env, **changes))
    with open(folder / "metrics.csv", newline="") as file:
        return dqn.load_checkpoint(str(folder)), list(csv.DictReader(file))


def network(saved, obs_dim, num_actions):
    net = dqn.QNetwork(obs_dim, num_actions, saved["args"]["hidden"], saved["args"]["dueling"])
    net.load_state_dict(saved["parts"]["q_net"])
    return net


@pytest.mark.parametrize("double", [True, False])
def test_the_online_network_chooses_if_double(tmp_path, monkeypatch, double):
    same = small_runs.watch_td_targets(dqn, monkeypatch, double)
    trained(tmp_path, "ProbeSign-v0", double=double, total_timesteps=1000)
    assert same[0] and not any(same[20:])  # the target network starts as a copy, and lags


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_importance_weights_reach_the_update(tmp_path, monkeypatch, beta):
    seen, original = [], dqn.td_loss

    def spy(predictions, targets, weights):
        seen.append(weights)
        return original(predictions, targets, weights)

    monkeypatch.setattr(dqn, "td_loss", spy)
    changes = dict(prioritized_replay_alpha=0.6, prioritized_replay_beta=beta, total_timesteps=1000)
    trained(tmp_path, "ProbeSign-v0", **changes)
    spread = [float(weights.max() - weights.min()) for weights in seen]
    assert spread[-1] > 0.1  # beta ends at 1
    assert beta == 1 or spread[1] < 0.2 * spread[-1]


def same_weights(saved):
    q_net, target_net = saved["parts"]["q_net"], saved["parts"]["target_net"]
    return all(torch.equal(q_net[key], target_net[key]) for key in q_net)


def chi_square(counts, probabilities):
    """Pearson's statistic minus its expectation, in standard deviations: above 5 is no accident."""
    expected = counts.sum() * probabilities / probabilities.sum()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


# The mathematics ------------------------------------------------------------------------------


def test_linear_schedule():
    assert [dqn.linear_schedule(1.0, 0.2, 100, step) for step in (0, 25, 50, 100, 1000)] == [1.0, 0.8, 0.6, 0.2, 0.2]
    assert dqn.linear_schedule(1.0, 0.2, 0, 0) == 0.2  # no phase at all


def test_epsilon_in_training_follows_its_schedule(tmp_path):
    _, rows = trained(tmp_path, "ProbeConstant-v0", total_timesteps=2000, exploration_fraction=0.5, end_e=0.1)
    steps, epsilons = (np.array([float(row[key]) for row in rows]) for key in ("step", "charts/epsilon"))
    np.testing.assert_allclose(epsilons, np.maximum(1 - 0.9 * (steps - 8) / 1000, 0.1), atol=0.02)


@pytest.fixture
def taken(monkeypatch):
    """The actions that the replay is given, one array [N] a step."""
    actions_of_steps, add = [], dqn.Replay.add

    def spy(self, actions, *rest):
        actions_of_steps.append(np.array(actions))
        add(self, actions, *rest)

    monkeypatch.setattr(dqn.Replay, "add", spy)
    return actions_of_steps


def test_epsilon_is_the_share_of_random_actions(tmp_path, taken, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "values", lambda self, obs: np.tile(np.float32([0, 1]), (len(obs), 1)))
    trained(tmp_path, "ProbeConstant-v0", total_timesteps=4000, start_e=0.4, end_e=0.4)
    assert 0.18 < 1 - np.mean(taken) < 0.22  # half of the random ones are action 0


@pytest.mark.parametrize("repeat, same", [(0.0, 0.5), (0.9, 0.95)])  # a fresh one of two is the same by half
def test_random_actions_repeat_as_often_as_told(tmp_path, taken, repeat, same):
    trained(tmp_path, "ProbeConstant-v0", total_timesteps=2000, start_e=1, end_e=1, repeat_random=repeat)
    taken = np.array(taken)  # [steps, N]; the chain of an environment goes on from one phase to the next
    assert abs((taken[1:] == taken[:-1]).mean() - same) < 0.03
    assert abs(taken.mean() - 0.5) < 0.1


def brute_force_fold(rewards, terminated, truncated, gamma):
    total, horizon = 0.0, 0
    for reward, dead, cut in zip(rewards, terminated, truncated, strict=True):
        total += gamma**horizon * reward
        horizon += 1
        if dead:
            return total, 0.0, horizon
        if cut:
            break
    return total, gamma**horizon, horizon


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [
        ([0, 0, 0], [0, 0, 0], (1 + 0.5 * 2 + 0.25 * 4, 0.125, 3)),  # goes on: bootstrap after three steps
        ([0, 0, 1], [0, 0, 0], (1 + 0.5 * 2 + 0.25 * 4, 0.0, 3)),  # dies at the third: nothing follows
        ([0, 1, 0], [0, 0, 0], (1 + 0.5 * 2, 0.0, 2)),  # the third row is another episode's
        ([0, 0, 0], [0, 1, 0], (1 + 0.5 * 2, 0.25, 2)),  # cut at the second: bootstrap there
        ([0, 0, 1], [1, 0, 0], (1.0, 0.5, 1)),  # a death in the next episode does not count
    ],
)
def test_n_step_return_by_hand(terminated, truncated, expected):
    column = [
        np.array(x, kind)[:, None] for x, kind in (([1, 2, 4], np.float32), (terminated, bool), (truncated, bool))
    ]
    assert tuple(x.item() for x in dqn.n_step_return(*column, gamma=0.5)) == expected


def test_n_step_return_equals_brute_force():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(7, 500)).astype(np.float32)
    terminated, truncated = rng.random((2, 7, 500)) < 0.1
    expected = [brute_force_fold(r, d, c, 0.9) for r, d, c in zip(rewards.T, terminated.T, truncated.T, strict=True)]
    np.testing.assert_allclose(
        np.array(dqn.n_step_return(rewards, terminated, truncated, 0.9)), np.array(expected).T, atol=1e-5
    )


def test_td_target_by_hand():
    returns, discounts = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.0])
    target_q = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    online_q = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    assert dqn.td_target(returns, discounts, target_q).tolist() == [11.0, 22.0, 3.0]
    # double: the online network chooses actions 0, 1, 0, the target network values them
    assert dqn.td_target(returns, discounts, target_q, online_q).tolist() == [6.0, 22.0, 3.0]
    with pytest.raises(AssertionError):  # [B, 1] would broadcast to [B, B]
        dqn.td_target(returns[:, None], discounts, target_q)


def test_td_loss_by_hand():
    predictions, targets = torch.tensor([0.0, 0.0]), torch.tensor([0.5, 3.0])
    assert dqn.td_loss(predictions, targets).item() == pytest.approx((0.125 + 2.5) / 2)
    assert dqn.td_loss(predictions, targets, torch.ones(2)).item() == pytest.approx((0.125 + 2.5) / 2)
    assert dqn.td_loss(predictions, targets, torch.tensor([1.0, 0.5])).item() == pytest.approx((0.125 + 1.25) / 2)
    with pytest.raises(AssertionError):
        dqn.td_loss(predictions[:, None], targets, torch.ones(2))
    with pytest.raises(AssertionError):
        dqn.td_loss(predictions, targets, torch.ones(2, 1))


def test_update_target_copies_and_follows():
    online, target = (dqn.QNetwork(2, 2, 3, dueling=False) for _ in range(2))
    before, goal = target.net[0].weight.detach().clone(), online.net[0].weight.detach().clone()
    dqn.update_target(online, target, 0.25)
    torch.testing.assert_close(target.net[0].weight, 0.75 * before + 0.25 * goal)
    dqn.update_target(online, target, 1.0)
    assert torch.equal(target.net[0].weight, goal)
    with torch.no_grad():
        online.net[0].weight += 1
    assert torch.equal(target.net[0].weight, goal)  # a copy, not the same memory


# The prioritised memory -----------------------------------------------------------------------


def prioritized(priorities, alpha=1.0):
    """A full memory [T, N] with these priorities; the last row of the ring is the current one."""
    T, N = priorities.shape
    replay = dqn.PrioritizedReplay(T * N, N, (1,), alpha)
    no = np.zeros(N, bool)
    for row in priorities:
        replay.add(no, no, no, no, row > 0, np.zeros((N, 1)))
    replay.priorities[:T] = priorities
    return replay


def test_draws_are_in_proportion_to_the_priorities():
    rng = np.random.default_rng(0)
    priorities = rng.random((12, 3)) + 0.05
    priorities[[0, 5, 11], [0, 2, 1]] = 0
    priorities[7] = 0
    replay = prioritized(priorities)
    single = [replay.draw(1, rng) for _ in range(20_000)]
    many = [replay.draw(64, rng) for _ in range(500)]
    for draws in (single, many):
        t, n = (np.concatenate(part) for part in zip(*draws, strict=True))
        counts, likely = np.bincount(t * 3 + n, minlength=39)[:36], priorities.ravel() > 0
        assert counts.sum() == len(t) and counts[~likely].sum() == 0
        assert chi_square(counts[likely], priorities.ravel()[likely]) < 5
        assert chi_square(counts[likely], np.ones(likely.sum())) > 20  # the test can fail


def test_a_draw_takes_a_row_from_each_part_of_the_sum():
    t, n = prioritized(np.ones((100, 2))).draw(100, np.random.default_rng(0))
    assert (np.sort(t) == np.arange(100)).all()  # each hundredth once
    assert 30 < n.sum() < 70


def test_importance_weights_undo_the_bias():
    rng = np.random.default_rng(0)
    replay, values = prioritized(rng.random((25, 2)) + 0.1), rng.normal(size=(26, 2))
    t, n = replay.draw(200_000, rng)
    weights = replay.weights(t, n, beta=1.0)
    assert weights.max() == 1 and weights.min() > 0 and weights.dtype == np.float32
    assert abs((weights * values[t, n]).sum() / weights.sum() - values[:25].mean()) < 0.01
    assert abs(values[t, n].mean() - values[:25].mean()) > 0.02  # without them it is biased
    assert (replay.weights(t, n, beta=0.0) == 1).all()
    pair = prioritized(np.array([[1.0], [4.0]]))
    np.testing.assert_allclose(pair.weights(np.array([0, 1]), np.array([0, 0]), beta=0.5), [1.0, 0.5])


def test_priorities_follow_the_errors_and_new_transitions_come_first():
    replay = prioritized(np.ones((4, 2)), alpha=0.5)
    replay.update(np.array([0, 1]), np.array([1, 0]), np.array([-9.0, 0.0]))
    np.testing.assert_allclose(replay.priorities[:2], [[1, 3], [1e-3, 1]], rtol=1e-4)
    replay.add(0, 0.0, False, False, np.array([True, False]), np.zeros((2, 1)))  # the row at head, 4
    np.testing.assert_allclose(replay.priorities[4], [3, 0], rtol=1e-4)  # as large as the largest; 0 for a reset
    assert (replay.priorities[0] == 0).all()  # the oldest row became the current one


# The replay memory ----------------------------------------------------------------------------


class Stream:
    """Random episodes of N environments in NEXT_STEP mode, played into a memory and kept in full."""

    def __init__(self, replay, seed):
        self.replay, self.rng, self.rows = replay, np.random.default_rng(seed), []
        self.resets = np.zeros(replay.N, bool)
        self.obs = self.rng.normal(size=(replay.N, 2)).astype(np.float32)
        replay.obs[replay.head] = self.obs

    def play(self):
        N, valid = self.replay.N, ~self.resets
        terminated, truncated = (self.rng.random((2, N)) < 0.15) & valid
        rewards = (self.rng.normal(size=N) * valid).astype(np.float32)
        next_obs = self.rng.normal(size=(N, 2)).astype(np.float32)
        row = (self.obs, self.rng.integers(3, size=N), rewards, terminated, truncated, valid, next_obs)
        self.replay.add(*row[1:])
        self.rows.append(row)
        self.obs, self.resets = next_obs, terminated | truncated

    def transition(self, t, n, n_step, gamma):
        """The n-step transition from step t of environment n, from the full record."""
        rows = self.rows[t : t + n_step]
        returns, discount, horizon = brute_force_fold(*([row[k][n] for row in rows] for k in (2, 3, 4)), gamma)
        return (*self.rows[t][0][n], self.rows[t][1][n], returns, discount, *self.rows[t + horizon - 1][6][n])


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("N", [1, 3])
def test_replay_returns_exactly_what_was_played(N, n_step):
    replay = dqn.Replay(8 * N, N, (2,))
    stream = Stream(replay, seed=N)
    for played in range(1, 60):  # the ring of nine rows wraps around six times
        stream.play()
        kept = min(played, 8)
        assert replay.rows == kept
        places, expected = [], []
        for t in range(played - kept, played):
            for n in range(N):
                assert replay.valid[t % 9, n] == stream.rows[t][5][n]
                if stream.rows[t][5][n]:
                    places.append((t % 9, n))
                    expected.append(stream.transition(t, n, n_step, 0.9))
        t, n = np.array(places).reshape(-1, 2).T
        obs, actions, returns, discounts, next_obs = replay.batch(t, n, n_step, 0.9)
        found = np.column_stack([obs, actions, returns, discounts, next_obs])
        np.testing.assert_allclose(found, np.array(expected).reshape(found.shape), atol=1e-5)


def test_replay_draws_every_transition_alike_and_nothing_else():
    replay, rng = dqn.Replay(60, 3, (2,)), np.random.default_rng(0)
    stream = Stream(replay, seed=0)
    for _ in range(50):
        stream.play()
    t, n = replay.draw(30_000, rng)
    rows_back = (replay.head - t - 1) % replay.T
    assert replay.valid[t, n].all() and not (t == replay.head).any()
    assert rows_back.max() == 19 and rows_back.min() == 0
    counts = np.bincount(t * 3 + n, minlength=replay.T * 3)
    assert (counts > 0).sum() == sum(row[5].sum() for row in stream.rows[-20:])
    assert chi_square(counts[counts > 0], np.ones((counts > 0).sum())) < 5


# The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dueling", [False, True])
def test_values_in_numpy_equal_the_network_and_follow_it(dueling):
    net, obs = dqn.QNetwork(4, 3, 16, dueling), torch.randn(5, 4)
    for _ in range(2):
        np.testing.assert_allclose(net.values(obs.numpy()), net(obs).detach().numpy(), atol=1e-5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1


def test_dueling_by_hand():
    heads = torch.tensor([[10.0, 1.0, 2.0, 6.0], [0.0, 30.0, 0.0, 0.0]])
    expected = [[8.0, 9.0, 13.0], [20.0, -10.0, -10.0]]
    assert dqn.combine_dueling(heads).tolist() == expected
    assert dqn.combine_dueling(heads.numpy()).tolist() == expected
    assert len(dqn.QNetwork(4, 3, 8, dueling=True).net[-1].bias) == 4


@pytest.mark.parametrize("dueling", [False, True])
def test_a_fixed_batch_is_learnt_to_zero_loss(dueling):
    torch.manual_seed(0)
    net = dqn.QNetwork(3, 2, 64, dueling)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    obs, actions, returns = torch.randn(32, 3), torch.randint(2, (32, 1)), torch.randn(32)
    targets = dqn.td_target(returns, torch.zeros(32), net(obs).detach())
    for _ in range(600):
        loss = dqn.td_loss(net(obs).gather(1, actions).squeeze(1), targets, torch.ones(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# Training -------------------------------------------------------------------------------------

EXTENDED = dict(double=True, dueling=True, prioritized_replay_alpha=0.6, n_step=3)
PLAIN = dict(double=False)


@pytest.mark.parametrize("flags", [PLAIN, EXTENDED], ids=["plain", "extended"])
@pytest.mark.parametrize(
    "probe, q_at",  # observation -> best Q
    [
        ("Constant", {0: 1.0}),
        ("Sign", {-1: -1.0, 1: 1.0}),
        ("Delayed", {0: 0.9, 1: 1.0}),
        ("ActionDependent", {-1: 1.0, 1: 1.0}),
        ("Truncated", {0: 10.0}),  # a time limit is no death
        ("Marked", {0: 2.71, 1: 1.9, 2: 1.0}),  # and a row that resets is no transition
    ],
)
def test_probe_values(tmp_path, probe, q_at, flags):
    changes = dict(gamma=0.9, hidden=32) | flags
    saved, rows = trained(tmp_path, f"Probe{probe}-v0", total_timesteps=10_000, **changes)
    q = network(saved, 1, 2).values(np.array(list(q_at), np.float32)[:, None])
    np.testing.assert_allclose(q.max(1), list(q_at.values()), rtol=0.05, atol=0.03)
    if probe == "ActionDependent":
        np.testing.assert_allclose(q.min(1), [-1, -1], atol=0.1)


def test_the_prediction_is_compared_with_what_was_obtained(tmp_path):
    def foresight(env, **changes):
        folder = dqn.train(settings(tmp_path, env, gamma=0.9, **changes))
        summary = json.loads((folder / "summary.json").read_text())
        return summary["predicted_return"], summary["obtained_return"]

    # In the units of the environment, whatever --reward-scale.
    predicted, obtained = foresight("ProbeMarked-v0", reward_scale=0.5)
    assert obtained == pytest.approx(2.71) and predicted == pytest.approx(2.71, abs=0.1)
    predicted, obtained = foresight("ProbeMarked-v0", learning_starts=10**6)
    assert obtained == pytest.approx(2.71) and predicted < 1.5  # it has learnt nothing
    assert foresight("ProbeTruncated-v0", total_timesteps=10_000)[1] == pytest.approx(
        10, abs=1
    )  # the rest counts as predicted


def test_gradients_are_clipped_unless_the_bound_is_infinite(tmp_path):
    def weights(bound):
        saved, _ = trained(tmp_path, "ProbeSign-v0", total_timesteps=1000, max_grad_norm=bound)
        return saved["parts"]["q_net"]["net.0.weight"]

    free = weights(float("inf"))
    assert torch.equal(weights(1e30), free) and not torch.equal(weights(1e-6), free)


def test_target_network_lags_and_can_be_taken_away(tmp_path):
    flags = dict(total_timesteps=1000, anneal_lr=False)
    assert not same_weights(trained(tmp_path, "ProbeSign-v0", **flags)[0])
    # Copied at each update the target equals the network, which is to have none; else it lags.
    assert same_weights(trained(tmp_path, "ProbeSign-v0", tau=1, **flags)[0])
    assert not same_weights(trained(tmp_path, "ProbeSign-v0", tau=1, target_network_frequency=10, **flags)[0])
    never = trained(tmp_path, "ProbeSign-v0", tau=1, target_network_frequency=10_000, **flags)[0]["parts"]
    torch.manual_seed(3)
    fresh = dqn.QNetwork(1, 2, 16, dueling=False)
    assert all(torch.equal(never["target_net"][key], value) for key, value in fresh.state_dict().items())


def test_a_memory_of_one_interval_is_no_replay(tmp_path, monkeypatch):
    """What header and course call "no replay": learning from the latest train-frequency transitions only."""
    ages, draw = [], dqn.Replay.draw

    def spy(self, count, rng):
        t, n = draw(self, count, rng)
        ages.append(int(((self.head - t - 1) % self.T).max()))
        return t, n

    monkeypatch.setattr(dqn.Replay, "draw", spy)
    trained(tmp_path, "ProbeMarked-v0", total_timesteps=2000, buffer_size=16)
    assert max(ages) == 1  # train-frequency 16 is two steps of eight environments
    ages.clear()
    trained(tmp_path, "ProbeSign-v0", total_timesteps=2000)
    assert max(ages) > 100
    trained(tmp_path, "ProbeSign-v0", total_timesteps=500, buffer_size=2, num_envs=1, train_frequency=1)


def test_one_gradient_step_for_every_train_frequency_steps(tmp_path, monkeypatch):
    updates, td_loss = [], dqn.td_loss
    monkeypatch.setattr(dqn, "td_loss", lambda *args: (updates.append(1), td_loss(*args))[1])
    for frequency in (4, 16, 50):  # less than, twice and six times what one step of eight environments plays
        updates.clear()
        trained(tmp_path, "ProbeDelayed-v0", total_timesteps=2000, train_frequency=frequency, learning_starts=200)
        assert len(updates) == pytest.approx(1800 / frequency, abs=3)


def test_priorities_are_errors_and_only_of_transitions(tmp_path, monkeypatch):
    memories, init = [], dqn.PrioritizedReplay.__init__
    monkeypatch.setattr(
        dqn.PrioritizedReplay, "__init__", lambda self, *args: (init(self, *args), memories.append(self))[0]
    )
    trained(tmp_path, "ProbeSign-v0", total_timesteps=3000, buffer_size=400, prioritized_replay_alpha=1.0)
    priorities, valid, head = memories[0].priorities, memories[0].valid.copy(), memories[0].head
    valid[head] = False
    assert ((priorities > 0) == valid).all()
    assert np.median(priorities[priorities > 0]) < 0.2  # from 1 on arrival to the error, now small


def test_resuming_fills_the_memory_before_it_learns_on(tmp_path, monkeypatch):
    args = settings(tmp_path, "ProbeSign-v0", total_timesteps=1000)
    args.resume, args.total_timesteps = str(dqn.train(args)), 1600
    steps, draw = [], dqn.Replay.draw
    monkeypatch.setattr(dqn.Replay, "draw", lambda self, *a: (steps.append(self.rows), draw(self, *a))[1])
    dqn.train(args)
    # Every other row only resets: 200 transitions of eight environments lie in 50 rows, all 600 in 150.
    assert 45 <= steps[0] <= 55 and 130 <= max(steps) <= 155


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tau 1.5", "--tau must be in [0, 1]"),
        ("--n-step 0", "--n-step must be > 0"),
        ("--tau 0", "--tau must be > 0"),
        ("--repeat-random 1.5", "--repeat-random must be in [0, 1]"),
        ("--buffer-size 10", "--buffer-size"),
        ("--hidden 0", "--hidden"),
        ("--env Pendulum-v1", "action space"),
        ("--buffer-size 1000000000000", "no memory for a replay of 1,000,000,000,000 transitions, 14,901.2 GiB"),
    ],
)
def test_bad_settings_end_with_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        dqn.train(dqn.parse_args(["--run-dir", str(tmp_path), *flags.split()]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_memory_larger_than_the_machine_gets_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        dqn.train(settings(tmp_path, "CartPole-v1", buffer_size=10**13))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "GiB; lower --buffer-size" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, reached", [("", 400), ("--dueling --prioritized-replay-alpha 0.6", 200)], ids=["preset", "extensions"]
)  # a random player gets 22; a quarter of the preset's budget leaves the slower one unfinished
def test_learns_cartpole(tmp_path, flags, reached):
    argv = ["--total-timesteps", "150000", "--eval-episodes", "10", "--run-dir", str(tmp_path), *flags.split()]
    folder = dqn.train(dqn.parse_args(argv))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_return_mean"] > reached
