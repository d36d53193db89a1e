"""Stands in for `nvidia-cuda-mps-control`: a daemon on a socket, its server, and the client that talks to them.

What happens is appended to the file that FAKE_MPS_JOURNAL names. FAKE_MPS_FAULT may name a fault: `refuses` (the daemon
does not start), `serverless` (it starts no server), `deaf` (it does not answer `quit`, and ignores SIGTERM as its
server does), `slow` (it listens after a second).
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nonexistent"))
FAULT = os.environ.get("FAKE_MPS_FAULT", "")
# Nothing that a broken test leaves behind lives longer.
LIFE_S = 120


def note(text: str) -> None:
    with open(os.environ["FAKE_MPS_JOURNAL"], "a") as journal:
        journal.write(f"{text}\n")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def running_ranks() -> list[int]:
    lines = Path(os.environ["FAKE_MPS_JOURNAL"]).read_text().splitlines()
    pids = [int(line.split()[-1]) for line in lines if line.startswith("rank ")]
    return [pid for pid in pids if is_running(pid)]


def start_daemon() -> None:
    if FAULT == "refuses":
        Path(os.environ["CUDA_MPS_LOG_DIRECTORY"], "control.log").write_text("first line\nno such device\n")
        sys.exit("the daemon does not want to")
    note(f"start {FOLDER} {os.environ['CUDA_MPS_LOG_DIRECTORY']} {os.environ['CUDA_VISIBLE_DEVICES']}")
    if os.fork() == 0:
        os.setsid()
        signal.alarm(LIFE_S)
        run_daemon()
        os._exit(0)


def run_daemon() -> None:
    (FOLDER / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    note(f"daemon {os.getpid()}")
    if FAULT == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if FAULT == "slow":
        time.sleep(1)
    servers: list[subprocess.Popen[bytes]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(FOLDER / "control_privileged"))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                command = connection.recv(1000).decode().strip()
                if command == "quit":
                    note(f"quit, ranks that run: {running_ranks()}")
                    if FAULT == "deaf":
                        time.sleep(LIFE_S)
                    for server in servers:
                        server.kill()
                        server.wait()
                    (FOLDER / "nvidia-cuda-mps-control.pid").unlink()
                    return
                if command.startswith("start_server") and FAULT != "serverless":
                    note(command)
                    servers.append(subprocess.Popen(["sleep", str(LIFE_S)]))
                    note(f"server {servers[-1].pid}")
                elif command == "get_server_list":
                    connection.sendall("".join(f"{server.pid}\n" for server in servers).encode())


def ask(command: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(FOLDER / "control_privileged"))
        except OSError:
            sys.exit("Cannot find MPS control daemon process")
        connection.sendall(command.encode())
        while data := connection.recv(1000):
            print(data.decode(), end="")


if __name__ == "__main__":
    if sys.argv[1:] == ["-d"]:
        start_daemon()
    else:
        ask(sys.stdin.readline())
