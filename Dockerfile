# An image for GKE (launch/gke/render.py --image) and SLURM's container runtimes.
#   docker build --build-arg EXTRAS=tpu,gcs -t IMAGE .
#   docker build --build-arg EXTRAS=cuda13,gcs -t IMAGE .
FROM python:3.13-slim-bookworm

# tpu, cuda12 or cuda13, and gcs where data or runs are on gs://.
ARG EXTRAS=cuda13,gcs

# NVIDIA_*: what the container runtime mounts. LD_LIBRARY_PATH: where GKE mounts the driver.
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64

WORKDIR /opt/ddpm_jax
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY configs configs
COPY ddpm_jax ddpm_jax
# The versions are bounded in setup.cfg.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ".[${EXTRAS}]"

WORKDIR /workspace
# No shell around the command: signals reach the program, which saves and exits with 42.
CMD ["ddpm", "doctor"]
