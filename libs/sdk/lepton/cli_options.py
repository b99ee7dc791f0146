"""Options that commands share."""

from typing import Annotated

import typer

_MOST = 2**31 - 1

Rate = Annotated[float | None, typer.Option(min=1e-6, help="Requests a second, in the mean.")]
Burst = Annotated[int | None, typer.Option(min=1, max=_MOST, help="Requests at once, where there is a rate.")]
Concurrency = Annotated[int | None, typer.Option(min=1, max=_MOST, help="Requests under way at a time.")]
