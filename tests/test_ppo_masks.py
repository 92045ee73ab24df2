"""PPO with masks and MultiDiscrete actions: the distributions by hand, the masks in their place, learning."""

import csv
import json

import gymnasium as gym
import masked_envs
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import load_script
from masked_envs import NVEC

ppo, masks = load_script("algos/ppo.py"), load_script("algos/ppo_masks.py")
SPACE = gym.spaces.MultiDiscrete(NVEC)  # components of 2, 3, 4 and 5 choices


def settings(tmp_path, env, script=masks, **changes):
    """The settings of a small fast run."""
    small = dict(num_envs=8, num_steps=32, num_minibatches=2, hidden=16, learning_rate=1e-2, eval_episodes=2, seed=3)
    return script.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def random_agent_and_masks(rows, seed=0):
    """An agent far from uniform on SPACE, and masks [rows, 14] that leave each component at least one choice."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    agent, allowed = masks.Agent(3, SPACE, 8), rng.random((rows, NVEC.sum())) < 0.5
    for part in masks.by_component(allowed, agent.choices):
        part[np.arange(rows), rng.integers(part.shape[1], size=rows)] = True
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter += torch.randn_like(parameter)
    return agent, allowed


# The distributions ----------------------------------------------------------------------------


def test_masked_probabilities_entropy_and_gradients_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.float64, requires_grad=True)
    logprobs = masks.masked_log_softmax(logits, torch.tensor([[True, False, True]]))
    p, q = 1 / (1 + np.e), np.e / (1 + np.e)  # the softmax of 1 and 2; the 5 is forbidden
    probabilities = logprobs.exp()
    np.testing.assert_allclose(probabilities.detach().numpy(), [[p, 0, q]], rtol=1e-12)
    assert probabilities[0, 1] == 0
    (gradient,) = torch.autograd.grad(logprobs[0, 0], logits, retain_graph=True)
    np.testing.assert_allclose(gradient.numpy(), [[1 - p, 0, -q]], rtol=1e-12)
    entropy = -(probabilities * logprobs).sum()
    assert entropy.item() == pytest.approx(-p * np.log(p) - q * np.log(q))
    (gradient,) = torch.autograd.grad(entropy, logits)
    np.testing.assert_allclose(gradient.numpy(), [[-p * q * np.log(p / q), 0, p * q * np.log(p / q)]], rtol=1e-12)


def test_components_of_unequal_sizes_equal_distributions_over_their_valid_choices():
    agent, allowed = random_agent_and_masks(50)
    obs, rng = torch.randn(50, 3), np.random.default_rng(1)
    actions = agent.act(agent.numpy_layers(), obs.numpy(), allowed, rng)
    logprobs, entropies = agent.logprobs_and_entropy(obs, torch.from_numpy(allowed), torch.from_numpy(actions))
    outputs = agent.actor(obs).detach().numpy().astype(float)
    for n in range(50):
        logprob = entropy = 0.0
        start = 0
        for c, size in enumerate(NVEC.ravel()):
            valid = np.flatnonzero(allowed[n, start : start + size])
            weights = np.exp(outputs[n, start + valid])
            logprob += np.log(weights[valid == actions[n, c]] / weights.sum()).item()
            entropy += scipy.stats.entropy(weights / weights.sum())
            start += size
        assert logprobs[n].item() == pytest.approx(logprob, abs=1e-4)
        assert entropies[n].item() == pytest.approx(entropy, abs=1e-4)


def test_forbidden_choices_have_neither_gradient_nor_nan_even_where_one_is_left():
    agent, allowed = random_agent_and_masks(20)
    allowed[:, :2] = [True, False]  # nothing to choose in the first component
    outputs = torch.randn(20, NVEC.sum(), requires_grad=True)
    agent.actor = torch.nn.Identity()
    actions = np.stack([part.argmax(-1) for part in masks.by_component(allowed, agent.choices)], -1)
    logprobs, entropies = agent.logprobs_and_entropy(outputs, torch.from_numpy(allowed), torch.from_numpy(actions))
    (logprobs + entropies).sum().backward()
    assert outputs.grad.isfinite().all()
    assert (outputs.grad[torch.from_numpy(~allowed)] == 0).all() and (outputs.grad[:, 0].abs() < 1e-6).all()
    assert outputs.grad.abs().max() > 0.1


def test_the_numpy_policy_samples_the_torch_policy():
    agent, allowed = random_agent_and_masks(1)
    agent.norm.update(np.random.default_rng(0).normal(0.5, 2, size=(100, 3)))
    obs, draws = np.ones((100_000, 3), np.float32), np.repeat(allowed, 100_000, 0)
    actions = agent.act(agent.numpy_layers(), obs, draws, np.random.default_rng(0))
    outputs = agent.actor(agent.norm(torch.ones(1, 3))).detach().numpy()[0]
    greedy = agent.act(agent.numpy_layers(), obs[:1], allowed)[0]
    parts = [masks.by_component(x, agent.choices) for x in (outputs, allowed[0])]
    for c, (logits, valid) in enumerate(zip(*parts, strict=True)):
        weights = np.exp(logits) * valid
        frequencies = np.bincount(actions[:, c], minlength=len(weights)) / len(actions)
        np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=4 * np.sqrt(0.25 / len(actions)))
        assert (frequencies[~valid] == 0).all() and greedy[c] == weights.argmax()


def test_masks_are_flattened_as_the_actions_are():
    nested = tuple(tuple(np.arange(n) % 2 for n in row) for row in NVEC)
    expected = np.concatenate([np.arange(n) % 2 for n in NVEC.ravel()]).astype(bool)
    assert masks.flat(nested).tolist() == expected.tolist()
    assert masks.flat(expected.astype(np.int8)).tolist() == masks.flat(expected.tolist()).tolist() == expected.tolist()
    assert masks.to_env(SPACE, np.array([[0, 1, 2, 3]])).tolist() == [[[0, 1], [2, 3]]]
    assert masks.to_env(gym.spaces.Discrete(3, start=-1), np.array([[0], [2]])).tolist() == [-1, 1]
    assert masks.to_env(gym.spaces.MultiDiscrete([3, 3], start=[5, 7]), np.array([[0, 2]])).tolist() == [[5, 9]]


# The masks in their place ---------------------------------------------------------------------


class Told(gym.Env):
    """Three random bits an observation, which are the mask too; 0 reward, ends at random, all masked at the end."""

    observation_space, action_space = gym.spaces.Box(0, 1, (3,)), gym.spaces.Discrete(3)
    ending_bits = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.look()

    def step(self, action):
        assert self.bits[action], "a forbidden action"
        obs, info = self.look()
        ended = self.np_random.random() < 0.2
        if ended:
            obs, info = np.float32(self.ending_bits), {"action_mask": self.ending_bits}
        return obs, 0.0, ended, False, info

    def look(self):
        self.bits = np.float32(self.np_random.random(3) < 0.3)
        self.bits[self.np_random.integers(3)] = 1
        return self.bits, {"action_mask": self.bits.astype(np.int8)}


class Stuck(Told):
    """Has no valid action at its second observation and goes on."""

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {"action_mask": np.zeros(3)}


class WrongLength(Told):
    def look(self):
        return np.ones(3, np.float32), {"action_mask": np.ones(4)}


class Silent(Told):
    """Gives no masks, and has a Box beside it in Continuous."""

    def look(self):
        self.bits = np.ones(3)
        return np.ones(3, np.float32), {"found": np.zeros(self.np_random.integers(1, 9))}


class Continuous(Silent):
    action_space = gym.spaces.Box(-1, 1, (1,))


for kind in (Told, Stuck, WrongLength, Silent, Continuous):
    gym.register(f"Masks{kind.__name__}-v0", entry_point=kind, max_episode_steps=50)


def test_every_row_is_played_learnt_and_evaluated_with_its_own_mask(tmp_path, monkeypatch):
    rows, original = [], masks.Agent.logprobs_and_entropy

    def spy(self, obs, allowed, actions):
        rows.append((obs.numpy() == 1, allowed.numpy(), actions.numpy()))
        return original(self, obs, allowed, actions)

    monkeypatch.setattr(masks.Agent, "logprobs_and_entropy", spy)
    masks.train(settings(tmp_path, "MasksTold-v0", total_timesteps=2_000, eval_episodes=20))  # Told asserts the rest
    assert len(rows) > 10
    for obs, allowed, actions in rows:
        assert (obs == allowed).all() and allowed.any(1).all() and not allowed.all()
        assert np.take_along_axis(allowed, actions, 1).all()


def test_the_ratio_is_one_on_the_first_minibatch_of_every_update(tmp_path, monkeypatch):
    calls, original = [], masks.ppo_loss

    def spy(logprobs, old_logprobs, *rest):
        calls.append((logprobs - old_logprobs).abs().max().item())
        return original(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(masks, "ppo_loss", spy)
    masks.train(settings(tmp_path, "masked_envs:Locks-v0", total_timesteps=1_500, update_epochs=2))
    assert len(calls) > 12 and max(calls[::4]) < 2e-6 and max(calls) > 1e-3


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ("MasksStuck-v0", "leaves nothing to choose from"),
        ("MasksWrongLength-v0", "4 entries and the action space 3 choices"),
        ("MasksContinuous-v0", "Discrete and MultiDiscrete"),
    ],
)
def test_what_cannot_be_masked_ends_with_one_line(tmp_path, capsys, env, says):
    with pytest.raises(SystemExit) as stop:
        masks.train(settings(tmp_path, env))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_where_there_is_no_mask_that_is_said(tmp_path, capsys):
    masks.train(settings(tmp_path, "MasksSilent-v0", total_timesteps=300))
    assert "MasksSilent-v0 gives no action_mask" in capsys.readouterr().out
    masks.train(settings(tmp_path, "MasksTold-v0", total_timesteps=300))
    assert "action_mask" not in capsys.readouterr().out


def test_without_masks_it_is_ppo(tmp_path):
    """An environment without a vectorised version of its own: the same numbers as ppo.py, column by column."""
    tables = []
    for script in (ppo, masks):
        folder = script.train(settings(tmp_path / script.__name__, "Acrobot-v1", script, total_timesteps=2_000))
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            tables.append([{k: v for k, v in row.items() if "SPS" not in k and k != "seconds"}
                           for row in csv.DictReader(file)])  # fmt: skip
    assert len(tables[0]) == len(tables[1]) == 8
    for row, other in zip(*tables, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == other[key] or float(row[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-5)


# Learning -------------------------------------------------------------------------------------

SMALL = dict(num_envs=16, num_steps=64, num_minibatches=4, hidden=32, learning_rate=5e-3, eval_episodes=10)


def test_masks_solve_the_rooms_in_a_quarter_of_the_steps_and_never_touch_a_trapdoor(tmp_path, monkeypatch):
    monkeypatch.setattr(masked_envs.Trapdoors, "played_forbidden", 0)
    changes = SMALL | dict(total_timesteps=40_000, seed=1)
    summary = summary_of(masks.train(settings(tmp_path, "masked_envs:Trapdoors-v0", **changes)))
    assert masked_envs.Trapdoors.played_forbidden == 0
    assert summary["eval_return_mean"] == 10 and summary["solved_step"] < 10_000
    without = settings(tmp_path, "masked_envs:TrapdoorsUnmasked-v0", ppo, **(changes | dict(total_timesteps=200_000)))
    without.total_timesteps = 4 * summary["solved_step"]
    assert summary_of(ppo.train(without))["solved_step"] is None
    assert masked_envs.Trapdoors.played_forbidden > 1_000


def test_the_best_combination_of_valid_digits_is_found(tmp_path):
    changes = SMALL | dict(total_timesteps=40_000, seed=1)
    summary = summary_of(masks.train(settings(tmp_path, "masked_envs:Locks-v0", **changes)))
    assert summary["eval_return_mean"] == 24 and summary["solved_step"] is not None  # Locks asserts valid digits


def test_taxi_is_learnt_with_its_masks(tmp_path):
    args = masks.parse_args(["--run-dir", str(tmp_path), "--total-timesteps", "80000"])
    assert summary_of(masks.train(args))["eval_return_mean"] > 7
