import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import optimizer as O

SETTINGS = dict(learning_rate=2e-4, warmup_steps=3, b1=0.9, b2=0.999, eps=1e-8,
                eps_rule="tensorflow")


def run(grads, **changes):
    tx = O.make_optimizer(**{**SETTINGS, **changes})
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    state = tx.init(params)
    trail = []
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        trail.append(np.asarray(params["w"], np.float64))
    return trail


@pytest.mark.parametrize("rule", O.EPS_RULES)
def test_adam_with_warmup_against_float64_by_hand(rule):
    rng = np.random.default_rng(0)
    grads = [(rng.standard_normal(3) * 10.0 ** -k).astype(np.float32) for k in (0, 3, 6, 7, 8)]
    m = v = np.zeros(3)
    w = np.array([1.0, -2.0, 0.5])
    for n, g in enumerate(grads):
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c1, c2 = 1 - 0.9 ** (n + 1), 1 - 0.999 ** (n + 1)
        lr = 2e-4 * min(n / 3, 1.0)
        if rule == "tensorflow":
            w = w - lr * np.sqrt(c2) / c1 * m / (np.sqrt(v) + 1e-8)
        else:
            w = w - lr * (m / c1) / (np.sqrt(v / c2) + 1e-8)
        np.testing.assert_allclose(run(grads, eps_rule=rule)[n], w, rtol=0, atol=3e-7)


def test_the_first_update_is_zero_and_the_ramp_ends():
    trail = run([np.ones(3, np.float32)] * 5)
    np.testing.assert_array_equal(trail[0], [1.0, -2.0, 0.5])
    rate = O.warmup(2e-4, 5000)
    assert [float(rate(n)) for n in (0, 2500, 5000, 9999)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])
    assert float(O.warmup(2e-4, 0)(0)) == pytest.approx(2e-4)


def test_a_cosine_takes_the_rate_to_zero_and_no_further():
    rate = O.learning_rates(2e-4, 100, 1000)
    got = [float(rate(n)) for n in (50, 100, 250, 500, 750, 1000, 5000)]
    eighth, third = np.cos(np.pi / 8) ** 2, np.cos(np.pi * 3 / 8) ** 2    # (1 + cos 2x) / 2
    assert got == pytest.approx(
        [1e-4 * np.cos(np.pi / 40) ** 2, 2e-4 * np.cos(np.pi / 20) ** 2, 2e-4 * eighth, 1e-4,
         2e-4 * third, 0, 0], rel=1e-5, abs=1e-12)
    grads = [np.full(3, 0.5, np.float32)] * 4
    trail = run(grads, warmup_steps=0, decay_steps=2)     # Adam's step on equal gradients is 1
    np.testing.assert_allclose(np.diff([[1.0, -2.0, 0.5], *trail], axis=0),
                               -2e-4 * np.array([1, 0.5, 0, 0])[:, None] + np.zeros(3),
                               rtol=5e-3, atol=1e-9)


def test_the_two_rules_differ_where_gradients_are_tiny():
    grads = [np.full(3, 1e-8, np.float32)] * 2
    tf, plain = (run(grads, eps_rule=r, warmup_steps=0)[0] for r in ("tensorflow", "optax"))
    start = np.array([1.0, -2.0, 0.5])
    # first step: TensorFlow's effective epsilon is 1e-8 / sqrt(1e-3) = 3.16e-7
    np.testing.assert_allclose(start - plain, 2e-4 * 0.5, rtol=2e-2)
    np.testing.assert_allclose(start - tf, 2e-4 / 32.6, rtol=5e-2)
