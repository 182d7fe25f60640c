"""`data verify` finds every deviation from the format, names each with its file, and neither extracts nor runs anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.chunk_index import CRC32, OFFSET, PIECES, SPANS, TOKEN_START, checksum, npy_bytes, payloads
from data.manifest import TOTALS, read_manifest
from data.shard_writer import ShardWriter, member_header
from data.verify import verify_set
from tests.data.test_shards import with_spans

WriteSet = Callable[..., Path]


@pytest.fixture
def folder(write_set: WriteSet, documents: list[np.ndarray]) -> Path:
    spans, metas = with_spans(documents)
    for rows in spans:
        rows[:, 2] %= 2  # padding is only in sets of rows
    return write_set(documents, spans=spans, metas=metas)


def sign(folder: Path, checksums: bool = True) -> None:
    """Make hashes, sizes and checksums agree with what is on the disk, so that nothing else than the damage can be found."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    parts, first = [], 0
    for shard in manifest["shards"]:
        content, sidecar = (folder / shard["file"]).read_bytes(), folder / (shard["file"][:-4] + ".index.npy")
        index = np.load(sidecar)
        ends = np.append(index[TOKEN_START, 1:], shard["tokens"])
        for column, tokens in zip(index.T, ends - index[TOKEN_START]) if checksums else ():
            at = payloads(int(column[OFFSET]), int(tokens), int(column[PIECES]), int(column[SPANS]), manifest["dtype"])
            item = 2 if manifest["dtype"] == "uint16" else 4
            sizes = ((at.tokens, tokens * item), (at.lengths, column[PIECES] * 4), (at.spans, column[SPANS] * 12))
            column[CRC32] = checksum(*(content[start : start + int(size)] for start, size in sizes))
        sidecar.write_bytes(npy_bytes(index))
        shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        shard.update(index_sha256=hashlib.sha256(sidecar.read_bytes()).hexdigest())
        index[TOKEN_START] += first
        first += shard["tokens"]
        parts.append(index)
    whole = npy_bytes(np.ascontiguousarray(np.concatenate(parts, axis=1)))
    (folder / "index.npy").write_bytes(whole)
    manifest.update(index_sha256=hashlib.sha256(whole).hexdigest())
    manifest.update({total: sum(shard[total] for shard in manifest["shards"]) for total in TOTALS})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_shard_1(folder: Path, **amounts: int) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, amount in amounts.items():
        manifest["shards"][1][name] += amount
        manifest[name] += amount
    (folder / "manifest.json").write_text(json.dumps(manifest))


def faults(folder: Path, processes: int = 1) -> list[str]:
    return verify_set(str(folder), processes=processes).faults


def test_a_good_set_has_no_faults_with_any_number_of_processes(folder: Path, write_set: WriteSet, documents) -> None:
    report = verify_set(str(folder), processes=2)
    manifest = read_manifest(folder)
    assert report.faults == [] and (report.tokens, report.documents) == (manifest.tokens, manifest.documents)
    assert report.shards == len(manifest.shards) > 3 and report.bytes == sum(shard.bytes for shard in manifest.shards)
    assert faults(write_set(documents, dtype="uint32", folder="wide")) == []
    before = folder / "manifest.json"
    signed = before.read_bytes()
    sign(folder)
    assert json.loads(before.read_bytes()) == json.loads(signed)  # the helper changes nothing that is good


def chunk_at(folder: Path, chunk: int = 1) -> tuple[int, int, int, int]:
    """Of a chunk of shard 1 that has spans: where tokens, lengths and spans begin, and its number of tokens."""
    index = np.load(folder / "shard-000001.index.npy")
    at = [i for i in range(index.shape[1] - 1) if index[SPANS, i] > 1 and index[PIECES, i] > 2][chunk - 1]
    tokens = int(index[TOKEN_START, at + 1] - index[TOKEN_START, at])
    places = payloads(int(index[OFFSET, at]), tokens, int(index[PIECES, at]), int(index[SPANS, at]), "uint16")
    return places.tokens, places.lengths, places.spans, tokens


def numbers(content: bytearray, at: int, values: list[int], dtype: str) -> None:
    raw = np.array(values, dtype).tobytes()
    content[at : at + len(raw)] = raw


def old(content: bytearray, at: int, count: int, dtype: str) -> list[int]:
    return np.frombuffer(bytes(content), dtype, count, at).tolist()


def longer_first_length(c: bytearray, tokens: int, lengths: int, spans: int, n: int) -> None:
    numbers(c, lengths, [old(c, lengths, 1, "<i4")[0] + 1], "<i4")


def border_moved(c: bytearray, tokens: int, lengths: int, spans: int, n: int) -> None:
    first, second = old(c, lengths, 2, "<i4")
    numbers(c, lengths, [first - 1, second + 1] if first > 1 else [first + 1, second - 1], "<i4")


def swapped_spans(c: bytearray, tokens: int, lengths: int, spans: int, n: int) -> None:
    rows = old(c, spans, 6, "<i4")
    numbers(c, spans, rows[3:] + rows[:3], "<i4")


def npy_header(count: int) -> bytes:
    """The header of an array of `count` int32, which nobody has the memory for."""
    usual = npy_bytes(np.zeros(2, "<i4"))[:128]
    return usual[:10] + usual[10:].rstrip().replace(b"(2,)", b"(%d,)" % count).ljust(117) + b"\n"


NUMBERS = {
    "one id": (
        lambda c, t, le, s, n: numbers(c, t, [old(c, t, 1, "<u2")[0] ^ 1], "<u2"),
        False,
        ["do not have the checksum"],
    ),
    "id outside": (
        lambda c, t, le, s, n: numbers(c, t, [65535], "<u2"),
        True,
        [r"tok.npy: 1 ids outside the vocabulary of 300"],
    ),
    "lengths": (longer_first_length, True, ["lens.npy: the lengths do not sum to the"]),
    "border": (border_moved, True, ["documents end in EOS (1), the index counts"]),
    "span outside": (lambda c, t, le, s, n: numbers(c, s, [n], "<i4"), True, ["a span that is empty or outside its"]),
    "span empty": (lambda c, t, le, s, n: numbers(c, s + 4, [0], "<i4"), True, ["a span that is empty or outside its"]),
    "span order": (swapped_spans, True, ["spans out of order or over each other"]),
    "span kind": (lambda c, t, le, s, n: numbers(c, s + 8, [7], "<i4"), True, ["a span of an unknown kind"]),
    "padding": (lambda c, t, le, s, n: numbers(c, s + 8, [2], "<i4"), True, ["padding in a set without rows"]),
    "npy of floats": (lambda c, t, le, s, n: c.__setitem__(slice(t - 108, t - 102), b"': '<f"), True, ["tok.npy: "]),
    "npy of objects": (
        lambda c, t, le, s, n: c.__setitem__(
            slice(t - 128, t), npy_bytes(np.zeros(n, "<u2"))[:128].replace(b"'<u2'", b"'|O' ")
        ),
        True,
        ["tok.npy: an npy header of pickled objects"],
    ),
    "npy shape": (
        lambda c, t, le, s, n: c.__setitem__(slice(le - 128, le), npy_header(2**59)),
        True,
        ["lens.npy: <i4 [576460752303423488], it should be <i4 ["],
    ),
    "nothing": (lambda c, t, le, s, n: None, True, []),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_wrong_number_is_found_by_its_own_check(folder: Path, kind: str) -> None:
    """The hashes agree with the damage, and the checksum too, so each check stands alone."""
    change, checksums, wanted = NUMBERS[kind]
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    size = len(content)
    change(content, *chunk_at(folder))
    assert len(content) == size
    path.write_bytes(content)
    sign(folder, checksums)
    found = faults(folder)
    assert all(any(want in fault for fault in found) for want in wanted) and bool(found) == bool(wanted), found
    assert all(fault.startswith(f"{path}: ") and "\n" not in fault for fault in found)
    in_chunk = [fault for fault in found if "sample 000001-" in fault or " 000001-" in fault]
    assert len(in_chunk) == len(wanted), found


def with_member(header: bytes, payload: bytes = b"") -> Callable[[bytes], bytes]:
    """A member more at the end of the archive, where it moves no other."""

    def add(content: bytes) -> bytes:
        end = len(content.rstrip(b"\0"))
        end += -end % 512
        return content[:end] + header + payload + bytes(-len(payload) % 512) + bytes(1024)

    return add


def special(name: str, kind: bytes, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def pax(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.pax_headers = {"comment": "x"}
    return info.tobuf(format=tarfile.PAX_FORMAT)


def renamed(old_suffix: str, new_suffix: str) -> Callable[[bytes], bytes]:
    """The first member with this suffix gets another name, the header's checksum included."""

    def change(content: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith(old_suffix))
        header = member_header(member.name.replace(old_suffix, new_suffix), member.size)
        return content[: member.offset] + header + content[member.offset + 512 :]

    return change


def swapped(content: bytes) -> bytes:
    """The first sample with lens.npy before tok.npy."""
    for old_suffix, new_suffix in (("tok.npy", "x.npy"), ("lens.npy", "tok.npy"), ("x.npy", "lens.npy")):
        content = renamed(old_suffix, new_suffix)(content)
    return content


def header_edit(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + new + content[at + len(new) :]


GNU_LONG = tarfile.TarInfo("a" * 150).tobuf(format=tarfile.GNU_FORMAT)
TAR_FAULTS = {
    "path upwards": (
        with_member(member_header("../../outside.txt", 3), b"out"),
        "'../../outside.txt' is not a plain name",
    ),
    "absolute path": (with_member(member_header("/tmp/outside", 3), b"out"), "'/tmp/outside' is not a plain name"),
    "folder part": (with_member(member_header("a/b.tok.npy", 3), b"out"), "'a/b.tok.npy' is not a plain name"),
    "symbolic link": (
        with_member(special("x.tok.npy", tarfile.SYMTYPE, "/etc/passwd")),
        "'x.tok.npy' is a symbolic link",
    ),
    "hard link": (with_member(special("x.tok.npy", tarfile.LNKTYPE, "y")), "'x.tok.npy' is a hard link"),
    "device": (with_member(special("x.tok.npy", tarfile.CHRTYPE)), "'x.tok.npy' is a character device"),
    "pipe": (with_member(special("x.tok.npy", tarfile.FIFOTYPE)), "'x.tok.npy' is a named pipe"),
    "folder": (with_member(special("x", tarfile.DIRTYPE)), "is a folder"),
    "pax": (with_member(pax("x.tok.npy")), "is a pax extended header"),
    "gnu": (with_member(GNU_LONG), "is a GNU long-name header"),
    "unknown type": (with_member(special("x.tok.npy", b"?")), "is a member of unknown type"),
    "twice": (with_member(member_header("000001-000000.tok.npy", 3), b"out"), "'000001-000000.tok.npy' is there twice"),
    "a sample more": (with_member(member_header("x.tok.npy", 3), b"out"), "sample x holds tok.npy; it must be"),
    "not in the index": (
        with_member(member_header("x.tok.npy", 3), b"out"),
        "sample x is not where the index has a chunk",
    ),
    "wrong order": (swapped, "holds lens.npy, tok.npy"),
    "no lengths": (renamed("lens.npy", "spans.npy"), "it must be tok.npy, lens.npy and perhaps spans.npy, meta.json"),
    "other suffix": (renamed("lens.npy", "cls"), "holds tok.npy, cls"),
    "member missing": (renamed("lens.npy", "cls"), "lens.npy is missing"),
    "broken header": (header_edit(148, b"9"), "byte 0: no tar header (its checksum is wrong)"),
    "no plain size": (header_edit(124, b"\x80" + bytes(10) + b"\x07"), "byte 0: no tar header"),
    "no end": (
        lambda content: content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512),
        "without its two empty blocks",
    ),
    "behind the end": (lambda content: content[:-1] + b"x", "something behind the end of the archive"),
    "cut": (lambda content: content[:700], "claims"),
}


@pytest.mark.parametrize("kind", TAR_FAULTS)
def test_everything_in_a_tar_that_does_not_belong_there_is_named_and_never_extracted(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    change, wanted = TAR_FAULTS[kind]
    path = folder / "shard-000001.tar"
    before = {str(p) for p in tmp_path.rglob("*")}
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    content = path.read_bytes()
    if kind != "cut":  # else the counts of the manifest could not be true
        manifest["shards"][1].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = faults(folder)
    assert any(wanted in fault for fault in found), found
    assert all(fault.startswith(f"{path}: ") for fault in found) and (
        kind == "cut" or not any("sha256" in f for f in found)
    )
    assert {str(p) for p in tmp_path.rglob("*")} == before and not Path("/tmp/outside").exists()


def test_a_pickle_in_a_tar_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    path = folder / "shard-000001.tar"
    content = with_member(member_header("x.tok.npy", len(buffer.getvalue())), buffer.getvalue())(path.read_bytes())
    path.write_bytes(content)
    assert len(faults(folder)) > 1 and not (tmp_path / "ran").exists()


def test_all_faults_of_a_set_are_listed_not_only_the_first(folder: Path) -> None:
    (folder / "shard-000000.index.npy").unlink()
    sidecar = folder / "shard-000001.index.npy"
    sidecar.write_bytes(sidecar.read_bytes()[:-8] + bytes(8))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "shard-000002.tar").unlink()
    os.truncate(folder / "shard-000003.tar", 0)
    content = bytearray((folder / "shard-000004.tar").read_bytes())
    content[700] ^= 1
    (folder / "shard-000004.tar").write_bytes(content)
    wanted = [
        "tokenizer.json: differs from the tokenizer",
        "shard-000000.index.npy: cannot be read (No such file",
        "shard-000001.index.npy: its sha256 is not the manifest's",
        "shard-000002.tar: cannot be read (No such file",
        "shard-000003.tar: 0 bytes, the manifest says",
        "shard-000003.tar: its sha256 is not",
        "shard-000003.tar: byte 0: the archive ends without",
        "shard-000003.tar: byte 640: the index has a chunk here, the archive has none",
        "shard-000004.tar: its sha256 is not",
        "shard-000004.tar: sample 000004-000000: its numbers do not have the checksum of the index",
    ]
    for processes in (1, 3):
        found = faults(folder, processes)
        assert [want for want in wanted if not any(want in fault for fault in found)] == []


def test_counts_of_the_manifest_are_counted_again(folder: Path) -> None:
    for name, message in (
        ("padding_tokens", "padding_tokens, the manifest says"),
        ("truncated_documents", "documents end in EOS, the manifest counts"),
    ):
        good = (folder / "manifest.json").read_bytes()
        change_shard_1(folder, **{name: 1})
        assert any("shard-000001.tar" in fault and message in fault for fault in faults(folder))
        (folder / "manifest.json").write_bytes(good)


def test_an_index_that_differs_from_its_sidecars_or_cannot_be_used_is_found(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index[0, 1] += 1  # still ascending: only the sidecar and the chunk itself can tell
    content = npy_bytes(index)
    (folder / "index.npy").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest.update(index_sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = faults(folder)
    assert any(
        "shard-000000.index.npy: not the same as this shard's part of the set's index" in fault for fault in found
    )
    (folder / "index.npy").write_bytes(b"junk")
    found = faults(folder)
    assert any("index.npy: so no chunk is looked into" in fault for fault in found) and len(found) == 3


def test_rows_and_their_padding_are_checked(tmp_path: Path, tokenizer, write_set: WriteSet, documents) -> None:
    folder = write_set([d for d in documents if len(d) <= 40])
    for path in folder.glob("shard*"):
        path.unlink()
    writer = ShardWriter(folder, dtype="uint16", chunk_tokens=50, shard_tokens=200, row_tokens=40, pad_id=1)
    for document in documents:
        if len(document) <= 40:
            writer.add_document(document, 3 * len(document))
    shards = writer.close()
    from dataclasses import asdict

    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest.update(row_tokens=40, shards=[asdict(shard) for shard in shards])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sign(folder)
    manifest = read_manifest(folder)
    assert manifest.padding_tokens > 20 and faults(folder) == []
    record = json.loads((folder / "manifest.json").read_bytes())
    record["row_tokens"] = 20
    (folder / "manifest.json").write_text(json.dumps(record))
    assert any("pieces cross the end of a row of 20 tokens" in fault for fault in faults(folder))
    record["row_tokens"], record["special"]["pad"] = 40, 5
    (folder / "manifest.json").write_text(json.dumps(record))
    found = faults(folder)
    assert found and all("padding with other ids than 5" in fault for fault in found)


def test_unreadable_is_a_fault_not_a_crash(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.unlink()
    path.mkdir()
    assert any("shard-000001.tar: cannot be read (Is a directory)" in fault for fault in faults(folder))
    assert stat.S_ISDIR(path.stat().st_mode)
