"""The schemas of the official JSON Schema test suite: each is refused, or every output under it validates.

The suite comes with the source distribution of jsonschema, which is also the judge.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tarfile

import jsonschema
import pytest

from bise.errors import RequestError
from bise.grammar.spec import GrammarSpec

JUDGES = {
    "draft4": jsonschema.Draft4Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft2020-12": jsonschema.Draft202012Validator,
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    wanted = f"jsonschema=={importlib.metadata.version('jsonschema')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "jsonschema",
        wanted,
    ]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tests,) = folder.glob("*/json/tests")
    return tests


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("draft", JUDGES)
def test_every_schema_of_the_official_suite_is_kept_or_refused(outputs, suite, draft):
    kept = refused = 0
    empty = []
    judge = JUDGES[draft]
    for file in sorted((suite / draft).rglob("*.json")):
        for group in json.loads(file.read_text()):
            schema, place = group["schema"], f"{file.name}: {group['description']}"
            try:
                made = outputs(GrammarSpec.json_schema(schema), 1)
            except RequestError as error:
                refused += 1
                if "allows no output" in str(error):
                    empty.append((place, group["tests"]))
                continue
            kept += 1
            validator = judge(schema, format_checker=judge.FORMAT_CHECKER)
            for text in made.some(12, room=25):
                assert validator.is_valid(json.loads(text)), f"{place}: {text}"
    assert not [place for place, cases in empty if any(case["valid"] for case in cases)]
    assert kept > 100
    assert refused >= 50
