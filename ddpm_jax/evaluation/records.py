"""evaluation.json: values with their provenance, by step, protocol and label."""

import json

import jax
import numpy as np

from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files


def versions() -> dict:
    device = jax.devices()[0]
    return hosts.versions() | {"device": device.device_kind, "devices": jax.device_count()}


def write_records(path, step, protocol: str, records) -> dict:
    """Adds to evaluation.json: {step: {protocol: {label: {values, provenance}}}}. -> all of it."""
    document = files.read_json(path) if files.exists(path) else {}
    at = document.setdefault(str(step), {}).setdefault(protocol, {})
    for label, values, provenance in records:
        old = at.get(label, {}).get("values", {})
        at[label] = {"values": old | values, "provenance": provenance | {"versions": versions()}}
    files.write_json(path, document)
    return document


def same_everywhere(numbers: dict) -> dict:
    """What the first process has, as JSON carries it, on all; none goes on before it has come."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils
    raw = np.frombuffer(json.dumps(numbers).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(raw), np.int32)))
    buffer = np.zeros(size, np.uint8)
    buffer[:min(size, len(raw))] = raw[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
