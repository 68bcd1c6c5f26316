"""Self-contained HTML pages without network requests. Texts of models and problems are never markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Return a template of `pages/` rendered with inline styles and scripts. Values are escaped unless they are Markup.

    The content security policy of the page allows only its own script and no network access.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ogls.analysis", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _source("tokens.js")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        policy=policy, css=Markup(_source("page.css")), script=Markup(script), **values
    )


def embed_json(data: Any) -> Markup:
    """Return data as JSON that is safe inside a script element, whatever text it contains."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(name: str) -> str:
    return (files("ogls.analysis") / "pages" / name).read_text(encoding="utf-8")
