"""Batch scoring: a file's rows through a model by way of Kafka, and its answers beside them, in the same order.

Requests have names that follow from the file's bytes and the model's version, so their answers are found again: a job
that was killed anywhere and is started again asks for what is missing only, and ends with the same output.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from lepton.batch_kafka import Wire
from lepton.batch_state import Answer, State
from lepton.batch_tables import Plan, Scored, Source, check_output, drafting, plan, read_source
from lepton.client import Client
from lepton.errors import Conflict, DeadlineExceeded, Invalid, Unauthenticated
from lepton.flow import OnProgress, Progress
from lepton.models import ModelMetadata
from lepton.tensors import HEADER_LENGTH, Array, decode, encode

# Enough that workers do not wait for the next, few enough that others' requests come between.
_UNDER_WAY = 64
_READ_S = 0.2
_SLACK_S = 30.0
_REASONS = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to score, and how. `version` None takes the one that serves when the job starts; `columns` choose and order
    those of a model's only input; `rows` go into one request; an answer is waited for `timeout_s` seconds."""

    model: str
    source: Path
    output: Path
    version: int | None = None
    columns: Sequence[str] = ()
    rows: int = 256
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How it ended. `asked` are the requests of this run; `reasons` the first ones of rows that failed."""

    model: str
    version: int
    output: str
    rows: int
    failed: int
    asked: int
    seconds: float
    reasons: list[str]


def score(client: Client, wanted: Wanted, kafka: str, progress: OnProgress) -> Summary:
    """The output is there, whole: the rows, the model's outputs, and an error where one has none.

    Raises Invalid naming the column that does not fit, Conflict when the output is somebody else's file, NotFound,
    DeadlineExceeded; then what was answered is kept in a file beside the output, and the same call goes on from there.
    """
    check_output(wanted.output)
    if client.endpoint.key is None:
        raise Unauthenticated("Requests over Kafka need an API key.")
    source = read_source(wanted.source)
    with Wire(kafka) as wire, State(wanted.output.with_name(f".{wanted.output.name}.batch")) as state:
        return _Job(client, wanted, source, wire, state, progress).run()


class _Job:
    def __init__(
        self, client: Client, wanted: Wanted, source: Source, wire: Wire, state: State, progress: OnProgress
    ) -> None:
        self._began = time.monotonic()
        self._wanted = wanted
        self._source = source
        self._wire = wire
        self._state = state
        self._progress = progress
        self._headers = {"authorization": f"Bearer {client.endpoint.key}", "lepton-model": wanted.model}
        served = client.serving(wanted.model)
        seed = [wire.cluster, served.tenant, wanted.model, _sha256(wanted.source), wanted.rows, list(wanted.columns)]
        self._seed = hashlib.sha256(orjson.dumps(seed)).hexdigest()
        goes_on = state.fact("seed") == self._seed and state.fact("summary") is None
        # A job that was interrupted stays with its version, whatever was promoted meanwhile.
        version = wanted.version or (state.fact("version") if goes_on else served.stable)
        if version is None:
            raise Conflict(f"Model {wanted.model!r} serves no version.", hint="`lepton deploy` brings one live.")
        self._version: int = version
        self._job = f"{self._seed[:32]}-v{self._version}"
        self._metadata: ModelMetadata = client.metadata(wanted.model, version=self._version)

    def run(self) -> Summary:
        plan_ = plan(self._source.schema, self._metadata.inputs, self._wanted.columns, self._wanted.rows)
        scored = Scored(self._source.schema, self._metadata.outputs)
        there = _sha256(self._wanted.output) if self._wanted.output.exists() else None
        ours = self._state.fact("outputs") or []
        if there is not None and there not in ours:
            hint = "Remove it, or choose another --output."
            raise Conflict(f"{self._wanted.output} is there already, and no earlier run wrote it as it is.", hint=hint)
        summary = self._state.fact("summary")
        is_whole = summary is not None and not summary["failed"]
        if self._state.fact("job") != self._job or (is_whole and there is None):
            facts = {"job": self._job, "seed": self._seed, "version": self._version}
            self._state.begin(self._wire.ends(), **facts, attempt=1, outputs=ours, summary=None)
        elif is_whole:
            return Summary(**{**summary, "asked": 0, "seconds": self._seconds()})
        elif summary is not None:
            self._state.forget_failures(self._state.fact("attempt") + 1)
        asked = self._gather(plan_)
        return self._write(plan_.rows, scored, asked, there)

    def _gather(self, plan_: Plan) -> int:
        """Every piece is answered; how many were asked for is returned."""
        name = f"{self._job}.{self._state.fact('attempt')}"
        self._wire.read_from(self._state.positions())
        self._state.keep(*self._wire.catch_up(name, self._wanted.timeout_s))
        answered = self._state.answered()
        missing = self._requests(plan_, frozenset(answered))
        under_way: set[int] = set()
        asked = 0
        heard = time.monotonic()
        while True:
            while len(under_way) < _UNDER_WAY and (request := next(missing, None)) is not None:
                piece, headers, body = request
                self._wire.ask(f"{name}.{piece}", headers, body)
                under_way.add(piece)
                asked += 1
            self._tell(len(answered) * plan_.rows)
            if not under_way:
                return asked
            answers, positions = self._wire.answers(name, _READ_S)
            if positions:
                self._state.keep(answers, positions)
            new = {each.piece for each in answers}
            answered |= new
            under_way -= new
            heard = time.monotonic() if new else heard
            if time.monotonic() - heard > self._wanted.timeout_s + _SLACK_S:
                told = f"No answer for {self._wanted.timeout_s + _SLACK_S:g} s; {len(under_way)} requests wait for one."
                raise DeadlineExceeded(told, hint="What was answered is kept: the same command goes on from there.")

    def _requests(self, plan_: Plan, answered: frozenset[int]) -> Iterator[tuple[int, dict[str, str], bytes]]:
        """Headers and body of what asks for each piece that is not answered."""
        timeout = str(round(self._wanted.timeout_s * 1e3))
        own = {**self._headers, "lepton-version": str(self._version), "lepton-timeout-ms": timeout}
        for piece, table in enumerate(self._source.pieces(plan_.rows)):
            if piece in answered:
                continue
            try:
                headers, body = encode(plan_.arrays(table))
            except Invalid as error:
                first = piece * plan_.rows
                error.message = f"Rows {first} to {first + table.num_rows - 1}: {error.message}"
                raise
            yield piece, own | headers, body

    def _write(self, rows: int, scored: Scored, asked: int, there: str | None) -> Summary:
        failed = 0
        reasons: dict[str, None] = {}
        with drafting(self._wanted.output, scored.schema) as (draft, writer):
            for piece, table in enumerate(self._source.pieces(rows)):
                outputs, error = _outputs(self._state.get(piece))
                error = error or scored.mismatch(outputs, table.num_rows)
                writer.write_table(scored.table(table, outputs, error))
                if error is not None:
                    failed += table.num_rows
                    reasons[error] = None
        # Noted before it is in its place, so that it is known as ours at any time.
        self._state.note(outputs=[there, _sha256(draft)])
        draft.replace(self._wanted.output)
        summary = Summary(
            model=self._wanted.model,
            version=self._version,
            output=str(self._wanted.output),
            rows=self._source.rows,
            failed=failed,
            asked=asked,
            seconds=self._seconds(),
            reasons=list(reasons)[:_REASONS],
        )
        self._state.note(summary=asdict(summary))
        if not failed:
            self._state.forget_answers()
        return summary

    def _tell(self, rows: int) -> None:
        self._progress(Progress("scoring", min(rows, self._source.rows), self._source.rows))

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)


def _outputs(answer: Answer) -> tuple[dict[str, Array], str | None]:
    if answer.status == 200:
        headers = {HEADER_LENGTH: str(answer.head_bytes)} if answer.head_bytes else {}
        return decode(headers, answer.body), None
    try:
        return {}, str(orjson.loads(answer.body)["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}, f"the gateway answered with status {answer.status}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
