"""The disk store's folder: what it gives is what was written, or nothing, whatever happened to its files."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from brigade.comm.kv import entry, folder
from brigade.comm.kv.entry import HEADER, Damaged, Form
from brigade.comm.kv.folder import Folder, Unusable
from brigade.comm.kv.rows import Bytes

FORM = Form(n_layers=3, tokens=4, row_bytes=16, identity=b"i" * 16)


def key(n: int) -> bytes:
    return random.Random(n).randbytes(20)


def content(n: int) -> Bytes:
    return np.random.default_rng(n).integers(0, 256, FORM.payload, np.uint8)


def opened(path: Path, n_entries: float = 100, form: Form = FORM) -> Folder:
    out = Folder(str(path), int(n_entries * form.size), form)
    out.open()
    return out


def write(f: Folder, n: int) -> bool:
    return f.write(key(n), np.split(content(n), 6), lambda: True)


def read(f: Folder, n: int) -> Bytes | None:
    """What the folder gives; None: nothing."""
    if (fd := f.begin(key(n))) is None:
        return None
    into = np.empty(FORM.payload, np.uint8)
    try:
        f.read(fd, key(n), into)
    finally:
        os.close(fd)
    return into


def test_what_is_written_is_found_again_by_other_processes_too(tmp_path: Path) -> None:
    mine, other = opened(tmp_path), opened(tmp_path)
    assert write(mine, 1)
    assert key(1) in mine
    assert np.array_equal(read(mine, 1), content(1))  # type: ignore[arg-type]
    assert key(1) not in other
    other.refresh()
    assert key(1) in other
    assert np.array_equal(read(other, 1), content(1))  # type: ignore[arg-type]
    assert read(other, 2) is None
    assert not write(other, 1)
    assert opened(tmp_path).used == FORM.size


def test_nobody_else_may_look_into_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(opened(tmp_path), 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "brigade-kv").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "brigade-kv").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_use_or_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "brigade-kv").mkdir(0o755)
    (tmp_path / "brigade-kv").chmod(0o755)
    with pytest.raises(Unusable, match="nobody else may use"):
        opened(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "brigade-kv").symlink_to(elsewhere)
    with pytest.raises(Unusable, match="nobody else may use"):
        opened(tmp_path / "two")
    with pytest.raises(Unusable, match="is not a folder"):
        opened(tmp_path / "absent")


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def version(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + (entry.VERSION + 1).to_bytes(4, "little") + data[12:])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "flipped_first": flip(HEADER),
    "flipped_last": flip(-1),
    "flipped_checksum": flip(HEADER - 1),
    "flipped_magic": flip(0),
    "other_version": version,
    "cut": lambda path: os.truncate(path, FORM.size - 1),
    "cut_in_header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, FORM.size + 1),
    "zeros": lambda path: path.write_bytes(bytes(FORM.size)),
    "pipe": fifo,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_none_and_removed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    f = opened(tmp_path)
    write(f, 1)
    damage(f.file(key(1)))
    with pytest.raises(Damaged):
        read(f, 1)
    assert key(1) not in f
    assert not f.file(key(1)).exists()
    assert opened(tmp_path).used == 0
    assert read(f, 1) is None
    assert write(f, 1)


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    f = opened(tmp_path)
    for bit in random.Random(1).sample(range(8 * FORM.size), 60):
        write(f, 1)
        data = bytearray(f.file(key(1)).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        f.file(key(1)).write_bytes(data)
        with pytest.raises(Damaged):
            read(f, 1)


@pytest.mark.parametrize(
    "other", [{"n_layers": 4, "tokens": 3}, {"identity": b"x" * 16}, {"row_bytes": 8, "tokens": 8}]
)
def test_an_entry_of_another_model_or_under_another_name_is_none(tmp_path: Path, other: dict[str, int]) -> None:
    f = opened(tmp_path)
    write(f, 1)
    f.file(key(1)).rename(f.file(key(2)))
    with pytest.raises(Damaged, match="another entry"):
        read(f, 2)
    write(f, 3)
    foreign = opened(tmp_path, form=Form(**{**vars(FORM), **other}))
    fd = foreign.begin(key(3))
    assert fd is not None
    with pytest.raises(Damaged, match="another entry"):
        foreign.read(fd, key(3), np.empty(FORM.payload, np.uint8))
    os.close(fd)


def test_it_stays_within_its_bound_and_the_oldest_go(tmp_path: Path) -> None:
    f = opened(tmp_path, 10)
    for n in range(10):
        write(f, n)
        os.utime(f.file(key(n)), (1000 + n, 1000 + n))
    f._young.clear()
    assert f.touch(key(0))
    write(f, 10)
    assert [n for n in range(11) if key(n) in f] == [0, 3, 4, 5, 6, 7, 8, 9, 10]  # nearly 5 % at once
    assert f.n_evicted == 2
    assert read(f, 1) is None
    for n in range(11, 60):
        write(f, n)
        assert f.used <= f.most
        assert len(list(f.path.glob("??/*"))) <= 10
    assert not f.touch(key(1))


def test_two_processes_keep_one_bound(tmp_path: Path) -> None:
    a, b = opened(tmp_path, 10), opened(tmp_path, 10)
    for n in range(40):
        write((a, b)[n % 2], n)
        assert len(list(a.path.glob("??/*"))) <= 10


def test_what_was_counted_wrong_is_right_after_room_was_made(tmp_path: Path) -> None:
    f = opened(tmp_path, 10)
    write(f, 1)
    (f.path / "ledger").write_bytes((1 << 40).to_bytes(8, "little"))
    assert write(f, 2)
    assert opened(tmp_path, 10).used == 2 * FORM.size


def test_what_a_killed_writer_has_left_goes_after_a_while_though_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = opened(tmp_path)
    write(f, 1)
    with f._ledger() as ledger:
        folder._note(ledger, 2 * FORM.size)  # it had booked room
    draft = f.file(key(2)).parent / ".123-abcd-0"
    draft.write_bytes(b"half")
    settled = time.time() - 10
    os.utime(draft.parent, (settled, settled))
    f.refresh()
    assert draft.exists(), "somebody may be writing it"
    assert f.used == 2 * FORM.size
    monkeypatch.setattr(folder, "LEFT_BEHIND", -1.0)
    f.refresh()
    assert not draft.exists()
    assert f.used == FORM.size
    assert np.array_equal(read(f, 1), content(1))  # type: ignore[arg-type]


def test_rows_that_changed_while_they_were_written_are_not_kept(tmp_path: Path) -> None:
    f = opened(tmp_path)
    assert not f.write(key(1), [content(1)], lambda: False)
    assert read(f, 1) is None
    assert not list(f.path.glob("??/.*"))
    assert opened(tmp_path).used == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_or_broken_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    f = opened(tmp_path)
    real, n = os.writev, 0

    def fails(fd: int, buffers: list[memoryview]) -> int:
        nonlocal n
        n += 1
        if n > 1:
            raise OSError(error, os.strerror(error))
        return real(fd, [buffers[0], buffers[1][:5]])

    with monkeypatch.context() as patched:
        patched.setattr(entry.os, "writev", fails)
        with pytest.raises(OSError, match=os.strerror(error)):
            write(f, 1)
    assert [p.name for p in f.path.rglob("*") if p.is_file()] == ["ledger"]
    assert opened(tmp_path).used == 0
    assert write(f, 1)


def test_a_lock_that_is_never_let_go_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LOCK_WAIT", 0.05)
    f = opened(tmp_path)
    with f._ledger(), pytest.raises(Unusable, match="locked by another process"):
        write(opened_twice := Folder(str(tmp_path), f.most, FORM), 1)
    assert write(opened_twice, 1)


def test_entries_can_be_written_in_many_pieces(tmp_path: Path) -> None:
    form = Form(n_layers=700, tokens=4, row_bytes=3, identity=b"i" * 16)
    f = opened(tmp_path, 4, form)
    data = np.arange(form.payload, dtype=np.uint8)
    assert f.write(key(1), np.split(data, 1400), lambda: True)
    into = np.empty(form.payload, np.uint8)
    fd = f.begin(key(1))
    assert fd is not None
    f.read(fd, key(1), into)
    os.close(fd)
    assert np.array_equal(into, data)


WRITER = """
import sys
from tests.comm.test_folder import opened, write
from pathlib import Path
f = opened(Path(sys.argv[1]), 30)
print("go", flush=True)
n = int(sys.argv[2])
while True:
    n += 1
    write(f, n)
"""


def test_killed_writers_leave_whole_entries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once, in one folder, which is full all the time."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE) for n in (0, 100_000, 200_000)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"go\n"
        time.sleep(0.2)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)
            with contextlib.suppress(AttributeError):
                writer.stdout.close()  # type: ignore[union-attr]
    monkeypatch.setattr(folder, "LEFT_BEHIND", 0.0)
    f = opened(tmp_path, 30)
    assert 0 < len(f) <= 30
    numbers = {key(n): n for base in (0, 100_000, 200_000) for n in range(base, base + 20_000)}
    for path in f.path.glob("??/[0-9a-f]*"):
        n = numbers[bytes.fromhex(path.parent.name + path.name)]
        assert np.array_equal(read(f, n), content(n))  # type: ignore[arg-type]
    with f._ledger():
        f._evict(f.most)
    assert not list(f.path.glob("??/.*"))
