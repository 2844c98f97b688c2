"""Parts in one program, named right whatever the order they were asked in."""

import jax
import numpy as np

from ddpm_jax.evaluation import extract, small_cnn


def test_names_and_arrays_stay_together():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.float32)
    module = small_cnn.Classifier(4)
    cnn = module.init(jax.random.key(0), small_cnn.scaled(images))["params"]
    for order in (("random", "images", "classifier", "channels"),
                  ("channels", "classifier", "images", "random")):
        weights = {"random": small_cnn.random_params(1), "images": {}, "classifier": cnn,
                   "channels": {}}
        extractor = extract.make({name: weights[name] for name in order})
        out = jax.jit(extractor.apply)(extractor.params, images)
        found = dict(zip(extractor.names, out, strict=True))
        assert found["cnn"].shape == (3, 128) and found["cnn_logits"].shape == (3, 4)
        assert found["random"].shape == (3, 224)
        np.testing.assert_array_equal(found["images"], images)
        np.testing.assert_allclose(found["channels"][:, 0], images.mean((1, 2, 3)), rtol=1e-5)
        squares = (images ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(found["channels"][:, 1], squares, rtol=1e-5)
