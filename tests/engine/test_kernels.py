"""Where kernels are compiled, by whom, how often, and what a run says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from local_steps import images_of
from potluck import CNN, Cluster, FedAvg, Loop, Task, Workers, rounds
from potluck.engine import TorchRuntime, fused_sgd
from potluck.engine.module.plain import is_observed
from potluck.engine.native import compiler, lstm, max_pool
from potluck.engine.native.kernels import kernels_of
from potluck.engine.vmap import compile_later
from potluck.models.language import CharLSTM

COMPILER = next(filter(None, map(shutil.which, compiler.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """A file with a line for each library that a compiler is started for."""
    folder, log = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    wrapper = folder / compiler.COMPILERS[0]
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-shared*) echo "$*" >> {log}; sleep 0.5;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    log.touch()
    return log


def weights_of(executor) -> np.ndarray:
    algorithm = FedAvg(client_lr=0.1, local_epochs=1, batch_size=2)
    with closing(executor):
        task = executor._task
        *_, last = rounds(algorithm, task, cohort=1.0, num_rounds=1, executor=executor)
    return last.weights


@needs_compiler
def test_two_workers_start_one_compiler(cold_kernels, compilations):
    task = Task(model=CNN, data=images_of(8, 28, 28))
    trained = weights_of(Workers(task, 2))
    assert len(compilations.read_text().splitlines()) == 1
    assert len(list(cold_kernels.glob("max_pool-*.so"))) == 1
    np.testing.assert_array_equal(trained, weights_of(Loop(task)))
    assert len(compilations.read_text().splitlines()) == 1


@needs_compiler
def test_two_workers_of_a_cluster_start_one_compiler(cold_kernels, compilations):
    ray = pytest.importorskip("ray")
    task = Task(model=CNN, data=images_of(8, 28, 28))
    ray.shutdown()  # that of another test has another folder
    trained = weights_of(Cluster(task, 2, local="loop"))
    ray.shutdown()
    assert len(compilations.read_text().splitlines()) == 1
    np.testing.assert_array_equal(trained, weights_of(Loop(task)))


@needs_compiler
def test_processes_that_know_nothing_of_each_other_start_one_compiler(cold_kernels, compilations):
    code = "from potluck.engine.native import max_pool; assert max_pool.library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(compilations.read_text().splitlines()) == 1


@needs_compiler
def test_another_version_of_the_compiler_makes_another_library(
    cold_kernels, compilations, monkeypatch
):
    first = max_pool.library()
    compiler.library.cache_clear()
    assert max_pool.library().name == first.name
    compiler.library.cache_clear()
    monkeypatch.setattr(compiler, "_version", lambda path: "c++ 99")
    assert max_pool.library().name != first.name
    assert len(compilations.read_text().splitlines()) == 2


@needs_compiler
def test_the_folder_is_apart_from_the_data_and_for_its_user_alone(
    cold_kernels, tmp_path, monkeypatch
):
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "data"))
    before = os.umask(0)
    try:
        assert max_pool.library() is not None
    finally:
        os.umask(before)
    assert cold_kernels.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "data").exists()


def given_away(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("root alone gives files away")
    os.chown(path, 12345, 12345)


FAULTS = {
    "a folder that all may write to": lambda folder, file: folder.chmod(0o777),
    "a folder that a group may write to": lambda folder, file: folder.chmod(0o770),
    "one inside of such a folder": lambda folder, file: folder.parent.chmod(0o777),
    "a file that all may write to": lambda folder, file: file.chmod(0o777),
    "another user's folder": lambda folder, file: given_away(folder),
    "one inside of such a folder of another user": lambda folder, file: given_away(folder.parent),
    "another user's file": lambda folder, file: given_away(file),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_what_another_user_could_have_put_there_is_refused_in_words_once(
    cold_kernels, fault, caplog
):
    assert max_pool.library() is not None
    (file,) = cold_kernels.glob("*.so")
    compiler.library.cache_clear()
    FAULTS[fault](cold_kernels, file)
    task = Task(model=CNN, data=images_of(8, 28, 28))
    weights_of(Workers(task, 2))
    weights_of(Loop(task))
    assert max_pool.library() is None
    (said,) = caplog.messages
    assert "poolings are not compiled" in said
    assert "must be this user's" in said
    assert "XDG_CACHE_HOME" in said


@needs_compiler
def test_a_folder_of_this_user_that_others_could_read_is_closed_and_used(cold_kernels):
    cold_kernels.mkdir()
    cold_kernels.chmod(0o755)
    cold_kernels.parent.chmod(0o1777)  # as /tmp is: nobody may rename what is another's
    assert max_pool.library() is not None
    assert cold_kernels.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_folder_that_another_user_could_unpickle_from_is_not_compiled_in(
    cold_kernels, tmp_path, monkeypatch
):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cold_kernels.mkdir(mode=0o700)
    cold_kernels.chmod(0o777)
    with pytest.raises(PermissionError, match="must be this user's"):
        compile_later._compiled(torch.neg)
    named = tmp_path / "named"
    named.mkdir()
    named.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(named))
    with pytest.raises(PermissionError, match="must be this user's"):
        compile_later._compiled(torch.neg)


@needs_compiler
def test_kernels_are_named_for_the_models_that_use_them(cold_kernels, monkeypatch):
    assert kernels_of(nn.Linear(2, 2)) == kernels_of(CharLSTM(hidden=16)) == "none"
    assert not cold_kernels.exists()
    name = kernels_of(CNN())
    assert [f"{name}.so"] == [path.name for path in cold_kernels.glob("*.so")]
    assert kernels_of(CharLSTM(hidden=128)).startswith("lstm-")
    monkeypatch.setenv("POTLUCK_NATIVE", "0")
    compiler.library.cache_clear()
    assert kernels_of(CNN()) == "none"


PRIVATE = {
    "transformations": (torch._C._functorch, "peek_interpreter_stack"),
    "function modes": (torch._C, "_len_torch_function_stack"),
    "dispatch modes": (torch._C, "_len_torch_dispatch_stack"),
    "forward differentiation": (torch.autograd.forward_ad, "_current_level"),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_pytorch_nothing_is_fused_and_all_goes_on(name, monkeypatch):
    task = Task(model=CNN, data=images_of(8, 28, 28))
    expected = weights_of(Loop(task))
    monkeypatch.delattr(*PRIVATE[name])
    assert is_observed()
    np.testing.assert_allclose(weights_of(Loop(task)), expected, rtol=0, atol=1e-6)


def test_without_the_private_product_pytorchs_own_is_taken(monkeypatch):
    class Nothing:
        """As `torch.ops.mkldnn` of a PyTorch that has lost the operator."""

    task = Task(model=CNN, data=images_of(8, 28, 28))
    expected = weights_of(Loop(task))
    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    fused_sgd._has_onednn.cache_clear()
    try:
        np.testing.assert_allclose(weights_of(Loop(task)), expected, rtol=0, atol=1e-6)
        assert not fused_sgd._has_onednn()
    finally:
        fused_sgd._has_onednn.cache_clear()


@pytest.mark.parametrize("name", ["torch._inductor.config", "torch._inductor"])
def test_without_the_private_parts_of_its_compiler_a_function_goes_on(
    name, cold_kernels, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    later = compile_later.CompiledLater(torch.neg, after_seconds=0.0)
    for _ in range(2):
        assert later(torch.ones(2)).tolist() == [-1.0, -1.0]
    assert later.num_compiled == 0


@needs_compiler
def test_lstms_too_are_compiled_before_processes_are_forked(cold_kernels, monkeypatch):
    called = []
    monkeypatch.setattr(lstm, "library", lambda: called.append(os.getpid()))
    assert kernels_of(nn.LSTM(8, 128)) == "none"
    assert called == [os.getpid()]


def test_a_runtime_without_kernels_has_pytorchs_layers(cold_kernels, monkeypatch):
    monkeypatch.setenv("POTLUCK_NATIVE", "0")
    runtime = TorchRuntime(Task(model=CNN, data=images_of(8, 28, 28)), one_thread=True)
    assert [type(layer) for layer in runtime._layers.layers] == [nn.Linear]
