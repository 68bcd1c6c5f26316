"""Self-contained HTML pages without network requests. Texts of models and problems are never markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from markupsafe import Markup

_SCRIPTS = ("page.js", "charts.js", "tokens.js", "group.js", "history.js", "rollouts.js")
_STYLES = ("page.css", "charts.css", "tokens.css")


def render(template: str, data: Mapping[str, Any], served: bool = False, **values: Any) -> str:
    """Return a template of `pages/` rendered with inline styles and scripts. Values are escaped unless they are Markup.

    `data` is embedded as JSON for the scripts, by the id of its element. The content security policy of the page allows
    only the scripts of `pages/` and no network access; a page that is `served` may ask its own server.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ogls.analysis", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_source(name) for name in _SCRIPTS]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {digests}; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if served else "")
    )
    return environment.get_template(template).render(
        policy=policy,
        css=Markup("\n".join(_source(name) for name in _STYLES)),
        scripts=[Markup(script) for script in scripts],
        data={name: embed_json(content) for name, content in data.items()},
        **values,
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def embed_json(data: Any) -> Markup:
    """Return data as JSON that is safe inside a script element, whatever text it contains."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(name: str) -> str:
    return (files("ogls.analysis") / "pages" / name).read_text(encoding="utf-8")
