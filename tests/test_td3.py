"""TD3: what differs from SAC, by hand and by watching it; what does not differ is the same text."""

import numpy as np
import probes  # noqa: F401 - registers its environments
import pytest
import small_runs
import torch
from conftest import load_script
from test_house import definitions

td3 = load_script("algos/td3.py")


def settings(tmp_path, env, **changes):
    """The settings of a small fast run."""
    small = dict(total_timesteps=6000, num_envs=8, buffer_size=4000, learning_starts=200, train_frequency=8,
                 batch_size=64, tau=0.05, hidden=32, learning_rate=5e-3, gamma=0.9, policy_frequency=1,
                 eval_episodes=2, seed=3)  # fmt: skip
    return td3.Args(env=env, run_dir=str(tmp_path), **(small | changes))


def trained(tmp_path, env, **changes):
    """Trains, and returns the networks by name."""
    args = settings(tmp_path, env, **changes)
    parts, env = td3.load_checkpoint(str(td3.train(args)))["parts"], td3.make_env(env)
    sizes = env.observation_space.shape[0], int(np.prod(env.action_space.shape)), args.hidden
    nets = {"actor": td3.Actor(*sizes), "target_actor": td3.Actor(*sizes)}
    nets |= {name: td3.Critics(*sizes, args.num_critics, args.layer_norm) for name in ("critics", "target_critics")}
    for name, net in nets.items():
        net.load_state_dict(parts[name])
    return nets


def test_what_td3_and_sac_share_is_the_same_text():
    ours, theirs = definitions("algos/td3.py"), definitions("algos/sac.py")
    own = {"Args", "Actor", "actor_loss", "critic_loss", "train", "evaluate"}
    shared = set(ours) & set(theirs) - own
    assert {"Critics", "Replay", "n_step_return", "update_target", "to_env", "make_envs"} <= shared
    for name in shared:
        assert ours[name] == theirs[name], name


# The mathematics ------------------------------------------------------------------------------


def test_smoothing_by_hand():
    actions, noise = torch.tensor([[0.0, 0.9, -0.5]]), torch.tensor([[0.3, 0.3, -2.0]])
    torch.testing.assert_close(td3.smooth(actions, noise, 0.4), torch.tensor([[0.3, 1.0, -0.9]]))
    assert torch.equal(td3.smooth(actions, noise, 0.0), actions)


def test_target_by_hand():
    returns, discounts = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.0])
    next_q = torch.tensor([[10.0, 20.0, 30.0], [12.0, 4.0, 50.0]])
    assert td3.td_target(returns, discounts, next_q).tolist() == [6.0, 4.0, 3.0]  # the lesser; nothing after the end
    with pytest.raises(AssertionError):  # [B, 1] would broadcast to [B, B]
        td3.td_target(returns[:, None], discounts, next_q)


def test_the_actors_gradient_is_the_deterministic_policy_gradient():
    """With Q = -(a - 0.3)^2 it is the mean of -2 (a - 0.3) da/dw, here through a single weight."""
    weight, obs = torch.tensor(0.4, requires_grad=True), torch.tensor([0.5, -1.0])
    actions = (weight * obs).tanh()
    td3.actor_loss(-((actions - 0.3) ** 2)).backward()
    a = torch.tanh(0.4 * obs)
    assert weight.grad.item() == pytest.approx((2 * (a - 0.3) * (1 - a**2) * obs).mean().item(), rel=1e-5)


def test_acting_in_numpy_equals_the_network_plus_noise_within_bounds():
    torch.manual_seed(0)
    actor, obs = td3.Actor(4, 2, 16), torch.randn(5, 4)
    assert np.abs(actor.act(obs.numpy(), 0)).max() < 0.05  # untrained it names nearly 0
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 0.3
        named = actor(obs).numpy()
    np.testing.assert_allclose(actor.act(obs.numpy(), 0), named, atol=1e-5)
    noise = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_allclose(actor.act(obs.numpy(), noise), np.clip(named + noise, -1, 1), atol=1e-5)


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, dict(n_step=3, layer_norm=True)], ids=["plain", "extended"])
@pytest.mark.parametrize("probe, q_at", [("Delayed", {0: 0.9, 1: 1.0}), ("Truncated", {0: 10.0}),
                                         ("Marked", {0: 2.71, 1: 1.9, 2: 1.0})])  # fmt: skip
def test_probe_values(tmp_path, probe, q_at, flags):
    critics = trained(tmp_path, f"Box{probe}-v0", **flags)["critics"]
    q = critics.values(np.array(list(q_at))[:, None], np.zeros((len(q_at), 1)))
    np.testing.assert_allclose(q, list(q_at.values()), rtol=0.07, atol=0.04)


def test_actor_finds_the_best_action_between_lopsided_bounds(tmp_path):
    actor = trained(tmp_path, "AimFar-v0", total_timesteps=10_000, policy_noise=0.1)["actor"]
    aims = np.random.default_rng(0).uniform(-0.7, 0.7, (50, 2)).astype(np.float32)
    assert np.abs(actor.act(aims, 0) - aims).mean() < 0.06


def test_noise_is_wide_at_first_then_as_told_and_of_each_environments_own(tmp_path, monkeypatch):
    played, add = [], td3.Replay.add

    def spy(self, actions, *rest):
        played.append(actions.reshape(-1))
        add(self, actions, *rest)

    monkeypatch.setattr(td3.Replay, "add", spy)
    trained(tmp_path, "Aim-v0", total_timesteps=6000, learning_starts=2000, learning_rate=1e-9, exploration_noise=0.2)
    first, later = np.array(played[:200]), np.array(played[500:])  # untrained throughout: all of it is noise
    assert np.abs(first).max() == 1 and 0.6 < first.std() < 0.8  # deviation 1, clipped
    assert later.std() == pytest.approx(0.2, rel=0.05)
    correlations = np.corrcoef(later.T) - np.eye(later.shape[1])
    assert np.abs(correlations).max() < 0.25


def test_actor_and_targets_move_at_every_policy_frequency_th_step(tmp_path, monkeypatch):
    for frequency, delay in ((4, 1), (8, 2), (20, 3)):
        with monkeypatch.context() as patch:
            counts = small_runs.count_calls(td3, patch, "critic_loss", "update_target", "actor_loss")
            trained(tmp_path, "BoxDelayed-v0", total_timesteps=1000, train_frequency=frequency, policy_frequency=delay)
        assert counts["critic_loss"] == pytest.approx(800 / frequency, abs=3)
        assert counts["actor_loss"] == pytest.approx(counts["critic_loss"] / delay, abs=1)
        assert counts["update_target"] == 2 * counts["actor_loss"]  # the critics' and the actor's


def test_slow_target_critics_teach_hardly_anything(tmp_path):
    """Where every step goes on for ever, Q is what a step gives plus what the targets say of the next: still 0 here."""
    nets = trained(tmp_path, "BoxTruncated-v0", tau=1e-6)
    q, target = (nets[name].values(np.zeros((1, 1)), np.zeros((1, 1)))[0] for name in ("critics", "target_critics"))
    assert abs(target) < 0.5 and q == pytest.approx(1 + 0.9 * target, abs=0.1)


def test_the_target_values_the_target_actors_smoothed_action(tmp_path, monkeypatch):
    """With targets that hardly move the next actions stay those of the untrained actor, 0, with clipped noise."""
    seen, smooth = [], td3.smooth

    def spy(actions, noise, clip):
        seen.append((actions.clone(), smooth(actions, noise, clip)))
        return seen[-1][1]

    monkeypatch.setattr(td3, "smooth", spy)
    nets = trained(tmp_path, "Aim-v0", tau=1e-6, policy_noise=0.2, noise_clip=0.3)
    aims = torch.tensor([[0.7, -0.7]])
    assert nets["actor"](aims).abs().min() > 0.4 and nets["target_actor"](aims).abs().max() < 0.05
    named, smoothed = (torch.cat(column) for column in zip(*seen, strict=True))
    assert named.abs().max() < 0.05
    assert (smoothed - named).abs().max() == pytest.approx(0.3, abs=1e-5)
    assert (smoothed - named).std() == pytest.approx(0.175, abs=0.01)  # a deviation of .2, clipped at .3


def test_actor_follows_the_first_critic_and_teaches_none(tmp_path, monkeypatch):
    made, learning, asked = [], [], []
    init, actor_loss, forward = td3.Critics.__init__, td3.actor_loss, td3.nn.Sequential.forward
    monkeypatch.setattr(td3.Critics, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])

    def spy(q):
        learning.append([p.requires_grad for p in made[0].parameters()])
        return actor_loss(q)

    def noted(self, x):
        asked.extend(k for k, net in enumerate(made[0].nets) if net is self)
        return forward(self, x)

    monkeypatch.setattr(td3, "actor_loss", spy)
    monkeypatch.setattr(td3.nn.Sequential, "forward", noted)
    trained(tmp_path, "BoxSign-v0", total_timesteps=400)
    assert learning and not any(map(any, learning))
    assert all(p.requires_grad for p in made[0].parameters())  # afterwards they learn again
    assert asked.count(0) - asked.count(1) == len(learning)  # the actor asks the first only


def test_after_resuming_the_trained_actor_plays_with_its_usual_noise(tmp_path, monkeypatch):
    args = settings(tmp_path, "Aim-v0", total_timesteps=1000)
    args.resume, args.total_timesteps = str(td3.train(args)), 1400
    noises, act = [], td3.Actor.act
    monkeypatch.setattr(td3.Actor, "act", lambda self, obs, noise: (noises.append(noise), act(self, obs, noise))[1])
    td3.train(args)
    assert np.std([noise for noise in noises if np.ndim(noise)]) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--exploration-noise -1", "--exploration-noise must be >= 0"),
        ("--noise-clip -0.5", "--noise-clip must be >= 0"),
        ("--tau 1.5", "--tau must be in [0, 1]"),
        ("--env CartPole-v1", "this script handles Box"),
    ],
)
def test_bad_settings_end_with_one_line(flags, message, tmp_path, capsys):
    small_runs.check_refused(td3, flags, message, capsys, tmp_path)


def test_learns_pendulum(tmp_path):
    """A random player gets -1,200."""
    assert small_runs.preset_summary(td3, tmp_path, "--total-timesteps", "20000")["eval_return_mean"] > -250
