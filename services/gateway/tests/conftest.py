"""What the gateway's tests stand on."""

from collections.abc import AsyncIterator

import pytest
from lepton_common.etcd import EtcdClient
from lepton_common.telemetry import Telemetry

from .lab import Lab, running


@pytest.fixture
async def lab(etcd: EtcdClient, telemetry: Telemetry) -> AsyncIterator[Lab]:
    async with running(etcd, telemetry) as lab:
        yield lab
