"""All checks of the device backend: every rank on a GPU, several may share one.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 ep_device.py [--memory auto] [--small] [check ...]

Without names all checks run, each in every `recv_memory` that it is for. `--small` runs `check_smallest` alone, for
compute-sanitizer. What must fail is in `ep_device_failures`, gradients are in `ep_device_gradients`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import ep_device_failures
import ep_device_graphs
import ep_device_random
import ep_device_shapes
import ep_device_streams
import ep_device_window
import ep_modes
import torch.distributed as dist
from ep_device_setting import RECV_MEMORIES, on_device

from deep_ep_core.local import run_as_script


def run_check(name: str, recv_memory: str, *arguments: object) -> object:
    """One check of `ep_modes`, by its name."""
    with on_device(recv_memory, num_bytes=64 << 20):
        return getattr(ep_modes, name)(*arguments)


MODE_CHECKS: dict[str, tuple[object, ...]] = {
    "check_sizes": (),
    "check_payloads": (),
    "check_topk": (),
    "check_interleaved": (),
    "check_permuted_rows": (),
    "check_repeated": (),
    "check_all_modes": (0, 5),
}
"""Of `ep_modes`, with their arguments."""

IN_EVERY_MEMORY: tuple[Callable[[str], object], ...] = (
    ep_device_shapes.check_reductions,
    ep_device_shapes.check_tiles,
    ep_device_shapes.check_wide_shapes,
    ep_device_shapes.check_fan_out_at_receiver,
    ep_device_window.check_combine_in_place,
    ep_device_window.check_pulled_and_pushed_rows_mix,
    ep_device_window.check_two_of_each,
    ep_device_window.check_outputs_outlive_their_buffer,
    ep_device_window.check_buffers_close_in_any_order,
    ep_device_graphs.check_graphs,
    ep_device_streams.check_streams,
    ep_device_streams.check_previous_event,
    ep_device_random.check_random_calls,
)

IN_ONE_MEMORY: tuple[Callable[[str], object], ...] = (
    ep_device_shapes.check_calls_of_the_collective_backend,
    ep_device_window.check_full_heap,
    ep_device_graphs.check_graph_outlives_its_buffer,
    ep_device_streams.check_third_stream,
    ep_device_streams.check_barrier,
    ep_device_failures.check_late_rank_is_waited_for,
)
"""What does not depend on where rows live, or has no meaning but in "auto"."""


def timed(name: str, recv_memory: str, check: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        begin = time.monotonic()
        check()
        if dist.get_rank() == 0:
            print(f"right: {name} {recv_memory}, {time.monotonic() - begin:.1f} s", flush=True)

    run.__name__ = f"{name} {recv_memory}"
    return run


def all_checks() -> list[tuple[str, str, Callable[[], object]]]:
    """Name, memory, and the check itself."""
    checks: list[tuple[str, str, Callable[[], object]]] = []
    for memory in RECV_MEMORIES:
        for name, arguments in MODE_CHECKS.items():
            checks.append(
                (
                    name,
                    memory,
                    lambda name=name, memory=memory, arguments=arguments: run_check(name, memory, *arguments),
                )
            )
        for check in (*IN_EVERY_MEMORY, *(IN_ONE_MEMORY if memory == "auto" else ())):
            checks.append((check.__name__, memory, lambda check=check, memory=memory: check(memory)))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="check", help="which checks to run (default: all)")
    parser.add_argument("--memory", choices=RECV_MEMORIES, help="run them in this recv_memory only")
    parser.add_argument("--small", action="store_true", help="run check_smallest alone")
    parsed = parser.parse_args()
    checks = all_checks()
    if parsed.small:
        small = ep_device_shapes.check_smallest
        checks = [(small.__name__, memory, lambda memory=memory: small(memory)) for memory in RECV_MEMORIES]
    chosen = [
        timed(name, memory, check)
        for name, memory, check in checks
        if (not parsed.names or name in parsed.names) and parsed.memory in (None, memory)
    ]
    if not chosen:
        parser.error(f"no such check; there are {', '.join(sorted({name for name, _, _ in checks}))}")
    run_as_script(*chosen)


if __name__ == "__main__":
    main()
