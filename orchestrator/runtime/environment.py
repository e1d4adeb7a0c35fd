"""The only reader and writer of environment variables."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import sys
import tempfile
from pathlib import Path

from orchestrator.errors import EnvironmentFault


def limit_threads(count: int) -> None:
    """Keep this process to `count` threads of computation; numerics on CPU depend on it, so it is never ambient."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


def hide_gpus() -> None:
    """Keep this process off GPUs that it did not ask for; to be called before anything touches one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def visible_gpus() -> int | None:
    """Return how many GPUs CUDA_VISIBLE_DEVICES lets this process see; None if it is not set."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    ids = [part.strip() for part in listed.split(",")]
    return next((i for i, part in enumerate(ids) if part in ("", "-1", "NoDevFiles")), len(ids))


def ray_temp_folder() -> str:
    """Return the folder in which a Ray that is started here keeps its sessions, by Ray's own rule."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def prepare_deepspeed(on_gpu: bool) -> None:
    """Settings that DeepSpeed reads while it is imported."""
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Engine checkpoints are pickles: only tensors and the types listed in student.checkpoint are let through.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def lone_process() -> None:
    """Set the variables that a launcher would set for a process group of this process alone."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def tracking_uri() -> str | None:
    """The MLflow address a user has set for everything on this machine."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def vllm_key() -> str | None:
    """Return the key for a vLLM server that was started with --api-key; None if none is set."""
    return os.environ.get("VLLM_API_KEY") or None


def prepare_ray(local: bool) -> None:
    """Settings that Ray reads while it is imported or started; a Ray that is `local` gets a token if there is none.

    A program that imports Ray before this is called decides about tokens itself: Ray has looked by then.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ.get("RAY_AUTH_MODE") == "token":
        if local:
            _make_token()
        _check_token()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if local:
        # One process less to start; nobody announces the preemption of a laptop.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # its 30 s are too few for a laptop at work
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives the session would start a second Ray


def ray_token() -> str | Path | None:
    """Return where Ray takes its token from: the name of a variable, or a file; None without token authentication."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    asked = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(asked) if asked else Path.home() / ".ray" / "auth_token"


def _make_token() -> None:
    """Make the token of the clusters that this user starts, unless there is one; Ray's own could be read by anybody."""
    file = ray_token()
    if not isinstance(file, Path) or file.exists():
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as temporary:  # which is readable to its owner alone
            temporary.write(secrets.token_hex(32))
            temporary.flush()
            with contextlib.suppress(FileExistsError):
                os.link(temporary.name, file)
    except OSError as error:
        raise EnvironmentFault(f"cannot write Ray's token {file}: {error.strerror}; or set RAY_AUTH_TOKEN") from error


def _check_token() -> None:
    """Raise `EnvironmentFault` for a token file that was asked for and cannot be had; Ray would abort the process."""
    asked = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if asked and not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            found = Path(asked).read_text().strip()
        except OSError as error:
            raise EnvironmentFault(f"RAY_AUTH_TOKEN_PATH: {asked}: {error.strerror}") from error
        if not found:
            raise EnvironmentFault(f"RAY_AUTH_TOKEN_PATH: {asked} is empty")


def job_server_url(address: str | None) -> str:
    """URL of a cluster's job server: `address` (`host:port` or a URL), else the one set for this machine, else the local one.

    It is written back, because Ray prefers what its variable says to an address it is given.
    """
    asked = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "127.0.0.1:8265"
    os.environ["RAY_API_SERVER_ADDRESS"] = asked if "://" in asked else f"http://{asked}"
    return os.environ["RAY_API_SERVER_ADDRESS"]


def user_name() -> str | None:
    """Return the user who runs this process; None in a container that does not know its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def job_tags() -> dict[str, str]:
    """Tags that lead from a tracked run back to the Ray job it ran in."""
    submission = os.environ.get("RAY_JOB_SUBMISSION_ID")
    return {"ray.submission_id": submission} if submission else {}


def has_display() -> bool:
    """Return whether a window can be opened: always on macOS and Windows, elsewhere with a display server or a set browser."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
