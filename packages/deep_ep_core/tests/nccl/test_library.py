from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nccl_fake import FakeNccl

from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.nccl import library as library_module
from deep_ep_core.nccl.library import find_nccl, mapped_libraries, version_text

MAPS = """\
7f10-7f20 r-xp 00000000 fd:00 101  /opt/venv/lib/nvidia/nccl/lib/libnccl.so.2
7f20-7f30 r--p 00010000 fd:00 101  /opt/venv/lib/nvidia/nccl/lib/libnccl.so.2
7f30-7f40 r-xp 00000000 fd:00 102  /opt/venv/lib/libnccl-net.so
7f40-7f50 r-xp 00000000 fd:00 103  /opt/venv/lib/libnccl_device.so.2
7f50-7f60 rw-p 00000000 00:00 0
7f60-7f70 rw-p 00000000 00:00 0    [stack]
"""
SECOND = "7f80-7f90 r-xp 00000000 fd:00 104  /usr/lib/libnccl.so.2.28.9\n"
FIRST_PATH, SECOND_PATH = "/opt/venv/lib/nvidia/nccl/lib/libnccl.so.2", "/usr/lib/libnccl.so.2.28.9"


class Loader:
    """Stands in for `ctypes.CDLL`: gives a make-believe library of a version for each name that loads."""

    def __init__(self, versions: dict[str, int]) -> None:
        self.versions = versions
        self.calls: list[tuple[str, int]] = []

    def __call__(self, name: str, mode: int) -> FakeNccl:
        self.calls.append((name, mode))
        if name not in self.versions:
            raise OSError(f"{name}: cannot open")
        return FakeNccl(self.versions[name])


@pytest.fixture
def torchs_path(monkeypatch):
    """Sets the file of the NCCL that torch is linked with."""

    def set_path(path: str | None) -> None:
        monkeypatch.setattr(library_module, "_torchs_nccl_path", lambda: path)

    set_path(None)
    return set_path


def test_only_libnccl_itself_counts_as_loaded():
    assert mapped_libraries(MAPS) == (FIRST_PATH,)
    assert mapped_libraries(MAPS + SECOND) == (FIRST_PATH, SECOND_PATH)
    assert mapped_libraries("") == ()


def test_a_path_with_spaces_is_kept_whole():
    line = "7f10-7f20 r-xp 00000000 fd:00 101  /my files/libnccl.so.2"
    assert mapped_libraries(line) == ("/my files/libnccl.so.2",)


def test_the_loaded_library_is_taken_and_not_loaded_again(torchs_path):
    loader = Loader({FIRST_PATH: 23007, "/elsewhere/lib/libnccl.so.2": 23203})
    found = find_nccl(MAPS, root_dir=Path("/elsewhere"), suppress_check=False, open_library=loader)
    assert (found.version, found.path) == (23007, FIRST_PATH)
    assert [mode & os.RTLD_NOLOAD for _, mode in loader.calls] == [os.RTLD_NOLOAD]


def test_a_loaded_library_whose_file_was_replaced_is_found_by_its_own_name(torchs_path):
    maps_text = "7f10-7f20 r-xp 00000000 fd:00 101  /opt/libnccl.so.2 (deleted)"
    found = find_nccl(maps_text, root_dir=None, suppress_check=False, open_library=Loader({"libnccl.so.2": 23007}))
    assert found.path == "/opt/libnccl.so.2 (deleted)"


def test_where_none_is_loaded_the_given_installation_is_loaded(torchs_path):
    loader = Loader({"/given/lib/libnccl.so.2": 23203, "libnccl.so.2": 23007})
    found = find_nccl("", root_dir=Path("/given"), suppress_check=False, open_library=loader)
    assert (found.version, found.found_via) == (23203, "EP_NCCL_ROOT_DIR")


def test_where_none_is_loaded_or_given_the_wheel_comes_before_the_system(torchs_path, monkeypatch, tmp_path):
    wheel = str(tmp_path / "lib" / "libnccl.so.2")
    monkeypatch.setattr(library_module, "site_folders", lambda package, names: iter([tmp_path]))
    both, system = Loader({wheel: 23203, "libnccl.so.2": 23007}), Loader({"libnccl.so.2": 23007})
    assert find_nccl("", root_dir=None, suppress_check=False, open_library=both).path == wheel
    assert find_nccl("", root_dir=None, suppress_check=False, open_library=system).found_via == "the system"


def test_a_missing_library_is_one_line_that_says_where_it_was_looked_for(torchs_path):
    with pytest.raises(TransportError) as caught:
        find_nccl("", root_dir=Path("/given"), suppress_check=False, open_library=Loader({}))
    message = str(caught.value)
    assert "\n" not in message
    assert "EP_NCCL_ROOT_DIR: /given/lib/libnccl.so.2: cannot open" in message
    assert "NCCL 2.30.4 or newer must be installed" in message


def test_a_library_that_is_too_old_is_refused_with_both_versions_and_its_path(torchs_path):
    with pytest.raises(TransportError) as caught:
        find_nccl(MAPS, root_dir=None, suppress_check=False, open_library=Loader({FIRST_PATH: 22809}))
    message = str(caught.value)
    assert "NCCL must be 2.30.4 or newer (got 2.28.9, " + FIRST_PATH in message
    assert "\n" not in message
    assert caught.value.call == "ncclGetVersion"


def test_the_oldest_supported_version_is_taken(torchs_path):
    loader = Loader({FIRST_PATH: 23004})
    assert find_nccl(MAPS, root_dir=None, suppress_check=False, open_library=loader).version == 23004


def test_two_libraries_are_refused_with_both_paths_and_versions(torchs_path):
    loader = Loader({FIRST_PATH: 23007, SECOND_PATH: 22809})
    with pytest.raises(TransportError, match="must load one NCCL") as caught:
        find_nccl(MAPS + SECOND, root_dir=None, suppress_check=False, open_library=loader)
    assert f"2.30.7 in {FIRST_PATH} and 2.28.9 in {SECOND_PATH}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("torchs", "path"), [(SECOND_PATH, SECOND_PATH), (FIRST_PATH, FIRST_PATH), (None, FIRST_PATH)])
def test_of_two_libraries_that_were_allowed_torchs_is_used(torchs_path, torchs, path):
    torchs_path(torchs)
    loader = Loader({FIRST_PATH: 23007, SECOND_PATH: 23203})
    with pytest.warns(RuntimeWarning, match="must load one NCCL"):
        found = find_nccl(MAPS + SECOND, root_dir=None, suppress_check=True, open_library=loader)
    assert found.path == path


def test_the_check_of_the_version_can_be_softened_to_a_warning(torchs_path):
    loader = Loader({FIRST_PATH: 22809})
    with pytest.warns(RuntimeWarning, match=r"2\.30\.4 or newer \(got 2\.28\.9"):
        assert find_nccl(MAPS, root_dir=None, suppress_check=True, open_library=loader).version == 22809


def test_a_library_is_torchs_only_if_torch_is_linked_with_it(torchs_path):
    def find(maps_text: str):
        loader = Loader({FIRST_PATH: 23007, "libnccl.so.2": 23007, "/given/lib/libnccl.so.2": 23007})
        return find_nccl(maps_text, root_dir=Path("/given"), suppress_check=False, open_library=loader)

    torchs_path(FIRST_PATH)
    assert find(MAPS).is_torchs
    # Torch may have a copy of its own inside itself: then the one that is loaded here is another.
    assert not find("").is_torchs
    torchs_path(SECOND_PATH)
    assert not find(MAPS).is_torchs


def test_a_failed_call_says_its_name_the_codes_name_and_all_that_nccl_says():
    fake = FakeNccl()
    library = fake.library()
    fake.failures["ncclMemAlloc"] = 5
    fake.last_error = b"\nCuda failure 2 'out of memory'\n"
    with pytest.raises(TransportError) as caught:
        library.call("ncclMemAlloc", None, 4096, where="rank 3 of 8")
    assert (caught.value.call, caught.value.code_name) == ("ncclMemAlloc", "ncclInvalidUsage")
    assert str(caught.value) == (
        "ncclMemAlloc failed on rank 3 of 8: ncclInvalidUsage (text of 5); NCCL's last error: Cuda failure 2 "
        "'out of memory'; run again with NCCL_DEBUG=WARN to see more"
    )


def test_a_result_code_that_is_newer_than_the_list_is_shown_as_a_number():
    fake = FakeNccl()
    library = fake.library()
    fake.failures["ncclMemFree"] = 42
    with pytest.raises(TransportError, match="ncclMemFree failed: result 42"):
        library.call("ncclMemFree", 1)


def test_a_call_that_goes_on_in_the_background_is_no_failure():
    fake = FakeNccl()
    library = fake.library()
    assert library.call("ncclMemFree", 1) is True
    fake.failures["ncclMemFree"] = 7
    assert library.call("ncclMemFree", 1) is False


def test_a_function_that_this_nccl_lacks_is_named():
    fake = FakeNccl()
    fake.missing.add("ncclDevCommCreate")
    library = fake.library()
    assert not library.has("ncclDevCommCreate")
    assert library.has("ncclCommAbort")
    with pytest.raises(TransportError, match=r"NCCL must have ncclDevCommCreate, but 2\.30\.7 in /fake"):
        library.call("ncclDevCommCreate", None, None, None)


def test_headers_of_another_version_are_refused():
    library = FakeNccl(23007).library()
    library.check_headers((2, 30, 7), "the nvidia-nccl wheel")
    with pytest.raises(ConfigError, match=r"2\.30\.7 in /fake/libnccl\.so\.2 \(got 2\.32\.3, found via the wheel\)"):
        library.check_headers((2, 32, 3), "the wheel")


def test_headers_of_another_version_are_only_warned_of_when_asked_to(monkeypatch, fresh_env):
    monkeypatch.setenv("EP_SUPPRESS_NCCL_CHECK", "1")
    with pytest.warns(RuntimeWarning, match="headers must be of the version"):
        FakeNccl(23007).library().check_headers((2, 32, 3), "the wheel")


def test_versions_are_shown_as_nccl_writes_them():
    assert [version_text(version) for version in (23007, 22809, 23203)] == ["2.30.7", "2.28.9", "2.32.3"]


def test_importing_the_runtime_loads_no_library():
    program = (
        "import torch\n"
        "def nvidia_libraries():\n"
        "    with open('/proc/self/maps') as maps:\n"
        "        return {line.split()[-1] for line in maps if 'libnccl' in line or 'libcuda.so' in line}\n"
        "before = nvidia_libraries()\n"
        "import deep_ep_core.nccl, deep_ep_core.window\n"
        "assert nvidia_libraries() == before\n"
        "assert deep_ep_core.nccl.load_nccl.cache_info().misses == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_real_library_tells_its_version_and_its_errors(nccl_root):
    """Without a GPU: what needs one fails with NCCL's own words."""
    program = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "from deep_ep_core.errors import TransportError\n"
        "from deep_ep_core.nccl.library import find_nccl\n"
        "found = find_nccl('', root_dir=Path(sys.argv[1]), suppress_check=False)\n"
        "maps_text = Path('/proc/self/maps').read_text()\n"
        "again = find_nccl(maps_text, root_dir=None, suppress_check=False)\n"
        "print(found.version, again.version, again.found_via)\n"
        "try:\n"
        "    found.call('ncclMemAlloc', None, 0)\n"
        "except TransportError as error:\n"
        "    print(error.call, error.code_name)\n"
    )
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, str(nccl_root)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environ)
    first, second = answer.stdout.strip().splitlines()
    assert first == "23007 23007 the libraries of this process"
    assert second.startswith("ncclMemAlloc nccl")
