"""Files from the Hugging Face hub, where every refusal names the way out in one line."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from prdp_fast.core.errors import UserError


def hub_file(what: str, name: str, filename: str, *, lacking: str) -> Path:
    """Fetch a file, or find it in the hub's cache.

    Args:
        what: opens an error, e.g. "model.pretrained 'name'".
        name: a hub id that is no directory here.
        lacking: what to say of a repository that has no such file.
    Raises: UserError.
    """
    try:
        return Path(hf_hub_download(name, filename))
    except GatedRepoError:
        reason = f"is gated; accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a directory nor a model on the hub; check the name, and for a private model run `hf auth login`"
    except HFValidationError:
        reason = "is neither a directory nor a hub id (owner/name); check the path"
    except LocalEntryNotFoundError:
        reason = "is no directory and not in the hub's cache, and the hub is out of reach; check the name and the network"
    except EntryNotFoundError:
        reason = f"has no {filename} on the hub; {lacking}"
    except (HfHubHTTPError, OSError) as error:
        reason = f"is no directory, and the hub did not give it ({type(error).__name__}); check the network and `hf auth login`"
    except (ImportError, ValueError) as error:  # a socks proxy without its package, a scheme that is none
        said = str(error).partition(".")[0][:200]
        reason = f"is no directory, and the hub cannot be asked through the proxy that is set ({said}); mend or unset ALL_PROXY"
    raise UserError(f"{what} {reason}")


def upload(directory: Path, repository: str) -> str:
    """Push a directory to the hub as `repository`, which is made, private, if it is not there. Returns: where it is."""
    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Model and card, by prdp_fast"))
