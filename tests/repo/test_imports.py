"""Imports of function/ go one way, and each library has its one place.

The table in function/__init__.py is the rule; a module that it doesn't name, or that
imports sideways, fails here.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from function import LAYERS

ROOT: Final = Path(__file__).parents[2]
FUNCTION: Final = ROOT / "function"
MODULES: Final = sorted(
    path
    for folder in (FUNCTION, FUNCTION / "doctor")
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
)
ALL_FILES: Final = sorted(FUNCTION.rglob("*.py"))

#: Who may import a library: each is known to as few modules as can be.
PLACE_OF_LIBRARY: Final = {
    "cloudevents": {"events"},
    "jsonschema_rs": {"events"},
    "phonenumbers": {"events"},
    "iso4217": {"events", "reconcile"},
    # Operators' commands talk to others than the recharge API.
    "requests": {"http_exchange", "recharge_api", "api_auth", "reconcile", "replay"},
    "oauthlib": {"api_auth"},
    "urllib3": {
        "http_answer",
        "http_exchange",
        "recharge_api",
        "replay",
        "doctor.cluster",
    },
    # Who may post events: the tokens and the keys that sign them.
    "jwt": {"event_tokens", "issuer_keys"},
    # Of the extra `cluster`: the function's image has neither.
    "kubernetes": {"doctor.cluster"},
    "yaml": {"doctor.cluster"},
    "flask": {"main"},
    "functions_framework": {"main"},
    "gunicorn": {"gunicorn.conf"},
    "pythonjsonlogger": {"telemetry"},
    "logging": {"telemetry"},
}

#: Beside the project's own modules: pure control flow needs no more.
PURE: Final = {
    "processing": {"time", "collections", "threading", "typing"},
    "circuit_breaker": {"collections", "threading", "types", "typing"},
    "json_bound": {"typing"},
    "model": {"dataclasses", "enum", "typing"},
    "errors": set[str](),
    "durations": {"re", "typing"},
    "doctor.diagnosis": {"collections", "dataclasses", "enum", "typing"},
    "doctor.documents": {"collections", "dataclasses", "math", "typing"},
    "plan": {"math", "dataclasses", "typing"},
    "doctor.source": {"collections", "dataclasses", "typing"},
    "doctor.pods": {"collections", "itertools", "pathlib", "typing"},
    "doctor.scaling": {"collections", "typing"},
    "doctor.topics": {"collections", "typing"},
}
#: Of the extra `cluster`, which `topup doctor` alone needs.
OPTIONAL: Final = {"kubernetes", "yaml"}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with the level of a relative import."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if base in {"function", "function.doctor"}:
                yield from ((f"{base}.{alias.name}", 0) for alias in node.names)
            else:
                yield base, node.level


def name_of(path: Path) -> str:
    """A module's name within function/."""
    return ".".join(path.relative_to(FUNCTION).parts).removesuffix(".py")


def own(path: Path) -> set[str]:
    """The modules of function/ that a file imports."""
    names = {name.removeprefix("function.") for name, _ in imported(path)}
    return names & {name_of(module) for module in MODULES}


def libraries(path: Path) -> set[str]:
    """The first names of everything else that it imports."""
    return {name.split(".")[0] for name, _ in imported(path)} - {"function"}


def test_every_module_stands_once_in_the_table() -> None:
    listed = [module for layer in LAYERS for module in layer]

    assert len(listed) == len(set(listed))
    # The table may name what is yet to come; a module may not be missing in it.
    assert {name_of(path) for path in MODULES} <= set(listed)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_from_rows_above_its_own(path: Path) -> None:
    row = next(i for i, layer in enumerate(LAYERS) if name_of(path) in layer)
    above = {module for layer in LAYERS[:row] for module in layer}

    assert own(path) <= above, f"{path.name}: {own(path) - above}"


@pytest.mark.parametrize(
    "path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_import_is_absolute(path: Path) -> None:
    """The framework loads main.py under another name: a class would have two."""
    assert [name for name, level in imported(path) if level] == []


@pytest.mark.parametrize(
    "path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_imports_the_composition_root_or_the_demo(path: Path) -> None:
    assert "main" not in own(path)
    assert not {"main", "demo", "console", "tests"} & libraries(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_library_is_imported_only_in_its_place(path: Path) -> None:
    elsewhere = {
        library
        for library in libraries(path)
        if name_of(path) not in PLACE_OF_LIBRARY.get(library, {name_of(path)})
    }

    assert elsewhere == set()


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_module_imports_nothing_that_does_io(module: str) -> None:
    assert libraries(FUNCTION / f"{module.replace('.', '/')}.py") <= PURE[module]


def test_sqlalchemy_is_known_only_to_the_ledgers_side() -> None:
    knowing = {name_of(path) for path in MODULES if "sqlalchemy" in libraries(path)}

    layer_of = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    assert knowing.isdisjoint({"main", "processing", "events", "recharge_api", "model"})
    assert knowing <= set(layer_of)


def test_environment_is_read_by_the_settings_alone() -> None:
    """gunicorn.conf.py reads PORT, which Knative sets and no operator."""
    readers = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    }

    assert readers == {"config", "gunicorn.conf"}


def test_migration_knows_the_tables_and_nothing_else_of_ours() -> None:
    for path in sorted((FUNCTION / "migrations").rglob("*.py")):
        assert own(path) <= {"schema"}, path


def test_standard_library_and_dependencies_are_all_that_is_imported() -> None:
    """What isn't in requirements.lock would be missing in the image."""
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    locked = {line.split("==")[0].lower() for line in lock.splitlines() if "==" in line}
    package_of = {
        "flask": "flask",
        "functions_framework": "functions-framework",
        "jsonschema_rs": "jsonschema-rs",
        "jwt": "pyjwt",
        "phonenumbers": "phonenumberslite",
        "pythonjsonlogger": "python-json-logger",
        "requests_oauthlib": "requests-oauthlib",
    }
    used = {library for path in ALL_FILES for library in libraries(path)}
    foreign = used - set(sys.stdlib_module_names)

    assert {package_of.get(name, name) for name in foreign - OPTIONAL} <= locked


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_optional_library_is_imported_only_where_it_is_used(path: Path) -> None:
    """At the top of a module it would keep the image, which lacks it, from starting."""
    tree = ast.parse(path.read_text("utf-8"))
    at_top = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }

    assert at_top.isdisjoint(OPTIONAL)
