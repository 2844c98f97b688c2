"""ddpm inception convert IN OUT.npz [--allow_unknown_weights] [--overwrite]
   ddpm inception check [FILE]

`convert` reads Inception's weights (.pth of pytorch-fid or torch-fidelity, TensorFlow's
classify_image_graph_def.pb or inception-2015-12-05.tgz) without PyTorch or TensorFlow and without
executing anything in the file, checks sha256, names and shapes, and writes an .npz.
`check` names the weights that would be used, and how exactly this machine computes their features.
"""

from ddpm_jax.errors import UserError

USAGE = "usage: ddpm inception convert IN OUT.npz | ddpm inception check [FILE]"


def define_flags(define):
    define.bool("allow_unknown_weights", False,
                "accept Inception weights whose sha256 is not known")
    define.bool("overwrite", False, "replace an existing file")


def _convert(values, source, target):
    from ddpm_jax.evaluation.inception import weights

    facts = weights.convert(source, target, allow_unknown=values.allow_unknown_weights,
                            overwrite=values.overwrite)
    print(f"wrote {target}: 94 convolutions, source sha256 {facts['source_sha256']}, "
          f"tensors sha256 {facts['state_sha256']}")


def _check(values, path=None):
    from ddpm_jax.evaluation.inception import weights

    if values["overwrite"].present:
        raise UserError("--overwrite has no effect on inception check; leave it out")
    found = weights.load(weights.find(path), allow_unknown=values.allow_unknown_weights)
    error = weights.fingerprint_error(found)
    print(f"{found.path}: tensors sha256 {found.state_sha256}")
    print("features: no stored fingerprint (convert the file)" if error is None else
          f"features: relative distance {error:.1e} from those at conversion")


COMMANDS = {"convert": (_convert, (2,)), "check": (_check, (0, 1))}


def main(values, words):
    command, *rest = words or [""]
    if command not in COMMANDS or len(rest) not in COMMANDS[command][1]:
        raise UserError(f"inception {' '.join(words)}: {USAGE}")
    COMMANDS[command][0](values, *rest)
    return 0
