"""DQN: the mathematics against independent definitions, the replay memory, the extensions, learning."""

import csv
import dataclasses
import json
import math

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
                 gradient_steps=1, target_network_frequency=16, batch_size=64, tau=0.05, hidden=(16,),
                 learning_rate=1e-2, end_e=0.2, n_step=1, eval_episodes=2, seed=3)  # fmt: skip
    return dqn.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns what was saved and the rows of metrics.csv."""
    folder = dqn.train(settings(tmp_path, env, **changes))
    with open(folder / "metrics.csv", newline="") as file:
        return dqn.load_checkpoint(str(folder)), list(csv.DictReader(file))


def network(saved, obs_dim, num_actions):
    net = dqn.QNetwork(obs_dim, num_actions, saved["args"]["hidden"], saved["args"]["dueling"])
    net.load_state_dict(saved["q_net"])
    return net


@pytest.mark.parametrize("double", [True, False])
def test_the_online_network_chooses_if_double(tmp_path, monkeypatch, double):
    same = small_runs.watch_td_targets(dqn, monkeypatch, double)
    trained(tmp_path, "ProbeSign-v0", double=double, gradient_steps=1, total_timesteps=1000)
    assert same[0] and not any(same[20:])  # the target network starts as a copy, and lags


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_importance_weights_and_kind_of_loss_reach_the_update(tmp_path, monkeypatch, beta):
    seen, original = [], dqn.td_loss

    def spy(predictions, targets, weights, kind):
        assert kind == "huber"
        seen.append(weights)
        return original(predictions, targets, weights, kind)

    monkeypatch.setattr(dqn, "td_loss", spy)
    trained(
        tmp_path, "ProbeSign-v0", prioritized=True, prioritized_replay_beta=beta, loss="huber", total_timesteps=1000
    )
    spread = [float(weights.max() - weights.min()) for weights in seen]
    assert spread[-1] > 0.1  # beta ends at 1
    assert beta == 1 or spread[1] < 0.2 * spread[-1]


def same_weights(saved):
    return all(torch.equal(saved["q_net"][key], saved["target_net"][key]) for key in saved["q_net"])


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
    np.testing.assert_allclose(epsilons, np.maximum(1 - 0.9 * (steps - 16) / 1000, 0.1), atol=0.02)


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
    monkeypatch.setattr(dqn.QNetwork, "numpy_q", lambda self: lambda obs: np.tile(np.float32([0, 1]), (len(obs), 1)))
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
    weights = torch.tensor([1.0, 0.5])
    assert dqn.td_loss(predictions, targets, None, "squared").item() == pytest.approx((0.25 + 9) / 2)
    assert dqn.td_loss(predictions, targets, None, "huber").item() == pytest.approx((0.125 + 2.5) / 2)
    assert dqn.td_loss(predictions, targets, weights, "squared").item() == pytest.approx((0.25 + 4.5) / 2)
    assert dqn.td_loss(predictions, targets, weights, "huber").item() == pytest.approx((0.125 + 1.25) / 2)
    with pytest.raises(AssertionError):
        dqn.td_loss(predictions[:, None], targets, None, "squared")


@pytest.mark.parametrize("max_norm", [0.1, 100.0])  # the norm is between the two
def test_gradients_are_clipped_as_torch_does_it(max_norm):
    nets = [dqn.QNetwork(2, 2, (3,), dueling=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, clip in zip(nets, (dqn.clip_gradients, torch.nn.utils.clip_grad_norm_), strict=True):
        net(torch.ones(5, 2)).pow(2).sum().backward()
        assert 0.1 < torch.nn.utils.clip_grad_norm_(list(net.parameters()), math.inf) < 100
        clip(list(net.parameters()), max_norm)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=0)


def test_update_target_copies_and_follows():
    online, target = (dqn.QNetwork(2, 2, (3,), dueling=False) for _ in range(2))
    before, goal = target.net[0].weight.detach().clone(), online.net[0].weight.detach().clone()
    dqn.update_target(list(online.parameters()), list(target.parameters()), 0.25)
    torch.testing.assert_close(target.net[0].weight, 0.75 * before + 0.25 * goal)
    dqn.update_target(list(online.parameters()), list(target.parameters()), 1.0)
    assert torch.equal(target.net[0].weight, goal)
    with torch.no_grad():
        online.net[0].weight += 1
    assert torch.equal(target.net[0].weight, goal)  # a copy, not the same memory


def test_foresight_equals_brute_force():
    rng = np.random.default_rng(0)
    gamma, N = 0.9, 4
    foresight = dqn.Foresight(N, gamma)
    assert foresight.means() == (None, None)
    finished = []
    episodes = [[] for _ in range(N)]
    resets = np.zeros(N, bool)
    for _ in range(400):
        q, rewards, rest = rng.normal(size=N), rng.normal(size=N) * ~resets, rng.normal(size=N)
        foresight.add(q, rewards, ~resets)
        for n in np.flatnonzero(~resets):
            episodes[n].append((q[n], rewards[n]))
        resets = ~resets & (rng.random(N) < 0.1)
        foresight.end(np.flatnonzero(resets), np.array([len(e) for e in episodes])[resets], rest[resets])
        for n in np.flatnonzero(resets):
            value = rest[n]
            finished.append([])
            for predicted, reward in reversed(episodes[n]):
                value = reward + gamma * value
                finished[-1].append((predicted, value))
            episodes[n] = []
    assert len(finished) > 100
    np.testing.assert_allclose(foresight.means(), np.mean(sum(finished[-100:], []), axis=0))


# The sum tree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 37, 64])
def test_sum_tree_keeps_the_sums(size):
    rng = np.random.default_rng(size)
    tree, plain = dqn.SumTree(size), np.zeros(size)
    for _ in range(50):
        leaves = rng.integers(size, size=5)
        values = rng.random(size)[leaves]  # a leaf named twice gets one value
        tree[leaves] = plain[leaves] = values
        np.testing.assert_array_equal(tree[np.arange(size)], plain)
        assert tree.total == pytest.approx(plain.sum())


def test_sum_tree_samples_in_proportion():
    rng = np.random.default_rng(0)
    tree, priorities = dqn.SumTree(37), rng.random(37) + 0.05
    priorities[[0, 5, 36]] = 0
    tree[np.arange(37)] = rng.random(37)  # overwritten by the next line
    tree[np.arange(37)] = priorities
    # Single draws are independent; the first half of larger draws must be a fair sample as well.
    single = np.concatenate([tree.sample(1, rng) for _ in range(20_000)])
    halves = np.concatenate([tree.sample(64, rng)[:32] for _ in range(1000)])
    for drawn in (single, halves):
        counts, likely = np.bincount(drawn, minlength=37), priorities > 0
        assert counts[~likely].sum() == 0
        assert chi_square(counts[likely], priorities[likely]) < 5
    assert chi_square(np.bincount(single, minlength=37)[likely], np.ones(likely.sum())) > 20  # the test can fail


def test_sum_tree_sample_is_stratified():
    tree = dqn.SumTree(100)
    tree[np.arange(100)] = 1.0
    assert (np.sort(tree.sample(100, np.random.default_rng(0))) == np.arange(100)).all()  # each hundredth once


def test_importance_weights_undo_the_bias():
    rng = np.random.default_rng(0)
    priorities, values = rng.random(50) + 0.1, rng.normal(size=50)
    drawn = rng.choice(50, 200_000, p=priorities / priorities.sum())
    weights = dqn.importance_weights(priorities[drawn], beta=1.0)
    assert weights.max() == 1 and weights.min() > 0
    assert abs((weights * values[drawn]).sum() / weights.sum() - values.mean()) < 0.01
    assert abs(values[drawn].mean() - values.mean()) > 0.02  # without them it is biased
    assert (dqn.importance_weights(priorities, beta=0.0) == 1).all()
    np.testing.assert_allclose(dqn.importance_weights(np.array([1.0, 4.0]), beta=0.5), [1.0, 0.5])


# The replay memory ----------------------------------------------------------------------------


class Stream:
    """Random episodes of N environments in NEXT_STEP mode, played into a memory and kept in full."""

    def __init__(self, replay, seed):
        self.replay, self.rng, self.rows = replay, np.random.default_rng(seed), []
        self.resets = np.zeros(replay.N, bool)
        self.obs = self.rng.normal(size=(replay.N, 2)).astype(np.float32)
        replay.begin(self.obs)

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
    replay = dqn.Replay(buffer_size=8 * N, num_envs=N, obs_dim=2)
    stream = Stream(replay, seed=N)
    for played in range(1, 60):  # the ring of nine rows wraps around six times
        stream.play()
        kept = min(played, 8)
        assert replay.size == kept * N
        slots, expected = [], []
        for t in range(played - kept, played):
            for n in range(N):
                slots.append(t % 9 * N + n)
                assert replay.valid[slots[-1]] == stream.rows[t][5][n]
                if stream.rows[t][5][n]:
                    expected.append(stream.transition(t, n, n_step, 0.9))
        slots = np.array(slots)[replay.valid[slots]]
        obs, actions, returns, discounts, next_obs = replay.batch(slots, n_step, 0.9)
        found = np.column_stack([obs, actions, returns, discounts, next_obs])
        np.testing.assert_allclose(found, np.array(expected).reshape(found.shape), atol=1e-5)


def test_replay_draws_every_transition_alike_and_nothing_else():
    replay, rng = dqn.Replay(buffer_size=60, num_envs=3, obs_dim=2), np.random.default_rng(0)
    stream = Stream(replay, seed=0)
    for _ in range(50):
        stream.play()
    current = np.arange(replay.slots)[replay.row()]
    for newest in (None, 5 * 3):
        drawn = replay.draw(30_000, rng, newest)
        rows_back = (replay.head - drawn - 1) % replay.slots // 3
        assert replay.valid[drawn].all() and not np.isin(drawn, current).any()
        assert rows_back.max() == (newest or 60) // 3 - 1 and rows_back.min() == 0
        counts = np.bincount(drawn, minlength=replay.slots)
        assert (counts > 0).sum() == sum(row[5].sum() for row in stream.rows[-((newest or 60) // 3) :])
        assert chi_square(counts[counts > 0], np.ones((counts > 0).sum())) < 5


def test_replay_cuts_the_episodes_under_way_when_it_begins_again():
    replay = dqn.Replay(buffer_size=20, num_envs=2, obs_dim=1)
    ones, no = np.ones(2, np.float32), np.zeros(2, bool)
    replay.begin(np.zeros((2, 1)))
    for t in range(1, 4):
        replay.add([0, 1], ones, no, no, ~no, np.full((2, 1), t))
    replay.begin(np.full((2, 1), 10))  # a resumed training starts new episodes
    for t in range(11, 14):
        replay.add([0, 1], ones, no, no, ~no, np.full((2, 1), t))
    obs, _, returns, discounts, next_obs = replay.batch(np.flatnonzero(replay.valid)[::2], 3, gamma=0.5)
    assert obs.ravel().tolist() == [0, 1, 2, 10, 11, 12]
    assert next_obs.ravel().tolist() == [3, 3, 3, 13, 13, 13]
    assert returns.tolist() == [1.75, 1.5, 1, 1.75, 1.5, 1] and discounts.tolist() == [0.125, 0.25, 0.5] * 2


# The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dueling", [False, True])
def test_numpy_q_equals_the_network_and_follows_it(dueling):
    net = dqn.QNetwork(4, 3, (16, 8), dueling)
    obs = torch.randn(5, 4)
    q = net.numpy_q()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    np.testing.assert_allclose(q(obs.numpy()), net(obs).detach().numpy(), atol=1e-5)


def test_dueling_by_hand():
    heads = torch.tensor([[10.0, 1.0, 2.0, 6.0], [0.0, 30.0, 0.0, 0.0]])
    expected = [[8.0, 9.0, 13.0], [20.0, -10.0, -10.0]]
    assert dqn.combine_dueling(heads).tolist() == expected
    assert dqn.combine_dueling(heads.numpy()).tolist() == expected
    assert len(dqn.QNetwork(4, 3, (8,), dueling=True).net[-1].bias) == 4


@pytest.mark.parametrize("dueling", [False, True])
def test_a_fixed_batch_is_learnt_to_zero_loss(dueling):
    torch.manual_seed(0)
    net = dqn.QNetwork(3, 2, (64, 64), dueling)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    obs, actions, returns = torch.randn(32, 3), torch.randint(2, (32, 1)), torch.randn(32)
    targets = dqn.td_target(returns, torch.zeros(32), net(obs).detach())
    for _ in range(600):
        loss = dqn.td_loss(net(obs).gather(1, actions).squeeze(1), targets, None, "squared")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# Training -------------------------------------------------------------------------------------

EXTENDED = dict(double=True, dueling=True, prioritized=True, n_step=3)
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
    changes = dict(loss="squared", gamma=0.9, hidden=(32,)) | flags
    saved, rows = trained(tmp_path, f"Probe{probe}-v0", total_timesteps=10_000, **changes)
    q = network(saved, 1, 2).numpy_q()(np.array(list(q_at), np.float32)[:, None])
    np.testing.assert_allclose(q.max(1), list(q_at.values()), rtol=0.05, atol=0.03)
    if probe == "ActionDependent":
        np.testing.assert_allclose(q.min(1), [-1, -1], atol=0.1)


def test_the_prediction_is_compared_with_what_was_obtained(tmp_path):
    _, rows = trained(tmp_path, "ProbeMarked-v0", gamma=0.9, start_e=0.1, end_e=0.1, reward_scale=0.5)
    expected = np.mean([2.71, 1.9, 1.0])  # in the units of the environment, whatever --reward-scale
    assert float(rows[0]["charts/obtained_return"]) == pytest.approx(expected)
    assert float(rows[-1]["charts/predicted_return"]) == pytest.approx(expected, abs=0.1)
    assert float(rows[0]["charts/overestimation"]) < -0.5  # it has learnt nothing yet
    _, rows = trained(tmp_path, "ProbeTruncated-v0", gamma=0.9)
    assert float(rows[-1]["charts/obtained_return"]) == pytest.approx(10, abs=1)  # the rest counts as predicted


def test_gradients_are_clipped_unless_the_bound_is_infinite(tmp_path):
    def weights(bound):
        saved, _ = trained(tmp_path, "ProbeSign-v0", total_timesteps=1000, max_grad_norm=bound)
        return saved["q_net"]["net.0.weight"]

    free = weights(float("inf"))
    assert torch.equal(weights(1e30), free) and not torch.equal(weights(1e-6), free)


def test_target_network_lags_and_can_be_taken_away(tmp_path):
    flags = dict(total_timesteps=1000, anneal_lr=False)
    assert not same_weights(trained(tmp_path, "ProbeSign-v0", **flags)[0])
    assert same_weights(trained(tmp_path, "ProbeSign-v0", target_network=False, **flags)[0])
    # Copied at each of the 101 updates the target equals the network; copied at every tenth it lags.
    assert same_weights(trained(tmp_path, "ProbeSign-v0", tau=1, **flags)[0])
    assert not same_weights(trained(tmp_path, "ProbeSign-v0", tau=1, target_network_frequency=160, **flags)[0])
    never = trained(tmp_path, "ProbeSign-v0", tau=1, target_network_frequency=10_000, **flags)[0]
    dqn.seed_everything(3)
    fresh = dqn.QNetwork(1, 2, (16,), dueling=False)
    assert all(torch.equal(never["target_net"][key], value) for key, value in fresh.state_dict().items())


def test_no_replay_learns_from_the_latest_transitions(tmp_path, monkeypatch):
    draws = []
    draw = dqn.Replay.draw

    def spy(self, count, rng, newest=None):
        slots = draw(self, count, rng, newest)
        draws.append(int(((self.head - slots - 1) % self.slots // self.N).max()))
        return slots

    monkeypatch.setattr(dqn.Replay, "draw", spy)
    trained(tmp_path, "ProbeSign-v0", total_timesteps=2000, replay=False)
    assert max(draws) == 1  # train-frequency 16 is two steps of eight environments
    draws.clear()
    trained(tmp_path, "ProbeSign-v0", total_timesteps=2000)
    assert max(draws) > 100
    trained(tmp_path, "ProbeSign-v0", total_timesteps=500, replay=False, num_envs=1, train_frequency=1)


def test_priorities_are_errors_and_only_of_transitions(tmp_path):
    changes = dict(prioritized=True, save_buffer=True, buffer_size=400, prioritized_replay_alpha=1.0)
    saved, _ = trained(tmp_path, "ProbeSign-v0", total_timesteps=3000, **changes)
    replay = dqn.Replay(400, 8, 1)
    tree = dqn.SumTree(replay.slots)
    replay.load_state_dict(saved["memory"][0])
    tree.nodes = saved["memory"][1].numpy()
    priorities, current = tree[np.arange(replay.slots)], np.zeros(replay.slots, bool)
    current[replay.row()] = True
    assert ((priorities > 0) == (replay.valid & ~current)).all() and current.sum() == 8
    assert np.median(priorities[priorities > 0]) < 0.2  # from 1 on arrival to the error, now small


def test_resume_restores_the_memory_that_was_saved(tmp_path, capsys):
    for save_buffer, message in (
        (True, "going on with the replay memory of 1,000"),
        (False, "no replay memory was saved"),
    ):
        args = settings(tmp_path, "ProbeSign-v0", total_timesteps=1000, buffer_size=1000, save_buffer=save_buffer)
        folder = dqn.train(args)
        saved = dqn.load_checkpoint(str(folder))
        assert (saved["memory"] is not None) == save_buffer
        args.resume, args.total_timesteps = str(folder), 1600
        dqn.train(args)
        assert message in capsys.readouterr().out
        resumed = dqn.load_checkpoint(str(folder))
        # With its memory it learns at once; without it waits until learning-starts steps are played.
        steps = 1600 - saved["record"]["step"] - (0 if save_buffer else 200)
        assert abs(resumed["updates"] - saved["updates"] - steps / 8) <= 3  # every other row only resets


@pytest.mark.parametrize("change", [dict(buffer_size=500), dict(num_envs=4), dict(prioritized=True)])
def test_resume_with_a_memory_of_another_kind_gets_one_line(tmp_path, capsys, change):
    args = settings(tmp_path, "ProbeSign-v0", total_timesteps=1000, buffer_size=1000, save_buffer=True)
    args.resume, before = str(dqn.train(args)), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dqn.train(dataclasses.replace(args, total_timesteps=1600, **change))
    message = f"needs its own --{next(iter(change)).replace('_', '-')}"
    assert stop.value.code == 2 and message in capsys.readouterr().err and not before.err.count("error")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tau 1.5", "--tau must lie in [0, 1]"),
        ("--n-step 0", "--n-step must be positive"),
        ("--tau 0", "--tau must lie in (0, 1]"),
        ("--repeat-random 1", "--repeat-random in [0, 1)"),
        ("--prioritized --no-replay", "--no-replay"),
        ("--buffer-size 10", "--buffer-size"),
        ("--hidden 0", "--hidden"),
        ("--env Pendulum-v1", "action space"),
    ],
)
def test_bad_settings_end_with_one_line(flags, message, tmp_path, capsys):
    args = dqn.parse_args(dqn.Args, dqn.PRESETS, ["--run-dir", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        dqn.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, reached", [("", 400), ("--dueling --prioritized", 200)], ids=["preset", "extensions"]
)  # a random player gets 22; a quarter of the preset's budget leaves the slower one unfinished
def test_learns_cartpole(tmp_path, flags, reached):
    argv = ["--total-timesteps", "150000", "--eval-episodes", "10", "--run-dir", str(tmp_path), *flags.split()]
    folder = dqn.train(dqn.parse_args(dqn.Args, dqn.PRESETS, argv))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_return_mean"] > reached
