"""The storage emulator as tests use it."""

import pathlib
import socket
import subprocess
import sys

import pytest


def start():
    """-> (process, the variables by which gcsfs and TensorStore find it). Its bucket is `ddpm`."""
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="gcsfs (the extra [gcs])")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    script = pathlib.Path(__file__).parent / "launch" / "storage_emulator.py"
    process = subprocess.Popen([sys.executable, script, str(port), "ddpm"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "ready\n"
    return process, {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
                     "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}


def stop(process):
    process.kill()
    process.wait()
    process.stdout.close()
