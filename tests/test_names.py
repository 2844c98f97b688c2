"""Lists read from source files are those of the imported modules."""

import pytest

from ddpm_jax import names
from ddpm_jax.benchmark.history import KINDS
from ddpm_jax.benchmark.sweeps import SWEEPS
from ddpm_jax.config import flatten, load_config
from ddpm_jax.diffusion.nodes import NODES
from ddpm_jax.diffusion.sampling import SAMPLERS
from ddpm_jax.evaluation.metrics import METRICS


def test_tables():
    assert names.table("evaluation/metrics.py", "METRICS") == list(METRICS)
    assert names.table("benchmark/sweeps.py", "SWEEPS") == list(SWEEPS)
    assert names.table("benchmark/history.py", "KINDS") == list(KINDS)
    assert names.table("diffusion/sampling.py", "SAMPLERS") == list(SAMPLERS)
    assert names.table("diffusion/nodes.py", "NODES") == list(NODES)
    with pytest.raises(LookupError, match="no dict literal LEVELS"):
        names.table("diffusion/nodes.py", "LEVELS")


def test_fields_of_the_default_config_with_their_comments():
    fields = {field.name: field for field in names.config_fields()}
    values = flatten(load_config("default").to_dict())
    assert sorted(fields) == sorted(values)
    for name, value in values.items():
        default = eval(fields[name].default)
        assert (list(default) if isinstance(default, tuple) else default) == value
    assert fields["train.clip_norm"].comment.endswith("gradient; 0 = off")
    assert fields["sampler.nodes"].comment.endswith('"0,20,99"; "" = as the sampler needs')
