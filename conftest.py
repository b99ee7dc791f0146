"""Which tests run in the same process when `make test` spreads them over several."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, and so do all files that use the shared platform: it takes a while to start."""
    on_platform = {item.path for item in items if "platform" in getattr(item, "fixturenames", ())}
    for item in items:
        integration = item.path.parent.name == "integration"
        together = "platform" if integration and item.path in on_platform else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(together))
