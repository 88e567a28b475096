"""Promises D1 to D8: pulls are whole or nothing, whatever the hub, the disk and people do."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import signal
import subprocess
import sys
import time

import pytest
from stub_hub import assert_whole, fetch, installed

from bise.errors import ConfigError, HubError, UserError
from bise.hub.client import HubClient
from bise.hub.installed import remove, verify
from bise.hub.registry import local_models, resolve

SHARD = "model-00001-of-00002.safetensors"
REPO = "owner/tiny"


@pytest.fixture(autouse=True)
def _home(home):
    return home


def test_a_pulled_model_is_there_whole_and_every_name_of_it_resolves(hub, home):
    pulled = fetch(hub)
    assert pulled.fetched
    assert_whole(hub, home)
    assert [path.name for path in local_models()] == ["tiny"]
    assert resolve("tiny") == resolve(REPO) == pulled.path
    assert not fetch(hub).fetched
    hub.files["config.json"] += b" "
    origin = json.loads((pulled.path / "pulled.json").read_bytes())
    assert origin == {"hub": hub.url, "repo": REPO, "commit": "c" * 40, "licence": "apache-2.0"}


def test_only_what_a_model_needs_is_fetched_and_never_a_pickle(hub, home):
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "modeling.py",
        "onnx/model.onnx",
        "consolidated.safetensors",
    ):
        hub.files[name] = b"x"
    fetch(hub)
    wanted = {SHARD, "model-00002-of-00002.safetensors", "config.json", "tokenizer.json", "LICENSE"}
    assert set(installed(home)) == wanted | {"pulled.json", "SHA256SUMS"}


def test_nothing_is_fetched_before_the_licence_is_taken(hub, home):
    def refuse(listing, size):
        assert (listing.licence, size) == ("apache-2.0", sum(map(len, hub.files.values())))
        raise UserError("not taken")

    with pytest.raises(UserError, match="not taken"):
        fetch(hub, accept=refuse)
    assert len(hub.seen) == 1
    assert installed(home) is None


# D1


def short_body(handler, name, data):
    if name != SHARD:
        return False
    handler.head(200, {"content-length": str(len(data))})
    handler.wfile.write(data[:0])
    handler.cut()
    return True


def wrong_length(handler, name, data):
    if name != SHARD:
        return False
    handler.head(200, {"content-length": str(len(data) - 5)})
    handler.wfile.write(data[:-5])
    return True


def endless(handler, name, data):
    if name != SHARD:
        return False
    handler.head(200, {"connection": "close"})
    while True:
        handler.wfile.write(b"x" * 65536)


def other_bytes(handler, name, data):
    if name != SHARD:
        return False
    handler.send_file(bytes(len(data)))
    return True


def server_error(handler, name, data):
    if name != SHARD:
        return False
    handler.head(500, {"content-length": "0"})
    return True


@pytest.mark.parametrize("fault", [short_body, wrong_length, endless, other_bytes, server_error])
def test_d1_a_bad_body_never_becomes_visible_and_a_good_hub_mends_it(fault, hub, home):
    hub.faults = [fault]
    with pytest.raises(HubError):
        fetch(hub)
    assert installed(home) is None
    assert local_models() == []
    hub.faults = []
    fetch(hub)
    assert_whole(hub, home)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_d1_a_wrong_hash_in_the_listing_installs_nothing(name, hub, home):
    hub.lying_sums[name] = "0" * (64 if name == SHARD else 40)
    with pytest.raises(HubError, match=rf"{name}: what the hub sent is not what it listed"):
        fetch(hub)
    assert installed(home) is None


def test_d1_a_file_without_any_hash_is_refused(hub, home):
    hub.lying_sums["config.json"] = "?"
    with pytest.raises(HubError, match=r"no hash of config\.json"):
        fetch(hub)


@pytest.mark.parametrize("ranges", [True, False])
def test_d1_a_transfer_cut_again_and_again_is_put_together(ranges, hub, home):
    hub.ranges = ranges
    cuts = [0]

    def cut_often(handler, name, data):
        if name != SHARD or cuts[0] >= 4 or (not ranges and cuts[0]):
            return False
        cuts[0] += 1
        wanted = int(handler.headers.get("range", "bytes=0-")[6:-1])
        headers = {"content-length": str(len(data) - wanted), "etag": '"e1"'}
        if wanted:
            headers["content-range"] = f"bytes {wanted}-{len(data) - 1}/{len(data)}"
        handler.head(206 if wanted else 200, headers)
        handler.wfile.write(data[wanted : wanted + 50_000])
        handler.cut()
        return True

    hub.faults = [cut_often]
    fetch(hub)
    assert_whole(hub, home)
    starts = [int(headers.get("range", "bytes=0-")[6:-1]) for headers in hub.requests_for(SHARD)]
    if ranges:
        assert len(starts) == 5
        assert starts == sorted(starts)
        assert starts[-1] >= 150_000
        assert all(headers.get("if-range") == '"e1"' for headers in hub.requests_for(SHARD)[1:])


def test_d1_a_part_of_another_time_is_thrown_away_when_its_hash_is_wrong(hub, home):
    hub.faults = [server_error]
    with pytest.raises(HubError):
        fetch(hub)
    part = home / "models" / ".pulling" / "tiny" / f"{SHARD}.part"
    part.write_bytes(b"stale" * 100)
    hub.faults = []
    fetch(hub)
    assert_whole(hub, home)


def test_d1_a_lying_range_is_refused(hub, home):
    part = home / "models" / ".pulling" / "tiny" / f"{SHARD}.part"

    def shifted(handler, name, data):
        if name != SHARD or not handler.headers.get("range"):
            return False
        handler.head(206, {"content-range": f"bytes 5-{len(data) - 1}/{len(data)}", "content-length": "0"})
        return True

    hub.faults = [server_error]
    with pytest.raises(HubError):
        fetch(hub)
    part.write_bytes(hub.files[SHARD][:1000])
    hub.faults = [shifted]
    with pytest.raises(HubError, match="other bytes than those asked for"):
        fetch(hub)
    assert installed(home) is None


# D2


def kill_until_done(stub, home, kills: int, seed: int) -> tuple[int, int]:
    """SIGKILL pulls at random moments until `kills` were killed; returns (killed, models checked whole)."""
    rng = random.Random(seed)
    hub = stub.StubHub(stub.model_files(400_000), pause_s=0.002)
    code = (
        "import sys\n"
        "from bise.hub.client import HubClient\n"
        "from bise.hub.pull import pull\n"
        "import httpx\n"
        "print('go', flush=True)\n"
        "with HubClient(sys.argv[1]) as c:\n"
        "    pull(c, 'owner/tiny', 'main', 'tiny', accept=lambda l, s: None)\n"
    )
    killed = whole = 0
    try:
        while killed < kills:
            process = subprocess.Popen([sys.executable, "-c", code, hub.url], stdout=subprocess.PIPE)
            process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.16))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            process.wait()
            process.stdout.close()
            files = installed(home)
            if files is not None:
                assert {name: files[name] for name in hub.files} == hub.files
                assert verify("tiny") == []
                remove("tiny")
                whole += 1
        fetch(hub)
        assert_whole(hub, home)
    finally:
        hub.close()
    return killed, whole + 1


def test_d2_a_pull_killed_at_random_moments_goes_on_to_the_same_bytes(stub, home):
    assert kill_until_done(stub, home, 5, seed=1)[0] == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_d2_two_hundred_kills(stub, home):
    killed, whole = kill_until_done(stub, home, 200, seed=2)
    print(f"killed {killed} pulls; {whole} finished and were whole")
    assert killed == 200


# D3

HOSTILE = [
    "../config.json", "..", ".", "", "a/../../b", "/etc/passwd", "/config.json", "//host/x", "~/x", "~root",
    "C:\\x", "C:x", "c:/x", "..\\x", "a\\b", "\\\\host\\x", "a\0b", "config.json\0.bin", "a\nb", "a\rb",
    "a\x1bb", "a\u202eb", "con", "CON.json", "nul", "aux.txt", "COM1", "lpt9.json", "prn.tensors", "a/nul/b",
    "CONFIG.JSON", "Config.json", "config.json ", "config.json.", "x" * 256, "é" * 128, "a//b", "a/./b",
    "a:b", "a?b", "\ud800", "ｃonfig.json", "x/" * 600 + "x", 7, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:30])
def test_d3_a_hostile_name_in_the_listing_stops_the_pull(name, hub, home, tmp_path):
    assert len(HOSTILE) >= 40
    hub.extra = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    before = {path for path in tmp_path.rglob("*") if ".pulling" not in str(path)}
    with pytest.raises(HubError):
        fetch(hub)
    assert len(hub.seen) == 1
    after = {path for path in tmp_path.rglob("*") if ".pulling" not in str(path)}
    assert after - before <= {home, home / "models"}


@pytest.mark.parametrize(
    "entry", [{"type": "symlink"}, {"mode": "120000"}, {"mode": 120000}, {"type": "directory"}]
)
def test_d3_a_link_in_the_listing_stops_the_pull(entry, hub):
    hub.extra = [{"rfilename": "tokenizer.model", "size": 1, "blobId": "0" * 40, **entry}]
    with pytest.raises(HubError, match="something else than a file"):
        fetch(hub)


@pytest.mark.parametrize("name", ["..", "a/b", ".pulling", "", "a\0", "con", "x" * 300])
def test_d3_a_model_cannot_be_given_a_name_outside_its_folder(name, hub):
    with pytest.raises(UserError, match="cannot be the name"):
        fetch(hub, name=name)
    assert hub.seen == []


# D4


def redirecting(target, only=SHARD):
    def redirect(handler, name, data):
        if name != only:
            return False
        handler.head(302, {"location": f"{target}{handler.path}", "content-length": "0"})
        return True

    return redirect


def test_d4_the_token_goes_to_the_configured_host_and_not_along_a_redirect(hub, stub, home):
    other = stub.StubHub()
    try:
        hub.faults = [redirecting(other.url)]
        fetch(hub, token="hf-secret")
        assert_whole(hub, home)
        assert all(headers.get("authorization") == "Bearer hf-secret" for _, headers in hub.seen)
        assert other.requests_for(SHARD)
        assert not any("hf-secret" in str(headers) for _, headers in other.seen)
    finally:
        other.close()


def test_d4_a_token_once_dropped_does_not_come_back(hub, stub):
    """The other host sends the client back to the first: it could have made the address up."""
    other = stub.StubHub()
    try:
        hub.faults = [
            lambda handler, name, data: (
                redirecting(other.url)(handler, name, data) if "bounced" not in handler.path else False
            )
        ]
        other.faults = [
            lambda handler, name, data: (
                handler.head(302, {"location": f"{hub.url}/bounced/{name}", "content-length": "0"}) or True
            )
        ]
        fetch(hub, token="hf-secret")
        bounced = [headers for path, headers in hub.seen if path.startswith("/bounced/")]
        assert bounced
        assert not any("authorization" in headers for headers in bounced)
    finally:
        other.close()


def test_d4_redirects_end(hub):
    hub.faults = [redirecting("")]
    with pytest.raises(HubError, match="more than 5 times"):
        fetch(hub)


# D5


@pytest.mark.parametrize(
    "url",
    ["http://hub.example", "ftp://hub.example", "hub.example", "https://u:p@hub.example", "https://", "http://[::"
     , "https://hub.example?x=1", "http://127.0.0.1.example", "http://10.0.0.1"],
)  # fmt: skip
def test_d5_only_https_or_this_machine_is_asked(url):
    with pytest.raises(ConfigError):
        HubClient(url)


@pytest.mark.parametrize(
    "target", ["http://hub.example", "ftp://hub.example", "file://", "https://[::", "gopher://a"]
)
def test_d5_a_redirect_away_from_https_is_refused(target, hub, home):
    hub.faults = [redirecting(target)]
    with pytest.raises(HubError, match=r"redirects to|Invalid URL"):
        fetch(hub)
    assert installed(home) is None


def test_d5_a_certificate_that_nobody_vouches_for_is_refused(tmp_path, stub):
    import ssl

    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k.pem", "-out", "c.pem",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    hub = stub.StubHub()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
        hub.server.socket = context.wrap_socket(hub.server.socket, server_side=True)
        hub.url = hub.url.replace("http:", "https:")
        with pytest.raises(HubError, match=r"(?i)certificate"):
            fetch(hub)
        assert hub.seen == []
    finally:
        hub.close()


def test_d5_packed_bodies_are_not_unpacked(hub, home):
    bomb = gzip.compress(bytes(50_000_000))

    def packed(handler, name, data):
        handler.head(200, {"content-encoding": "gzip", "content-length": str(len(bomb))})
        handler.wfile.write(bomb)
        return True

    hub.faults = [packed]
    with pytest.raises(HubError):
        fetch(hub)
    assert installed(home) is None
    hub.listing_headers = {"content-encoding": "gzip"}
    with pytest.raises(HubError, match="packed"):
        fetch(hub)


def test_a_silent_hub_is_given_up(hub, home):
    def silent(handler, name, data):
        time.sleep(0.5)
        return True

    hub.faults = [silent]
    with pytest.raises(HubError, match="ReadTimeout"):
        fetch(hub, silence_s=0.05)
