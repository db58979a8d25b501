"""Whether a model can serve an adapter, from two folders: everything that would stop or change it, at once."""

from pathlib import Path

from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.validation.finding import Finding, finding_of
from jax_moe_lora.adapters.validation.folder import Report, Target, examine
from jax_moe_lora.arguments import whole
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import check_dtype
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.sites import adapter_sites


def validate(
    adapter_folder: str | Path,
    model_folder: str | Path,
    deep: bool = False,
    *,
    max_rank: int = 64,
    dtype: str = "bfloat16",
) -> list[Finding]:
    """Everything that would stop `load_adapter`, or change what is served: by file and key, errors first.

    Reads configs and headers, and of the model its config alone. There is an error exactly where loading into a model
    of this `max_rank` and `dtype` raises one, but for what only the values of the weights tell: for these, `deep`.

    Args:
      adapter_folder: the adapter to check.
      model_folder: the model that would serve it.
      deep: also read the adapter's weights, and report those that are not finite in `dtype`, all zero, or absurdly
        large.
      max_rank: as for `Model.from_pretrained`.
      dtype: as for `Model.from_pretrained`.

    Returns:
      The findings, errors first; empty where nothing is wrong.

    Raises:
      InputError: `max_rank` or `dtype` is invalid.
    """
    return validate_folders(adapter_folder, model_folder, deep, max_rank=max_rank, dtype=dtype).findings


def validate_folders(
    adapter_folder: str | Path, model_folder: str | Path, deep: bool, *, max_rank: int, dtype: str
) -> Report:
    """As `validate`, with the adapter's layout and the bytes that it takes in a bank."""
    bank_dtype = check_dtype(dtype)
    max_rank, adapter, problems = whole("max_rank", max_rank, 1), Path(adapter_folder), Problems(keep=True)
    target = None
    with problems:
        config = read_model_config(_existing(Path(model_folder)))
        names = family(config.model_type).ADAPTER_NAMES
        target = Target(adapter_sites(config), names, max_rank, bank_dtype)
    report = Report([])
    with problems:
        report = examine(_existing(adapter), target, deep)
    return Report([*map(finding_of, problems.found), *report.findings], report.layout, report.bank_bytes)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}; give one that exists.", file=folder, found="no folder", expected="a folder"
        )
    return folder
