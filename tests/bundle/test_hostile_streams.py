"""What the parts hold may be hostile, too, and correctly signed: padding, gzip and tar are read with distrust."""

import gzip
import subprocess
import tarfile
import tracemalloc
import zlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support.bundles.sample_bundles import SECRETS
from support.bundles.tar_streams import blocks_of, read_tar, tar_of, with_field
from thrave.bundle.errors import ContentError
from thrave.bundle.gzip_stream import FAST, STDLIB, inflate
from thrave.bundle.opener import decrypt
from thrave.bundle.tar_reader import image_runs
from thrave.bundle.tar_writer import TarMember

MIB = 1024 * 1024
LIBRARIES = pytest.mark.parametrize("library", [FAST, STDLIB], ids=["isal", "zlib"])


def encrypted(plain):
    encryptor = Cipher(algorithms.AES(SECRETS.key), modes.CBC(SECRETS.iv)).encryptor()
    return encryptor.update(plain) + encryptor.finalize()


def decrypt_all(*parts):
    return b"".join(decrypt(parts, SECRETS))


class TestPadding:
    @pytest.mark.parametrize("size", range(33))
    def test_every_length_comes_back_from_any_cut(self, size):
        plain = bytes(range(size))
        padding = 16 - size % 16
        ciphertext = encrypted(plain + bytes([padding]) * padding)
        for cut in (0, 1, 15, 16, 17, len(ciphertext)):
            assert decrypt_all(ciphertext[:cut], b"", ciphertext[cut:]) == plain

    @pytest.mark.parametrize(
        "end", [b"\x00" * 16, b"\x11" * 17, b"\x01\x02" * 8, b"\x03\x02\x03".rjust(16), b"\x10" * 15 + b"\x0f"]
    )
    def test_a_wrong_one_is_refused(self, end):
        with pytest.raises(ContentError, match="padding"):
            decrypt_all(encrypted(end.rjust(32)))

    def test_half_a_block_is_refused(self):
        with pytest.raises(ContentError, match="not a multiple"):
            decrypt_all(encrypted(b"\x10" * 16) + b"x")

    def test_nothing_is_refused(self):
        with pytest.raises(ContentError):
            decrypt_all(b"", b"")


def inflate_all(data, library, bite=MIB):
    return b"".join(inflate((memoryview(data)[i : i + bite] for i in range(0, len(data), bite)), library))


def gzipped_by_program(*command, data):
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


PLAIN = b"".join(i.to_bytes(4, "big") for i in range(100_000))


@LIBRARIES
class TestGzip:
    @pytest.mark.parametrize("bite", [1, 7, 4096, MIB])
    def test_any_header_and_any_cut_is_read(self, library, bite):
        plain = PLAIN[:5000]
        deflated = zlib.compress(plain, wbits=-15)
        trailer = zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
        extras = b"\x03\0abc" + b"name\0" + b"comment\0"
        header = b"\x1f\x8b\x08\x1c\x6b\xb8\x9a\x66\x02\xff"
        assert inflate_all(header + extras + deflated + trailer, library, bite) == plain

    def test_members_follow_one_another(self, library):
        members = [gzip.compress(PLAIN[:1000]), gzip.compress(b""), gzip.compress(PLAIN, 1)]
        for bite in (1000, MIB):
            assert inflate_all(b"".join(members), library, bite) == PLAIN[:1000] + PLAIN

    @pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB, 4 * MIB - 300])
    def test_what_is_larger_than_one_piece_ends_with_its_last_byte(self, library, size):
        for level in (0, 1, 9):
            data = gzip.compress(bytes(size), level)
            assert inflate_all(data, library) == bytes(size)
            assert inflate_all(data, library, 100) == bytes(size)

    @pytest.mark.parametrize("size", [MIB - 1, MIB, 2 * MIB])
    def test_the_end_may_come_apart_while_there_is_no_room_for_what_comes_of_it(self, library, size):
        data = memoryview(gzip.compress(bytes(size)))
        for cut in range(1, 40):
            assert b"".join(inflate([data[:-cut], data[-cut:]], library)) == bytes(size)

    def test_a_header_may_have_a_checksum_but_no_flags_of_the_future(self, library):
        data = gzip.compress(PLAIN)
        assert inflate_all(data[:3] + b"\x02" + data[4:10] + b"\0\0" + data[10:], library) == PLAIN
        with pytest.raises(ContentError, match="no gzip"):
            inflate_all(data[:3] + b"\x20" + data[4:], library)

    @pytest.mark.parametrize("cut", [1, 5, 9, 500, -1, -8, -9])
    def test_one_that_ends_early_is_refused(self, library, cut):
        with pytest.raises(ContentError):
            inflate_all(gzip.compress(PLAIN)[:cut], library)

    @pytest.mark.parametrize("end", [b"\0", b"garbage that follows", b"\x1f\x8b", bytes(512)])
    def test_whatever_follows_is_refused(self, library, end):
        with pytest.raises(ContentError):
            inflate_all(gzip.compress(PLAIN) + end, library)

    @pytest.mark.parametrize("at", [0, 2, 12, 2000, -8, -1])
    def test_a_changed_bit_is_found(self, library, at):
        data = bytearray(gzip.compress(PLAIN))
        data[at] ^= 0x04
        with pytest.raises(ContentError):
            inflate_all(bytes(data), library)

    def test_nothing_is_no_gzip(self, library):
        with pytest.raises(ContentError):
            inflate_all(b"", library)

    def test_a_bomb_comes_in_small_pieces(self, library):
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


class TestTar:
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("name", ["disk", "n" * 90, "dir/" * 40 + "disk"])
    @pytest.mark.parametrize("bite", [100, 512, MIB])
    def test_all_of_pythons_formats_are_read(self, form, name, bite):
        if form == tarfile.USTAR_FORMAT and len(name) > 100:
            name = "d" * 90 + "/disk"
        assert read_tar(tar_of(DISK, name=name, format=form), len(DISK), bite) == DISK

    def test_a_size_in_a_pax_record_counts(self):
        records = b"20 path=some/disk.i\n" + b"15 size=100000\n"
        extended = bytearray(tar_of(records, type=b"x")[: 512 + 512])
        member = with_field(tar_of(DISK), 124, b"00000000000\0")
        assert read_tar(bytes(extended) + member, len(DISK)) == DISK

    @pytest.mark.parametrize("padding", [0, 512, 1024, 10240, 20480])
    def test_with_any_padding_at_the_end(self, padding):
        data = tar_of(DISK)[: 512 + 100_000 + 352]
        assert read_tar(data + bytes(padding), len(DISK)) == DISK

    def test_without_a_magic(self):
        data = with_field(with_field(tar_of(DISK), 257, bytes(8)), 156, b"\0")
        assert read_tar(data, len(DISK)) == DISK

    def test_a_dump_in_base_256(self):
        data = with_field(tar_of(DISK), 124, b"\x80" + len(DISK).to_bytes(11, "big"))
        assert read_tar(data, len(DISK)) == DISK

    @pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"6", b"D", b"M", b"V", b"A"])
    def test_what_is_no_regular_file_is_refused(self, kind):
        with pytest.raises(ContentError, match="regular"):
            read_tar(tar_of(b"", type=kind), 0)

    @pytest.mark.parametrize("size", [0, len(DISK) - 1, len(DISK) + 1, 1 << 62])
    def test_another_size_than_the_manifests_is_refused_before_any_data(self, size):
        with pytest.raises(ContentError, match="the manifest states"):
            next(image_runs([tar_of(DISK)], size))

    @pytest.mark.parametrize("more", [tar_of(b"second"), b"x" + bytes(1023), bytes(9216) + b"x" * 1024])
    def test_a_second_member_or_anything_else_that_follows_is_refused(self, more):
        data = tar_of(DISK)[: 512 + 100_000 + 352]
        with pytest.raises(ContentError, match="data after the image"):
            read_tar(data + more, len(DISK))

    def test_zeros_without_end_are_refused(self):
        with pytest.raises(ContentError, match="data after the image"):
            list(image_runs([tar_of(DISK), *[bytes(MIB)] * 3], len(DISK)))

    @pytest.mark.parametrize("end", [0, 100, 511, 512, 600, 100_511])
    def test_one_that_ends_early_is_refused(self, end):
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
    def test_absurd_numbers_are_refused(self, start, value):
        with pytest.raises(ContentError):
            read_tar(with_field(tar_of(DISK), start, value), len(DISK))

    def test_a_wrong_checksum_is_refused(self):
        data = bytearray(tar_of(DISK))
        data[0] ^= 1
        with pytest.raises(ContentError, match="checksum"):
            read_tar(bytes(data), len(DISK))

    def test_extended_headers_without_end_are_refused(self):
        with pytest.raises(ContentError, match="too many"):
            read_tar(tar_of(b"", type=b"x")[:512] * 100, 0)

    def test_an_extended_header_of_gigabytes_is_refused(self):
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
    def test_damaged_pax_records_are_refused(self, records):
        with pytest.raises(ContentError, match="PAX"):
            read_tar(tar_of(records, type=b"x")[:1024] + tar_of(DISK), len(DISK))


SECTOR = b"s" * 512


class TestSparse:
    @pytest.mark.parametrize("count", [0, 1, 3, 4, 24, 25, 46, 200])
    @pytest.mark.parametrize("bite", [100, MIB])
    def test_maps_of_any_length_are_read(self, count, bite):
        extents = [(1024 * i, 512) for i in range(count)]
        image = read_tar(sparse(1024 * 1024, extents, SECTOR * count), 1024 * 1024, bite)
        assert image == (SECTOR + bytes(512)) * count + bytes(1024 * 1024 - 1024 * count)

    def test_what_gnu_tar_finds_by_reading_is_read(self, tmp_path):
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
    def test_a_map_that_is_wrong_is_refused_before_any_data(self, extents):
        with pytest.raises(ContentError, match="map"):
            next(image_runs([sparse(2048, extents, SECTOR * 10)], 2048))

    def test_a_map_that_speaks_of_other_data_than_the_header_is_refused(self):
        data = with_field(sparse(2048, [(0, 512)], SECTOR), 124, b"00000002000\0")
        with pytest.raises(ContentError, match="map has"):
            read_tar(data, 2048)

    def test_a_map_without_end_is_refused_within_bounds(self, monkeypatch):
        monkeypatch.setattr("thrave.bundle.tar_reader.MAX_MAP_EXTENTS", 1000)
        header, *blocks = blocks_of(sparse(1 << 30, [(1024 * i, 512) for i in range(2000)]))
        with pytest.raises(ContentError, match="more than 1000"):
            list(image_runs([header, *blocks], 1 << 30))

    @pytest.mark.parametrize("count", [1, 16, 17])
    def test_a_few_empty_extents_are_read_and_many_are_refused(self, count):
        entry = b"%011o\0" % 512 + b"%011o\0" % 0
        chained = [(entry * min(21, count - 4)).ljust(512, b"\0")] if count > 4 else []
        header = sparse(2048, [(512, 0)] * min(count, 4))[:512]
        data = [with_field(header, 482, b"\1" if chained else b"\0"), *chained, bytes(1024)]
        if count <= 16:
            assert list(image_runs(data, 2048)) == []
        else:
            with pytest.raises(ContentError, match="or empty ones"):
                list(image_runs(data, 2048))

    def test_an_image_of_exabytes_of_hole_costs_nothing(self):
        size = 1 << 62
        assert list(image_runs([sparse(size, [(size - 512, 512)], SECTOR)], size)) == [(size - 512, SECTOR)]
