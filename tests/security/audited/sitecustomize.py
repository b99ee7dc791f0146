"""Keeps, in every Python process of a platform under test, a record of what is unpickled."""

import os
import sys
from pathlib import Path

_record = Path(os.environ["PICKLES"], f"{os.getpid()}").open("a", buffering=1)  # noqa: SIM115 - as long as it runs
_record.write(f"{' '.join(sys.orig_argv)}\n")


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    # Raised for every class or function that a pickle names: one without any is only data.
    if event == "pickle.find_class":
        _record.write(f"{event} {arguments}\n")


sys.addaudithook(_hook)
