"""A pruned model as a folder that plain transformers reads, whichever version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_comp.checkpoint.rope import portable
from optimum_comp.checkpoint.tokenizer import save_tokenizer
from optimum_comp.configuration import CompConfig
from optimum_comp.files import write_record
from optimum_comp.report.model_card import model_card
from optimum_comp.report.run import REPORT_NAME, CompReport


def fill_folder(
    folder: Path,
    *,
    tokenizer: Any,
    config: CompConfig,
    report: CompReport,
    source: str | None,
    source_arguments: dict[str, Any],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write what belongs to a pruned model beside its weights: portable config, tokenizer, side-cars and model card.

    Args:
        folder: holds weights, config and generation config already.
        tokenizer: saved too; `None` if there is none.
        config: what was asked.
        report: what was done.
        source: folder or hub id of the dense model.
        source_arguments: how it was found.
        record: what the folder is to be known by, written as `STAGE_RECORD`; `None` for none.
    """
    write_portable_config(folder / "config.json")
    save_tokenizer(folder, tokenizer, source, source_arguments)
    config.save_pretrained(folder)
    report.save(folder)
    model_card(report, config, base_model=source).save(folder / "README.md")
    if record is not None:
        write_record(folder, record)


def copy_side_cars(source: Path, folder: Path) -> None:
    """Copy what says how a folder was pruned into a folder that is made of it; nothing where it wasn't."""
    for name in (CompConfig.CONFIG_NAME, REPORT_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def upload(folder: Path, repo_id: str, **kwargs: Any) -> str:
    """Upload a saved folder to the hub and return the repository's URL.

    Args:
        folder: a finished model.
        repo_id: `namespace/name`, or a name in the user's namespace.
        kwargs: `token`, `private`, `commit_message`, `revision`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    url = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    message = kwargs.pop("commit_message", "Upload model pruned with optimum-comp")
    api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, **kwargs)
    return str(url)


def write_portable_config(path: Path) -> None:
    """Write the rotary settings in the words of transformers 4 and of transformers 5, whoever wrote the file.

    Raises:
        ValueError: what the file says in one can't be said in the other.
    """
    written = json.loads(path.read_text(encoding="utf-8"))
    config = portable(written)
    if config != written:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
