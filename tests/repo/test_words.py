"""One word, one thing; and what must never be committed.

The external system is the recharge API, in identifiers never by
another word.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
#: Word -> what to say instead.
BANNED: Final = {
    "provider": "recharge API",
    "backend": "recharge API",
    "gateway": "recharge API",
}
SOURCES: Final = sorted(
    path for folder in ("function", "demo") for path in (ROOT / folder).rglob("*.py")
)
WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: A header and at least a line of the key: a test that only names the header is fine.
PRIVATE_KEY: Final = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}"
)
INDEX: Final = re.compile(r"https?://|--(extra-)?index-url|--find-links|--trusted-host")


def words(identifier: str) -> list[str]:
    """The words of an identifier, however they are joined."""
    return [word.lower() for word in WORD.findall(identifier)]


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives; what libraries call their own is theirs."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(asname=str(name)):
                yield name
            case _:
                pass


def files() -> list[Path]:
    """What is in git, and what `git add .` would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("not a git work tree")
    names = [name for name in found.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_words_of_an_identifier_are_found() -> None:
    assert words("ApiGatewayURL_provider2") == ["api", "gateway", "url", "provider"]
    tree = ast.parse("import a as gateway\nself.backend = 1\ndef f(provider): pass")
    assert sorted(defined(tree)) == ["backend", "f", "gateway", "provider"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_identifier_has_no_synonym_of_the_recharge_api(path: Path) -> None:
    names = [path.stem, *defined(ast.parse(path.read_text("utf-8")))]
    found = {name for name in names for word in words(name) if word in BANNED}

    assert not found, f"{path.name}: say {set(BANNED.values())} instead of {found}"


def test_private_key_is_recognised() -> None:
    key = b"-----BEGIN RSA PRIVATE KEY" + b"-----\n" + b"A" * 64

    assert PRIVATE_KEY.search(key)
    assert not PRIVATE_KEY.search(b"starts with -----BEGIN PRIVATE KEY" + b'-----")')


def test_no_private_key_is_in_git() -> None:
    assert [p for p in files() if PRIVATE_KEY.search(p.read_bytes())] == []


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_file_has_no_address_of_a_package_index(name: str) -> None:
    """Everybody installs from the index that their own pip is told to use."""
    lines = (ROOT / name).read_text("utf-8").splitlines()

    assert any("==" in line for line in lines)
    assert any("--hash=sha256:" in line for line in lines)
    assert [line for line in lines if INDEX.search(line)] == []
