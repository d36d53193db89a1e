from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.local.gpus import find_gpus
from deep_ep_ep.demo.__main__ import conclude, main
from deep_ep_ep.demo.agreement import compare
from deep_ep_ep.demo.model import AllExpertsHere, Experts, ModelConfig, MoELayer, Transformer, choose_experts
from deep_ep_ep.demo.progress import PlainProgress, RelayedOutput, RelayProgress
from deep_ep_ep.demo.text import MIN_TEXT_BYTES, make_corpus, package_documents, project_documents
from deep_ep_ep.demo.train import Run, Runs, StepReport, TrainConfig

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALL = ModelConfig(context=8, hidden=16, num_experts=8, num_topk=2, expert_hidden=12)


# The text


def install_package(folder: Path, name: str, *, description: str, files: dict[str, bytes]) -> None:
    """What an installer leaves behind of a package: metadata, files, and the list of them."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n{description}")
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def test_packages_give_descriptions_and_licences_in_sorted_order(tmp_path):
    install_package(
        tmp_path,
        "zebra",
        description="of zebra",
        files={"zebra-1.0.dist-info/LICENSE": b"licence of zebra", "zebra/code.py": b"no text"},
    )
    install_package(
        tmp_path,
        "Ant",
        description="of ant",
        files={
            "ant/README.md": b"readme of ant",
            "ant/licenses.json": b"no text",
            "Ant-1.0.dist-info/licenses/COPYING.txt": b"copying of ant",
        },
    )
    found = list(package_documents(importlib.metadata.distributions(path=[str(tmp_path)])))
    assert found == [b"of ant", b"copying of ant", b"readme of ant", b"of zebra", b"licence of zebra"]


def test_listed_file_that_is_gone_is_left_out(tmp_path):
    install_package(tmp_path, "ant", description="of ant", files={"ant/README.md": b"readme"})
    (tmp_path / "ant" / "README.md").unlink()
    assert list(package_documents(importlib.metadata.distributions(path=[str(tmp_path)]))) == [b"of ant"]


def test_project_gives_its_docs_sorted_by_path(tmp_path):
    for path in ("docs/b.md", "docs/a/z.md", "packages/one/README.md", "README.md", "docs/hooks.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    expected = [b"README.md", b"docs/a/z.md", b"docs/b.md", b"packages/one/README.md"]
    assert list(project_documents(tmp_path)) == expected
    assert list(project_documents(None)) == []


def test_every_16th_block_is_held_out_and_nothing_is_lost():
    text = bytes(33 + i // 4096 % 90 for i in range(40 * 4096 + 100))
    corpus = make_corpus([text])
    held_out = text[15 * 4096 : 16 * 4096] + text[31 * 4096 : 32 * 4096]
    assert bytes(corpus.held_out.tolist()) == held_out
    assert bytes(corpus.train.tolist()) == text[: 15 * 4096] + text[16 * 4096 : 31 * 4096] + text[32 * 4096 :]
    assert corpus.num_bytes == len(text)


def test_repeated_empty_and_binary_documents_are_dropped():
    first, second = b"a" * MIN_TEXT_BYTES, b"b" * 10
    corpus = make_corpus([first, b" \n", second, first, b"binary\0", second])
    assert corpus.num_documents == 2
    assert corpus.num_bytes == len(first) + len(b"\n\n") + len(second)


def test_too_little_text_is_refused_with_the_sizes():
    make_corpus([b"x" * MIN_TEXT_BYTES])
    with pytest.raises(ConfigError, match=rf"at least 100000 bytes of text .*got {MIN_TEXT_BYTES - 1} in 1 documents"):
        make_corpus([b"x" * (MIN_TEXT_BYTES - 1)])


# The model


def naive_moe(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """The layer for one token and one expert at a time."""
    result = torch.zeros_like(x)
    for token in range(len(x)):
        probabilities = (layer.router.weight @ x[token]).softmax(dim=0)
        chosen = sorted(range(len(probabilities)), key=lambda e: -probabilities[e].item())[: layer.num_topk]
        total = sum(probabilities[expert] for expert in chosen)
        for expert in chosen:
            inner = x[token] @ layer.experts.up[expert]
            gate, value = inner[: len(inner) // 2], inner[len(inner) // 2 :]
            output = (gate * gate.sigmoid() * value) @ layer.experts.down[expert]
            result[token] = result[token] + probabilities[expert] / total * output
    return result


def test_unsharded_layer_equals_a_loop_over_tokens_and_experts():
    torch.manual_seed(0)
    layer = MoELayer(SMALL, AllExpertsHere())
    x = torch.randn(23, SMALL.hidden)
    given = layer(x)
    output = given.x
    expected = naive_moe(layer, x)
    torch.testing.assert_close(output, expected)
    assert given.load.sum() == 23 * SMALL.num_topk
    upstream = torch.randn_like(x)
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad((output * upstream).sum(), parameters)
    naive_gradients = torch.autograd.grad((expected * upstream).sum(), parameters)
    torch.testing.assert_close(gradients, naive_gradients)


def test_experts_without_rows_get_zero_gradients():
    experts = Experts(3, 4, 5)
    experts(torch.randn(2, 4), [0, 2, 0]).sum().backward()
    assert experts.up.grad[[0, 2]].abs().sum() == 0
    assert experts.up.grad[1].abs().sum() > 0


def test_balance_loss_is_one_at_equal_load_and_the_number_of_experts_at_worst():
    layer = MoELayer(dataclasses.replace(SMALL, num_topk=1), AllExpertsHere())
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, : SMALL.num_experts] = 1000 * torch.eye(SMALL.num_experts)
    each_once = torch.eye(SMALL.num_experts, SMALL.hidden)
    assert layer(each_once).balance_loss.item() == pytest.approx(1.0)
    assert layer(each_once[:1].expand(8, -1)).balance_loss.item() == pytest.approx(SMALL.num_experts)


def test_near_tie_goes_the_way_of_the_other_run_and_nothing_else_does():
    probabilities = torch.tensor(
        [
            [0.4, 0.3000001, 0.3, 0.0],
            [0.4, 0.31, 0.29, 0.0],
            [0.5, 0.3, 0.2, 0.0],
        ]
    )
    chosen, num_settled = choose_experts(probabilities, 2, torch.tensor([[0, 2], [0, 2], [1, 0]]))
    assert chosen.tolist() == [[0, 2], [0, 1], [1, 0]]
    assert num_settled == 1
    assert choose_experts(probabilities, 2, None)[0].tolist() == [[0, 1], [0, 1], [0, 1]]


def test_parameters_depend_on_the_seed_only():
    first, again, other = (Transformer(SMALL, AllExpertsHere(), seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_ranks_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ConfigError, match=r"must divide the 16 experts \(got 3 ranks\)"):
        TrainConfig().check_ranks(3)


# The judgement


def made_up_run(num_steps: int = 3) -> Run:
    generator = torch.Generator().manual_seed(0)
    return Run(
        losses=[5.0 - step for step in range(num_steps)],
        dense_gradient_norms=[0.5] * num_steps,
        expert_gradient_norms=[0.25] * num_steps,
        held_out_losses={0: 5.5, num_steps: 3.5},
        loads=[torch.full((2, 16), 8) for _ in range(num_steps)],
        train_s=1.0,
        parameters={name: torch.randn(4, generator=generator) for name in ("head", "experts.up")},
        expert_names=frozenset({"experts.up"}),
    )


def made_up_runs(sharded: Run) -> Runs:
    return Runs(
        config=TrainConfig(num_steps=3), num_ranks=4, backend="made-up", sharded=sharded, unsharded=made_up_run()
    )


def test_equal_runs_agree():
    agreement = compare(made_up_run(), made_up_run())
    assert agreement.disagreements == []
    assert [comparison.worst for comparison in agreement.comparisons] == [0.0] * 6
    assert (agreement.num_moved, agreement.num_choices) == (0, 3 * 2 * 16 * 8)


@pytest.mark.parametrize(
    ("change", "name", "where"),
    [
        (
            lambda run: run.losses.__setitem__(1, 4.0004 * 1.0001),
            "training loss",
            "step 2 (sharded 4.0008, unsharded 4)",
        ),
        (lambda run: run.held_out_losses.update({3: 3.6}), "held-out loss", "step 3 (sharded 3.6, unsharded 3.5)"),
        (lambda run: run.dense_gradient_norms.__setitem__(0, 2.0), "gradient norm, dense", "step 1"),
        (lambda run: run.expert_gradient_norms.__setitem__(2, 1.0), "gradient norm, experts", "step 3"),
        (lambda run: run.parameters["head"].mul_(1.01), "parameters, dense", "head"),
        (lambda run: run.parameters["experts.up"].mul_(1.01), "parameters, experts", "experts.up"),
        (lambda run: run.losses.__setitem__(2, float("nan")), "training loss", "step 3 (sharded nan, unsharded 3)"),
    ],
)
def test_each_difference_is_named_with_its_place(change, name, where):
    sharded = made_up_run()
    change(sharded)
    [comparison] = compare(sharded, made_up_run()).disagreements
    assert comparison.name == name
    assert comparison.where.startswith(where)


def test_differences_within_the_tolerances_agree():
    sharded = made_up_run()
    sharded.losses[0] *= 1 + 5e-6
    sharded.parameters["head"] *= 1 + 5e-5
    assert compare(sharded, made_up_run()).disagreements == []


def test_moved_tokens_are_counted_once():
    sharded = made_up_run()
    sharded.loads[1][0, 3] -= 5
    sharded.loads[1][0, 4] += 5
    assert compare(sharded, made_up_run()).num_moved == 5


def test_agreement_ends_with_zero_and_a_picture(tmp_path, capsys):
    assert conclude(made_up_runs(made_up_run()), tmp_path / "picture.png") == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG_SIGNATURE)
    shown = capsys.readouterr()
    assert "AGREE" in shown.out
    assert "dispatch and combine: made-up backend" in shown.out
    assert shown.err == ""


def test_disagreement_ends_with_failure_and_says_where(tmp_path, capsys):
    sharded = made_up_run()
    sharded.losses[1] = 4.4
    assert conclude(made_up_runs(sharded), tmp_path / "picture.png") == 1
    assert (tmp_path / "picture.png").is_file()
    shown = capsys.readouterr()
    assert "AGREE" not in shown.out
    assert "DISAGREE" in shown.err
    assert "training loss: differs by 1.0e-01 at step 2 (sharded 4.4, unsharded 4); at most 1e-05" in shown.err


# Progress


def report(step: int, num_steps: int = 30) -> StepReport:
    return StepReport(
        step=step,
        num_steps=num_steps,
        loss=4.25,
        unsharded_loss=4.5,
        tokens_per_s=12345.6,
        unsharded_tokens_per_s=23456.7,
        max_load=1.5,
    )


def test_plain_progress_prints_the_first_the_last_and_every_nth_step(capsys):
    progress = PlainProgress()
    for step in range(1, 31):
        progress(report(step))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == [1, *range(2, 31, 2)]
    assert "4.2500" in lines[0]
    assert "12,346 tokens/s" in lines[0]


def test_relayed_steps_become_a_bar_and_other_lines_pass(capsys):
    RelayProgress()(report(1, num_steps=2))
    RelayProgress()(report(2, num_steps=2))
    first, second, _ = capsys.readouterr().out.split("\n")
    terminal = io.StringIO()
    output = RelayedOutput(terminal)
    # Pieces need not end where lines end.
    text = f"before\n{first}\n{second}\nafter\n"
    output.write(text[:30])
    output.write(text[30:])
    shown = terminal.getvalue()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "2/2" in shown
    assert "loss 4.250, unsharded 4.500" in shown
    assert json.dumps("max_load") not in shown


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "must divide the 16 experts"),
        (["--steps", "0"], "num_steps must be at least 1"),
        (["--out", "no/such/folder/picture.png"], "--out must name a file in a folder that exists"),
    ],
)
def test_wrong_options_end_with_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_missing_extra_is_named(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("the demo needs matplotlib; install the extra with pip install deep-ep-ep[demo]")


def run_program(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)


def test_short_demo_trains_agrees_and_draws(tmp_path):
    picture = tmp_path / "demo.png"
    ended = run_program("-m", "deep_ep_ep.demo", "--ranks", "2", "--steps", "4", "--seed", "1", "--out", str(picture))
    assert ended.returncode == 0, ended.stderr
    assert "the sharded and the unsharded run AGREE" in ended.stdout
    assert "step    4/4" in ended.stdout
    assert "parameters, experts" in ended.stdout
    assert "dispatch and combine: collective backend" in ended.stdout
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.gpu
def test_demo_on_one_gpu_uses_the_device_backend_and_agrees(gpu_rank_pool, tmp_path, monkeypatch):
    """Four ranks of one GPU: the same comparison and tolerances as on CPUs."""
    # Its MPS server would share the GPU with that of the demo's ranks.
    gpu_rank_pool.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", find_gpus(os.environ)[0])
    options = ["--device", "cuda", "--ranks", "4", "--steps", "30", "--out", str(tmp_path / "demo.png")]
    ended = run_program("-m", "deep_ep_ep.demo", *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "dispatch and combine: device backend" in ended.stdout
    assert "ranks: 4 on cuda" in ended.stdout
    assert "the sharded and the unsharded run AGREE" in ended.stdout


# Experts that are one off: what a mistake in the order of experts or ranks would do.
MISROUTED_DEMO = """\
import sys
from deep_ep_ep.demo.__main__ import main
from deep_ep_ep.demo.sharded import ExpertsAcrossRanks

run = ExpertsAcrossRanks.run
ExpertsAcrossRanks.run = lambda self, experts, x, topk_idx, topk_weights: run(
    self, experts, x, (topk_idx + 1) % 16, topk_weights
)
sys.exit(main(sys.argv[1:]))
"""


def test_misrouted_tokens_make_the_demo_fail(tmp_path):
    program = tmp_path / "misrouted_demo.py"
    program.write_text(MISROUTED_DEMO)
    options = ["--steps", "2", "--out", str(tmp_path / "demo.png")]
    ended = run_program("-m", "deep_ep_core.launch", "--ranks", "2", "--no-prefix", str(program), *options)
    assert ended.returncode == 1, ended.stderr
    assert "DISAGREE" in ended.stderr
    assert "training loss: differs by" in ended.stderr
    assert "run AGREE" not in ended.stdout
