"""Small fast runs, of the policy-gradient scripts above all, and what they leave behind."""

import csv
import json

import pytest
import torch


def settings(script, folder, env, **changes):
    """The script's settings for a run of seconds."""
    small = dict(num_envs=8, total_timesteps=3_000, hidden=16, learning_rate=1e-2, eval_episodes=2, seed=3)
    return script.Args(env=env, run_dir=str(folder), **(small | changes))


def trained(script, folder, env, **changes):
    """Trains, and returns the saved agent and the summary."""
    args = settings(script, folder, env, **changes)
    run = script.train(args)
    env = script.make_env(args.env)
    agent = script.Agent(env.observation_space.shape[0], env.action_space, args.hidden)
    agent.load_state_dict(script.load_checkpoint(str(run))["parts"]["agent"])
    return agent, json.loads((run / "summary.json").read_text())


def preset_summary(script, folder, *flags):
    """Trains with the preset, and returns the summary."""
    argv = ["--run-dir", str(folder), "--eval-episodes", "20", *flags]
    run = script.train(script.parse_args(argv))
    return json.loads((run / "summary.json").read_text())


def metrics(run):
    """The rows of metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def check_entropy_bonus_holds_the_policy_back(script, folder, **changes):
    """Action 1 pays: without a bonus the policy commits itself, with a large one it stays near log 2 nats."""
    entropies = []
    for ent_coef in (0.0, 10.0):
        args = settings(script, folder, "ProbeActionDependent-v0", ent_coef=ent_coef, **changes)
        entropies.append(float(metrics(script.train(args))[-1]["losses/entropy"]))
    assert entropies[0] < 0.3 and entropies[1] > 0.65


def watch_td_targets(script, monkeypatch, double):
    """Checks what each update hands to td_target against the online network's own values at that moment.

    With double those are handed over, otherwise nothing is. Returns a list that fills during the run:
    whether the target network's values were the online network's.
    """
    online, batches, same = [], [], []
    init, batch, td_target = script.QNetwork.__init__, script.Replay.batch, script.td_target

    def recorded_batch(self, *args):
        batches.append(batch(self, *args))
        return batches[-1]

    def checked_td_target(returns, discounts, next_q, next_q_online=None):
        expected = online[0](torch.from_numpy(batches[-1][4]))
        assert (next_q_online is not None) == double
        if double:
            torch.testing.assert_close(next_q_online, expected)
        same.append(torch.allclose(next_q, expected))
        return td_target(returns, discounts, next_q, next_q_online)

    monkeypatch.setattr(script.QNetwork, "__init__", lambda self, *args: (init(self, *args), online.append(self))[0])
    monkeypatch.setattr(script.Replay, "batch", recorded_batch)
    monkeypatch.setattr(script, "td_target", checked_td_target)
    return same


def check_one_line_of_error(run, message, capsys, folder):
    """Bad settings end the run with one line and status 2, and leave no file."""
    with pytest.raises(SystemExit) as stop:
        run()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(folder.iterdir())


def interrupt_at_report(script, monkeypatch, count, run):
    """Runs run() until the script's count-th report, saves there, and presses Ctrl-C."""
    report, calls = script.Run.report, []

    def stop(self, step, metrics):
        report(self, step, metrics)
        self.save()
        calls.append(step)
        if len(calls) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "report", stop)
        with pytest.raises(SystemExit):
            run()


def check_refused(script, flags, message, capsys, folder):
    """The script's command line with these flags ends with one line of error."""
    argv = ["--run-dir", str(folder), *flags.split()]
    check_one_line_of_error(lambda: script.train(script.parse_args(argv)), message, capsys, folder)


def count_calls(script, patch, *names):
    """How often the script calls these functions of its own from now on, by name; a dict that fills."""
    counts = dict.fromkeys(names, 0)

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in names:
        patch.setattr(script, name, counted(name, getattr(script, name)))
    return counts
