"""Owns the demo's command line: starts the ranks or joins those that are there, and tells how the runs compare."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

# The first differentiable dispatch imports this module, whose functions have the default group of that moment as a
# default argument. Imported here, before there is a group, it cannot keep the group and its threads alive: a gloo
# thread that is still at work while the interpreter ends may abort the process.
import torch.distributed.nn.functional

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import launch
from deep_ep_core.local import LaunchConfig
from deep_ep_ep.demo.agreement import Agreement, Tolerances, compare
from deep_ep_ep.demo.picture import NUM_LOAD_STEPS, draw, expert_shares
from deep_ep_ep.demo.progress import BarProgress, PlainProgress, Progress, RelayedOutput, RelayProgress
from deep_ep_ep.demo.text import Corpus, find_project_root, make_corpus, package_documents, project_documents
from deep_ep_ep.demo.train import Runs, TrainConfig, train

__all__ = ["main"]

_DEFAULT_NUM_RANKS = 4
_EXIT_DISAGREEMENT = 1
_EXIT_CONFIG = 2
_EXIT_INTERRUPT = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if the runs agree, 1 if not, 2 for what cannot be run as asked."""
    options = _parser().parse_args(arguments)
    try:
        _check_extra()
        if not options.out.resolve().parent.is_dir():
            raise ConfigError(f"--out must name a file in a folder that exists (got {options.out})")
        return _join_ranks(options) if "RANK" in os.environ else _start_ranks(options)
    except ConfigError as error:
        print(f"deep_ep_ep.demo: {error}", file=sys.stderr, flush=True)
        return _EXIT_CONFIG
    except KeyboardInterrupt:
        return _EXIT_INTERRUPT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_ep.demo",
        description="Train a small MoE language model on text of this machine twice at once: with its experts spread "
        "over ranks, and unsharded. Show that both runs agree.",
    )
    parser.add_argument(
        "--steps", type=int, default=TrainConfig().num_steps, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help=f"processes to start (default: {_DEFAULT_NUM_RANKS}); under torchrun, its number",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("deep_ep_demo.png"), metavar="PATH", help="picture (default: ./%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="lines instead of a progress bar, as without a terminal")
    # For the ranks that this program starts: their progress goes through a pipe to the process with the terminal.
    parser.add_argument("--relay", action="store_true", help=argparse.SUPPRESS)
    return parser


def _check_extra() -> None:
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {' and '.join(missing)}; install the extra with pip install deep-ep-ep[demo]"
        )


def _load_corpus() -> Corpus:
    return make_corpus([*project_documents(find_project_root()), *package_documents()])


def _config(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(num_steps=options.steps, seed=options.seed)


def _start_ranks(options: argparse.Namespace) -> int:
    """Run this program again in every rank, after the checks that would otherwise fail in each of them."""
    num_ranks = _DEFAULT_NUM_RANKS if options.ranks is None else options.ranks
    _config(options).check_ranks(num_ranks)
    _check_gpu(options.device)
    _load_corpus()
    is_plain = options.plain or not sys.stdout.isatty()
    command = ["-m", "deep_ep_ep.demo", "--plain" if is_plain else "--relay", "--ranks", str(num_ranks)]
    for name in ("steps", "seed", "out", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    output = contextlib.nullcontext() if is_plain else contextlib.redirect_stdout(RelayedOutput(sys.stdout))
    with output:
        return launch(LaunchConfig(num_ranks=num_ranks, device=options.device), command, has_prefix=False)


def _join_ranks(options: argparse.Namespace) -> int:
    """Be one rank."""
    _check_gpu(options.device)
    device = _set_device(options.device)
    dist.init_process_group(_backend(options.device))
    if options.ranks not in (None, dist.get_world_size()):
        raise ConfigError(f"--ranks must be left out or be the number of ranks that are there (got {options.ranks})")
    is_first = dist.get_rank() == 0
    config = _config(options)
    # Rank 0's text is everybody's: on another node other packages may be installed.
    shared: list[Corpus | None] = [_load_corpus() if is_first else None]
    dist.broadcast_object_list(shared)
    corpus = shared[0]
    assert corpus is not None
    if is_first:
        _print_start(config, corpus, device)
    runs = train(config, corpus, device=device, on_step=_progress(options))
    dist.destroy_process_group()
    if runs is None:
        return 0
    return conclude(runs, options.out)


def conclude(runs: Runs, picture_path: Path) -> int:
    """Draw the picture, print the summary and the verdict; returns the exit code."""
    tolerances = Tolerances()
    agreement = compare(runs.sharded, runs.unsharded, tolerances)
    draw(runs, tolerances, picture_path)
    print(_load_table(runs))
    print(_summary(runs, agreement))
    print(f"\npicture: {picture_path}", flush=True)
    if agreement.disagreements:
        lines = ["deep_ep_ep.demo: the sharded and the unsharded run DISAGREE", *map(str, agreement.disagreements)]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        return _EXIT_DISAGREEMENT
    print("the sharded and the unsharded run AGREE", flush=True)
    return 0


def _check_gpu(device_name: str) -> None:
    if device_name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that this torch can use (it finds none); take --device cpu")


def _set_device(name: str) -> torch.device:
    """The device of this rank, made current."""
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # The tolerances are for float32; the environment may have allowed shorter formats in matrix products.
    torch.set_float32_matmul_precision("highest")
    return device


def _backend(device_name: str) -> str:
    if device_name == "cpu":
        return "gloo"
    # Torch's NCCL may refuse two ranks on one GPU. The buffer moves rows by other means, or over this group.
    has_own_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo"


def _progress(options: argparse.Namespace) -> Progress:
    if options.relay:
        return RelayProgress()
    return PlainProgress() if options.plain or not sys.stdout.isatty() else BarProgress(sys.stdout)


def _print_start(config: TrainConfig, corpus: Corpus, device: torch.device) -> None:
    model = config.model
    num_ranks = dist.get_world_size()
    print(
        f"text:  {corpus.num_bytes:,} bytes of {corpus.num_documents} documents, {corpus.held_out.numel():,} held out\n"
        f"model: {model.num_layers} layers of {model.num_experts} experts, top-{model.num_topk}\n"
        f"ranks: {num_ranks} on {device.type}, {model.num_experts // num_ranks} experts of each layer on each\n"
        f"batch: {config.num_sequences} sequences of {model.context} bytes, {config.num_sequences // num_ranks} a rank",
        flush=True,
    )


def _load_table(runs: Runs) -> str:
    num_experts = runs.config.model.num_experts
    num_own = num_experts // runs.num_ranks
    num_steps = min(NUM_LOAD_STEPS, len(runs.sharded.loads))
    lines = [
        f"\nload of each expert: % of the routed tokens in the last {num_steps} steps; "
        f"an equal share is {100 / num_experts:.1f}; a bar between ranks"
    ]
    tables = (("sharded", expert_shares(runs.sharded)), ("unsharded", expert_shares(runs.unsharded)))
    for layer in range(runs.config.model.num_layers):
        for name, shares in tables:
            cells = [f"{share:5.1f}" for share in shares[layer]]
            parts = ["".join(cells[first : first + num_own]) for first in range(0, num_experts, num_own)]
            lines.append(f"layer {layer}  {name:9}  {' |'.join(parts)}")
    return "\n".join(lines)


def _summary(runs: Runs, agreement: Agreement) -> str:
    one, other = runs.sharded, runs.unsharded
    first_look, last_look = min(one.held_out_losses), max(one.held_out_losses)
    rows = [
        ("training loss, first step", f"{one.losses[0]:.4f}", f"{other.losses[0]:.4f}"),
        ("training loss, last step", f"{one.losses[-1]:.4f}", f"{other.losses[-1]:.4f}"),
        ("held-out loss, start", f"{one.held_out_losses[first_look]:.4f}", f"{other.held_out_losses[first_look]:.4f}"),
        ("held-out loss, end", f"{one.held_out_losses[last_look]:.4f}", f"{other.held_out_losses[last_look]:.4f}"),
        ("time of the steps (s)", f"{one.train_s:.1f}", f"{other.train_s:.1f}"),
        ("tokens/s", f"{runs.tokens_per_s(one):,.0f}", f"{runs.tokens_per_s(other):,.0f}"),
    ]
    ranks = "1 rank" if runs.num_ranks == 1 else f"{runs.num_ranks} ranks"
    lines = [f"\n{'':27} {'sharded, ' + ranks:>18} {'unsharded':>12}"]
    lines += [f"{name:27} {left:>18} {right:>12}" for name, left, right in rows]
    lines.append(f"\n{'largest relative difference':27} {'found':>18} {'allowed':>12}  where")
    lines += [f"{each.name:27} {each.worst:18.1e} {each.allowed:12.0e}  {each.where}" for each in agreement.comparisons]
    lines.append(f"\ndispatch and combine: {runs.backend} backend")
    lines.append(
        f"routing: {agreement.num_moved} of {agreement.num_choices:,} choices differ; "
        f"{agreement.num_settled_ties} near ties were settled alike"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
