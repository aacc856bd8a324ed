"""Two processes on a CPU do what one does: the same steps, from the same rows; and one goes on where two stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_nb as ln
from lora_nb.errors import TrainingError
from lora_nb.training import distributed, loop
from lora_nb.training.sampler import Sampler
from tests.text import PAD, PAIRS, byte_llama, byte_tokenizer

ROOT = Path(__file__).parents[2]


def settings(folder: str | None = None, **changes) -> ln.TrainConfig:
    """Batches of three rows: the processes' shares are unequal, and an epoch's last batch is one row, for one of them."""
    kept = {"checkpoint_dir": folder, "checkpoint_every": 2} if folder else {}
    return ln.TrainConfig(**{"max_steps": 6, "batch_size": 3, "seq_len": 64, "warmup_steps": 0, "learning_rate": 5e-3} | kept | changes)


def adapted(seed: int = 0) -> nn.Module:
    model = byte_llama()
    torch.manual_seed(seed)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12))
    return model


def gradients(model: nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Of the first step, after the processes have shared them."""
    work = loop._prepare(model, PAIRS.encode(byte_tokenizer(), 64), PAD, settings())
    with torch.no_grad():
        for i, p in enumerate(ln.parameters(model).values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    loss, _ = loop._accumulate(work, work.sampler.step(0), 0)
    distributed.sum_gradients(list(ln.parameters(model).values()))
    return loss, [p.grad for p in ln.parameters(model).values()]


def everything(folder: str) -> None:
    """What a process does: prints what it found, each on a line of its own file."""
    rank, _ = distributed.start()
    loss, grads = gradients(adapted(seed=rank))
    model = adapted(seed=rank)  # as if the caller had not set the seed
    run = ln.train(model, byte_tokenizer(), PAIRS, settings(folder, max_steps=4))
    sharded = "not tried"
    if dist.is_initialized() and dist.get_world_size() > 1:
        divided = adapted(seed=0)
        whole = sum(p.numel() for p in divided.parameters())
        distributed.shard(divided)
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in divided.parameters())
        sharded = {"losses": ln.train(divided, byte_tokenizer(), PAIRS, settings(max_steps=4)).losses, "share": held / whole}
    found = {
        "loss": loss,
        "gradients": [g.tolist() for g in grads],
        "losses": run.losses,
        "tokens": run.tokens,
        "adapter": [p.tolist() for p in ln.parameters(model).values()],
        "sharded": sharded,
    }
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))


def launched(words: list[str], folder: Path) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*words, __file__, str(folder)], env=environment, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("found-*.json"))]


LAUNCHERS = {  # accelerate starts several processes on CPUs by mpirun, or by its way for GPUs, whose absence the loop sees
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one(launcher: str, tmp_path: Path) -> None:
    two = launched([sys.executable, *LAUNCHERS[launcher]], tmp_path)
    assert len(two) == 2
    assert two[0]["gradients"] == two[1]["gradients"]
    assert two[0]["adapter"] == two[1]["adapter"]

    loss, grads = gradients(adapted())
    assert two[0]["loss"] == pytest.approx(loss, rel=1e-6)
    for mine, theirs in zip(two[0]["gradients"], grads, strict=True):
        assert (torch.tensor(mine) - theirs).norm() <= 1e-6 * theirs.norm()

    one = adapted()
    run = ln.train(one, byte_tokenizer(), PAIRS, settings(max_steps=4))
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(run.losses, rel=1e-5)
    assert two[0]["tokens"] <= run.tokens  # each pads its own rows only

    sharded = two[0]["sharded"]
    assert sharded["losses"] == pytest.approx(run.losses, rel=1e-5)
    assert 0.5 < sharded["share"] < 0.9  # layers are halved; embeddings and head are not

    resumed = adapted(seed=7)
    longer = ln.train(resumed, byte_tokenizer(), PAIRS, settings(str(tmp_path), max_steps=6, resume=True, lr_scheduler_type="linear"))
    assert longer.losses[:4] == two[0]["losses"]
    assert longer.steps == 6


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_launcher_within_a_program(tmp_path: Path) -> None:
    """`debug_launcher` is accelerate's `notebook_launcher` for CPUs: it forks two processes from a running one."""
    program = tmp_path / "cell.py"
    program.write_text(
        "import sys\nfrom accelerate import debug_launcher\nfrom tests.training.test_distributed import everything\n"
        "if __name__ == '__main__':\n    debug_launcher(everything, args=(sys.argv[2],), num_processes=2)\n"
    )
    two = launched([sys.executable, str(program)], tmp_path)
    assert len(two) == 2
    assert two[0]["adapter"] == two[1]["adapter"]
    assert two[0]["losses"] == pytest.approx(ln.train(adapted(), byte_tokenizer(), PAIRS, settings(max_steps=4)).losses, rel=1e-5)


def test_shares_of_a_batch_make_the_batch() -> None:
    blocks = PAIRS.encode(byte_tokenizer(), 64)
    for batch_size in (1, 3, 4):
        chosen = settings(batch_size=batch_size)
        whole, *shares = (Sampler(blocks, chosen, PAD, share=share) for share in ((0, 1), (0, 3), (1, 3), (2, 3)))
        for number in range(8):
            rows = [share.forward(number).rows for share in shares]
            assert sorted(row for share in rows for row in share) == sorted(whole.forward(number).rows)
            for share, mine in zip(shares, rows, strict=True):
                labels = share.forward(number).labels
                assert len(labels) == max(1, len(mine))
                assert bool((labels != -100).any()) == bool(mine)


def test_one_process_alone_asks_nobody() -> None:
    assert distributed.start() == (0, 1)
    assert distributed.summed([2.5, 3], torch.device("cpu")) == [2.5, 3]
    assert distributed.anywhere(said=True, device=torch.device("cpu"))
    assert distributed.first()
    with pytest.raises(TrainingError, match=r"several processes.*torchrun"):
        distributed.shard(adapted())


if __name__ == "__main__":
    everything(sys.argv[1])
