"""Writes TF1 checkpoints with TensorFlow itself: the official variables, optimizer and EMA."""

import numpy as np

from ddpm_jax.interchange import names


def write_checkpoint(folder, arch, params, *, step=790, steps_run=2, adam=True, ema=True,
                     extra=None):
    """A graph as the official one creates it (nn.py, tpu_utils.py), run ``steps_run`` steps.

    -> (prefix, {variable name: value as TensorFlow holds it}).
    """
    import tensorflow as tf
    tf1 = tf.compat.v1
    start = names.variables_from_params(params, arch)
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
