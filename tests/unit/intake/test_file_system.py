"""Which file systems a journal may lie on, and how it is kept on one that is shared by hosts."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Notice
from sidestep.worker.errors import JournalError
from sidestep.worker.intake import journal as journal_module
from sidestep.worker.intake.decisions import Closure
from sidestep.worker.intake.file_system import (
    NETWORK_TYPES,
    mount_of,
    mounts_of,
    network_file_system,
    network_name,
    statfs_type,
)
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.records import StepClosing
from sidestep.worker.sinks.outbox_reader import OutboxReader

ROOT = Path(__file__).resolve().parents[3]
MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:26 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw
45 27 0:41 / /home rw,relatime shared:22 - nfs4 filer:/export/home rw,vers=4.2,rsize=1048576,proto=tcp
46 45 8:17 / /home/me/local\040disk rw,relatime - xfs /dev/sdb1 rw
47 27 0:42 / /scratch rw,noatime - lustre 10.0.0.1@tcp:/fsx rw,flock,lazystatfs
48 27 0:43 / /data rw,relatime - cifs //server/share rw,vers=3.1.1
49 27 0:44 / /mnt/ssh rw,nosuid,nodev - fuse.sshfs me@host:/srv rw,user_id=1000
50 27 8:33 / /mnt/ntfs rw,relatime - fuseblk /dev/sdc1 rw
51 27 0:45 / /mnt/host rw,sync,dirsync,relatime - 9p hostshare rw,trans=virtio
52 27 0:46 / /gpfs rw,relatime - gpfs gpfs0 rw
53 27 0:47 / /mnt/root rw,relatime - fuse.fuse-overlayfs fuse-overlayfs rw
54 27 0:48 / /over rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c
55 27 0:49 / /beegfs rw,relatime - beegfs beegfs_nodev rw
56 27 0:50 / /ceph rw,relatime - ceph 10.0.0.2:6789:/ rw,name=admin
60 54 8:49 / /over rw,relatime - ext4 /dev/sdd1 rw
a line that is none
""".strip().splitlines()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", ""),
        ("/srv/journal", ""),
        ("/dev/shm/journal", ""),  # noqa: S108
        ("/home/me/journal", "nfs4"),
        ("/home/me/local disk/journal", ""),
        ("/homes/journal", ""),
        ("/scratch/run/journal", "lustre"),
        ("/data", "cifs"),
        ("/mnt/ssh/journal", "fuse.sshfs"),
        ("/mnt/ntfs/journal", ""),
        ("/mnt/host/journal", "9p"),
        ("/gpfs/journal", "gpfs"),
        ("/mnt/root/journal", ""),
        ("/beegfs/journal", "beegfs"),
        ("/ceph/journal", "ceph"),
        ("/over/journal", ""),
    ],
)
def test_a_path_is_judged_by_the_mount_it_lies_on(path: str, expected: str) -> None:
    mount = mount_of(path, mounts_of(MOUNTINFO))
    assert mount is not None
    assert network_name(0, mount.type_name) == expected


def test_a_later_mount_hides_an_earlier_one_at_the_same_place() -> None:
    mount = mount_of("/over/journal", mounts_of(MOUNTINFO))
    assert mount is not None
    assert mount.type_name == "ext4"


@pytest.mark.parametrize(("number", "name"), sorted(NETWORK_TYPES.items()))
def test_a_number_alone_is_enough(number: int, name: str) -> None:
    assert network_name(number, "") == name


@pytest.mark.parametrize("number", [0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x2FC12FC1])
def test_ext4_xfs_btrfs_tmpfs_overlay_and_zfs_are_local(number: int) -> None:
    assert network_name(number, "") == ""


def test_this_kernel_is_asked(tmp_path: Path) -> None:
    assert statfs_type(Path("/proc")) == 0x9FA0
    assert network_file_system(tmp_path / "not" / "yet" / "there") == ""
    with pytest.raises(OSError, match="No such file"):
        statfs_type(tmp_path / "gone")


def test_a_journal_on_a_real_fuse_mount_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    try:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.tiny_fuse", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )  # fmt: skip
        assert server.stdout is not None
        said = server.stdout.readline()
        if said != "ready\n":
            server.wait(10)
            pytest.skip(f"nothing can be mounted here: {said.splitlines()[-1:]}")
        assert statfs_type(folder) == 0x65735546
        assert network_file_system(folder / "journal") == "fuse.tiny"
        with pytest.raises(
            JournalError, match=r"lies on a network file system \(fuse\.tiny\).*--journal-on-network-fs"
        ):
            Journal(folder / "journal")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, timeout=10, capture_output=True)
        server.kill()
        server.wait(10)
        if server.stdout is not None:
            server.stdout.close()


# ------------------------------------------------------------------------------------ kept on a network file system


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for one on NFS; the disk below is this machine's own."""
    monkeypatch.setattr(journal_module, "network_file_system", lambda _: "nfs4")
    return tmp_path / "journal"


def row(sequence: int, arrival: int) -> Row:
    envelope = Envelope(run_id="run", incarnation="inc", rank=0, sequence=sequence)
    return Row("inc", 0, sequence, 13, -1, 1, 0, 1.5, arrival, encode(envelope, Notice(text="y" * 8_000)))


def row_closure(step: int) -> Closure:
    made = StepClosing(run_id="run", attempt=0, step=step, reason="complete", incarnation="inc", parts=((0, step + 1),))
    return Closure(closing=made, entries=(entry("row", {"train/step": step}),), last_arrival=step)


def test_without_the_option_nothing_is_made_there(shared: Path) -> None:
    with pytest.raises(JournalError, match=r"network file system \(nfs4\)"):
        Journal(shared)
    assert not shared.exists()


def test_with_the_option_there_is_a_rollback_journal_and_all_connections_get_on(shared: Path) -> None:
    journal = Journal(shared, segment_bytes=1 << 16, on_network_fs=True)
    writer = journal.segments._writer
    assert writer is not None
    for connection in (journal.index._connection, writer):
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    reader = OutboxReader(shared, "run")
    for number in range(30):
        journal.segments.append([row(number + 1, number)])
        journal.index.write("run", [row_closure(number)], b"state")
        assert reader.newest_position() == number
        assert [each.sequence for each in journal.segments.since(number, 10)] == [number + 1]
    reader.close()
    assert not list(shared.glob("*-wal"))
    journal.close()
    again = Journal(shared, on_network_fs=True)
    assert again.segments.committed("inc", 0).ranges().tolist() == [[1, 30]]
    again.close()


def test_a_journal_moves_from_a_local_disk_to_a_shared_one_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at, (network, mode) in enumerate([("", "wal"), ("nfs4", "truncate"), ("", "wal")]):
        monkeypatch.setattr(journal_module, "network_file_system", lambda _, network=network: network)
        journal = Journal(tmp_path / "journal", on_network_fs=True)
        assert journal.index._connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
        journal.segments.append([row(at + 1, at)])
        assert len(journal.segments.since(0, 10)) == at + 1
        journal.close()


def test_why_the_lock_is_not_exclusive_there_it_would_keep_the_sinks_out(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode=TRUNCATE")
        writer.execute("PRAGMA locking_mode=EXCLUSIVE")
        writer.execute("CREATE TABLE outbox(position)")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.1)) as reader:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                reader.execute("SELECT * FROM outbox")
            writer.execute("PRAGMA locking_mode=NORMAL")
            writer.execute("SELECT * FROM outbox").fetchall()
            assert reader.execute("SELECT * FROM outbox").fetchall() == []
