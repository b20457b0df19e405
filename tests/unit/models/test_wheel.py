"""Stages from a user's wheel: what is run, what is refused before anything runs, and that split equals plain."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from caltrain.errors import CaltrainError, ConfigError, IntegrityError
from caltrain.host.confine import enclave_environment
from caltrain.models import archive
from caltrain.models import wheel as module
from caltrain.models.archive import read_sources
from caltrain.models.blocks import KeyedDropout, key_dropouts
from caltrain.models.layers import AvgPool, Conv, Linear, Stage
from caltrain.models.network import build, set_draws
from caltrain.models.spec import MAX_WHEEL_BYTES, ModelSpec, Partition, Wheel
from caltrain.models.weights import state_of
from caltrain.models.wheel import Factory, check_stage, load_wheel, no_wheel
from caltrain.training.seeds import Draws
from caltrain.training.spec import TrainingSpec
from support.split import SCHEMA, differing, one_thread, plain_state, split_state

PARTS = """
from __future__ import annotations
import dataclasses
import torch
from torch import nn, Tensor

@dataclasses.dataclass
class Width:
    channels: int

class Residual(nn.Module):
    def __init__(self, width: Width) -> None:
        super().__init__()
        n = width.channels
        self.one, self.two = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(n), nn.BatchNorm2d(n)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.two(torch.relu(self.norm1(self.one(x))))))
"""
STAGES = """
from torch import nn
from acme_blocks import parts
from .parts import Residual

def make(name):
    if name == "residual":
        return Residual(parts.Width(6))
    if name == "dropping":
        return nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Dropout(0.3))
    raise KeyError(name)
"""
FILES: dict[str, str | bytes] = {
    "acme_blocks/__init__.py": "",
    "acme_blocks/parts.py": PARTS,
    "acme_blocks/stages.py": STAGES,
    "acme_blocks-1.0.dist-info/METADATA": "Name: acme_blocks\n",
    "acme_blocks-1.0.dist-info/RECORD": "",
}
RESIDUAL = Stage(name="residual", shape=(6, 8, 8), weights=2 * 6 * 6 * 9 + 4 * 6)
DROPPING = Stage(name="dropping", shape=(4, 6, 6), weights=4 * 6 * 9 + 4)
LINEAR = Stage(name="s", shape=(3,), weights=2 * 3 + 3)
LINEAR_SOURCE = "from torch import nn\nmake = lambda name: nn.Linear(2, 3)\n"


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    finders, modules = list(sys.meta_path), set(sys.modules)
    with one_thread():
        yield
    assert sys.meta_path == finders
    assert not {name for name in sys.modules if name.startswith("acme")} - modules


def pack(files: Mapping[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return stream.getvalue()


def named(raw: bytes, factory: str) -> Wheel:
    return Wheel(sha256="sha256:" + hashlib.sha256(raw).hexdigest(), factory=factory)


def load(source: str, factory: str = "acme:make", **more: str) -> Factory:
    raw = pack({"acme.py": source} | {name.replace("__", "/") + ".py": text for name, text in more.items()})
    return load_wheel(raw, named(raw, factory))


def blocks() -> Factory:
    raw = pack(FILES)
    return load_wheel(raw, named(raw, "acme_blocks.stages:make"))


def refused(code: str, call: Callable[[], object], family: type[CaltrainError] = ConfigError) -> str:
    with pytest.raises(family) as caught:
        call()
    assert caught.value.code == code
    return caught.value.what


# --- what a wheel is for -----------------------------------------------------------------------------------------

RAW = pack(FILES)
SPEC = ModelSpec(
    layers=(Conv(filters=6, batch_norm=True), RESIDUAL, DROPPING, AvgPool(), Linear(units=3)),
    wheel=named(RAW, "acme_blocks.stages:make"),
)
TRAINING = TrainingSpec(epochs=2, batch=6, learning_rate=0.05, weight_decay=0.001, threads=1)
CUTS = [Partition(front=f, head=h) for f, h in ((1, 0), (2, 0), (3, 0), (1, 2), (2, 1), (1, 3))]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut.form} {cut.front}-{cut.head}")
def test_split_equals_plain_with_stages_of_a_wheel(cut: Partition, tmp_path: Path) -> None:
    file = tmp_path / "acme_blocks-1.0-py3-none-any.whl"
    file.write_bytes(RAW)
    assert SPEC.wheel is not None
    # Loaded once for the plain loop and once for the zones, as in two processes.
    split = split_state(SPEC, cut, TRAINING, factory=load_wheel(file.read_bytes(), SPEC.wheel))
    plain = plain_state(SPEC, cut, TRAINING, factory=load_wheel(file.read_bytes(), SPEC.wheel))
    assert differing(split, plain) == set()
    assert {"1.norm1.running_mean", "2.0.weight"} <= split.keys()


def test_a_dropout_of_a_wheel_becomes_a_keyed_one() -> None:
    model = build(SPEC, input_shape=SCHEMA.shape, factory=blocks())
    assert [type(m) for m in model.modules() if "Dropout" in type(m).__name__] == [KeyedDropout]
    x = torch.ones(6, 3, 8, 8)
    before = torch.get_rng_state()

    def draw(step: int) -> torch.Tensor:
        set_draws(model, Draws(bytes(32), 0, step))
        return cast(torch.Tensor, model(x).detach())

    model.train()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_is_made_the_same_whatever_was_drawn_before() -> None:
    torch_state = torch.get_rng_state()
    one = blocks()(RESIDUAL)
    torch.manual_seed(5)
    moved = torch.get_rng_state()
    two = blocks()(RESIDUAL)
    assert differing(state_of(one), state_of(two)) == set()
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(torch_state)


def test_draws_of_an_import_or_of_an_error_do_not_move_the_generator_either() -> None:
    source = "import torch\ntorch.rand(3)\ndef make(name):\n    torch.rand(3)\n    raise ValueError\n"
    before = torch.get_rng_state()
    factory = load(source)
    refused("wheel.failed", lambda: factory(LINEAR))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stage_is_made_on_meta_too_where_memory_is_only_counted() -> None:
    with torch.device("meta"):
        made = blocks()(RESIDUAL)
        check_stage(made, RESIDUAL, (6, 8, 8))
    assert {p.is_meta for p in made.parameters()} == {True}


def test_a_stored_wheel_is_read_like_a_packed_one() -> None:
    assert read_sources(pack(FILES, zipfile.ZIP_STORED)) == read_sources(RAW)
    assert {name: text.encode() for name, text in FILES.items() if isinstance(text, str) and name.endswith(".py")} == (
        read_sources(RAW)
    )


def test_two_wheels_of_one_package_name_do_not_meet() -> None:
    source = "from torch import nn\nfrom acme_other import units\ndef make(name):\n    return nn.Linear(2, units)\n"
    first = load(source, acme_other="units = 3")
    second = load(source, acme_other="units = 4")
    again = load(source, acme_other="units = 3")
    four = Stage(name="s", shape=(4,), weights=12)
    for factory, stage in ((first, LINEAR), (second, four), (again, LINEAR), (first, LINEAR)):
        assert isinstance(factory(stage), nn.Linear)


def test_a_module_is_run_once_and_found_by_what_runs_later() -> None:
    source = """
import importlib, sys
from torch import nn, Tensor
import acme_late
acme_late.runs.append(0)
class Late(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from acme_late import runs, scale
        assert runs == [0], runs
        return x * scale
def make(name):
    assert importlib.import_module("acme_late") is acme_late is sys.modules["acme_late"]
    assert sys.modules[__name__].make is make
    return Late()
"""
    factory = load(source, acme_late="runs, scale = [], 3.0")
    made = factory(Stage(name="s", shape=(2,), weights=0))
    assert made(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]


def test_a_package_comes_before_a_module_of_its_name_and_odd_paths_are_no_modules() -> None:
    files = {
        "acme.py": "raise ValueError",
        "acme/__init__.py": LINEAR_SOURCE,
        "acme-1.0.data/x.py": "",
        "ac.me/x.py": "",
    }
    raw = pack(files)
    assert isinstance(load_wheel(raw, named(raw, "acme:make"))(LINEAR), nn.Linear)


def test_without_a_wheel_there_is_no_stage() -> None:
    refused("model.no-wheel", lambda: no_wheel(LINEAR))


# --- the file ----------------------------------------------------------------------------------------------------


def test_another_or_too_large_a_file_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_sources", lambda _: pytest.fail("read"))
    wheel = named(RAW, "acme_blocks.stages:make")
    refused("wheel.other-digest", lambda: load_wheel(RAW + b"x", wheel), IntegrityError)
    large = bytes(MAX_WHEEL_BYTES + 1)
    refused("wheel.too-large", lambda: load_wheel(large, named(large, "a:b")), IntegrityError)
    largest = large[:-1]
    with pytest.raises(pytest.fail.Exception, match="read"):
        load_wheel(largest, named(largest, "a:b"))


def patched(raw: bytes, old: bytes, new: bytes, *, only: int | None = None) -> bytes:
    """Every occurrence of `old` replaced, or the one of that number."""
    assert len(old) == len(new)
    assert old in raw
    if only is None:
        return raw.replace(old, new)
    parts = raw.split(old)
    return old.join(parts[: only + 1]) + new + old.join(parts[only + 1 :])


def rezip(
    content: bytes = b"x = 1\n",
    packed: bytes | None = None,
    *,
    size: int | None = None,
    crc: int | None = None,
    flags: int = 0,
    method: int = 8,
    local: Mapping[str, int] | None = None,
    extra: bytes = b"",
) -> bytes:
    """An archive with one file, `acme.py`, whose headers say what they are told; `local` differs in front only."""
    if packed is None:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = deflate.compress(content) + deflate.flush()
    told = {"flags": flags, "method": method, "time": 0, "date": 33, "crc": zlib.crc32(content) if crc is None else crc}
    told |= {"packed": len(packed), "size": len(content) if size is None else size, "name": 7, "extra": len(extra)}
    ahead = told | dict(local or {})
    front = struct.pack("<4s5H3L2H", b"PK\3\4", 20, *ahead.values()) + b"acme.py" + extra + packed
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *told.values(), 0, 0, 0, 0, 0) + b"acme.py" + extra
    return front + entry + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(front), 0)


def ended(raw: bytes, **change: int) -> bytes:
    names = ("disk", "first_disk", "here", "entries", "size", "offset", "comment")
    fields = dict(zip(names, struct.unpack("<4H2LH", raw[-18:]), strict=True)) | change
    return raw[:-18] + struct.pack("<4H2LH", *fields.values())


def with_gap(raw: bytes) -> bytes:
    """Bytes between the files and the directory, which the end points behind."""
    size, offset = struct.unpack("<2L", raw[-10:-2])
    return ended(raw[:offset] + b"hide" + raw[offset:], size=size, offset=offset + 4)


def with_junk_in_front() -> bytes:
    stream = io.BytesIO(b"junk")
    stream.seek(4)
    with zipfile.ZipFile(stream, "w") as target:
        target.writestr("acme.py", "")
    return stream.getvalue()


def streamed() -> bytes:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

        def seek(self, *_: int) -> int:
            raise OSError

    stream = Pipe()
    with zipfile.ZipFile(stream, "w") as target:
        target.writestr("acme.py", "x = 1\n")
    return stream.getvalue()


def twice(*names: str) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as target:
        warnings.simplefilter("ignore")
        for name in names:
            target.writestr(name, "")
    return stream.getvalue()


def unfinished(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush(zlib.Z_SYNC_FLUSH)


def deflated(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush()


SIZE, OFFSET = struct.unpack("<2L", RAW[-10:-2])
HOSTILE: dict[str, tuple[str, bytes]] = {
    "empty": ("does not end", b""),
    "shorter than an end": ("does not end", b"PK\5\6"),
    "no zip": ("does not end", b"no zip at all, " * 9),
    "bytes behind": ("does not end", RAW + b"x"),
    "comment": ("does not end", ended(RAW, comment=3) + b"hey"),
    "comment announced": ("does not describe", ended(RAW, comment=1)),
    "bytes in front": ("does not describe", b"#!/bin/sh\n" + RAW),
    "several disks": ("does not describe", ended(RAW, disk=1)),
    "directory elsewhere": ("does not describe", ended(RAW, first_disk=1)),
    "two counts": ("does not describe", ended(RAW, here=4)),
    "directory too short": ("does not describe", ended(RAW, size=SIZE - 1)),
    "directory cut": ("cannot be read", ended(RAW, size=SIZE - 1, offset=OFFSET + 1)),
    "no directory": ("cannot be read", patched(RAW, b"PK\1\2", b"PK\1\3", only=0)),
    "another version": ("cannot be read", patched(RAW, b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff", only=0)),
    "a name that is not UTF-8": (
        "cannot be read",
        patched(pack({"ä.py": ""}), "ä".encode(), b"\xff\xff"),
    ),
    "one file more": ("counts", ended(RAW, here=4, entries=4)),
    "one file less": ("counts", ended(RAW, here=6, entries=6)),
    "gap before the directory": ("between its files", with_gap(RAW)),
    "junk in front, offsets right": ("does not stand", with_junk_in_front()),
    "streamed": ("does not stand", streamed()),
    "encrypted": ("does not stand", rezip(flags=1)),
    "extra field": ("does not stand", rezip(extra=b"\x99\x99\0\0")),
    "extra field in front only": ("differ", rezip(local={"extra": 4})),
    "signature": ("differ", patched(RAW, b"PK\3\4", b"PK\3\5", only=1)),
    "another path in front": ("differ", patched(RAW, b"acme_blocks/parts", b"acme_blocks/pants", only=0)),
    **{
        f"another {field} in front": ("differ", rezip(local={field: value}))
        for field, value in {"flags": 2, "method": 0, "crc": 1, "packed": 9, "size": 7, "name": 6}.items()
    },
    "method": ("method", rezip(method=12, packed=b"x = 1\n")),
    "not deflate": ("unpacked", rezip(packed=b"\xff\xff\xff")),
    "bomb": ("longer or shorter", rezip(packed=deflated(bytes(1 << 20)), size=6)),
    "one byte more": ("longer or shorter", rezip(packed=deflated(b"x = 1\n\n\n"))),
    "unfinished": ("longer or shorter", rezip(packed=unfinished(b"x = 1\n"))),
    "bytes behind a file": ("longer or shorter", rezip(packed=deflated(b"x = 1\n") + b"y")),
    "stored, longer": ("damaged", rezip(packed=b"x = 1\n", method=0, size=5, crc=zlib.crc32(b"x = 1\n"))),
    "checksum": ("damaged", rezip(crc=1)),
    "less than it says": ("damaged", rezip(size=9)),
    "one name twice": ("one name", twice("acme.py", "acme.py")),
    "one name in capitals": ("one name", twice("acme.py", "ACME.py")),
    **{
        f"name {name!r}": ("is called", pack({name: ""}))
        for name in (
            *("/acme.py", "../acme.py", "a/../acme.py", "a/./acme.py", "./acme.py", "a/..", "a//acme.py", "acme/"),
            *("C:/acme.py", "a\\acme.py", "ä.py", "a\nacme.py", "..", ".", "a" * 253 + ".py"),
        )
    },
    "a name with an end inside": ("is called", patched(pack({"acme.pyX.txt": ""}), b"acme.pyX", b"acme.py\0")),
}


@pytest.mark.parametrize(("says", "raw"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_that_is_not_plain_is_refused_before_anything_of_it_runs(says: str, raw: bytes) -> None:
    what = refused("wheel.archive", lambda: load_wheel(raw, named(raw, "acme:make")))
    assert says in what


def test_the_builder_of_hostile_archives_builds_a_plain_one() -> None:
    assert read_sources(rezip()) == {"acme.py": b"x = 1\n"}
    assert read_sources(rezip(packed=b"x = 1\n", method=0)) == {"acme.py": b"x = 1\n"}
    assert ended(RAW) == RAW
    assert read_sources(pack({"a" * 252 + ".py": "", "a/.b/..c/d.py": ""})).keys() == {
        "a" * 252 + ".py",
        "a/.b/..c/d.py",
    }


def test_an_archive_up_to_the_bounds_is_read_and_none_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [len(text) for text in FILES.values()]
    bounds = {"MAX_MEMBERS": len(FILES), "MAX_DIRECTORY": SIZE, "MAX_MEMBER": max(sizes), "MAX_TOTAL": sum(sizes)}
    for name, bound in bounds.items():
        monkeypatch.setattr(archive, name, bound)
    assert read_sources(RAW)
    for name, bound in bounds.items():
        monkeypatch.setattr(archive, name, bound - 1)
        what = refused("wheel.archive", lambda: read_sources(RAW))
        assert "unpacks to" in what or "a directory of" in what
        monkeypatch.setattr(archive, name, bound)


@pytest.mark.parametrize(
    "name", ["_c.so", "_c.cpython-311-x86_64-linux-gnu.so", "lib.so.1", "a.PYD", "a.dylib", "a.dll"]
)
@pytest.mark.parametrize("folder", ["", "acme/", "acme-1.0.data/purelib/"])
def test_compiled_code_is_refused(name: str, folder: str) -> None:
    raw = pack({"acme.py": "", folder + name: b"\x7fELF"})
    refused("wheel.not-pure", lambda: load_wheel(raw, named(raw, "acme:make")))


def test_bytecode_is_refused() -> None:
    refused("wheel.not-pure", lambda: read_sources(pack({"acme/__pycache__/x.cpython-311.pyc": b""})))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(RAW) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_archive_is_refused_or_reads_the_same(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(RAW)
    for at, value in changes:
        raw[at] = value
    try:
        got = read_sources(bytes(raw))
    except ConfigError as error:
        assert error.code in {"wheel.archive", "wheel.not-pure"}  # noqa: PT017
    else:
        assert got == read_sources(RAW)


# --- names and imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["torch/evil.py", "caltrain/evil.py", "json.py", "antigravity.py", "only_loaded.py", "on_disk.py"]
)
def test_a_wheel_cannot_take_a_name_that_means_something_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "on_disk.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "only_loaded", ModuleType("only_loaded"))
    raw = pack({"acme.py": "raise SystemExit('it ran')", name: ""})
    what = refused("wheel.name-taken", lambda: load_wheel(raw, named(raw, "acme:make")))
    assert repr(name.split("/", maxsplit=1)[0].removesuffix(".py")) in what


@pytest.mark.parametrize(
    "factory", ["os:getcwd", "acme.sub:make", "acme.:make", "acme:nothing", "acme:number", "acme.py:make"]
)
def test_a_factory_that_is_not_in_the_wheel_is_refused(factory: str) -> None:
    refused("wheel.no-factory", lambda: load("number = 3\ndef make(name): ...", factory))


def test_an_import_of_what_is_not_there_is_named() -> None:
    assert "'no_such_module'" in refused("wheel.import", lambda: load("import no_such_module"))
    assert "'acme.part'" in refused("wheel.import", lambda: load("import acme.part"))
    assert "'acme_pkg'" in refused("wheel.import", lambda: load("", "acme_pkg.mod:make", acme_pkg__mod=LINEAR_SOURCE))
    assert "'?'" in refused("wheel.import", lambda: load("raise ImportError('by hand')"))
    factory = load("def make(name):\n    from no_such_module import x")
    assert "'no_such_module'" in refused("wheel.import", lambda: factory(LINEAR))


class Unreadable(MetaPathFinder, Loader):
    """Finds one module, whose file cannot be opened: as behind a lock that lets nothing be read."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "unreadable" else None

    def exec_module(self, module: ModuleType) -> None:
        raise PermissionError(13, "Permission denied", f"/somewhere/{module.__name__}.py")


def test_an_import_of_what_cannot_be_read_is_named_and_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Unreadable(), *sys.meta_path])
    what = refused("wheel.import", lambda: load("import unreadable"))
    assert "'unreadable'" in what
    assert "Permission denied" in what
    assert "/somewhere" not in what
    factory = load(f"try:\n    import unreadable\nexcept ImportError:\n    pass\n{LINEAR_SOURCE}")
    assert isinstance(factory(LINEAR), nn.Linear)


# --- what the wheel's code does ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ValueError('one\\ntwo')", "importing acme: ValueError: one"),
        ("def f(:", "SyntaxError"),
        ("x = 'not closed", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("open('/nowhere/at/all')", "FileNotFoundError"),
        ("raise RuntimeError('\\x1b[31m' + 'x' * 999)", "RuntimeError: [31mxxx"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "acme.E"),
        ("def f(): f()\nf()", "RecursionError"),
        ("def __getattr__(name): raise KeyError(name)", "KeyError: 'make'"),
    ],
)
def test_whatever_an_import_raises_becomes_one_bounded_line(source: str, says: str) -> None:
    what = refused("wheel.failed", lambda: load(source))
    assert says in what
    assert len(what) < 340
    assert what.isprintable()


def test_what_is_no_error_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        load("raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("None", "is made as NoneType"),
        ("nn.Linear", "is made as type"),
        ("nn.Linear(2, 4)", "has 12 weights, the plan says 9"),
        ("nn.Linear(2, 3).double()", "weights weight of torch.float64"),
        ("nn.Sequential(spoiled(nn.Linear(2, 3)))", "has 0.weight that is not finite"),
        ("buffered(nn.Linear(2, 3))", "has held that is not finite"),
    ],
)
def test_a_module_that_is_not_what_the_plan_says_is_refused(expression: str, says: str) -> None:
    source = f"""
import torch
from torch import nn
def spoiled(module):
    module.weight.data[0, 0] = torch.inf
    return module
def buffered(module):
    module.register_buffer("held", torch.full((1,), torch.nan))
    return module
def make(name): return {expression}
"""
    factory = load(source)
    assert says in refused("wheel.stage", lambda: factory(LINEAR))


def test_what_the_factory_raises_is_a_named_error() -> None:
    what = refused("wheel.failed", lambda: blocks()(Stage(name="other", shape=(1,), weights=0)))
    assert what == "making stage 'other': KeyError: 'other'"
    lazy = load("from torch import nn\nmake = lambda name: nn.LazyLinear(3)")
    refused("wheel.failed", lambda: lazy(LINEAR))


class Made(nn.Module):
    def __init__(self, forward: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.does = forward

    def forward(self, x: torch.Tensor) -> object:
        return self.does(self.norm(x))


def test_a_stage_that_fits_is_checked_and_left_as_it_was() -> None:
    fitting = Made(lambda x: torch.cat([x, x[:, :1]], 1))
    before = state_of(fitting)
    assert check_stage(fitting, LINEAR, (2,)) is fitting
    assert fitting.training
    assert differing(state_of(fitting), before) == set()
    dropping = key_dropouts(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), 1)
    assert check_stage(dropping, LINEAR, (2,)) is dropping


@pytest.mark.parametrize(
    ("stage", "code", "says"),
    [
        (nn.Linear(2, 4), "wheel.stage", "gives (2, 4) torch.float32 for (2, 2)"),
        (Made(lambda x: x.sum(0)), "wheel.stage", "gives (2,)"),
        (Made(lambda _: torch.zeros(2, 3, dtype=torch.float64)), "wheel.stage", "torch.float64"),
        (Made(lambda x: [x]), "wheel.stage", "gives list"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 3)), "wheel.stage", "overwrites its input"),
        (nn.Linear(3, 3), "wheel.failed", "running stage 's': RuntimeError: mat1"),
        (Made(lambda x: nn.functional.dropout(torch.cat([x, x], 1)[:, :3])), "wheel.draws", "draws random numbers"),
        (nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), "wheel.draws", "draws random numbers"),
    ],
)
def test_a_stage_that_does_not_map_as_the_plan_says_is_refused(stage: nn.Module, code: str, says: str) -> None:
    if code == "wheel.draws":
        stage.train()
    assert says in refused(code, lambda: check_stage(stage, LINEAR, (2,)))


def test_a_stage_whose_forward_imports_what_is_not_there_is_named() -> None:
    source = """
from torch import nn
class Lazy(nn.Module):
    def forward(self, x):
        import no_such_module
make = lambda name: Lazy()
"""
    stage = Stage(name="s", shape=(2,), weights=0)
    made = load(source)(stage)
    assert "'no_such_module'" in refused("wheel.import", lambda: check_stage(made, stage, (2,)))


# --- behind the lock ---------------------------------------------------------------------------------------------

LOCKED = """
import importlib, json, sys, zipfile, io, hashlib
import torch
importlib.import_module("torch._dynamo")
from caltrain.enclave.sandbox import lock_down
from caltrain.errors import CaltrainError
from caltrain.models.layers import Stage
from caltrain.models.spec import Wheel
from caltrain.models.wheel import check_stage, load_wheel
raw = sys.stdin.buffer.read()
others = {"missing": "import no_such_module", "reads": "open('/etc/hostname')", "writes": "open('/tmp/x', 'w')"}
packed = {}
for name, source in others.items():
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as target:
        target.writestr("acme.py", source)
    packed[name] = stream.getvalue()
report = lock_down(keep_fds=[])
def run(raw, factory, stage):
    wheel = Wheel(sha256="sha256:" + hashlib.sha256(raw).hexdigest(), factory=factory)
    try:
        made = load_wheel(raw, wheel)(stage)
        return list(check_stage(made, stage, (6, 8, 8))(torch.zeros(1, 6, 8, 8)).shape)
    except CaltrainError as error:
        return [error.code, error.what]
answer = {name: run(raw, "acme:make", Stage(name="s", shape=(1,), weights=0)) for name, raw in packed.items()}
answer["whole"] = run(raw, "acme_blocks.stages:make", Stage(name="residual", shape=(6, 8, 8), weights=672))
answer["landlock"] = report.state("landlock-files")
sys.stdout.write(json.dumps(answer))
"""


def test_a_wheel_is_imported_behind_the_lock_of_the_enclave() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOCKED],
        env=enclave_environment(1),
        input=RAW,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    if answer["landlock"] != "on":
        pytest.skip("landlock-files is not offered here")
    assert answer["whole"] == [1, 6, 8, 8]
    assert answer["missing"][0] == "wheel.import"
    assert "'no_such_module'" in answer["missing"][1]
    for name in ("reads", "writes"):
        assert answer[name][0] == "wheel.failed"
        assert "PermissionError" in answer[name][1]


def test_a_name_is_free_again_afterwards() -> None:
    blocks()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("acme_blocks")
