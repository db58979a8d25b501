"""What a start costs, as the libraries that it imports: the package, its names, and the commands that read files."""

import json
import pickle
import subprocess
import sys

import pytest

import jax_moe_lora
import jax_moe_lora.inspect
import jax_moe_lora.parity
from jax_moe_lora.demo.run import data_folder

MODEL, SORT = str(data_folder() / "model"), str(data_folder() / "adapters" / "sort")
SLOW = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "matplotlib", "huggingface_hub"}
# Prints [exit code, top-level modules that are imported by then] of each command line.
COMMANDS = """
import contextlib, io, json, sys
from jax_moe_lora.cli.main import main
ran = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["jax-moe-lora", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    ran.append([code, sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(ran))
"""


def python(code: str, *arguments: str) -> str:
    """What code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(code: str) -> set[str]:
    """The slow libraries among what code imports."""
    return SLOW & set(json.loads(python(f"{code}; import json, sys; print(json.dumps(list(sys.modules)))")))


def test_importing_the_package_imports_nothing_slow():
    assert imported_by("import jax_moe_lora, jax_moe_lora.errors, jax_moe_lora.inspect, jax_moe_lora.parity") == set()


def test_making_probes_imports_no_torch():
    probes = "from jax_moe_lora import MoEConfig, parity; parity.probes(MoEConfig(8, 8, 2, 1))"
    assert imported_by(f"{probes}; parity.torch_reference") == set()


def test_a_model_needs_jax_alone():
    assert imported_by("from jax_moe_lora import Model") == {"jax", "jaxlib"}


def test_commands_that_read_files_import_no_jax():
    commands = {
        ("--help",): 0,
        ("--version",): 0,
        ("train", "--help"): 0,
        ("bench", "--help"): 0,
        ("parity", "--help"): 0,
        ("scaling", "--help"): 0,
        ("families",): 0,
        ("families", "--json"): 0,
        ("inspect", MODEL): 0,
        ("inspect", SORT, "--json"): 0,
        ("validate", SORT, "--model", MODEL): 0,
        ("validate", SORT, "--model", MODEL, "--deep", "--json"): 0,
        ("validate", MODEL, "--model", MODEL): 1,
        ("inspect", "no-such-folder"): 2,
        ("no-such-command",): 2,
    }
    ran = json.loads(python(COMMANDS, json.dumps(list(commands))))
    for (command, expected), (code, modules) in zip(commands.items(), ran, strict=True):
        assert (code, SLOW & set(modules)) == (expected, set()), command


@pytest.mark.parametrize(
    "package", [jax_moe_lora, jax_moe_lora.inspect, jax_moe_lora.parity], ids=lambda package: package.__name__
)
def test_every_public_name_is_there(package):
    assert set(package.__all__) <= set(dir(package))
    taken: dict[str, object] = {}
    exec(f"from {package.__name__} import *", taken)
    for name in package.__all__:
        assert taken[name] is getattr(package, name)
        assert pickle.loads(pickle.dumps(taken[name])) == taken[name]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name
