"""Compile a file of the corpus several times and write TensorBoard scalars, as XLA's benchmark
platform wants them: python ddpm_jax/benchmark/scalars.py [--repeat=N] FILE

Scalars go to the folder that TENSORBOARD_OUTPUT_DIR names, one step a compilation, each in a
process of its own. Exit status 1 where one does not end well.
"""

import argparse
import os
import sys

from tensorboardX import SummaryWriter

from ddpm_jax.benchmark import replay

READ = {
    "compile_cpu_seconds": lambda row: row["compile"]["cpu_s"],
    "compile_wall_seconds": lambda row: row["compile"]["wall_s"],
    "hlo_instructions": lambda row: row["instructions"],
    "executable_bytes": lambda row: row["executable_bytes"],
    "peak_rss_bytes": lambda row: row["maxrss_bytes"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=replay.existing_file)
    parser.add_argument("--repeat", type=int, default=3, choices=range(1, 1001), metavar="N")
    parser.add_argument("--timeout", type=replay.positive, default=900.0,
                        help="seconds a compilation")
    arguments = parser.parse_args()
    folder = os.environ.get("TENSORBOARD_OUTPUT_DIR")
    if not folder:
        sys.exit("TENSORBOARD_OUTPUT_DIR is not set: it names the folder for the scalars")
    failed = False
    with SummaryWriter(logdir=folder) as writer:
        for step in range(arguments.repeat):
            row = replay.measure(arguments.file, timeout=arguments.timeout)
            if row["outcome"] != "ok":
                print(f"compilation {step}: {row['outcome']}: {row.get('message', '')}",
                      file=sys.stderr)
                failed = True
                continue
            for name, read in READ.items():
                value = read(row)
                if value is not None:
                    writer.add_scalar(name, value, step)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
