"""What starts quickly: `--help` and `import qnpu_jax` load nothing that takes long."""

import inspect
import subprocess
import sys
from importlib import metadata
from typing import get_args

import pytest

from qnpu_jax import choices
from qnpu_jax.cli import compilers as compiler_commands
from qnpu_jax.compilers import ethos, hexagon
from qnpu_jax.latency import phone
from qnpu_jax.recipes import EFFORTS
from qnpu_jax.tflite import FORMS, HEXAGON_FORM
from qnpu_jax.tflite.interpreter import RESOLVERS

HEAVY = {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "transformers", "tokenizers"}
HEAVY |= {"ai_edge_litert", "gguf", "safetensors", "qnpu_sim", "huggingface_hub", "jinja2"}
HEAVY |= {"matplotlib", "rich.progress"}


def imported(code: str) -> set[str]:
    """Modules that a new process has imported after `code`."""
    show = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
    done = subprocess.run(
        [sys.executable, "-c", show + code], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["bench", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"import sys; sys.argv = {['qnpu', *arguments]}; from qnpu_jax.cli import main; main()"
    found = imported(code)
    assert "qnpu_jax.cli.commands" in found
    assert not found & HEAVY


def test_the_package_loads_nothing_heavy():
    found = imported("import qnpu_jax")
    assert "qnpu_jax" in found
    assert not found & HEAVY


def test_a_command_loads_what_it_needs():
    """That the two tests above see what is imported."""
    assert {"jax", "numpy"} <= imported("import qnpu_jax.job")


def test_choices_are_those_of_the_code():
    def same(choice, of) -> bool:
        return get_args(choice) == tuple(of)

    assert same(choices.EffortName, EFFORTS)
    assert same(choices.KernelSet, (*RESOLVERS, "tf"))
    assert same(choices.FormName, FORMS)
    assert same(choices.Snapdragon, hexagon.SOCS)
    assert same(choices.EthosU, ethos.ACCELERATORS)
    assert same(choices.Delegate, phone.DELEGATES)
    for command in (compiler_commands.compile, compiler_commands.compare):
        assert inspect.signature(command).parameters["profile"].default == HEXAGON_FORM


def test_version(qnpu):
    assert qnpu("--version") == (0, f"qnpu {metadata.version('qnpu')}\n", "")
