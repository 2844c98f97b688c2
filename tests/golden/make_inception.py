"""Writes inception.npz: golden values of Inception-2015 from an independent implementation.

    pip install --no-deps pytorch-fid; pip install torch tensorflow-cpu
    pip download --no-deps torchvision==0.21.0
    python tests/golden/make_inception.py --torchvision torchvision-0.21.0-*.whl

The network is pytorch-fid's own `fid_inception_v3`, run in float64 on weights made from seeded
numpy; the resize is TensorFlow's `compat.v1.image.resize_bilinear`. torchvision is not imported
(it needs its own build of torch): only `models/inception.py` is read out of the wheel into a
module of that name, with empty stand-ins for what it imports. Nothing of either project is kept.
"""

import argparse
import pathlib
import sys
import types
import zipfile
import zlib

import numpy as np

OUT = pathlib.Path(__file__).with_name("inception.npz")


def seeded(name, shape):
    """One tensor of the made-up weights, a function of its name alone. Batch norm's buffers are
    far from (0, 1), so that an error in their mapping shows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("conv.weight"):
        return normal * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
    if name.endswith(("bn.weight", "running_var")):
        return (0.5 + rng.random(shape)).astype(np.float32)
    if name == "fc.weight":
        return normal * np.float32(0.02)
    return normal * np.float32(0.1)


def images():
    """Two pictures, uint8 [2,32,32,3]: smooth shapes under noise."""
    rng = np.random.default_rng(zlib.crc32(b"images"))
    y, x = np.mgrid[0:32, 0:32] / 31.0
    smooth = np.stack([np.sin(5 * x + 2 * y), np.cos(7 * y - x), np.sin(9 * x * y)], axis=-1)
    noisy = 127.5 + 80 * np.stack([smooth, smooth[::-1, :, ::-1]]) + 20 * rng.standard_normal(
        (2, 32, 32, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _stub_torchvision(wheel):
    class Anything(types.ModuleType):
        """Whatever is asked for: usable as a class, as a decorator and as a decorator factory."""
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": lambda self, *a, **k: None,
                                   "__call__": lambda self, f=None, *a, **k: f})

    for name in ("torchvision", "torchvision.models", "torchvision.transforms",
                 "torchvision.transforms._presets", "torchvision.utils", "torchvision.models._api",
                 "torchvision.models._meta", "torchvision.models._utils"):
        sys.modules[name] = Anything(name)
        sys.modules[name].__path__ = []
    source = zipfile.ZipFile(wheel).read("torchvision/models/inception.py").decode()
    module = types.ModuleType("torchvision.models.inception")
    module.__package__ = "torchvision.models"
    sys.modules[module.__name__] = module
    exec(compile(source, "inception.py", "exec"), module.__dict__)
    root, models = sys.modules["torchvision"], sys.modules["torchvision.models"]
    root.__version__ = "0.21.0"
    root.models, models.inception = models, module
    models.inception_v3 = lambda **kw: module.Inception3(
        **{k: v for k, v in kw.items() if k != "weights"})


def load_network(wheel):
    """pytorch-fid's network with the seeded weights, float64, in evaluation mode."""
    import torch

    _stub_torchvision(wheel)
    import pytorch_fid.inception as pytorch_fid

    def fake_download(url, progress):
        captured = captured_shapes()
        return {name: torch.zeros((), dtype=torch.long) if name.endswith("num_batches_tracked")
                else torch.from_numpy(seeded(name, shape)) for name, shape in captured.items()}

    def captured_shapes():
        frame = sys._getframe(2)
        return {k: tuple(v.shape) for k, v in frame.f_locals["inception"].state_dict().items()}

    pytorch_fid.load_state_dict_from_url = fake_download
    return pytorch_fid.fid_inception_v3().double().eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchvision", required=True)
    wheel = parser.parse_args().torchvision
    import tensorflow as tf
    import torch

    pictures = images()
    resized = tf.compat.v1.image.resize_bilinear(
        tf.constant(pictures.astype(np.float32)), [299, 299]).numpy()
    net = load_network(wheel)
    taps = {}
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: taps.update(spatial=out.detach()))
    net.avgpool.register_forward_hook(lambda module, args, out: taps.update(pool_3=out.detach()))
    with torch.no_grad():
        logits = net((torch.from_numpy(resized).double().permute(0, 3, 1, 2) - 128) / 128)
    pool_3 = taps["pool_3"].flatten(1).numpy()
    np.savez_compressed(
        OUT, pool_3=pool_3, logits=logits.numpy(),
        logits_unbiased=(logits - net.fc.bias).detach().numpy(),
        spatial=taps["spatial"].permute(0, 2, 3, 1).numpy()[..., :7],
        resized_rows=resized[0, ::13, :, :], names=np.array(sorted(
            k for k in net.state_dict() if not k.endswith("num_batches_tracked"))))
    print(OUT, OUT.stat().st_size, "bytes; pool_3", pool_3.min(), pool_3.mean(), pool_3.max())


if __name__ == "__main__":
    main()
