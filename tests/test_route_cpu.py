"""How the fused CPU operator is built and called (kernels/route_cpu.py); test_kernels.py compares it with float64."""

import ctypes
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from kernels import route, route_cpu
from tests.conftest import ROOT
from tests.test_kernels import FLOAT, compare, defined, draw, evaluate, fused


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / f"dar-{os.getuid()}"


def test_it_is_built_once_and_again_if_broken(cache, monkeypatch, capsys):
    """By several processes at once; then a library that ends too early, or was altered, is not loaded."""
    monkeypatch.setattr(route_cpu, "FLAGS", "-O1 -fPIC")  # in less time
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=route_cpu._loaded) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (library,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    whole = library.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5000] + b"x" + whole[5001:], b""):
        library.unlink()  # not the file that this process may have loaded
        library.write_bytes(broken)
        capsys.readouterr()
        assert isinstance(route_cpu._loaded(), ctypes.CDLL)
        assert "compiled route_cpu.c" in capsys.readouterr().err
        assert route_cpu._intact(library) and list(cache.iterdir()) == [library]
    monkeypatch.setenv("PATH", "")  # what is there needs no compiler
    assert isinstance(route_cpu._loaded(), ctypes.CDLL) and not capsys.readouterr().err
    monkeypatch.setattr(route_cpu, "_processor", lambda: "another one")  # of a shared home
    with pytest.raises(OSError, match="no C compiler"):
        route_cpu._loaded()


@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler -x", "no C compiler: no-such-comp"), ("false", "false cannot compile")]
)
def test_why_it_cannot_be_built(cache, monkeypatch, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(OSError, match=reason):
        route_cpu._loaded()
    assert not any(cache.iterdir())


def test_without_compiler_and_triton_there_is_pytorch(cache):
    """Nor is imported what is not used: transformers and diffusers take seconds."""
    program = """
        import sys
        sys.modules["triton"] = None  # as where it is not installed
        import torch, kernels, models.encoders
        from models.autoencoder import load_autoencoder
        device, v = torch.device("cpu"), torch.ones(1, 1, 3)
        assert torch.equal(kernels.route([v, 3 * v], torch.zeros(3), torch.ones(3)), 2 * v)
        assert load_autoencoder("pixels").channels == 3 and not {"diffusers", "transformers"} & sys.modules.keys()
        print(kernels.route_triton, kernels.resolve_backend("auto", device), kernels.why_not_fused(device))
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    command = dict(cwd=ROOT, env=os.environ | {"PATH": ""}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", program], **command)
    assert done.stdout.startswith("None torch no C compiler: cc: No such file"), done.stderr[-3000:]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    """They could have this user run their code."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(route_cpu.tempfile, "gettempdir", lambda: str(temporary))
    private = cache / f"dar-{os.getuid()}"
    assert route_cpu._folder() == private
    private.chmod(0o777)
    assert route_cpu._folder() == temporary / private.name
    (temporary / private.name).chmod(0o770)
    with pytest.raises(OSError, match="not this user's alone"):
        route_cpu._folder()


@pytest.mark.parametrize("rank", [1, 2, 3], ids=["D", "BD", "BTD"])
def test_any_shape(rank):
    """Random ones; blocks of rows that do not come out even, and more rows than a block has."""
    generator = torch.Generator().manual_seed(rank)
    for case in range(12):
        n, B, T, D = (int(torch.randint(1, most, (), generator=generator)) for most in (61, 5, 90, 200))
        inputs = draw(n, B, T, D, rank, seed=case, modulate=True)
        seen = ["x", "h", *(f"returned {i}" for i in range(0, n, 3))]
        # Of many sources some are 1000 times larger than others, and their sums round accordingly.
        functions = lambda given, **eps: fused(given, backend="cpu", **eps), defined
        compare(inputs, seen, forward=1e-5, backward=1e-4, functions=functions, eps=0.3, norm_eps=0.05)


@pytest.mark.parametrize("rank", [1, 3], ids=["D", "BTD"])
def test_threads_change_no_bit(rank):
    inputs = {name: v.requires_grad_() for name, v in draw(9, 7, 40, 65, rank, modulate=True).items()}
    seen, results = {"x": torch.randn(7, 40, 65), "returned 2": torch.randn(7, 40, 65)}, []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(lambda given: fused(given, backend="cpu"), inputs, seen))
    finally:
        torch.set_num_threads(1)
    for again in results[1:]:
        for expected, found in zip(results[0], again):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nan_is_passed_on_to_its_token_and_no_other():
    inputs = draw(3, 2, 5, 33, 2)
    inputs["source 1"][1, 2, 7] = float("nan")
    v = [inputs[f"source {i}"].requires_grad_() for i in range(3)]
    h = route(v, inputs["query"], inputs["norm_weight"], backend="cpu")
    gradients = torch.autograd.grad(h.sum(), v)
    for value in (h, *gradients):
        bad = value.isnan().any(-1)
        assert value[1, 2].isnan().all() and bad.sum() == 1


def test_loading_it_leaves_denormal_numbers_alone():
    """As -ffast-math would not."""
    assert not route_cpu.why_not() and (torch.tensor(1e-40, dtype=FLOAT) * 0.5).item() > 0
