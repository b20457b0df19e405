"""The plan and the manifest: one digest for one meaning, nothing unknown, nothing approved for another."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator
from pathlib import Path as File
from random import Random
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from caltrain import plan as plans
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.hpke import HpkePrivateKey
from caltrain.errors import AccessError, CaltrainError, ConfigError, DataError, IntegrityError
from caltrain.exposure.policy import check_policy
from caltrain.models.spec import inner_weights
from caltrain.plan import (
    EnclaveSpec,
    ExposureSpec,
    ManifestApproval,
    ManifestParty,
    ManifestShard,
    Plan,
    PlanApproval,
    RunManifest,
    check_approval,
    check_countersignature,
    parse_plan,
    parse_toml,
    plan_from_json,
)
from caltrain.records.shard import key_id
from support.samples import DATA_KEY, MEASUREMENT, PLAN, SHARD, plan, quick, refused, signer

SMALL = plan()
DIGEST = "sha256:c6799cd3430afb9041a5e810ad0d73a804c5d04b581630382a13b8ae692c2640"

# The same plan, written otherwise: other order, inline tables, comments, defaults spelled out, 1 for 1.0.
REWRITTEN = f"""
name = "three animals"   # a comment
release = {{ reveal_seed = true }}
version = 1
enclave.measurement = '{MEASUREMENT}'

[trace]
suspicion_neighbours = 20
distance_step = 1e-2
neighbours = 5

[[users]]
budget = 1_00
may = ["predict",
       "trace"]
public_key = "{signer("una").public}"
name = "una"

[[parties]]
min_records = 1
public_key = "{signer("alpha").public}"
name = "alpha"
[[parties]]
public_key = "{signer("beta").public}"
min_records = 0xA
name = "beta"

[training]
learning_rate = 5.0e-2
schedule = "cosine"
batch = 8
epochs = 2
momentum = 0.9
weight_decay = 0
warmup_epochs = 0
channels_last = true
threads = 2
augment = {{ flip = false, shift = 1 }}

[data]
classes = ["cat", "dog", "owl"]
dtype = "u8"
mean = [0.5]
std = [0.5]
shape = [1, 4, 4]

[partition]
head = 1
front = 1
unsafe_cut_at_input = false

[[model.layers]]
filters = 4
type = "conv"
kernel = 3
stride = 1
padding = 1
batch_norm = false
activation = "relu"
[[model.layers]]
p = 0.25
type = "dropout"
[[model.layers]]
type = "conv"
filters = 8
activation = "leaky"
[[model.layers]]
type = "maxpool"
kernel = 2
stride = 2
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "linear"
units = 3
activation = "none"
"""


def toml(fields: dict[str, Any]) -> bytes:
    """TOML of the fields; it has no way to write null, which is what is left out."""
    return tomli_w.dumps(without_null(fields)).encode()


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list | tuple) else value


# -- the digest --------------------------------------------------------------------------------------------------------


def test_known_digest() -> None:
    assert SMALL.digest() == DIGEST


def test_the_digest_is_of_the_meaning_not_of_the_text() -> None:
    assert parse_plan(toml(PLAN)).digest() == DIGEST
    assert parse_plan(REWRITTEN.encode()).digest() == DIGEST
    assert parse_plan(REWRITTEN.replace("\n", "\r\n").encode()).digest() == DIGEST
    assert digest("plan/v1", canonical_json(msgspec.to_builtins(parse_plan(toml(PLAN))))) == DIGEST


def reordered(value: Any, random: Random) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key], random) for key in random.sample([*value], len(value))}
    return [reordered(item, random) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_keys_does_not_change_the_digest(seed: int) -> None:
    fields = reordered(PLAN, Random(seed))
    assert fields == PLAN
    assert parse_plan(toml(fields)).digest() == DIGEST
    assert plan_from_json(msgspec.json.encode(fields)).digest() == DIGEST


def test_a_plan_crosses_a_wire_whole() -> None:
    assert plan_from_json(canonical_json(SMALL)) == SMALL


FULL = msgspec.to_builtins(SMALL)
Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def tables(value: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict):
        yield path
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tables(inner, (*path, key))


def at(fields: Any, path: Path) -> Any:
    for key in path:
        fields = fields[key]
    return fields


def replaced(path: Path, value: object) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(FULL))
    at(fields, path[:-1])[path[-1]] = value
    return fields


def another(path: Path, value: Any) -> Any:
    """Another valid value for a field."""
    words = {"u8": "f32", "cosine": "constant", "predict": "trace", "trace": "predict", "relu": "none", "none": "relu"}
    words |= {"cpu": "any", "f32": "bf16"}
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 + 0.2
        case _ if path[-1] == "public_key":
            return signer("somebody else").public
        case _ if path[-1] == "measurement":
            return value.replace("5a", "5b")
        case _:
            return words.get(value, "relu" if path[-1] == "activation" else f"{value}x")


ABSENT: dict[str, object] = {
    "model.size": [2, 2],
    "model.wheel": {"factory": "nets:make", "sha256": "sha256:" + "0" * 64},
    "training.initial": {"sha256": "sha256:" + "0" * 64},
    "exposure": {"policy": {"bounds": [{"measure": "ssim", "at_most": 0.3}]}},
}
CHANGEABLE = [path for path, _ in leaves(FULL) if path != ("version",) and path[-1] != "type"]


@pytest.mark.parametrize("path", CHANGEABLE, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_in_the_digest(path: Path) -> None:
    value = at(FULL, path)
    fields = replaced(path, ABSENT[".".join(map(str, path))] if value is None else another(path, value))
    assert msgspec.convert(fields, Plan).digest() != DIGEST


def test_a_deepening_cut_is_in_the_digest() -> None:
    steps = ({"epoch": 1, "front": 3}, {"epoch": 2, "front": 3}, {"epoch": 1, "front": 4})
    longer = PLAN["training"] | {"epochs": 3}
    digests = {plan(partition={"front": 1, "deepen": [step]}, training=longer).digest() for step in steps}
    assert len(digests | {plan(training=longer).digest()}) == 4


REPAIR: dict[str, Any] = {
    "run": "ab" * 16,
    "model": "sha256:" + "1" * 64,
    "quarantine": "sha256:" + "2" * 64,
    "records": 3,
    "without": [{"name": "gamma", "public_key": signer("gamma").public}],
}


def test_a_repair_is_in_the_digest_and_none_is_not() -> None:
    """A plan without one has the digest that it had before there were repairs: `test_known_digest`."""
    assert "repair" not in msgspec.to_builtins(SMALL)
    former = {"name": "delta", "public_key": signer("delta").public}
    others = {"run": "cd" * 16, "model": "sha256:" + "3" * 64, "quarantine": "sha256:" + "3" * 64, "records": 4}
    changed = [plan(repair=REPAIR | {key: value}).digest() for key, value in (others | {"without": [former]}).items()]
    assert len({DIGEST, plan(repair=REPAIR).digest(), *changed}) == 7
    assert plan_from_json(canonical_json(plan(repair=REPAIR))).repair == plan(repair=REPAIR).repair


def test_a_repair_leaves_something_out() -> None:
    plan(repair=REPAIR | {"records": 0})
    plan(repair=REPAIR | {"without": []})
    with refused(ConfigError, "plan.repair"):
        parse_plan(toml(PLAN | {"repair": REPAIR | {"records": 0, "without": []}}))


@pytest.mark.parametrize("back", [{"name": "alpha"}, {"public_key": signer("beta").public}])
def test_a_party_that_was_left_out_does_not_come_back(back: dict[str, str]) -> None:
    former = {"name": "gamma", "public_key": signer("gamma").public} | back
    with refused(ConfigError, "plan.repair"):
        parse_plan(toml(PLAN | {"repair": REPAIR | {"without": [former]}}))


@pytest.mark.parametrize(
    "wrong",
    [{"run": "x"}, {"model": "1"}, {"records": -1}, {"records": (1 << 20) + 1}, {"without": ["gamma"]}, {"more": 1}],
)
def test_what_is_no_repair_is_refused(wrong: dict[str, Any]) -> None:
    with refused(ConfigError, "plan.unknown-key" if "more" in wrong else "plan.invalid"):
        parse_plan(toml(PLAN | {"repair": REPAIR | wrong}))


def test_readers_are_in_the_digest() -> None:
    other = READER | {"encryption_key": HpkePrivateKey(b"1" * 32).public}
    traces: list[list[dict[str, str]]] = [[], [READER], [other], [READER, other | {"name": "pat"}]]
    assert len({plan(trace={"neighbours": 5, "disclose_to": each}).digest() for each in traces}) == len(traces)


def test_methods_are_in_the_digest_and_none_are_not() -> None:
    """A plan that does not name them has the digest that it had before there were any: `test_known_digest`."""
    assert "methods" not in msgspec.to_builtins(SMALL.trace)
    spec = msgspec.to_builtins(SMALL.trace)
    named: list[list[str]] = [["fingerprint"], ["trak"], ["fingerprint", "trak"], ["fingerprint", "gradient", "trak"]]
    made = [plan(trace=spec | {"methods": methods}) for methods in named]
    assert len({DIGEST, *(each.digest() for each in made)}) == 5
    assert [each.trace.opinions for each in (SMALL, *made)] == [False, False, True, True, True]
    assert [each.trace.answered for each in (SMALL, *made)] == [("fingerprint",), *map(tuple, named)]
    assert plan_from_json(canonical_json(made[2])) == made[2]


@pytest.mark.parametrize("wrong", [[], ["magic"], ["trak"] * 4, "trak"], ids=str)
def test_what_is_no_list_of_methods_is_refused(wrong: object) -> None:
    with refused(ConfigError, "plan.invalid"):
        parse_plan(toml(PLAN | {"trace": {"methods": wrong}}))


def test_no_two_readers_have_one_name() -> None:
    with refused(ConfigError, "plan.duplicate"):
        parse_plan(toml(PLAN | {"trace": {"disclose_to": [READER, READER]}}))


def test_the_order_of_lists_is_in_the_digest() -> None:
    assert plan(parties=PLAN["parties"][::-1]).digest() != DIGEST
    assert plan(data=PLAN["data"] | {"classes": ["dog", "cat", "owl"]}).digest() != DIGEST


# -- what is no plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*tables(PLAN)], ids=lambda path: ".".join(map(str, path)) or "top")
def test_an_unknown_key_is_refused_at_every_level(path: Path) -> None:
    fields = copy.deepcopy(PLAN)
    at(fields, path)["surprise"] = 1
    with refused(ConfigError, "plan.unknown-key"):
        parse_plan(toml(fields))
    with refused(ConfigError, "plan.unknown-key"):
        plan_from_json(msgspec.json.encode(fields))


REQUIRED = [
    *((key,) for key in ("version", "name", "model", "partition", "data", "training", "parties", "enclave")),
    ("model", "layers"),
    ("model", "layers", 0, "type"),
    ("model", "layers", 0, "filters"),
    ("model", "layers", 1, "p"),
    ("model", "layers", 5, "units"),
    ("partition", "front"),
    ("data", "shape"),
    ("data", "classes"),
    ("training", "epochs"),
    ("training", "batch"),
    ("training", "learning_rate"),
    ("parties", 0, "name"),
    ("parties", 0, "public_key"),
    ("users", 0, "name"),
    ("users", 0, "public_key"),
    ("users", 0, "may"),
    ("users", 0, "budget"),
    ("enclave", "measurement"),
]


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_key_is_refused(path: Path) -> None:
    fields = copy.deepcopy(PLAN)
    del at(fields, path[:-1])[path[-1]]
    with refused(ConfigError, "plan.invalid"):
        parse_plan(toml(fields))


READER = {"name": "una", "encryption_key": HpkePrivateKey(bytes(32)).public}
INVALID: dict[str, tuple[Path, object]] = {
    "version 2": (("version",), 2),
    "no name": (("name",), ""),
    "endless name": (("name",), "x" * 101),
    "no parties": (("parties",), []),
    "too many parties": (("parties",), [PLAN["parties"][0]] * 257),
    "too many users": (("users",), [PLAN["users"][0]] * 257),
    "party name with a slash": (("parties", 0, "name"), "../alpha"),
    "party name with a line end": (("parties", 0, "name"), "alpha\n"),
    "key of another scheme": (("parties", 0, "public_key"), "rsa:AAAA"),
    "second spelling of a key": (("parties", 0, "public_key"), "ed25519:" + "A" * 42 + "B="),
    "no records asked for": (("parties", 0, "min_records"), 0),
    "more records than shards can hold": (("parties", 0, "min_records"), (1 << 32) + 1),
    "no rights": (("users", 0, "may"), []),
    "unknown right": (("users", 0, "may"), ["train"]),
    "four rights": (("users", 0, "may"), ["predict", "trace", "verdict", "trace"]),
    "no budget": (("users", 0, "budget"), 0),
    "endless budget": (("users", 0, "budget"), 1_000_000_001),
    "measurement of another algorithm": (("enclave", "measurement"), "sha256:" + "0" * 64),
    "short measurement": (("enclave", "measurement"), MEASUREMENT[:-1]),
    "measurement with a line end": (("enclave", "measurement"), MEASUREMENT + "\n"),
    "no neighbours": (("trace", "neighbours"), 0),
    "distances not rounded": (("trace", "distance_step"), 0.0),
    "a floor below none": (("trace", "distance_floor"), -0.01),
    "a floor above all": (("trace", "distance_floor"), 1.01),
    "a floor that is no number": (("trace", "distance_floor"), float("nan")),
    "a reader without a key": (("trace", "disclose_to"), [{"name": "una"}]),
    "a reader with a signing key": (
        ("trace", "disclose_to"),
        [{"name": "una", "encryption_key": signer("una").public}],
    ),
    "too many readers": (("trace", "disclose_to"), [READER] * 65),
    "a negative pace": (("users", 0, "per_hour"), -1),
    "too many neighbours for suspicion": (("trace", "suspicion_neighbours"), 101),
    "text for a boolean": (("release", "reveal_seed"), "yes"),
    "no epochs": (("training", "epochs"), 0),
    "no batch": (("training", "batch"), 0),
    "learning rate nan": (("training", "learning_rate"), float("nan")),
    "learning rate infinite": (("training", "learning_rate"), float("inf")),
    "learning rate 0": (("training", "learning_rate"), 0.0),
    "momentum 1": (("training", "momentum"), 1.0),
    "unknown schedule": (("training", "schedule"), "step"),
    "negative shift": (("training", "augment", "shift"), -1),
    "no threads": (("training", "threads"), 0),
    "more audited than there is": (("center", "audit_rate"), 1.01),
    "audit rate nan": (("center", "audit_rate"), float("nan")),
    "audits of no step": (("center", "audit_steps"), 0),
    "unknown device": (("center", "device"), "tpu"),
    "unknown precision": (("center", "precision"), "f16"),
    "no bound for what comes in": (("center", "max_rms"), 0.0),
    "a quorum below nobody": (("resume_quorum",), -1),
    "a quorum of more than there may be": (("resume_quorum",), 257),
    "deepening before the first epoch": (("partition", "deepen"), [{"epoch": 0, "front": 3}]),
    "deepening without end": (("partition", "deepen"), [{"epoch": 1, "front": 3}] * 65),
    "checkpoints at no step": (("training", "checkpoint_steps"), -1),
    "negative patience": (("training", "patience"), -1),
}


@pytest.mark.parametrize(("path", "value"), INVALID.values(), ids=INVALID)
def test_a_value_out_of_bounds_is_refused(path: Path, value: object) -> None:
    with refused(ConfigError, "plan.invalid"):
        parse_plan(toml(replaced(path, value)))


CONTRADICTION = "plan.contradiction"
ZEROS = "sha256:" + "0" * 64
UNUSABLE: dict[str, tuple[Path, object, type[CaltrainError], str]] = {
    "two parties of one name": (("parties", 1, "name"), "alpha", ConfigError, "plan.duplicate"),
    "a user with a party's name": (("users", 0, "name"), "beta", ConfigError, "plan.duplicate"),
    "two parties with one key": (("parties", 1, "public_key"), signer("alpha").public, ConfigError, "plan.duplicate"),
    "a user with a party's key": (("users", 0, "public_key"), signer("beta").public, ConfigError, "plan.duplicate"),
    "mean nan": (("data", "mean"), [float("nan")], DataError, "schema.normalisation"),
    "a class twice": (("data", "classes"), ["cat", "dog", "cat"], DataError, "schema.duplicate-class"),
    "a class without output": (("data", "classes"), ["cat", "dog", "owl", "fox"], ConfigError, "model.classes"),
    "records to the host": (("partition", "front"), 0, ConfigError, "model.cut-at-input"),
    "an audit of another device": (("center",), {"audit_rate": 0.1, "device": "any"}, ConfigError, CONTRADICTION),
    "an audit of other bits": (("center",), {"audit_rate": 0.1, "precision": "bf16"}, ConfigError, CONTRADICTION),
    "a quorum of more than all": (("resume_quorum",), 3, ConfigError, CONTRADICTION),
    "more frozen than there is": (("training", "initial"), {"sha256": ZEROS, "frozen": 7}, ConfigError, CONTRADICTION),
    "a cut that does not deepen": (
        ("partition", "deepen"),
        [{"epoch": 1, "front": 1}],
        ConfigError,
        "model.not-deeper",
    ),
    "a cut that deepens after the end": (
        ("partition",),
        {"front": 1, "deepen": [{"epoch": 2, "front": 2}]},
        ConfigError,
        CONTRADICTION,
    ),
    "a cut that deepens to nothing": (
        ("partition", "deepen"),
        [{"epoch": 1, "front": 5}],
        ConfigError,
        "model.partition",
    ),
    "a shape that does not fit": (("data", "shape"), [1, 1, 1], ConfigError, "model.shape"),
}


@pytest.mark.parametrize(("path", "value", "family", "code"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_plan_that_cannot_be_run_is_refused(
    path: Path, value: object, family: type[CaltrainError], code: str
) -> None:
    with refused(family, code):
        parse_plan(toml(replaced(path, value)))


USABLE: dict[str, tuple[Path, object]] = {
    "an audit of every step on the CPU": (("center",), {"audit_rate": 1.0}),
    "bf16 on any device without an audit": (("center",), {"device": "any", "precision": "bf16"}),
    "a quorum of all": (("resume_quorum",), 2),
    "everything frozen": (("training", "initial"), {"sha256": ZEROS, "frozen": 6}),
    "a cut that deepens in the last epoch": (
        ("partition",),
        {"front": 1, "deepen": [{"epoch": 1, "front": 2}]},
    ),
    "records cropped": (("model", "size"), [2, 2]),
}


@pytest.mark.parametrize(("path", "value"), USABLE.values(), ids=USABLE)
def test_a_plan_up_to_its_bounds_is_taken(path: Path, value: object) -> None:
    fields = replaced(path, value)
    assert parse_plan(toml(fields)) == plan_from_json(msgspec.json.encode(fields)) != SMALL


NO_TOML = {
    "JSON": b'{"version": 1}',
    "not UTF-8": b'name = "\xff"',
    "a key twice": b"version = 1\nversion = 1",
    "nesting without end": b"a = " + b"[" * 20_000,
    "tables without end": b"a = " + b"{a = " * 20_000,
    "digits without end": b"a = " + b"9" * 10_000,
    "cut": toml(PLAN)[:-3],
}


@pytest.mark.parametrize("text", NO_TOML.values(), ids=NO_TOML)
def test_what_is_no_toml_is_refused(text: bytes) -> None:
    with refused(ConfigError, "plan.not-toml"):
        parse_plan(text)


NO_JSON = {
    "nothing": b"",
    "TOML": toml(PLAN),
    "a list": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "nesting without end": b'{"version":' + b"[" * 100_000,
    "cut": msgspec.json.encode(PLAN)[:-1],
}


@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with refused(ConfigError, "plan.invalid"):
        plan_from_json(raw)


@quick
@given(st.binary(max_size=100))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_plan(raw)
    with pytest.raises(ConfigError):
        plan_from_json(raw)


def test_a_plan_longer_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text, raw = toml(PLAN), msgspec.json.encode(PLAN)
    monkeypatch.setattr(plans, "MAX_PLAN_BYTES", len(text))
    assert parse_plan(text) == SMALL
    with refused(ConfigError, "plan.invalid"):
        parse_plan(text + b"\n")
    monkeypatch.setattr(plans, "MAX_PLAN_BYTES", len(raw))
    assert plan_from_json(raw) == SMALL
    with refused(ConfigError, "plan.invalid"):
        plan_from_json(raw + b" ")


def test_errors_name_what_was_read() -> None:
    for text, code in ((b"a =", "policy.not-toml"), (b"a = 1", "policy.unknown-key"), (b"", "policy.invalid")):
        with refused(ConfigError, code):
            parse_toml(text, EnclaveSpec, what="policy")


# -- people and approvals ----------------------------------------------------------------------------------------------


def test_people_are_found_by_name() -> None:
    assert SMALL.party("beta").min_records == 10
    assert SMALL.user("una").budget == 100


@pytest.mark.parametrize("name", ["", "gamma", "una", "Alpha", "alpha ", "x" * 10_000])
def test_an_unknown_party_is_refused(name: str) -> None:
    with refused(AccessError, "party.unknown") as caught:
        SMALL.party(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["", "alpha", "una2"])
def test_an_unknown_user_is_refused(name: str) -> None:
    with refused(AccessError, "user.unknown"):
        SMALL.user(name)


ALPHA, BETA, UNA = signer("alpha"), signer("beta"), signer("una")
APPROVAL = PlanApproval(plan=SMALL.digest(), party="alpha")
MANIFEST = RunManifest(
    run="ab" * 16,
    plan=SMALL.digest(),
    evidence_kind="simulated",
    simulated=True,
    measurement=MEASUREMENT,
    enclave_encryption_key="xwing:AAAA",
    enclave_signing_key=signer("enclave").public,
    parties=tuple(
        ManifestParty(
            name=name,
            key_id=key_id(DATA_KEY),
            shards=(
                ManifestShard(shard=SHARD, root="sha256:" + "1" * 64, records=5),
                ManifestShard(shard="ff" * 16, root="sha256:" + "2" * 64, records=7),
            ),
        )
        for name in ("alpha", "beta")
    ),
)
COUNTERSIGNED = ManifestApproval(manifest=MANIFEST.digest(), party="alpha")
OTHER_PLAN = plan(name="another")
OTHER_MANIFEST = msgspec.structs.replace(MANIFEST, run="cd" * 16)


def test_known_manifest() -> None:
    assert MANIFEST.digest() == "sha256:acff962ed784a9e6b2a90a7341f1812378e6dc7e6d5d92a4ad9294d4d41aefb7"
    assert MANIFEST.records() == 24


def test_records_that_are_held_out_are_counted_apart() -> None:
    alpha, beta = MANIFEST.parties
    held_out = (msgspec.structs.replace(alpha.shards[0], held_out=True), alpha.shards[1])
    manifest = msgspec.structs.replace(MANIFEST, parties=(msgspec.structs.replace(alpha, shards=held_out), beta))
    assert (manifest.records(), manifest.records(held_out=True)) == (19, 5)


def test_every_field_of_a_manifest_is_in_its_digest() -> None:
    held_out = tuple(msgspec.structs.replace(entry, held_out=True) for entry in MANIFEST.parties[0].shards)
    changes: list[dict[str, Any]] = [
        {"run": "cd" * 16},
        {"plan": OTHER_PLAN.digest()},
        {"evidence_kind": "tdx"},
        {"simulated": False},
        {"measurement": "sha384:" + "0" * 96},
        {"enclave_encryption_key": "xwing:AAAB"},
        {"enclave_signing_key": UNA.public},
        {"parties": MANIFEST.parties[::-1]},
        {"parties": MANIFEST.parties[:1]},
        {"parties": (msgspec.structs.replace(MANIFEST.parties[0], shards=MANIFEST.parties[0].shards[::-1]),)},
        {"parties": (msgspec.structs.replace(MANIFEST.parties[0], shards=held_out),)},
        {"parties": (msgspec.structs.replace(MANIFEST.parties[0], key_id="sha256:" + "3" * 64),)},
    ]
    digests = {msgspec.structs.replace(MANIFEST, **change).digest() for change in changes}
    assert len(digests | {MANIFEST.digest()}) == len(changes) + 1


BAD_SHARDS: dict[str, dict[str, Any]] = {
    "no records": {"records": 0},
    "more records than a shard has": {"records": (1 << 20) + 1},
    "shard that is no id": {"shard": "../" + SHARD[3:]},
    "root of another algorithm": {"root": "sha384:" + "1" * 96},
    "unknown key": {"labels": []},
}


@pytest.mark.parametrize("changes", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_what_is_no_entry_of_a_manifest_is_refused_when_read(changes: dict[str, Any]) -> None:
    honest = msgspec.to_builtins(MANIFEST.parties[0].shards[0])
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(honest | changes, ManifestShard)


def test_an_approval_of_this_plan_is_accepted() -> None:
    assert check_approval(SMALL, "alpha", ALPHA.sign("plan-approval", APPROVAL)) == APPROVAL


def test_a_countersignature_of_this_manifest_is_accepted() -> None:
    envelope = ALPHA.sign("manifest-approval", COUNTERSIGNED)
    assert check_countersignature(SMALL, MANIFEST, "alpha", envelope) == COUNTERSIGNED


of_other_plan = msgspec.structs.replace(APPROVAL, plan=OTHER_PLAN.digest())
of_other_manifest = msgspec.structs.replace(COUNTERSIGNED, manifest=OTHER_MANIFEST.digest())
in_betas_name = msgspec.structs.replace(APPROVAL, party="beta")
countersigned_as_beta = msgspec.structs.replace(COUNTERSIGNED, party="beta")

NO_APPROVALS = {
    "another plan": (ALPHA.sign("plan-approval", of_other_plan), "approval.other-plan"),
    "in another name": (ALPHA.sign("plan-approval", in_betas_name), "approval.other-plan"),
    "signed by another": (BETA.sign("plan-approval", APPROVAL), "signature.invalid"),
    "another kind": (ALPHA.sign("manifest-approval", APPROVAL), "signature.invalid"),
    "another payload": (ALPHA.sign("plan-approval", COUNTERSIGNED), "payload.malformed"),
}
NO_COUNTERSIGNATURES = {
    "another manifest": (ALPHA.sign("manifest-approval", of_other_manifest), "approval.other-manifest"),
    "in another name": (ALPHA.sign("manifest-approval", countersigned_as_beta), "approval.other-manifest"),
    "signed by another": (BETA.sign("manifest-approval", COUNTERSIGNED), "signature.invalid"),
    "another kind": (ALPHA.sign("plan-approval", COUNTERSIGNED), "signature.invalid"),
    "another payload": (ALPHA.sign("manifest-approval", APPROVAL), "payload.malformed"),
}


@pytest.mark.parametrize(("envelope", "code"), NO_APPROVALS.values(), ids=NO_APPROVALS)
def test_an_approval_of_something_else_is_refused(envelope: Any, code: str) -> None:
    with refused(IntegrityError, code):
        check_approval(SMALL, "alpha", envelope)


@pytest.mark.parametrize(("envelope", "code"), NO_COUNTERSIGNATURES.values(), ids=NO_COUNTERSIGNATURES)
def test_a_countersignature_of_something_else_is_refused(envelope: Any, code: str) -> None:
    with refused(IntegrityError, code):
        check_countersignature(SMALL, MANIFEST, "alpha", envelope)


def test_a_model_user_cannot_approve() -> None:
    with refused(AccessError, "party.unknown"):
        check_approval(SMALL, "una", UNA.sign("plan-approval", msgspec.structs.replace(APPROVAL, party="una")))
    with refused(AccessError, "party.unknown"):
        check_countersignature(SMALL, MANIFEST, "una", UNA.sign("manifest-approval", COUNTERSIGNED))


def test_a_plan_whose_release_would_not_fit_through_the_door_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = inner_weights(SMALL.model, SMALL.partition, SMALL.data.shape)
    monkeypatch.setattr(plans, "MAX_RELEASE", 4 * inner * len(SMALL.parties))
    assert plan() == SMALL
    monkeypatch.setattr(plans, "MAX_RELEASE", 4 * inner * len(SMALL.parties) - 1)
    with refused(ConfigError, "plan.release-too-large"):
        plan()


# --- a policy for the cut -----------------------------------------------------------------------------------------


def test_a_policy_for_the_cut_is_checked_with_the_plan() -> None:
    bad = {"policy": {"bounds": [{"measure": "guesses", "at_most": 0.3}]}}
    with refused(ConfigError, "policy.unknown-measure"):
        plan(exposure=bad)
    agreed = plan(exposure={"policy": {"bounds": [{"measure": "kl_ratio", "at_least": 1}]}})
    assert agreed.exposure is not None
    assert agreed.exposure.every == 1


KEPT = {"measure": "ssim", "at_most": 0.3}
SEEN = {"measure": "perceptual", "adversary": "inverter", "at_least": 0.5}


@pytest.mark.parametrize("rate", [0.0, 0.99, 1.0])
def test_a_bound_in_features_that_the_host_trains_needs_every_step_audited(rate: float) -> None:
    policy = {"bounds": [KEPT, SEEN]}
    if rate == 1:
        assert plan(exposure={"policy": policy}, center={"audit_rate": rate}).exposure is not None
    else:
        with refused(ConfigError, "plan.cut-policy"):
            plan(exposure={"policy": policy}, center={"audit_rate": rate})
    assert plan(exposure={"policy": {"bounds": [KEPT]}}, center={"audit_rate": rate}).exposure is not None


def test_a_policy_under_which_the_deepest_vote_may_miss_anothers_figures_is_refused() -> None:
    with refused(ConfigError, "plan.cut-policy"):
        plan(exposure={"policy": {"bounds": [KEPT], "all_deeper": False}}, center={"audit_rate": 1.0})


def test_a_policy_from_toml_reads_as_the_document_says() -> None:
    text = (File(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    block = text.partition("```toml\n[exposure]")[2].partition("```")[0]
    spec = msgspec.convert(tomllib.loads("[exposure]" + block)["exposure"], ExposureSpec)
    assert [bound.measure for bound in check_policy(spec.policy).bounds] == ["reidentification", "kl_ratio"]
