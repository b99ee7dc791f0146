"""Files that people write: YAML or JSON, read so that 22:00 is a time of day and a mistake is named with its line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from lepton.errors import Invalid
from lepton.flow import M

# Much longer than any policy or VirtualService, and short enough to be read at once.
_MAX_BYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML as JSON has it: of plain scalars only numbers, true, false and null are no text.

    PyYAML's own rules (YAML 1.1) would read 22:00 as 1320 and the name `no` as false.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  # As PyYAML has it.

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        super().flatten_mapping(node)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_SCALARS = (
    (f"{_TAG}null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""]),
    (f"{_TAG}bool", re.compile(r"^(?:true|false)$"), ["t", "f"]),
    (f"{_TAG}int", re.compile(r"^-?(?:0|[1-9][0-9]*)$"), list("-0123456789")),
    (f"{_TAG}float", re.compile(r"^-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"), list("-.0123456789")),
)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor(f"{_TAG}float", _float)  # PyYAML's own takes 1e3 for text.


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file. `node` knows the lines; it is None where the file is empty."""

    source: str
    content: Any
    node: yaml.Node | None

    def line_of(self, where: Sequence[int | str]) -> int | None:
        """The line of a field, or of the innermost part of its path that is there."""
        node, line = self.node, None if self.node is None else self.node.start_mark.line
        for part in where:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == part), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
        return None if line is None else line + 1

    def parsed(self, kind: type[M], name: str) -> M:
        """The document as a shape. Raises Invalid that names every wrong field, its line, and what was expected."""
        if not isinstance(self.content, dict):
            raise Invalid(f"{self.source} is not a {name}: expected fields and values, such as `strategy: canary`.")
        try:
            return kind.model_validate(self.content)
        except ValidationError as error:
            raise Invalid("\n".join(self._complaints(error, name))) from error

    def _complaints(self, error: ValidationError, name: str) -> list[str]:
        wrong = [(_written(each["loc"]), each) for each in error.errors(include_url=False)]
        paths = [where for where, _ in wrong]
        lines = []
        for index, (where, each) in enumerate(wrong):
            others = paths[:index] + paths[index + 1 :]
            # Of a field that may be a number or a mapping pydantic tells why it is neither: one reason is enough.
            if each["type"] == "model_type" and where in others:
                continue
            if isinstance(each["input"], dict) and any(other[: len(where)] == where for other in others):
                continue
            line = self.line_of(where)
            place = self.source if line is None else f"{self.source}, line {line}"
            lines.append(f"{place}: {_complaint(each, _dotted(where), name)}.")
        return lines


def read_documents(path: Path) -> list[Document]:
    """Every document of a file. Raises Invalid with the line where it is no YAML, OSError where it cannot be read."""
    if path.stat().st_size > _MAX_BYTES:
        raise Invalid(f"{path} is larger than {_MAX_BYTES // 1000} kB: is it the right file?")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Invalid(f"{path} is not text in UTF-8.") from error
    loader = _Loader(text)
    documents = []
    try:
        while loader.check_node():
            node = loader.get_node()
            documents.append(Document(str(path), loader.construct_document(node), node))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise Invalid(f"{path}{line}: {error.problem}.", hint="A file is YAML or JSON.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Invalid(f"{path} is neither YAML nor JSON: {str(error)[:200]}") from error
    finally:
        loader.dispose()
    return documents


def to_yaml(content: Any) -> str:
    """The content as YAML that `read_documents` reads back as it was, in the order in which it is."""
    return yaml.dump(
        _plain(content), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that we or a reader of YAML 1.1, as kubectl is, would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # Items of a list are set in, as people write them.


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _plain(content: Any) -> Any:
    """Whole numbers without their .0."""
    match content:
        case dict():
            return {key: _plain(value) for key, value in content.items()}
        case list():
            return [_plain(value) for value in content]
        case float() if content.is_integer():
            return int(content)
    return content


# A field of two kinds (a step is a number or a mapping) is named by pydantic with the kind behind it.
_KINDS = re.compile(r"^(?:[A-Z]\w*|function-\w+\[.*\]|constrained-\w+|float|int|str|union)$")


def _written(where: Sequence[int | str]) -> list[int | str]:
    """The path as it is in the file, without pydantic's names of kinds."""
    return [part for part in where if isinstance(part, int) or not _KINDS.match(part)]


def _dotted(where: Sequence[int | str]) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _complaint(error: ErrorDetails, path: str, name: str) -> str:
    message, given = error["msg"].rstrip("."), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"a {name} has no field `{path}`"
        case "missing":
            return f"`{path}` is missing"
    if "Value error, " in message:
        return f"`{path}`: {message.removeprefix('Value error, ')}" if path else message.removeprefix("Value error, ")
    expected = message.split(", unable to parse")[0].removeprefix("Input should be ")
    expected = message if expected == message else f"expected {expected.removeprefix('in ')}"
    return f"`{path}`: {expected}" + ("" if isinstance(given, dict | list) else f", not {given!r}")
