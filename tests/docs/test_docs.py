"""Documents: width of lines, links, and that commands and files named in them exist."""

import dataclasses
import functools
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/README.md")])
WIDTH = 120
GENERATED = {"reference/cli.md", "reference/configuration.md", "changelog.md", "contributing.md"}  # by docs/hooks.py


def page_id(page):
    return str(page.relative_to(ROOT))


def fenced_blocks(page, language):
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page):
    """The text outside fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_lines_are_not_wide(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        table = line.startswith("|")
        assert table or len(line) <= WIDTH, f"{page_id(page)}:{number} has {len(line)} columns"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        found = (page.parent / unquote(path)).resolve() if path else page
        generated = found.is_relative_to(ROOT / "docs") and str(found.relative_to(ROOT / "docs")) in GENERATED
        assert generated or found.exists(), f"{page_id(page)} links to {target}"
        if anchor and not generated and found.suffix == ".md":
            assert anchor in anchors(found), f"{page_id(page)} links to {target}"


def anchors(page):
    """Anchors that Markdown's `toc` extension gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page):
    for name in re.findall(
        r"(?<![\w/.-])((?:configs|docs|tests|scmdm|data_prep|benchmarks|launch)/[\w./-]+\.\w+)", page.read_text()
    ):
        if "lab/" in page_id(page) and not name.startswith("configs"):
            continue  # notes name the files of their commit
        assert (ROOT / name).exists() or name.removeprefix("docs/") in GENERATED, f"{page_id(page)} names {name}"


def commands(page):
    """Command lines of `scmdm` in the shell blocks of a page."""
    for block in fenced_blocks(page, "bash"):
        joined = re.sub(r"\\\n\s*", " ", block)
        for command in split_commands(joined):
            words = shlex.split(command, comments=True)
            for name in (["scmdm"], ["-m", "scmdm"]):
                at = next((i for i in range(len(words)) if words[i : i + len(name)] == name), None)
                if at is not None and not (at and name == ["scmdm"] and words[0] not in ("make", "scmdm")):
                    yield words[at + len(name) :]


def split_commands(text):
    """Logical lines: a quoted argument may span several lines."""
    current = ""
    for line in text.splitlines():
        current = f"{current}\n{line}" if current else line
        try:
            shlex.split(current, comments=True)
        except ValueError:
            continue
        yield current
        current = ""


COMMANDS = [(page, words) for page in PAGES if "docs/lab/" not in page_id(page) for words in commands(page)]
EXTENSIONS = ("left_to_right", "convolution", "anomaly", "numbers")  # of the worked examples, which have their own test


def test_commands_are_found():
    assert len(COMMANDS) > 50, "the pattern of commands no longer matches the documents"


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else None
)
def test_commands_parse(page, words):
    from scmdm.cli import COMMANDS as TABLE

    options = parser().parse_args(words)
    command = options.command
    if any(name in word for name in EXTENSIONS for word in words):
        return
    overrides = getattr(options, "overrides", [])
    if not overrides:
        return
    name = command.name if command.schema is not None else options.launched
    known = next(other for other in TABLE if other.name == name)
    problem = unknown_key(known.load_schema(), getattr(options, "config", None), overrides)
    assert problem is None, f"{page_id(page)}: {problem}"


@functools.cache
def parser():
    from scmdm.cli import build_parser

    return build_parser()


def unknown_key(schema, config, overrides):
    """The error of an override that names no key. Values, which may need files of the reader, are not judged."""
    from scmdm.config.loading import load_config
    from scmdm.domains.domain_registry import DOMAINS
    from scmdm.errors import UserError

    path = ROOT / config if config is not None and (ROOT / config).exists() else None
    metrics = {field.name for name in DOMAINS.names for field in dataclasses.fields(DOMAINS.schema(name))}
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("metrics.") and key.removeprefix("metrics.") not in metrics:
            return f"{override}: no domain has this key"
        try:
            load_config(schema, path, [override])
        except UserError as error:
            if re.search(r"unknown key|no longer", str(error)):
                return f"{override}: {error}"
    return None


def test_a_wrong_key_is_noticed():
    from scmdm.config.evaluation import EvaluateConfig
    from scmdm.config.preparation import PrepareConfig
    from scmdm.config.run import RunConfig

    assert unknown_key(RunConfig, "configs/qm9/base.yaml", ["train.step=3"]) is not None
    assert unknown_key(RunConfig, "configs/qm9/base.yaml", ["train.steps=3"]) is None
    assert unknown_key(EvaluateConfig, None, ["fcd=true"]) is not None
    assert unknown_key(EvaluateConfig, None, ["metrics.fcds=true"]) is not None
    assert unknown_key(PrepareConfig, "configs/data/shakespeare.yaml", ["source.units=lines"]) is not None


def test_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_diagram_shows_the_contract():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import architecture
    finally:
        sys.path.pop(0)
    assert architecture.OUT.read_text() == architecture.drawing(), "run `python docs/architecture.py`"


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    mkdocs.build(config)
    assert (tmp_path / "site/reference/configuration.html").stat().st_size > 10_000
