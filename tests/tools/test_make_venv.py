"""tools/make_venv.sh says what to install when something is missing, in one line and with exit code 2."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "make_venv.sh"
OLD = '#!/bin/sh\ncase "$1" in -V) echo "Python 3.9.2";; *) exit 1;; esac\n'
NO_ENSUREPIP = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *) exit 0;; esac\n'
NO_HEADERS = '#!/bin/sh\ncase "$2" in *Python.h*) exit 1;; *) exit 0;; esac\n'
FINE = "#!/bin/sh\nexit 0\n"


@pytest.mark.parametrize(
    ("python", "compiler", "words"),
    [
        (None, True, ["Python 3.11", "python3-venv"]),
        (OLD, True, ["Python 3.11", "3.9.2"]),
        (NO_ENSUREPIP, True, ["venv", "apt-get install python3-venv"]),
        (NO_HEADERS, True, ["headers", "apt-get install python3-dev"]),
        (FINE, False, ["C++20 compiler", "apt-get install g++"]),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, python, compiler, words):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("sh", "touch", "tail"):
        (bin_dir / tool).symlink_to(shutil.which(tool))
    if python is not None:
        (bin_dir / "python3").write_text(python)
        (bin_dir / "python3").chmod(0o755)
    if compiler:
        (bin_dir / "g++").write_text(FINE)
        (bin_dir / "g++").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(SCRIPT), "run"],
        cwd=tmp_path,
        env={"PATH": str(bin_dir)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / ".venv").exists()
