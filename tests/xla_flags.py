"""XLA_FLAGS of the tests and of the processes that they start."""


def xla_flags(devices):
    """LLVM's optimizations are half of the suite's time and change no program that XLA is given."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
