"""A process that dies or never arrives makes the others stop with one sentence, and nobody hangs.

That takes less than 30 seconds by the limits that jax is given; how long it takes here is not measured.
"""

import re

import pytest

from jax_moe_lora import Model
from jax_moe_lora.mesh.processes import SILENCE_SECONDS, START_SECONDS
from support.checkpoints import write
from support.process_faults import PROMPT
from support.processes import environment, free_port, outputs, start

MARGIN = 9  # jax waits 5 seconds longer for those who do not arrive
SENTENCE = re.compile(r"^jax-moe-lora: Process (\d) of (\d) stopped: (.*)$", re.MULTILINE)


def one_sentence(err: str) -> str:
    ((_, _, sentence),) = SENTENCE.findall(err)
    return sentence


@pytest.mark.slow(60)
@pytest.mark.parametrize(
    ("mesh", "count", "victim"),
    [("expert=2", 2, 0), ("data=2,expert=2", 4, 3)],
    ids=["process 0 of 2", "process 3 of 4"],
)
def test_a_process_that_is_killed_while_decoding_stops_the_others(tmp_path, mesh, count, victim):
    write(tmp_path / "model", num_hidden_layers=1, mlp_only_layers=[], num_experts=4)
    port = free_port()
    command = ["-m", "support.process_faults", str(tmp_path / "model"), mesh, "900"]
    processes = [start(command, environment(number, count, port)) for number in range(count)]
    model = Model.from_pretrained(tmp_path / "model", dtype="float32", max_adapters=1, max_rank=16)
    wanted = [token.token_id for token in model.stream(PROMPT, max_new_tokens=32, ignore_eos=True)]
    tokens = [[process.stdout.readline().strip() for _ in range(8)] for process in processes]
    processes[victim].kill()
    ended = outputs(processes)
    assert tokens == [[str(token) for token in wanted[:8]]] * count, "\n".join(err[-3000:] for _, _, err in ended)
    for number, (code, _, err) in enumerate(ended):
        if number != victim:
            assert code not in (0, None), err[-3000:]
            assert "another process ended or was silent for 15 s" in one_sentence(err)


@pytest.mark.slow(15)
def test_a_process_that_never_arrives_stops_the_others(tmp_path):
    port = free_port()
    command = ["-m", "support.process_faults", str(tmp_path), "expert=2", "3"]
    processes = [start(command, environment(number, 3, port)) for number in (0, 2)]
    for code, _, err in outputs(processes):
        assert code not in (0, None)
        assert "the others did not all arrive within 3 s" in one_sentence(err)


def test_the_limits_that_jax_is_given_are_below_thirty_seconds():
    assert SILENCE_SECONDS + MARGIN < 30
    assert START_SECONDS + MARGIN < 30


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a whole number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "The process id is 2 of 2 processes; expected 0 to 1"),
    ],
)
def test_variables_that_are_none_are_refused(monkeypatch, variables, sentence):
    from jax_moe_lora import ProcessError
    from jax_moe_lora.mesh.processes import initialize

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=sentence):
        initialize()
