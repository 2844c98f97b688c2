"""For tests that fork for a terminal."""

import pytest

# What JAX and Python warn of there does not matter, since exec follows.
forking = pytest.mark.filterwarnings(
    "ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning",
    "ignore:(?s).*_at_fork:pytest.PytestUnraisableExceptionWarning")
