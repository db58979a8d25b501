"""Whether a model can serve an adapter, from two folders or a config: all that would stop or change it, at once."""

from pathlib import Path
from typing import Any

from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.formats.detect import check_b_layout
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.validation.config_object import examine_config, fields_of
from jax_moe_lora.adapters.validation.finding import Finding, finding_of
from jax_moe_lora.adapters.validation.folder import Report, Target, examine
from jax_moe_lora.arguments import flag, whole
from jax_moe_lora.errors import AdapterFormatError, CheckpointError
from jax_moe_lora.files.dtypes import check_dtype
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.quantised.summary import scale_problems
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.tools.read import model_config


def validate(
    adapter_folder: str | Path,
    model_folder: str | Path,
    deep: bool = False,
    *,
    max_rank: int = 64,
    dtype: str = "bfloat16",
    lora_b_layout: str | None = None,
) -> list[Finding]:
    """Everything that would stop `load_adapter`, or change what is served: by file and key, errors first.

    Reads configs and headers, and of the model its config alone. There is an error exactly where loading into a model
    of this `max_rank` and `dtype` raises one, but for what only the values of the weights tell: for these, `deep`. What
    holds for many tensors is one finding.

    Args:
      adapter_folder: the adapter to check.
      model_folder: the model that would serve it.
      deep: also read the adapter's weights, and report those that are not finite in `dtype`, all zero, or absurdly
        large; compare copies of the embeddings with the model's; and read the scales of a quantised model, and report
        those that are not finite or make values infinite.
      max_rank: as for `Model.from_pretrained`.
      dtype: as for `Model.from_pretrained`.
      lora_b_layout: as for `read_adapter`.

    Returns:
      The findings, errors first; empty where nothing is wrong.

    Raises:
      InputError: an argument is invalid.
    """
    return validate_folders(
        adapter_folder, model_folder, deep, max_rank=max_rank, dtype=dtype, lora_b_layout=lora_b_layout
    ).findings


def validate_folders(
    adapter_folder: str | Path,
    model_folder: str | Path,
    deep: bool,
    *,
    max_rank: int,
    dtype: str,
    lora_b_layout: str | None = None,
) -> Report:
    """As `validate`, with the adapter's layout and the bytes that it takes in a bank.

    Args:
      adapter_folder: as for `validate`.
      model_folder: as for `validate`.
      deep: as for `validate`.
      max_rank: as for `validate`.
      dtype: as for `validate`.
      lora_b_layout: as for `validate`.
    """
    check_b_layout(lora_b_layout)
    bank_dtype, deep = check_dtype(dtype), flag("deep", deep)
    max_rank, adapter, base = whole("max_rank", max_rank, 1), Path(adapter_folder), Path(model_folder)
    target, problems = None, Problems(keep=True)
    wrong: list[CheckpointError] = []
    with problems:
        if not base.is_dir():
            raise CheckpointError(
                f"There is no folder {base}; give one that exists.", file=base, found="no folder", expected="a folder"
            )
        config = read_model_config(base)
        names = adapter_names(config)
        wrong = list(scale_problems(base, config, bank_dtype)) if deep else []
        target = Target(
            adapter_sites(config),
            names,
            BaseCheckpoint(base, config.tie_embeddings),
            max_rank,
            bank_dtype,
            lora_b_layout,
        )
    for error in wrong:
        with problems:
            raise error
    report = Report([])
    with problems:
        if not adapter.is_dir():
            why = f"There is no folder {adapter}; give one that exists."
            raise AdapterFormatError(why, file=adapter, found="no folder", expected="a folder")
        report = examine(adapter, target, deep)
    return Report([*map(finding_of, problems.found), *report.findings], report.layout, report.bank_bytes)


def validate_config(config: Any, model: Any, *, max_rank: int = 64) -> list[Finding]:
    """Everything in the config of an adapter that is yet to be trained which would stop this library from serving it.

    Args:
      config: a `LoraConfig` of PEFT, its fields as a dictionary, or a list of target modules.
      model: what is to serve it: a folder or hub id, a `ModelConfig`, or a `Model`.
      max_rank: as for `Model.from_pretrained`.

    Returns:
      The findings, errors first: settings that are not supported, targets that the model does not have or that adapters
      cannot have here, ranks above `max_rank`; and as warnings, names and patterns that match nothing.

    Raises:
      InputError: an argument is invalid.
      ConfigError: the model's config is not read.
    """
    base, max_rank = model_config(model), whole("max_rank", max_rank, 1)
    names = adapter_names(base)
    return examine_config(*fields_of(config), adapter_sites(base), names, max_rank)
