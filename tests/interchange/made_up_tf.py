"""Writes TF1 checkpoints with TensorFlow itself: the official variables, optimizer and EMA."""

import numpy as np

from ddpm_jax.interchange import parameter_names


def write_checkpoint(folder, model, params, *, step=790, steps_run=2, adam=True, ema=True,
                     extra=None):
    """A graph as the official one creates it (nn.py, tpu_utils.py), run ``steps_run`` steps.

    -> (prefix, {variable name: value as TensorFlow holds it}).
    """
    import tensorflow as tf
    tf1 = tf.compat.v1
    start = parameter_names.variables_from_params(params, model)
    with tf1.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(0)
        variables = []
        for name, value in start.items():
            scope, _, leaf = name.rpartition("/")
            with tf1.variable_scope(scope, reuse=tf1.AUTO_REUSE):
                variables.append(tf1.get_variable(leaf, initializer=np.ascontiguousarray(value)))
        global_step = tf1.train.get_or_create_global_step()
        loss = tf.add_n([tf.reduce_sum(tf.sin(v)) for v in variables])
        operations = []
        if adam:
            optimizer = tf1.train.AdamOptimizer(2e-4)
            operations.append(optimizer.minimize(loss, global_step=global_step))
        with tf1.control_dependencies(operations):
            if ema:
                average = tf1.train.ExponentialMovingAverage(0.9)
                operations = [average.apply(variables)]
        for name, value in (extra or {}).items():
            tf1.get_variable(name, initializer=value)
        session.run(tf1.global_variables_initializer())
        for _ in range(steps_run):
            session.run(operations)
        session.run(global_step.assign(step))
        prefix = tf1.train.Saver().save(session, f"{folder}/model.ckpt", global_step=global_step,
                                        write_meta_graph=False)
        held = session.run({v.op.name: v for v in tf1.global_variables()})
    return prefix, held


def official_eps(variables, model, x, t, *, groups):
    """The U-Net of the paper's Appendix B in TensorFlow ops, its weights found under the official
    scopes: a second reading of the names, apart from the table. x [B,H,W,C]; t int [B]."""
    import tensorflow as tf

    def w(scope, leaf):
        return tf.constant(variables[f"model/{scope}/{leaf}"])

    def conv(h, scope, stride=1):
        return tf.nn.conv2d(h, w(scope, "W"), stride, "SAME") + w(scope, "b")

    def linear(h, scope):
        return tf.tensordot(h, w(scope, "W"), 1) + w(scope, "b")

    def norm(h, scope):
        b, height, width, c = h.shape
        cut = tf.reshape(h, [b, height, width, groups, c // groups])
        mean, variance = tf.nn.moments(cut, [1, 2, 4], keepdims=True)
        cut = (cut - mean) / tf.sqrt(variance + 1e-6)
        return tf.reshape(cut, h.shape) * w(scope, "gamma") + w(scope, "beta")

    def residual(h, scope):
        y = conv(tf.nn.silu(norm(h, f"{scope}/norm1")), f"{scope}/conv1")
        y += linear(tf.nn.silu(temb), f"{scope}/temb_proj")[:, None, None, :]
        y = conv(tf.nn.silu(norm(y, f"{scope}/norm2")), f"{scope}/conv2")
        if f"model/{scope}/nin_shortcut/W" in variables:
            h = linear(h, f"{scope}/nin_shortcut")
        return h + y

    def attention(h, scope):
        b, height, width, c = h.shape
        y = tf.reshape(norm(h, f"{scope}/norm"), [b, height * width, c])
        q, k, v = (linear(y, f"{scope}/{part}") for part in "qkv")
        y = tf.nn.softmax(tf.matmul(q, k, transpose_b=True) / np.sqrt(c)) @ v
        return h + tf.reshape(linear(y, f"{scope}/proj_out"), h.shape)

    half = model.ch // 2
    angles = np.asarray(t)[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    temb = tf.constant(np.concatenate([np.sin(angles), np.cos(angles)], 1), tf.float32)
    temb = linear(tf.nn.silu(linear(temb, "temb/dense0")), "temb/dense1")
    skips = [conv(tf.constant(x), "conv_in")]
    last = len(model.ch_mult) - 1
    for i in range(last + 1):
        for j in range(model.num_res_blocks):
            h = residual(skips[-1], f"down_{i}/block_{j}")
            skips.append(attention(h, f"down_{i}/attn_{j}")
                         if h.shape[1] in model.attn_resolutions else h)
        if i < last:
            skips.append(conv(skips[-1], f"down_{i}/downsample/conv", 2))
    h = attention(residual(skips[-1], "mid/block_1"), "mid/attn_1")
    h = residual(h, "mid/block_2")
    for i in range(last, -1, -1):
        for j in range(model.num_res_blocks + 1):
            h = residual(tf.concat([h, skips.pop()], 3), f"up_{i}/block_{j}")
            if h.shape[1] in model.attn_resolutions:
                h = attention(h, f"up_{i}/attn_{j}")
        if i:
            h = conv(tf.repeat(tf.repeat(h, 2, 1), 2, 2), f"up_{i}/upsample/conv")
    return conv(tf.nn.silu(norm(h, "norm_out")), "conv_out").numpy()
