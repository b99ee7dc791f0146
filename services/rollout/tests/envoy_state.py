"""What Envoy says of itself, and which pools its files name."""

from pathlib import Path

import httpx
from lepton.envoy import Envoy


async def healthy_workers(envoy: Envoy, pool: str, kind: str = "pool") -> int:
    return await stat(envoy, f"cluster.{kind}-{pool}.membership_healthy")


async def stat(envoy: Envoy, name: str) -> int:
    async with httpx.AsyncClient() as admin:
        answer = await admin.get(f"http://{envoy.admin}/stats", params={"filter": f"^{name}$"})
    return int(answer.text.rpartition(" ")[2])


def pools(folder: Path) -> set[str]:
    return {each.stem for each in (folder / "eds").glob("*.json")}
