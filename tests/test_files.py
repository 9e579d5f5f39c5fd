"""Files are whole or not there, and client ids can name folders."""

import json
import os

import pytest
from safetensors.torch import load_file
from test_store import assert_identical, make_tensors

from hf_fedsa.files import file_sha256, validate_client_ids, write_json, write_safetensors, write_text


class TestAtomicFiles:
    WRITERS = {
        "text": lambda path: write_text(path, "new"),
        "json": lambda path: write_json(path, {"new": 1}),
        "safetensors": lambda path: write_safetensors(path, make_tensors()),
    }
    all_writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)

    @pytest.fixture
    def target(self, tmp_path):
        path = tmp_path / "folder" / "file"
        path.parent.mkdir()
        path.write_bytes(b"old")
        return path

    @all_writers
    def test_the_new_file_takes_the_place_of_the_old(self, target, write):
        write(target)
        assert b"old" not in target.read_bytes()
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    @all_writers
    def test_a_reader_sees_the_old_file_until_the_new_is_whole(self, target, write, monkeypatch):
        seen = []
        replace = os.replace

        def look(source, destination):
            seen.append((target.read_bytes(), os.path.getsize(source) > 0, os.path.dirname(source)))
            replace(source, destination)

        monkeypatch.setattr(os, "replace", look)
        write(target)
        # A rename is atomic only within a file system, so the temporary file stands beside its target.
        assert seen == [(b"old", True, str(target.parent))]

    @all_writers
    @pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
    def test_a_failing_write_leaves_the_old_file_alone(self, target, write, step, monkeypatch):
        def fail(*args):
            raise OSError("Input/output error")

        monkeypatch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output error"):
            write(target)
        assert target.read_bytes() == b"old"
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_an_interrupt_leaves_no_temporary_file(self, target, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_text(target, "new")
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_text_that_cannot_be_encoded_leaves_the_old_file_alone(self, target):
        with pytest.raises(UnicodeEncodeError):
            write_text(target, "new \ud800")
        assert target.read_bytes() == b"old"
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_a_value_that_is_no_json_leaves_the_old_file_alone(self, target):
        with pytest.raises(TypeError):
            write_json(target, {"a": object()})
        assert target.read_bytes() == b"old"

    @all_writers
    def test_folders_are_made(self, target, write):
        path = target.parent / "fresh"
        write(path)
        assert path.is_file()

    def test_deep_folders_are_made(self, tmp_path):
        write_text(tmp_path / "a" / "b" / "file", "x")
        assert (tmp_path / "a" / "b" / "file").read_text() == "x"

    @pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
    @all_writers
    def test_others_may_read_the_file_as_the_umask_says(self, target, write):
        previous = os.umask(0o027)
        try:
            write(target)
            assert target.stat().st_mode & 0o777 == 0o640
            assert os.umask(0o027) == 0o027
        finally:
            os.umask(previous)

    def test_json_reads_back_and_is_sorted(self, tmp_path):
        write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": {"ü": None}})
        text = (tmp_path / "a.json").read_text(encoding="utf-8")
        assert json.loads(text) == {"b": [1, 2.5], "a": {"ü": None}}
        assert text.index('"a"') < text.index('"b"')

    def test_safetensors_read_back(self, tmp_path):
        write_safetensors(tmp_path / "a.safetensors", make_tensors())
        assert_identical(load_file(tmp_path / "a.safetensors"), make_tensors())

    def test_the_digest_of_a_file_is_that_of_its_bytes(self, tmp_path):
        (tmp_path / "a").write_bytes(b"abc")
        assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        (tmp_path / "a").write_bytes(b"a" * 1_000_000)
        assert file_sha256(tmp_path / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


class TestClientIds:
    def test_ordinary_ids_pass(self):
        validate_client_ids(["client_0", "client_10", "Hospital-A", "v1.2", "0", "x" * 96, "a..b"])

    @pytest.mark.parametrize(
        "client_id",
        [
            "",
            " ",
            "a b",
            ".",
            "..",
            "../x",
            "..\\x",
            ".hidden",
            "a/b",
            "/a",
            "a\\b",
            "C:a",
            "-a",
            "_a",
            "a\n",
            "a\0",
            "a*",
            "~a",
            "x" * 97,
            "klinik_münchen",
            "客户",
            "١",
        ],
    )
    def test_an_id_that_cannot_name_a_folder_is_refused(self, client_id):
        with pytest.raises(ValueError, match="cannot name a folder. Use up to 96 letters") as error:
            validate_client_ids(["client_0", client_id])
        assert repr(client_id) in str(error.value)

    @pytest.mark.parametrize("client_id", [0, None, b"a", ("a",)])
    def test_an_id_must_be_text(self, client_id):
        with pytest.raises(TypeError, match=f"must be strings, got .* of type {type(client_id).__name__}"):
            validate_client_ids(["client_0", client_id])

    def test_ids_may_not_differ_in_case_only(self):
        with pytest.raises(ValueError, match="'Client_0' and 'client_0' differ in case only"):
            validate_client_ids(["Client_0", "client_1", "client_0"])
