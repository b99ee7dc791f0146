"""How `make test` spreads the tests over processes, and what property tests try."""

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# The same examples each time, however slow the machine.
settings.register_profile(
    "lepton", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lepton")

_FOLDERS = ("tests/integration/", "tests/security/")
# These start platforms of their own.
_ALONE = (
    *(f"tests/integration/test_{name}" for name in ("canaries", "faults", "quickstart")),
    "tests/security/test_secrets",
)


class Together(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
    """A file's tests stay together, and so do all that use the shared platform: it takes a while to start."""

    def _split_scope(self, nodeid: str) -> str:
        shares = nodeid.startswith(_FOLDERS) and not nodeid.startswith(_ALONE)
        return "platform" if shares else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    """xdist's own marks for this do nothing with this pytest."""
    return Together(config, log)
