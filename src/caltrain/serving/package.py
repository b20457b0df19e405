"""A package: a model split for serving, and what its owner signs about it.

A package is a folder. `package.json` is the owner's signed manifest; `inside.sealed` holds what only the enclave may
see (FrontNet, HeadNet, names of the classes) under a key that the owner hands to an attested serving enclave;
`center.safetensors` is the CenterNet in clear; `wheel`, if the model has stages, what they come from (arXiv:1807.00969,
section 4; the mapping of class indices is that of its later versions).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal

import msgspec

from caltrain.boundary.sealed import Key
from caltrain.crypto import dsse
from caltrain.crypto.digests import Digest, canonical_json, digest
from caltrain.errors import UNDECODABLE, AccessError, AttestationError, ConfigError
from caltrain.models.layers import Shape
from caltrain.models.spec import MAX_LIVE, Cut, ModelSpec, Partition, check_cut, check_model, cut_shapes
from caltrain.plan import Measurement
from caltrain.records.commitment import PartyName, ShardId
from caltrain.records.schema import DataSchema, Name, check_schema

KIND = "package"
OWNER = "owner"
"""In whose name the owner's messages to an enclave are sealed."""
MANIFEST, INSIDE, CENTER, WHEEL = "package.json", "inside.sealed", "center.safetensors", "wheel"
MAX_MANIFEST_BYTES = 4 << 20
MAX_INSIDE_BYTES = 1 << 30
MAX_CENTER_BYTES = 8 << 30
MAX_USERS = 4096
MAX_BATCH_BYTES = 48 << 20
"""Most bytes of IR, of center output, or of inputs that one batch may have."""

_STEP = "check package"
Budget = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Across = Literal["f32", "bf16", "int8"]
ModelName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,59}\Z")]


class ServedUser(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may ask, and about how many records each time that the owner hands over the key."""

    name: PartyName
    public_key: dsse.PublicKey
    budget: Budget


class UserCredential(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an issuer signs for a user whom the package does not name itself (DSSE kind `user-credential`)."""

    package: Digest
    user: ServedUser


class BatchSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How records are computed together: at most `rows`, which is also the most that one request may have.

    A record's last bits depend on how many are computed with it. With `fixed` there are always `rows`, missing ones
    are zeros, so its answer is always the same; where bits would depend on the place in such a batch, owner, enclave
    and host refuse it (`models.places`). `delay_ms` is how long a record may wait for company.
    """

    rows: Annotated[int, msgspec.Meta(ge=1, le=256)] = 32
    fixed: bool = False
    delay_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0


class ExposureBasis(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The signed assessment that the cut rests on: report and signer, and whether it chose this cut or a shallower."""

    report: Digest
    signer: dsse.PublicKey
    policy_met: bool


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner decides: the cut, how it is served, who may ask, and which program is trusted with it."""

    name: ModelName
    revision: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    front: Cut
    head: Cut = 0
    mapped: bool = False
    """The last layer's outputs are in an order that only the enclave knows (the papers' class mapping unit)."""
    across: Across = "f32"
    """Precision of what crosses at both cuts; int8 with one scale a record."""
    center: Literal["cpu", "any"] = "cpu"
    audit: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of the batches whose center part the enclave computes again, to compare."""
    top: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """Only so many of the greatest probabilities are answered, the others as zero."""
    batch: BatchSpec = BatchSpec()
    users: Annotated[tuple[ServedUser, ...], msgspec.Meta(max_length=MAX_USERS)] = ()
    issuer: dsse.PublicKey | None = None
    """Signs credentials for users whom the package does not name."""
    measurement: Measurement
    exposure: ExposureBasis | None = None
    """None: nobody assessed what the cut gives away."""

    @property
    def partition(self) -> Partition:
        """Which layers run where."""
        return Partition(front=self.front, head=self.head)


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """The manifest (DSSE kind `package`, signed by `owner`)."""

    version: Literal[1] = 1
    id: ShardId
    owner: dsse.PublicKey
    terms: Terms
    model: Digest
    """Of the whole model, as its owner has it."""
    spec: ModelSpec
    data: DataSchema
    """Its classes are numbers: the names are sealed."""
    inside: Digest
    center_weights: Digest

    def digest(self) -> str:
        """What evidence of a serving enclave binds."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # anybody may ask for evidence, and of thousands of users it takes a tenth of a second
        return digest("package/v1", canonical_json(self))

    @property
    def form(self) -> Literal["two-way", "ternary"]:
        """`two-way` shows the host the scores with their classes' numbers, `ternary` does not."""
        return "ternary" if self.terms.head or self.terms.mapped else "two-way"

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.data.classes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one record in a request."""
        return math.prod(self.data.shape) * self.data.numpy_dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """The most bytes of one batch that cross at one cut, rounded up to pages."""
        largest = max(sum(map(math.prod, shapes)) for shapes in self._crossing)
        return -(-4 * largest * self.terms.batch.rows // 4096) * 4096

    @property
    def most_live(self) -> int:
        """The most tensors that cross together."""
        return max(map(len, self._crossing))

    @property
    def _crossing(self) -> list[tuple[Shape, ...]]:
        cuts = (self.terms.front, len(self.spec.layers) - self.terms.head)
        return [cut_shapes(self.spec, cut, self.data.shape) for cut in cuts]


class InsidePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `inside.sealed` holds: states of FrontNet and HeadNet (safetensors), what the outputs mean.

    `order[i]` is the class that the center's output `i` stands for; empty where outputs are in their own order.
    """

    front: bytes
    head: bytes
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=10_000)]
    order: Annotated[tuple[int, ...], msgspec.Meta(max_length=10_000)] = ()


class PackageKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner hands to an attested serving enclave: the key of `inside.sealed`."""

    key: Key


class GrantReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The enclave's word that it opened the package (DSSE kind `grant-receipt`)."""

    transcript: Digest


def open_package(envelope: dsse.Envelope, owner: str | None = None) -> Package:
    """Verify a manifest's signature, and that it can be served. Without `owner`, by the owner that it names itself.

    Whoever relies on it gives `owner`; the enclave need not: its evidence names the manifest's digest.
    Raises IntegrityError `signature.invalid`, ConfigError `package.*` or `model.*`.
    """
    package = dsse.open_envelope(envelope, KIND, owner or envelope.signer, Package, step=_STEP)
    if package.owner != envelope.signer:
        raise refuse("package.other-owner", "the manifest names another owner than the one who signed it")
    return check_package(package)


def read_manifest(raw: bytes) -> dsse.Envelope:
    """The envelope in `package.json`. Raises ConfigError `package.unreadable`."""
    try:
        if len(raw) > MAX_MANIFEST_BYTES:
            raise msgspec.ValidationError("longer than the limit")
        return msgspec.json.decode(raw, type=dsse.Envelope)
    except UNDECODABLE as error:
        raise refuse("package.unreadable", f"the manifest cannot be read: {str(error)[:200]}") from None


def check_package(package: Package) -> Package:
    """Check what types cannot. Returns it, or raises ConfigError `package.*`, `model.*`, DataError `schema.*`."""
    terms = package.terms
    check_schema(package.data)
    check_model(package.spec, terms.partition, input_shape=package.data.shape, classes=package.classes)
    check_cut(package.spec, terms.partition)
    largest = max(package.slot_bytes, terms.batch.rows * package.row_bytes)
    wrong = {
        "package.batch-too-large": (
            largest > MAX_BATCH_BYTES,
            f"{terms.batch.rows} records of a batch take {largest} bytes, at most {MAX_BATCH_BYTES}",
        ),
        "package.too-many-tensors": (
            terms.across == "int8" and 2 * package.most_live > MAX_LIVE,
            f"{package.most_live} tensors and as many scales would cross together, at most {MAX_LIVE} can",
        ),
        "package.contradiction": (
            terms.mapped and terms.head > 0,
            "the order of outputs that a HeadNet inside takes in cannot be secret, and need not be",
        ),
        "package.names": (
            package.data.classes != tuple(map(str, range(package.classes))),
            "the manifest would show the names of the classes",
        ),
        "package.duplicate": (
            any(len({getattr(u, field) for u in terms.users}) < len(terms.users) for field in ("name", "public_key")),
            "two users have one name or one key",
        ),
        "package.nobody": (not terms.users and terms.issuer is None, "nobody may ask: no user and no issuer"),
    }
    for code, (holds, what) in wrong.items():
        if holds:
            raise refuse(code, what)
    return package


def match_package(measurement: str, package: Package) -> None:
    """Raise AttestationError `evidence.not-the-packages` unless the package trusts the program of this measurement.

    A policy may accept several programs; the owner gave this model to one.
    """
    if measurement != package.terms.measurement:
        raise AttestationError(
            "evidence.not-the-packages",
            f"the enclave runs {measurement}, the package trusts {package.terms.measurement}",
            step=_STEP,
            fix="Refuse this enclave: run the program that the package names, or have the model packaged for this one.",
        )


def user_of(package: Package, name: str, credential: dsse.Envelope | None) -> ServedUser:
    """The user of that name, named by the package or in a credential of its issuer.

    Raises AccessError `user.not-named`, IntegrityError for a credential that the issuer did not sign.
    """
    if credential is None:
        found = next((user for user in package.terms.users if user.name == name), None)
    elif package.terms.issuer is None:
        raise _not_named("a credential, where the package names no issuer")
    else:
        step = "check credential"
        signed = dsse.open_envelope(credential, "user-credential", package.terms.issuer, UserCredential, step=step)
        named = {user.public_key for user in package.terms.users}
        usable = signed.package == package.digest() and signed.user.name == name and signed.user.public_key not in named
        found = signed.user if usable else None
    if found is None:
        raise _not_named("a user whom neither the package nor a credential for it names")
    return found


def _not_named(what: str) -> AccessError:
    return AccessError(
        "user.not-named",
        f"refused: {what}",
        step="look up user",
        fix="Ask the model's owner to be named in the package, or its issuer for a credential.",
    )


def refuse(code: str, what: str) -> ConfigError:
    """The error for a package that cannot be used."""
    return ConfigError(
        code,
        what,
        step=_STEP,
        fix="Get the package anew from its owner, or have it made anew by `caltrain model package`.",
    )
