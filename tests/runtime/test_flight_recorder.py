"""NCCL's flight recorder: the environment on any machine, the record itself on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from scmdm.runtime.flight_recorder import enable_flight_recorder

RECORD = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from scmdm.runtime.flight_recorder import dump_flight_recorder, enable_flight_recorder
enable_flight_recorder(Path(sys.argv[1]))
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(8, device="cuda"))
torch.cuda.synchronize()
dump_flight_recorder(Path(sys.argv[1]), 0)
dist.destroy_process_group()
"""


def test_variables_that_the_user_has_set_are_kept(tmp_path, monkeypatch):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    for name in (*names, "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.chdir(tmp_path)
    enable_flight_recorder(tmp_path.relative_to(tmp_path) / "stacks")
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7" and "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert int(os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == 1
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/stacks/nccl_trace_rank_"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_record_holds_the_last_collective(tmp_path):
    subprocess.run([sys.executable, "-c", RECORD, tmp_path], check=True, timeout=300)
    assert b"all_reduce" in (tmp_path / "nccl_trace_rank_0").read_bytes()
