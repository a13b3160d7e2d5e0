"""The content of correctly signed parts is untrusted as well: readers check padding, gzip members and tar headers."""

import gzip
import subprocess
import tarfile
import tracemalloc
import zlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support.bundles.sample_bundles import BUNDLE_KEY
from support.bundles.tar_streams import blocks_of, read_tar, tar_of, with_field
from thrave.bundle.errors import ContentError
from thrave.bundle.gzip_stream import FAST, STDLIB, inflate
from thrave.bundle.opener import decrypt
from thrave.bundle.tar_reader import image_runs
from thrave.bundle.tar_writer import TarMember

MIB = 1024 * 1024
LIBRARIES = pytest.mark.parametrize("library", [FAST, STDLIB], ids=["isal", "zlib"])


def encrypt(plain):
    encryptor = Cipher(algorithms.AES(BUNDLE_KEY.key), modes.CBC(BUNDLE_KEY.iv)).encryptor()
    return encryptor.update(plain) + encryptor.finalize()


def decrypt_all(*parts):
    return b"".join(decrypt(parts, BUNDLE_KEY))


class TestDecrypt:
    @pytest.mark.parametrize("size", range(33))
    def test_decrypt_returns_plaintext_of_any_length_and_split(self, size):
        plain = bytes(range(size))
        padding = 16 - size % 16
        ciphertext = encrypt(plain + bytes([padding]) * padding)
        for cut in (0, 1, 15, 16, 17, len(ciphertext)):
            assert decrypt_all(ciphertext[:cut], b"", ciphertext[cut:]) == plain

    @pytest.mark.parametrize(
        "end", [b"\x00" * 16, b"\x11" * 17, b"\x01\x02" * 8, b"\x03\x02\x03".rjust(16), b"\x10" * 15 + b"\x0f"]
    )
    def test_decrypt_rejects_wrong_padding(self, end):
        with pytest.raises(ContentError, match="padding"):
            decrypt_all(encrypt(end.rjust(32)))

    def test_decrypt_rejects_incomplete_block(self):
        with pytest.raises(ContentError, match="not a multiple"):
            decrypt_all(encrypt(b"\x10" * 16) + b"x")

    def test_decrypt_rejects_empty_input(self):
        with pytest.raises(ContentError):
            decrypt_all(b"", b"")


def inflate_all(data, library, piece_size=MIB):
    return b"".join(inflate((memoryview(data)[i : i + piece_size] for i in range(0, len(data), piece_size)), library))


PLAIN = b"".join(i.to_bytes(4, "big") for i in range(100_000))


@LIBRARIES
class TestInflate:
    @pytest.mark.parametrize("piece_size", [1, 7, 4096, MIB])
    def test_inflate_reads_all_header_fields_in_pieces_of_any_size(self, library, piece_size):
        plain = PLAIN[:5000]
        deflated = zlib.compress(plain, wbits=-15)
        trailer = zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
        extras = b"\x03\0abc" + b"name\0" + b"comment\0"
        header = b"\x1f\x8b\x08\x1c\x6b\xb8\x9a\x66\x02\xff"
        assert inflate_all(header + extras + deflated + trailer, library, piece_size) == plain

    def test_inflate_joins_consecutive_members(self, library):
        members = [gzip.compress(PLAIN[:1000]), gzip.compress(b""), gzip.compress(PLAIN, 1)]
        for piece_size in (1000, MIB):
            assert inflate_all(b"".join(members), library, piece_size) == PLAIN[:1000] + PLAIN

    @pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB, 4 * MIB - 300])
    def test_inflate_returns_all_bytes_of_large_member(self, library, size):
        for level in (0, 1, 9):
            data = gzip.compress(bytes(size), level)
            assert inflate_all(data, library) == bytes(size)
            assert inflate_all(data, library, 100) == bytes(size)

    @pytest.mark.parametrize("size", [MIB - 1, MIB, 2 * MIB])
    def test_inflate_accepts_trailer_split_across_pieces(self, library, size):
        data = memoryview(gzip.compress(bytes(size)))
        for cut in range(1, 40):
            assert b"".join(inflate([data[:-cut], data[-cut:]], library)) == bytes(size)

    def test_inflate_accepts_header_checksum_and_rejects_reserved_flags(self, library):
        data = gzip.compress(PLAIN)
        assert inflate_all(data[:3] + b"\x02" + data[4:10] + b"\0\0" + data[10:], library) == PLAIN
        with pytest.raises(ContentError, match="no gzip"):
            inflate_all(data[:3] + b"\x20" + data[4:], library)

    @pytest.mark.parametrize("cut", [1, 5, 9, 500, -1, -8, -9])
    def test_inflate_rejects_truncated_stream(self, library, cut):
        with pytest.raises(ContentError):
            inflate_all(gzip.compress(PLAIN)[:cut], library)

    @pytest.mark.parametrize("end", [b"\0", b"garbage that follows", b"\x1f\x8b", bytes(512)])
    def test_inflate_rejects_data_after_member(self, library, end):
        with pytest.raises(ContentError):
            inflate_all(gzip.compress(PLAIN) + end, library)

    @pytest.mark.parametrize("at", [0, 2, 12, 2000, -8, -1])
    def test_inflate_detects_changed_bit(self, library, at):
        data = bytearray(gzip.compress(PLAIN))
        data[at] ^= 0x04
        with pytest.raises(ContentError):
            inflate_all(bytes(data), library)

    def test_inflate_rejects_empty_input(self, library):
        with pytest.raises(ContentError):
            inflate_all(b"", library)

    def test_inflate_limits_memory_for_gzip_bomb(self, library):
        bomb = gzip.compress(bytes(64 * MIB))
        tracemalloc.start()
        try:
            pieces = inflate([memoryview(bomb)], library)
            assert sum(map(len, pieces)) == 64 * MIB
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


def sparse(size, extents, data=b""):
    header = b"".join(TarMember("disk", size, extents).header())
    return header + data + bytes(1024)


DISK = PLAIN[:100_000]


class TestTarReader:
    @pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("name", ["disk", "n" * 90, "dir/" * 40 + "disk"])
    @pytest.mark.parametrize("piece_size", [100, 512, MIB])
    def test_tar_reader_reads_all_formats_of_tarfile(self, tar_format, name, piece_size):
        if tar_format == tarfile.USTAR_FORMAT and len(name) > 100:
            name = "d" * 90 + "/disk"
        assert read_tar(tar_of(DISK, name=name, format=tar_format), len(DISK), piece_size) == DISK

    def test_tar_reader_uses_size_of_pax_record(self):
        records = b"20 path=some/disk.i\n" + b"15 size=100000\n"
        extended = bytearray(tar_of(records, type=b"x")[: 512 + 512])
        member = with_field(tar_of(DISK), 124, b"00000000000\0")
        assert read_tar(bytes(extended) + member, len(DISK)) == DISK

    @pytest.mark.parametrize("padding", [0, 512, 1024, 10240, 20480])
    def test_tar_reader_accepts_any_padding_at_end(self, padding):
        data = tar_of(DISK)[: 512 + 100_000 + 352]
        assert read_tar(data + bytes(padding), len(DISK)) == DISK

    def test_tar_reader_accepts_header_without_magic(self):
        data = with_field(with_field(tar_of(DISK), 257, bytes(8)), 156, b"\0")
        assert read_tar(data, len(DISK)) == DISK

    def test_tar_reader_reads_size_in_base_256(self):
        data = with_field(tar_of(DISK), 124, b"\x80" + len(DISK).to_bytes(11, "big"))
        assert read_tar(data, len(DISK)) == DISK

    @pytest.mark.parametrize("member_type", [b"1", b"2", b"3", b"5", b"6", b"D", b"M", b"V", b"A"])
    def test_tar_reader_rejects_other_member_types(self, member_type):
        with pytest.raises(ContentError, match="regular"):
            read_tar(tar_of(b"", type=member_type), 0)

    @pytest.mark.parametrize("size", [0, len(DISK) - 1, len(DISK) + 1, 1 << 62])
    def test_tar_reader_rejects_size_that_differs_from_manifest_before_any_data(self, size):
        with pytest.raises(ContentError, match="the manifest states"):
            next(image_runs([tar_of(DISK)], size))

    @pytest.mark.parametrize("more", [tar_of(b"second"), b"x" + bytes(1023), bytes(9216) + b"x" * 1024])
    def test_tar_reader_rejects_data_after_image(self, more):
        data = tar_of(DISK)[: 512 + 100_000 + 352]
        with pytest.raises(ContentError, match="data after the image"):
            read_tar(data + more, len(DISK))

    def test_tar_reader_rejects_too_many_zeros_after_image(self):
        with pytest.raises(ContentError, match="data after the image"):
            list(image_runs([tar_of(DISK), *[bytes(MIB)] * 3], len(DISK)))

    @pytest.mark.parametrize("end", [0, 100, 511, 512, 600, 100_511])
    def test_tar_reader_rejects_truncated_archive(self, end):
        with pytest.raises(ContentError):
            read_tar(tar_of(DISK)[:end], len(DISK))

    @pytest.mark.parametrize(
        ("start", "value"),
        [
            (124, b"-0000000001\0"),
            (124, b"99999999999\0"),
            (124, b"\xff" * 12),
            (124, b"\x80" + b"\xff" * 11),
            (124, b"0x10\0\0\0\0\0\0\0\0"),
        ],
    )
    def test_tar_reader_rejects_invalid_numbers(self, start, value):
        with pytest.raises(ContentError):
            read_tar(with_field(tar_of(DISK), start, value), len(DISK))

    def test_tar_reader_rejects_wrong_checksum(self):
        data = bytearray(tar_of(DISK))
        data[0] ^= 1
        with pytest.raises(ContentError, match="checksum"):
            read_tar(bytes(data), len(DISK))

    def test_tar_reader_limits_number_of_extended_headers(self):
        with pytest.raises(ContentError, match="too many"):
            read_tar(tar_of(b"", type=b"x")[:512] * 100, 0)

    def test_tar_reader_limits_size_of_extended_header(self):
        data = with_field(tar_of(b"", type=b"L"), 124, b"77777777777\0")
        with pytest.raises(ContentError, match="extended"):
            read_tar(data, 0)

    @pytest.mark.parametrize(
        "records",
        [
            b"x",
            b"99 size=1\n",
            b"0 size=1\n",
            b"4 size=1\n",
            b"-9 size=1\n",
            b"9 size=z\n",
            b"1\n" * 50,
            b"23 GNU.sparse.major=1\n",
        ],
    )
    def test_tar_reader_rejects_damaged_pax_records(self, records):
        with pytest.raises(ContentError, match="PAX"):
            read_tar(tar_of(records, type=b"x")[:1024] + tar_of(DISK), len(DISK))


SECTOR = b"s" * 512


class TestSparseMaps:
    @pytest.mark.parametrize("count", [0, 1, 3, 4, 24, 25, 46, 200])
    @pytest.mark.parametrize("piece_size", [100, MIB])
    def test_sparse_map_of_any_length_is_read(self, count, piece_size):
        extents = [(1024 * i, 512) for i in range(count)]
        image = read_tar(sparse(1024 * 1024, extents, SECTOR * count), 1024 * 1024, piece_size)
        assert image == (SECTOR + bytes(512)) * count + bytes(1024 * 1024 - 1024 * count)

    def test_sparse_archive_of_gnu_tar_is_read(self, tmp_path):
        (tmp_path / "disk").write_bytes(SECTOR + bytes(MIB) + SECTOR + bytes(1000) + b"end")
        command = ["tar", "-cS", "--hole-detection=raw", "disk"]
        tar = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
        disk = (tmp_path / "disk").read_bytes()
        assert read_tar(tar, len(disk)) == disk

    @pytest.mark.parametrize(
        "extents",
        [
            [(512, 512), (0, 512)],
            [(0, 1024), (512, 512)],
            [(0, 512), (0, 512)],
            [(0, 4096)],
            [(4096, 512)],
            [(1 << 62, 512)],
            [(0, 100), (1024, 512)],
        ],
        ids=["descending", "overlapping", "repeated", "too-long", "beyond-the-end", "far-beyond", "odd-in-the-middle"],
    )
    def test_wrong_sparse_map_is_rejected_before_any_data(self, extents):
        with pytest.raises(ContentError, match="map"):
            next(image_runs([sparse(2048, extents, SECTOR * 10)], 2048))

    def test_sparse_map_with_other_size_than_header_is_rejected(self):
        data = with_field(sparse(2048, [(0, 512)], SECTOR), 124, b"00000002000\0")
        with pytest.raises(ContentError, match="map has"):
            read_tar(data, 2048)

    def test_number_of_extents_in_sparse_map_is_limited(self, monkeypatch):
        monkeypatch.setattr("thrave.bundle.tar_reader.MAX_MAP_EXTENTS", 1000)
        header, *blocks = blocks_of(sparse(1 << 30, [(1024 * i, 512) for i in range(2000)]))
        with pytest.raises(ContentError, match="more than 1000"):
            list(image_runs([header, *blocks], 1 << 30))

    @pytest.mark.parametrize("count", [1, 16, 17])
    def test_number_of_empty_extents_in_sparse_map_is_limited(self, count):
        entry = b"%011o\0" % 512 + b"%011o\0" % 0
        chained = [(entry * min(21, count - 4)).ljust(512, b"\0")] if count > 4 else []
        header = sparse(2048, [(512, 0)] * min(count, 4))[:512]
        data = [with_field(header, 482, b"\1" if chained else b"\0"), *chained, bytes(1024)]
        if count <= 16:
            assert list(image_runs(data, 2048)) == []
        else:
            with pytest.raises(ContentError, match="or empty ones"):
                list(image_runs(data, 2048))

    def test_hole_of_exabytes_yields_no_data(self):
        size = 1 << 62
        assert list(image_runs([sparse(size, [(size - 512, 512)], SECTOR)], size)) == [(size - 512, SECTOR)]
