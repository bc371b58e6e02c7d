"""Threads are pinned and denormals flushed, so that tests take the same time on a busy
machine.
"""

import pytest
import torch
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(1)
torch.set_flush_denormal(True)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that this machine has."""
    return torch.device(request.param)
