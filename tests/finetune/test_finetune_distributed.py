"""Two processes over the ring backend on this machine take the same steps as one with the doubled batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ring_run.py")
SAME = 1e-5  # float32 sums in another order, over 6 steps


def start(batch_size, out, **environment):
    command = [sys.executable, str(SCRIPT), str(batch_size), str(out)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result_of(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The single process' result, and both processes' results; each has a folder of its own, like machines."""
    folder = tmp_path_factory.mktemp("ring")
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    pair = [start(2, folder / str(rank), MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)) for rank in (0, 1)]
    both = [result_of(process) for process in pair]
    return result_of(start(4, folder / "single")), both, folder


def test_the_losses_are_those_of_a_doubled_batch(runs):
    single, (first, second), _ = runs
    assert (first["rank"], second["rank"]) == (0, 1)
    assert len(single["losses"]) == 6
    assert first["losses"] == pytest.approx(single["losses"], rel=SAME)
    assert first["valid"] == pytest.approx(single["valid"], rel=SAME)


def test_both_processes_hold_the_same_weights(runs):
    single, (first, second), _ = runs
    assert first["weight"] == second["weight"] == pytest.approx(single["weight"], rel=SAME)


def test_only_the_first_process_reports_and_writes(runs):
    _, (_, second), folder = runs
    assert second["losses"] == []
    assert (folder / "0" / "adapters.safetensors").exists()
    assert not (folder / "1").exists()
