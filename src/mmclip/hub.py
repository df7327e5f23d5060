"""Whether a pretrained model can be had, asked once, before libraries ask for a minute.

Of a folder that `mmclip export` wrote, whether it is whole.
"""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mmclip.exported import why_not_whole

TIMEOUT_S = 10
"""[chosen: long for an answer, short for a person]"""


def why_unavailable(name_or_folder: str) -> str | None:
    """Why a model is neither in a folder, nor in the hub's cache, nor to be had from the hub.

    Returns:
        A reason in a few words, with the next step where there is one; None where it can be had.
    """
    if Path(name_or_folder).is_dir():
        return why_not_whole(Path(name_or_folder))
    try:
        validate_repo_id(name_or_folder)
    except HFValidationError:
        return "there is no such folder, and no model of the Hugging Face hub can have this name"
    try:
        if isinstance(try_to_load_from_cache(name_or_folder, "config.json"), str):
            return None
        get_hf_file_metadata(hf_hub_url(name_or_folder, "config.json"), timeout=TIMEOUT_S)
    except GatedRepoError:
        return (
            f"it is gated: accept the terms at https://huggingface.co/{name_or_folder}, and set "
            f"HF_TOKEN to a token of that account"
        )
    except RepositoryNotFoundError:
        return (
            "not found: there is no such folder, and no such model of the Hugging Face hub "
            "that this account may see (of a private one, set HF_TOKEN)"
        )
    except EntryNotFoundError:
        return "the model of this name on the Hugging Face hub has no config.json"
    except Exception as error:  # noqa: BLE001 - of whichever HTTP library the hub's own uses
        said = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"not found, no network: it is no folder here, and the Hugging Face hub did not give "
            f"it: {said[0]}"
        )
    return None
