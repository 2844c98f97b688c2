"""`python launch/tpu.py ...`: the program is the package cloud_tpu beside this file."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cloud_tpu.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
