"""Build an sdist and, from it, a wheel into dist/; see that both bring the page and that the wheel serves it.

The wheel is unpacked beside nothing of this checkout and runs on the development environment's dependencies.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PAGE = "bise/server/static/"
NEEDED = (f"{PAGE}index.html", f"{PAGE}manifest.webmanifest", "bise/hub/brise/model.safetensors")
FOREIGN = ("node_modules/", "/__pycache__/", ".env", "/tests/test_")
START = """
import sys
sys.path[:0] = sys.argv[1:3]
sys.argv[1:] = ["serve", "--port", "0", "--no-key"]
from bise.cli import main
main()
"""


def main() -> None:
    """Build and check; ends with a message where something is missing."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    backend = (
        "import sys; sys.path.insert(0, 'tools'); import build_backend; build_backend.build_sdist('dist')"
    )
    _run([sys.executable, "-c", backend])
    sdist = next(DIST.glob("bise-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        _check(sdist, [name.partition("/src/")[2] or name for name in archive.getnames()])
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", str(sdist)])
    wheel = next(DIST.glob("bise-*.whl"))
    unpacked = DIST / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        _check(wheel, archive.namelist())
        archive.extractall(unpacked)
    _serve(unpacked)
    shutil.rmtree(unpacked)
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (sdist, wheel))
    print(f"{sizes}: the page is inside, and the wheel serves it")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stdout.decode(errors='replace')[-4000:]}")


def _check(path: Path, names: list[str]) -> None:
    missing = [name for name in NEEDED if name not in names]
    if not any(name.startswith(f"{PAGE}assets/") and name.endswith(".js") for name in names):
        missing.append(f"{PAGE}assets/*.js")
    foreign = [name for name in names if any(part in f"/{name}" for part in FOREIGN)]
    if missing or (foreign and path.suffix == ".whl"):
        sys.exit(f"{path.name}: missing {missing}, does not belong there {foreign[:5]}")


def _serve(unpacked: Path) -> None:
    """Start the unpacked wheel and fetch its page with everything that it names, and an answer."""
    packages = sysconfig.get_paths()["purelib"]
    # Without site there are no .pth files, and so no way back to this checkout.
    command = [sys.executable, "-S", "-c", START, str(unpacked), packages]
    home = {"BISE_HOME": str(DIST / "home"), "PATH": "/usr/bin:/bin"}
    server = subprocess.Popen(command, cwd=DIST, env=home, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+?(?=/v1)", server.stdout.readline())
        if found is None:
            sys.exit("the wheel does not start a server")
        page = _get(f"{found[0]}/")
        names = re.findall(r'(?:src|href)="(/[^"]+)"', page)
        if not any(name.endswith(".js") for name in names):
            sys.exit("the page names no script")
        for name in names:
            _get(found[0] + name)
        if "models" not in json.loads(_get(f"{found[0]}/api/v1/bootstrap")):
            sys.exit("the assistant does not answer")
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(DIST / "home", ignore_errors=True)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode(errors="replace")


if __name__ == "__main__":
    main()
