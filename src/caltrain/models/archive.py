"""The Python files of a wheel, from a zip archive that every reader reads alike.

A zip archive says most things twice (in front of each file, and in the directory at its end), and readers differ in
what they believe: a party could inspect other code than the enclave runs. So an archive is taken only in the one plain
form that build tools write: files without gaps, then the directory, then its end, both headers alike, nothing else.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib

from caltrain.errors import ConfigError

MAX_MEMBERS = 2_000
MAX_DIRECTORY = 1 << 20
MAX_MEMBER = 8 << 20
MAX_TOTAL = 32 << 20

_NAME = re.compile(r"(?!.*(^|/)\.{1,2}(/|$))[A-Za-z0-9_.+ -]+(/[A-Za-z0-9_.+ -]+)*")
_NATIVE = re.compile(r"\.(so|pyd|dylib|dll|pyc)(\.|$)", re.IGNORECASE)
_LEVELS_AND_UTF8 = 0x0806  # what the flags may say: how hard deflate tried, and how the name is spelled
_ZIP64_LOCATOR = 20
_END = struct.Struct("<4s4H2LH")  # signature, disks (2), entries (2), size and offset of the directory, comment
_HEADER = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, crc, sizes (2), lengths (2)


def read_sources(raw: bytes) -> dict[str, bytes]:
    """The archive's `.py` members by path. Other files (metadata, licences) are checked in the same way, and left.

    Raises ConfigError `wheel.archive` (not the plain form, or over a bound) or `wheel.not-pure`.
    """
    infos = _directory(raw)
    if len({info.orig_filename.casefold() for info in infos}) != len(infos):
        raise _odd("two of its files have one name, where capitals do not count")
    total, end, sources = 0, 0, dict[str, bytes]()
    for info in infos:
        _check_name(info.orig_filename)
        total += info.file_size
        if info.file_size > MAX_MEMBER or total > MAX_TOTAL:
            raise _odd(f"up to {info.orig_filename} it unpacks to {total} bytes")
        start, end = _body(raw, info, end)
        content = _unpack(info, raw[start:end])
        if info.orig_filename.endswith(".py"):
            sources[info.orig_filename] = content
    if end != len(raw) - _END.size - _end(raw)[5]:
        raise _odd("there are bytes between its files and its directory")
    return sources


def _end(raw: bytes) -> tuple[int, ...]:
    fields: tuple[int, ...] = _END.unpack(raw[-_END.size :])
    return fields


def _directory(raw: bytes) -> list[zipfile.ZipInfo]:
    """Entries in the order of the files. The end is read here first: it bounds what `zipfile` will read."""
    if len(raw) < _END.size or raw[-_END.size :][:4] != b"PK\5\6":
        raise _odd("it does not end as a zip archive without a comment does")
    _, disk, first_disk, here, entries, size, offset, comment = _end(raw)
    if (disk, first_disk, comment, here, offset + size + _END.size) != (0, 0, 0, entries, len(raw)):
        raise _odd("its end does not describe it")
    if (
        raw[-_END.size - _ZIP64_LOCATOR :][:4] == b"PK\6\7"
    ):  # it leads Python, and not all readers, to another directory
        raise _odd("it has a second directory (ZIP64)")
    if entries > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise _odd(f"it has {entries} files and a directory of {size} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _odd(f"its directory cannot be read: {str(error)[:200]}") from None
    if len(infos) != entries:
        raise _odd(f"its end counts {entries} files, its directory {len(infos)}")
    return sorted(infos, key=lambda info: info.header_offset)


def _check_name(name: str) -> None:
    if len(name) > 255 or not _NAME.fullmatch(name):
        raise _odd(f"a file is called {name[:80]!r}")
    if _NATIVE.search(name):
        raise ConfigError(
            "wheel.not-pure",
            f"the wheel holds compiled code: {name}",
            step="load wheel",
            fix="Name a wheel of Python sources only: what the parties approve must be what they can read.",
        )


def _body(raw: bytes, info: zipfile.ZipInfo, start: int) -> tuple[int, int]:
    """Where the packed bytes of a file begin and end, if its header stands at `start` and says what the entry says."""
    name = info.orig_filename.encode()
    sizes = (info.CRC, info.compress_size, info.file_size)
    begin = start + _HEADER.size
    if info.header_offset != start or info.flag_bits & ~_LEVELS_AND_UTF8 or info.extra:
        raise _odd(f"{info.orig_filename} does not stand where it should, or is encrypted, streamed or extended")
    header = _HEADER.unpack(raw[start:begin].ljust(_HEADER.size, b"\0"))
    told = (b"PK\3\4", header[1], info.flag_bits, info.compress_type, *header[4:6], *sizes, len(name), 0)
    if header != told or raw[begin : begin + len(name)] != name:
        raise _odd(f"{info.orig_filename} has two descriptions that differ")
    begin += len(name)
    return begin, begin + info.compress_size


def _unpack(info: zipfile.ZipInfo, packed: bytes) -> bytes:
    content = packed
    if info.compress_type == zipfile.ZIP_DEFLATED:
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = stream.decompress(packed, info.file_size + 1)
        except zlib.error as error:
            raise _odd(f"{info.orig_filename} cannot be unpacked: {error}") from None
        if not stream.eof or stream.unused_data:
            raise _odd(f"{info.orig_filename} is longer or shorter than it says")
    elif info.compress_type != zipfile.ZIP_STORED:
        raise _odd(f"{info.orig_filename} is packed with method {info.compress_type}")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise _odd(f"{info.orig_filename} is damaged")
    return content


def _odd(what: str) -> ConfigError:
    return ConfigError(
        "wheel.archive",
        f"the wheel is not a plain zip archive: {what}",
        step="load wheel",
        fix="Build it with a common tool (`python -m build --wheel`), and give its new digest in the plan.",
    )
