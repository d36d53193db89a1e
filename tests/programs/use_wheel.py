"""Check an installed package by itself: python -I use_wheel.py PACKAGE SIBLING,... ALLOWED,...

Runs away from the tree, in an environment that holds the wheel and what it asked for, nothing else of the project.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys


def check_imports(package: str) -> int:
    """Import every module but the programs; returns how many."""
    root = importlib.import_module(package)
    assert "site-packages" in root.__file__, root.__file__
    names = [module.name for module in pkgutil.walk_packages(root.__path__, f"{package}.")]
    names = [name for name in names if not name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return len(names)


def check_requirements(package: str, allowed: set[str]) -> None:
    requirements = importlib.metadata.requires(package.replace("_", "-")) or []
    needed = {re.split(r"[ <>=!~;\[]", line)[0] for line in requirements if "extra ==" not in line}
    assert needed <= allowed, f"{package} asks for {sorted(needed - allowed)}, allowed are {sorted(allowed)}"


def check_files(package: str) -> None:
    files = [str(path) for path in importlib.metadata.files(package.replace("_", "-")) or []]
    assert any(name.endswith("py.typed") for name in files)
    binaries = [name for name in files if name.endswith((".so", ".pyd", ".o", ".a", ".cubin"))]
    assert not binaries, f"a wheel must be pure Python, but holds {binaries}"
    wheel = importlib.metadata.distribution(package.replace("_", "-")).read_text("WHEEL")
    assert "Tag: py3-none-any" in wheel, wheel


def use_core() -> None:
    import torch.distributed as dist

    from deep_ep_core.domains import detect_topology

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert detect_topology(None).num_ranks == 1


def use_ep() -> None:
    import torch

    from deep_ep_ep import ElasticBuffer

    use_core()
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=128)
    x = torch.arange(4 * 128).view(4, 128).bfloat16()
    topk_idx = torch.tensor([[0, 1], [1, -1], [-1, -1], [3, 2]])
    recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=4)
    assert torch.equal(recv_x, x[[0, 1, 3]])
    combined, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(combined, torch.where((topk_idx >= 0).any(1, keepdim=True), x, 0))


def use_pp() -> None:
    from deep_ep_pp.demo.__main__ import main

    # Two ranks that send and receive activations and gradients.
    assert main(["--ranks", "2", "--steps", "1"]) == 0


def use_cp() -> None:
    import torch

    from deep_ep_cp import ContextBuffer, all_gather

    use_core()
    buffer = ContextBuffer(None, 2 << 20, device="cpu")
    buffer.agrs_set_config(1 << 10, 2)
    with buffer.agrs_new_session():
        gathered, wait = buffer.all_gather(torch.arange(3))
        wait()
        assert gathered.tolist() == [[0, 1, 2]]
    x = torch.ones(3, requires_grad=True)
    all_gather(buffer, x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


def use_engram() -> None:
    import torch

    from deep_ep_engram import EngramTable

    use_core()
    with EngramTable(None, 4 << 20, 2 << 20) as table:
        entries = torch.arange(4 * 128).view(4, 128).bfloat16()
        table.engram_write(entries)
        data, _ = table.engram_fetch(torch.tensor([[3, 0], [3, 3]]))()
        assert torch.equal(data, entries[[3, 0, 3, 3]].view(2, 256))


def use_legacy() -> None:
    import torch
    import torch.distributed as dist

    import deep_ep
    from deep_ep.utils import EventOverlap

    use_core()
    buffer = deep_ep.Buffer(dist.group.WORLD)
    x = torch.arange(4 * 128).view(4, 128).bfloat16()
    topk_idx = torch.tensor([[0, 1], [1, -1], [-1, -1], [3, 2]])
    per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
    recv_x, *_, counts, handle, event = buffer.dispatch(x, is_token_in_rank=is_token_in_rank, **layout)
    assert isinstance(event, EventOverlap)
    assert torch.equal(recv_x, x[[0, 1, 3]])
    assert counts == [1, 2, 1, 1]
    combined, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(combined, torch.where((topk_idx >= 0).any(1, keepdim=True), x, 0))
    assert not hasattr(deep_ep, "ElasticBuffer")
    told = ""
    try:
        from deep_ep import ElasticBuffer  # noqa: F401
    except ImportError as error:
        told = str(error)
    assert "pip install deep-ep-ep" in told


def main() -> None:
    package, siblings, allowed = sys.argv[1:]
    num_modules = check_imports(package)
    check_requirements(package, set(allowed.split(",")))
    check_files(package)
    for sibling in filter(None, siblings.split(",")):
        assert importlib.util.find_spec(sibling) is None, f"{sibling} is installed, but {package} must stand alone"
    uses = {
        "deep_ep_core": use_core,
        "deep_ep_ep": use_ep,
        "deep_ep_pp": use_pp,
        "deep_ep_cp": use_cp,
        "deep_ep_engram": use_engram,
        "deep_ep_legacy": use_legacy,
    }
    uses[package]()
    print(f"{package}: {num_modules} modules imported, requirements and files are right, and it works")


if __name__ == "__main__":
    main()
