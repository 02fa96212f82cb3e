"""Seals: what stands at the end of a checkpoint file, and finds a bit that flipped or a part that is missing.

torch's format is a zip archive, and a zip archive may end with a comment, which no reader of the format looks at: torch, and any other
program that reads the file, reads it as before. The comment holds, as JSON, the size and the checksum of everything before it, and the
generation of the checkpoint; it ends with its own length and checksum, so that it is read from the end, without the rest of the file.

A CRC-32 finds every error within 32 bits, and misses one in four thousand millions of others. It is no protection against somebody who
changes a file on purpose. Files without a seal, of other programs, are checked by the checksums that zip archives hold themselves.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Generator
from typing import IO, Any, NamedTuple

from lightning.fabric.checkpoint.pickles import Refused, look_through

VERSION = 1
MAGIC = b"KRNSEAL1"
FOOTER = len(MAGIC) + 16  # the magic, the length of the JSON, its checksum
END_OF_ARCHIVE = b"PK\x05\x06"
END_SIZE = 22  # of the record at the end of an archive without its comment
LONGEST_COMMENT = 65535
CHUNK = 1 << 20
ZIP_MAGIC = b"PK\x03\x04"
OLD_BEGINNINGS = (b"\x80", b"L1195470371")  # of the number that a file of torch before 1.6 begins with, in any protocol of pickles
TAR_MAGIC, TAR_PLACE = b"ustar", 257  # of files of torch before 0.1.10


class DamagedCheckpoint(RuntimeError):
    """The file is incomplete, damaged, or no checkpoint at all."""


class Generation(NamedTuple):
    """Which of several checkpoints of a run is the newest, whatever the clocks say: the one that compares as greatest."""

    global_step: int
    counter: int  # of the checkpoints written, through all resumed parts of a run

    def __str__(self) -> str:
        return f"step {self.global_step}, save {self.counter}"


class Seal(NamedTuple):
    """What a checkpoint file says of itself."""

    size: int  # of the archive without the comment, in bytes
    crc32: int  # of these bytes but for the last two, which tell the length of the comment
    generation: Generation | None
    manifest: tuple[int, int] | None  # size and checksum of the list of the files of a sharded checkpoint


# ---- writing ----------------------------------------------------------------------------------------------------------


class Summing:
    """A file that is written from start to end, and the size and checksum of what was written.

    Args:
        file: where to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):  # an unbuffered file may take a part only
            done += self.file.write(view[done:])
        self.size += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)

    def flush(self) -> None:
        self.file.flush()

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


class Sealing:
    """A file to which torch writes an archive; :meth:`seal` ends it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.out = Summing(file)
        self.held = b""  # the last two bytes so far: in the end, the length of the comment

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self.out.write(self.held)
            self.out.write(view[:-2])
            self.held = bytes(view[-2:])
        else:
            rest = self.held + bytes(view)
            self.out.write(rest[:-2])
            self.held = rest[-2:]
        return len(view)

    def flush(self) -> None:
        self.out.flush()

    def seal(self, generation: Generation | None = None, manifest: tuple[int, int] | None = None) -> None:
        """Write the seal; nothing may be written after it."""
        content: dict[str, Any] = {"version": VERSION, "size": self.out.size + 2, "crc32": self.out.crc32}
        if generation is not None:
            content["generation"] = list(generation)
        if manifest is not None:
            content["manifest"] = list(manifest)
        text = json.dumps(content, separators=(",", ":")).encode()
        comment = text + MAGIC + b"%08x%08x" % (len(text), zlib.crc32(text))
        self.out.write(len(comment).to_bytes(2, "little") + comment)


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_seal(file: IO[bytes], name: str, start: int = 0) -> Seal | None:
    """The seal of a file, or None if it has none. Nothing but the end of the file is read.

    Args:
        file: can seek.
        name: for messages.
        start: where in the file the checkpoint begins.

    Raises:
        DamagedCheckpoint: if the seal is broken, or the file has another size than it says.
    """
    end = file.seek(0, os.SEEK_END)
    tail = _tail(file, start, end)
    if tail[-FOOTER : -FOOTER + len(MAGIC)] != MAGIC:
        return None
    try:
        length, checksum = int(tail[-16:-8], 16), int(tail[-8:], 16)
        text = tail[-FOOTER - length : -FOOTER]
        if len(text) != length or zlib.crc32(text) != checksum or tail[-16:] != b"%08x%08x" % (length, checksum):
            raise ValueError("its checksum is wrong")
        content = json.loads(text)
        generation, manifest = content.get("generation"), content.get("manifest")
        seal = Seal(
            int(content["size"]),
            int(content["crc32"]),
            None if generation is None else Generation(int(generation[0]), int(generation[1])),
            None if manifest is None else (int(manifest[0]), int(manifest[1])),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(_message(name, end - start, f"its seal, the last bytes of it, is broken: {error}")) from None
    comment = length + FOOTER
    found = end - start - comment
    # What torch reads as the length of the comment is outside of the checksum.
    if found != seal.size or tail[-comment - 2 : -comment] != comment.to_bytes(2, "little"):
        raise DamagedCheckpoint(_message(name, end - start, f"it should have {seal.size + comment} bytes"))
    return seal


def verify(file: IO[bytes], name: str, start: int = 0) -> Seal | None:
    """Check a whole file, before any of it is used.

    Args:
        file: can seek; it is left at ``start``.
        name: for messages.
        start: where in the file the checkpoint begins.

    Returns:
        Its seal; None if it has none, and is right as far as a file without one can tell.

    Raises:
        DamagedCheckpoint: if the file is not what was written; it names the record of the archive.
    """
    seal = read_seal(file, name, start)
    file.seek(start)
    if seal is None:
        if is_archive(file, name, start):
            _check_unsealed(file, name, start)
    elif checksum(file, seal.size - 2)[1] != seal.crc32:
        broken = next(broken_records(file, start), None)
        where = f"the record {broken!r} is broken" if broken else "something is broken outside of its records"
        raise DamagedCheckpoint(_message(name, file.seek(0, os.SEEK_END) - start, f"its checksum is wrong, and {where}"))
    file.seek(start)
    return seal


def is_archive(file: IO[bytes], name: str, start: int = 0) -> bool:
    """Whether a file is an archive, by its first bytes; else it is of the format of old releases of torch.

    Args:
        file: can seek; it is left at ``start``.
        name: for messages.
        start: where in the file the checkpoint begins.

    Raises:
        DamagedCheckpoint: if it is neither, such as a file of zeros: what a power cut leaves where contents had not reached the disk.
    """
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    head = file.read(512)
    file.seek(start)
    if head.startswith(ZIP_MAGIC):
        return True
    if not (head.startswith(OLD_BEGINNINGS) or head[TAR_PLACE:].startswith(TAR_MAGIC)):
        begins = "zeros" if head and not any(head) else repr(head[:8])
        problem = f"it begins with {begins}, as no checkpoint does" if head else "it is empty"
        raise DamagedCheckpoint(_message(name, size, problem))
    return False


def checksum(file: IO[bytes], limit: int | None = None) -> tuple[int, int]:
    """The number of bytes from here on, ``limit`` at most, and their checksum."""
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    size = crc32 = 0
    readinto = getattr(file, "readinto", None)
    while limit is None or size < limit:
        wanted = CHUNK if limit is None else min(CHUNK, limit - size)
        if readinto is not None:
            count = readinto(view[:wanted])
            part = view[:count]
        else:
            part = memoryview(file.read(wanted))
            count = len(part)
        if not count:
            break
        crc32 = zlib.crc32(part, crc32)
        size += count
    return size, crc32


def checksum_of(path: str) -> tuple[int, int]:
    """The size and the checksum of a file."""
    with open(path, "rb", buffering=0) as file:
        return checksum(file)


def _tail(file: IO[bytes], start: int, end: int) -> bytes:
    length = min(end - start, LONGEST_COMMENT + END_SIZE)
    short = min(length, 512)  # seals are shorter
    file.seek(end - short)
    tail = file.read(short)
    if short < length and tail[-FOOTER : -FOOTER + len(MAGIC)] != MAGIC:
        file.seek(end - length)
        tail = file.read(length)
    return tail


def _check_unsealed(file: IO[bytes], name: str, start: int) -> None:
    """Check the archive of another program, or one whose seal is lost, by what archives know of themselves."""
    end = file.seek(0, os.SEEK_END)
    tail = _tail(file, start, end)
    place = tail.rfind(END_OF_ARCHIVE)
    whole = 0 <= place <= len(tail) - END_SIZE
    if not whole or place + END_SIZE + int.from_bytes(tail[place + 20 : place + 22], "little") != len(tail):
        raise DamagedCheckpoint(_message(name, end - start, "it has no end"))
    broken = next(broken_records(file, start), None)
    if broken is not None:
        raise DamagedCheckpoint(_message(name, end - start, f"the record {broken!r} is broken"))


def broken_records(file: IO[bytes], start: int = 0) -> Generator[str, None, None]:
    """The names of the records of an archive that are not what their checksums say."""
    import zipfile

    part: Any = file if start == 0 else _Part(file, start)
    try:
        archive = zipfile.ZipFile(part)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError):
        yield "the table of its records"
        return
    with archive:
        for entry in archive.infolist():
            if entry.external_attr & 0x10:  # torch would take it for a folder, and leave the tensor's memory as it was
                yield entry.filename
                continue
            unknown = entry.CRC == 0  # written under torch.serialization.set_crc32_options(False)
            try:
                with archive.open(entry) as record:
                    if unknown:
                        continue
                    while record.read(CHUNK):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                    raise
                yield entry.filename


def refuse_bombs(file: IO[bytes], name: str, start: int = 0) -> None:
    """Refuse a file whose contents would take more memory than it has bytes, or time without end: nothing that torch writes does.

    Args:
        file: can seek; it is left at ``start``.
        name: for messages.
        start: where in the file the checkpoint begins.

    Raises:
        DamagedCheckpoint: if they would.
    """
    import zipfile

    size = file.seek(0, os.SEEK_END) - start
    try:
        if is_archive(file, name, start):
            part: Any = file if start == 0 else _Part(file, start)
            archive = zipfile.ZipFile(part)
            needed = sum(entry.file_size for entry in archive.infolist())
            if needed > size:
                raise DamagedCheckpoint(_message(name, size, f"its records would unfold to {needed} bytes, which no checkpoint's do"))
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    if entry.CRC == 0:  # as in broken_records; without the attribute it is not compared
                        del entry.CRC
                    look_through(archive.read(entry))
        else:
            _look_through_old(file, start, size)
    except Refused as reason:
        raise DamagedCheckpoint(_message(name, size, f"{reason}, which no checkpoint does")) from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, DamagedCheckpoint) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise
        raise DamagedCheckpoint(_message(name, size, f"the table of its records can't be read ({error})")) from None
    file.seek(start)


def _look_through_old(file: IO[bytes], start: int, size: int) -> None:
    """The same for the pickles at the beginning of a file of the format before torch 1.6; its tensors stand behind them."""
    length = CHUNK
    while True:
        file.seek(start)
        data = file.read(length)
        at = 0
        for _ in range(5):
            at = look_through(data, at)
            if at < 0:
                break
        if at >= 0 or length >= size:
            return
        length *= 4


class _Part:
    """A part of a file, from some place on, as a file of its own; to its end, if no length is given."""

    def __init__(self, file: IO[bytes], start: int, length: int | None = None) -> None:
        self.file = file
        self.start = start
        self.length = file.seek(0, os.SEEK_END) - start if length is None else length
        self.file.seek(start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        here = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.length}[whence]
        return self.file.seek(here + offset + self.start) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self.tell(), 0)
        return self.file.read(left if size is None or size < 0 else min(size, left))

    def seekable(self) -> bool:
        return True


def part_of(file: IO[bytes], start: int, length: int) -> IO[bytes]:
    """So many bytes of a file as a file of its own, which can be read.

    Args:
        file: can seek; nobody else may use it meanwhile.
        start: where the part begins.
        length: of it, in bytes.
    """
    return _Part(file, start, length)  # type: ignore[return-value]


def _message(name: str, size: int, problem: str) -> str:
    return (
        f"The checkpoint {name} is incomplete or damaged ({size} bytes): {problem}. "
        "Copy it anew from where it came from, or use the checkpoint before it."
    )
