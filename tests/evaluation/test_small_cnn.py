"""Features of the small classifier and of the random network, and what they are made of."""

import jax
import numpy as np
import pytest

from ddpm_jax.evaluation import small_cnn


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (256, 256, 3)])
def test_other_sizes_have_the_same_features(shape):
    module = small_cnn.Classifier(5)
    x = np.zeros((2, *shape), np.uint8)
    params = jax.eval_shape(module.init, jax.random.key(0), small_cnn.scaled(x))["params"]
    out = jax.eval_shape(small_cnn.apply, params, x)
    assert out.features.shape == (2, 128) and out.logits.shape == (2, 5)
    random = jax.eval_shape(lambda x: small_cnn.random_apply(
        small_cnn.random_params(shape[-1]), x), x)
    assert random.shape == (2, 224)


def test_padding_of_the_last_batch_does_not_show():
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    params = small_cnn.Classifier(4).init(
        jax.random.key(0), small_cnn.scaled(images[:1]))["params"]
    whole = small_cnn.outputs(params, images)
    few = small_cnn.outputs(params, images[:3])
    assert whole.features.shape == (300, 128) and whole.logits.shape == (300, 4)
    np.testing.assert_allclose(few.features, whole.features[:3], atol=1e-4)
