"""Artifacts: whole or not at all, one writer at a time, digests of content."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from drift import artifacts
from drift.errors import InputError


class Broken(Exception):
    """What a block raises in the middle of its work."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def break_while_writing(writer, path: Path, error: type[BaseException]) -> None:
    """Start to write `path`, then raise."""
    with writer(path) as temporary:
        (temporary / "new" if temporary.is_dir() else temporary).write_text("half of the n")
        raise error


def test_a_file_appears_with_its_folder_once_its_block_is_through(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with artifacts.atomic_file(path) as temporary:
        temporary.write_text("content")
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
        assert temporary.suffix == path.suffix
        assert not path.exists()
    assert path.read_text() == "content"
    assert names(path.parent) == {"file.txt"}


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, SystemExit])
def test_a_file_stays_as_it_was_when_its_block_raises(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error):
        break_while_writing(artifacts.atomic_file, path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


def test_a_file_that_was_not_there_stays_away_when_its_block_raises(tmp_path):
    with pytest.raises(Broken):
        break_while_writing(artifacts.atomic_file, tmp_path / "file.txt", Broken)
    assert names(tmp_path) == set()


def test_a_file_is_replaced_and_never_missing_meanwhile(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with artifacts.atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_appears_whole_once_its_block_is_through(tmp_path):
    path = tmp_path / "deep" / "folder"
    with artifacts.atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b").write_text("2")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert (path / "inner" / "b").read_text() == "2"
    assert names(path.parent) == {"folder"}


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, SystemExit])
def test_a_folder_stays_as_it_was_when_its_block_raises(tmp_path, error):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(error):
        break_while_writing(artifacts.atomic_folder, path, error)
    assert names(path) == {"old"}
    assert (path / "old").read_text() == "old"
    assert names(tmp_path) == {"folder"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with artifacts.atomic_folder(path) as temporary:
        (temporary / "new").write_text("new")
        assert names(path) == {"old"}
    assert names(path) == {"new"}
    assert names(tmp_path) == {"folder"}


def test_a_replaced_folder_can_be_read_by_others(tmp_path):
    with artifacts.atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, small_files):
    path = tmp_path / "file.json"
    artifacts.write_json(path, {"old": True})
    with small_files(1000), pytest.raises(OSError, match="File too large"):
        artifacts.write_json(path, {"long": "x" * 100_000})
    assert json.loads(path.read_text()) == {"old": True}
    assert names(tmp_path) == {"file.json"}


# --- One writer ---------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from drift.artifacts import atomic_folder, exclusive
with exclusive(sys.argv[1]), atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("written")
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process in the middle of writing the folder ``tmp_path / "output"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "output")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_with_the_name_of_the_first_until_that_is_killed(tmp_path, holder):
    output = tmp_path / "output"
    # Being refused must not free the lock: the second refusal is like the first.
    for _ in range(2):
        with pytest.raises(InputError) as caught, artifacts.exclusive(output):
            pass
        message = str(caught.value)
        assert message.startswith(f"{output}: process {holder.pid} on {socket.gethostname()} is writing it")
        assert "\n" not in message
    with artifacts.exclusive(tmp_path / "other"):
        pass  # another output is free

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not output.exists(), "a killed writer leaves no part of its output under the output's name"
    locks = {".output.lock", ".other.lock"}
    assert len(names(tmp_path) - locks) == 1, "what it had written stands beside it"
    with artifacts.exclusive(output), artifacts.atomic_folder(output) as folder:
        assert str(os.getpid()) in (tmp_path / ".output.lock").read_text()
        (folder / "whole").write_text("written")
    assert names(tmp_path) - locks == {"output"}
    assert names(output) == {"whole"}


def test_the_right_to_write_is_free_after_a_block_that_raised(tmp_path):
    output = tmp_path / "output"
    with pytest.raises(Broken), artifacts.exclusive(output):
        raise Broken
    with artifacts.exclusive(output):
        pass


def test_the_lock_is_not_inside_the_output(tmp_path):
    # Runners delete outputs before a run: a lock in there would vanish with them.
    output = tmp_path / "output"
    with artifacts.exclusive(output):
        output.mkdir()
        assert names(output) == set()


def test_of_many_at_once_exactly_one_holds_the_right(tmp_path):
    output = tmp_path / "output"
    attempts, release, results = threading.Barrier(8), threading.Event(), []

    def attempt():
        attempts.wait()
        try:
            with artifacts.exclusive(output):
                results.append("held")
                assert release.wait(10)
        except InputError:
            results.append("refused")
            if results.count("refused") == 7:
                release.set()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == ["held"] + ["refused"] * 7


# --- Digests ------------------------------------------------------------------------------------------------------


def test_a_file_digest_is_the_sha256_of_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # NIST's example for SHA-256.
    assert artifacts.sha256_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_json_digest_changes_with_content_not_with_key_order():
    value = {"a": 1, "b": {"c": [1, 2], "d": None}}
    shuffled = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    digest = artifacts.sha256_of_json(value)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert artifacts.sha256_of_json(shuffled) == digest
    others = [
        {"a": 2, "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [2, 1], "d": None}},
        {"a": 1, "b": {"c": [1, 2], "d": 0}},
        {"a": "1", "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [1, 2]}},
        {"x": 1, "b": {"c": [1, 2], "d": None}},
    ]
    assert len({digest, *map(artifacts.sha256_of_json, others)}) == 1 + len(others)


def test_a_json_digest_is_the_sha256_of_the_sorted_text():
    # Nothing that differs between processes, such as Python's hashes of strings, may enter.
    expected = hashlib.sha256(b'{"a": ["x", 2.5], "b": 1}').hexdigest()
    assert artifacts.sha256_of_json({"b": 1, "a": ["x", 2.5]}) == expected


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "part" / "weights.safetensors").write_bytes(b"weights")
    (folder / "history.csv").write_text("step\n1\n")
    return folder


def test_a_model_digest_changes_with_weights_configuration_and_names_only(model):
    seen = [artifacts.sha256_of_model(model)]
    (model / "part" / "weights.safetensors").write_bytes(b"Weights")
    seen.append(artifacts.sha256_of_model(model))
    (model / "config.json").write_text('{"width": 2}')
    seen.append(artifacts.sha256_of_model(model))
    (model / "part" / "weights.safetensors").rename(model / "weights.safetensors")
    seen.append(artifacts.sha256_of_model(model))
    assert len(set(seen)) == len(seen)
    (model / "history.csv").write_text("step\n2\n")
    assert artifacts.sha256_of_model(model) == seen[-1]


def test_a_folder_without_a_model_has_no_digest(tmp_path):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: no model here"):
        artifacts.sha256_of_model(tmp_path)


def test_a_model_index_tells_what_was_written_and_refuses_another_kind(model):
    written = artifacts.describe_model(model, "encoder", "small", identity="abc")
    assert artifacts.model_index(model, "encoder") == written
    assert (written["kind"], written["name"], written["identity"]) == ("encoder", "small", "abc")
    with pytest.raises(InputError, match=r"index\.json: describes 'encoder', not 'judge'$"):
        artifacts.model_index(model, "judge")


def test_describing_a_model_again_gives_the_same_digest(model):
    first = artifacts.describe_model(model, "encoder", "small")
    assert artifacts.describe_model(model, "encoder", "small") == first


# --- JSON files ---------------------------------------------------------------------------------------------------


def test_json_goes_to_a_file_and_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    artifacts.write_json(tmp_path / "file.json", value)
    assert artifacts.read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named_in_one_line(tmp_path, content: bytes):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        artifacts.read_json(path)
    assert str(caught.value).startswith(f"{path}: not valid JSON")
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"file\.json: no such file$"):
        artifacts.read_json(tmp_path / "file.json")
