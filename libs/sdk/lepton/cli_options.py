"""Options that commands share."""

from typing import Annotated

import typer

Rate = Annotated[float | None, typer.Option(min=0.001, help="Requests a second, in the mean.")]
Burst = Annotated[int | None, typer.Option(min=1, help="Requests at once, where there is a rate.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests under way at a time.")]
