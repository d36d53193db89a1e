"""What holds for the package as a whole: its error tree, an import that does no work, and a word it must not know."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import deep_ep_core
from deep_ep_core import errors
from deep_ep_core.errors import (
    CommTimeoutError,
    CompileError,
    ConfigError,
    DeepEPError,
    RankFailedError,
    RankMismatchError,
    TopologyError,
    TransportError,
)

IMPORT_PROGRAM = Path(__file__).parent / "programs" / "core_import.py"

# Every class below DeepEPError, and the built-in class by which existing callers catch it.
PARENTS = {
    ConfigError: (DeepEPError, ValueError),
    RankMismatchError: (ConfigError, ValueError),
    TopologyError: (DeepEPError, DeepEPError),
    CompileError: (DeepEPError, DeepEPError),
    TransportError: (DeepEPError, DeepEPError),
    CommTimeoutError: (TransportError, TimeoutError),
    RankFailedError: (DeepEPError, DeepEPError),
}


def examples():
    return [
        ConfigError("what must hold"),
        RankMismatchError("what must hold", field="hidden", values=["256", "512"]),
        TopologyError("what must hold"),
        CompileError("what must hold", command="nvcc -c x.cu", log="x.cu(3): error", source_path="/tmp/x.cu"),
        TransportError("what must hold", call="ncclCommWindowRegister", code_name="ncclInternalError"),
        CommTimeoutError("what must hold", phase="dispatch #2: payload", rank=1, peers=[3], expected=4, seen=2),
        RankFailedError("what must hold", rank=2, traceback_text="Traceback"),
    ]


def test_the_tree_holds_every_public_error_and_is_drawn_at_the_top():
    assert {error.__name__ for error in PARENTS} | {"DeepEPError"} == set(errors.__all__)
    for error, parents in PARENTS.items():
        assert f"─ {error.__name__}" in errors.__doc__
        for parent in parents:
            assert issubclass(error, parent)


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_an_error_shows_its_message_alone(error):
    """A TimeoutError is an OSError, which would show an error number where it is given two arguments."""
    assert str(error) == "what must hold"


def test_errors_carry_what_a_program_can_act_on():
    _, mismatch, _, compile_error, transport, timeout, failed = examples()
    assert (mismatch.field, mismatch.values) == ("hidden", ("256", "512"))
    assert (compile_error.command, compile_error.log) == ("nvcc -c x.cu", "x.cu(3): error")
    assert compile_error.source_path == "/tmp/x.cu"
    assert (transport.call, transport.code_name) == ("ncclCommWindowRegister", "ncclInternalError")
    assert (timeout.phase, timeout.call) == ("dispatch #2: payload", "dispatch #2: payload")
    assert (timeout.rank, timeout.peers, timeout.expected, timeout.seen) == (1, (3,), 4, 2)
    assert timeout.reports == {}
    assert (failed.rank, failed.traceback_text) == (2, "Traceback")


def state_of(error):
    return type(error), str(error), error.args, vars(error)


def state_from_another_process(pickled):
    """Unpickles there, pickles again there: both ways must work."""
    return pickle.dumps(pickle.loads(pickled))


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(error, protocol):
    """Pools, data loaders and `multiprocessing` hand errors over pickled; one that does not load hangs some."""
    restored = pickle.loads(pickle.dumps(error, protocol))
    assert restored is not error
    assert state_of(restored) == state_of(error)


def test_every_error_survives_the_way_to_another_process_and_back():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        returned = [pickle.loads(text) for text in pool.map(state_from_another_process, map(pickle.dumps, examples()))]
        with pytest.raises(CommTimeoutError, match="what must hold") as caught:
            pool.apply(raise_error, (examples()[5],))
    assert [state_of(error) for error in returned] == [state_of(error) for error in examples()]
    assert caught.value.peers == (3,)


def raise_error(error):
    raise error


def test_a_copy_of_an_error_keeps_its_notes():
    error = examples()[1]
    error.__notes__ = ["while rank 3 was late"]
    assert copy.copy(error).__notes__ == ["while rank 3 was late"]
    assert state_of(copy.deepcopy(error)) == state_of(error)


def import_watched(package, folder, **environ):
    """Import all of a package in a new process, which starts in `folder` and finds packages there."""
    done = subprocess.run(
        [sys.executable, "-B", str(IMPORT_PROGRAM), package],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_does_no_work(tmp_path):
    """No file, process, thread, library, CUDA context or setting: an import must be cheap and cannot fail."""
    facts = import_watched("deep_ep_core", tmp_path, EP_BUFFER_DEBUG="perhaps", HOME=str(tmp_path))
    expected = {f"deep_ep_core.{name}" for name in ("env", "jit.cache", "local.pool", "stream", "transport")}
    assert expected <= set(facts["modules"])
    assert facts["work"] == []
    assert [name for name in facts["variables"] if name.startswith(("EP_", "NCCL_")) or name == "*"] == []
    assert facts["num_new_threads"] == 0
    assert not facts["has_cuda_context"]
    assert list(tmp_path.iterdir()) == []


def test_work_at_import_is_seen(tmp_path):
    """The watch of the test above is not blind."""
    package = tmp_path / "busy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(
        "import os, subprocess, threading\n"
        "open('trace', 'w').close()\n"
        "threading.Thread(target=int).start()\n"
        "subprocess.run(['true'])\n"
        "os.environ.get('EP_BUFFER_DEBUG')\n"
    )
    facts = import_watched("busy", tmp_path)
    assert facts["modules"] == ["busy", "busy.part"]
    seen = " ".join(facts["work"])
    for event in ("open to write trace", "start of a thread", "subprocess.Popen"):
        assert event in seen
    assert "EP_BUFFER_DEBUG" in facts["variables"]


def test_no_file_of_the_package_knows_what_an_expert_is():
    """Mixtures of experts belong to the packages above; other packages build on this one without them."""
    folder = Path(deep_ep_core.__file__).parent
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    ]
    assert folder / "transport.py" in files
    assert [path.name for path in files if b"expert" in path.read_bytes().lower()] == []
