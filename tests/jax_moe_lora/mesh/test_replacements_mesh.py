"""Whole embeddings and heads on a mesh: every device has a copy, and nothing else changes."""

import pytest

from support.meshes import run_on_devices


@pytest.mark.slow(25)
def test_whole_matrices_on_a_mesh_give_the_logits_of_one_device_and_come_and_go():
    (report,) = run_on_devices(8, "mesh_replacements", "data=2,expert=2,tensor=2")
    assert report["error"] < 1e-5, report
    assert report["compilations"] == 0, report
    assert report["same_after_reloading"], report
    assert report["base_is_exact"], report
    assert report["matter"] > 0.1, report
