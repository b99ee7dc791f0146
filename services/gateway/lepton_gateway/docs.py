"""The pages for people: one a model with its schema, a form to try it and snippets, and one of everything else.

They need no network but the front door they came from, and the browser is told so (Content-Security-Policy).
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from math import prod
from typing import Any

import orjson
from lepton_common.http11 import Request
from lepton_common.signature import Signature, TensorSpec

from lepton_gateway.snippets import Caller, shape_of, snippets, zero_of

_HOST = re.compile(rb"[A-Za-z0-9.:\[\]-]{1,255}")
_SERVICES = ("registry", "rollout", "monitor")
_FEW = 64  # elements of an example that are written out in the form


class Docs:
    """Renders pages. Reads its own files once."""

    def __init__(self) -> None:
        folder = files("lepton_gateway")
        self._style = (folder / "docs.css").read_text()
        self._model_script = (folder / "docs_model.js").read_text()
        self._index_script = (folder / "docs_index.js").read_text()

    def model(self, request: Request, model: str, version: str, signature: Signature, *, keyless: bool) -> None:
        """Answers with the page of a model; `version` is empty where the split is to choose."""
        caller = Caller(_address(request), keyless)
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        title = f"{model} version {version}" if version else model
        about = {"path": f"{path}/infer", "inputs": [_example(each) for each in signature.inputs]}
        body = [
            f"<h1>{escape(title)} <small>{escape(caller.address)}</small></h1>",
            f"<section><h2>Inputs</h2>{_specs(signature.inputs)}<h2>Outputs</h2>{_specs(signature.outputs)}"
            '<p class="dim">-1 is any size.</p></section>',
            _form(signature.inputs, keyless=keyless),
            "<section><h2>Call it</h2>" + _blocks(snippets(model, signature, caller).items()) + "</section>",
            '<p><a href="/v2/docs">All models and the API</a></p>',
            f'<script type="application/json" id="about">{_embedded(about)}</script>',
        ]
        self._answer(request, title, "\n".join(body), self._model_script)

    def index(self, request: Request, models: Iterable[str]) -> None:
        """Answers with the page of all models, and of `/v1`."""
        links = "".join(f'<li><a href="/v2/models/{each}/docs">{escape(each)}</a></li>' for each in models)
        body = (
            f"<h1>Lepton</h1>\n<section><h2>Models</h2><ul>{links}</ul>"
            f"{'' if links else '<p>None is served yet: lepton push model.onnx --name mine</p>'}</section>\n"
            "<section><h2>The API under /v1</h2><p>It wants a key: <code>Authorization: Bearer lp_…</code>."
            f'</p><div id="operations" data-services="{" ".join(_SERVICES)}"></div></section>'
        )
        self._answer(request, "Lepton", body, self._index_script)

    def _answer(self, request: Request, title: str, body: str, script: str) -> None:
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{self._style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
            f"<script>{script}</script>\n</body>\n</html>\n"
        )
        headers = (
            "content-type: text/html; charset=utf-8\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n"
            "referrer-policy: no-referrer\r\ncontent-security-policy: default-src 'none'; connect-src 'self'; "
            f"script-src {_hash(script)}; style-src {_hash(self._style)}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
        )
        request.respond(200, headers.encode(), page.encode())


def _specs(specs: Sequence[TensorSpec]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(each.name)}</code></td><td>{each.datatype}</td><td>{escape(str(list(each.shape)))}</td></tr>"
        for each in specs
    )
    return f"<table><thead><tr><th>Name</th><th>Datatype</th><th>Shape</th></tr></thead><tbody>{rows}</tbody></table>"


def _form(inputs: Sequence[TensorSpec], *, keyless: bool) -> str:
    fields = "".join(
        f"<label><span>{escape(each.name)}, {each.datatype}, as JSON; or <code>zeros</code></span>"
        f'<textarea name="input-{index}" rows="3" spellcheck="false">{escape(_prefilled(each))}</textarea></label>'
        for index, each in enumerate(inputs)
    )
    note = "on this machine none is needed" if keyless else "kept nowhere"
    return (
        f'<section><h2>Try it</h2><form id="try">{fields}'
        f"<label><span>API key ({note})</span>"
        '<input type="password" name="key" autocomplete="off"></label>'
        '<label class="beside"><input type="checkbox" name="trace" checked>'
        "<span> trace it: where does the time go?</span></label><button disabled>Run</button></form>"
        '<div id="told"></div></section>'
    )


def _prefilled(spec: TensorSpec) -> str:
    shape = shape_of(spec)
    if prod(shape) > _FEW:
        return "zeros"
    value: Any = zero_of(spec.datatype)
    for size in reversed(shape):
        value = [value] * size
    return orjson.dumps(value).decode()


def _example(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "example": shape_of(spec), "zero": zero_of(spec.datatype)}


def _blocks(named: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in named)


def _embedded(document: Any) -> str:
    """JSON that ends no script element, whatever names a model's author chose."""
    return orjson.dumps(document).decode().replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _address(request: Request) -> str:
    """The front door as the caller wrote it, which is only put where text belongs."""
    host = request.headers.get(b"host", b"")
    return host.decode("latin-1") if _HOST.fullmatch(host) else "127.0.0.1:8080"
