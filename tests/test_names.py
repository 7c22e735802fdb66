"""Names are unique: no two modules and no two public classes of one name."""

import ast
from collections import defaultdict

from tests.conftest import ROOT

PACKAGES = ("scmdm", "data_prep")
# The files that every plug-in folder has.
CONVENTION = ("domain.py", "config.py", "metrics.py", "figures.py", "__init__.py", "__main__.py")


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def repeated(found):
    return {name: sorted(places) for name, places in found.items() if len(places) > 1}


def test_module_names_are_unique():
    found = defaultdict(list)
    for path in sources():
        if path.name not in CONVENTION:
            found[path.name].append(str(path.relative_to(ROOT)))
    assert found and repeated(found) == {}


def test_public_class_names_are_unique():
    found = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(ROOT)))
    assert found and repeated(found) == {}
