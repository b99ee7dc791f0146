"""Child processes of a service that talks to etcd."""

import subprocess
import sys

from lepton.servers import Etcd

_SERVICE = """
import asyncio, sys
import uvloop
from lepton_common.etcd import EtcdClient

async def write(etcd: EtcdClient) -> None:
    while True:
        await etcd.put("/lepton/test", b"")

async def start_children(etcd: EtcdClient) -> set[int]:
    writers = [asyncio.create_task(write(etcd)) for _ in range(4)]
    statuses = {await (await asyncio.create_subprocess_exec("true")).wait() for _ in range(100)}
    for writer in writers:
        writer.cancel()
    await asyncio.wait(writers)
    await etcd.close()
    return statuses

async def main() -> None:
    print(await start_children(EtcdClient(sys.argv[1])))

uvloop.run(main())
"""


def test_children_of_a_busy_service_start_unharmed(etcd_server: Etcd) -> None:
    # Without what lepton_common/__init__.py sets, about five of the hundred die of SIGSEGV before they begin.
    command = [sys.executable, "-c", _SERVICE, etcd_server.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "{0}"
