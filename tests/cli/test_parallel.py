"""`torchrun -m cl`: one run in two processes, one folder, one sentence when something is wrong; compiled networks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cl.cli.main import main
from cl.config import TrainerConfig
from cl.core import UserError
from cl.ledger import Ledger
from cl.result import Result

RUN = ("run", "tracking=none", "debug=tiny", "limit_experiences=2", "strategy=replay", "trainer.batch_size=17")


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", "cl"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.slow
def test_two_processes_share_one_folder_and_one_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    assert main((*RUN, "hydra.run.dir=alone")) == 0
    done = torchrun(*RUN, "trainer.parallel=ddp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    (folder,) = Path("runs").glob("*/*")
    alone, both = (Result.load(path / "result.json") for path in (Path("alone"), folder))
    assert torch.allclose(torch.tensor(alone.R), torch.tensor(both.R), atol=1e-5)
    assert {path.name for path in folder.iterdir()} == {path.name for path in Path("alone").iterdir()}


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    assert main((*RUN, "hydra.run.dir=whole", "trainer.checkpoint_every=5")) == 0
    shutil.copytree("whole", "half")
    (newest,) = Path("half").glob("checkpoints/step-000000040.pt")
    newest.unlink()
    path = Path("half/result.json")
    path.write_text(path.read_text().replace('"status": "done"', '"status": "interrupted"'))
    done = torchrun("resume", "half", "trainer.parallel=fsdp")
    assert done.returncode == 0, done.stderr
    whole, half = (Result.load(Path(name) / "result.json") for name in ("whole", "half"))
    assert half.status == "done" and torch.allclose(torch.tensor(whole.R), torch.tensor(half.R), atol=1e-5)


@pytest.mark.slow
def test_processes_without_a_wrapper_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = torchrun(*RUN)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cl: ")]
    assert said == ["cl: 2 processes were started and trainer.parallel is 'none'; set it to ddp or fsdp"]
    assert not list(Path("runs").glob("*/*")), "nothing was begun"


@pytest.mark.slow
def test_what_one_process_alone_finds_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other, which waits for it in training, ends too."""
    monkeypatch.chdir(tmp_path)
    Path("text-0.txt").write_text("to be or not to be\n" * 200)
    Path("eval.txt").write_text("that is the question\n" * 200)
    domain = "{name: a, path: 'text-${oc.env:RANK}.txt', eval_path: eval.txt}"
    words = ("run", "tracking=none", "debug=tiny", "backbone=gpt", "stream=text_domains", "trainer.parallel=ddp")
    done = torchrun(*words, f"stream.domains=[{domain}]", "out=run")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cl: ")]
    assert [line for line in said if "another process of this run ended" not in line] == [
        "cl: domain 'a': no txt, jsonl or parquet at text-1.txt; "
        "data.root is not set, so it is looked for from the working directory"
    ], done.stderr


def test_what_several_find_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By whichever comes first, since torchrun ends the others then; what one finds alone is heard of any."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    setting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in (setting | {"WORLD_SIZE": 2}).items():
        monkeypatch.setenv(name, str(value))

    def said(rank: int, folder: str, attempt: int = 0) -> str:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert main(("resume", folder)) == 2
        return capsys.readouterr().err

    sentence = "cl: nowhere is not a run folder: it has no config.yaml\n"
    assert [said(rank, "nowhere") for rank in (1, 0, 2)] == [sentence, "", ""]
    assert said(1, "elsewhere") == sentence.replace("nowhere", "elsewhere")
    assert said(0, "nowhere", attempt=1) == sentence, "torchrun starts processes again, and they have not said it"


def meet(store: Path, rank: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    dist.barrier()


def test_a_process_that_is_gone_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gloo names a line of its source and wishes good luck."""
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if child == 0:
        meet(Path("store"), 1)
        os._exit(0)
    try:
        meet(Path("store"), 0)
        os.waitpid(child, 0)
        with pytest.raises(RuntimeError, match="gloo/transport") as caught:
            dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()

    def watch(*details: object) -> None:
        raise caught.value

    monkeypatch.setattr(Ledger, "watch", watch)
    monkeypatch.setenv("RANK", "0")
    assert main((*RUN, "out=run")) == 1
    result = Result.load(Path("run/result.json"))
    assert result.error.startswith("another process of this run ended or does not answer")
    assert capsys.readouterr().err == f"cl: {result.error}\n"
    assert "gloo/transport" in Path("run/run.log").read_text(), "for whoever looks into it"


def test_one_process_may_ask_for_a_wrapper_and_trains_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the config of a run of several goes on in one; what it is told is one line, in the log too."""
    monkeypatch.chdir(tmp_path)
    assert main((*RUN[:-2], "strategy=derpp", "trainer.parallel=fsdp", "hydra.run.dir=run")) == 0
    told = "trainer.parallel is 'fsdp' and this is the only process; start several with torchrun"
    said = capsys.readouterr()
    assert f"note: {told}" in " ".join(said.out.split()) and not said.err
    assert said.out.count("trainer.parallel is") == Path("run/run.log").read_text().count(told) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(("resume", "run")) == 0
        heard.append(capsys.readouterr().out.count("this run is done"))
    assert heard == [1, 0], "the first process speaks for all"


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"trainer\.parallel is 'tp'; it must be one of none, ddp, fsdp"):
        TrainerConfig(parallel="tp")
    with pytest.raises(UserError, match=r"trainer\.compile is 'yes'; it must be one of True, False"):
        TrainerConfig(compile="yes")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_network_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    words = (*RUN, "backbone=gpt", "stream=builtin_text", "backbone.width=16", "backbone.num_layers=1")
    words += ("backbone.num_heads=2", "stream.context=32", "trainer.eval_rows=10", "trainer.max_steps=5")
    assert main((*words, "hydra.run.dir=plain")) == 0
    assert main((*words, "trainer.compile=true", "hydra.run.dir=compiled")) == 0
    plain, compiled = (Result.load(Path(name) / "result.json") for name in ("plain", "compiled"))
    assert torch.allclose(torch.tensor(plain.R), torch.tensor(compiled.R), atol=1e-4)
    states = [torch.load(max(Path(n).glob("checkpoints/*")), weights_only=True) for n in ("plain", "compiled")]
    assert states[0]["state"]["model"].keys() == states[1]["state"]["model"].keys(), "checkpoints are interchangeable"
    assert states[0]["fingerprint"] == states[1]["fingerprint"]
