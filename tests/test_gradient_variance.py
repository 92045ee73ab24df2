"""The instrument that measures the gradient's noise: known gradients, known variances, two paths to one number."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import gradient_variance  # noqa: E402

reinforce, a2c = load_script("algos/reinforce.py"), load_script("algos/a2c_gae.py")


def noise(agent, args, samples, budget, mean_length=22.0):
    rng = np.random.default_rng(0)
    return gradient_variance.gradient_noise(*gradient_variance.estimate(args, agent, mean_length, samples, budget, rng))


def make_agent():
    torch.manual_seed(0)
    return reinforce.Agent(4, gym.spaces.Discrete(2), 8)


def test_the_noise_of_known_gradients():
    gradients = np.random.default_rng(0).normal(size=(6, 5)) + 1
    variance, snr, cosine = gradient_variance.gradient_noise(torch.from_numpy(gradients), share=0.5)
    trace, mean = np.trace(np.cov(gradients.T)), gradients.mean(0)
    others = [np.delete(gradients, k, axis=0).mean(0) for k in range(6)]
    cosines = [g @ o / np.linalg.norm(g) / np.linalg.norm(o) for g, o in zip(gradients, others, strict=True)]
    assert variance == pytest.approx(0.5 * trace, rel=1e-5)
    assert snr == pytest.approx((mean @ mean - trace / 6) / (0.5 * trace), rel=1e-5)
    assert cosine == pytest.approx(np.mean(cosines), rel=1e-5)


def test_orthogonal_gradients_have_no_signal():
    variance, snr, cosine = gradient_variance.gradient_noise(torch.eye(3, 4), 2.0)
    assert variance == pytest.approx(2.0 * 1.0)  # each of three coordinates has the variance 1/3
    assert snr == pytest.approx(0.0, abs=1e-6) and cosine == pytest.approx(0.0, abs=1e-6)


def test_there_is_no_signal_in_pure_noise():
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 200)))
    _, snr, cosine = gradient_variance.gradient_noise(rows, share=1.0)
    assert abs(snr) < 0.01 and abs(cosine) < 0.05  # |mean|^2 / trace would be 1/64, the plain cosine 1/8


def test_the_measured_variance_belongs_to_one_budget_of_steps():
    """Estimates of twice the budget have half the variance; more steps than the budget are accounted for."""
    agent, args = make_agent(), reinforce.Args(baseline="none", gamma=1.0)
    small, large = (noise(agent, args, 48, budget)[0] for budget in (512, 1024))
    assert 1.5 < small / large < 2.7
    doubled = noise(agent, args, 48, 512, mean_length=11.0)[0]  # twice the episodes
    assert 0.7 < doubled / small < 1.4


def test_a_worse_critic_makes_more_noise():
    """At lambda 1 a critic far from the truth leaves the gradient alone and adds to its variance only."""
    agent, args = make_agent(), a2c.Args(gamma=1.0, gae_lambda=1.0)
    found = []
    for value in (100.0, 12.0):
        agent.value = lambda obs, value=value: torch.full_like(obs[..., 0], value)
        found.append(noise(agent, args, 32, 256)[0])
    assert found[0] > 5 * found[1]


def test_lambda_one_over_whole_episodes_is_reinforce_with_the_value_baseline():
    agent = make_agent()
    one = noise(agent, a2c.Args(gae_lambda=1.0), 4, 256)
    other = noise(agent, reinforce.Args(baseline="value"), 4, 256)
    np.testing.assert_allclose(one, other, rtol=1e-3)
