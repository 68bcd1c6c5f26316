"""Generated pages: settings from `ogls/config/`, tables from `ogls/records/`, commands from the command line, and the
results of studies and benchmarks from their files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
STUDIES = REPO / "data" / "studies"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    generated = {
        "reference/config.md": settings(),
        "reference/tables.md": tables(),
        "reference/commands.md": commands(),
        "studies.md": studies(),
    }
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    for page in sorted(STUDIES.glob("*/README.md")):
        name = page.parent.name
        text = re.sub(r"\((\w+)\.png\)", rf"(../images/{name}-\1.png)", page.read_text())
        text = text.replace("](../../../docs/pages/", "](../")
        files.append(File.generated(config, f"studies/{name}.md", content=text))
        for picture in page.parent.glob("*.png"):
            uri = f"images/{name}-{picture.name}"
            files.append(File.generated(config, uri, abs_src_path=str(picture)))
    queries = REPO / "docs" / "measured" / "queries.svg"
    files.append(File.generated(config, "images/queries.svg", abs_src_path=str(queries)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace `{{ name }}` with the measured table of that name, and LaTeX with MathML.

    A formula is written as GitHub renders it, too: in a block ```math, or inline between $` and `$.
    """
    for path in (REPO / "docs" / "measured").glob("*.md"):
        markdown = markdown.replace(f"{{{{ {path.stem} }}}}", path.read_text())
    markdown = re.sub(r"\{\{ gpu-\w+ \}\}", "*No measurement of a GPU is recorded yet.*", markdown)
    markdown = re.sub(r"^```math\n(.*?)\n```$", lambda m: _block(m[1]), markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\$`(.+?)`\$", lambda m: f"<span>{_mathml(m[1], 'inline')}</span>", markdown)


def _block(latex: str) -> str:
    return f'<div class="formula">{_mathml(latex, "block")}</div>'


def _mathml(latex: str, display: str) -> str:
    """LaTeX as MathML, which browsers typeset without a script, a font or a network request."""
    from latex2mathml.converter import convert

    return convert(" ".join(latex.split()), display=display).replace("\n", "")


def settings() -> str:
    """The page of all settings, section by section."""
    from ogls.analysis.study import Case, Method, StudyConfig, Tuning
    from ogls.config import RunConfig

    lines = ["# Configuration\n", "Generated from `ogls/config/`. A configuration can extend another"]
    lines.append('(`extends = "tiny.toml"`), and `--set section.key=value` overrides any value, also in arrays')
    lines.append("(`evaluate.benchmarks.0.limit=50`). Environment variables override no setting.")
    lines.append(
        "*Numerics* settings change rounding, memory and speed, and *operational* settings how a run is executed:"
    )
    lines.append(
        "a run can be resumed with other values of both. All others identify the run ([more](../how-to/resume.md)).\n"
    )
    lines.append("`ogls config FILE` prints the resolved configuration.\n")
    for title, section in _sections("", RunConfig):
        lines += _settings_of(title or "The run", section)
    lines += ["## Studies\n", "The files in `deployments/studies/` ([how to write one](../how-to/compare.md)).\n"]
    for title, section in (("", StudyConfig), ("[[methods]]", Method), ("[[cases]]", Case), ("[tune]", Tuning)):
        lines += _settings_of(title and f"{title} of a study", section, "###")
    return "\n".join(lines)


def _settings_of(title: str, section: Any, heading: str = "##") -> list[str]:
    """The lines about a section: its title, what it is, and the table of its settings."""
    from ogls.config.section import kind_of

    lines = [f"{heading} {title}\n"] if title else []
    lines += [f"{inspect.cleandoc(section.__doc__ or '')}\n"]
    lines += ["| setting | type | default | description |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if not _is_section(field.annotation):
            kind = kind_of(field)
            mark = "" if kind == "identity" else f" *{kind.capitalize()}.*"
            description = (field.description or "").replace("|", "\\|").replace("<", "&lt;") + mark
            lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field.default)} | {description} |")
    return [*lines, ""]


def _sections(path: str, section: Any) -> Iterator[tuple[str, Any]]:
    """(title, section class) of a section and of all sections inside it."""
    yield path and f"[{path}]", section
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _sections(f"{path}.{name}".strip("."), field.annotation)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "model_fields")


def _type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " or "), text)
    return re.sub(r"\b(ogls(\.\w+)*|typing)\.", "", text).replace("|", "or")


def _default(value: Any) -> str:
    if value is None or value == "" or value == ():
        return "none"
    if isinstance(value, str) and len(value) > 60:
        return "see `ogls config`"
    if isinstance(value, tuple):
        return "<br>".join(f"`{v}`" for v in value) if all(isinstance(v, str) for v in value) else "see `ogls config`"
    return f"`{value}`"


def tables() -> str:
    """The data dictionary with the title of its page."""
    from ogls.analysis.dictionary import data_dictionary

    return data_dictionary().replace("# The data\n", "# Tables\n", 1)


def commands() -> str:
    """The page of all commands with their arguments and options, read from the Typer application."""
    import typer

    from flows.cli import app

    group: Any = typer.main.get_command(app)
    lines = ["# Commands\n", "Generated from the command line: `ogls COMMAND --help` prints the same.\n"]
    for name, command in group.commands.items():
        lines += [
            f"## ogls {name}\n",
            f"{(command.help or '').strip()}\n",
            "| option | description | default |",
            "| --- | --- | --- |",
        ]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            spelling = " ".join([*parameter.opts, *parameter.secondary_opts])
            spelling = spelling if spelling.startswith("-") else (parameter.metavar or spelling).upper()
            description = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            default = "" if parameter.default in (None, "", False) or callable(parameter.default) else parameter.default
            lines.append(f"| `{spelling}` | {description} | {default} |")
        lines.append("")
    return "\n".join(lines)


def studies() -> str:
    """The page of the studies, with links to the pages and figures that `on_files` adds."""
    text = (STUDIES / "README.md").read_text()
    text = re.sub(r"\(([\w-]+)/(\w+)\.png\)", r"(images/\1-\2.png)", text)
    text = text.replace("](../../docs/pages/", "](")
    return re.sub(r"\(([\w-]+)/README\.md\)", r"(studies/\1.md)", text)
