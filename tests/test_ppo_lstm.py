"""PPO with a memory: a chunk equals its steps, nothing leaks from episode to episode, what must be remembered is."""

import json

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import torch
from conftest import load_script

lstm = load_script("algos/ppo_lstm.py")
each_memory = pytest.mark.parametrize("memory", ["lstm", "gru", "none"])


class Recall(gym.Env):
    """Shows 1 or -1 once, then nothing for a while, then asks (second entry): 1 for the action that fits, else -1.

    After d steps V = 1 is remembered at the question and gamma^(d - t) at step t; without memory the best is 0.
    """

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, delays=(4,)):
        self.delays = delays

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.delay = 0, int(self.np_random.choice(self.delays))
        self.sign = float(self.np_random.choice([-1, 1]))
        return np.array([self.sign, 0], np.float32), {}

    def step(self, action):
        asked, self.t = self.t == self.delay, self.t + 1
        reward = (1.0 if (action == 1) == (self.sign > 0) else -1.0) if asked else 0.0
        return np.array([0, self.t == self.delay], np.float32), reward, asked, False, {}


gym.register("Recall-v0", entry_point=Recall, reward_threshold=0.9)
gym.register("RecallVaried-v0", entry_point=Recall, kwargs={"delays": (1, 2, 3, 4, 5)})


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(num_envs=8, num_steps=32, num_minibatches=2, hidden=16, learning_rate=1e-2, eval_episodes=20, seed=3)
    return lstm.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns the saved agent and the summary."""
    args = settings(tmp_path, env, **changes)
    folder = lstm.train(args)
    env = lstm.make_env(args.env, hide_velocity=args.hide_velocity)
    agent = lstm.Agent(env.observation_space.shape[0], env.action_space, args.hidden, args.memory)
    agent.load_state_dict(lstm.load_checkpoint(str(folder))["parts"]["agent"])
    return agent, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def values_along(agent, *episode):
    """The critic's values of one episode's observations."""
    layers, state, values = agent.numpy_layers(), agent.blank(1), []
    for obs in episode:
        _, value, state = agent.act(layers, np.array([obs], np.float32).reshape(1, -1), state)
        values.append(value[0])
    return values


def random_rollout(memory, T=30, N=6):
    """An agent away from its initial weights, with statistics of observations, and a rollout that it did not play."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    agent = lstm.Agent(3, gym.spaces.Discrete(4), 8, memory)
    with torch.no_grad():
        for net in (agent.actor, agent.critic):
            for name, parameter in net.named_parameters():
                columns = parameter[:, :-1] if name in ("memory.weight", "memory.weight_ih_l0") else parameter
                columns += 0.5 * torch.randn_like(columns)
    agent.norm.update(rng.normal(0.5, 2, size=(100, 3)))
    obs, done = rng.normal(size=(T, N, 3)).astype(np.float32), rng.random((T, N)) < 0.15
    done[1:] &= ~done[:-1]
    state = 0.5 * rng.standard_normal(agent.blank(N).shape).astype(np.float32)
    assert done.any(0).all()
    return agent, obs, done, state


def chunk(agent, obs, done, state):
    """The actor's logits [T, N, A] and the critic's values [T, N], as learning computes them."""
    obs, done, state = agent.norm(torch.from_numpy(obs)), torch.from_numpy(done), torch.from_numpy(state)
    return agent.actor(obs, done, state[0]), agent.value(obs, done, state)


# The memory -----------------------------------------------------------------------------------


@each_memory
def test_stepping_one_by_one_gives_what_the_chunk_gives(memory):
    agent, obs, done, state = random_rollout(memory)
    logits, values = (x.detach().numpy() for x in chunk(agent, obs, done, state))
    layers, played = agent.numpy_layers(), []
    for t in range(len(obs)):
        outputs, _ = agent.actor.step(layers[0], obs[t], state[0])
        _, value, state = agent.act(layers, obs[t], state)
        state[:, :, done[t]] = 0
        played.append((outputs, value))
    for t, (outputs, value) in enumerate(played):
        valid = ~done[t]  # the others only reset
        np.testing.assert_allclose(outputs[valid], logits[t, valid], atol=2e-5)
        np.testing.assert_allclose(value[valid], values[t, valid], atol=2e-5)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_numpy_and_torch_remember_alike_without_our_inputs(memory):
    """Against torch's own cells, with neither ends nor normalisation: the equations, not their arrangement."""
    agent, obs, _, state = random_rollout(memory)
    agent.norm = lstm.RunningMeanStd(3)
    cell = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[memory](3, 8)
    weight = agent.actor.memory.weight_ih_l0.detach()
    cell.weight_ih.data, cell.bias_ih.data, cell.bias_hh.data[:] = weight[:, :3], weight[:, 3].clone(), 0
    cell.weight_hh.data = agent.actor.memory.weight_hh_l0.detach()
    layers, state = agent.actor.numpy_layers(agent.norm), state[0]
    hidden = [torch.from_numpy(x.copy()) for x in state]
    for t in range(5):
        hidden = cell(torch.from_numpy(obs[t]), tuple(hidden) if memory == "lstm" else hidden[0])
        hidden = list(hidden) if memory == "lstm" else [hidden]
        _, state = agent.actor.step(layers, obs[t], state)
        np.testing.assert_allclose(state, torch.stack(hidden).detach().numpy(), atol=1e-5)


@each_memory
def test_nothing_leaks_from_one_episode_into_the_next(memory):
    agent, obs, done, state = random_rollout(memory)
    done[:] = False
    done[10] = True
    outputs = chunk(agent, obs, done, state)
    obs[:11] += 1  # the last observation of the first episode too
    others = chunk(agent, obs, done, state + 1)
    for before, after in zip(outputs, others, strict=True):
        assert (before[11:] == after[11:]).all()
        assert (before[:10] != after[:10]).any(-1).all()
    fresh = chunk(agent, obs[11:], done[11:], agent.blank(obs.shape[1]))
    for before, after in zip(outputs, fresh, strict=True):
        torch.testing.assert_close(before[11:], after)
    # Nor does the gradient: what the first episode saw has no part in the loss of the second.
    inputs = torch.from_numpy(obs).requires_grad_()
    agent.value(agent.norm(inputs), torch.from_numpy(done), torch.from_numpy(state))[11:].square().sum().backward()
    assert (inputs.grad[:11] == 0).all() and (inputs.grad[11:] != 0).any()


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_a_memory_remembers(memory):
    agent, obs, done, state = random_rollout(memory)
    done[:] = False
    before = chunk(agent, obs, done, state)
    obs[0] += 1
    after = chunk(agent, obs, done, state)
    assert all(((x[5] - y[5]).abs() > 1e-6).any() for x, y in zip(before, after, strict=True))


@each_memory
def test_the_input_that_resets_is_never_trained(tmp_path, memory):
    agent, _ = trained(tmp_path, "Recall-v0", total_timesteps=2_000, memory=memory)
    fresh = lstm.Agent(2, gym.spaces.Discrete(2), 16, memory)
    for net, new in ((agent.actor, fresh.actor), (agent.critic, fresh.critic)):
        weight, first = (n.memory.weight if memory == "none" else n.memory.weight_ih_l0 for n in (net, new))
        assert (weight[:, -1] == first[:, -1]).all() and (weight[:, -2] != 0).any()


# The loop -------------------------------------------------------------------------------------


@each_memory
@pytest.mark.parametrize(("env", "num_steps"), [("RecallVaried-v0", 8), ("ProbeMarked-v0", 7), ("Pendulum-v1", 30)])
def test_what_is_learnt_is_what_was_played(tmp_path, monkeypatch, env, num_steps, memory):
    """Log-probabilities in the order of playing, with ends inside the rollout and states carried over its end."""
    played, learnt, ratios, ends = [], [], [], []
    act, logprobs_and_entropy, ppo_loss = lstm.Agent.act, lstm.Agent.logprobs_and_entropy, lstm.ppo_loss

    def spy_act(self, layers, obs, state, rng=None):
        actions, *rest = act(self, layers, obs, state, rng)
        if rng is not None:
            outputs = torch.from_numpy(self.actor.step(layers[0], obs, state[0])[0]).float()
            if self.discrete:
                pi = torch.distributions.Categorical(logits=outputs)
            else:
                pi = torch.distributions.Independent(torch.distributions.Normal(outputs, self.log_std.exp()), 1)
            played.append(pi.log_prob(torch.from_numpy(actions)).detach().numpy())
        return actions, *rest

    def spy_learn(self, obs, done, state, actions):
        result = logprobs_and_entropy(self, obs, done, state, actions)
        if not torch.is_grad_enabled():
            learnt.append(result[0].numpy())
            ends.append(done.numpy().copy())
        return result

    def spy_loss(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).abs().max().item())
        return ppo_loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(lstm.Agent, "act", spy_act)
    monkeypatch.setattr(lstm.Agent, "logprobs_and_entropy", spy_learn)
    monkeypatch.setattr(lstm, "ppo_loss", spy_loss)
    changes = dict(num_steps=num_steps, update_epochs=2, total_timesteps=4_000, norm_obs=True, memory=memory)
    lstm.train(settings(tmp_path, env, **changes))
    played, learnt, ends = np.array(played), np.concatenate(learnt), np.concatenate(ends)
    assert played.shape == learnt.shape == ends.shape and ends.sum() >= 8
    np.testing.assert_allclose(played[~ends], learnt[~ends], atol=1e-4)
    assert max(ratios[::4]) < 2e-6 and max(ratios) > 1e-3  # exactly 1 on the first minibatch of each update


def test_advantages_and_values_are_computed_once_a_rollout(tmp_path, monkeypatch):
    calls, original = [], lstm.gae

    def spy(rewards, values, *rest):
        calls.append(values)
        return original(rewards, values, *rest)

    monkeypatch.setattr(lstm, "gae", spy)
    args = settings(tmp_path, "Recall-v0", total_timesteps=2_000, update_epochs=3)
    rows = (lstm.train(args) / "metrics.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(calls) == len(rows) > 5 and calls[0].shape == (33, 8)


@each_memory
def test_the_value_after_the_last_step_remembers_the_episode(tmp_path, monkeypatch, memory):
    """V(s') where an episode ends is that of its last observation after all the others, not of a fresh memory."""
    given, checked, gae, learn = [], [], lstm.gae, lstm.Agent.logprobs_and_entropy

    def spy_gae(rewards, values, *rest):
        given.append(values.copy())
        return gae(rewards, values, *rest)

    def spy_learn(self, obs, done, state, actions):
        for n in range(obs.shape[1]) if not torch.is_grad_enabled() else ():  # before the first step of an update
            ends = torch.nonzero(done[:, n]).ravel().tolist()
            for before, last in zip(ends, ends[1:], strict=False):
                episode = obs[before + 1 : last + 1, n : n + 1]
                values = self.value(episode, torch.zeros(episode.shape[:2], dtype=bool), torch.tensor(self.blank(1)))
                np.testing.assert_allclose(given[-1][before + 1 : last + 1, n], values[:, 0], atol=1e-5)
                checked.append(episode[-1, 0, 0].item())
        return learn(self, obs, done, state, actions)

    monkeypatch.setattr(lstm, "gae", spy_gae)
    monkeypatch.setattr(lstm.Agent, "logprobs_and_entropy", spy_learn)
    lstm.train(settings(tmp_path, "ProbeMarked-v0", total_timesteps=1_000, memory=memory))
    assert len(checked) > 100 and set(checked) == {99}


@each_memory
def test_a_rollout_ends_with_the_value_with_which_the_next_begins(tmp_path, monkeypatch, memory):
    """Same observation, same episode so far; and weights that hardly moved in between."""
    given, gae = [], lstm.gae

    def spy(rewards, values, *rest):
        given.append(values.copy())
        return gae(rewards, values, *rest)

    monkeypatch.setattr(lstm, "gae", spy)
    changes = dict(num_steps=7, learning_rate=1e-12, memory=memory)
    lstm.train(settings(tmp_path, "RecallVaried-v0", total_timesteps=1_000, **changes))
    for values, following in zip(given, given[1:], strict=False):
        np.testing.assert_allclose(values[-1], following[0], atol=1e-6)
    assert np.ptp([values[-1] for values in given]) > 0.01


def test_minibatches_are_whole_environments_with_their_own_states(tmp_path, monkeypatch):
    shapes, original = set(), lstm.Agent.value

    def spy(self, obs, done, state):
        shapes.add((obs.shape, done.shape, state.shape))
        return original(self, obs, done, state)

    monkeypatch.setattr(lstm.Agent, "value", spy)
    lstm.train(settings(tmp_path, "Recall-v0", total_timesteps=600))
    assert shapes == {((32, 4, 2), (32, 4), (2, 2, 4, 16))}


@pytest.mark.parametrize(
    ("env", "episode", "expected", "changes"),
    [
        ("ProbeConstant-v0", [0], [1], {}),
        ("ProbeSign-v0", [1], [1], {}),
        ("ProbeDelayed-v0", [0, 1], [0.5, 1], {"gamma": 0.5}),
        ("ProbeDelayed-v0", [0, 1], [0.5, 1], {"gamma": 0.5, "num_steps": 4, "num_envs": 32}),
        ("ProbeTruncated-v0", [0], [2], {"gamma": 0.5, "memory": "none"}),
        ("ProbeTruncated-v0", [0], [1], {"gamma": 0.5, "bootstrap_truncated": False}),
        ("ProbeContinuous-v0", [-1], [0], {"total_timesteps": 30_000, "num_envs": 32}),
    ],
)
def test_probe_environments_learn_their_value(tmp_path, env, episode, expected, changes):
    agent, _ = trained(tmp_path, env, **({"total_timesteps": 8_000} | changes))
    np.testing.assert_allclose(values_along(agent, *episode), expected, atol=0.1)


# What must be remembered ----------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_what_was_seen_once_is_known_when_asked(tmp_path, memory):
    changes = dict(total_timesteps=30_000, memory=memory, gamma=0.8, num_envs=32)
    agent, summary = trained(tmp_path, "Recall-v0", **changes)
    assert summary["eval_return_mean"] == 1 and summary["solved_step"] is not None
    for sign in (-1, 1):
        values = values_along(agent, [sign, 0], [0, 0], [0, 0], [0, 0], [0, 1])
        np.testing.assert_allclose(values, [0.8**4, 0.8**3, 0.8**2, 0.8, 1], atol=0.1)


def test_without_memory_asking_is_tossing_a_coin(tmp_path):
    changes = dict(total_timesteps=30_000, memory="none", gamma=0.8, num_envs=32, eval_episodes=200)
    agent, summary = trained(tmp_path, "Recall-v0", **changes)
    assert abs(summary["eval_return_mean"]) < 0.25 and summary["solved_step"] is None
    np.testing.assert_allclose(values_along(agent, [0, 0], [0, 1]), [0, 0], atol=0.15)


def test_evaluation_remembers_each_episode_for_itself(tmp_path):
    """Episodes of different lengths are played at once: states must stay with their episodes when others end."""
    changes = dict(total_timesteps=40_000, num_envs=32, norm_obs=True, eval_episodes=100)
    assert trained(tmp_path, "RecallVaried-v0", **changes)[1]["eval_return_mean"] == 1


# Velocities -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "hidden"),
    [("CartPole-v1", [1, 3]), ("Pendulum-v1", [2]), ("Acrobot-v1", [4, 5]), ("LunarLander-v3", [2, 3, 5])],
)
def test_velocities_are_hidden_and_nothing_else(env_id, hidden):
    whole, part = lstm.make_env(env_id), lstm.make_env(env_id, hide_velocity=True)
    seen = np.delete(whole.reset(seed=1)[0], hidden)
    np.testing.assert_array_equal(part.reset(seed=1)[0], seen)
    action = whole.action_space.sample()
    np.testing.assert_array_equal(part.step(action)[0], np.delete(whole.step(action)[0], hidden))
    assert part.observation_space.shape == seen.shape and part.observation_space.contains(part.step(action)[0])
    envs = lstm.make_envs(env_id, 3, hide_velocity=True)
    assert envs.reset(seed=1)[0].shape == (3, *seen.shape)
    assert lstm.make_envs(env_id, 3, hide_velocity=False).single_observation_space == whole.observation_space


def test_other_environments_run_as_they_are():
    assert lstm.make_env("MountainCar-v0", hide_velocity=True).observation_space.shape == (2,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_minibatches": 9}, "whole environment"),
        ({"num_steps": 2}, "whole environment"),
        ({"env": "ProbeUnsupportedActions-v0"}, "Discrete and Box"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, capsys, changes, says):
    with pytest.raises(SystemExit) as stop:
        lstm.train(settings(tmp_path / "runs", **({"env": "CartPole-v1"} | changes)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_cartpole_without_velocities_is_solved_and_not_without_memory(tmp_path):
    scores = {}
    for memory in ("lstm", "none"):
        argv = ["--run-dir", str(tmp_path), "--memory", memory, "--seed", "7", "--eval-episodes", "20"]
        folder = lstm.train(lstm.parse_args(argv))
        scores[memory] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert scores["lstm"]["solved_step"] < 180_000 and scores["lstm"]["eval_return_mean"] >= 475
    assert scores["none"]["solved_step"] is None and scores["none"]["eval_return_mean"] < 200


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_what_the_memory_hears_starts_loud_and_without_bias(memory):
    """Orthogonal columns of length 5 a gate; no bias; the column that resets stands apart."""
    torch.manual_seed(0)
    net = lstm.Net(memory, inputs=3, hidden=16, outputs=2, last_std=0.01)
    weight = next(net.memory.parameters()).detach()  # [gates * 16, 3 + 2]
    for gate in weight.split(16):
        torch.testing.assert_close(gate[:, :3].T @ gate[:, :3], 25 * torch.eye(3))
    assert (weight[:, 3] == 0).all() and set(weight[:, 4].tolist()) <= {0.0, -1e4}
