import re
import stat
from decimal import Decimal

import pytest
from sqlalchemy import text

from bise.errors import AuthenticationError, ConfigError, NotFoundError, StoreError
from bise.store.database import Database
from bise.store.keys import KeyLimits, Keys, limits_from_json
from bise.store.rules import Rule
from bise.store.secret import load_secret


def test_a_key_is_known_again_with_all_that_was_said_of_it(keys):
    limits = KeyLimits(requests_per_minute=3, money_per_month=Decimal("12.50"), priority=-2)
    rule = Rule(name="no iban", pattern=r"\bDE\d{20}\b", stage="input")
    info, key = keys.create(
        "team", owner="physics", scopes=["inference", "model:brise"], limits=limits, rules=[rule]
    )
    assert keys.verify(key) == info
    assert info.limits == limits
    assert info.rules == (rule,)


def test_a_key_has_at_least_128_random_bits_and_no_two_are_alike(keys):
    made = {keys.create("x")[1] for _ in range(20)}
    assert len(made) == 20
    for key in made:
        assert re.fullmatch(r"bise-[A-Za-z0-9_-]{43}", key)  # 43 base64 characters: 256 bits


def test_a_dump_of_the_database_holds_no_key(keys, database, tmp_path):
    _, key = keys.create("x")
    secret_part = key.removeprefix("bise-").encode()
    with database.reading() as session:
        tables = [table.name for table in database_tables()]
        dump = b"".join(
            repr(session.execute(text(f"SELECT * FROM {name}")).all()).encode() for name in tables
        )
    assert len(dump) > 100
    assert secret_part not in dump
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret_part not in path.read_bytes()


def database_tables():
    from bise.store.schema import Record

    return Record.metadata.sorted_tables


def test_the_hash_depends_on_the_servers_secret(database_url, clock, tmp_path):
    one = Database.open(database_url)
    Keys(one, bytes(32), clock).create("x")
    with pytest.raises(StoreError, match="secret is not the one"):
        Keys(one, bytes([1] * 32), clock)
    one.close()


@pytest.mark.parametrize(
    "wrong", ["", "bise-", "x" * 201, "bise-" + "A" * 43, "é" * 20, "'; DROP TABLE keys; --"]
)
def test_a_wrong_key_is_refused(keys, wrong):
    keys.create("x")
    with pytest.raises(AuthenticationError):
        keys.verify(wrong)
    assert len(keys.list()) == 1


def test_every_wrong_character_and_every_prefix_is_refused(keys):
    _, key = keys.create("x")
    for index in range(len(key)):
        other = "A" if key[index] != "A" else "B"
        for wrong in (key[:index] + other + key[index + 1 :], key[:index], key + other):
            with pytest.raises(AuthenticationError):
                keys.verify(wrong)


def test_a_revoked_key_stops_at_once_in_every_process(keys, database_url, clock):
    info, key = keys.create("x")
    elsewhere = Database.open(database_url)
    others = Keys(elsewhere, bytes(range(32)), clock)
    assert others.verify(key).id == info.id
    keys.revoke(info.id)
    with pytest.raises(AuthenticationError, match="revoked"):
        others.verify(key)
    elsewhere.close()


def test_a_key_is_revoked_by_name_if_only_one_bears_it(keys):
    keys.create("one")
    keys.create("two")
    keys.create("two")
    assert keys.revoke("one").revoked_at is not None
    with pytest.raises(ConfigError, match="2 keys bear that name"):
        keys.revoke("two")
    with pytest.raises(NotFoundError):
        keys.revoke("three")
    assert len(keys.list()) == 2
    assert len(keys.list(with_revoked=True)) == 3


def test_a_key_expires(keys, clock):
    _, key = keys.create("x", expires_at=clock() + 60)
    clock.pass_(59)
    keys.verify(key)
    clock.pass_(1)
    with pytest.raises(AuthenticationError, match="expired"):
        keys.verify(key)


def test_names_are_data_and_never_sql(keys):
    hostile = "'; DROP TABLE keys; --"
    info, key = keys.create(hostile, owner='" OR 1=1 --', scopes=["inference", "model:'; DELETE FROM ledger"])
    assert keys.verify(key).name == hostile
    assert keys.revoke(hostile).id == info.id


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"owner": "local"}, "owner"),
        ({"owner": "key_00"}, "owner"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": ["model:brise"]}, "scopes"),
        ({"expires_at": 1.0}, "expires_at"),
        ({"expires_at": float("nan")}, "expires_at"),
    ],
)
def test_a_bad_field_of_a_new_key_is_named(keys, fields, field):
    with pytest.raises(ConfigError) as caught:
        keys.create(**{"name": "x", **fields})
    assert caught.value.field == field
    assert keys.list() == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_day": 1.5}, "tokens_per_day"),
        ({"tokens_per_minute": True}, "tokens_per_minute"),
        ({"tokens_per_minute": 10**30}, "tokens_per_minute"),
        ({"concurrency": "3"}, "concurrency"),
        ({"priority": 1000}, "priority"),
        ({"money_per_month": 1.5}, "money_per_month"),
        ({"money_per_month": "NaN"}, "money_per_month"),
        ({"money_per_month": "-1"}, "money_per_month"),
        ({"money_per_month": "Infinity"}, "money_per_month"),
        ({"request_per_minute": 1}, "request_per_minute"),
    ],
)
def test_a_bad_limit_is_named(values, field):
    with pytest.raises(ConfigError) as caught:
        limits_from_json(values)
    assert caught.value.field == field


def test_a_key_may_be_narrowed_to_models(keys):
    info, _ = keys.create("x", scopes=["inference", "model:brise"])
    assert info.allows_model("brise")
    assert not info.allows_model("other")
    assert keys.create("y")[0].allows_model("other")


def test_the_secret_is_made_once_and_is_its_users_alone(tmp_path):
    path = tmp_path / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_a_secret_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "secret"
    load_secret(path)
    path.chmod(0o644)
    with pytest.raises(StoreError, match="chmod 600"):
        load_secret(path)


@pytest.mark.parametrize("content", ["", "zz", "00" * 31, "\xff"])
def test_a_damaged_secret_is_refused_and_not_replaced(tmp_path, content):
    path = tmp_path / "secret"
    path.write_text(content, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(StoreError):
        load_secret(path)
    assert path.read_text(encoding="latin-1") == content
