"""Adam as the paper's code ran it (Ho et al. 2020, App. B; official utils.py:140-180)."""

import jax
import jax.numpy as jnp
import optax


def scale_by_adam_tf(b1, b2, eps):
    """Adam with TensorFlow's epsilon: outside the bias correction (tf.train.AdamOptimizer).

    update = m / (sqrt(v) + eps) * sqrt(1 - b2^n) / (1 - b1^n) at the n-th update.
    """

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


EPS_RULES = {"tensorflow": scale_by_adam_tf, "optax": optax.scale_by_adam}


def warmup(learning_rate, warmup_steps):
    """learning_rate * min(n / warmup_steps, 1) at update n = 0, 1, ...: the first is 0
    (utils.py:145). Constant where warmup_steps is 0."""
    if not warmup_steps:
        return optax.constant_schedule(learning_rate)
    return lambda count: learning_rate * jnp.minimum(count / warmup_steps, 1.0)


def learning_rates(learning_rate, warmup_steps, decay_steps=0):
    """The rate at update n: ``warmup``, times (1 + cos(pi n / decay_steps)) / 2 up to decay_steps
    updates (Loshchilov & Hutter 2017, eq. 5, without restarts) and 0 after them. decay_steps 0: no
    decay, as in the paper."""
    ramp = warmup(learning_rate, warmup_steps)
    if not decay_steps:
        return ramp
    return lambda count: ramp(count) * 0.5 * (
        1.0 + jnp.cos(jnp.pi * jnp.minimum(count / decay_steps, 1.0)))


def make_optimizer(*, learning_rate, warmup_steps, b1, b2, eps, eps_rule, decay_steps=0):
    """Adam with warm-up, and a decay to 0 over decay_steps updates unless that is 0; eps_rule is a
    row of EPS_RULES. Clipping is the training step's."""
    return optax.chain(
        EPS_RULES[eps_rule](b1=b1, b2=b2, eps=eps),
        optax.scale_by_learning_rate(learning_rates(learning_rate, warmup_steps, decay_steps)),
    )
