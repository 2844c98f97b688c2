"""What the tests of several subcommands share."""

import pytest
from absl import flags


def _ours():
    """Flags that this package defined, by name."""
    return {flag.name: flag for module, defined in flags.FLAGS.flags_by_module_dict().items()
            for flag in defined if module.startswith(("ddpm_jax", "ml_collections"))}


@pytest.fixture
def fresh_flags():
    """No flags of other subcommands, which one process has in tests alone; put back at the end."""
    before = _ours()
    for name in before:
        delattr(flags.FLAGS, name)
    yield
    for name in _ours():
        delattr(flags.FLAGS, name)
    for name, flag in before.items():
        flags.FLAGS[name] = flag
