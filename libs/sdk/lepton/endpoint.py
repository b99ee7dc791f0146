"""Where the platform is and which key opens it: arguments first, then the environment, then the local platform."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lepton.errors import Invalid, Unauthenticated, Unreachable

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A platform's URL without a slash at its end, and the key sent to it, if any."""

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        return urlsplit(self.url).hostname in _LOOPBACK


def home() -> Path:
    """The folder of the local platform: LEPTON_HOME, else ~/.lepton."""
    return Path(os.environ.get("LEPTON_HOME") or Path.home() / ".lepton")


def find_endpoint(url: str | None = None, key: str | None = None) -> Endpoint:
    """The platform to talk to. The local platform's own key is sent nowhere but to the local platform.

    Raises Invalid when the URL is not an http or https one, Unauthenticated when the key cannot be sent, Unreachable
    when nothing names a platform.
    """
    local_url = _local_url()
    url = (url or os.environ.get("LEPTON_URL") or local_url or "").rstrip("/")
    if not url:
        raise Unreachable("No platform was started here yet.")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise Invalid(f"{url!r} is not a platform's URL.", hint="It looks like http://127.0.0.1:8080.")
    key = (key or os.environ.get("LEPTON_API_KEY") or "").strip() or (_local_key() if url == local_url else None)
    if key and not (key.isascii() and key.isprintable()):
        raise Unauthenticated("The API key has a line break or a character in it that no key has.")
    return Endpoint(url, key)


def _local_url() -> str | None:
    try:
        url = json.loads((home() / "platform.json").read_text())["url"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # No platform was ever started here, or it is writing the file for the first time.
    return str(url).rstrip("/")


def _local_key() -> str | None:
    try:
        return (home() / "key").read_text().strip() or None
    except OSError:
        return None
